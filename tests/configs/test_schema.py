"""The defaults are the paper's, and a dataset that contradicts itself is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.load import as_settings
from configs.schema import Config, Dataset

SPLITS = {"train": {"images": "i/{id}.jpg", "masks": "m/{id}.png"}}
DATASET = {"name": "tiny", "root": "tiny", "splits": SPLITS, "classes": ["a", "b", "c", "d"], "unseen": ["d", "b"]}

PAPER = {
    "teacher": {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "dense": "clearclip"},
    "views": {"size": 512},
    "pseudo_labels": {"windows": [7, 3], "lambda": 0.8},
    "precompute": {"batch_size": 16},
    "loss": {
        "bank": 24, "tau": 0.07, "beta": 2, "glm": "attention", "synthesizer": "decoder",
        "global": True, "nel": True, "ce": True, "bce": True,
    },
    "train": {
        "iterations": 20_000, "batch_size": 16, "lr": 6e-5, "head_lr_factor": 10, "weight_decay": 0.01, "warmup": 1500,
    },
    "evaluate": {"gamma": 0},
}  # fmt: skip


def test_defaults_are_the_papers() -> None:
    settings = as_settings(Config.model_validate({"dataset": DATASET}))
    for section, values in PAPER.items():
        assert {key: settings[section][key] for key in values} == values


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
    assert (dataset.seen_indices, dataset.unseen_indices, dataset.seen) == ([0, 2], [1, 3], ["a", "c"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b", "a", "d"]}, "classes holds a name twice"),
        ({"unseen": ["b", "e", "f"]}, "unseen names no class of the dataset: e, f"),
        ({"unseen": ["a", "b", "c", "d"]}, "at least one class must be seen"),
        ({"classes": [], "unseen": []}, "at least one class must be seen"),
        ({"templates": ["a {}.", "a photo"]}, "every template must contain {}"),
        ({"splits": {"train": {"images": "i/*.jpg", "masks": "m/{id}.png"}}}, "images and masks must contain {id}"),
        ({"splits": {"train": {"images": "i/{id}.jpg", "masks": "m/mask.png"}}}, "images and masks must contain {id}"),
        ({"splits": {"train": {"images": "i/{id}.jpg"}}}, "Field required"),
        ({"generator": "shapes"}, "Input should be 'scenes'"),
        ({"ignore_index": "none"}, "valid integer"),
    ],
)
def test_inconsistent_dataset(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Dataset.model_validate(DATASET | changes)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"unseen": []}, {"unseen": ["a", "b", "d"]}, {"ignore_index": 0}])
def test_consistent_dataset(changes: dict[str, Any]) -> None:
    dataset = Dataset.model_validate(DATASET | changes)
    assert sorted(dataset.seen_indices + dataset.unseen_indices) == [0, 1, 2, 3]


@pytest.mark.parametrize("classes", [256, 300])
def test_more_classes_than_a_mask_can_hold(classes: int) -> None:
    with pytest.raises(ValidationError):
        Dataset.model_validate(DATASET | {"classes": [str(i) for i in range(classes)], "unseen": []})
