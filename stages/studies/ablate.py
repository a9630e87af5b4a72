"""Trains and scores tables of runs that differ in a few settings, and compares them with the paper's claims."""

import csv
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from cache.reader import Cache, open_cache
from cache.sealed import sha256
from configs.ablation import Ablation, Sign, known_ablations
from configs.errors import UserError, writing
from configs.load import as_settings
from configs.schema import Config
from pipeline.data.dataset import SegmentationDataset
from stages.apply.evaluate import evaluate
from stages.apply.predictor import student_predictor
from stages.common.progress import figure, say
from stages.common.runs import RUNS, load_run, one_trainer, replace_file
from stages.inspect.regions import summary, table
from stages.precompute.stage import precompute
from stages.train.provenance import commit
from stages.train.stage import train

RESULT = "result.json"
# `evaluate.gamma` in fingerprints: in earlier tables, `auto` had two other meanings.
_GAMMAS: dict[float | str, float | str] = {"holdout": "auto", "auto": "spread"}
SCORES = {"seen": "mIoU seen", "unseen": "mIoU unseen", "hiou": "hIoU", "purity": "purity"}


@dataclass(frozen=True)
class Result:
    """One run, a line of the CSV. Percentages, except gamma; purity is that of the cache's pseudo labels.

    `fingerprint` names the resolved settings, the cache, the student's first weights and the splits that are scored;
    `views` are those of the cache that training may use, `shown` how many it was shown, `teacher_passes` how many of
    these met a live teacher. `commit` is the checkout's, with a + if files differed from it.
    """

    row: str
    seed: int
    fingerprint: str
    cache: str
    gamma: float
    pixel_accuracy: float
    seen: float
    unseen: float
    hiou: float
    purity: float
    views: int
    shown: int
    teacher_passes: int
    commit: str = ""


def ablate(
    name: str,
    ablation: Ablation,
    seeds: int,
    settings_of: Callable[[Sequence[str]], Config],
    command: str,
    data_root: Path,
    output: Path,
    device: str,
) -> list[Path]:
    """Run every row with every seed, unless it is done, and write OUTPUT/NAME.csv (after each run), .md and .png.

    A run is done if its fingerprint is in a table in OUTPUT or in runs/ablations, so tables share common runs. Gamma is
    chosen by the row's `evaluate.gamma`.

    Args:
        name, ablation, seeds: what is run.
        settings_of: resolves a configuration from `--set` texts.
        command: the command that reproduces the table.
        data_root, output, device: where.

    Returns:
        The files written.
    """
    output.mkdir(parents=True, exist_ok=True)
    chosen = {
        (row, seed): settings_of([*ablation.settings, *own, f"train.seed={seed}"])
        for row, own in ablation.rows.items()
        for seed in range(seeds)
    }  # all, before the first hour of training: a misspelt setting is found now
    files = [output / f"{name}{ending}" for ending in (".csv", ".md", ".png")]
    paths = {other: output / f"{other}.csv" for other in {name, *known_ablations()}}
    tables = {other: read_csv(path) for other, path in paths.items() if path.exists()}
    known = {one.fingerprint: one for results in tables.values() for one in results}
    found = {(one.row, one.seed): one for one in tables.get(name, [])}
    for number, ((row, seed), config) in enumerate(chosen.items(), 1):
        say(f"{name} {number}/{len(chosen)}: {row}, seed {seed}")
        found[row, seed] = _result(row, seed, config, data_root, device, known)
        write_csv(files[0], [found[key] for key in chosen if key in found])
    results = [found[key] for key in chosen]
    text = markdown(command, ablation, results)
    replace_file(files[1], lambda aside: aside.write_text(text, encoding="utf-8"))
    _plot(files[2], ablation, results)
    return files


def _result(row: str, seed: int, config: Config, data_root: Path, device: str, known: Mapping[str, Result]) -> Result:
    cache = open_cache(precompute(config, data_root, None, device))
    fingerprint = _fingerprint(config, cache, data_root)
    run = RUNS / "ablations" / fingerprint
    file = run / RESULT
    if fingerprint in known:
        return _of_now(replace(known[fingerprint], row=row, seed=seed))
    if not file.exists():
        opened = load_run(train(config, cache, data_root, run, device), device)
        predict = student_predictor(opened.student, opened.text_features, config)
        with one_trainer(run):  # and nobody else scores it
            gamma, scores = evaluate(predict, config, data_root, opened)
            shown = config.train.iterations * config.train.batch_size
            found = Result(
                row, seed, fingerprint, cache.manifest.fingerprint, gamma, scores.pixel_accuracy, scores.miou_seen,
                scores.miou_unseen, scores.hiou, 100 * _purity(cache, config, data_root),
                len(cache.kept_rows) * config.views.count, shown, 0 if config.train.teacher == "cached" else shown,
                commit(),
            )  # fmt: skip
            replace_file(file, lambda aside: aside.write_text(json.dumps(asdict(found), indent=1)))
    try:
        found = _typed({**json.loads(file.read_text()), "row": row, "seed": seed})
        if found.fingerprint != fingerprint:
            raise ValueError(f"it is of run {found.fingerprint}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the same command again") from error
    return _of_now(found)


def _of_now(found: Result) -> Result:
    if found.commit != commit():
        say(
            f"{found.fingerprint} was made at commit {found.commit or 'unknown'}, this is {commit()}: to redo it, "
            "delete it from the tables and from runs/ablations"
        )
    return found


