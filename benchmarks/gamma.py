"""Scores over gamma, what calibrated stacking subtracts from seen classes: seen, unseen and their harmonic mean.

    python benchmarks/gamma.py RUN...    # runs of one dataset, say the seeds of a row of `ablate`

Writes benchmarks/ablations/gamma.csv, .md and .png: every run's scores on its own test split at each gamma, and what
the gamma chosen on `holdout` gives up of the best one, which only the test split knows. Half a minute a run of scenes.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stages.apply.evaluate import evaluate_predictor
from stages.apply.gamma import gamma_of_holdout
from stages.apply.predictor import student_predictor
from stages.common.datasets import open_split
from stages.common.runs import load_run

OUTPUT = Path(__file__).parent / "ablations"
GAMMAS = np.linspace(-6, 6, 49).round(2).tolist()
COLOURS = {"seen": "#0072b2", "unseen": "#d55e00", "hIoU": "#000000"}


def curve(path: Path, data_root: Path) -> tuple[list[tuple[float, float, float]], float, float]:
    """(seen, unseen, hIoU) at each of GAMMAS; the gamma that `holdout` chooses, and its hIoU."""
    run = load_run(path)
    predict = student_predictor(run.student, run.text_features, run.config)
    chosen = gamma_of_holdout(predict, open_split(run.config.dataset, data_root, "holdout"))
    split = open_split(run.config.dataset, data_root, run.config.evaluate.split)
    *found, at_chosen = evaluate_predictor(predict, split, [*GAMMAS, chosen])
    return [(scores.miou_seen, scores.miou_unseen, scores.hiou) for scores in found], chosen, at_chosen.hiou


def main(paths: list[Path]) -> None:
    if not paths:
        sys.exit(__doc__)
    found = {path.name: curve(path, Path("data")) for path in paths}
    with (OUTPUT / "gamma.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "gamma", *COLOURS])
        for name, (scores, _, _) in found.items():
            writer.writerows([name, gamma, *(f"{value:.3f}" for value in values)]
                             for gamma, values in zip(GAMMAS, scores, strict=True))  # fmt: skip
    lines = [
        "# Gamma",
        "",
        "`python benchmarks/gamma.py RUN...`; scores on the test split, in %. ![Curves](gamma.png)",
        "",
        "| run | gamma of `holdout` | its hIoU | best gamma | its hIoU | hIoU at 0 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (scores, chosen, at_chosen) in found.items():
        hious = [hiou for _, _, hiou in scores]
        best = int(np.argmax(hious))
        cells = (name, f"{chosen:.2f}", f"{at_chosen:.1f}", f"{GAMMAS[best]:.2f}", f"{hious[best]:.1f}",
                 f"{hious[GAMMAS.index(0)]:.1f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    (OUTPUT / "gamma.md").write_text("\n".join(lines) + "\n")

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scores, chosen, _ in found.values():
        for (name, colour), values in zip(COLOURS.items(), zip(*scores, strict=True), strict=True):
            axes.plot(GAMMAS, values, color=colour, alpha=0.7, label=name)
        axes.axvline(chosen, color="grey", linestyle=":", label="gamma of holdout")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(names, zip(handles, names, strict=True), strict=True)).values(), strict=True))
    axes.set_xlabel("gamma")
    axes.set_ylabel("mIoU and hIoU, %")
    axes.grid(alpha=0.3)
    figure.savefig(OUTPUT / "gamma.png", metadata={"Software": None})


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
