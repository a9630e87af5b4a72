"""Why attention is no better than the mean on scenes (the paper's Table 3): what the CLS token tells, where GLM looks.

    python benchmarks/attention.py RUN...    # trained on one cache, say the seeds of a row of `ablate`

Writes benchmarks/attention.md, from training views. Presence: how often a class in the view is closer to its CLS token
than an absent class is to another's (area under the ROC curve), by the share of the view that it covers; a class's
similarities are taken from their mean over views. Focus: of Eq. 1's weights, the share on the highest tenth of the
positions, and the cosine of the feature they pool with the mean one. A minute for three runs of scenes.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from cache.reader import Cache, open_cache
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise, padding_colour, replay
from pipeline.learning.glm import attention
from pipeline.student.student import Student
from stages.common.datasets import open_split
from stages.common.runs import load_run
from stages.train.provenance import last_cache

OUTPUT = Path(__file__).with_suffix(".md")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
VIEWS, FOCUS_VIEWS = 500, 100


def _rows(cache: Cache, count: int) -> list[int]:
    return cache.kept_rows[:: max(1, len(cache.kept_rows) // count)].tolist()


def presence(cache: Cache, dataset: SegmentationDataset, config: Config) -> tuple[float, list[tuple[int, float]]]:
    """Classes in a view, on average; of each range of SHARES, how many cases, and the area under the curve."""
    tokens, covered = [], []
    for row in _rows(cache, VIEWS):
        mask = replay(cache.read("views", row)[0], dataset.mask(row), config.views.size)
        covered.append(np.bincount(mask.ravel(), minlength=256)[: len(config.dataset.classes)] / mask.size)
        tokens.append(cache.read("cls_tokens", row)[0].astype(np.float64))
    shares, cls_tokens = np.array(covered), np.array(tokens)
    similarities = (cls_tokens / np.linalg.norm(cls_tokens, axis=1, keepdims=True)) @ cache.text_features.T
    similarities -= similarities.mean(axis=0)
    absent = np.sort(similarities[shares == 0])
    found = []
    for least, most in pairwise(SHARES):
        present = similarities[(shares > least) & (shares <= most)]
        found.append((len(present), float((np.searchsorted(absent, present) / len(absent)).mean())))
    return float((shares > 0).sum(axis=1).mean()), found


@torch.no_grad()
def focus(student: Student, cache: Cache, dataset: SegmentationDataset, size: int) -> tuple[float, float]:
    """Mean share of the highest tenth of the weights, and mean cosine with the mean feature."""
    found = []
    for row in _rows(cache, FOCUS_VIEWS):
        shown = replay(cache.read("views", row)[0], dataset.image(row), size, padding_colour(student.mean))
        features = student(normalise(shown[None], student.mean, student.std))
        weights = attention(features, torch.from_numpy(cache.read("cls_tokens", row)[:1]).float())[0]
        flat = features.flatten(2)[0]
        highest = weights.topk(len(weights) // 10).values.sum()
        found.append((float(highest), float(torch.cosine_similarity(flat @ weights, flat.mean(dim=1), dim=0))))
    highest_tenth, cosine = np.mean(found, axis=0).tolist()
    return highest_tenth, cosine


def main(paths: list[Path]) -> None:
    if not paths:
        sys.exit(__doc__)
    config, cache = load_run(paths[0]).config, open_cache(last_cache(paths[0]))
    dataset = open_split(config.dataset, Path("data"), "train")
    count, by_share = presence(cache, dataset, config)
    lines = [
        "# What the CLS token tells, and where GLM looks",
        "",
        f"`python benchmarks/attention.py RUN...`, which says what was measured. A view has {count:.1f} classes.",
        "",
        "| a class covers | cases | told from absent ones |",
        "|---|---|---|",
        *(f"| {least:.0%} to {most:.0%} | {cases} | {area:.3f} |"
          for (least, most), (cases, area) in zip(pairwise(SHARES), by_share, strict=True)),
        "",
        "| run | weight on the highest tenth | cosine of attended and mean feature |",
        "|---|---|---|",
    ]  # fmt: skip
    for path in paths:
        highest, cosine = focus(load_run(path).student.eval(), cache, dataset, config.views.size)
        lines.append(f"| {path.name} | {highest:.0%} | {cosine:.2f} |")
    OUTPUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
