"""Comparing gradients."""

import torch
from torch import Tensor

from tests.reference import Array


def leaf(array: Array) -> Tensor:
    """A float64 tensor that collects gradients."""
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def assert_gradients(loss: Tensor, plain: Tensor, *leaves: Tensor) -> None:
    """`loss` and a plainly written `plain` agree in value and in the gradient of each leaf."""
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(plain, leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
