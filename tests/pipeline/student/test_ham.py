"""SegNeXt's head: its factorisation by multiplicative updates, against NumPy in float64."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.student.ham import Hamburger, LightHamHead, factorise
from tests.pipeline.student.layers import (
    as_array,
    as_tensors,
    convolve,
    group_norm,
    random_levels,
    randomise,
    relu,
    resize,
)
from tests.reference import Array

RANK = 16  # of heads of up to 256 channels


def factorise_by_hand(x: Array, bases: Array, steps: int) -> Array:
    """X (D, N) ~ D C^T, both factors by Lee and Seung's rule; C begins as the softmax of X^T D over the bases."""
    score = x.T @ bases
    share = np.exp(score - score.max(axis=1, keepdims=True))
    c, d = share / share.sum(axis=1, keepdims=True), bases.copy()
    for step in range(steps + 1):
        c = c * (x.T @ d) / (c @ d.T @ d + 1e-6)
        if step < steps:
            d = d * (x @ c) / (d @ c.T @ c + 1e-6)
    return d @ c.T


def bases_of(batch: int, channels: int, seed: int = 0) -> Array:
    drawn = np.random.default_rng(seed).uniform(size=(batch, channels, RANK))
    return drawn / np.sqrt((drawn**2).sum(axis=1, keepdims=True))


def matrices() -> dict[str, Array]:
    """(B, D, N): random ones, and those where a factorisation may divide by nothing."""
    rng = np.random.default_rng(1)
    spike, sparse = np.zeros((2, 12, 20)), rng.uniform(size=(2, 12, 20))
    spike[0, 3, 7] = 5
    sparse[sparse < 0.8] = 0
    return {
        "random": rng.uniform(size=(2, 24, 30)),
        "large": 1e4 * rng.uniform(size=(1, 24, 30)),
        "sparse": sparse,
        "zeros": np.zeros((2, 12, 20)),
        "constant": np.full((2, 12, 20), 3.0),
        "one pixel": rng.uniform(size=(3, 12, 1)),
        "one pixel of zeros": np.zeros((1, 12, 1)),
        "one that is not zero": spike,
    }


@pytest.mark.parametrize("name", list(matrices()))
@pytest.mark.parametrize("steps", [0, 1, 6, 7])
def test_factorise(name: str, steps: int) -> None:
    x = matrices()[name]
    bases = bases_of(len(x), x.shape[1])
    found = as_array(factorise(torch.from_numpy(x), torch.from_numpy(bases), steps))
    expected = np.stack([factorise_by_hand(one, base, steps) for one, base in zip(x, bases, strict=True)])
    assert found.shape == x.shape and np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(matrices()))
def test_the_error_does_not_grow(name: str) -> None:
    """With more updates the reconstruction is no worse, and it is good where the rank suffices."""
    x = torch.from_numpy(matrices()[name])
    bases = torch.from_numpy(bases_of(len(x), x.shape[1]))
    errors = [((factorise(x, bases, steps) - x) ** 2).sum().item() for steps in range(12)]
    scale = max((x**2).sum().item(), 1e-12)
    assert all(after <= before + 1e-6 * scale for before, after in pairwise(errors))
    if name in ("constant", "one pixel"):
        assert errors[7] < 1e-4 * scale
    if name in ("zeros", "one pixel of zeros"):
        assert errors[0] == 0


def test_factorise_in_float32() -> None:
    """Within rounding of float64, and finite for zeros and for values of any scale."""
    for x in matrices().values():
        bases = bases_of(len(x), x.shape[1])
        single = factorise(torch.from_numpy(x).float(), torch.from_numpy(bases).float(), 7)
        double = factorise(torch.from_numpy(x), torch.from_numpy(bases), 7)
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4 * float(x.max() or 1))


def test_gradients_of_the_factorisation() -> None:
    """Of X, through every update: those of finite differences; finite for zeros."""
    x, bases = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True), torch.from_numpy(bases_of(1, 3))
    assert torch.autograd.gradcheck(lambda value: factorise(value, bases, 3), (x,))
    zeros = torch.zeros(1, 3, 4, requires_grad=True)
    factorise(zeros, bases.float(), 6).sum().backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


def hamburger_by_hand(ham: Any, x: Array, bases: Array, steps: int) -> Array:
    inner = relu(convolve(x, ham.ham_in[0]))
    flat = inner.reshape(*inner.shape[:2], -1)
    found = np.stack([factorise_by_hand(one, base, steps) for one, base in zip(flat, bases, strict=True)])
    return relu(x + group_norm(convolve(found.reshape(x.shape), ham.ham_out[0]), ham.ham_out[1]))


