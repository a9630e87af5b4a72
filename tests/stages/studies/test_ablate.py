"""`ablate`: rows are trained and scored once, and what is said of them follows from the CSV."""

import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from cache.reader import open_cache
from cache.sealed import sha256
from configs.ablation import Ablation, Sign, known_ablations, read_ablation
from configs.load import as_settings, resolve
from pipeline.data.dataset import SegmentationDataset
from stages.inspect.regions import table
from stages.studies.ablate import Result, _fingerprint, markdown, passes, read_csv, spread, verdict, write_csv
from tests.conftest import World, write_world

TABLE = {
    "title": "Two rows",
    "rows": {"all": [], "no GLM": ["loss.global=false"], "live": ["train.teacher=online"]},
    "signs": [{"claim": "GLM helps", "better": "all", "worse": "no GLM", "score": "unseen"}],
}


def write_table(world: World, name: str, content: dict[str, object]) -> None:
    (world.folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def result(row: str, seed: int, **values: float) -> Result:
    scores = {"seen": 50.0, "unseen": 20.0, "hiou": 30.0, "purity": 90.0, **values}
    return Result(row=row, seed=seed, fingerprint=f"{row}{seed}", cache="c", gamma=0.5, pixel_accuracy=60.0, views=100,
                  shown=500, teacher_passes=0, **scores)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("ablations"))


@pytest.fixture(scope="module")
def tables(world: World) -> Path:
    """A table that has been run, with two seeds; its rows hold the world's settings."""
    write_table(world, "two", TABLE)
    world.run("ablate", "two.yaml", "--seeds", "2", "--data-root", world.data, "--config", world.config)
    return world.folder / "ablations"


def test_every_run_is_in_the_csv(world: World, tables: Path) -> None:
    found = read_csv(tables / "two.csv")
    wanted = [("all", 0), ("all", 1), ("no GLM", 0), ("no GLM", 1), ("live", 0), ("live", 1)]
    assert [(one.row, one.seed) for one in found] == wanted
    assert len({one.fingerprint for one in found}) == 6 and len({one.cache for one in found}) == 1
    for one in found:
        assert (world.folder / "runs" / "ablations" / one.fingerprint / "student.safetensors").exists()
    assert [one.teacher_passes for one in found] == [0, 0, 0, 0, 16, 16]
    text = (tables / "two.md").read_text()
    assert (
        "GLM helps" in text
        and "--seeds 2" in text
        and f"Teacher passes: {10 + 2 * 16}; with the teacher live in every run: {6 * 16}" in text
    )
    assert Image.open(tables / "two.png").size[0] > 500


def test_what_is_done_is_not_done_again(world: World, tables: Path) -> None:
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    run = world.folder / "runs" / "ablations" / read_csv(tables / "two.csv")[0].fingerprint / "student.safetensors"
    written = run.stat().st_mtime_ns
    done = world.run("ablate", "two.yaml", "--seeds", "2", "--data-root", world.data, "--config", world.config)
    assert "written: ablations/two.csv" in done.stdout
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before
    assert run.stat().st_mtime_ns == written


def test_a_row_run_anew_has_the_same_scores(world: World, tables: Path, tmp_path: Path) -> None:
    write_table(world, "again", {**TABLE, "rows": {"other name": []}, "signs": []})
    first = read_csv(tables / "two.csv")[0]
    (world.folder / "runs" / "ablations").rename(tmp_path / "aside")
    try:
        world.run("ablate", "again.yaml", "--seeds", "1", "--data-root", world.data, "--config", world.config,
                  "--output", tmp_path)  # fmt: skip
    finally:
        (world.folder / "runs" / "ablations").rename(tmp_path / "anew")
        (tmp_path / "aside").rename(world.folder / "runs" / "ablations")
    (again,) = read_csv(tmp_path / "again.csv")
    assert again == Result(**{**vars(first), "row": "other name"})


@pytest.mark.parametrize("damage", ["cut short", "a score that is no number", "another run's", "a field too few"])
def test_a_damaged_result_is_named(world: World, tables: Path, damage: str) -> None:
    file, other = (
        world.folder / "runs" / "ablations" / read_csv(tables / "two.csv")[index].fingerprint / "result.json"
        for index in (0, 1)
    )
    whole = file.read_text()
    values = json.loads(whole)
    file.write_text({
        "cut short": whole[:40],
        "a score that is no number": json.dumps({**values, "hiou": "high"}),
        "another run's": other.read_text(),
        "a field too few": json.dumps({name: value for name, value in values.items() if name != "hiou"}),
    }[damage])  # fmt: skip
    line = world.fails("ablate", "two.yaml", "--seeds", "2", "--data-root", world.data, "--config", world.config,
                       "--output", "elsewhere")  # fmt: skip
    file.write_text(whole)
    assert "result.json is damaged" in line and "delete it" in line


