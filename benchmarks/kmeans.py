"""Pseudo labels of one 32 x 32 view of 512 channels: a plain faiss.Kmeans, our K-means, and many views in torch.

    python benchmarks/kmeans.py    # writes benchmarks/kmeans.md; about a minute on one core, and a GPU if there is one

The ways take turns within each round, and medians are reported: of one thread's CPU time, which other processes
disturb less than the clock on the wall, and of the wall's on a GPU. The tokens are drawn: objects with
smooth borders on a common ground, smooth drift inside them, and noise of two strengths.
"""

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from configs.schema import PseudoLabels
from pipeline.pseudo_labels import fuse_and_place, label_batched, prepare, pseudo_labels
from pipeline.pseudo_labels.kmeans import kmeans, unit_length
from pipeline.pseudo_labels.seeds import window_seeds

GRID, CHANNELS, VIEWS, ROUNDS, GPU_VIEWS = 32, 512, 8, 15, 64
CONFIG = PseudoLabels()
KINDS = [("all", 0.5), ("all", 1.5), ("half", 0.5), ("half", 1.5)]


def smooth(rng: np.random.Generator, channels: int, knots: int) -> np.ndarray:
    """(G, G, channels) normal numbers at knots x knots places, interpolated."""
    knotted = torch.from_numpy(rng.normal(size=(1, channels, knots, knots)))
    return interpolate(knotted, (GRID, GRID), mode="bicubic", align_corners=True)[0].permute(1, 2, 0).numpy()


def draw_view(rng: np.random.Generator, unannotated: str, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (G, G, C) float32 and which are unannotated (G, G): all, or the half where a smooth field is high."""
    owner = smooth(rng, 12, 6).argmax(axis=2)
    tokens = rng.normal(size=CHANNELS) + rng.normal(size=(12, CHANNELS))[owner] + 0.7 * smooth(rng, CHANNELS, 10)
    tokens += noise * rng.normal(size=tokens.shape)
    field = smooth(rng, 1, 5)[..., 0]
    return tokens.astype(np.float32), field > (np.median(field) if unannotated == "half" else -np.inf)


def plain_kmeans(tokens: np.ndarray, seeds: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """What our K-means replaces."""
    clustering = faiss.Kmeans(
        tokens.shape[1], len(seeds), niter=iterations, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(tokens),
    )  # fmt: skip
    clustering.train(tokens, init_centroids=seeds.astype(np.float32))
    return clustering.index.search(tokens, 1)[1][:, 0], clustering.centroids


def race(ways: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each; round by round, each way once."""
    times = defaultdict(list)
    for turn in range(ROUNDS + 2):
        for name, way in ways.items():
            start = clock()
            way()
            if turn >= 2:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def whole(view: tuple[np.ndarray, np.ndarray], cluster: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    """pseudo_labels with another K-means."""
    tokens, seeds, _ = prepare(torch.from_numpy(view[0])[None], torch.from_numpy(view[1])[None], CONFIG)
    fuse_and_place(*cluster(tokens[0].numpy(), seeds[0].numpy(), CONFIG.iterations), view[1], CONFIG)


def measure(kind: str, noise: float) -> tuple[list[str], list[str]]:
    """A row of each table: the ways, and the parts of ours."""
    rng = np.random.default_rng(0)
    views = [draw_view(rng, kind, noise) for _ in range(VIEWS)]
    dense, masks = torch.from_numpy(np.stack([view[0] for view in views])), np.stack([view[1] for view in views])
    ready = []
    for view in views:
        tokens, seeds, _ = prepare(torch.from_numpy(view[0])[None], torch.from_numpy(view[1])[None], CONFIG)
        ready.append((tokens[0].numpy(), seeds[0].numpy(), view[1]))
    found = [kmeans(tokens, seeds, CONFIG.iterations) for tokens, seeds, _ in ready]
    grids = [
        unit_length(torch.from_numpy(view[0]))[None] * torch.from_numpy(view[1])[None, ..., None] for view in views
    ]
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain_kmeans(tokens, seeds, CONFIG.iterations) for tokens, seeds, _ in ready],
        "kmeans": lambda: [kmeans(tokens, seeds, CONFIG.iterations) for tokens, seeds, _ in ready],
        "plain, whole": lambda: [whole(view, plain_kmeans) for view in views],
        "ours, whole": lambda: [pseudo_labels(*view, CONFIG) for view in views],
        "batched": lambda: label_batched(dense, masks, CONFIG),
        "unit length": lambda: [unit_length(torch.from_numpy(view[0][view[1]])) for view in views],
        "seeds": lambda: [
            window_seeds(grid, torch.from_numpy(mask)[None], CONFIG.windows)
            for grid, mask in zip(grids, masks, strict=True)
        ],
        "fusion": lambda: [fuse_and_place(*labels, mask, CONFIG) for labels, mask in zip(found, masks, strict=True)],
    }
    ms = {name: value / VIEWS for name, value in race(ways, time.thread_time).items()}
    gpu = f"{on_gpu(dense, masks):.3f}" if torch.cuda.is_available() else "-"
    title = (
        f"{kind}, {noise} | {np.mean([len(part[0]) for part in ready]):.0f} / {np.mean([len(p[1]) for p in ready]):.0f}"
    )
    first = [
        title, f"{ms['plain']:.2f}", f"{ms['kmeans']:.2f} ({ms['kmeans'] / ms['plain']:.2f})",
        f"{ms['plain, whole']:.2f}", f"{ms['ours, whole']:.2f} ({ms['ours, whole'] / ms['plain, whole']:.2f})",
        f"{ms['batched']:.2f} ({ms['batched'] / ms['ours, whole']:.2f})", gpu,
    ]  # fmt: skip
    parts = [ms["unit length"], ms["seeds"], ms["kmeans"], ms["fusion"]]
    rest = ms["ours, whole"] - sum(parts)
    second = [title, *(f"{part:.2f} ({100 * part / ms['ours, whole']:.0f} %)" for part in [*parts, rest])]
    return first, second


