"""The CLS token bank."""

import pytest
import torch
from torch import Tensor

from pipeline.learning.bank import TokenBank


def batch(iteration: int, size: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens (size, 3) that hold the iteration, and ids 10 t, 10 t + 1, ..."""
    return torch.full((size, 3), float(iteration)), 10 * iteration + torch.arange(size)


@pytest.mark.parametrize("iterations", [1, 3, 24])
def test_the_last_iterations_in_order(iterations: int) -> None:
    bank = TokenBank(iterations)
    for t in range(30):
        bank.enqueue(*batch(t))
        kept = range(max(0, t + 1 - iterations), t + 1)
        tokens, ids = bank.tokens(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
        assert tokens[:, 0].tolist() == [float(i) for i in kept for _ in range(2)]
        assert ids.tolist() == [10 * i + j for i in kept for j in range(2)]


def test_iterations_are_counted_not_tokens() -> None:
    bank = TokenBank(2)
    for t, size in enumerate([5, 1, 4]):
        bank.enqueue(*batch(t, size))
    assert bank.tokens(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))[0][:, 0].tolist() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("enqueued", [0, 3])
def test_size_0_stays_empty(enqueued: int) -> None:
    bank = TokenBank(0)
    for t in range(enqueued):
        bank.enqueue(*batch(t))
    tokens, ids = bank.tokens(torch.zeros(4, 3, dtype=torch.float64), torch.arange(4))
    assert tokens.shape == (0, 3) and tokens.dtype == torch.float64
    assert ids.shape == (0,) and ids.dtype == torch.long


def test_no_gradient_is_kept() -> None:
    bank, tokens = TokenBank(2), torch.ones(2, 3, requires_grad=True)
    bank.enqueue(2 * tokens, torch.arange(2))
    assert not bank.tokens(tokens, torch.arange(2))[0].requires_grad
