"""The claims table in docs/evidence.md, from the CSVs in benchmarks/ablations: `python benchmarks/claims.py`."""

import sys
from pathlib import Path

from configs.ablation import known_ablations, read_ablation
from stages.studies.ablate import SCORES, read_csv, verdict

ROOT = Path(__file__).parent.parent
PAGE, TABLES = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "ablations"
BEGIN, END = "<!-- claims: benchmarks/claims.py writes them -->\n", "<!-- end of claims -->\n"


def claims(folder: Path) -> str:
    """A Markdown table: what was measured of the signs of the tables that `folder` holds a CSV of."""
    lines = ["| claim | source | better by, mean and range of the seeds | seeds | verdict |", "|---|---|---|---|---|"]
    for name in known_ablations():
        if not (folder / f"{name}.csv").exists():
            continue
        results, table = read_csv(folder / f"{name}.csv"), read_ablation(name)[1]
        for sign in table.signs:
            said, gain, seeds = verdict(sign, results)
            if not seeds:
                continue
            rows = f"[{sign.better} against {sign.worse}](../benchmarks/ablations/{name}.md)"
            measured = f"{SCORES[sign.score]} {gain}: {rows}"
            source = "the paper" if sign.by_paper else "ours"
            lines.append(f"| {sign.claim} | {source} | {measured} | {seeds} | {said} |")
    return "\n".join(lines) + "\n"


def with_claims(page: str, folder: Path) -> str:
    """`page` with the table of now."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"docs/evidence.md lacks {BEGIN.strip()!r} or {END.strip()!r}")
    return before + BEGIN + claims(folder) + END + after


if __name__ == "__main__":
    PAGE.write_text(with_claims(PAGE.read_text(), TABLES))
