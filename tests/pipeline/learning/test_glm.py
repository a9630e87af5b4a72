"""The Global Learning Module, Eq. 1-3 and Table 3."""

from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.learning.glm import attention, info_nce, predict_cls
from tests import reference
from tests.pipeline.draws import draw
from tests.pipeline.learning.gradients import assert_gradients, leaf
from tests.reference import Array

Mode = Literal["attention", "max", "mean"]
MODES: list[Mode] = ["attention", "max", "mean"]
SHAPES = [(1, 1, 1, 1), (2, 4, 1, 5), (3, 8, 4, 4), (2, 16, 5, 3)]


def reference_predict(features: Array, cls_token: Array, mode: Mode) -> Array:
    attended = reference.glm_attention(features, cls_token)[1]
    return attended if mode == "attention" else reference.glm_pool(features, mode)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple[int, int, int, int], scale: float) -> None:
    """`scale` 30: scores of hundreds, beyond what exp holds."""
    rng = np.random.default_rng(shape)
    features, cls_token = draw(rng, *shape, scale=scale), draw(rng, *shape[:2], scale=scale)
    weights = attention(torch.from_numpy(features), torch.from_numpy(cls_token))
    np.testing.assert_allclose(weights, reference.glm_attention(features, cls_token)[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights.sum(dim=1), 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_predict_cls(shape: tuple[int, int, int, int], mode: Mode) -> None:
    rng = np.random.default_rng(shape)
    features, cls_token = draw(rng, *shape, scale=2), draw(rng, *shape[:2], scale=2)
    predicted = predict_cls(torch.from_numpy(features), torch.from_numpy(cls_token), mode)
    np.testing.assert_allclose(predicted, reference_predict(features, cls_token, mode), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("progress", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_selective(shape: tuple[int, int, int, int], progress: float) -> None:
    """Of all features at first, of a tenth at last, of one at least."""
    rng = np.random.default_rng(shape)
    features, cls_token = draw(rng, *shape, scale=2), draw(rng, *shape[:2], scale=2)
    count = max(1, round((1 - 0.9 * progress) * shape[2] * shape[3]))
    predicted = predict_cls(torch.from_numpy(features), torch.from_numpy(cls_token), "selective", progress)
    np.testing.assert_allclose(predicted, reference.glm_selective(features, cls_token, count), rtol=1e-9, atol=1e-12)


def test_selective_gradient() -> None:
    """It reaches the chosen features alone."""
    features = torch.tensor([[[[1.0, -1.0, 0.9, 0.0]], [[0.0, 0.1, 0.2, 1.0]]]], requires_grad=True)  # (1, 2, 1, 4)
    predict_cls(features, torch.tensor([[2.0, 0.0]]), "selective", 2 / 3).sum().backward()  # 0.4 x 4: two of them
    assert features.grad is not None and features.grad.tolist() == [[[[0.5, 0, 0.5, 0]], [[0.5, 0, 0.5, 0]]]]


@pytest.mark.parametrize("mode", [*MODES, "selective"])
def test_identical_pixels_predict_themselves(mode: Mode) -> None:
    pixel = torch.arange(1.0, 5)
    predicted = predict_cls(pixel[None, :, None, None].expand(1, 4, 3, 3), torch.ones(1, 4), mode)
    torch.testing.assert_close(predicted, pixel[None])


@pytest.mark.parametrize("mode", MODES)
def test_predict_cls_gradient(mode: Mode) -> None:
    rng = np.random.default_rng(0)
    features, cls_token, weight = leaf(draw(rng, 3, 5, 2, 4)), leaf(draw(rng, 3, 5)), torch.from_numpy(draw(rng, 3, 5))
    dense = [[features[b, :, y, x] for y in range(2) for x in range(4)] for b in range(3)]
    rows = []
    for b in range(3):
        stack = torch.stack(dense[b])  # (L, C)
        if mode == "attention":
            exp = torch.exp(torch.stack([(cls_token[b] * pixel).sum() / 5**0.5 for pixel in dense[b]]))
            rows.append((exp[:, None] * stack).sum(0) / exp.sum())
        else:
            rows.append(stack.max(0).values if mode == "max" else stack.sum(0) / 8)
    loss = (weight * predict_cls(features, cls_token, mode)).sum()
    assert_gradients(loss, (weight * torch.stack(rows)).sum(), features, cls_token)


# Ids of the batch and of the bank: all different; views of one image in the batch; images seen before; all of one.
IDS = [
    ([1, 2, 3, 4], []),
    ([1, 2, 3, 4], [5, 6, 7]),
    ([1, 1, 3, 1], [5, 6, 7]),
    ([1, 2, 3, 4], [4, 4, 2, 9, 1]),
    ([1, 1, 1, 1], [1, 1, 1]),
    ([1], []),
    ([1], [1, 1]),
    ([1], [2]),
]


def assert_info_nce(
    predicted: Array, cls_token: Array, bank: Array, tau: float, image_ids: Array, bank_ids: Array
) -> None:
    tensors = torch.from_numpy(predicted), torch.from_numpy(cls_token), torch.from_numpy(bank)
    loss = info_nce(*tensors, tau, torch.from_numpy(image_ids), torch.from_numpy(bank_ids))
    expected = reference.info_nce(predicted, cls_token, bank, tau, image_ids, bank_ids)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tau", [0.07, 1.0])
@pytest.mark.parametrize(("ids", "bank_ids"), IDS)
def test_info_nce(ids: list[int], bank_ids: list[int], tau: float) -> None:
    rng = np.random.default_rng([len(ids), len(bank_ids)])
    tokens = draw(rng, len(ids), 6, scale=9), draw(rng, len(ids), 6, scale=9), draw(rng, len(bank_ids), 6, scale=9)
    assert_info_nce(*tokens, tau, np.array(ids), np.array(bank_ids, dtype=int))


def test_info_nce_without_negatives_is_0() -> None:
    predicted, tokens = torch.randn(3, 4), torch.randn(3, 4)
    ids = torch.zeros(3, dtype=torch.long)
    assert info_nce(predicted, tokens, tokens.repeat(2, 1), 0.07, ids, ids.repeat(2)).item() == 0


def test_info_nce_by_hand() -> None:
    """Prediction equal to the token, one negative at a right angle: log(1 + exp(-1 / tau))."""
    axes = torch.eye(2, dtype=torch.float64)
    loss = info_nce(axes[:1] * 5, axes[:1] * 2, axes[1:], 0.5, torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-2)), rel=1e-12)


@pytest.mark.parametrize("zero", ["predicted", "token", "bank"])
def test_info_nce_of_zero_vectors(zero: str) -> None:
    rng = np.random.default_rng(0)
    tokens = {"predicted": draw(rng, 3, 4), "token": draw(rng, 3, 4), "bank": draw(rng, 2, 4)}
    tokens[zero][0] = 0
    assert_info_nce(tokens["predicted"], tokens["token"], tokens["bank"], 0.07, np.arange(3), np.arange(3, 5))


@pytest.mark.parametrize(("ids", "bank_ids"), IDS)
def test_info_nce_gradient(ids: list[int], bank_ids: list[int]) -> None:
    rng = np.random.default_rng(len(bank_ids))
    predicted, tokens, bank = (leaf(draw(rng, n, 4)) for n in (len(ids), len(ids), len(bank_ids)))
    plain = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(ids):
        others = [token for token, other in zip([*tokens, *bank], ids + bank_ids, strict=True) if other != image]
        cosines = [(predicted[i] * token).sum() / predicted[i].norm() / token.norm() for token in [tokens[i], *others]]
        plain = plain - torch.log(torch.exp(cosines[0] / 0.3) / sum(torch.exp(cosine / 0.3) for cosine in cosines))
    loss = info_nce(predicted, tokens, bank, 0.3, torch.tensor(ids), torch.tensor(bank_ids, dtype=torch.long))
    assert_gradients(loss, plain / len(ids), predicted, tokens, bank)
