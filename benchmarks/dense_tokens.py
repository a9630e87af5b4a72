"""What each way to store dense tokens costs, and what it does to pseudo labels.

    python -m benchmarks.dense_tokens                     # scenes with its embedded teacher
    python -m benchmarks.dense_tokens FOLDER [PRETRAINED]  # also FOLDER's photos by ViT-B/16 at 512

Labels from decoded tokens are compared with those from the float32 tokens by the adjusted Rand index: 1 if they are the
same, about 0 if they agree by chance. PCA is fitted on half of the images; the other half is what is measured.
PRETRAINED is `teacher.pretrained`, by default none, which is random weights.
"""

import os
import platform
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image

from cache.dense import Pca, decode_dense, encode_dense, pca_size
from cache.encoding import ShardCodec
from cache.layout import array_specs
from cache.manifest import Manifest
from configs.load import resolve
from configs.schema import StageOne
from pipeline.data.dataset import IGNORE
from pipeline.data.views import draw_views, inside, normalise, padding_colour, replay, unannotated_tokens
from pipeline.pca import fit_pca
from pipeline.pseudo_labels import pseudo_labels
from pipeline.teacher.clip import FrozenClip
from stages.common.datasets import open_split
from tests.reference import adjusted_rand

SCENES, PHOTOS = 400, 32  # images
ENCODINGS = ("float16", "int8", "pca-16", "pca-32", "pca-64", "pca-96", "pca-128", "pca-256")
HEADER = ("storage.dense_tokens", "bytes a view", "of float16's", "ARI, K-means", "ARI, fused", "lowest, fused")
RANDOM = (
    "Random weights make tokens that look alike, so that K-means has little to go by, and that compress well. Trained "
    "ones will give other figures, of at most 2 C, C + 2 and 2 K bytes a token: run this with PRETRAINED for those."
)


def scenes(config: StageOne) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    dataset = open_split(config.dataset, Path("data"), "train")
    for row in range(SCENES):
        yield (dataset.ids[row], *dataset.training_pair(row))


