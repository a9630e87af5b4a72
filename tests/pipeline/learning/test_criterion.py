"""The whole objective, Eq. 8, against the reference's pieces put together."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import Loss
from pipeline.learning.criterion import Criterion
from tests import reference
from tests.pipeline.draws import draw, draw_classes, draw_unit
from tests.reference import NONE, Array

NAMES = ["global", "local", "nel", "ce", "bce"]
MOST = 255  # groups that a view can have
STRIDE = 4  # of the student's features
WIDTH = 8
ALPHA = 1.7
KINDS = [
    "mixed", "nothing ignored", "all ignored", "no label", "no group", "one class", "one view", "one image",
    "vanishing groups", "vanishing classes", "non-square", "255 groups",
]  # fmt: skip


class Batch(NamedTuple):
    """What `Criterion.forward` takes."""

    features: Array
    cls_token: Array
    seen: Array
    groups: Array
    image_ids: Array
    region_tokens: Array

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.from_numpy(a).to(dtype if a.dtype == np.float64 else None) for a in self]


def draw_batch(rng: np.random.Generator, kind: str) -> tuple[Batch, Array]:
    """A batch and the seen classes' text features."""
    views = 1 if kind in ("one view", "255 groups") else 3
    num_seen, grid = 1 if kind == "one class" else 5, 16 if kind == "255 groups" else 4
    height, width = 16, 24 if kind == "non-square" else 16
    seen = draw_classes(rng, (views, height, width), 0.5, num_seen)
    groups = draw_classes(rng, (views, grid, grid), 0.3, 3)
    centre = np.zeros((height, width), bool)
    centre[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE] = True  # the pixels that give the features their labels
    if kind == "nothing ignored":
        seen, groups[:] = draw_classes(rng, seen.shape, 0, num_seen), NONE
    elif kind in ("all ignored", "no label"):
        seen[:] = NONE
    elif kind == "vanishing groups":
        seen = np.where(centre, draw_classes(rng, seen.shape, 0, num_seen), NONE).astype(np.uint8)
    elif kind == "vanishing classes":
        seen[:, centre] = NONE
    elif kind == "255 groups":
        seen[:], groups = NONE, np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    if kind in ("no label", "no group"):
        groups[:] = NONE
    ids = np.full(views, 6) if kind == "one image" else rng.integers(0, 5, views)
    features = draw(rng, views, WIDTH, height // STRIDE, width // STRIDE, scale=2)
    text_seen = draw_unit(rng, num_seen, WIDTH)
    cls_token = draw(rng, views, WIDTH, scale=3)
    tokens = rng.integers(-127, 128, (views, MOST, WIDTH)).astype(np.int8)
    tokens[:, 1] = 0  # a region without a direction
    return Batch(features, cls_token, seen, groups, ids, tokens), text_seen


def objective(
    config: Loss, batch: Batch, text_seen: Array, past: list[Batch], synthesizer: torch.nn.Module | None = None,
    progress: float = 0,
) -> dict[str, float]:  # fmt: skip
    """Eq. 8 by the reference, every loss of it. Without a synthesizer the centroids themselves are the prototypes."""
    features, num_seen = batch.features, len(text_seen)
    if config.glm == "attention":
        query = reference.unit(batch.cls_token) if config.unit_query else batch.cls_token
        predicted = reference.glm_attention(features, query)[1]
    elif config.glm == "selective":
        count = max(1, round((1 - 0.9 * progress) * features.shape[2] * features.shape[3]))
        predicted = reference.glm_selective(features, batch.cls_token, count)
    else:
        predicted = reference.glm_pool(features, config.glm)
    kept = past[max(len(past) - config.bank, 0) :]
    bank = np.concatenate([np.zeros((0, WIDTH)), *[old.cls_token for old in kept]])
    bank_ids = np.concatenate([np.zeros(0, int), *[old.image_ids for old in kept]])

    labels, count = reference.fused_labels(batch.seen, batch.groups, num_seen)
    centroids, present = reference.class_centroids(features, reference.at_stride(labels, features.shape[2:]), count)
    classes = [label for label in range(num_seen) if present[label]]
    pseudo = [label for label in range(num_seen, count) if present[label]]
    prototypes = centroids[classes + pseudo]
    if synthesizer is not None:
        with torch.no_grad():
            prototypes = synthesizer(torch.from_numpy(prototypes), torch.from_numpy(batch.cls_token)).numpy()
    scored = np.moveaxis(reference.unit(np.moveaxis(features, 1, 3)), 3, 1) if config.unit_features else features
    logits = reference.classify(scored, text_seen, prototypes[len(classes) :], ALPHA, config.beta)
    size = tuple(-(-side // config.label_stride) for side in labels.shape[1:])
    logits = reference.bilinear(logits, size)
    channel = {label: label for label in range(num_seen)} | {label: num_seen + i for i, label in enumerate(pseudo)}
    target = np.vectorize(lambda label: channel.get(label, -1))(reference.at_stride(labels, size))
    of_classes = logits[:, :num_seen], np.where(target < num_seen, target, -1)
    pairs = reference.bce if config.bce_negatives else own_pairs
    groups = [group[group != NONE].astype(int) for group in batch.groups]
    told = [tokens[: max(own, default=-1) + 1] for tokens, own in zip(batch.region_tokens, groups, strict=True)]
    tokens = np.concatenate(told) * present[num_seen:, None]
    return {
        "local": config.local_weight * reference.region_loss(centroids[num_seen:], tokens, config.tau),
        "global": reference.info_nce(predicted, batch.cls_token, bank, config.tau, batch.image_ids, bank_ids),
        "nel": reference.nel(logits, target) if config.nel_channels == "all" else reference.nel(*of_classes),
        "ce": reference.cross_entropy(logits, target),
        "bce": pairs(prototypes[: len(classes)], np.array(classes), text_seen),
    }


def own_pairs(prototypes: Array, classes: Array, text_seen: Array) -> float:
    """Eq. 6 as it is printed, with a minus sign: no pair but a prototype and its own text."""
    own = [(p * text_seen[k]).sum() for p, k in zip(prototypes, classes, strict=True)]
    return float(np.mean([np.log(1 + np.exp(-score)) for score in own])) if own else 0.0


def make_criterion(text_seen: Array, settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Criterion:
    """With the centroids as prototypes unless `settings` say otherwise."""
    criterion = Criterion(Loss(**{"synthesizer": "features", **settings}), torch.from_numpy(text_seen)).to(dtype)
    with torch.no_grad():
        criterion.alpha.fill_(ALPHA)
    return criterion


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    assert all(loss.shape == () for loss in losses.values())
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_stride", [1, 4])
@pytest.mark.parametrize("nel_channels", ["seen", "all"])
@pytest.mark.parametrize("seed", range(2))
def test_reference(kind: str, label_stride: int, nel_channels: str, seed: int) -> None:
    batch, text_seen = draw_batch(np.random.default_rng(seed), kind)
    criterion = make_criterion(text_seen, {"label_stride": label_stride, "nel_channels": nel_channels})
    losses = values(criterion(*batch.tensors()))
    assert losses == pytest.approx(objective(criterion.config, batch, text_seen, []), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("synthesizer", ["decoder", "mlp"])
@pytest.mark.parametrize("kind", ["mixed", "one view", "no group", "all ignored", "255 groups"])
def test_synthesizer_sees_the_present_centroids(kind: str, synthesizer: str) -> None:
    """And no others: absent ones would take part in the decoder's attention."""
    batch, text_seen = draw_batch(np.random.default_rng(8), kind)
    criterion = make_criterion(text_seen, {"synthesizer": synthesizer, "label_stride": 4}).eval()
    expected = objective(criterion.config, batch, text_seen, [], criterion.synthesizer)
    assert values(criterion(*batch.tensors())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("label_stride", [2, 3, 8, 100])
def test_other_label_strides(label_stride: int) -> None:
    batch, text_seen = draw_batch(np.random.default_rng(0), "non-square")
    criterion = make_criterion(text_seen, {"label_stride": label_stride})
    expected = objective(criterion.config, batch, text_seen, [])
    assert values(criterion(*batch.tensors())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["mixed", "nothing ignored", "all ignored", "no label"])
@pytest.mark.parametrize(
    "settings",
    [
        {"glm": "max"}, {"glm": "mean"}, {"local_weight": 0.5},
        {"tau": 0.5}, {"beta": 0.0}, {"beta": 7.5}, {"bank": 1}, {"unit_query": True},
        {"unit_features": True}, {"unit_features": True, "nel_channels": "all"}, {"bce_negatives": False},
    ],
)  # fmt: skip
def test_settings(settings: dict[str, Any], kind: str) -> None:
    batch, text_seen = draw_batch(np.random.default_rng(1), kind)
    criterion = make_criterion(text_seen, {"label_stride": 4, **settings})
    expected = objective(criterion.config, batch, text_seen, [])
    assert values(criterion(*batch.tensors())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_progress(progress: float) -> None:
    batch, text_seen = draw_batch(np.random.default_rng(1), "mixed")
    criterion = make_criterion(text_seen, {"glm": "selective", "label_stride": 4})
    expected = objective(criterion.config, batch, text_seen, [], progress=progress)
    assert values(criterion(*batch.tensors(), progress=progress)) == pytest.approx(expected, rel=1e-6)


def test_alpha_begins_where_it_is_told_to() -> None:
    assert Criterion(Loss(alpha=14), torch.eye(8)).alpha.item() == 14


@pytest.mark.parametrize("bank", [0, 1, 2, 24])
def test_iterations_fill_the_bank(bank: int) -> None:
    """Of images that come back, so that some of the bank's tokens are no negatives."""
    rng = np.random.default_rng(bank)
    text_seen = draw_unit(rng, 5, WIDTH)
    past: list[Batch] = []
    criterion = make_criterion(text_seen, {"bank": bank, "local": False, "nel": False, "ce": False, "bce": False})
    for _ in range(5):
        batch, _ = draw_batch(rng, "mixed")
        expected = objective(criterion.config, batch, text_seen, past)["global"]
        assert values(criterion(*batch.tensors())) == pytest.approx({"global": expected}, rel=1e-9)
        past.append(batch)


def test_accumulating_does_not_shorten_the_bank() -> None:
    """Of three calls an iteration, the last two iterations."""
    rng = np.random.default_rng(0)
    criterion = Criterion(Loss(bank=2), torch.from_numpy(draw_unit(rng, 5, WIDTH)), accumulate=3).double()
    drawn = [draw_batch(rng, "mixed")[0].tensors() for _ in range(9)]
    for tensors in drawn:
        criterion(*tensors)
    kept = [tokens for tokens, _ in criterion.bank.state()]
    assert len(kept) == 6 and all(torch.equal(a, tensors[1]) for a, tensors in zip(kept, drawn[3:], strict=True))


@pytest.mark.parametrize("switches", list(product([False, True], repeat=5))[1:])
def test_switches(switches: tuple[bool, ...]) -> None:
    """A loss that is off is absent, and the others are what they were."""
    batch, text_seen = draw_batch(np.random.default_rng(2), "mixed")
    wanted = dict(zip(NAMES, switches, strict=True))
    criterion = make_criterion(text_seen, {"label_stride": 4, **wanted})
    expected = objective(criterion.config, batch, text_seen, [])
    losses = values(criterion(*batch.tensors()))
    assert losses == pytest.approx({name: expected[name] for name in NAMES if wanted[name]}, rel=1e-6)


def test_single_precision() -> None:
    """As training runs it."""
    batch, text_seen = draw_batch(np.random.default_rng(3), "mixed")
    criterion = make_criterion(text_seen, {}, torch.float32)
    expected = objective(criterion.config, batch, text_seen, [])
    assert values(criterion(*batch.tensors(torch.float32))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixed", "all ignored", "vanishing groups", "no label"])
@pytest.mark.parametrize("label_stride", [2, 4])
def test_gradients_are_those_of_the_sum(kind: str, label_stride: int) -> None:
    """Nothing between the features, the centroids and the losses is cut off."""
    batch, text_seen = draw_batch(np.random.default_rng(4), kind)
    small = batch._replace(features=batch.features[:, :, :2, :2], seen=batch.seen[:, :8, :8])
    criterion = make_criterion(text_seen, {"label_stride": label_stride, "bank": 0})
    features, *rest = small.tensors()

    def total(features: Tensor, alpha: Tensor) -> Tensor:
        losses = torch.func.functional_call(criterion, {"alpha": alpha}, (features, *rest))
        return torch.stack(list(losses.values())).sum()

    leaves = features.clone().requires_grad_(), torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, leaves, atol=1e-4)


@pytest.mark.parametrize("synthesizer", ["decoder", "mlp"])
def test_gradients_reach_everything_that_is_trained(synthesizer: str) -> None:
    batch, text_seen = draw_batch(np.random.default_rng(5), "mixed")
    criterion = make_criterion(text_seen, {"synthesizer": synthesizer}, torch.float32)
    features, *rest = batch.tensors(torch.float32)
    losses = criterion(features.requires_grad_(), *rest)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(criterion.named_parameters())
    assert "alpha" in parameters and len(parameters) > 4
    for name, tensor in {"features": features, **parameters}.items():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("synthesizer", ["decoder", "mlp", "features"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_alone_can_be_minimised(kind: str, synthesizer: str, name: str) -> None:
    """Also where a batch gives it nothing to learn from."""
    batch, text_seen = draw_batch(np.random.default_rng(6), kind)
    switches = {other: other == name for other in NAMES}
    settings = {"synthesizer": synthesizer, "label_stride": 4, **switches}
    criterion = make_criterion(text_seen, settings, torch.float32)
    features, *rest = batch.tensors(torch.float32)
    losses = criterion(features.requires_grad_(), *rest)
    assert list(losses) == [name]
    losses[name].backward()
    for tensor in (features, *criterion.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


def test_prototypes_of_the_batch_come_from_its_cls_tokens() -> None:
    """The decoder's: another S is another prototype, hence another loss."""
    batch, text_seen = draw_batch(np.random.default_rng(7), "mixed")
    criterion = make_criterion(text_seen, {"synthesizer": "decoder", "global": False}).eval()
    one = values(criterion(*batch.tensors()))
    other = values(criterion(*batch._replace(cls_token=-batch.cls_token).tensors()))
    assert all(one[name] != other[name] for name in ("ce", "bce"))
    assert one["nel"] == other["nel"]  # it is of the classes' logits alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_stride", [1, 4])
@pytest.mark.parametrize("ce", [True, False])
def test_auxiliary_head(kind: str, label_stride: int, ce: bool) -> None:
    """0.4 x the cross-entropy of alpha R' . T on the seen classes alone; the other losses do not notice it."""
    rng = np.random.default_rng(9)
    batch, text_seen = draw_batch(rng, kind)
    height, width = batch.seen.shape[1:]
    coarse = draw(rng, len(batch.seen), WIDTH, -(-height // 16), -(-width // 16))
    criterion = make_criterion(text_seen, {"label_stride": label_stride, "ce": ce})
    expected = objective(criterion.config, batch, text_seen, [])
    size = (-(-height // label_stride), -(-width // label_stride))
    labels = reference.at_stride(np.where(batch.seen == NONE, -1, batch.seen.astype(int)), size)
    logits = reference.bilinear(ALPHA * np.einsum("bchw,kc->bkhw", coarse, text_seen), size)
    wanted = {name: expected[name] for name in NAMES if ce or name != "ce"}
    if ce:
        wanted["auxiliary"] = 0.4 * reference.cross_entropy(logits, labels)
    losses = values(criterion(*batch.tensors(), torch.from_numpy(coarse)))
    assert losses == pytest.approx(wanted, rel=1e-6, abs=1e-9)
