"""Autocast, gradient scaling and compilation of the student."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.schema import Student as StudentConfig
from configs.schema import Train
from pipeline.precision import best_precision
from pipeline.student.student import Student
from stages.train.precision import gradient_scaler, student_forward
from tests.conftest import World


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(model="timm:tf_efficientnet_lite0", weights="none", channels=16), 16).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_features_are_float32_and_near_those_of_float32(student: Student, precision: str) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    features, auxiliary = student_forward(student, Train(precision=precision))(pixels)
    expected = student(pixels).detach()
    assert features.dtype == torch.float32 and auxiliary is None
    away = float((features.detach() - expected).norm() / expected.norm())
    assert away == 0 if precision == "fp32" else 1e-5 < away < 0.05


@pytest.mark.parametrize(("bf16", "best"), [(True, "bf16"), (False, "fp16")])
def test_auto(student: Student, monkeypatch: pytest.MonkeyPatch, bf16: bool, best: str) -> None:
    """Half precision on a GPU; on a CPU what float32 is, to the bit, and no scaler."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert best_precision("cuda") == best
    assert best_precision("cpu") == best_precision("mps") == "fp32"
    pixels = torch.randn(1, 3, 64, 64)
    found, wanted = (student_forward(student, Train(precision=name))(pixels)[0] for name in ("auto", "fp32"))
    assert torch.equal(found, wanted) and not gradient_scaler(Train(), "cpu").is_enabled()


def test_the_forward_pass_is_compiled_by_option(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(function: object) -> object:
        compiled.append(function)
        return lambda pixels: (pixels + 1, pixels + 2)

    monkeypatch.setattr(torch, "compile", compile)
    student_forward(student, Train())
    assert not compiled
    features, auxiliary = student_forward(student, Train(compile=True))(torch.zeros(1))
    assert compiled == [student.with_auxiliary]
    assert (float(features), float(auxiliary if auxiliary is not None else 0)) == (1, 2)


def test_small_gradients_are_scaled_at_fp16_alone_and_infinite_ones_skipped() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        weight = torch.nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = gradient_scaler(Train(precision=precision), "cpu")
        for factor in (2.0, torch.inf) if precision == "fp16" else (2.0,):
            optimizer.zero_grad()
            scaler.scale(factor * weight).backward()
            assert weight.grad is not None and (float(weight.grad) > 2) == (precision == "fp16")
            scaler.step(optimizer)
            scaler.update()
            assert float(weight.detach()) == -1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains(world: World, trained: Path, precision: str) -> None:
    """The first step's losses are near those of float32, and not the same."""
    run = world.folder / "runs" / precision
    shutil.rmtree(run, ignore_errors=True)
    world.run(
        "train", "--cache", "caches/tiny", "--config", world.config, "--run", run, "--seed", "3",
        "--set", f"train.precision={precision}", "--set", "train.iterations=2",
    )  # fmt: skip
    ours, theirs = ([json.loads(line) for line in (path / "log.jsonl").open()] for path in (run, trained))
    assert len(ours) == 2
    for name in ("global", "bce", "nel", "ce"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=0.05)
    assert ours[0] != theirs[0]
