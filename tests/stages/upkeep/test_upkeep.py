"""`runs`, `doctor`, results as JSON, and shell completion."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

import stages.common.runs
import stages.upkeep.doctor
from configs.errors import UserError
from pipeline.learning.criterion import Criterion
from stages.common.devices import choose_device, lanes, local_workers, obstacle
from stages.common.ranks import ranks
from stages.upkeep.agreement import agreement
from stages.verbs.options import print_result
from tests.conftest import World


@pytest.fixture
def messy(world: World, trained: Path, tmp_path: Path) -> World:
    """Two caches, of which one is broken; runs: a good one, one that was begun, one that is broken, two of others'."""
    for name in ("caches/tiny", "runs/one"):  # other tests leave others
        shutil.copytree(world.folder / name, tmp_path / name)
    own = World(tmp_path)
    broken = own.folder / "caches" / "broken"
    shutil.copytree(own.folder / "caches" / "tiny", broken)
    (broken / "manifest.json").write_text("{")
    for name in ("ablations/begun", "broken"):
        shutil.copytree(own.folder / "runs" / "one", own.folder / "runs" / name)
    begun = own.folder / "runs" / "ablations" / "begun"
    for path in (begun / "student.safetensors", begun / "scores.jsonl"):
        path.unlink()
    shutil.rmtree(begun / "checkpoints")
    settings = yaml.safe_load((begun / "config.yaml").read_text())
    settings["loss"]["bank"] = 7
    (begun / "config.yaml").write_text(yaml.safe_dump(settings))
    (own.folder / "runs" / "broken" / "config.yaml").write_text("- no\n- settings\n")
    dated = "dataset: {name: x}\ntrain: {iterations: 2020-01-01}\n"
    for name, text in (("dated", dated), ("other", "model: resnet\n")):
        (own.folder / "runs" / name).mkdir()
        (own.folder / "runs" / name / "config.yaml").write_text(text)
    return own


