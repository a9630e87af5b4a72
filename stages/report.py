"""Tables that the verbs print to stdout."""

import math
from collections.abc import Sequence

from rich.table import Table

from configs.schema import Config
from pipeline.metrics import Scores
from stages.inspect import PseudoLabelRow, summary
from stages.progress import output


def score_table(name: str, config: Config, gamma: float, scores: Scores) -> None:
    """Overall scores, then IoU of every class with the unseen ones marked."""
    output.print(f"{name} on {config.dataset.name}/{config.evaluate.split}, gamma {gamma:.4g}", highlight=False)
    overall = Table("pAcc", "mIoU seen", "mIoU unseen", "hIoU")
    overall.add_row(
        *(f"{value:.1f}" for value in (scores.pixel_accuracy, scores.miou_seen, scores.miou_unseen, scores.hiou))
    )
    output.print(overall)
    classes = Table("class", "", "IoU")
    for label, iou in zip(config.dataset.classes, scores.iou, strict=True):
        classes.add_row(
            label, "unseen" if label in config.dataset.unseen else "", "-" if math.isnan(iou) else f"{iou:.1f}"
        )
    output.print(classes)


def pseudo_label_table(rows: Sequence[PseudoLabelRow]) -> None:
    """One line a view, then the means."""
    table = Table("image", "view", "K-means regions", "fused groups", "coverage", "purity")
    for row in rows:
        purity = "-" if math.isnan(row.purity) else f"{row.purity:.2f}"
        table.add_row(row.image_id, str(row.view), str(row.clusters), str(row.groups), f"{row.coverage:.2f}", purity)
    means = summary(list(rows))
    table.add_section()
    table.add_row("mean", "", *(f"{means[key]:.2f}" for key in ("clusters", "groups", "coverage", "purity")))
    output.print(table)
