"""Every named student: built once, counted against the published sizes, and its features' shape."""

from dataclasses import dataclass

import pytest
import torch

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student.families import FAMILIES, family_of
from pipeline.student.student import Student

CLASSES = 150
# Millions of parameters. SegNeXt (Table 2) and Swin with UPerNet and auxiliary head: whole, of 150 classes; SegFormer
# (Table 1): encoders alone.
PUBLISHED = {
    "segnext-t": 4.3, "segnext-s": 13.9, "segnext-b": 27.6, "segnext-l": 48.9,
    "swin-t": 60, "swin-s": 81, "swin-b": 121,
    "segformer-b0": 3.4, "segformer-b1": 13.1, "segformer-b2": 24.2,
    "segformer-b3": 44.0, "segformer-b4": 60.8, "segformer-b5": 81.4,
}  # fmt: skip
# mmsegmentation's training settings: drop path, and what the head's learning rate is multiplied by.
DROP_PATH = {"segformer": 0.1, "segnext": 0.1, "swin": 0.3}
HEAD_LR_FACTOR = {"segformer": 10, "segnext": 10, "swin": 1}
HEAD_CHANNELS = {"segformer": 256, "segnext-t": 256, "segnext-s": 256, "segnext-b": 512, "segnext-l": 1024, "swin": 512}


@dataclass(frozen=True)
class Built:
    name: str
    student: Student

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request: pytest.FixtureRequest) -> Built:
    name: str = request.param
    config = StudentConfig(model=name, weights="none", auxiliary=name.startswith("swin"))
    return Built(name, Student(config, CLASSES).eval())


def test_parameter_count(built: Built) -> None:
    """Within 2 % of the papers; MiT-B0's 3.32 M, transformers' too, is 3.4 M in its paper."""
    counted = built.student.encoder if built.kind == "segformer" else built.student
    tolerance = 0.025 if built.name == "segformer-b0" else 0.02
    assert sum(p.numel() for p in counted.parameters()) / 1e6 == pytest.approx(PUBLISHED[built.name], rel=tolerance)


def test_shape(built: Built) -> None:
    """At stride 4, or 8 for SegNeXt; Swin's second head at stride 16."""
    stride = 8 if built.kind == "segnext" else 4
    with torch.inference_mode():
        features, second = built.student.with_auxiliary(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, CLASSES, 64 // stride, 64 // stride) and features.isfinite().all()
    assert built.student.stride == stride
    assert second is None if built.kind != "swin" else second is not None and second.shape == (1, CLASSES, 4, 4)


def test_settings(built: Built) -> None:
    """Those of mmsegmentation where the configuration has none."""
    rates = [getattr(module, "drop_prob", 0.0) for module in built.student.encoder.modules()]
    wanted = 0.3 if built.name == "segnext-l" else DROP_PATH[built.kind]
    assert max(rates) == pytest.approx(wanted)
    assert built.student.head_lr_factor == HEAD_LR_FACTOR[built.kind]
    channels = HEAD_CHANNELS.get(built.name, HEAD_CHANNELS.get(built.kind))
    assert built.student.head.project.in_channels == channels
    assert built.student.mean == (0.485, 0.456, 0.406) and built.student.std == (0.229, 0.224, 0.225)
    if built.student.auxiliary_head:
        assert built.student.auxiliary_head.project.in_channels == 256


def test_all_are_counted() -> None:
    assert set(PUBLISHED) == set(FAMILIES)


def test_timm_family() -> None:
    family = family_of("timm:resnet50.a1_in1k")
    assert (family.timm_name, family.channels, family.drop_path, family.head_lr_factor) == (
        "resnet50.a1_in1k", 256, 0.0, 10,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "meant"),
    [("segformer-b6", "segformer-b"), ("segformer_b0", "segformer-b0"), ("segnext-xl", "segnext-"), ("swint", "swin-")],
)
def test_unknown_name(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown student.model '{name}'; did you mean '{meant}.*known: .*timm:NAME"):
        family_of(name)


@pytest.mark.parametrize("name", ["", "resnet50", "Timm:resnet50"])
def test_unlike_any_name(name: str) -> None:
    """The list of names, and no guess."""
    with pytest.raises(UserError, match=r"^unknown student.model [^;]*\(known: segformer-b0, .*, or timm:NAME\)$"):
        family_of(name)
