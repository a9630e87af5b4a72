"""Images a second of the whole of stage one beside clip-retrieval's inference, which stores image embeddings only.

    pip install --no-deps --target theirs clip-retrieval==2.45.0 pandas pyarrow python-dateutil six
    PYTHONPATH=theirs python benchmarks/beside_clip_retrieval.py PHOTOS
    PYTHONPATH=theirs python benchmarks/beside_clip_retrieval.py PHOTOS --embedded

Apart and without its requirements, as those exclude ours (open_clip 3, NumPy 2). Its reader, mapper, runner and writer
run unaltered, put together as `clip-retrieval inference --input_format files --enable_text False` does it, but for

- the model: its loader knows published weights only, so it is handed the open_clip model that our teacher holds, and
  open_clip's preprocessing for it;
- its logger, a process more, which is left out, in its favour;
- its web servers, and two loaders of weights, which it imports and does not need here: they are not imported.

Both take the same photos at the model's own image size, in batches of as many, on all cores: theirs is one process with
a torch thread a core, and its loader processes; ours is what `precompute` starts. Ours reads masks too, and all their
pixels are unlabelled: every token is clustered. Theirs is timed from the start of its runner until its files are
written, ours from the first shard's beginning to the last one's record; on both sides the model is loaded and warm.
Rounds alternate. Prints a Markdown table; beside_clip_retrieval.md was printed so.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from stage_one import new_cache, stage_round

from cache.store import absolute
from configs.load import resolve
from configs.schema import Config, Teacher
from pipeline.teacher.clip import FrozenClip
from stages.precompute.workers import workers

VIT_B_16 = [
    "teacher.model=ViT-B-16-quickgelu", "teacher.pretrained=none", "views.size=224", "pseudo_labels.windows=[7,3]",
]  # fmt: skip
EMBEDDED = [
    "teacher.model=teachers/scenes-vit.json", "teacher.pretrained=teachers/scenes-vit.safetensors", "views.size=128",
    "pseudo_labels.windows=[3,1]",
]  # fmt: skip
WHOLE = ["views.count=1", "views.crop=whole"]
ENDINGS = {".jpg", ".jpeg", ".png"}


def write_dataset(photos: Path, count: int, folder: Path) -> Path:
    """Links to the first `count` photos below a folder, and masks without a labelled pixel; the dataset's YAML."""
    found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in ENDINGS)[:count]
    if not found:
        raise SystemExit(f"there is no photo below {photos}")
    for name in ("images", "masks"):
        (folder / "photos" / name).mkdir(parents=True)
    for index, path in enumerate(found):
        (folder / "photos" / "images" / f"{index:05d}{path.suffix.lower()}").symlink_to(path.absolute())
        with Image.open(path) as photo:
            Image.new("L", photo.size, 255).save(folder / "photos" / "masks" / f"{index:05d}.png")
    dataset = {
        "name": "photos",
        "splits": {"train": {"images": "images/{id}.*", "masks": "masks/{id}.png"}},
        "classes": ["thing", "stuff"],
    }
    (folder / "photos.yaml").write_text(yaml.safe_dump(dataset))
    return folder / "photos.yaml"


class NoLogger:
    def start(self) -> None:
        pass

    def __call__(self, stats: object) -> None:
        pass

    def end(self) -> None:
        pass


@lru_cache(maxsize=1)
def their_inference(teacher: Teacher) -> tuple[SimpleNamespace, Callable[..., Any]]:
    """In their process: the package's four modules, and what stands for its `load_clip`."""
    found = importlib.util.find_spec("clip_retrieval")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("clip-retrieval is not installed: see the first lines of this script")
    root = Path(found.submodule_search_locations[0])
    for name, path in (("clip_retrieval", root), ("clip_retrieval.clip_inference", root / "clip_inference")):
        package = sys.modules[name] = ModuleType(name)  # their __init__ imports web servers
        package.__path__ = [str(path)]
    multiprocessing.set_start_method("fork", force=True)  # its loaders', as from a command line on Linux
    torch.set_num_threads(os.cpu_count() or 1)
    model = FrozenClip(teacher).model
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    def load_clip(**_: object) -> tuple[Any, Any, None]:
        return model, preprocess, None

    for name, attribute in (("all_clip", "load_clip"), ("sentence_transformers", "SentenceTransformer")):
        module = sys.modules[name] = ModuleType(name)
        setattr(module, attribute, load_clip)
    names = ("reader", "mapper", "writer", "runner")
    modules = {name: importlib.import_module(f"clip_retrieval.clip_inference.{name}") for name in names}
    return SimpleNamespace(**modules), load_clip


