"""Class features of a dataset: read from a file, or computed once by the teacher's text tower and kept."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import save
from torch import Tensor

from cache.sealed import sha256
from cache.store import open_store
from configs.errors import UserError
from configs.schema import Config
from stages.common.caches import CACHES
from stages.common.progress import progress_bar, say


class TextTower(Protocol):
    """A teacher, or a proxy for one in another process."""

    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        """As `pipeline.teacher.teacher.Teacher`'s."""


def class_features(config: Config, teacher: Callable[[], TextTower], width: int | None = None) -> np.ndarray:
    """(K, C) float32, unit length: one row for each class of `config.dataset`.

    Args:
        teacher: called only if the features must be computed. They are kept in caches/text/, under the fingerprint of
            the teacher's weights, the prompts and the templates; where that cannot be written, not at all.
        width: C if known, to reject a file for another teacher.
    """
    from pipeline.teacher.text import prompt_templates, read_text_features

    dataset = config.dataset
    if dataset.text_features is not None:
        return read_text_features(Path(dataset.text_features), len(dataset.classes), width)
    from pipeline.teacher.teacher import fingerprint  # the teacher is only needed from here on

    prompts = {"synonyms": dataset.synonyms, "templates": prompt_templates(dataset.templates)}
    wanted = json.dumps({**prompts, "teacher": fingerprint(config.teacher)}, sort_keys=True).encode()
    path = CACHES / "text" / f"{dataset.name}-{sha256(wanted)[:12]}.safetensors"
    if not path.is_file():
        with progress_bar(f"class features of {dataset.name}"):
            features = teacher().text_features(dataset.synonyms, dataset.templates).cpu().numpy()
        try:
            open_store(path.parent).write(path.name, save({"text_features": features}))
        except UserError as error:  # only a convenience
            say(f"warning: class features are not kept for the next run ({str(error).partition(': ')[0]})")
            return np.asarray(features, np.float32)
    return read_text_features(path, len(dataset.classes), width)
