"""bench inference: what is timed, and the table."""

from tests.conftest import World


def test_bench_inference(world: World) -> None:
    """Each model once for each number of classes; the base of a ratio is 1 times itself."""
    arguments = ("--student", "segformer-b0", "--classes", "2,5", "--size", "32", "--rounds", "1", "--output", "b.md")
    world.run("bench", "inference", *arguments)
    rows = [line.split(",") for line in (world.folder / "b.csv").read_text().splitlines()[1:]]
    assert [row[-5] for row in rows] == ["2"] * 3 + ["5"] * 3
    assert rows[0][-2] == rows[1][-1] == "1.00" and all(float(row[-4]) > 0 for row in rows)
    assert "--classes 2,5" in (world.folder / "b.md").read_text()


def test_mistakes(world: World) -> None:
    assert "--size 40" in world.fails("bench", "inference", "--size", "40")
    assert "--classes a" in world.fails("bench", "inference", "--classes", "a")
    assert "did you mean 'segformer-b0'" in world.fails("bench", "inference", "--student", "segformr-b0")
