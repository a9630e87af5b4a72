"""NEL and cross-entropy in bands, against the slow reference, the plain formula and its peak memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.learning import pixel_bands
from pipeline.learning.pixel_loss import class_sizes, pixel_losses
from tests import reference
from tests.pipeline.draws import draw, draw_unit
from tests.pipeline.learning import plain
from tests.pipeline.learning.bands import losses
from tests.pipeline.learning.gradients import assert_gradients, leaf
from tests.pipeline.learning.memory import peak_bytes
from tests.reference import Array

# Batch, channels of the logits, height, width.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 4), (1, 5, 4, 4), (3, 7, 5, 2)]
LABELS = ["random", "sparse", "one class", "unlabelled", "full"]


@pytest.fixture(autouse=True)
def thin_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several in even a small image, the last one often thinner."""
    monkeypatch.setattr(pixel_bands, "CPU_BAND", 30)


def draw_labels(rng: np.random.Generator, kind: str, shape: tuple[int, int, int, int]) -> Array:
    """(B, H, W) from -1 to N - 1."""
    labels = rng.integers(-1 if kind == "random" else 0, shape[1], (shape[0], *shape[2:]))
    if kind == "sparse":
        labels[rng.random(labels.shape) < 0.9] = -1
    if kind in ("one class", "unlabelled"):
        labels[:] = shape[1] - 1 if kind == "one class" else -1
    return labels


def losses_of_logits(logits: Tensor, labels: Array | Tensor) -> dict[str, Tensor]:
    """With features that are the logits already."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return losses(logits, identity, identity[:0], torch.ones((), dtype=logits.dtype), 1.0, torch.as_tensor(labels))


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 4.0, 400.0])
def test_reference(scale: float, shape: tuple[int, int, int, int], kind: str) -> None:
    """Of the losses, and of the plain formula that they are compared with below."""
    rng = np.random.default_rng(shape)
    logits, labels = draw(rng, *shape, scale=scale), draw_labels(rng, kind, shape)
    expected = {"nel": reference.nel(logits, labels), "ce": reference.cross_entropy(logits, labels)}
    found = losses_of_logits(torch.from_numpy(logits), labels)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    assert plain.nel(*tensors).item() == pytest.approx(expected["nel"], rel=1e-9, abs=1e-9)
    assert plain.pixel_cross_entropy(*tensors).item() == pytest.approx(expected["ce"], rel=1e-9, abs=1e-9)


def plain_nel(logits: Tensor, labels: Array) -> Tensor:
    """ZegCLIP's form, with one-hot targets."""
    targets = torch.stack([torch.from_numpy(labels == n) for n in range(logits.shape[1])], dim=1).double()
    p = torch.sigmoid(logits)
    p_target = p * targets + (1 - p) * (1 - targets)
    weight = 0.25 * targets + 0.75 * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal = (weight * (1 - p_target) ** 2 * entropy).mean(dim=(2, 3)).sum()
    ratio = (2 * (p * targets).sum(dim=(2, 3)) + 1) / (p.sum(dim=(2, 3)) + targets.sum(dim=(2, 3)) + 1)
    present = (targets.sum(dim=(2, 3)) > 0).double()
    return (100 * focal + ((1 - ratio) * present).sum()) / present.sum().clamp(min=1)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_nel(shape: tuple[int, int, int, int], kind: str) -> None:
    rng = np.random.default_rng(shape)
    logits, labels = leaf(draw(rng, *shape, scale=2)), draw_labels(rng, kind, shape)
    assert_gradients(losses_of_logits(logits, labels)["nel"], plain_nel(logits, labels), logits)


@pytest.mark.parametrize(("size", "nel_channels"), [((2, 3), 5), ((6, 9), 3), ((5, 4), 5), ((1, 7), 3), ((3, 1), 5)])
def test_gradcheck(size: tuple[int, int], nel_channels: int) -> None:
    """Up, down and by no whole number; each loss with a weight of its own."""
    rng = np.random.default_rng(1)
    features, text, prototypes = leaf(draw(rng, 2, 4, 2, 3)), leaf(draw_unit(rng, 3, 4)), leaf(draw(rng, 2, 4))
    labels = torch.from_numpy(draw_labels(rng, "random", (2, 5, *size)))

    def total(*arguments: Tensor) -> Tensor:
        found = pixel_losses(*arguments, 2.0, labels, nel_channels)
        return 0.2 * found["nel"] + 17 * found["ce"]

    assert torch.autograd.gradcheck(total, (features, text, prototypes, leaf(np.array(1.3))), atol=1e-4)


