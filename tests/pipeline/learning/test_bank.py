"""The CLS token bank."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.learning.bank import DUPLICATE, CacheBank, TokenBank


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


def cached(images: int, views: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (images * views, width) of a few directions, and their images."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, width))
    tokens = centres[rng.integers(5, size=images * views)] + rng.standard_normal((images * views, width)) * 0.3
    return torch.from_numpy(tokens.astype(np.float16)), torch.arange(images).repeat_interleave(views)


def test_random_tokens_are_of_the_whole_cache() -> None:
    tokens, ids = cached(10, 2)
    bank, counts = CacheBank(tokens, ids, count=5, hard=False), torch.zeros(10)
    torch.manual_seed(0)
    for _ in range(2000):
        drawn, drawn_ids = bank.tokens(torch.zeros(2, 8), torch.arange(2))
        assert drawn.shape == (5, 8) and drawn.dtype == torch.float32
        assert all(
            (token == tokens[ids == own].float()).all(1).any() for token, own in zip(drawn, drawn_ids, strict=True)
        )
        counts += torch.bincount(drawn_ids, minlength=10)
    assert (counts / 10_000 - 0.1).abs().max() < 0.015  # five standard deviations of a binomial's share


@pytest.mark.parametrize("seed", range(8))
def test_hard_tokens_are_the_nearest_that_are_no_duplicates(seed: int) -> None:
    tokens, ids = cached(60, 2, seed=seed)
    bank = CacheBank(tokens, ids, count=12, hard=True)
    batch, own = tokens[::30].float(), ids[::30]  # 4 tokens: three neighbours each
    found, found_ids = bank.tokens(batch, own)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    everything, wanted = tokens.double().numpy(), set()
    for anchor in batch.double().numpy():
        order = sorted(range(120), key=lambda row: -cosine(anchor, everything[row]))[:12]  # four times what is wanted
        good = [
            row for row in order
            if ids[row] not in own and max(cosine(everything[row], b) for b in batch.double().numpy()) <= DUPLICATE
        ]  # fmt: skip
        wanted |= set(good[:3])
    assert sorted(map(tuple, found.tolist())) == sorted(tuple(tokens[row].float().tolist()) for row in wanted)
    assert not set(found_ids.tolist()) & set(own.tolist())


def test_a_cache_of_duplicates_alone_has_no_hard_tokens() -> None:
    bank = CacheBank(torch.ones(6, 4).half(), torch.arange(6), count=4, hard=True)
    found, ids = bank.tokens(torch.ones(2, 4), torch.arange(2))
    assert found.shape == (0, 4) and ids.shape == (0,)


@pytest.mark.parametrize("hard", [False, True])
def test_a_cache_bank_of_none(hard: bool) -> None:
    found, ids = CacheBank(*cached(4, 1), count=0, hard=hard).tokens(torch.ones(2, 8), torch.arange(2))
    assert found.shape == (0, 8) and ids.shape == (0,)
