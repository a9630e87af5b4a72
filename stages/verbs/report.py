"""Tables that the commands print to stdout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from cache.manifest import short
from cache.store import open_store
from cache.verify import Damage, Info
from configs.dataset import AnyOf, Dataset
from configs.load import known_datasets, resolve
from configs.schema import Config
from pipeline.metrics import Scores
from stages.common.caches import CACHES
from stages.common.datasets import Check
from stages.common.progress import figure, output, show
from stages.common.runs import RUNS
from stages.inspect.regions import PseudoLabelRow, summary
from stages.precompute.plan import duration, size, timed_runs
from stages.upkeep.overview import CacheEntry, Entry, RunEntry

if TYPE_CHECKING:
    from stages.apply.bench import Row

SCORE_NAMES = {"hiou": "hIoU", "miou": "mIoU"}


def score_table(name: str, config: Config, gamma: float, scores: Scores, alpha: float | None) -> None:
    """Overall scores, then IoU of every class with the unseen ones marked.

    `alpha`: of the run, where it is known; gamma is of logits without it.
    """
    of_training = "" if alpha is None else f" (alpha {alpha:.4g}: {figure(alpha * gamma, '.4g')} of training's logits)"
    on = f"{config.dataset.name}/{config.evaluate.split}"
    show(f"{name} on {on}, gamma {figure(gamma, '.4g')}{of_training}")
    values = {"pAcc": scores.pixel_accuracy, "mIoU": scores.miou}
    if config.dataset.unseen:
        values |= {"mIoU seen": scores.miou_seen, "mIoU unseen": scores.miou_unseen, "hIoU": scores.hiou}
    overall = _folded(*values)
    overall.add_row(*map(figure, values.values()))
    output.print(overall)
    classes = _folded("class", "", "IoU")
    for label, iou in zip(config.dataset.classes, scores.iou, strict=True):
        classes.add_row(escape(label), "unseen" if label in config.dataset.unseen else "", figure(iou))
    output.print(classes)


def score_report(name: str, config: Config, gamma: float, scores: Scores, alpha: float | None) -> dict[str, Any]:
    """The same as plain JSON values; NaN becomes null, as do scores that need unseen classes."""
    values = dataclasses.asdict(scores)
    if not config.dataset.unseen:
        values |= {"miou_seen": None, "miou_unseen": None, "hiou": None}
    values["iou"] = dict(zip(config.dataset.classes, scores.iou, strict=True))
    about = {"of": name, "dataset": config.dataset.name, "split": config.evaluate.split}
    return {**about, "gamma": gamma, "alpha": alpha, **values}


def pseudo_label_table(rows: Sequence[PseudoLabelRow]) -> None:
    """One line per view, then the means."""
    table = _folded("image", "view", "K-means regions", "fused groups", "coverage", "purity")
    for row in rows:
        counts = str(row.view), str(row.clusters), str(row.groups)
        table.add_row(escape(row.image_id), *counts, f"{row.coverage:.2f}", figure(row.purity, ".2f"))
    means = summary(list(rows))
    table.add_section()
    table.add_row("mean", "", *(figure(means[key], ".2f") for key in ("clusters", "groups", "coverage", "purity")))
    output.print(table)


def dataset_list() -> None:
    """Every dataset in configs/datasets/."""
    table = _folded("dataset", "classes", "unseen", "images")
    for name in known_datasets():
        config = resolve(name).dataset
        counts = ", ".join(f"{split} {files.count or '?'}" for split, files in config.splits.items())
        table.add_row(name, str(len(config.classes)), str(len(config.unseen)), counts)
    output.print(table)


def dataset_layout(config: Dataset, data_root: Path) -> None:
    """The dataset's expected files, its classes with mask values and prompts, its named splits."""
    root = data_root / config.root
    show(f"{config.name}: {len(config.classes)} classes, {len(config.unseen)} of them unseen")
    show(f"folder: {root}" + ("" if root.is_dir() else f" (not there; else {data_root} itself)"))
    for split, files in config.splits.items():
        show(f"{split}: {files.count or 'any number of'} images")
        show(f"  images  {files.images}")
        for masks in files.masks:
            show(f"  masks   {masks.files}" + (f" (values {masks.values})" if masks.values else ""))
        for listing in files.ids:
            show(f"  ids     {listing}")
    values, ignored = config.value_of_class(None), ", ".join(map(str, config.ignore_index))
    classes = _folded("value", "class", "", "in prompts")
    for value, name in zip(values, config.classes, strict=True):
        unseen = "unseen" if name in config.unseen else ""
        words = config.prompts.get(name, (name,))
        prompts = "any of " + ", ".join(words.any) if isinstance(words, AnyOf) else ", ".join(words)
        classes.add_row(str(value), escape(name), unseen, escape(prompts))
    output.print(classes)
    show(f"ignored values: {ignored}")
    templates = config.templates if isinstance(config.templates, str) else ", ".join(config.templates)
    show(f"prompt templates: {templates}")
    for split, names in config.unseen_splits.items():
        show(f"--set dataset.unseen={split}: {', '.join(names)}")


