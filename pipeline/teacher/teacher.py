"""What a teacher is, and which one `teacher.model` names: open_clip's, transformers', or an installed package's.

Packages register theirs as entry points, so that a setting in a stranger's run or cache can only choose among what
is installed here; it cannot name a module to import.
"""

import math
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import UserError, reason
from configs.schema import Teacher as Settings

GROUP = "clip_zss.teachers"  # of entry points
TRANSFORMERS = "transformers"


class Teacher(Protocol):
    """A frozen model with one embedding space for images, their parts and texts.

    Attributes:
        width: C, width of the embedding space.
        stride: pixels along a side of a dense token.
        mean, std: the normalisation of its images: (RGB / 255 - mean) / std.
    """

    width: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """S and D, without gradients.

        Args:
            pixels: (B, 3, H, W) float32, normalised, on any device. H and W are multiples of the stride and need not
                be equal.

        Returns:
            S (B, C), the images' embeddings, and D (B, H / stride, W / stride, C), their dense tokens; float32, of any
            length, finite also as float16.
        """

    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        """(K, C) float32 of unit length, one for each class.

        Args:
            names: synonyms of each of K classes.
            templates: `single`, `zegclip`, `imagenet`, or texts that hold {}. `pipeline.teacher.text.classifier`
                resolves them, and needs only a function that encodes texts.
        """


class PlugIn(Teacher, Protocol):
    """The class that an entry point names: a teacher, and how it is made."""

    def __init__(self, settings: Settings, device: str) -> None:
        """Loads the model.

        Args:
            settings: `model` is the plug-in's name; `pretrained`, `dense` and `precision` mean what it makes of them.
            device: cpu, cuda, cuda:1, mps. Outputs of `encode` are there.
        """

    @staticmethod
    def fingerprint(settings: Settings) -> str:
        """Identifies the outputs, such as the SHA-256 of the weights: another text, another cache. Loads no model."""


def load_teacher(
    settings: Settings, device: str = "cpu", channels_last: bool = False, compile: bool = False
) -> Teacher:
    """The teacher that `settings` describes, its outputs checked.

    Args:
        channels_last, compile: as `FrozenClip` takes them, for open_clip's models only.

    Raises:
        UserError: there is no such teacher, or it cannot be loaded.
    """
    kind = _installed(settings.model)
    if kind is None:
        from pipeline.teacher.clip import FrozenClip

        return FrozenClip(settings, device, channels_last, compile)
    if channels_last or compile:
        raise UserError(
            f"precompute.channels_last and precompute.compile are for open_clip's models, and teacher.model "
            f"{settings.model} is none of them: leave both false"
        )
    try:
        return _Checked(kind(settings, device), settings.model)
    except UserError:
        raise
    except Exception as error:  # each package raises its own
        raise _unusable(settings, error) from error


def fingerprint(settings: Settings) -> dict[str, str]:
    """The teacher's part of a cache's fingerprint: `model` and `pretrained`, local files by their SHA-256.

    Raises:
        UserError: a file cannot be read, or the plug-in fails.
    """
    kind = _installed(settings.model)
    if kind is None:
        from pipeline.teacher.load import weights_fingerprint

        return weights_fingerprint(settings)
    try:
        return {"model": settings.model, "pretrained": str(kind.fingerprint(settings))}
    except UserError:
        raise
    except Exception as error:
        raise _unusable(settings, error) from error


def tokens_along(size: int, stride: int, model: str) -> int:
    """Dense tokens along a side of `size` pixels. UserError if `size` is not a multiple of the stride of `model`."""
    rest = size % stride
    if rest:
        nearest = [str(fit) for fit in (size - rest, size - rest + stride) if fit]
        raise UserError(
            f"views.size {size} is not a multiple of {stride}, the token size in pixels of teacher.model {model}: "
            f"use {' or '.join(nearest)}"
        )
    return size // stride


def require_finite(values: Tensor, what: str, model: str) -> None:
    """UserError if there is any other value."""
    if not values.isfinite().all():
        raise UserError(
            f"teacher {model} gives {what} that are not finite: set teacher.precision=fp32, or choose other "
            "teacher.pretrained"
        )


def _installed(model: str) -> type[PlugIn] | None:
    """The class of a teacher that is not open_clip's; None if no package offers one of this name."""
    if model == TRANSFORMERS:
        from pipeline.teacher.dual_encoder import DualEncoder

        return DualEncoder
    found = list({entry.value: entry for entry in entry_points(group=GROUP, name=model)}.values())
    if len(found) > 1:
        packages = ", ".join(sorted(entry.dist.name for entry in found if entry.dist))
        raise UserError(f"teacher.model {model} is offered by several packages ({packages}): uninstall all but one")
    try:
        return found[0].load() if found else None
    except Exception as error:  # whatever its import does
        raise UserError(
            f"teacher.model {model}: {found[0].value} cannot be imported ({reason(error)}): reinstall its package"
        ) from error


def _unusable(settings: Settings, error: Exception) -> UserError:
    return UserError(
        f"teacher.model {settings.model} cannot be loaded ({type(error).__name__}: {reason(error)}): check "
        f"teacher.pretrained, which is {settings.pretrained!r}"
    )


class _Checked:
    """A plug-in whose outputs are what `Teacher` promises, or a UserError that names it."""

    def __init__(self, teacher: Teacher, name: str) -> None:
        self._teacher, self._name = teacher, name
        self.width, self.stride = int(teacher.width), int(teacher.stride)
        self.mean, self.std = tuple(map(float, teacher.mean)), tuple(map(float, teacher.std))
        if self.width < 1 or self.stride < 1 or not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise UserError(
                f"teacher {name} has width {self.width}, stride {self.stride}, mean {self.mean} and std {self.std}: "
                "its package must give positive numbers, and three for mean and std"
            )

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        grid = tuple(tokens_along(side, self.stride, self._name) for side in pixels.shape[-2:])
        cls_token, dense_tokens = self._teacher.encode(pixels)
        self._check(cls_token, (len(pixels), self.width), "CLS tokens")
        self._check(dense_tokens, (len(pixels), *grid, self.width), "dense tokens")
        require_finite(cls_token.half(), "CLS tokens", self._name)  # caches have float16
        return cls_token.float(), dense_tokens.float()

    @torch.inference_mode()
    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        features = self._teacher.text_features(names, templates)
        self._check(features, (len(names), self.width), "text features")
        if not all(math.isclose(length, 1, abs_tol=1e-3) for length in features.norm(dim=1).tolist()):
            raise UserError(f"teacher {self._name} gives text features that are not of length 1: its package must")
        return features.float()

    def _check(self, values: Tensor, shape: tuple[int, ...], what: str) -> None:
        if tuple(values.shape) != shape:
            raise UserError(f"teacher {self._name} gives {what} of shape {tuple(values.shape)}: they must be {shape}")
        require_finite(values, what, self._name)
