"""Images a second of the whole of stage one over those of the bare teacher's forward, side by side.

    python benchmarks/stage_one.py                        # ViT-B/16 at 512, random weights: quarter of an hour on a CPU
    python benchmarks/stage_one.py --embedded             # the scenes' own teacher, so small that the rest shows
    python benchmarks/stage_one.py --dataset photos.yaml --data-root data

Both run in the same worker processes, as `precompute` starts them, on the same views in the same batches; rounds
alternate. `bare` is FrozenClip.encode alone (CLS and dense tokens), on pixels that are in memory before the clock
starts; `stage` is all that make_shard does: reading, views, teacher, K-means and fusion, compression, flushed files,
records. Prints a Markdown table; the one in stage_one.md was printed so.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from dask.distributed import Client

from cache.store import absolute
from cache.writer import create_cache
from configs.load import as_settings, resolve
from configs.schema import Config
from stages.common.datasets import open_split
from stages.common.devices import choose_device
from stages.precompute.plan import Timing
from stages.precompute.shards import ShardJob, make_shard, part_lanes, worker_of
from stages.precompute.stage import _describe, cache_settings
from stages.precompute.workers import for_all, on_a_worker, worker_addresses, workers

VIT_B_16 = [
    "teacher.model=ViT-B-16-quickgelu", "teacher.pretrained=none", "views.size=512", "pseudo_labels.windows=[7,3]",
]  # fmt: skip
DENSE = ["storage.dense_tokens=float16", "views.count=1", "views.crop=whole"]


def bare(job: ShardJob) -> tuple[int, float]:
    """In a worker: views and seconds of the teacher alone on the shard's batches."""
    worker = worker_of(job)
    samples = [sample for row in range(job.start, job.stop) for sample in worker.views(job, row)[1]]
    size = job.precompute.batch_size
    batches = [worker.batch(samples[start : start + size]) for start in range(0, len(samples), size)]
    start = time.perf_counter()
    for batch in batches:
        worker.encode(batch)
    return len(samples), time.perf_counter() - start


def bare_round(client: Client, jobs: list[ShardJob]) -> float:
    """Views a second of all workers together, each on its share of the jobs, all at the same time."""
    addresses = worker_addresses(client)
    futures = [
        client.submit(bare, job, workers=[addresses[place % len(addresses)]], pure=False, resources=None)
        for place, job in enumerate(jobs[: len(addresses)])
    ]
    return sum(views / seconds for views, seconds in client.gather(futures))


def stage_round(client: Client, jobs: list[ShardJob]) -> tuple[float, Timing]:
    """Views a second from the first shard's beginning to the last one's end."""
    timing = Timing(part_lanes(jobs[0].device))
    start = time.perf_counter()
    for done in for_all(client, make_shard, jobs):
        timing.add(done.views, done.seconds)
    return timing.views / (time.perf_counter() - start), timing


def new_cache(client: Client, config: Config, data_root: Path, device: str, path: str) -> list[ShardJob]:
    """Creates a cache, and gives the jobs of its shards."""
    dataset = open_split(config.dataset, data_root, "train")
    settings = cache_settings(config.stage_one, dataset)
    base = ShardJob(
        settings=json.dumps(as_settings(config.stage_one)), fingerprint="", precompute=config.precompute,
        data_root=data_root.absolute(), device=device, cache=path, kmeans=None, holder="", index=0, first_view=0,
        start=0, stop=len(dataset),
    )  # fmt: skip
    manifest, features = _describe(client, base, config, dataset, settings, config.views.count)
    create_cache(path, manifest, dataset.ids, features)
    rows = map(manifest.shard_rows, range(manifest.shards))
    base = replace(base, kmeans=manifest.kmeans)
    return [replace(base, index=index, start=start, stop=stop) for index, (start, stop) in enumerate(rows)]


def measure(
    config: Config, data_root: Path, device: str, shards: int, rounds: int
) -> list[tuple[float, float, Timing]]:
    """(bare, stage, timing) of each round, after one that warms up."""
    found = []
    with workers(None, device, shards) as client:
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                jobs = new_cache(client, config, data_root, device, absolute(Path(folder) / "cache"))[:shards]
                if number == 0:
                    on_a_worker(client, make_shard, jobs[-1])
                    continue
                alone = bare_round(client, jobs)
                whole, timing = stage_round(client, jobs)
                found.append((alone, whole, timing))
                print(f"round {number}: bare {alone:.3f}, stage {whole:.3f} views/s; {timing}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--set", action="append", default=[], dest="set_")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    teacher = ["storage.shard_images=128"] if arguments.embedded else [*VIT_B_16, "storage.shard_images=8"]
    config = resolve(arguments.dataset, None, [*DENSE, *teacher, "precompute.batch_size=8", *arguments.set_])
    device = choose_device(arguments.device)
    rounds = measure(config, arguments.data_root, device, arguments.shards, arguments.rounds)
    ratios = [whole / alone for alone, whole, _ in rounds]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    print("| teacher, image | on | bare views/s | stage views/s | ratio, median (least to most) | parts, last round |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {config.teacher.model}, {config.views.size} | {name} | {statistics.median(r[0] for r in rounds):.2f} | "
        f"{statistics.median(r[1] for r in rounds):.2f} | {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}) | {rounds[-1][2]} |"
    )


if __name__ == "__main__":
    main()
