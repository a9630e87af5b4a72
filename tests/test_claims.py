"""The claims in docs/evidence.md are those of the committed CSVs, and these are of the committed tables."""

import runpy
from pathlib import Path

import pytest

from configs.ablation import known_ablations, read_ablation
from stages.studies.ablate import markdown, read_csv
from tests.conftest import ROOT

TABLES = ROOT / "benchmarks" / "ablations"
MEASURED = [name for name in known_ablations() if (TABLES / f"{name}.csv").exists()]


def test_the_page_says_what_the_csvs_say() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "claims.py"))
    page = script["PAGE"].read_text()
    assert script["with_claims"](page, TABLES) == page, "run python benchmarks/claims.py"


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "claims.py"))
    header = "row,seed,fingerprint,cache,gamma,pixel_accuracy,seen,unseen,hiou,purity,views,shown,teacher_passes\n"
    for unseen, said in ((9, "holds for one seed"), (3, "does not hold")):
        lines = [f"{row},0,f,c,0,50,50,{value},20,90,10,10,0\n" for row, value in
                 (("all losses", unseen), ("no NEL", 5), ("no CE", 5), ("no BCE", 5), ("no GLM", 5))]  # fmt: skip
        (tmp_path / "losses.csv").write_text(header + "".join(lines))
        table = script["claims"](tmp_path)
        first = table.splitlines()[2]
        assert "collapse" in first and said in first and f"{unseen - 5:+.1f}" in first and "| 1 |" in first


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_row_of_a_table_has_the_same_seeds(name: str) -> None:
    """A table may lack rows that were not measured yet; its page leaves them empty."""
    results, table = read_csv(TABLES / f"{name}.csv"), read_ablation(name)[1]
    seeds, rows = sorted({result.seed for result in results}), {result.row for result in results}
    assert [(one.row, one.seed) for one in results] == [(r, seed) for r in table.rows if r in rows for seed in seeds]
    assert rows <= table.rows.keys() and len(rows) > 1
    text = (TABLES / f"{name}.md").read_text()
    assert markdown(text.split("`")[1], table, results) == text and (TABLES / f"{name}.png").exists()


def test_the_page_of_costs_is_what_its_script_computes() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "cost.py"))
    assert (ROOT / "docs" / "cost.md").read_text() == script["page"](), "run python benchmarks/cost.py"


def test_costs_by_hand() -> None:
    """ViT-B/16 at 512: 1,025 tokens of width 768 in 12 layers, and 1,024 patches of 16 x 16 x 3 pixels."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "cost.py"))
    layer = 12 * 1025 * 768**2 + 2 * 1025**2 * 768
    work, width, grid = script["teacher"]("ViT-B-16", 512)
    assert (width, grid) == (512, 32)
    assert work == pytest.approx((12 * layer + 1024 * 768 * 768) / 1e9, rel=1e-3)
    found = script["cost"](script["Job"](1000, 4, "ViT-B-16", 512, "segformer-b0"))
    kmeans = (10 + 1) * 4 * 1024 * 512 * 8 / 3.35e12  # 1,024 tokens of float64, moved four times an iteration
    assert found.passes == 4000 and found.seconds_one == pytest.approx(4000 * (1.01 / 433 / 3.35 + kmeans))
    assert found.bytes_labels == 4000 * (2 * 512 + 2 * 32 * 32 + 10 * 512 + 5 * 4)  # region tokens of ten groups
    assert found.bytes_dense == 4000 * 32 * 32 * 512 * 2
