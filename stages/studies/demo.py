"""The whole pipeline on the embedded dataset: the teacher, a student with the paper's losses, and the default."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from cache.reader import open_cache
from configs.errors import writing
from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.metrics import Scores, predicted_mask
from pipeline.pictures import contact_sheet, legend, overlay, stacked
from stages.apply.evaluate import evaluate
from stages.apply.predictor import Predictor, student_predictor, teacher_predictor
from stages.common.progress import figure, output, say, show
from stages.common.runs import DATA, load_run, replace_file
from stages.inspect.regions import choose_rows, sheet, summary, table
from stages.precompute.stage import precompute
from stages.train.provenance import begun_with
from stages.train.stage import train

PAPER = "the paper's losses"
PICTURES = 6  # images in each picture
GAMMAS: dict[float | str, str] = {
    "auto": "every gamma is chosen on training images, which have no mask of an unseen class",
    "holdout": "every gamma is the best on the split `holdout`, which is neither trained nor tested on",
}
HEADER = ("what", "seed", "gamma", "pAcc", "mIoU seen", "mIoU unseen", "hIoU")


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    what: str
    seed: str
    gamma: float
    scores: Scores

    def cells(self) -> list[str]:
        s = self.scores
        values = (s.pixel_accuracy, s.miou_seen, s.miou_unseen, s.hiou)
        return [self.what, self.seed, figure(self.gamma, ".3g"), *map(figure, values)]


def demo(folder: Path, seeds: Sequence[int], assignments: Sequence[str], device: str) -> None:
    """Run everything and write FOLDER/scenes.md, pseudo-labels.png and predictions.png.

    A training that was started before with the same settings and cache is continued.

    Args:
        seeds: training seeds; for each, the paper's method and the default are trained on the same cache.
        assignments: `--set` texts for every step.
    """
    started = time.perf_counter()
    config = resolve("scenes", assignments=assignments)
    chosen = {
        (what, seed): resolve("scenes", assignments=[*assignments, f"train.seed={seed}", switch])
        for seed in seeds
        for what, switch in ((PAPER, "loss.local=false"), ("student", "loss.local=true"))
    }  # the default last: other verbs take the newest run
    folder.mkdir(parents=True, exist_ok=True)
    say("1/4 stage one: the teacher runs once")
    cache = open_cache(precompute(config, DATA, None, device))
    pseudo = summary(table(config, cache, DATA, cache.kept_rows.tolist()))
    pictures = [sheet(config, cache, DATA, choose_rows(cache, [], PICTURES, seed=0), folder / "pseudo-labels.png")]

    say("2/4 baseline: the teacher's dense prediction")
    teacher = teacher_predictor(config, device)
    teacher_gamma, teacher_scores = evaluate(teacher, config, DATA)
    results = [Result("teacher's dense tokens", "-", teacher_gamma, teacher_scores)]
    done_before = 0
    for (what, seed), settings in chosen.items():
        say(f"3/4 stage two: {what}, seed {seed}")
        before = begun_with(settings, cache)
        done_before += before is not None
        run = load_run(train(settings, cache, DATA, before, device), device)
        predict = student_predictor(run.student, run.text_features, settings)
        gamma, scores = evaluate(predict, settings, DATA, run)
        results.append(Result(what, str(seed), gamma, scores))
        if what == "student" and seed == seeds[0]:
            pair = (predict, gamma), (teacher, teacher_gamma)
            pictures.append(_predictions(config, pair, folder / "predictions.png"))

    say("4/4 results")
    took = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    if done_before:
        took += f", and before that {done_before} of {len(chosen)} trainings, or parts of them"
    report = folder / "scenes.md"
    text = _markdown(config, results, pseudo, seeds, assignments, took)
    replace_file(report, lambda aside: aside.write_text(text, encoding="utf-8"))
    shown = Table(*HEADER)
    for result in results:
        shown.add_row(*result.cells())
    output.print(shown)
    for line in (
        *_findings(results, pseudo),
        took,
        f"table: {report}",
        *(f"picture: {p}" for p in pictures),
    ):
        show(line)


def _predictions(config: Config, predictors: tuple[tuple[Predictor, float], ...], path: Path) -> Path:
    """Test images with the true mask, the student's prediction and the teacher's."""
    dataset = SegmentationDataset(config.dataset, DATA, config.evaluate.split)
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    rows, lines = range(0, len(dataset), max(1, len(dataset) // PICTURES)), []
    for row in list(rows)[:PICTURES]:
        image, mask = dataset.pair(row)
        predictions = [
            predicted_mask(predict(image), (mask.shape[0], mask.shape[1]), seen, unseen, gamma)
            for predict, gamma in predictors
        ]
        hidden = np.where(np.isin(mask, unseen), mask, IGNORE).astype(np.uint8)
        lines.append([image, *(overlay(image, labels, 0.75) for labels in (mask, hidden, *predictions))])
    titles = ("image", "true mask", "unseen classes only", "student, no CLIP", "teacher's dense")
    ids = [dataset.ids[row] for row in list(rows)[:PICTURES]]
    names = [f"{name}*" if name in config.dataset.unseen else name for name in config.dataset.classes]
    with writing(path):
        stacked([contact_sheet(lines, titles, ids), legend(dict(enumerate(names)))]).save(path)
    return path


def _findings(results: Sequence[Result], pseudo: dict[str, float]) -> list[str]:
    """The demo's main results, one per line."""
    teacher = results[0].scores.hiou
    full = [r.scores for r in results if r.what == "student"]
    paper = [r.scores for r in results if r.what == PAPER]
    worst = min(s.hiou for s in full)
    ours, theirs = (float(np.mean([s.miou_unseen for s in group])) for group in (full, paper))
    return [
        f"hIoU, student (lowest) / teacher's dense: {worst:.1f} / {teacher:.1f} = {worst / max(teacher, 1e-9):.2f} x",
        f"mIoU unseen (mean), student / {PAPER}: {ours:.1f} / {theirs:.1f} = {ours / max(theirs, 1e-9):.2f} x",
        f"pseudo labels: purity {pseudo['purity']:.3f}; regions before fusion {pseudo['clusters']:.2f}, after "
        f"{pseudo['groups']:.2f}; views without an unannotated token {pseudo['views_without_unannotated_token']:.0f}",
    ]


def _markdown(
    config: Config,
    results: Sequence[Result],
    pseudo: dict[str, float],
    seeds: Sequence[int],
    assignments: Sequence[str],
    took: str,
) -> str:
    command = f"clip-zss demo --seeds {','.join(map(str, seeds))}" + "".join(f" --set {text}" for text in assignments)
    lines = [
        f"# {config.dataset.name}: the student against its teacher, with and without local distillation",
        "",
        f"`{command}`, {took}, on {os.cpu_count()} CPU cores "
        f"({platform.machine()}, Python {platform.python_version()}).",
        f"Test split `{config.evaluate.split}`; {GAMMAS.get(config.evaluate.gamma, 'gamma is set')}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(result.cells()) + " |" for result in results),
        "",
        *(f"- {line}" for line in _findings(results, pseudo)),
        "",
        "IoU of unseen classes:",
        "",
        "| what | seed | " + " | ".join(config.dataset.unseen) + " |",
        "|" + "---|" * (2 + len(config.dataset.unseen)),
    ]
    for result in results:
        values = [result.scores.iou[config.dataset.classes.index(name)] for name in config.dataset.unseen]
        lines.append(f"| {result.what} | {result.seed} | " + " | ".join(map(figure, values)) + " |")
    return "\n".join(lines) + "\n"
