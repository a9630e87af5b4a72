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
    """(K, C) float32, unit length: one row for each channel of `config.dataset`, see `Dataset.channels`.

    Args:
        teacher: called only if the features must be computed. They are kept in caches/text/, under the fingerprint of
            the teacher's weights, the prompts and the templates; where that cannot be written, not at all.
        width: C if known, to reject a file for another teacher.
    """
    names = [names for _, names in config.dataset.channels]
    if config.dataset.text_features is not None:
        from pipeline.teacher.text import read_text_features

        return read_text_features(Path(config.dataset.text_features), len(names), width)
    return _kept_features(config, [names], config.dataset.name, teacher, width)[0]


def word_features(
    config: Config, words: Sequence[Sequence[str]], teacher: Callable[[], TextTower], width: int
) -> list[np.ndarray]:
    """(1, C) for each word's names, see `class_features`. Each is kept separately: other lists may contain it too."""
    return _kept_features(config, [[names] for names in words], "words", teacher, width)


def _kept_features(
    config: Config,
    lists: list[Sequence[Sequence[str]]],
    title: str,
    teacher: Callable[[], TextTower],
    width: int | None,
) -> list[np.ndarray]:
    """The features of each list of names; those that are not kept yet are computed together."""
    from pipeline.teacher.teacher import fingerprint  # the teacher is only needed from here on
    from pipeline.teacher.text import prompt_templates, read_text_features

    templates = config.dataset.templates
    rest = {"templates": prompt_templates(templates), "teacher": fingerprint(config.teacher)}
    keys = [sha256(json.dumps({"synonyms": names, **rest}, sort_keys=True).encode())[:12] for names in lists]
    paths = [CACHES / "text" / f"{title}-{key}.safetensors" for key in keys]
    new = [index for index, path in enumerate(paths) if not path.is_file()]
    computed: dict[int, np.ndarray] = {}
    if new:
        with progress_bar(f"class features of {title}"):
            together = [names for index in new for names in lists[index]]
            features = np.asarray(teacher().text_features(together, templates).cpu().numpy(), np.float32)
        ends = np.cumsum([len(lists[index]) for index in new])
        computed = dict(zip(new, np.split(features, ends[:-1]), strict=True))
        try:
            store = open_store(CACHES / "text")
            for index, found in computed.items():
                store.write(paths[index].name, save({"text_features": np.ascontiguousarray(found)}))
        except UserError as error:  # only a convenience
            say(f"warning: class features are not kept for the next run ({str(error).partition(': ')[0]})")
    return [  # from the files, new ones too: reading normalises again, and all runs have the same bytes
        read_text_features(path, len(lists[index]), width) if path.is_file() else computed[index]
        for index, path in enumerate(paths)
    ]
