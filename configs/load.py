"""Resolves a configuration: defaults < experiment YAML < --runlocal < flags < `--set key.path=value`."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.dataset import WORD_KINDS, AnyOf, Dataset, Words
from configs.errors import UserError
from configs.schema import CONFIGS, Config

DEFAULT_DATASET = "scenes"
_Model = TypeVar("_Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML would silently use the last."""

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
        raise UserError(f"{path} must contain settings (key: value), not a {type(content).__name__}")
    return content


def _read_experiment(path: Path) -> dict[str, Any]:
    """Look in the working folder, then where clip-zss is installed, so configs/experiments/... works from anywhere."""
    installed = CONFIGS.parent / path
    return read_yaml(path if path.is_file() or not installed.is_file() else installed)


def suggest(word: str, known: Sequence[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """The end of a message about a misspelt word: the most similar known word, with `prefix` in front."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def known(folder: str) -> list[str]:
    """The names of the YAML files in configs/FOLDER, sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def known_datasets() -> list[str]:
    return known("datasets")


def find_yaml(kind: str, folder: str, name_or_file: str) -> Path:
    """A file in configs/FOLDER, by its name, or any YAML file, by its path. UserError if the name is unknown."""
    names = known(folder)
    if name_or_file in names:
        return CONFIGS / folder / f"{name_or_file}.yaml"
    if name_or_file.endswith((".yaml", ".yml")):
        return Path(name_or_file)
    hint = suggest(name_or_file, names)
    raise UserError(f"unknown {kind} {name_or_file!r}{hint} (known: {', '.join(names)}, or give a YAML file)")


def dataset_settings(name_or_file: str) -> dict[str, Any]:
    """A validated dataset YAML, by its name in configs/datasets or its path; files in it are relative to it."""
    path = find_yaml("dataset", "datasets", name_or_file)
    settings = read_yaml(path)
    if isinstance(settings.get("classes"), str):
        settings["classes"] = _read_names(path.parent / settings["classes"])
    if isinstance(settings.get("text_features"), str):
        settings["text_features"] = str(path.parent / settings["text_features"])
    validate(Dataset, settings, str(path))
    return settings


def _read_names(path: Path) -> list[str]:
    """One class name per line; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the class names in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the class names in {path} are not UTF-8 text: save the file as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge nested settings; `top` overrides `base`."""
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


Location = tuple[int | str, ...]


def _walk(model: Any, location: Location) -> tuple[Location, Any]:
    """`location` as far as it is fields, keys and indices below `model`, and the type there.

    Where pydantic tries the members of a union, it adds their names to the location.
    """
    for depth, part in enumerate(location):
        if model is Words:
            model = AnyOf if part == "any" else tuple[str, ...]
        kind = get_origin(model)
        if kind is dict or (kind is tuple and isinstance(part, int)):
            model = next(inner for inner in reversed(get_args(model)) if inner is not Ellipsis)
            continue
        field = next((f for n, f in getattr(model, "model_fields", {}).items() if part in (n, f.alias)), None)
        if field is None:
            return location[:depth], model
        model = field.annotation
    return location, AnyOf if model is Words else model  # where the words are a dictionary


def _names(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _paths(section: type[BaseModel]) -> Iterator[str]:
    """Every setting in the section, as `--set` takes it."""
    for name, field in zip(_names(section), section.model_fields.values(), strict=True):
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{below}" for below in _paths(field.annotation))
        else:
            yield name


def _explain(model: Any, errors: list[ErrorDetails]) -> str:
    """Explain the first error: the setting, what is wrong, and the allowed values."""
    for error in errors:
        error["loc"] = tuple(part for part in error["loc"] if part not in WORD_KINDS)
    first = errors[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        above, word = first["loc"][:-1], str(first["loc"][-1])
        elsewhere = [path for path in _paths(model) if path.rpartition(".")[2] == word]
        names = _names(_walk(model, above)[1])
        hint = suggest(word, elsewhere, cutoff=0) or suggest(word, names, "".join(f"{part}." for part in above))
        return f"unknown setting {key}{hint}"
    if first["type"] == "missing":
        return f"setting {key} is missing"
    location, _ = _walk(model, first["loc"])
    tried = [error for error in errors if _walk(model, error["loc"])[0] == location]  # every member of a union
    message, *others = dict.fromkeys(error["msg"].partition(", unable to")[0] for error in tried)
    message = message.removeprefix("Value error, ") + "".join(
        f", or {other.removeprefix('Input should be ')}" for other in others
    )
    message = message.replace("a valid tuple", "a list")
    if first["type"] == "string_type" and not isinstance(first["input"], list | tuple | dict):
        kind = {bool: "yes, no, true or false", int: "a number", float: "a number", type(None): "nothing"}
        message = f"YAML reads this as {kind.get(type(first['input']), 'a date')}, not as text: put it in quotes"
    if isinstance(value := first["input"], str | int | float):
        words = re.findall("'(.*?)'", " ".join(error.get("ctx", {}).get("expected", "") for error in tried))
        message += f" (it is {value!r}){suggest(str(value), words)}"
    return f"setting {'.'.join(map(str, location))}: {message}" if location else message


def validate(model: type[_Model], settings: dict[str, Any], source: str) -> _Model:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(model, error.errors())}") from error


def resolve(
    dataset: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] = (),
    base: dict[str, Any] | None = None,
    runlocal: bool = False,
    base_name: str = "settings of the run or cache",
) -> Config:
    """Resolve the configuration from the command-line options.

    Args:
        dataset: name or YAML file (`--dataset`).
        config: experiment YAML (`--config`); without it, configs/experiments/<dataset>.yaml if it exists.
        assignments: `key.path=value` texts (`--set`), applied last.
        base: settings to start from, such as those of a cache or run.
        runlocal: apply configs/runlocal.yaml on top of the experiment.
        base_name: the name of `base` in errors.

    Raises:
        UserError: unknown names, unreadable files, misspelt keys, values out of range.
    """
    settings: dict[str, Any] = dict(base or {})
    if base:
        validate(Config, base, base_name)
    experiment = _read_experiment(config) if config else {}
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
    """The dataset's name from `--dataset` or the experiment; None if neither names one."""
    chosen = dataset or (_read_experiment(config).get("dataset") if config else None)
    if chosen is None:
        return None
    settings = chosen if isinstance(chosen, dict) else dataset_settings(str(chosen))
    return str(settings.get("name"))


def as_settings(section: BaseModel) -> dict[str, Any]:
    """Plain JSON values under the names that YAML files use."""
    return section.model_dump(mode="json", by_alias=True)