def _fingerprint(config: Config, cache: Cache, data_root: Path) -> str:
    settings = as_settings(config)
    settings["evaluate"]["gamma"] = _GAMMAS.get(config.evaluate.gamma, config.evaluate.gamma)
    if not config.loss.local:  # the first tables are older than this loss
        settings["loss"] = {name: value for name, value in settings["loss"].items() if not name.startswith("local")}
    splits = sorted({config.evaluate.split, "holdout"} & set(config.dataset.splits))
    scored = [SegmentationDataset(config.dataset, data_root, split).digest() for split in splits]
    weights = Path(config.student.weights)
    first = sha256(weights.read_bytes()) if weights.is_file() else None
    content = json.dumps([settings, cache.manifest.fingerprint, first, scored], sort_keys=True)
    return sha256(content.encode())[:12]


def _typed(values: dict[str, Any]) -> Result:
    kinds = get_type_hints(Result)
    return Result(**{key: kinds[key](value) for key, value in values.items()})


_purities: dict[tuple[str, int], float] = {}


def _purity(cache: Cache, config: Config, data_root: Path) -> float:
    key = cache.location, config.views.count
    if key not in _purities:
        _purities[key] = summary(table(config, cache, data_root, cache.kept_rows.tolist()))["purity"]
    return _purities[key]


def write_csv(path: Path, results: Sequence[Result]) -> None:
    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)

    replace_file(path, write)


def read_csv(path: Path) -> list[Result]:
    """Read a file written by `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_typed(line) for line in csv.DictReader(file)]


def scores_of(results: Sequence[Result], row: str, score: str) -> np.ndarray:
    """(S,) a row's scores, seed by seed."""
    return np.array([getattr(result, score) for result in results if result.row == row])


def verdict(sign: Sign, results: Sequence[Result]) -> tuple[str, str, int]:
    """Whether the claim holds, by how much (mean and range of the differences per seed), and over how many seeds.

    With the same seed, rows share the image order and, where modules are the same, the initial weights, so their effect
    cancels in the difference. Beyond the seed spread: every seed of the better row scores above every seed of the
    other. Undecided: some seeds support the claim and some contradict it. Seeds without a score in one row are not
    counted.
    """
    rows = [
        {one.seed: value for one in results if one.row == row and not np.isnan(value := getattr(one, sign.score))}
        for row in (sign.better, sign.worse)
    ]
    seeds = sorted(rows[0].keys() & rows[1].keys())
    if not seeds:
        return "not measured", "", 0
    better, worse = (np.array([row[seed] for seed in seeds]) for row in rows)
    gain = better - worse
    if gain.max() <= 0:
        said = "does not hold"
    elif gain.min() <= 0:
        said = "undecided"
    elif len(seeds) > 1 and better.min() > worse.max():
        said = "holds beyond the seed spread"
    else:
        said = "holds for every seed" if len(seeds) > 1 else "holds for one seed"
    return said, spread(gain, "+.1f"), len(seeds)


def spread(values: np.ndarray, style: str = ".1f") -> str:
    """Mean and range of the seeds."""
    if not len(values):
        return ""
    mean, least, most = (figure(float(value), style) for value in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 or np.isnan(values).any() else f"{mean} ({least} to {most})"


def passes(results: Sequence[Result]) -> tuple[int, int]:
    """Teacher passes of the runs: each cache counts once, a live teacher in every run."""
    caches = {result.cache: 0 for result in results}
    for result in results:
        caches[result.cache] = max(caches[result.cache], result.views)
    runs = {result.fingerprint: result for result in results}
    taken = sum(caches.values()) + sum(result.teacher_passes for result in runs.values())
    return taken, sum(result.shown for result in runs.values())


def markdown(command: str, ablation: Ablation, results: Sequence[Result]) -> str:
    """The table that `command` made, and the verdicts on its signs."""
    taken, live = passes(results)
    lines = [
        f"# {ablation.title}",
        "",
        f"`{command}`; mean and range over the seeds, in %. Every run's seed, gamma and fingerprint are in the CSV "
        "beside. Gamma is chosen as `evaluate.gamma` says: `holdout` is the best on that split, `auto` follows from "
        "training images.",
        *(["", "Of every row: " + ", ".join(f"`{text}`" for text in ablation.settings)] if ablation.settings else []),
        "",
        f"| row | settings | {' | '.join(SCORES.values())} |",
        "|---|---|---|---|---|---|",
    ]
    for row, settings in ablation.rows.items():
        cells = [spread(scores_of(results, row, score)) for score in SCORES]
        lines.append(f"| {row} | {' '.join(f'`{text}`' for text in settings)} | {' | '.join(cells)} |")
    if ablation.signs:
        lines += ["", "| claim | by the paper | measured | verdict |", "|---|---|---|---|"]
        for sign in ablation.signs:
            said, gain, _ = verdict(sign, results)
            measured = f"{SCORES[sign.score]}: {sign.better} {gain} over {sign.worse}" if gain else ""
            lines.append(f"| {sign.claim} | {'yes' if sign.by_paper else 'no'} | {measured} | {said} |")
    lines += ["", f"Teacher passes: {taken:,}; with the teacher live in every run: {live:,}."]
    return "\n".join(lines) + "\n"


def _plot(path: Path, ablation: Ablation, results: Sequence[Result]) -> None:
    """Plot every seed as a dot and the mean as a line."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        say(f"{path.name} is not drawn: run pip install -e '.[ablate]' in the clip-zss folder")
        return
    rows = list(ablation.rows)
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    for axes, score in zip(figure.subplots(1, 3, sharey=True), ("seen", "unseen", "hiou"), strict=True):
        for place, row in enumerate(rows):
            values = scores_of(results, row, score)
            axes.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.6)
            if len(values):
                axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color="#d55e00")
        axes.set_xlabel(f"{SCORES[score]}, %")
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    figure.suptitle(textwrap.fill(ablation.title, 90))
    with writing(path):
        figure.savefig(path, metadata={"Software": None})