def test_a_result_of_other_code_is_named_and_taken(world: World, tables: Path) -> None:
    file = world.folder / "runs" / "ablations" / read_csv(tables / "two.csv")[0].fingerprint / "result.json"
    whole = file.read_text()
    file.write_text(json.dumps({**json.loads(whole), "commit": "0123456789ab"}))
    shutil.rmtree(world.folder / "elsewhere", ignore_errors=True)
    done = world.run("ablate", "two.yaml", "--seeds", "2", "--data-root", world.data, "--config", world.config,
                     "--output", "elsewhere")  # fmt: skip
    file.write_text(whole)
    assert f"{file.parent.name} was made at commit 0123456789ab" in done.stderr
    assert read_csv(world.folder / "elsewhere" / "two.csv")[0].commit == "0123456789ab"


def test_a_table_knows_what_it_holds_and_what_others_hold(world: World, tables: Path, tmp_path: Path) -> None:
    """Nothing is trained, though no run is left; what a table holds and does not reach again stays in it."""
    lines = (tables / "two.csv").read_text().splitlines(keepends=True)
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "bank.csv").write_text("".join(lines[:4]))  # as if the paper's table held the first three
    (folder / "two.csv").write_text(lines[0] + "".join(lines[4:]))
    (world.folder / "runs" / "ablations").rename(tmp_path / "aside")
    written = []
    try:
        with mock.patch("stages.studies.ablate.write_csv", lambda path, results: written.append(len(results))):
            world.run("ablate", "two.yaml", "--seeds", "2", "--data-root", world.data, "--config", world.config,
                      "--output", folder)  # fmt: skip
        assert not (world.folder / "runs" / "ablations").exists()
    finally:
        (tmp_path / "aside").rename(world.folder / "runs" / "ablations")
    assert written == [4, 5, 6, 6, 6, 6]
    assert (folder / "two.md").read_text().splitlines()[-9:] == (tables / "two.md").read_text().splitlines()[-9:]