def check_report(config: Dataset, found: Check) -> dict[str, Any]:
    """What `check_table` shows, as plain JSON values."""
    counts = zip(config.classes, found.images.tolist(), found.pixels.tolist(), strict=True)
    return {
        "dataset": config.name, "readable": found.readable, "pixels_without_a_class": found.unlabelled,
        "classes": {name: {"images": images, "pixels": pixels} for name, images, pixels in counts},
        "faults": found.faults, "warnings": found.warnings,
    }  # fmt: skip


def check_table(config: Dataset, found: Check) -> None:
    """The class histogram, if anything could be read, then every warning and fault."""
    table = Table()
    table.add_column("class", overflow="fold")
    for column in ("", "images", "pixels", "share"):
        table.add_column(column, overflow="fold", no_wrap=True)  # names wrap before numbers
    total = max(int(found.pixels.sum()), 1)
    for name, images, pixels in zip(config.classes, found.images.tolist(), found.pixels.tolist(), strict=True):
        unseen = "unseen" if name in config.unseen else ""
        table.add_row(escape(name), unseen, f"{images:,}", f"{pixels:,}", f"{100 * pixels / total:.2f} %")
    if found.readable:
        output.print(table)
    show(f"{found.readable:,} images, {found.unlabelled:,} pixels without a class")
    for line in (*(f"warning: {line}" for line in found.warnings), *(f"fault: {line}" for line in found.faults)):
        show(line)


def bench_table(rows: Sequence["Row"]) -> None:
    """Times and ratios of `bench inference`."""
    from stages.apply.bench import HEADER  # and with it open_clip, which no other table needs

    table = _folded(*HEADER)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.cells()))
    output.print(table)


def cache_table(found: Info) -> None:
    """Progress, sizes, and the settings that a cache was made from."""
    manifest = found.manifest
    show(f"{found.location}: {manifest.settings['dataset']['name']}, format {manifest.format}")
    show(f"fingerprint: {manifest.fingerprint}")
    show(
        f"{manifest.images:,} images with {manifest.views} views: {found.shards_done:,} of {manifest.shards:,} shards "
        f"done, {found.views_done:,} views, {found.skipped:,} images left out"
    )
    for name, borrowed in sorted(manifest.borrowed.items()):
        show(f"{name}: in {borrowed.cache}")
    sizes = _folded("array", "shape", "type", "bytes", "bytes a view")
    for name, spec in manifest.arrays.items():
        shape = (manifest.images, manifest.array_views(name), *spec.tail)
        total = found.array_bytes[name]
        each = total / max(found.views_done, 1)
        sizes.add_row(name, " x ".join(map(str, shape)), spec.dtype, f"{total:,}", f"{each:,.0f}")
    sizes.add_row("the rest", "", "", f"{found.other_bytes:,}", "")
    output.print(sizes)
    for run in timed_runs(open_store(found.location)):
        busy = ", ".join(f"{part} {seconds:,.1f} s" for part, seconds in run.busy_seconds.items())
        show(
            f"made: {run.views:,} views in {duration(run.seconds)} by {run.workers} workers; busy: {busy}; "
            f"bottleneck: {run.bottleneck}"
        )
    for section, values in manifest.settings.items():
        if section not in ("dataset", "files"):
            show(f"{section}: " + ", ".join(f"{key} {value}" for key, value in values.items()))


def damage_list(found: Sequence[Damage]) -> None:
    """One line for each file."""
    for damage in found:
        show(f"{damage.kind}: {damage.path}")
    if not found:
        show("every byte is as it was written")


def cache_report(found: Info) -> dict[str, Any]:
    """The same as plain JSON values."""
    names = [field.name for field in dataclasses.fields(found) if field.name != "manifest"]
    return {**{name: getattr(found, name) for name in names}, "manifest": found.manifest.model_dump(mode="json")}


def overview_table(caches: Sequence[CacheEntry], runs: Sequence[RunEntry]) -> None:
    """A table of each dataset's caches, then of its runs, with the settings that not all of them share."""
    if not caches and not runs:
        show(f"nothing yet below {CACHES}/ and {RUNS}/: precompute makes a cache, train a run")
    for dataset in sorted({entry.dataset for entry in caches}):
        table = _folded(f"cache of {escape(dataset)}", "views", "size", "differs in")
        for cache in (entry for entry in caches if entry.dataset == dataset):
            done = f"{cache.views:,}" + ("" if cache.views == cache.views_planned else f" of {cache.views_planned:,}")
            table.add_row(*map(escape, (cache.path, done, size(cache.bytes), _difference(cache))))
        output.print(table)
    for dataset in sorted({entry.dataset for entry in runs}):
        table = _folded(f"run of {escape(dataset)}", "iterations", "best validation", "size", "differs in")
        for run in (entry for entry in runs if entry.dataset == dataset):
            done = f"{run.iteration:,}" + ("" if run.iteration == run.iterations else f" of {run.iterations:,}")
            score = "-" if run.score is None else f"{SCORE_NAMES[run.score_name]} {run.score:.1f} on {run.score_split}"
            table.add_row(*map(escape, (run.path, done, score, size(run.bytes), _difference(run))))
        output.print(table)


def _folded(name: str, *columns: str) -> Table:
    """A table that wraps long cells, in the first column last, and cuts nothing off."""
    table = Table()
    table.add_column(name, overflow="fold", no_wrap=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _difference(entry: Entry) -> str:
    texts = [f"{name} {short(value)}" for name, value in entry.settings.items()]
    return entry.fault or ", ".join(texts)
