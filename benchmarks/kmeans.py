"""Pseudo labels by FAISS and by torch, beside a plain faiss.Kmeans loop; and how far the two agree.

    OMP_NUM_THREADS=1 python -m benchmarks.kmeans    # prints the tables of benchmarks/kmeans.md; minutes on one core

On a CPU one thread's CPU time is taken, which other processes disturb less than the clock on the wall; on a GPU, which
is timed when there is one, the wall's, with the maps brought back to the host. The ways take turns within each round,
and medians are reported. The tokens are drawn: objects with smooth borders on a common ground, smooth drift inside
them, and noise; "alike" are objects without noise and with hardly any drift, whose tokens float32 hardly tells apart.
"""

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from torch.nn.functional import interpolate

from configs.schema import PseudoLabels
from pipeline.pseudo_labels import pseudo_labels
from pipeline.pseudo_labels.kmeans import unit_length
from pipeline.pseudo_labels.seeds import window_seeds
from stages.common.devices import keep_freed_memory
from tests.reference import adjusted_rand

VIEWS, ROUNDS = 8, 5
CASES = [  # title, grid, channels, windows, drift, noise, batches
    ("32 x 32 x 512, little noise", 32, 512, (7, 3), 0.7, 0.5, (1, 16, 64)),
    ("32 x 32 x 512, much noise", 32, 512, (7, 3), 0.7, 1.5, (1,)),
    ("32 x 32 x 512, alike", 32, 512, (7, 3), 0.002, 0.0, (1,)),
    ("64 x 64 x 512, little noise", 64, 512, (15, 7), 0.7, 0.5, (1, 16)),
    ("8 x 8 x 128, little noise", 8, 128, (7, 3), 0.7, 0.5, (1, 16, 64)),
]


def draw_view(rng: np.random.Generator, grid: int, channels: int, drift: float, noise: float) -> np.ndarray:
    """Tokens (G, G, C) float32."""

    def smooth(depth: int, knots: int) -> np.ndarray:
        knotted = torch.from_numpy(rng.normal(size=(1, depth, knots, knots)))
        return interpolate(knotted, (grid, grid), mode="bicubic", align_corners=True)[0].permute(1, 2, 0).numpy()

    owner = smooth(12, 6).argmax(axis=2)
    tokens = rng.normal(size=channels) + rng.normal(size=(12, channels))[owner] + drift * smooth(channels, 10)
    return (tokens + noise * rng.normal(size=tokens.shape)).astype(np.float32)


def plain_kmeans(tokens: np.ndarray, seeds: np.ndarray, iterations: int) -> np.ndarray:
    """The K-means alone, as anyone would call it."""
    clustering = faiss.Kmeans(
        tokens.shape[1], len(seeds), niter=iterations, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(tokens),
    )  # fmt: skip
    clustering.train(tokens, init_centroids=seeds.astype(np.float32))
    return clustering.index.search(tokens, 1)[1][:, 0]


def race(ways: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each; round by round, each way once."""
    times = defaultdict(list)
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if turn:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def agreement(dense: torch.Tensor, masks: np.ndarray, config: PseudoLabels) -> list[str]:
    """Adjusted Rand index of FAISS's clusters and torch's, and of their groups: the views' mean and least."""
    pairs = zip(*(pseudo_labels(dense, masks, config, kmeans) for kmeans in ("faiss", "torch")), strict=True)
    found = [
        [adjusted_rand(*view) for view in zip(*(maps.reshape(len(maps), -1) for maps in pair), strict=True)]
        for pair in pairs
    ]
    return [f"{np.mean(views):.3f} ({min(views):.3f})" for views in found]


def measure(title: str, grid: int, channels: int, windows: tuple[int, ...], drift: float, noise: float) -> list[str]:
    """A row of the first table."""
    rng, config = np.random.default_rng(0), PseudoLabels(windows=windows)
    dense, masks = drawn(rng, grid, channels, drift, noise)
    tokens = unit_length(dense)
    seeds = window_seeds(tokens, torch.from_numpy(masks), windows)[0].numpy()
    ready = list(zip(tokens.flatten(1, 2).numpy(), seeds, strict=True))
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain_kmeans(*view, config.iterations) for view in ready],
        "whole": lambda: pseudo_labels(dense, masks, config, "faiss"),
    }
    ms = {name: value / VIEWS for name, value in race(ways, time.thread_time).items()}
    ratio = f"{ms['whole'] / ms['plain']:.2f}"
    times = [f"{ms['plain']:.2f}", f"{ms['whole']:.2f}", ratio]
    return [title, str(seeds.shape[1]), *times, *agreement(dense, masks, config)]


def drawn(
    rng: np.random.Generator, grid: int, channels: int, drift: float, noise: float, views: int = VIEWS
) -> tuple[torch.Tensor, np.ndarray]:
    """Views, of which no token is annotated."""
    dense = np.stack([draw_view(rng, grid, channels, drift, noise) for _ in range(views)])
    return torch.from_numpy(dense), np.ones((views, grid, grid), bool)


def measure_batch(case: tuple, batch: int) -> list[str]:
    """A row of the second table."""
    title, grid, channels, windows, drift, noise, _ = case
    config = PseudoLabels(windows=windows)
    dense, masks = drawn(np.random.default_rng(0), grid, channels, drift, noise, batch)
    ways: dict[str, Callable[[], object]] = {
        "faiss": lambda: pseudo_labels(dense, masks, config, "faiss"),
        "torch": lambda: pseudo_labels(dense, masks, config, "torch"),
    }
    ms = race(ways, time.thread_time)
    gpu = "not run"
    if torch.cuda.is_available():
        device = dense.cuda()
        gpu = f"{race({'gpu': lambda: pseudo_labels(device, masks, config)}, time.perf_counter)['gpu'] / batch:.3f}"
    return [title, str(batch), f"{ms['faiss'] / batch:.2f}", f"{ms['torch'] / batch:.2f}", gpu]


def machine() -> str:
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}, numpy {np.__version__}"
    return f"{names[0].strip()}, {len(names)} cores of which one is used, {gpu}, {platform.system()}; {versions}"


def table(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|---" * (head.count("|") - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    keep_freed_memory()
    print(machine() + "\n")
    head = "| tokens | seeds | faiss.Kmeans | pseudo_labels | ratio | ARI of clusters | ARI of groups |"
    print(table(head, [measure(*case[:-1]) for case in CASES]))
    head = "| tokens | views | FAISS | torch, CPU | torch, GPU |"
    print(table(head, [measure_batch(case, batch) for case in CASES for batch in case[-1]]))


if __name__ == "__main__":
    main()
