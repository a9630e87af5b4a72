"""What rules that choose gamma on training images lose of the best hIoU, which only the test split knows.

    python benchmarks/gamma_rules.py RUN... --data-root data --kept /tmp/margins [--ignore sky,building]

Writes benchmarks/gamma_rules.md. No rule reads a label of an unseen class, but for `holdout`. Of each run's training
images 100 are looked at, whole, and, for the rules of groups, as the first cached view, whose pseudo labels the cache
holds. --ignore treats masks of these seen classes as missing, as if they were a background that is ignored by design.
A minute a run of scenes; what was found is kept below --kept.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache.reader import open_cache
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.data.views import inside, padding_colour, replay
from pipeline.gamma import KEPT, keeping_gamma
from pipeline.inference import ClassLogits, Cut, whole
from pipeline.metrics import best_of, scores
from stages.apply.gamma import IMAGES
from stages.apply.predictor import Predictor, student_predictor
from stages.common.runs import load_run
from stages.train.provenance import last_cache

Arrays = dict[str, np.ndarray]
EDGES = np.linspace(-10, 10, 2001)  # gammas at which a split is scored
THRESHOLDS = np.linspace(-10, 10, 4001)  # gammas that rules choose among


# --- What is found of a run ---


def sides(logits: ClassLogits, seen: list[int], unseen: list[int], size: tuple[int, int]) -> Arrays:
    """Best logit and class of seen (bs, ns) and unseen ones (bu, nu), each (H, W)."""
    (bs, ns), (bu, nu) = (best_of(logits, classes, size) for classes in (seen, unseen))
    return {"bs": bs.numpy(), "ns": ns.numpy().astype(np.uint8), "bu": bu.numpy(), "nu": nu.numpy().astype(np.uint8)}


def curve(predict: Predictor, split: SegmentationDataset) -> np.ndarray:
    """(EDGES, 4): gamma, mIoU of seen and unseen classes, hIoU."""
    seen, unseen, count = split.config.seen_indices, split.config.unseen_indices, len(split.config.classes)
    by_seen, by_unseen = np.zeros((2, len(EDGES) + 1, count, count), np.int64)
    for row in range(len(split)):
        image, mask = split.pair(row)
        found, known = sides(predict(image), seen, unseen, mask.shape), mask != IGNORE  # type: ignore[arg-type]
        place = np.digitize(found["bs"] - found["bu"], EDGES)[known]
        np.add.at(by_seen, (place, mask[known], found["ns"][known]), 1)
        np.add.at(by_unseen, (place, mask[known], found["nu"][known]), 1)
    above, below = by_seen[::-1].cumsum(0)[::-1], by_unseen.cumsum(0)
    lines = [scores(above[i + 1] + below[i], seen, unseen) for i in range(len(EDGES))]
    return np.array([[g, s.miou_seen, s.miou_unseen, s.hiou] for g, s in zip(EDGES, lines, strict=True)])


def collect(path: Path, data_root: Path) -> Arrays:
    """Every second pixel of training images, whole (w_...) and of the first view (v_...), and curves of the splits."""
    run = load_run(path)
    config, student, size = run.config, run.student, run.config.views.size
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    predict, cache = student_predictor(student, run.text_features, config), open_cache(str(last_cache(path)))
    train = SegmentationDataset(config.dataset, data_root, "train")
    kept = cache.kept_rows
    rows = kept[np.linspace(0, len(kept) - 1, min(IMAGES, len(kept))).astype(int)].tolist()
    parts: dict[str, list[np.ndarray]] = {}
    for number, row in enumerate(rows):
        image, mask = train.pair(row)
        logits = predict(image)
        small = np.asarray(Image.fromarray(mask).resize(logits.size[::-1], Image.Resampling.NEAREST))
        found: Arrays = {f"w_{key}": value for key, value in sides(logits, seen, unseen, logits.size).items()}
        found |= {"w_mask": small, "w_img": np.full(small.shape, number)}
        view, groups = cache.read("views", row)[0], cache.read("pseudo_labels", row)[0]
        shown, covered = replay(view, image, size, padding_colour(student.mean)), inside(view, size)
        (logits,) = predict.logits([Cut(shown, whole(size, size))])
        of_view = sides(logits, seen, unseen, (size, size)) | {
            "mask": replay(view, mask, size), "img": np.full((size, size), number),
            "group": np.kron(groups, np.ones([size // len(groups)] * 2, np.uint8)),
        }  # fmt: skip
        for key, value in found.items():
            parts.setdefault(key, []).append(value[::2, ::2].ravel())
        for key, value in of_view.items():
            parts.setdefault(f"v_{key}", []).append(value[::2, ::2][covered[::2, ::2]])
    result: Arrays = {key: np.concatenate(values) for key, values in parts.items()}
    for split in {config.evaluate.split, "holdout"} & set(config.dataset.splits):
        name = "holdout" if split == "holdout" else "val"
        result[name] = curve(predict, SegmentationDataset(config.dataset, data_root, split))
    return result | {"seen": np.array(seen), "unseen": np.array(unseen), "classes": np.array(config.dataset.classes)}


# --- Rules ---


def above(margins: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of the margins (by weight) that is above each of THRESHOLDS."""
    order = np.argsort(margins)
    total = np.concatenate([[0], np.cumsum(np.ones(len(margins)) if weights is None else weights[order])])
    return 1 - total[np.searchsorted(margins[order], THRESHOLDS, "right")] / total[-1]


