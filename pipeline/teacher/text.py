"""Class features: prompts encoded by the text tower, or read from a file without open_clip."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import UserError, reason

BATCH = 256  # prompts per pass of the text tower

_PHOTO = tuple(f"a photo of a {size}{{}}." for size in ("", "small ", "medium ", "large "))
# ZegCLIP's (Zhou et al. 2023) ensemble of 15 for COCO-Stuff; VOC has only the first.
_ZEGCLIP = (
    *_PHOTO,
    *(f"This is {text}" for text in _PHOTO),
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    *(f"There is {article} {{}} in the scene." for article in ("a", "the")),
    *(f"This is {article} {{}} in the scene." for article in ("a", "the", "one")),
)


def prompt_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The texts with {} that `single`, `zegclip` (15) or `imagenet` (open_clip's 80) names; others as they are."""
    if not isinstance(templates, str):
        return tuple(templates)
    if templates == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    return {"single": _PHOTO[:1], "zegclip": _ZEGCLIP}[templates]


def classifier(
    encode: Callable[[list[str]], Tensor], names: Sequence[Sequence[str]], templates: str | Sequence[str]
) -> Tensor:
    """(K, C) unit-length rows, one per class: CLIP's prompt ensemble (Radford et al. 2021, section 3.1.4).

    Args:
        encode: n texts -> features (n, C), of any length.
        names: the synonyms of each of K classes.
        templates: as `prompt_templates` takes them. Features are normalised, averaged over templates and normalised;
            then averaged over synonyms and normalised.
    """
    texts = prompt_templates(templates)
    prompts = [text.replace("{}", name) for synonyms in names for name in synonyms for text in texts]
    parts = [normalize(encode(prompts[i : i + BATCH]).float(), dim=-1) for i in range(0, len(prompts), BATCH)]
    per_name = normalize(torch.cat(parts).unflatten(0, (-1, len(texts))).mean(dim=1), dim=-1)
    per_class = per_name.split([len(synonyms) for synonyms in names])
    return normalize(torch.stack([each.mean(dim=0) for each in per_class]), dim=-1)


def read_text_features(path: Path, classes: int, width: int | None) -> np.ndarray:
    """Class features (K, C) float32 of unit length from a file.

    Args:
        path: .npy, or .safetensors with one tensor or one named text_features.
        classes: K, or how many words and classes have a feature of their own.
        width: C, or None for any.

    Raises:
        UserError: the file cannot be read, or has the wrong shape, values that are not finite or a row of zeros.
    """
    features = np.asarray(_read(path))
    if features.ndim != 2 or features.dtype.kind != "f":
        raise UserError(f"text features {path} must be floats (classes, width), not {features.dtype} {features.shape}")
    if len(features) != classes:
        raise UserError(
            f"text features {path} have {len(features)} rows, but {classes} are needed: one for each class, or for "
            "each word of a class that is any of several"
        )
    if width is not None and features.shape[1] != width:
        raise UserError(f"text features {path} are {features.shape[1]} wide, but the teacher's embedding is {width}")
    features = features.astype(np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(length).all() or not (length > 0).all():
        row = int(np.argmin(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
        raise UserError(f"text features {path}: row {row} is zero or not finite")
    return features / length


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if "text_features" in tensors:
                return tensors["text_features"]
            if len(tensors) == 1:
                return next(iter(tensors.values()))
            raise UserError(f"text features {path}: none of the {len(tensors)} tensors is named text_features")
    except OSError as error:
        raise UserError(f"text features: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"text features {path} cannot be read: {reason(error)}") from error
    raise UserError(f"text features {path} must be a .npy or a .safetensors file")
