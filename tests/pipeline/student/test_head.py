"""SegFormer's head, against its formula."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.student.head import AllMLPHead
from tests import reference
from tests.reference import Array


def as_array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().numpy())


def head_by_hand(head: AllMLPHead, levels: list[Array]) -> Array:
    """Eq. 4 of SegFormer: each level to one width and one size, joined, fused, projected."""

    def per_pixel(layer: torch.nn.Conv2d, x: Array) -> Array:
        out = np.einsum("bchw,nc->bnhw", x, as_array(layer.weight)[:, :, 0, 0])
        return out if layer.bias is None else out + as_array(layer.bias)[:, None, None]

    size = levels[0].shape[-2:]
    same = [reference.bilinear(per_pixel(head.linears[i], x), size) for i, x in enumerate(levels)]  # type: ignore[arg-type]
    fuse, norm = head.fuse[0], head.fuse[1]
    fused = per_pixel(fuse, np.concatenate(same, axis=1))  # type: ignore[arg-type]
    mean, variance = as_array(norm.running_mean), as_array(norm.running_var)
    scale = as_array(norm.weight) / np.sqrt(variance + norm.eps)  # type: ignore[operator]
    normed = (fused - mean[:, None, None]) * scale[:, None, None] + as_array(norm.bias)[:, None, None]
    return per_pixel(head.project, np.maximum(normed, 0))


@pytest.mark.parametrize(
    "sizes", [[(8, 8), (4, 4), (2, 2), (1, 1)], [(5, 12), (3, 6), (2, 3)], [(1, 1)], [(6, 4), (9, 9)]]
)
def test_head(sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    channels = [3, 5, 2, 4][: len(sizes)]
    head = AllMLPHead(channels, 6, 7).double().eval()
    for tensor in (head.fuse[1].running_mean, head.fuse[1].weight, head.fuse[1].bias):
        torch.nn.init.normal_(tensor)  # type: ignore[arg-type]
    head.fuse[1].running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    levels = [rng.normal(size=(2, count, *size)) for count, size in zip(channels, sizes, strict=True)]
    found = head([torch.from_numpy(level) for level in levels])
    assert found.shape == (2, 7, *sizes[0])
    np.testing.assert_allclose(as_array(found), head_by_hand(head, levels), rtol=1e-9, atol=1e-9)


def test_dropout_is_for_training() -> None:
    head = AllMLPHead([3], 32, 4, dropout=0.5)
    levels = [torch.randn(2, 3, 4, 4)]
    assert not torch.equal(head(levels), head(levels))
    head.eval()
    assert torch.equal(head(levels), head(levels))


def test_as_many_levels_as_were_announced() -> None:
    with pytest.raises(ValueError):
        AllMLPHead([3, 3], 4, 4)([torch.zeros(1, 3, 2, 2)])