def test_runs_lists_caches_and_runs(messy: World) -> None:
    found = json.loads(messy.run("runs", "--json", "-").stdout)
    caches = {Path(entry["path"]).name: entry for entry in found["caches"]}
    assert caches["tiny"]["views"] == caches["tiny"]["views_planned"] == 10 and caches["tiny"]["fault"] is None
    assert "manifest.json is damaged" in caches["broken"]["fault"]
    folder = messy.folder / "caches" / "tiny"
    assert caches["tiny"]["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    runs = {entry["path"]: entry for entry in found["runs"]}
    assert list(runs) == [f"runs/{name}" for name in ("ablations/begun", "broken", "dated", "one", "other")]
    assert all("not a run of clip-zss" in runs[f"runs/{name}"]["fault"] for name in ("dated", "other"))
    best = max(json.loads(line)["hiou"] for line in (messy.folder / "runs/one/scores.jsonl").read_text().splitlines())
    good, begun = runs["runs/one"], runs["runs/ablations/begun"]
    assert (good["score"], good["score_name"], good["score_split"]) == (best, "hiou", "holdout")
    assert (good["iteration"], good["iterations"], good["settings"]) == (4, 4, {"loss.bank": "2"})
    assert (begun["iteration"], begun["score"], begun["settings"]) == (0, None, {"loss.bank": "7"})
    assert "config.yaml is damaged" in runs["runs/broken"]["fault"]


def test_runs_as_a_table(messy: World) -> None:
    shown = messy.run("runs").stdout
    for text in ("caches/tiny", "0 of 4", "loss.bank 7", "on holdout", "config.yaml is damaged"):
        assert text in shown, shown


def test_runs_where_there_are_none(world: World, tmp_path: Path) -> None:
    empty = World(tmp_path)
    assert json.loads(empty.run("runs", "--json", "-").stdout) == {"caches": [], "runs": []}
    assert empty.run("runs").returncode == 0


def test_doctor_runs_one_image_through_everything(tmp_path: Path) -> None:
    here = World(tmp_path)
    done = here.run("doctor", "--device", "cpu", "--json", "found.json")
    found = {item["part"]: item for item in json.loads((tmp_path / "found.json").read_text())}
    for part in ("stage one", "cache", "stage two", "prediction"):
        assert "works" in found[part]["text"] and f"ok    {part}: works" in done.stdout
    assert "torch" in found["packages"]["text"] and "free in" in found["disk"]["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    "part, name, missing",
    [("stage one", "precompute", ("cache", "stage two")), ("stage two", "train", ("prediction",))],
)
def test_doctor_names_the_part_that_fails(tmp_path: Path, part: str, name: str, missing: tuple[str, ...]) -> None:
    here = World(tmp_path)
    with mock.patch.object(stages.upkeep.doctor, name, side_effect=RuntimeError("no\nluck")):
        done = here.run("doctor", "--device", "cpu", "--json", "-", check=False)
    assert done.returncode == 1
    found = {item["part"]: item for item in json.loads(done.stdout)}
    assert found[part]["fault"] and found[part]["text"] == "no luck (RuntimeError)"
    assert not found.keys() & set(missing)
    assert not list(tmp_path.iterdir())


def test_doctor_finds_a_cache_that_changed_on_the_disk(tmp_path: Path) -> None:
    here = World(tmp_path)
    make = stages.upkeep.doctor.precompute

    def damage(config: object, folder: Path, cache: str, device: str) -> None:
        make(config, folder, cache, device)
        next(Path(cache).glob("arrays/cls_tokens/c.*")).write_bytes(b"other")

    with mock.patch.object(stages.upkeep.doctor, "precompute", damage):
        done = here.run("doctor", "--device", "cpu", check=False)
    assert done.returncode == 1 and "FAULT cache: changed:" in done.stdout


@pytest.mark.parametrize(("device", "why"), [("cuda:99", "cannot be used here ("), ("meta", "choose auto, cpu, cuda")])
def test_doctor_tells_versions_and_why_a_device_cannot_be_used(tmp_path: Path, device: str, why: str) -> None:
    done = World(tmp_path).run("doctor", "--device", device, "--json", "-", check=False)
    assert done.returncode == 1
    found = {item["part"]: item for item in json.loads(done.stdout)}
    assert "torch" in found["packages"]["text"] and "free in" in found["disk"]["text"] and "stage one" not in found
    assert found["device"]["fault"] and found["device"]["text"].startswith(f"--device {device}")
    assert why in found["device"]["text"]


def test_torchs_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(*_: object, **__: object) -> None:
        raise RuntimeError("no driver\nand much advice")

    assert choose_device("cpu") == "cpu" and obstacle("cpu") is None
    monkeypatch.setattr(torch, "empty", no_driver)
    with pytest.raises(UserError, match=r"^--device cuda:1 cannot be used here \(no driver\): choose cpu or auto$"):
        choose_device("cuda:1")
    for device in ("meta", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(UserError, match=r"choose auto, cpu, cuda, cuda:N or mps$"):
            choose_device(device)


def test_the_gpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"^--device mps cannot be used here \(.*\): choose cpu or auto$"):
            choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", mock.Mock())
    assert choose_device("auto") == choose_device("mps") == "mps"
    assert local_workers("mps") == 1 and lanes("mps").readers >= 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^--device mps is for one process: start it without torchrun"), ranks("mps"):
        raise AssertionError


@pytest.mark.parametrize(
    ("file", "message"),
    [("nodir/s.json", "there is no folder nodir, make it first"), (".", "is a folder: name a file in it")],
)
@pytest.mark.parametrize("verb", [("evaluate", "--run", "no-such-run"), ("cache", "info", "no-cache"), ("doctor",)])
def test_a_json_file_that_cannot_be_is_refused_before_the_work(
    world: World, verb: tuple[str, ...], file: str, message: str
) -> None:
    line = world.fails(*verb, "--json", file)
    assert line.startswith(f"error: --json {file}") and line.endswith(message)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file, link = tmp_path / "found.json", tmp_path / "link.json"
    file.write_text("old")
    with (
        mock.patch.object(stages.common.runs.os, "replace", side_effect=OSError(28, "no room")),
        pytest.raises(UserError, match=r"found\.json \(no room\)"),
    ):
        print_result(lambda: None, [1, float("nan")], file)
    assert file.read_text() == "old"
    link.symlink_to(file)  # as /dev/stdout is one
    print_result(lambda: None, [1, float("nan")], link)
    assert json.loads(file.read_text()) == [1, None] and link.is_symlink()
    print_result(lambda: None, [2], file)
    assert json.loads(file.read_text()) == [2]


def test_data_as_json(world: World, tmp_path: Path) -> None:
    info = json.loads(world.run("cache", "info", "caches/tiny", "--json", "-").stdout)
    assert (info["views_done"], info["manifest"]["images"]) == (10, 10)
    assert json.loads(world.run("cache", "verify", "caches/tiny", "--json", "-").stdout) == []
    checked = json.loads(world.run("datasets", "check", "tiny.yaml", "--json", "-").stdout)
    assert checked["readable"] == 18 and checked["classes"]["circle"]["images"] > 0 and checked["faults"] == []
    inspect = ("inspect-pseudolabels", "--cache", "caches/tiny", "--count", "10", "--json")
    rows = json.loads(world.run(*inspect, "-").stdout)
    assert len(rows) == 10 and rows[3].keys() >= {"image_id", "groups", "purity"}
    assert "train-3" in [row["image_id"] for row in rows if row["purity"] is None]  # annotated all over

    file = tmp_path / "rows.json"
    shown = world.run(*inspect, file).stdout
    assert json.loads(file.read_text()) == rows and "K-means regions" in shown
    json.loads(world.run(*inspect, "-", "--png", tmp_path / "sheet.png").stdout)  # and nothing else


def test_shells_complete_verbs() -> None:
    import typer
    from click.shell_completion import ShellComplete

    import cli

    shell = ShellComplete(typer.main.get_command(cli.app), {}, "clip-zss", "_CLIP_ZSS_COMPLETE")
    assert "inspect-pseudolabels" in [word.value for word in shell.get_completions([], "in")]


def test_a_device_agrees_with_the_cpu_or_doctor_says_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU agrees with itself to the bit; a device that adds 1 % to every token's length and every loss does not."""
    found = list(agreement("cpu"))
    assert len(found) == 6 and all(one.holds and one.difference == 0 for one in found)
    criterion = Criterion.forward
    calls = []

    def wrong(self: Criterion, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        calls.append(self)  # the first is the CPU's
        losses = criterion(self, *arguments, **named)
        return {name: loss * (1.01 if len(calls) == 2 else 1) for name, loss in losses.items()}

    monkeypatch.setattr(Criterion, "forward", wrong)
    faults = {item.part for item in stages.upkeep.doctor._agreement("cpu") if item.fault}
    assert faults == {"losses", "gradients of the losses"}