def on_gpu(dense: Tensor, masks: np.ndarray) -> float:
    """Milliseconds per view of a batch of GPU_VIEWS; the maps come back to the host, which waits for them."""
    repeats = GPU_VIEWS // len(dense)
    tokens, many = dense.repeat(repeats, 1, 1, 1).cuda(), np.tile(masks, (repeats, 1, 1))
    return race({"gpu": lambda: label_batched(tokens, many, CONFIG)}, time.perf_counter)["gpu"] / GPU_VIEWS


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}, numpy {np.__version__}"
    return f"{names[0]}, {len(names)} cores of which one is used, {gpu}, {platform.system()}; {versions}"


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    ways, parts = zip(*(measure(*kind) for kind in KINDS), strict=True)
    lines = [
        "# K-means of the pseudo labels",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/kmeans.py`, on: {machine()};",
        f"{os.getloadavg()[0]:.1f} processes wanted the cores meanwhile, this one included.",
        "",
        f"Milliseconds of CPU time per view of {GRID} x {GRID} tokens, {CHANNELS} channels; windows 7 and 3,",
        f"{CONFIG.iterations} iterations; {VIEWS} views, medians of {ROUNDS} interleaved rounds. `faiss` is a loop of",
        "faiss.Kmeans and a last search, `ours` what a CPU runs; `whole` is all of pseudo_labels with either.",
        "`batched` is the torch path of GPUs, here on one core. In brackets: ours over faiss, batched over ours.",
        "",
        f"| unannotated, noise | tokens / seeds | K-means: faiss | ours | whole: faiss | ours | batched, CPU | "
        f"batched, GPU, {GPU_VIEWS} views |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in ways),
        "",
        "Parts of ours, and their share:",
        "",
        "| unannotated, noise | tokens / seeds | unit length | seeds | K-means | fusion | rest |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in parts),
        "",
        "Ours multiplies only centroids that changed, which a batch of views cannot: on a CPU the batched path is the",
        "slower one, and pseudo_labels_of leaves it to tokens that lie on a GPU. An empty GPU column: not timed.",
        "`whole: faiss` shares our unit length, seeds and fusion; only K-means differs.",
    ]
    print("\n".join(lines))
    (Path(__file__).parent / "kmeans.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