def photos(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Without masks: nothing is annotated."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for path in files[:: max(1, len(files) // PHOTOS)]:
        image = np.asarray(Image.open(path).convert("RGB"))
        yield path.name, image, np.full(image.shape[:2], IGNORE, np.uint8)


def encode(
    config: StageOne, images: Iterator[tuple[str, np.ndarray, np.ndarray]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, G, G, C) float32 dense tokens of the first view of each image, and the unannotated ones, (N, G, G) bool."""
    teacher, size = FrozenClip(config.teacher), config.views.size
    tokens, free = [], []
    for name, image, seen in islice(images, count):
        view = draw_views(config.views, name, seen)[0]
        pixels = replay(view, image, size, padding_colour(teacher.mean))
        tokens.append(teacher.encode(normalise(pixels[None], teacher.mean, teacher.std))[1][0].numpy())
        free.append(unannotated_tokens(replay(view, seen, size), inside(view, size), teacher.grid(size)))
    return np.stack(tokens), np.stack(free)


def stored_bytes(arrays: dict[str, np.ndarray], encoding: str, width: int) -> float:
    """Bytes a view, compressed as a cache's shard is."""
    count, grid = arrays["dense_tokens"].shape[:2]
    specs = array_specs(width, grid, 1, count, encoding)
    manifest = Manifest.describe({}, {}, [str(row) for row in range(count)], 1, count, specs)
    return sum(len(ShardCodec(manifest, name).encode(0, 0, array)) for name, array in arrays.items()) / count


def labels_of(config: StageOne, tokens: np.ndarray, free: np.ndarray) -> np.ndarray:
    """(N, 2, G, G): K-means labels and fused groups."""
    return np.stack(pseudo_labels(torch.from_numpy(tokens), free, config.pseudo_labels), axis=1)


def agreement(truth: np.ndarray, found: np.ndarray, free: np.ndarray) -> tuple[str, str, str]:
    """The last columns of the table."""
    indices = np.array(
        [
            [adjusted_rand(a[unannotated], b[unannotated]) for a, b in zip(*pair, strict=True)]
            for *pair, unannotated in zip(truth, found, free, strict=True)
            if unannotated.any()
        ]
    )
    values = *indices.mean(axis=0), np.quantile(indices[:, 1], 0.05)
    return tuple(f"{value:.3f}" for value in values)


def measure(
    config: StageOne, sample: np.ndarray, tokens: np.ndarray, free: np.ndarray, truth: np.ndarray
) -> Iterator[tuple[str, ...]]:
    """One line of the table for each encoding, after one that says how much K-means makes of the least difference."""
    ulp = np.random.default_rng(0).choice(np.array([1 - 2**-23, 1, 1 + 2**-23], np.float32), tokens.shape)
    yield "float32, other last bits", "", "", *agreement(truth, labels_of(config, tokens * ulp, free), free)
    width, whole = tokens.shape[-1], 0.0
    for encoding in ENCODINGS:
        size = pca_size(encoding)
        if size is not None and size >= width:
            continue
        pca = None if size is None else Pca(*fit_pca(sample.reshape(-1, width), size))
        arrays = encode_dense(tokens, encoding, pca)
        bytes_ = stored_bytes(arrays, encoding, width)
        whole = whole or bytes_
        found = labels_of(config, decode_dense(arrays, pca), free)
        yield encoding, f"{bytes_:,.0f}", f"1 / {whole / bytes_:.1f}", *agreement(truth, found, free)


def section(title: str, config: StageOne, tokens: np.ndarray, free: np.ndarray) -> list[str]:
    sample, tokens, free = tokens[::2], tokens[1::2], free[1::2]
    truth = labels_of(config, tokens, free)
    counts = [[len(np.unique(x[shown])) for x in labels] for labels, shown in zip(truth, free, strict=True)]
    clusters, groups = np.mean(counts, axis=0)
    _, grid, _, width = tokens.shape
    rows = [HEADER, ("---",) * len(HEADER), *measure(config, sample, tokens, free, truth)]
    return [
        f"## {title}",
        "",
        f"C = {width}, a grid of {grid} x {grid}, lambda {config.pseudo_labels.threshold}; {len(sample)} views to fit "
        f"the PCA, {len(tokens)} to measure: {100 * free.mean():.0f} % of their tokens are unannotated, in "
        f"{clusters:.1f} clusters and {groups:.1f} groups a view.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def main(folder: str | None = None, pretrained: str = "none") -> None:
    torch.manual_seed(0)  # of random weights
    faiss.omp_set_num_threads(1)
    command = " ".join(["python -m benchmarks.dense_tokens", *(["FOLDER"] if folder else []), *sys.argv[2:]])
    lines = [
        "# Dense tokens as float16, int8 and principal components",
        "",
        f"`{command}`, which says what was done, on {os.cpu_count()} CPU cores ({platform.machine()}, torch "
        f"{torch.__version__}, faiss {faiss.__version__}).",
        "",
        "Bytes are those of a shard, compressed; ARI is the adjusted Rand index of labels made again from what is "
        "stored with those of the float32 tokens, mean over views; the last column is the 5th percentile over views. "
        "The first line is the most that can be had: float32 tokens whose last bit is another.",
        "",
    ]
    config = resolve("scenes").stage_one
    lines += section("scenes, its embedded teacher", config, *encode(config, scenes(config), SCENES))
    if folder:
        config = resolve("coco-stuff", assignments=[f"teacher.pretrained={pretrained}"]).stage_one
        title = f"Photos, {config.teacher.model} ({pretrained}) at {config.views.size}"
        if pretrained == "none":
            title += ": random weights"
        lines += section(title, config, *encode(config, photos(Path(folder)), PHOTOS))
    report = "\n".join([*lines, *([RANDOM, ""] if folder and pretrained == "none" else [])])
    (Path(__file__).parent / "dense_tokens.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main(*sys.argv[1:])