def best(seen: np.ndarray, unseen: np.ndarray) -> float:
    """The threshold of the best harmonic mean; of equals, the middle one."""
    mean = 2 * seen * unseen / np.maximum(seen + unseen, 1e-12)
    places = np.flatnonzero(mean >= mean.max() - 1e-12)
    return float(THRESHOLDS[places[len(places) // 2]])


def lower_mode(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Which values are below Otsu's threshold, that of the largest variance between two parts."""
    order = np.argsort(values)
    weight, total = np.cumsum(weights[order])[:-1], np.cumsum((weights * values)[order])
    rest = weights.sum() - weight
    between = weight * rest * (total[:-1] / weight - (total[-1] - total[:-1]) / rest) ** 2
    return values <= values[order[between.argmax()]]


def group_margins(margins: np.ndarray, groups: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean margin and area of each pseudo-label group of each image."""
    _, number = np.unique(images.astype(int) * 256 + groups, return_inverse=True)
    area = np.bincount(number).astype(float)
    return np.bincount(number, margins) / area, area


def training_hiou(margins: np.ndarray, best_seen: np.ndarray, truth: np.ndarray, annotated: np.ndarray) -> float:
    """The best hIoU of the seen classes and, as one class, all that is unannotated."""
    ious = []
    for name in np.unique(truth[annotated]):
        own, taken = annotated & (truth == name), best_seen == name
        right, wrong = own & taken, taken & ~own
        hits, others = (above(margins[part]) * part.sum() if part.any() else 0 for part in (right, wrong))
        ious.append(hits / (own.sum() + others))
    hits, others = (1 - above(margins[part]) for part in (~annotated, annotated))
    hidden = hits * (~annotated).sum()
    return best(np.mean(ious, axis=0), hidden / ((~annotated).sum() + others * annotated.sum()))


def rules(found: Arrays, ignored: tuple[str, ...]) -> dict[str, float]:
    """Gamma by each rule."""
    shown = [index for index in found["seen"].tolist() if found["classes"][index] not in ignored]
    margins, best_seen, truth = found["w_bs"] - found["w_bu"], found["w_ns"], found["w_mask"]
    annotated = np.isin(truth, shown)
    yes, no = margins[annotated], margins[~annotated]
    chosen = keeping_gamma(yes, best_seen[annotated].astype(int), truth[annotated].astype(int))
    assert chosen is not None
    result = {
        f"mean accuracy of seen classes kept at {KEPT:.0%}": chosen,
        f"{KEPT:.0%} of the annotated pixels kept": float(np.quantile(yes, 1 - KEPT)),
        "balance of pixels, annotated and not": best(above(yes), 1 - above(no)),
        "hIoU on training images, all unannotated one class": training_hiou(margins, best_seen, truth, annotated),
    }
    margins, hidden = found["v_bs"] - found["v_bu"], ~np.isin(found["v_mask"], shown)
    grouped = hidden & (found["v_group"] != IGNORE)
    seen_share = above(margins[~hidden])
    values, area = group_margins(margins[grouped], found["v_group"][grouped], found["v_img"][grouped])
    low = lower_mode(values, area)
    result["balance of pixels and groups, by area"] = best(seen_share, 1 - above(values, area))
    result["balance of pixels and groups, each group alike"] = best(seen_share, 1 - above(values))
    result["balance of pixels and the groups of the lower mode"] = best(seen_share, 1 - above(values[low], area[low]))
    if "holdout" in found:
        result["`holdout`, with masks of unseen classes"] = float(EDGES[found["holdout"][:, 3].argmax()])
    return result | {"0": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--kept", type=Path, default=Path("margins"))
    parser.add_argument("--ignore", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "gamma_rules.md")
    asked: Any = parser.parse_args()
    asked.kept.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Arrays] = {}
    for path in asked.runs:
        file = asked.kept / f"{path.name}.npz"
        if not file.exists():
            np.savez_compressed(file, **collect(path, asked.data_root))  # type: ignore[arg-type]
        runs[path.name] = dict(np.load(file))
    lines = [
        "# Rules for gamma",
        "",
        "`python benchmarks/gamma_rules.py RUN...`, which says what was done. Of each run the gamma that the rule "
        "chooses, and the hIoU (in %) that it loses of the best one, which only the test split knows.",
        "",
        *table(runs, ()),
    ]
    ignored = tuple(asked.ignore.split(",")) if asked.ignore else ()
    having = {name: found for name, found in runs.items() if set(ignored) & set(found["classes"].tolist())}
    if having:
        said = f"The same where masks of {' and '.join(ignored)} are taken for missing when gamma is chosen, as of a"
        lines += ["", f"{said} background that is ignored by design:", "", *table(having, ignored)]
    asked.output.write_text("\n".join(lines) + "\n")
    print(asked.output.read_text())


def table(runs: dict[str, Arrays], ignored: tuple[str, ...]) -> list[str]:
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    best_ones = []
    for name, found in runs.items():
        gammas, hious = found["val"][:, 0], found["val"][:, 3]
        best_ones.append(f"{gammas[hious.argmax()]:.2f}: hIoU {hious.max():.1f}")
        for rule, gamma in rules(found, ignored).items():
            lost = float(hious.max() - np.interp(gamma, gammas, hious))
            cells.setdefault(rule, {})[name] = gamma, max(0.0, lost)
    lines = ["| rule | " + " | ".join(runs) + " | worst |", "|" + "---|" * (len(runs) + 2)]
    lines.append("| the best gamma | " + " | ".join(best_ones) + " | |")
    for rule, own in sorted(cells.items(), key=lambda item: max(lost for _, lost in item[1].values())):
        shown = [f"{own[name][0]:.2f}: {own[name][1]:.1f}" if name in own else "" for name in runs]
        lines.append(f"| {rule} | {' | '.join(shown)} | {max(lost for _, lost in own.values()):.1f} |")
    return lines


if __name__ == "__main__":
    main()
