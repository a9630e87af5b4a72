"""The defaults are the paper's, and a dataset that contradicts itself is refused."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from configs.dataset import Dataset, Masks, Split, value_list
from configs.load import as_settings
from configs.schema import Config, Loss

SPLITS = {"train": {"images": "i/{id}.jpg", "masks": "m/{id}.png"}}
DATASET: dict[str, Any] = {"name": "tiny", "splits": SPLITS, "classes": ["a", "b", "c", "d"], "unseen": ["d", "b"]}

PAPER: dict[str, dict[str, Any]] = {
    "teacher": {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "dense": "clearclip"},
    "views": {"size": 512, "crop": "random", "ratio": [0.5, 2.0]},
    "pseudo_labels": {"windows": [7, 3], "lambda": 0.8},
    "precompute": {"batch_size": 16},
    "loss": {
        "bank": 24, "tau": 0.07, "beta": 2, "glm": "attention", "synthesizer": "decoder",
        "global": True, "nel": True, "ce": True, "bce": True,
    },
    "train": {
        "iterations": 20_000, "batch_size": 16, "lr": 6e-5, "weight_decay": 0.01,
    },
}  # fmt: skip


def test_defaults_are_the_papers() -> None:
    settings = as_settings(Config.model_validate({"dataset": DATASET}))
    for section, values in PAPER.items():
        assert {key: settings[section][key] for key in values} == values
    assert Config.model_validate({"dataset": DATASET}).train.warm_up == 1500


def test_settings_come_back_as_they_went() -> None:
    """Under the names that YAML files use, in plain JSON values: this is what a cache's fingerprint is made of."""
    config = Config.model_validate({"dataset": DATASET, "loss": {"global": False}, "pseudo_labels": {"lambda": 0.25}})
    settings = as_settings(config)
    assert settings["pseudo_labels"]["lambda"] == 0.25 and settings["loss"]["global"] is False
    assert Config.model_validate(settings) == config
    assert as_settings(Config.model_validate(settings)) == settings


def test_a_cache_belongs_to_stage_one_only() -> None:
    one = Config.model_validate({"dataset": DATASET, "views": {"size": 64}, "train": {"lr": 1.0}})
    other = Config.model_validate({"dataset": DATASET, "views": {"size": 64}, "loss": {"bank": 0}})
    assert one.stage_one == other.stage_one
    assert set(as_settings(one.stage_one)) == {"dataset", "teacher", "views", "pseudo_labels", "storage"}
    assert one.stage_one != Config.model_validate({"dataset": DATASET, "views": {"size": 65}}).stage_one


def test_a_resolved_configuration_never_changes() -> None:
    config = Config.model_validate({"dataset": DATASET})
    for section, key in ((config, "train"), (config.train, "lr"), (config.dataset, "classes")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_seen_and_unseen_keep_the_classes_order() -> None:
    dataset = Dataset.model_validate(DATASET)
    assert (dataset.seen_indices, dataset.unseen_indices) == ([0, 2], [1, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b", "a", "d"]}, "classes lists 'a' twice"),
        ({"unseen": ["b", "e", "f"]}, "unseen lists names that are not classes of the dataset: e, f"),
        ({"unseen": ["a", "b", "c", "d"]}, "at least one class must be seen"),
        ({"classes": [], "unseen": []}, "at least one class must be seen"),
        ({"templates": ["a {}.", "a photo"]}, "give one or more templates, each with {}"),
        ({"generator": "shapes"}, "Input should be 'scenes' or 'pascal-context'"),
        ({"ignore_index": "none"}, "write a number from 0 to 65535, or a colour such as"),
        ({"ignore_index": ["none"]}, "write a number from 0 to 65535, or a colour such as"),
        ({"values": 3}, "values 3 has 1 values for 4 classes"),
    ],
)
def test_inconsistent_dataset(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Dataset.model_validate(DATASET | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes", [{}, {"unseen": []}, {"unseen": ["a", "b", "d", "d"]}, {"ignore_index": 0}, {"ignore_index": []}]
)
def test_consistent_dataset(changes: dict[str, Any]) -> None:
    dataset = Dataset.model_validate(DATASET | changes)
    assert sorted(dataset.seen_indices + dataset.unseen_indices) == [0, 1, 2, 3]


@pytest.mark.parametrize(("classes", "ignored"), [(255, 255), (256, 65535), (65535, 65535)])
def test_as_many_classes_as_a_mask_can_hold(classes: int, ignored: int) -> None:
    """8-bit masks as far as they go."""
    dataset = Dataset.model_validate(DATASET | {"classes": [str(i) for i in range(classes)], "unseen": ["7"]})
    assert dataset.value_of_class(None) == list(range(classes)) and dataset.ignore_index == (ignored,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", [7]),
        ("0-255", list(range(256))),
        ("0-2, 5", [0, 1, 2, 5]),
        ("0-2,5,7-7", [0, 1, 2, 5, 7]),
        ("  3 ,4-5", [3, 4, 5]),
        ("007", [7]),
        ("3, 0-1", [3, 0, 1]),
        ("65535", [65535]),
    ],
)
def test_value_lists(text: str, expected: list[int]) -> None:
    assert value_list(text) == expected


NOT_NUMBERS = ["", " ", ",", "1,", ",1", "1,,2", "a", "1-b", "-", "-3", "1 2", "1.5", "0x1", "1-2-3", "²"]
NO_VALUES = ["3-2", "0-5, 5", "4, 4", "65536", "250-65536", "2, 1-3"]


@pytest.mark.parametrize("text", [*NOT_NUMBERS, *NO_VALUES])
def test_no_value_list(text: str) -> None:
    with pytest.raises(ValueError) as error:
        value_list(text)
    range_, numbers = "must be between 0 and 65535, without duplicates, and ranges", "write numbers and ranges such as"
    said = range_ if text in NO_VALUES else numbers
    assert said in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["5-", "1, 5-", "1, 5-3", "0-2, 9-8, 4"])
