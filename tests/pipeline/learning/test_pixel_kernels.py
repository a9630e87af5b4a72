"""The kernels under Triton's interpreter, against the bands of torch; and that they compile for GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.learning import pixel_bands

kernels = pytest.importorskip("pipeline.learning.pixel_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within test_by_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="has run")


@pytest.mark.slow
@compiled
def test_by_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


# (h, w), (H, W): by 4, by no whole number, down, one feature, one pixel; channels, of which the first `count` for NEL.
CASES = [
    ((2, 4), (8, 16), 5, 3), ((2, 6), (5, 13), 11, 11), ((4, 5), (3, 2), 4, 0), ((1, 1), (3, 2), 2, 1),
    ((2, 2), (2, 2), 9, 8),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several in even a small image."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "COLUMNS", 4)
        monkeypatch.setattr(kernels, "CHANNELS", 8)


@interpreted
@pytest.mark.parametrize("ce", [True, False])
@pytest.mark.parametrize(("cells", "pixels", "channels", "count"), CASES)
def test_kernels_equal_bands(
    cells: tuple[int, int], pixels: tuple[int, int], channels: int, count: int, ce: bool
) -> None:
    """Reductions, and gradients with a different weight for each; to 1e-5 in single precision."""
    draw = torch.Generator().manual_seed(channels)
    logits = 6 * torch.randn(2, *cells, channels, generator=draw)
    labels = torch.randint(-1, channels, (2, *pixels), generator=draw)
    labels[1] = -1
    found, kept = kernels.reductions(logits, labels, count, ce)
    exact, of_exact = pixel_bands.reductions(logits.double(), labels, count, ce)
    used = (labels >= 0) & (labels < count)
    for name, one, other in zip(("focal", "scores", "own", "entropies"), found, exact, strict=True):
        one, other = (torch.where(used, t, 0) if name == "own" else t for t in (one, other))
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    weights = [torch.randn(t.shape, generator=draw) for t in found]
    weights[2] *= used
    gradient = kernels.gradient(labels, kept, count, ce, logits.shape, *weights)
    wanted = pixel_bands.gradient(labels, of_exact, count, ce, logits.shape, *(t.double() for t in weights))
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@interpreted
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_are_finite(value: float) -> None:
    logits = torch.tensor([value, 0.0]).expand(1, 2, 2, 2).contiguous()
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    found, kept = kernels.reductions(logits, labels, 2, True)
    gradient = kernels.gradient(labels, kept, 2, True, logits.shape, *(torch.ones_like(t) for t in found))
    assert all(t.isfinite().all() for t in (*found, gradient))


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    """For an A100 and an H100, without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    floats, ints = "*fp32", "i32"
    sizes = {name: ints for name in ("h", "w", "n", "height", "width", "count")} | {
        "y_ratio": "fp32",
        "x_ratio": "fp32",
    }
    tile = {"CE": True, "COLUMNS": kernels.COLUMNS, "CHANNELS": kernels.CHANNELS}
    for kernel, more in ((kernels._reduce, {}), (kernels._gather, {"ROWS": 11, "SPAN": 11})):
        constants = tile | more
        signature = {
            name: "constexpr" if name in constants else sizes.get(name, "*i64" if name == "labels" else floats)
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
