"""Options that make the teacher faster change rounding alone."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from configs.schema import Teacher
from pipeline.teacher.clip import FrozenClip
from tests.pipeline.teacher.conftest import ARCHITECTURE, draw_pixels, write


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["plain", "maskclip", "sclip", "clearclip", "naclip"])
def test_half_precision_is_near_fp32_and_comes_as_fp32(precision, variant, tmp_path: Path, weights) -> None:
    pixels = draw_pixels(2, 32)
    exact = FrozenClip(write(tmp_path, ARCHITECTURE, weights, dense=variant)).encode(pixels)
    half = FrozenClip(write(tmp_path, ARCHITECTURE, weights, dense=variant, precision=precision)).encode(pixels)
    for found, expected in zip(half, exact, strict=True):
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        error = (found - expected).norm() / expected.norm()
        assert error < (0.05 if precision == "bf16" else 0.01), error


def test_text_stays_fp32(tmp_path: Path, weights, teacher: FrozenClip) -> None:
    half = FrozenClip(write(tmp_path, ARCHITECTURE, weights, precision="bf16"))
    names = [["cow", "calf"], ["sky"]]
    assert torch.equal(half.text_features(names, "single"), teacher.text_features(names, "single"))


def test_channels_last_is_the_same(files: Teacher, teacher: FrozenClip) -> None:
    last = FrozenClip(files, channels_last=True)
    assert last.model.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(last.encode(draw_pixels(2, 32)), teacher.encode(draw_pixels(2, 32)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiled_blocks_are_the_same_and_run(files: Teacher, teacher: FrozenClip, monkeypatch) -> None:
    """All blocks but the tapped last one; a short last batch is right too."""
    counter = CompileCounter()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend=counter))
    compiled = FrozenClip(files, compile=True)
    torch._dynamo.reset()
    for batch in (2, 1, 2):
        pixels = draw_pixels(batch, 32)
        for found, expected in zip(compiled.encode(pixels), teacher.encode(pixels), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count > 0
