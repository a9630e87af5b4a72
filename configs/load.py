"""Resolves a configuration: defaults < experiment YAML < --runlocal < flags < `--set key.path=value`."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.dataset import Dataset
from configs.errors import UserError
from configs.schema import CONFIGS, Config

DEFAULT_DATASET = "scenes"
_Model = TypeVar("_Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" near line {line + 1}"
        problem = getattr(error, "problem", None)
        reason = f" ({problem})" if problem else ""
        raise UserError(f"{path} is not valid YAML{where}{reason}: correct it") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings (key: value), not a {type(content).__name__}")
    return content


def suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def known_datasets() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "datasets").glob("*.yaml"))


def dataset_settings(name_or_file: str) -> dict[str, Any]:
    """A dataset's YAML, checked, by its name in configs/datasets or by its file; files it names lie beside it."""
    names = known_datasets()
    if name_or_file not in names and not name_or_file.endswith((".yaml", ".yml")):
        hint = suggest(name_or_file, names)
        raise UserError(f"unknown dataset {name_or_file!r}{hint}; known: {', '.join(names)}, or give a YAML file")
    path = CONFIGS / "datasets" / f"{name_or_file}.yaml" if name_or_file in names else Path(name_or_file)
    settings = read_yaml(path)
    if isinstance(settings.get("classes"), str):
        settings["classes"] = _read_names(path.parent / settings["classes"])
    if isinstance(settings.get("text_features"), str):
        settings["text_features"] = str(path.parent / settings["text_features"])
    validate(Dataset, settings, str(path))
    return settings


def _read_names(path: Path) -> list[str]:
    """One class name a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the class names in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the class names in {path} are no UTF-8 text: save them as such") from error
    return [line.strip() for line in lines if line.strip()]


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `top` over those of `base`."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _assignment(text: str) -> dict[str, Any]:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise UserError(f"--set {text}: write it as key.path=value")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {text}: {value!r} is not a YAML value") from error
    for key in reversed(path.split(".")):
        nested = {key: nested}
    assert isinstance(nested, dict)
    return nested


def _section_keys(model: Any, path: Sequence[str]) -> list[str]:
    """The keys that the section at `path` below `model` takes."""
    for part in path:
        if get_origin(model) in (dict, tuple):  # the part is a key or an index
            model = next(kind for kind in reversed(get_args(model)) if kind is not Ellipsis)
            continue
        field = next((f for n, f in getattr(model, "model_fields", {}).items() if part in (n, f.alias)), None)
        if field is None:
            return []
        model = field.annotation
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]


def validate(model: type[_Model], settings: dict[str, Any], source: str) -> _Model:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        key = ".".join(location)
        if first["type"] == "extra_forbidden":
            hint = suggest(location[-1], _section_keys(model, location[:-1]))
            raise UserError(f"{source}: unknown setting {key}{hint}") from error
        if first["type"] == "missing":
            raise UserError(f"{source}: setting {key} is missing") from error
        value = first["input"]
        shown = f" (it is {value!r})" if isinstance(value, (str, int, float, bool)) else ""
        message = first["msg"].removeprefix("Value error, ")
        where = f"setting {key}: " if key else ""
        raise UserError(f"{source}: {where}{message}{shown}") from error


def resolve(
    dataset: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] = (),
    base: dict[str, Any] | None = None,
    runlocal: bool = False,
) -> Config:
    """The configuration that the flags ask for.

    Args:
        dataset: name or YAML file (`--dataset`).
        config: experiment YAML (`--config`); without it, configs/experiments/<dataset>.yaml where there is one.
        assignments: `key.path=value` texts (`--set`), applied last.
        base: settings to start from: those of the cache or run at hand.
        runlocal: lay configs/runlocal.yaml over the experiment.

    Raises:
        UserError: unknown names, unreadable files, misspelt keys, values out of range.
    """
    settings: dict[str, Any] = dict(base or {})
    experiment = read_yaml(config) if config else {}
    chosen = dataset or experiment.pop("dataset", None)
    experiment.pop("dataset", None)
    if isinstance(chosen, dict):
        settings["dataset"] = chosen
    elif chosen is not None or "dataset" not in settings:
        settings["dataset"] = dataset_settings(str(chosen or DEFAULT_DATASET))
    sources = [str(config)] if config else []
    name = settings["dataset"].get("name")
    default = CONFIGS / "experiments" / f"{name}.yaml"
    if config is None and default.is_file():
        experiment = read_yaml(default)
        experiment.pop("dataset", None)
        sources.append(str(default))
        if base:  # what the cache or the run holds wins over the dataset's default experiment
            experiment = merge(experiment, settings)
    settings = merge(settings, experiment)
    if runlocal:
        settings = merge(settings, read_yaml(CONFIGS / "runlocal.yaml"))
    for text in assignments:
        settings = merge(settings, _assignment(text))
    sources += [f"--set {text}" for text in assignments]
    return validate(Config, settings, " + ".join(sources) or "settings")


def named_dataset(dataset: str | None, config: Path | None) -> str | None:
    """The name of the dataset that `--dataset`, or else the experiment, asks for; None where neither names one."""
    chosen = dataset or (read_yaml(config).get("dataset") if config else None)
    if chosen is None:
        return None
    settings = chosen if isinstance(chosen, dict) else dataset_settings(str(chosen))
    return str(settings.get("name"))


def as_settings(section: BaseModel) -> dict[str, Any]:
    """Plain JSON values under the names that YAML files use."""
    return section.model_dump(mode="json", by_alias=True)