def test_fingerprints_know_first_weights_and_what_is_scored(world: World, tables: Path, tmp_path: Path) -> None:
    assert tables.exists()  # and with it data and a cache
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some")
    config = resolve(config=world.config, assignments=[f"student.weights={weights}"])
    cache = open_cache(next(path for path in (world.folder / "caches").iterdir() if path.name != "text"))
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    first = _fingerprint(config, cache, data)
    weights.write_bytes(b"others")
    second = _fingerprint(config, cache, data)
    with SegmentationDataset(config.dataset, data, "val").root.joinpath("splits", "val.txt").open("r+") as file:
        file.truncate(len(file.readline()))
    assert len({first, second, _fingerprint(config, cache, data)}) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"x": ["loss.globl=false"]}, "signs": []}, "did you mean 'loss.global'"),
        ({"rows": {}, "signs": []}, "rows"),
        ({"signs": [{"claim": "c", "better": "al", "worse": "no GLM"}]}, "is not a row; did you mean 'all'"),
        ({"signs": [{"claim": "c", "better": "all", "worse": "no GLM", "score": "iou"}]}, "score"),
        ({"titel": "x"}, "did you mean 'title'"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(world: World, change: dict[str, object], said: str) -> None:
    write_table(world, "wrong", {**TABLE, **change})
    assert said in world.fails("ablate", "wrong.yaml", "--data-root", world.data, "--config", world.config)
    assert not (world.folder / "ablations" / "wrong.csv").exists()


def test_unknown_tables_are_named(world: World) -> None:
    assert "did you mean 'losses'" in world.fails("ablate", "loses")


def test_csv_goes_round(tmp_path: Path) -> None:
    rows = [result('a, with "marks"', 0, hiou=1 / 3), result("b", 1, purity=float("nan"))]
    write_csv(tmp_path / "x.csv", rows)
    found = read_csv(tmp_path / "x.csv")
    assert found[0] == rows[0] and np.isnan(found[1].purity)
    with (tmp_path / "x.csv").open() as file:
        assert len(list(csv.reader(file))) == 3


@pytest.mark.parametrize(
    ("better", "worse", "said", "gain"),
    [
        ((30, 32), (20, 29), "holds beyond the seed spread", "+6.5 (+3.0 to +10.0)"),
        ((30, 32), (20, 30), "holds for every seed", "+6.0 (+2.0 to +10.0)"),
        ((30, 40), (29, 39), "holds for every seed", "+1.0 (+1.0 to +1.0)"),
        ((30, 32), (30, 31), "undecided", "+0.5 (+0.0 to +1.0)"),
        ((30, 40), (39, 29), "undecided", "+1.0 (-9.0 to +11.0)"),
        ((30, 32), (33, 31), "undecided", "-1.0 (-3.0 to +1.0)"),
        ((30, 32), (30, 32), "does not hold", "+0.0 (+0.0 to +0.0)"),
        ((30, 32), (40, 41), "does not hold", "-9.5 (-10.0 to -9.0)"),
        ((30,), (29,), "holds for one seed", "+1.0"),
        ((30,), (30,), "does not hold", "+0.0"),
        ((30, 32, 1), (20, 29), "holds beyond the seed spread", "+6.5 (+3.0 to +10.0)"),
        ((30, 32), (31,), "does not hold", "-1.0"),
        ((30, 32), (), "not measured", ""),
    ],
)
def test_verdicts(better: tuple[float, ...], worse: tuple[float, ...], said: str, gain: str) -> None:
    found = [result("x", seed, hiou=value) for seed, value in enumerate(better)]
    found += [result("y", seed, hiou=value) for seed, value in enumerate(worse)]
    seeds = min(len(better), len(worse))
    assert verdict(Sign(claim="c", better="x", worse="y"), found[::-1]) == (said, gain, seeds)


def test_an_unfinished_table_has_a_page_all_the_same() -> None:
    found = [result("x", 0), result("x", 1), result("y", 0, hiou=20.0)]
    sign = Sign(claim="c", better="x", worse="y")
    text = markdown("command", Ablation(title="t", rows={"x": (), "y": (), "z": ()}, signs=(sign,)), found)
    assert "| z |  |  |  |  |  |" in text and "hIoU: x +10.0 over y | holds for one seed" in text


def test_purity_is_that_of_the_views_that_are_asked_for(world: World) -> None:
    crops = ("views.crop=random", "views.count=3", "views.ratio=[0.5, 1.5]")
    world.run("precompute", "--config", world.config, "--cache", "caches/three", *(f"--set={text}" for text in crops))
    cache = open_cache(world.folder / "caches" / "three")
    for count in (1, 2):
        config = resolve(config=world.config, assignments=[*crops, f"views.count={count}"])
        assert [row.view for row in table(config, cache, world.data, [0, 1])] == [*range(count)] * 2


def test_passes_count_a_cache_once_and_a_shared_run_once() -> None:
    found = [result("x", 0), result("x", 1), result("live", 0)]
    found[2] = Result(**{**vars(found[2]), "teacher_passes": 500})
    assert passes(found) == (600, 1500)
    assert passes([found[0], found[0]]) == (100, 500)


def test_spread() -> None:
    assert spread(np.array([1.0, 3.0])) == "2.0 (1.0 to 3.0)"
    assert spread(np.array([1.0])) == "1.0"


def test_holdout_has_the_fingerprint_of_what_auto_was(world: World, tables: Path) -> None:
    """So that tables made then stay good; what is `auto` now has another."""
    assert tables.exists()  # and with it data and a cache
    cache = open_cache(next(path for path in (world.folder / "caches").iterdir() if path.name != "text"))
    found = {}
    for asked in ("auto", "holdout", "0.5"):
        config = resolve(config=world.config, assignments=[f"evaluate.gamma={asked}"])
        found[asked] = _fingerprint(config, cache, world.data)
    scored = [SegmentationDataset(config.dataset, world.data, split).digest() for split in ("holdout", "val")]
    settings = as_settings(resolve(config=world.config, assignments=["evaluate.gamma=auto"]))
    content = json.dumps([settings, cache.manifest.fingerprint, None, scored], sort_keys=True)
    assert found["holdout"] == sha256(content.encode())[:12]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("name", known_ablations())
def test_every_table_resolves(name: str) -> None:
    table: Ablation = read_ablation(name)[1]
    settings = [
        yaml.safe_dump(resolve("scenes", assignments=[*table.settings, *own]).model_dump(mode="json"))
        for own in table.rows.values()
    ]
    assert len(set(settings)) == len(settings), "two rows are the same run"
