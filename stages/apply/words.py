"""The user's words and their text features. CLIP is only loaded for words that are new to a run."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.dataset import MOST_CLASSES, check_names
from configs.errors import UserError
from configs.schema import Config
from pipeline.teacher.teacher import load_teacher
from stages.common.runs import Run
from stages.common.text import word_features


def parse_words(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Class name -> its names in prompts: "cow|bull|calf" is the class cow with three names.

    Raises:
        UserError: no words, a name that no class of a dataset may have, a duplicate, or more than 65,535.
    """
    parsed: dict[str, tuple[str, ...]] = {}
    for word in words:
        names = tuple(name.strip() for name in word.split("|"))
        try:
            check_names(names, "--classes")
        except ValueError as error:
            raise UserError(f"{error} (in {word!r}); separate names by commas, synonyms by |") from error
        if names[0] in parsed:
            raise UserError(f"--classes: {names[0]!r} is listed twice")
        parsed[names[0]] = names
    if not 1 <= len(parsed) <= MOST_CLASSES:
        raise UserError(f"--classes: {len(parsed):,} classes; give 1 to {MOST_CLASSES:,}")
    return parsed


def read_words(classes: str) -> list[str]:
    """Parse --classes: words separated by commas or line ends, or the lines of a text file."""
    if not os.path.isfile(classes):  # Path.is_file raises where the words are too long for a path
        if re.fullmatch(r"[^,|\n]*\.[A-Za-z]\w{1,4}\s*", classes) or os.path.isdir(os.path.dirname(classes)):
            raise UserError(
                f"--classes {classes}: no such text file; write one class per line, or names between commas"
            )
        return re.split("[,\n]", classes)
    try:
        return [line for line in Path(classes).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"--classes {classes} is not a UTF-8 text file ({error.reason}): write one class per line"
        ) from error


@dataclass(frozen=True)
class Vocabulary:
    """The requested classes.

    Attributes:
        config: the run's, with these classes as its dataset's.
        features: (K, C), one row for each channel. The training classes that are not asked for follow, if they compete
            too.
        class_of_channel: the class of each row.
        seen, unseen: indices of the classes with masks in training, and of the rest.
    """

    config: Config
    features: Tensor
    class_of_channel: list[int]
    seen: list[int]
    unseen: list[int]

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.dataset.classes


def vocabulary(run: Run, words: Sequence[str], others: bool = False) -> Vocabulary:
    """Training classes keep the run's features and do not need CLIP; its text tower encodes other words once.

    With `others`, the training classes compete too, except those whose name is one of the words or a synonym in them.

    Raises:
        UserError: as `parse_words`, or there is no text tower.
    """
    if isinstance(words, str):
        raise UserError(f"classes are a list of words, such as [{words!r}], not one text")
    parsed, trained = parse_words(words), run.config.dataset
    known = {name: row for row, name in enumerate(trained.classes)}
    new = {name: names for name, names in parsed.items() if names != (name,) or name not in known}
    of_run = torch.tensor(trained.class_of_channel, device=run.text_features.device)
    rows = {name: run.text_features[of_run == known[name]] for name in parsed if name not in new}

    if new:
        width = run.text_features.shape[1]
        found = word_features(run.config, list(new.values()), lambda: load_teacher(run.config.teacher), width)
        rows |= {name: torch.from_numpy(row).to(run.text_features.device) for name, row in zip(new, found, strict=True)}
    competing = list(parsed)
    if others:
        asked = {name for synonyms in parsed.values() for name in synonyms}
        competing += [name for name in trained.classes if name not in asked]
        rows |= {name: run.text_features[of_run == known[name]] for name in competing[len(parsed) :]}
    seen = [index for index, name in enumerate(competing) if name in known and known[name] in trained.seen_indices]
    unseen = [index for index in range(len(competing)) if index not in seen]
    classes = [index for index, name in enumerate(competing) for _ in rows[name]]
    features = torch.cat([rows[name] for name in competing])
    return Vocabulary(_with_classes(run.config, parsed), features, classes, seen, unseen)


def _with_classes(config: Config, words: dict[str, tuple[str, ...]]) -> Config:
    changed = {"name": "words", "classes": tuple(words), "prompts": words, "unseen": (), "text_features": None}
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=changed)})
