"""Where a setting comes from, and what is said of one that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.errors import UserError
from configs.load import as_settings, dataset_settings, known_datasets, named_dataset, resolve
from configs.schema import CONFIGS, Config, Loss, PseudoLabels, Train
from tests.configs.test_schema import DATASET

EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("name.yaml", content) -> its path; content is settings, text or bytes."""

    def to_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        text = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to_file


@pytest.fixture
def tiny(write: Write) -> str:
    """A dataset's YAML file; no experiment has its name."""
    return str(write("tiny.yaml", DATASET))


def refusal(**flags: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(**flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", known_datasets())
def test_every_dataset_resolves(name: str) -> None:
    config = resolve(dataset=name)
    assert config.dataset.name == name
    assert "val" in config.dataset.splits  # those for evaluation have no more
    assert config.train.validate_on in config.dataset.splits and config.evaluate.split in config.dataset.splits


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_resolves(path: Path) -> None:
    config = resolve(config=path)
    assert config.dataset.name == yaml.safe_load(path.read_text()).get("dataset", "scenes")
    if config.teacher.model.endswith(".json"):
        assert (CONFIGS / config.teacher.model).is_file()


def test_without_flags_it_is_the_demo() -> None:
    assert resolve() == resolve(dataset="scenes") == resolve(config=CONFIGS / "experiments" / "scenes.yaml")


def test_dataset_by_file(tiny: str, write: Write) -> None:
    """By --dataset, by an experiment's key `dataset`, or written into the experiment; the flag wins."""
    other = str(write("other.yml", DATASET | {"name": "other"}))
    assert resolve(dataset=tiny) == Config.model_validate({"dataset": DATASET})
    experiment = write("experiment.yaml", {"dataset": other, "loss": {"bank": 3}})
    assert resolve(config=experiment).dataset.name == "other"
    assert resolve(config=experiment).loss.bank == 3
    assert resolve(config=experiment, dataset=tiny) == resolve(dataset=tiny, assignments=["loss.bank=3"])
    written = write("written.yaml", {"dataset": DATASET})
    assert resolve(config=written) == resolve(dataset=tiny)
    assert resolve(config=written, dataset=other).dataset.name == "other"


def test_explicit_experiment_starts_from_the_papers_defaults(write: Write) -> None:
    """Of the dataset's default experiment nothing is left."""
    config = resolve(dataset="scenes", config=write("experiment.yaml", {"loss": {"bank": 3}}))
    expected = {"dataset": dataset_settings("scenes"), "loss": {"bank": 3}}
    assert config == Config.model_validate(expected) != resolve(dataset="scenes", assignments=["loss.bank=3"])


# Three values each: setting -> default, in an experiment, by --set.
LEVELS: dict[str, tuple[Any, Any, Any]] = {
    "views.count": (4, 2, 3),
    "pseudo_labels.lambda": (0.8, -0.5, 1.0),
    "pseudo_labels.windows": ((7, 3), (5,), (1, 2, 3)),
    "loss.bank": (24, 0, 7),
    "loss.global": (True, False, True),
    "loss.synthesizer": ("decoder", "mlp", "features"),
    "train.lr": (6e-5, 1.0, 1e-9),
    "train.iterations": (20_000, 1, 40_000),
    "evaluate.gamma": ("auto", "holdout", 1.5),
    "dataset.ignore_index": ((255,), (254,), (0, 77)),
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for path, value in values.items():
        section, key = path.split(".")
        settings.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    return settings


def found(config: Config) -> dict[str, Any]:
    settings = as_settings(config)
    values = {path: settings[path.split(".")[0]][path.split(".")[1]] for path in LEVELS}
    return {path: tuple(value) if isinstance(value, list) else value for path, value in values.items()}


def as_assignment(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"  # JSON is YAML, on one line


@pytest.mark.parametrize("seed", range(12))
def test_defaults_then_experiment_then_assignments(seed: int, tiny: str, write: Write) -> None:
    """Each level holds a random part of the settings; the last assignment of a setting counts.

    --dataset stands for all of an experiment's `dataset`.
    """
    rng = np.random.default_rng(seed)
    held = {path: rng.random(2) < 0.5 for path in LEVELS}
    experiment = {path: LEVELS[path][1] for path in LEVELS if held[path][0] and not path.startswith("dataset")}
    assigned = {path: LEVELS[path][2] for path in LEVELS if held[path][1]}
    overwritten = [as_assignment(path, LEVELS[path][0]) for path in assigned]
    assignments = [as_assignment(path, value) for path, value in assigned.items()]
    config = resolve(tiny, write("experiment.yaml", nested(experiment)), [*overwritten, *assignments])
    expected = {path: default for path, (default, _, _) in LEVELS.items()} | experiment | assigned
    assert found(config) == expected


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("train.lr=6e-4", "train", "lr", 6e-4),  # to YAML 1.1 this is text
        ("evaluate.gamma=auto", "evaluate", "gamma", "auto"),
        ("loss.global=no", "loss", "global", False),
        ("pseudo_labels.windows=[1]", "pseudo_labels", "windows", [1]),
        ("dataset.templates=['a = {}']", "dataset", "templates", ["a = {}"]),
        ("dataset.unseen=[]", "dataset", "unseen", []),
        ("dataset.ignore_index=0", "dataset", "ignore_index", [0]),
        ("dataset.prompts={a: one, b: [two, three]}", "dataset", "prompts", {"a": ["one"], "b": ["two", "three"]}),
    ],
)
def test_assignments(text: str, section: str, key: str, value: Any, tiny: str) -> None:
    assert as_settings(resolve(tiny, assignments=[text]))[section][key] == value


def cache_settings(**changes: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds of a cache of `scenes`: every setting of stage one."""
    settings = as_settings(resolve(dataset="scenes").stage_one)
    for section, values in changes.items():
        settings[section] |= values
    return settings


def test_the_cache_wins_over_the_datasets_default_experiment(write: Write) -> None:
    """And loses to an explicit --config and to --set."""
    default = resolve(dataset="scenes")
    base = cache_settings(views={"size": 48}, dataset={"unseen": ["circle"]}, pseudo_labels={"lambda": 0.1})
    before = str(base)
    config = resolve(base=base)
    assert as_settings(config.stage_one) == base
    assert config.train == default.train and config.student == default.student  # the rest is still the default's

    experiment = write("experiment.yaml", {"views": {"size": 80}, "loss": {"bank": 2}})
    explicit = resolve(config=experiment, base=base)
    assert (explicit.views.size, explicit.loss.bank, explicit.pseudo_labels.threshold) == (80, 2, 0.1)
    assert explicit.dataset.unseen == ("circle",) and explicit.train == Train()

    chosen = resolve(config=experiment, base=base, assignments=["views.size=96", "dataset.unseen=[star]"])
    assert chosen.views.size == 96 and chosen.dataset.unseen == ("star",)
    assert str(base) == before


def test_a_named_dataset_replaces_the_caches(tiny: str) -> None:
    config = resolve(dataset=tiny, base=cache_settings(views={"size": 48}))
    assert config.dataset == resolve(dataset=tiny).dataset and config.views.size == 48


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": {"foo": 1}}, "unknown setting loss.foo"),
        ({"dataset": "scenes"}, "setting dataset: Input should be a valid dictionary"),
        ({"dataset": None}, "setting dataset: Input should be a valid dictionary"),
    ],
)
def test_wrong_settings_of_a_run_or_cache_are_named_as_its(wrong: dict[str, Any], message: str) -> None:
    base = cache_settings() | wrong
    assert refusal(base=base, base_name="runs/one/config.yaml").startswith(f"runs/one/config.yaml: {message}")
    assert refusal(base=base, assignments=["loss.bank=3"]).startswith(f"settings of the run or cache: {message}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trian.iterations=3", "unknown setting trian; did you mean 'train'?"),
        ("iterations=3", "unknown setting iterations; did you mean 'train.iterations'?"),
        ("train.bank=3", "unknown setting train.bank; did you mean 'loss.bank'?"),
        ("zzz=3", "unknown setting zzz"),
        ("train.iteration=3", "unknown setting train.iteration; did you mean 'train.iterations'?"),
        ("dataset.unsen=[a]", "unknown setting dataset.unsen; did you mean 'dataset.unseen'?"),
        ("pseudo_labels.lamda=0.3", "unknown setting pseudo_labels.lamda; did you mean 'pseudo_labels.lambda'?"),
        ("loss.global_=no", "unknown setting loss.global_; did you mean 'loss.global'?"),
        ("train.q=3", "unknown setting train.q"),
        ("train..x=3", "unknown setting train."),
        ("1=2", "unknown setting 1"),
    ],
)
def test_misspelt_setting(assignment: str, message: str, tiny: str) -> None:
    assert refusal(dataset=tiny, assignments=[assignment]) == f"--set {assignment}: {message}"


def test_misspelt_setting_in_a_file(tiny: str, write: Write) -> None:
    path = write("experiment.yaml", {"train": {"lrr": 3}})
    assert refusal(dataset=tiny, config=path) == f"{path}: unknown setting train.lrr; did you mean 'train.lr'?"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.iterations", "0"), ("train.iterations", "1.5"), ("train.iterations", "many"), ("train.iterations", ""),
        ("train.iterations", "[3]"), ("train.lr", "0"), ("train.lr", "-.inf"), ("train.seed", "-1"),
        ("train.weight_decay", "-0.1"), ("train.workers", "-1"), ("loss.tau", "0"), ("loss.tau", ".nan"),
        ("loss.bank", "-1"), ("loss.glm", "maxx"), ("loss.ce", "maybe"), ("loss.label_stride", "0"),
        ("pseudo_labels.lambda", "1.01"), ("pseudo_labels.lambda", "-2"), ("pseudo_labels.windows", "[]"),
        ("pseudo_labels.windows", "[3, 0]"), ("pseudo_labels.windows", "3"), ("views.count", "0"),
        ("views.crop", "both"), ("views.ratio", "[0, 1]"), ("views.ratio", "2"), ("views.size", "big"),
        ("teacher.dense", "maskclap"), ("teacher.model", "7"), ("storage.dense_tokens", "float32"),
        ("storage.dense_tokens", "pca-0"), ("storage.dense_tokens", "pca-"), ("storage.dense_tokens", "pca-6.5"),
        ("storage.dense_tokens", "pca--6"), ("storage.dense_tokens", "8"),
        ("student.channels", "0"), ("train", "5"),
        ("dataset", "voc"), ("dataset.classes", "a"), ("evaluate.gamma", "high"), ("evaluate.split", "[val]"),
    ],
)  # fmt: skip
def test_wrong_value_names_the_setting(setting: str, value: str, tiny: str) -> None:
    message = refusal(dataset=tiny, assignments=[f"{setting}={value}"])
    assert message.startswith(f"--set {setting}={value}: setting {setting}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("evaluate.gamma=abc", "Input should be a valid number, or 'auto' or 'holdout' (it is 'abc')"),
        (
            "evaluate.gamma=atuo",
            "Input should be a valid number, or 'auto' or 'holdout' (it is 'atuo'); did you mean 'auto'?",
        ),
        ("evaluate.gamma=[1]", "Input should be a valid number, or 'auto' or 'holdout'"),
        (
            "dataset.templates=zegclap",
            "Input should be 'single', 'zegclip' or 'imagenet', or a list (it is 'zegclap'); did you mean 'zegclip'?",
        ),
        ("dataset.templates=[1, 2]", "Input should be 'single', 'zegclip' or 'imagenet', or a valid string"),
        (
            "loss.glm=maxx",
            "Input should be 'attention', 'max', 'mean' or 'selective' (it is 'maxx'); did you mean 'max'?",
        ),
    ],
)
def test_all_that_a_setting_may_be_is_said(assignment: str, message: str, tiny: str) -> None:
    key = assignment.partition("=")[0]
    assert refusal(dataset=tiny, assignments=[assignment]) == f"--set {assignment}: setting {key}: {message}"


def test_the_source_of_a_wrong_value_is_named(tiny: str, write: Write) -> None:
    path = write("experiment.yaml", {"loss": {"tau": -1}})
    assert refusal(dataset=tiny, config=path).startswith(f"{path}: setting loss.tau: ")
    assert "(it is -1)" in refusal(dataset=tiny, config=path)
    default = CONFIGS / "experiments" / "scenes.yaml"
    assert refusal(assignments=["loss.tau=-1"]).startswith(f"{default} + --set loss.tau=-1: setting loss.tau: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views.count": 2, "views.crop": "whole"}, "views.crop whole gives only one view: set views.count to 1, or"),
        ({"views.ratio": [2, 0.5]}, "views.ratio must be [minimum, maximum]"),
    ],
)
def test_views_that_contradict_each_other(settings: dict[str, Any], message: str, tiny: str) -> None:
    assignments = [as_assignment(path, value) for path, value in settings.items()]
    assert f"setting views: {message}" in refusal(dataset=tiny, assignments=assignments)


def test_the_datasets_file_is_named(write: Write) -> None:
    path = write("broken.yaml", DATASET | {"classses": 3})
    assert refusal(dataset=str(path)) == f"{path}: unknown setting classses; did you mean 'classes'?"


@pytest.mark.parametrize("key", ["name", "splits", "classes"])
def test_missing_setting(key: str, write: Write) -> None:
    path = write("part.yaml", {name: value for name, value in DATASET.items() if name != key})
    assert refusal(dataset=str(path)) == f"{path}: setting {key} is missing"


def test_settings_that_may_be_missing(write: Write) -> None:
    needed = {name: DATASET[name] for name in ("name", "splits", "classes")}
    dataset = resolve(dataset=str(write("least.yaml", needed))).dataset
    assert dataset.root == dataset.name and dataset.seen_indices == [0, 1, 2, 3] and dataset.ignore_index == (255,)


@pytest.mark.parametrize("assignment", ["", "train.lr", "=3", "train.lr: 3"])
def test_assignment_without_key_or_value(assignment: str, tiny: str) -> None:
    assert refusal(dataset=tiny, assignments=[assignment]) == f"--set {assignment}: write it as key.path=value"


@pytest.mark.parametrize("value", ["[1", "{a: ]", "'"])
def test_assignment_of_no_yaml_value(value: str, tiny: str) -> None:
    assert refusal(dataset=tiny, assignments=[f"train.lr={value}"]).endswith(f"{value!r} is not a YAML value")


BROKEN: dict[str, str | bytes] = {
    "unclosed": "train: {lr: 3\nloss: [",
    "indentation": "train:\n  lr: 3\n iterations: 4",
    "control": "train: \x01",
    "not text": b"\xff\xfe\x00a",
    "two documents": "train: {}\n---\nloss: {}",
    "code": "train: !!python/object/apply:os.system [exit 1]",
}


@pytest.mark.parametrize("content", [*BROKEN.values(), "train: 2020-13-45"])
@pytest.mark.parametrize("flag", ["config", "dataset"])
def test_invalid_yaml(content: str | bytes, flag: str, write: Write) -> None:
    path = write("broken.yaml", content)
    message = refusal(**{flag: path if flag == "config" else str(path)})
    assert message.startswith(f"{path} is not valid YAML") and message.endswith(": correct it")


def test_invalid_yaml_names_the_line(write: Write) -> None:
    assert " near line 3 (" in refusal(config=write("broken.yaml", "train: {}\nloss: {}\nviews: }\n"))


@pytest.mark.parametrize(("content", "kind"), [("- train", "list"), ("train", "str"), ("3", "int"), ("[]", "list")])
@pytest.mark.parametrize("flag", ["config", "dataset"])
def test_yaml_without_settings(content: str, kind: str, flag: str, write: Write) -> None:
    path = write("other.yaml", content)
    message = refusal(**{flag: path if flag == "config" else str(path)})
    assert message == f"{path} must contain settings (key: value), not a {kind}"


@pytest.mark.parametrize("content", ["", "\n# nothing\n", "{}", "dataset: scenes"])
def test_an_empty_experiment_changes_nothing(content: str, write: Write) -> None:
    config = resolve(config=write("empty.yaml", content))
    assert config.dataset.name == "scenes" and config.loss == Loss() and config.pseudo_labels == PseudoLabels()


@pytest.mark.parametrize("content", ["1: 2", "on: 3", "train: {1: 2}", "train:", "train: &a {b: *a}"])
def test_strange_keys_and_values(content: str, write: Write) -> None:
    path = write("strange.yaml", content)
    assert refusal(config=path).startswith(f"{path}: ")


@pytest.mark.parametrize("flag", ["config", "dataset"])
def test_unreadable_file(flag: str, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert refusal(**{flag: missing if flag == "config" else str(missing)}).startswith(f"cannot read {missing}: ")
    (tmp_path / "folder.yaml").mkdir()
    folder = tmp_path / "folder.yaml"
    assert refusal(**{flag: folder if flag == "config" else str(folder)}).startswith(f"cannot read {folder}: ")


@pytest.mark.parametrize(("name", "hint"), [("scenss", "; did you mean 'scenes'?"), ("qqq", ""), ("", "")])
def test_unknown_dataset(name: str, hint: str, write: Write) -> None:
    expected = f"unknown dataset {name!r}{hint} (known: {', '.join(known_datasets())}, or give a YAML file)"
    with pytest.raises(UserError) as error:
        dataset_settings(name)
    assert str(error.value) == expected
    if name:
        assert refusal(dataset=name) == expected
        assert refusal(config=write("experiment.yaml", {"dataset": name})) == expected


def test_a_key_that_stands_twice(write: Write) -> None:
    path = write("twice.yaml", "loss: {bank: 3}\ntrain: {lr: 1}\nloss: {tau: 1}\n")
    line = refusal(config=path)
    assert "twice.yaml" in line and "'loss' stands twice" in line


def test_an_experiment_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that the README gives it; a file of that name here comes first."""
    monkeypatch.chdir(tmp_path)
    experiment = Path("configs/experiments/voc-segformer-b4.yaml")
    assert resolve(config=experiment).dataset.name == named_dataset(None, experiment) == "pascal-voc"
    (tmp_path / experiment).parent.mkdir(parents=True)
    (tmp_path / experiment).write_text("dataset: scenes\n")
    assert resolve(config=experiment).dataset.name == named_dataset(None, experiment) == "scenes"
    assert "cannot read configs/experiments/none.yaml" in refusal(config=Path("configs/experiments/none.yaml"))
