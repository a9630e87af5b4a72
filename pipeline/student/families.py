"""The students by name: encoder and head of each, with mmsegmentation's hyperparameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.load import suggest
from pipeline.student.ham import LightHamHead
from pipeline.student.heads import AllMLPHead, UPerHead
from pipeline.student.mit import MiT
from pipeline.student.mscan import MSCAN
from pipeline.student.timm_encoder import Swin, TimmEncoder

# An encoder: its levels' channels, `multiple`, `mean` and `std` are attributes. Arguments: download a timm tag's
# weights or not, drop path.
MakeEncoder = Callable[[bool, float], Any]


@dataclass(frozen=True)
class Family:
    """One student. The head's learning rate is `head_lr_factor` times the encoder's."""

    encoder: MakeEncoder
    head: type[AllMLPHead] | type[LightHamHead] | type[UPerHead]
    channels: int
    drop_path: float
    head_lr_factor: float
    timm_name: str | None = None  # where timm keeps weights of the encoder


def _segformer(channels: tuple[int, ...], depths: tuple[int, ...]) -> Family:
    return Family(lambda _, drop_path: MiT(channels, depths, drop_path), AllMLPHead, 256, 0.1, 10)


def _segnext(channels: tuple[int, ...], depths: tuple[int, ...], head: int, drop_path: float = 0.1) -> Family:
    return Family(lambda _, rate: MSCAN(channels, depths, rate), LightHamHead, head, drop_path, 10)


def _swin(name: str) -> Family:
    return Family(lambda pretrained, rate: Swin(name, pretrained, rate), UPerHead, 512, 0.3, 1, name)


def _timm(name: str) -> Family:
    return Family(lambda pretrained, rate: TimmEncoder(name, pretrained, rate), AllMLPHead, 256, 0.0, 10, name)


FAMILIES = {
    "segformer-b0": _segformer((32, 64, 160, 256), (2, 2, 2, 2)),
    "segformer-b1": _segformer((64, 128, 320, 512), (2, 2, 2, 2)),
    "segformer-b2": _segformer((64, 128, 320, 512), (3, 4, 6, 3)),
    "segformer-b3": _segformer((64, 128, 320, 512), (3, 4, 18, 3)),
    "segformer-b4": _segformer((64, 128, 320, 512), (3, 8, 27, 3)),
    "segformer-b5": _segformer((64, 128, 320, 512), (3, 6, 40, 3)),
    "segnext-t": _segnext((32, 64, 160, 256), (3, 3, 5, 2), head=256),
    "segnext-s": _segnext((64, 128, 320, 512), (2, 2, 4, 2), head=256),
    "segnext-b": _segnext((64, 128, 320, 512), (3, 3, 12, 3), head=512),
    "segnext-l": _segnext((64, 128, 320, 512), (3, 5, 27, 3), head=1024, drop_path=0.3),
    "swin-t": _swin("swin_tiny_patch4_window7_224"),
    "swin-s": _swin("swin_small_patch4_window7_224"),
    "swin-b": _swin("swin_base_patch4_window7_224"),
}


def family_of(model: str) -> Family:
    """The family of `student.model`. UserError if the name is unknown."""
    if model.startswith("timm:"):
        return _timm(model.removeprefix("timm:"))
    if model not in FAMILIES:
        hint = suggest(model, list(FAMILIES))
        raise UserError(f"unknown student.model {model!r}{hint} (known: {', '.join(FAMILIES)}, or timm:NAME)")
    return FAMILIES[model]
