"""Lambda for each way to make dense tokens, chosen on training images, by seen classes that stand in for unseen ones.

    python -m benchmarks.dense_variants    # two minutes; writes dense_variants.md

The masks of unseen classes must not choose anything. So images that hold none of these are taken, six of the seen
classes are hidden as if they were unseen, and their pseudo labels are compared with their masks. The rows of
configs/ablations/dense.yaml have the lambdas that this chooses.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import draw_views, majority_tokens, normalise, padding_colour, replay, teacher_view
from pipeline.metrics import purity
from pipeline.pseudo_labels import pseudo_labels
from pipeline.teacher.clip import FrozenClip
from tests.reference import adjusted_rand

VARIANTS = ("plain", "maskclip", "sclip", "clearclip", "naclip")
LAMBDAS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
STAND_INS = ("star", "moon", "flower", "checks", "waves", "grid")
DATA = Path("data")


def images(config: Config, teacher: FrozenClip) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the teacher is shown (S, S, 3), unannotated tokens (G, G) bool and true classes (G, G) of the images."""
    stand_ins = config.dataset.model_copy(update={"unseen": STAND_INS})
    dataset, size = SegmentationDataset(stand_ins, DATA, "train"), config.views.size
    padding, grid = padding_colour(teacher.mean), teacher.grid(size)
    for row, name in enumerate(dataset.ids):
        image, mask = dataset.pair(row)
        if np.isin(mask, config.dataset.unseen_indices).any():
            continue
        seen = dataset.training_pair(row)[1]
        view = draw_views(config.views, name, seen)[0]
        shown, free = teacher_view(view, image, seen, size, padding, grid)
        if free.any():
            yield shown, free, majority_tokens(replay(view, mask, size), grid)


def line(config: Config, variant: str) -> tuple[str, int]:
    """The variant's row of the table, and of how many images it is."""
    teacher = FrozenClip(config.teacher.model_copy(update={"dense": variant}))
    shown, free, truth = map(np.stack, zip(*images(config, teacher), strict=True))
    tokens = teacher.encode(normalise(shown, teacher.mean, teacher.std))[1]
    found = []
    for threshold in LAMBDAS:
        settings = config.pseudo_labels.model_copy(update={"threshold": threshold})
        groups = pseudo_labels(tokens, free, settings)[1]
        views = list(zip(groups, truth, free, strict=True))
        agreement = np.mean([adjusted_rand(own[hidden], true[hidden]) for own, true, hidden in views])
        pure = np.average([purity(own, true) for own, true, _ in views], weights=free.sum(axis=(1, 2)))
        found.append((agreement, f"{agreement:.3f}, {100 * pure:.0f}"))
    best = max(found)
    cells = [f"**{cell}**" if (agreement, cell) == best else cell for agreement, cell in found]
    return f"| {variant} | {' | '.join(cells)} |", len(shown)


def main() -> None:
    faiss.omp_set_num_threads(1)
    config = resolve("scenes")
    rows = [line(config, variant) for variant in VARIANTS]
    lines = [
        "# Lambda of each dense variant, on scenes",
        "",
        f"`python -m benchmarks.dense_variants`, which says what was done, on {os.cpu_count()} CPU cores (torch "
        f"{torch.__version__}): {rows[0][1]} training images of seen classes, of which {', '.join(STAND_INS)} are "
        "hidden. Adjusted Rand index of the pseudo labels with the hidden masks, mean over images, and purity in %; "
        "the best index is bold.",
        "",
        f"| teacher.dense | {' | '.join(str(threshold) for threshold in LAMBDAS)} |",
        "|---" * (1 + len(LAMBDAS)) + "|",
        *(row[0] for row in rows),
    ]
    (Path(__file__).parent / "dense_variants.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