def test_half_a_range(text: str) -> None:
    with pytest.raises(ValueError, match="values"):
        value_list(text)


@pytest.mark.parametrize("seed", range(20))
def test_random_value_lists(seed: int) -> None:
    """Written as numbers and ranges, cut anywhere, they come back."""
    rng = np.random.default_rng(seed)
    expected = sorted(rng.choice(256, rng.integers(1, 200), replace=False).tolist())
    parts: list[list[int]] = []
    for value in expected:
        if parts and parts[-1][-1] == value - 1 and rng.random() < 0.8:
            parts[-1].append(value)
        else:
            parts.append([value])
    text = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    assert value_list(text) == expected


@pytest.mark.parametrize("ignored", [[255], [0, 255], [0], [3, 5], []])
def test_values_without_a_list_are_those_not_ignored(ignored: list[int]) -> None:
    dataset = Dataset.model_validate(DATASET | {"ignore_index": ignored})
    assert dataset.value_of_class(None) == [value for value in range(8) if value not in ignored][:4]
    assert dataset.value_of_class("7-10") == [7, 8, 9, 10]


def test_values_of_masks_go_before_the_datasets() -> None:
    dataset = Dataset.model_validate(DATASET | {"values": "1-4"})
    assert dataset.value_of_class(None) == [1, 2, 3, 4] and dataset.value_of_class("0, 2, 4, 6") == [0, 2, 4, 6]
    both = {
        "train": SPLITS["train"] | {"masks": {"files": "{id}", "values": "0-3"}}
    }  # 0 is a class in these files only
    assert Dataset.model_validate(DATASET | {"values": "1-4", "ignore_index": 0, "splits": both})


def split_of(**changes: Any) -> Split:
    return Split.model_validate(SPLITS["train"] | changes)


def test_short_forms() -> None:
    """One mask pattern, one list, one prompt or one ignored value need no brackets."""
    pattern = Masks(files="m/{id}.png")
    assert split_of() == split_of(masks=["m/{id}.png"]) == split_of(masks=[{"files": "m/{id}.png"}])
    assert split_of(masks={"files": "m/{id}.png"}) == Split(images="i/{id}.jpg", masks=(pattern,))
    both = split_of(masks=["m/{id}.png", {"files": "n/{id}.png", "values": "1-4"}])
    assert both.masks == (pattern, Masks(files="n/{id}.png", values="1-4"))
    assert split_of(ids="a.txt") == split_of(ids=["a.txt"]) and split_of(ids=["a", "b"]).ids == ("a", "b")
    short = Dataset.model_validate(DATASET | {"ignore_index": 7, "prompts": {"a": "one", "b": ["two", "three"]}})
    assert short.ignore_index == (7,) and short.prompts == {"a": ("one",), "b": ("two", "three")}
    assert short.channels == [(0, ("one",)), (1, ("two", "three")), (2, ("c",)), (3, ("d",))]
    assert short.root == "tiny" and Dataset.model_validate(DATASET | {"root": "a/b"}).root == "a/b"


def test_a_class_that_is_any_of_several_words() -> None:
    """A channel for each word, beside classes of one; as text and back."""
    prompts = {"a": ["x", "y"], "b": {"any": ["wall", "sky"]}, "d": {"any": ["d"]}}
    dataset = Dataset.model_validate(DATASET | {"unseen": ["b"], "prompts": prompts})
    assert dataset.channels == [(0, ("x", "y")), (1, ("wall",)), (1, ("sky",)), (2, ("c",)), (3, ("d",))]
    assert dataset.class_of_channel == (0, 1, 1, 2, 3) and dataset.seen_channels == [0, 3, 4]
    assert dataset.words == ["a", "wall", "sky", "c", "d"]
    assert Dataset.model_validate(dataset.model_dump(mode="json")) == dataset


def test_unseen_by_the_name_of_a_split() -> None:
    named = {"few": ["c"], "more": ["a", "d"]}
    for name, names in named.items():
        dataset = Dataset.model_validate(DATASET | {"unseen": name, "unseen_splits": named})
        assert dataset == Dataset.model_validate(DATASET | {"unseen": names, "unseen_splits": named})
        assert Dataset.model_validate(as_settings(dataset)) == dataset


def test_a_training_without_losses_is_refused() -> None:
    off = {"global": False, "local": False, "nel": False, "ce": False}
    assert Loss.model_validate(off).bce
    with pytest.raises(ValidationError, match="turn at least one on"):
        Loss.model_validate({**off, "bce": False})