def draw_problem(seed: int) -> tuple[list[Tensor], Tensor]:
    """Float32 features, text, prototypes and alpha of a random shape, and labels; every fifth lacks something."""
    rng = np.random.default_rng(seed)
    lacks = {0: "groups", 1: "seen pixels", 2: "labels", 3: "several images"}.get(seed % 5)
    batch = 1 if lacks == "several images" else int(rng.integers(2, 5))
    num_seen, num_pseudo = int(rng.integers(40, 90)), 0 if lacks == "groups" else int(rng.integers(1, 40))
    height, width = (int(side) for side in rng.integers(8, 20, 2))
    size = [int(side * ratio) for side, ratio in zip((height, width), rng.uniform(3, 5, 2), strict=True)]
    blocks = rng.integers(num_seen if lacks == "seen pixels" else -1, num_seen + num_pseudo, (batch, 1, 5, 5))
    if lacks == "labels":
        blocks[:] = -1
    labels = F.interpolate(torch.from_numpy(blocks).double(), size=size)[:, 0].long()
    channels = int(rng.integers(4, 24))
    arrays = (
        draw(rng, batch, channels, height, width, scale=2), draw_unit(rng, num_seen, channels),
        draw(rng, num_pseudo, channels), np.array(rng.uniform(0.5, 3)),
    )  # fmt: skip
    return [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in arrays], labels


@pytest.mark.parametrize("of", ["all", "seen"])
@pytest.mark.parametrize("seed", range(20))
def test_plain_formula(seed: int, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-5 in single precision, losses and gradients, within a quarter of its memory."""
    monkeypatch.setattr(pixel_bands, "CPU_BAND", 2**13)
    leaves, labels = draw_problem(seed)
    nel_channels = len(leaves[1]) if of == "seen" else None

    def gradients(formula: Callable[..., dict[str, Tensor]], name: str, leaves: list[Tensor]) -> list[Tensor]:
        found = formula(*leaves, 2.0, labels, nel_channels)
        total = found["nel"] + found["ce"] if name == "both" else found[name]
        return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]

    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for name in ("nel", "ce"):
        expected = gradients(plain.pixel_losses, name, doubles)
        for one, other in zip(gradients(losses, name, leaves), expected, strict=True):
            assert one.dtype == torch.float32
            largest = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * largest)
    ours, whole = (peak_bytes(lambda f=f: gradients(f, "both", leaves)) for f in (losses, plain.pixel_losses))
    assert 0 < ours <= whole / 4


@pytest.mark.parametrize("seed", range(4))
def test_bands_equal_whole_images(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are resized in both directions at once: up, and down to fewer rows than R has."""
    leaves, labels = draw_problem(seed)
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for target in (labels, labels[:, ::9, ::2]):
        found = []
        for band in (30, 2**30):
            monkeypatch.setattr(pixel_bands, "CPU_BAND", band)
            sums = losses(*leaves, 2.0, target)
            of_leaves = torch.autograd.grad(sums["nel"] + sums["ce"], leaves, materialize_grads=True, allow_unused=True)
            found.append([*sums.values(), *of_leaves])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["nel", "ce"])
def test_one_loss_alone(name: str) -> None:
    """Equal to the bit to what it is beside the other, and the other is absent."""
    leaves, labels = draw_problem(4)
    count = len(leaves[1])
    both = pixel_losses(*leaves, 2.0, labels, count)
    alone = pixel_losses(*leaves, 2.0, labels, count if name == "nel" else 0, ce=name == "ce")
    assert list(alone) == [name] and torch.equal(alone[name], both[name])
    pairs = [torch.autograd.grad(sums[name], leaves) for sums in (alone, both)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_autocast_sums_in_single_precision() -> None:
    """Logits at the features' size come in bfloat16, everything after is exact for them."""
    leaves, labels = draw_problem(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(*leaves, 2.0, labels)
        rounded = plain.classify(*leaves, 2.0)
        assert rounded.dtype == torch.float32  # of products in bfloat16
    wide = F.interpolate(rounded.double(), labels.shape[1:], mode="bilinear", align_corners=False)
    expected = {"nel": plain.nel(wide, labels), "ce": plain.pixel_cross_entropy(wide, labels)}
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-6, atol=0)
        scaled = torch.autograd.grad(2.0**16 * loss, leaves[0], retain_graph=True)[0]  # as a scaler of fp16 does
        wanted = torch.autograd.grad(expected[name], leaves[0], retain_graph=True)[0]
        torch.testing.assert_close(scaled / 2**16, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


def test_class_sizes() -> None:
    labels = torch.tensor([[[0, 0], [2, -1]], [[2, 2], [2, 2]], [[-1, -1], [-1, -1]]])
    assert class_sizes(labels, 4).tolist() == [[2, 0, 1, 0], [0, 0, 4, 0], [0, 0, 0, 0]]


def test_nel_by_hand() -> None:
    """Logits 0: focal 100 x (0.25 + 0.75) x 0.25 log 2, dice 1 - (2 x 0.5 + 1) / (0.5 + 1 + 1)."""
    loss = losses_of_logits(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long))["nel"]
    assert loss.item() == pytest.approx(25 * np.log(2) + 0.2, rel=1e-6)


@pytest.mark.parametrize("label", [-1, 1])
def test_huge_logits_give_finite_gradients(label: int) -> None:
    logits = torch.tensor([-1e4, 1e4, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    found = losses_of_logits(logits, torch.full((1, 2, 2), label))
    (found["nel"] + found["ce"]).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
