"""What decays, and at which rate each part of the student learns."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import Student as StudentConfig
from pipeline.student.student import Student

KERNELS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def student(model: str, **settings: Any) -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(model=model, weights="none", channels=64, **settings), 8)


def settings_of(groups: Iterable[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Rate and decay of each parameter; none is listed twice."""
    listed = [(id(p), (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(listed) == len(dict(listed))
    return dict(listed)


@pytest.mark.parametrize(
    "model",
    [
        "segformer-b0", "segnext-t", "swin-t", "timm:test_efficientnet", "timm:test_convnext", "timm:test_vit",
        "timm:vit_tiny_patch16_224", "timm:test_mambaout",
    ],
)  # fmt: skip
def test_parameter_groups(model: str) -> None:
    """Every parameter once; the heads at their rate; only weight matrices and kernels decay."""
    trained = student(model, auxiliary=model == "swin-t")
    groups = trained.parameter_groups(lr=0.2, head_lr_factor=5.0, weight_decay=0.01)
    settings = settings_of(groups)
    assert len(settings) == len(list(trained.parameters())) and len(groups) == 4
    decaying = set()
    for name, module in trained.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            rate, decay = settings.pop(id(parameter))
            heads = name.startswith(("head", "auxiliary_head"))
            assert rate == pytest.approx(1.0 if heads else 0.2), name
            kernel = isinstance(module, KERNELS) and own == "weight"
            assert decay == (0.01 if kernel else 0.0), f"{name}.{own}"
            decaying.add(kernel)
    assert not settings and decaying == {True, False}
    torch.optim.AdamW(groups).step()  # torch takes them


@pytest.mark.parametrize(
    ("model", "word", "count"),
    [
        ("swin-t", "relative_position_bias_table", 12), ("timm:vit_tiny_patch16_224", "pos_embed", 1),
        ("timm:vit_tiny_patch16_224", "cls_token", 1), ("timm:test_vit3", "reg_token", 1),
        ("timm:mvitv2_tiny", "rel_pos", None), ("timm:tiny_vit_5m_224", "attention_biases", None),
    ],
)  # fmt: skip
def test_positions_do_not_decay(model: str, word: str, count: int | None) -> None:
    """Tables and embeddings of positions have several dimensions, and are no weight matrices."""
    trained = student(model)
    settings = settings_of(trained.parameter_groups(1.0, 1.0, 0.1))
    found = [name for name, p in trained.named_parameters() if word in name and p.ndim > 1]
    assert found and count in (None, len(found))
    for name, parameter in trained.named_parameters():
        if name in found:
            assert settings[id(parameter)] == (1.0, 0.0), name


def test_equal_rates() -> None:
    """A factor of 1: two groups, each parameter in one of them."""
    trained = student("timm:test_convnext")
    groups = trained.parameter_groups(0.5, 1.0, 0.1)
    assert len(groups) == 2 and len(settings_of(groups)) == len(list(trained.parameters()))


def test_no_decay_at_all() -> None:
    trained = student("timm:test_convnext")
    settings = settings_of(trained.parameter_groups(0.5, 10.0, 0.0))
    assert len(settings) == len(list(trained.parameters())) and {decay for _, decay in settings.values()} == {0.0}


def test_frozen_parameters_are_in_no_group() -> None:
    trained = student("timm:test_efficientnet")
    trained.encoder.requires_grad_(False)
    assert set(settings_of(trained.parameter_groups(1.0, 1.0, 0.1))) == {id(p) for p in trained.head.parameters()}


@pytest.mark.parametrize(
    ("model", "factor"), [("segformer-b0", 10), ("segnext-t", 10), ("swin-t", 1), ("timm:test_vit", 10)]
)
def test_head_lr_factor(model: str, factor: float) -> None:
    assert student(model).head_lr_factor == factor