def their_round(teacher: Teacher, photos: Path, output: Path, batch_size: int, loaders: int) -> float:
    """In their process: seconds for all photos. As clip_retrieval/clip_inference/worker.py does it."""
    theirs, load_clip = their_inference(teacher)
    kinds = {"enable_text": False, "enable_image": True, "enable_metadata": False}
    runner = theirs.runner.Runner(
        reader_builder=lambda sampler: theirs.reader.FilesReader(
            sampler, load_clip()[1], None, str(photos), batch_size, loaders, **kinds
        ),
        mapper_builder=lambda: theirs.mapper.ClipMapper(
            use_mclip=False, clip_model="", use_jit=False, mclip_model="", warmup_batch_size=batch_size, **kinds
        ),
        writer_builder=lambda index: theirs.writer.NumpyWriter(index, str(output), output_partition_count=1, **kinds),
        logger_builder=lambda _: NoLogger(),
        output_partition_count=1,
    )
    start = time.perf_counter()
    runner(0)
    return time.perf_counter() - start


def measure(
    config: Config, folder: Path, device: str, rounds: int, loaders: int
) -> tuple[int, list[tuple[float, float]], str]:
    """How many photos; (their, our) images a second of each round, after one that warms up; our parts' shares."""
    photos = folder / "photos" / "images"
    count, found = len(list(photos.iterdir())), []
    with (
        workers(None, device, os.cpu_count() or 1) as client,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as their_process,
    ):
        for number in range(rounds + 1):
            output = folder / f"theirs-{number}"
            arguments = config.teacher, photos, output, config.precompute.batch_size, loaders
            theirs = count / their_process.submit(their_round, *arguments).result()
            jobs = new_cache(client, config, folder, device, absolute(folder / f"ours-{number}"))
            ours, timing = stage_round(client, jobs)
            embeddings = np.load(output / "img_emb" / "img_emb_0.npy")
            if (len(embeddings), timing.views) != (count, count):
                raise SystemExit(f"{count} photos, {len(embeddings)} embeddings of theirs and {timing.views} of ours")
            print(
                f"round {number}: theirs {theirs:.3f}, ours {ours:.3f} images/s; {timing}", file=sys.stderr, flush=True
            )
            if number:
                found.append((theirs, ours))
    return count, found, str(timing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of JPEG or PNG files")
    parser.add_argument("--count", type=int, default=128, help="photos to take")
    parser.add_argument("--embedded", action="store_true", help="the scenes' own small teacher, in place of a ViT-B/16")
    parser.add_argument("--set", action="append", default=[], dest="set_")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loaders", type=int, default=4, help="their loader processes")
    arguments = parser.parse_args()
    teacher = EMBEDDED if arguments.embedded else VIT_B_16
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        dataset = write_dataset(arguments.photos, arguments.count, folder)
        batches = ["precompute.batch_size=16", "storage.shard_images=16"]
        config = resolve(str(dataset), None, [*teacher, *WHOLE, *batches, *arguments.set_])
        count, rounds, parts = measure(config, folder, "cpu", arguments.rounds, arguments.loaders)
    ratios = [ours / theirs for theirs, ours in rounds]
    theirs, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    print("| model, image | photos | theirs, images/s | ours | ratio, median (least to most) | our parts, last round |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {config.teacher.model}, {config.views.size} | {count} | {theirs:.2f} | {ours:.2f} | "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {parts} |"
    )


if __name__ == "__main__":
    main()
