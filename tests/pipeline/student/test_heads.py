"""The decode heads, against their papers' formulas in NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.student.heads import AllMLPHead, FCNHead, UPerHead
from tests.pipeline.student.layers import (
    Levels,
    as_array,
    as_tensors,
    average_pool,
    conv_batch_relu,
    convolve,
    random_levels,
    randomise,
    resize,
)
from tests.reference import Array

Sizes = list[tuple[int, int]]
CHANNELS = [3, 5, 2, 4]
PYRAMIDS: list[Sizes] = [
    [(8, 8), (4, 4), (2, 2), (1, 1)],
    [(24, 40), (12, 20), (6, 10), (3, 5)],
    [(56, 16), (28, 8), (14, 4), (7, 2)],
]


def of_sizes(make: Any, sizes: Sizes) -> Any:
    """A head of 6 channels inside and 7 out, in float64, its weights and statistics random."""
    head = make(CHANNELS[: len(sizes)], 6, 7).double().eval()
    randomise(head)
    return head


def degenerate(levels: Levels) -> list[Levels]:
    """Zeros; one constant; one cell alone that is not zero."""
    zeros = [np.zeros_like(level) for level in levels]
    spike = [level.copy() for level in zeros]
    spike[-1][0, 0, 0, 0] = 100
    return [zeros, [level + 3 for level in zeros], spike]


def all_mlp_by_hand(head: Any, levels: Levels) -> Array:
    """Eq. 4 of SegFormer: each level to one width and the finest size, joined, fused, projected."""
    size = levels[0].shape[2:]
    same = [resize(conv_batch_relu(x, conv), size) for x, conv in zip(levels, head.convs, strict=True)]
    return convolve(conv_batch_relu(np.concatenate(same, axis=1), head.fusion_conv), head.project)


def uper_by_hand(head: Any, levels: Levels) -> Array:
    """UPerNet: the pooled coarsest level, then a feature pyramid from coarse to fine, all of it joined."""
    coarsest, size = levels[-1], levels[0].shape[2:]
    pooled = [
        resize(conv_batch_relu(average_pool(coarsest, cells), head.psp_modules[i][1]), coarsest.shape[2:])
        for i, cells in enumerate((1, 2, 3, 6))
    ]
    top = conv_batch_relu(np.concatenate([coarsest, *pooled], axis=1), head.bottleneck)
    sums, above = [], top
    for i in (2, 1, 0):
        above = conv_batch_relu(levels[i], head.lateral_convs[i]) + resize(above, levels[i].shape[2:])
        sums.insert(0, above)
    outputs = [conv_batch_relu(x, head.fpn_convs[i]) for i, x in enumerate(sums)]
    joined = np.concatenate([resize(x, size) for x in (*outputs, top)], axis=1)
    return convolve(conv_batch_relu(joined, head.fpn_bottleneck), head.project)


@pytest.mark.parametrize("sizes", [*PYRAMIDS, [(5, 12), (3, 6), (2, 3)], [(1, 1)], [(6, 4), (9, 9)]])
def test_all_mlp_head(sizes: Sizes) -> None:
    head = of_sizes(AllMLPHead, sizes)
    random = random_levels(sizes, CHANNELS[: len(sizes)])
    for levels in (random, *degenerate(random)):
        found = head(as_tensors(levels), sizes[0])
        assert found.shape == (2, 7, *sizes[0])
        np.testing.assert_allclose(as_array(found), all_mlp_by_hand(head, levels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", PYRAMIDS)
def test_uper_head(sizes: Sizes) -> None:
    head = of_sizes(UPerHead, sizes)
    random = random_levels(sizes, CHANNELS)
    for levels in (random, *degenerate(random)):
        found = head(as_tensors(levels), sizes[0])
        assert found.shape == (2, 7, *sizes[0])
        np.testing.assert_allclose(as_array(found), uper_by_hand(head, levels), rtol=1e-9, atol=1e-9)


def test_all_mlp_head_is_told_the_size() -> None:
    """Where no level has stride 4 its R does: the levels are brought to that size."""
    sizes = [(4, 6), (2, 3)]
    head, levels = of_sizes(AllMLPHead, sizes), random_levels(sizes, CHANNELS[:2])
    same = [resize(conv_batch_relu(x, conv), (8, 12)) for x, conv in zip(levels, head.convs, strict=True)]
    expected = convolve(conv_batch_relu(np.concatenate(same, axis=1), head.fusion_conv), head.project)
    np.testing.assert_allclose(as_array(head(as_tensors(levels), (8, 12))), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 5)])
def test_fcn_head(size: tuple[int, int]) -> None:
    """One 3 x 3 convolution and the projection, at the level's own size."""
    head: Any = FCNHead(3, 6, 7).double().eval()
    randomise(head)
    random = random_levels([size], [3])
    for (level,) in (random, *degenerate(random)):
        found = head(torch.from_numpy(level))
        expected = convolve(conv_batch_relu(level, head.convs[0]), head.project)
        np.testing.assert_allclose(as_array(found), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "sizes"), [(AllMLPHead, PYRAMIDS[0]), (UPerHead, PYRAMIDS[0])])
def test_gradients(make: Any, sizes: Sizes) -> None:
    """They reach every parameter and every level, and are those of finite differences."""
    head = of_sizes(make, sizes)
    levels = [x.requires_grad_() for x in as_tensors(random_levels(sizes, CHANNELS))]
    weights = torch.randn(2, 7, *sizes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss() -> Any:
        return (head(levels, sizes[0]) * weights).sum()

    loss().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for level in levels:
        found, step = level.grad[0, 1, 0, 0].item(), 1e-6  # type: ignore[index]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                level[0, 1, 0, 0] += sign * step
                values.append(loss().item())
                level[0, 1, 0, 0] -= sign * step
        assert math.isclose(found, (values[0] - values[1]) / (2 * step), rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("make", [AllMLPHead, UPerHead, FCNHead])
def test_dropout_is_for_training(make: Any) -> None:
    """A tenth of the channels before the projection, whole channels at a time."""
    torch.manual_seed(0)
    head = make(3, 64, 4) if make is FCNHead else make([3, 3], 64, 4)
    levels = torch.randn(4, 3, 8, 8) if make is FCNHead else [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4)]
    arguments = () if make is FCNHead else ((8, 8),)
    kept: list[Any] = []
    for part in (head.dropout, head.project):
        part.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    head(levels, *arguments)
    before, after = kept
    zero = (after == 0).all(dim=(2, 3)) & (before != 0).any(dim=(2, 3))
    share = zero.float().mean().item()
    assert 0.02 < share < 0.25
    torch.testing.assert_close(after[~zero], before[~zero] / 0.9)
    head.eval()
    assert torch.equal(head(levels, *arguments), head(levels, *arguments))


def test_as_many_levels_as_were_announced() -> None:
    with pytest.raises(ValueError):
        AllMLPHead([3, 3], 4, 4)([torch.zeros(1, 3, 2, 2)], (2, 2))
    with pytest.raises(ValueError):
        UPerHead([3, 3, 3], 4, 4).eval()([torch.zeros(1, 3, 2, 2)] * 2, (2, 2))


def test_projection_is_linear_and_with_bias() -> None:
    """R has any sign: no norm or ReLU after the last layer."""
    for head in (AllMLPHead([3], 4, 9), UPerHead([3, 3], 4, 9), FCNHead(3, 4, 9)):
        *_, last = head.children()
        assert isinstance(last, nn.Conv2d) and last is head.project
        assert last.kernel_size == (1, 1) and last.out_channels == 9 and last.bias is not None