def make_head(seed: int = 0) -> Any:
    head = LightHamHead([2, 3, 5, 4], 32, 7).double().eval()
    randomise(head, seed)
    return head


SIZES = [[(16, 24), (8, 12), (4, 6), (2, 3)], [(8, 8), (4, 4), (2, 2), (1, 1)], [(14, 6), (7, 3), (4, 2), (2, 1)]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_head(sizes: list[tuple[int, int]], training: bool) -> None:
    """The three coarser levels at the second's size, joined, squeezed, factorised, aligned, projected.

    In training six updates from bases of torch's RNG; otherwise seven, from bases that are always the same.
    """
    head = make_head().train(training)
    head.dropout.eval()
    levels = random_levels(sizes, [2, 3, 5, 4])
    size = sizes[1]
    torch.manual_seed(7)
    if training:
        drawn = torch.rand(2, 32, RANK, dtype=torch.float64)
        torch.manual_seed(7)
    else:
        drawn = torch.rand(1, 32, RANK, generator=torch.Generator().manual_seed(0)).double().expand(2, -1, -1)
    bases = as_array(drawn)
    bases = bases / np.sqrt((bases**2).sum(axis=1, keepdims=True))
    joined = np.concatenate([resize(level, size) for level in levels[1:]], axis=1)
    squeezed = relu(group_norm(convolve(joined, head.squeeze[0]), head.squeeze[1]))
    cooked = hamburger_by_hand(head.hamburger, squeezed, bases, 6 if training else 7)
    expected = convolve(relu(group_norm(convolve(cooked, head.align[0]), head.align[1])), head.project)
    found = head(as_tensors(levels), size)
    assert found.shape == (2, 7, *size)
    np.testing.assert_allclose(as_array(found), expected, rtol=1e-7, atol=1e-7)


def test_evaluation_does_not_depend_on_chance_or_company() -> None:
    """Twice the same, whatever torch's seed, and for an image alone as in a batch; torch's RNG is left alone."""
    head = make_head().float()
    levels = [level.float() for level in as_tensors(random_levels(SIZES[0], [2, 3, 5, 4], batch=3))]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = head(levels, (8, 12))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, head(levels, (8, 12)))
    for image in range(3):
        alone = head([level[image : image + 1] for level in levels], (8, 12))
        torch.testing.assert_close(alone, first[image : image + 1], rtol=1e-4, atol=1e-5)


def test_training_draws_anew() -> None:
    """Other bases for each call and each image, the same ones under the same seed."""
    torch.manual_seed(0)
    ham = Hamburger(32)
    x = torch.randn(1, 32, 6, 6).expand(2, -1, -1, -1).contiguous()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs += [ham(x), ham(x)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    for one, other in ((0, 1), (0, 4)):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-4
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_degenerate_levels(training: bool) -> None:
    """Zeros, a constant, and a single cell: finite, and so are the gradients of every parameter."""
    for sizes in ([(8, 8), (4, 4), (2, 2), (1, 1)], [(2, 2), (1, 1), (1, 1), (1, 1)]):
        for fill in (0.0, 3.0):
            head = LightHamHead([2, 3, 5, 4], 64, 7).train(training)
            levels = [torch.full((1, c, *size), fill) for c, size in zip([2, 3, 5, 4], sizes, strict=True)]
            found = head(levels, sizes[1])
            found.square().sum().backward()
            assert found.isfinite().all()
            for name, parameter in head.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gradients_reach_every_parameter() -> None:
    head = make_head().train()
    levels = [level.requires_grad_() for level in as_tensors(random_levels(SIZES[0], [2, 3, 5, 4]))]
    head(levels, (8, 12)).square().sum().backward()
    assert levels[0].grad is None  # the finest is not used
    assert all(level.grad is not None and level.grad.abs().sum() > 0 for level in levels[1:])
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("channels", "rank"), [(32, 16), (256, 16), (512, 64), (1024, 64)])
def test_rank_is_the_official_codes(channels: int, rank: int) -> None:
    """16 for SegNeXt-T and S, 64 for B and L, as their published multiplications tell (benchmarks/students.md)."""
    assert Hamburger(channels).rank == rank


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_large_activations_under_autocast(precision: torch.dtype) -> None:
    """Of std 9, where the factorisation's products overflow float16."""
    torch.manual_seed(0)
    hamburger = Hamburger(512).eval()
    x = 9 * torch.randn(1, 512, 16, 16)
    with torch.no_grad():
        wanted = hamburger(x)
        with torch.autocast("cpu", precision):
            found = hamburger(x)
    assert found.isfinite().all()
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.02
