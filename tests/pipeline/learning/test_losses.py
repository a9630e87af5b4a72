"""Eq. 6 and Eq. 7."""

import numpy as np
import pytest
import torch

from pipeline.learning.losses import classify, prototype_bce
from tests import reference
from tests.pipeline.draws import draw, draw_unit
from tests.pipeline.learning.gradients import assert_gradients, leaf
from tests.reference import Array


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [[], [0], [2, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("scale", [1.0, 500.0])
def test_prototype_bce(scale: float, classes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    prototypes, text = draw(rng, len(classes), 8, scale=scale), draw_unit(rng, 5, 8)
    loss = prototype_bce(torch.from_numpy(prototypes), torch.tensor(classes, dtype=torch.long), torch.from_numpy(text))
    assert loss.item() == pytest.approx(reference.bce(prototypes, np.array(classes), text), rel=1e-9, abs=1e-12)


def test_prototype_bce_of_one_class() -> None:
    loss = prototype_bce(torch.tensor([[3.0, 4.0]]), torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-3)), rel=1e-6)


def test_prototype_bce_prefers_the_own_class() -> None:
    text = torch.eye(3)
    losses = [prototype_bce(5 * text[[i]], torch.tensor([1]), text).item() for i in range(3)]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("classes", [[], [3], [0, 2, 4]])
def test_prototype_bce_gradient(classes: list[int]) -> None:
    rng = np.random.default_rng(0)
    prototypes, text = leaf(draw(rng, len(classes), 4)), leaf(draw_unit(rng, 5, 4))
    plain = prototypes.sum() * 0
    for prototype, own in zip(prototypes, classes, strict=True):
        for j in range(5):
            score = torch.sigmoid((prototype * text[j]).sum())
            plain = plain - torch.log(score if j == own else 1 - score)
    loss = prototype_bce(prototypes, torch.tensor(classes, dtype=torch.long), text)
    assert_gradients(loss, plain / max(5 * len(classes), 1), prototypes, text)


def assert_classify(
    features: Array, text_seen: Array, prototypes: Array, alpha: float = 1.7, beta: float = 2.5
) -> None:
    tensors = torch.from_numpy(features), torch.from_numpy(text_seen), torch.from_numpy(prototypes)
    logits = classify(*tensors, torch.tensor(alpha, dtype=torch.float64), beta)
    expected = reference.classify(features, text_seen, prototypes, alpha, beta)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_seen", [1, 5])
@pytest.mark.parametrize("num_pseudo", [0, 1, 6])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_classify(size: tuple[int, int], num_pseudo: int, num_seen: int) -> None:
    rng = np.random.default_rng(num_pseudo)
    features, text = draw(rng, 2, 8, *size, scale=7), draw_unit(rng, num_seen, 8)
    prototypes = draw(rng, num_pseudo, 8, scale=7)
    assert_classify(features, text, prototypes)


def test_classify_zero_vectors() -> None:
    rng = np.random.default_rng(0)
    features, text, prototypes = draw(rng, 1, 4, 2, 2), draw_unit(rng, 2, 4), draw(rng, 3, 4)
    features[0, :, 0, 0] = prototypes[1] = 0
    assert_classify(features, text, prototypes)


@pytest.mark.parametrize("num_pseudo", [0, 3])
def test_classify_gradient(num_pseudo: int) -> None:
    rng = np.random.default_rng(0)
    features, text, prototypes = leaf(draw(rng, 2, 4, 2, 3)), leaf(draw(rng, 2, 4)), leaf(draw(rng, num_pseudo, 4))
    alpha, weight = leaf(np.array(1.3)), torch.from_numpy(draw(rng, 2, 2 + num_pseudo, 2, 3))
    plain = torch.zeros((), dtype=torch.float64)
    for b, y, x in np.ndindex(2, 2, 3):
        pixel = features[b, :, y, x]
        scores = [alpha * (pixel * t).sum() for t in text]
        scores += [2.0 * (pixel * p).sum() / (pixel.norm() * p.norm()) for p in prototypes]
        plain = plain + (weight[b, :, y, x] * torch.stack(scores)).sum()
    loss = (weight * classify(features, text, prototypes, alpha, 2.0)).sum()
    assert_gradients(loss, plain, features, text, prototypes, alpha)
