"""The YAML of a dataset: files, mask values, class names and prompts, seen and unseen classes."""

import difflib
import re
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    PositiveInt,
    Tag,
    model_validator,
)

MOST_CLASSES = 2**16 - 1  # of 16-bit masks; the last value is that of pixels without a class


def ignore_index(classes: int) -> int:
    """The value of pixels without a class in masks of so many classes. Its smallest type is the masks'."""
    return 255 if classes <= 255 else MOST_CLASSES


class Section(BaseModel):
    """Unknown keys and numbers that are not finite are errors, and a resolved configuration is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def check_names(names: Iterable[str], of: str) -> None:
    """ValueError if one cannot name a class, in a YAML or in `predict --classes`."""
    for name in names:
        if not name or name != name.strip() or re.search(r"[|\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name):
            raise ValueError(
                f"{of}: the name {name!r} must not be empty, have outer spaces, or contain | or a line break"
            )


def pixel_value(value: Any) -> int | str:
    """A grey value or palette index from 0 to 65535, or a colour as "#rrggbb", also written [r, g, b]; or "others"."""
    if isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value):
        return "#" + bytes(value).hex()
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}|others", value):
        return value.lower()
    if type(value) is int and 0 <= value <= MOST_CLASSES:
        return value
    raise ValueError("write a number from 0 to 65535, or a colour such as [128, 0, 64]")


def pixel_values(values: Any) -> str:
    """Text such as "0-10, 12" or "#000000, #800040", also written as a number, or a list of numbers or colours."""
    if isinstance(values, list | tuple):
        values = ", ".join(str(pixel_value(value)) for value in values)
    value_list(text := str(values).lower())
    return text


PixelValue = Annotated[int | str, PlainValidator(pixel_value)]
Values = Annotated[str, BeforeValidator(pixel_values)]


class Masks(Section):
    """Mask files, and their pixel values if they differ from the dataset's.

    Written as a bare pattern, or as {files: PATTERN, values: ...}.
    """

    files: str
    values: Values | None = None


class Split(Section):
    """Where one split's files are, relative to the dataset's root.

    In a pattern, `{id}` stands for the image id, which may contain folders ("aachen/aachen_000000"), and a final `.*`
    for any image extension. The first of the `masks` that exists is read. `ids` are text files with one id per line;
    without them, every file that matches `images` is an id.
    """

    images: str
    masks: tuple[Masks, ...] = Field(min_length=1)
    ids: tuple[str, ...] = ()
    count: PositiveInt | None = Field(None, description="expected number of images")

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, split: Any) -> Any:
        if not isinstance(split, dict):
            return split
        split = {key: [value] if key in ("masks", "ids") and not isinstance(value, list | tuple) else value
                 for key, value in split.items()}  # fmt: skip
        if "masks" in split:
            split["masks"] = [{"files": item} if isinstance(item, str) else item for item in split["masks"]]
        return split

    @model_validator(mode="after")
    def _patterns_hold_the_id(self) -> "Split":
        patterns = [self.images, *(mask.files for mask in self.masks)]
        wrong = [
            p
            for p in patterns
            if p.count("{id}") != 1 or p.count("{") + p.count("}") != 2 or "*" in p.removesuffix(".*")
        ]
        if wrong:
            raise ValueError(f"{wrong[0]!r} must contain {{id}} once, no other braces, and * only as a final .*")
        return self


class AnyOf(Section):
    """Words that a class is any of: each has a channel of its own, and the best of them counts."""

    any: tuple[str, ...]


WORD_KINDS = "(names)", "(any of)"  # pydantic adds them to the place of an error


def _kind(words: object) -> str:
    return WORD_KINDS[isinstance(words, dict | AnyOf)]


Words = Annotated[
    Annotated[tuple[str, ...], Tag(WORD_KINDS[0])] | Annotated[AnyOf, Tag(WORD_KINDS[1])], Discriminator(_kind)
]


class Dataset(Section):
    """A dataset on disk, and the names and prompts of its classes.

    The i-th of `values` ("0-10, 12-23", or a list of colours) is the mask value of the i-th class; the default is the
    lowest values not in `ignore_index`, whose pixels have no class. Any other value in a mask is an error, unless
    `ignore_index` has `others`. Masks with their own `values` may assign a class to values in `ignore_index`.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")  # names files
    root: str = Field("", description="folder below --data-root, which may also name that folder itself; default: name")
    generator: Literal["scenes", "pascal-context"] | None = Field(None, description="makes missing files on first use")
    splits: dict[str, Split]
    limit: PositiveInt | None = Field(None, description="only the first images of each split")
    classes: tuple[str, ...] = Field(description="names, or a text file of them, one a line, beside the YAML")
    values: Values | None = None
    ignore_index: tuple[PixelValue, ...] = Field(
        (255,), description="others: all values of no class; default: 255, or 65535 if there are more than 255 classes"
    )
    coding: Literal["ade20k"] | None = Field(  # not in the settings of caches that are older than it
        None, description="the value is red // 10 * 256 + green", exclude_if=lambda coding: coding is None
    )
    unseen: tuple[str, ...] = Field((), description="classes, or the name of one of `unseen_splits`")
    unseen_splits: dict[str, tuple[str, ...]] = {}
    prompts: dict[str, Words] = Field(
        {}, description="names of a class in prompts, averaged; or {any: WORDS}, of which the best counts"
    )
    templates: Literal["single", "zegclip", "imagenet"] | tuple[str, ...] = "single"
    text_features: str | None = Field(None, description=".npy or .safetensors (K, C), read in place of a text tower")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, dataset: Any) -> Any:
        if not isinstance(dataset, dict):
            return dataset
        classes = dataset.get("classes")
        count = len(classes) if isinstance(classes, list | tuple) else 0
        dataset = {"root": dataset.get("name", ""), "ignore_index": [ignore_index(count)]} | dataset
        if isinstance(dataset.get("ignore_index"), int | str):
            dataset["ignore_index"] = [dataset["ignore_index"]]
        if isinstance(dataset.get("prompts"), dict):
            dataset["prompts"] = {k: [v] if isinstance(v, str) else v for k, v in dataset["prompts"].items()}
        unseen, named = dataset.get("unseen"), dataset.get("unseen_splits", {})
        if isinstance(unseen, str) and isinstance(named, dict):
            if unseen not in named:
                raise ValueError(f"unseen {unseen!r} is not in unseen_splits ({', '.join(named) or 'there are none'})")
            dataset["unseen"] = named[unseen]
        return dataset

    @model_validator(mode="after")
    def _classes_are_consistent(self) -> "Dataset":
        check_names(self.classes, "classes")
        for key, words in self.prompts.items():
            listed = words.any if isinstance(words, AnyOf) else words
            check_names(listed, f"prompts.{key}")
            if not listed:
                raise ValueError("each class in prompts needs at least one name")
        if len(set(self.classes)) != len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"classes lists {twice!r} twice")
        named = {"unseen": self.unseen, "prompts": self.prompts}
        named |= {f"unseen_splits.{key}": names for key, names in self.unseen_splits.items()}
        for key, names in named.items():
            unknown = [name for name in names if name not in self.classes]
            if unknown:
                hint = difflib.get_close_matches(unknown[0], self.classes, n=1)
                raise ValueError(
                    f"{key} lists names that are not classes of the dataset: {', '.join(unknown)}"
                    + (f"; did you mean {hint[0]!r}?" if hint else "")
                )
        if len(set(self.unseen)) == len(self.classes):
            raise ValueError("at least one class must be seen")
        if len(self.classes) > MOST_CLASSES:
            raise ValueError(f"16-bit masks can hold at most {MOST_CLASSES:,} classes")
        if not self.templates or (isinstance(self.templates, tuple) and any("{}" not in t for t in self.templates)):
            raise ValueError("give one or more templates, each with {} for the class name")
        for masks in (masks for split in self.splits.values() for masks in split.masks):
            self.value_of_class(masks.values)
        if self.coding and isinstance(self.value_of_class(None)[0], str):
            raise ValueError(f"with coding {self.coding}, values are numbers, not colours")
        both = [value for value in self.value_of_class(None) if value in self.ignore_index]
        if both:
            raise ValueError(f"{both[0]} is in values and in ignore_index: drop it from one of them")
        return self

    def value_of_class(self, values: str | None) -> list[int] | list[str]:
        """The pixel values of the K classes, for masks coded by `values` (None: the dataset's)."""
        values = self.values if values is None else values
        not_ignored = (value for value in range(MOST_CLASSES + 1) if value not in self.ignore_index)
        found = list(islice(not_ignored, len(self.classes))) if values is None else value_list(values)
        if len(found) != len(self.classes):
            raise ValueError(f"values {values or '0-65535'} has {len(found)} values for {len(self.classes)} classes")
        return found

    @property
    def seen_indices(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name not in self.unseen]

    @property
    def unseen_indices(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name in self.unseen]

    @property
    def channels(self) -> list[tuple[int, tuple[str, ...]]]:
        """The class of each text feature, ascending, and the names in its prompts, which are averaged.

        A class has one channel, or one for each word that it is any of.
        """
        found: list[tuple[int, tuple[str, ...]]] = []
        for index, name in enumerate(self.classes):
            words = self.prompts.get(name, (name,))
            found += [(index, (word,)) for word in words.any] if isinstance(words, AnyOf) else [(index, words)]
        return found

    @property
    def seen_channels(self) -> list[int]:
        return [
            channel for channel, index in enumerate(self.class_of_channel) if self.classes[index] not in self.unseen
        ]

    @property
    def words(self) -> list[str]:
        """A name for each channel: its class's, or its word where the class is any of several."""
        found = self.class_of_channel
        return [self.classes[index] if found.count(index) == 1 else names[0] for index, names in self.channels]

    @property
    def class_of_channel(self) -> tuple[int, ...]:
        return tuple(index for index, _ in self.channels)


def value_list(text: str) -> list[int] | list[str]:
    """Parse "0-2, 5" to [0, 1, 2, 5]. ValueError unless 16-bit and unique, or unique colours."""
    colours = [part.strip() for part in text.split(",")]
    if all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours) and len(set(colours)) == len(colours):
        return colours
    parts = [re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"values {text!r}: write numbers and ranges such as 0-10, 12, or a list of distinct colours")
    ranges = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    values = [value for first, last in ranges for value in range(first, last + 1)]
    if any(first > last for first, last in ranges) or len(set(values)) < len(values) or max(values) > MOST_CLASSES:
        raise ValueError(f"values {text!r} must be between 0 and 65535, without duplicates, and ranges ascending")
    return values
