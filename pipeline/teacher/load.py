"""Finds, checks and loads the teacher's model: by open_clip's names, from local files or from the Hugging Face hub.

No weights file can run code: safetensors, state dicts read with torch's `weights_only`, and TorchScript archives, which
torch's own interpreter reads.
"""

import hashlib
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.openai import load_openai_model
from torch import Tensor

from configs.errors import UserError, reason
from configs.schema import CONFIGS, Teacher
from pipeline.hub import HUB

Tokenizer = Callable[[list[str]], Tensor]  # texts -> token ids (n, context length)


class Loaded(NamedTuple):
    """An open_clip model in fp32 on the CPU.

    Attributes:
        width: C, width of the joint embedding.
        tokenizer: makes the model's tokenizer, which may need files from the hub. UserError if it cannot.
    """

    model: Any
    width: int
    tokenizer: Callable[[], Tokenizer]


def load(config: Teacher) -> Loaded:
    """The model at its native image size, with the weights that `config` names.

    Raises:
        UserError: unknown model or weights; weights that do not fit, cannot be had or were trained with another
            activation; files that cannot be read.
    """
    name, architecture = _architecture(config)
    if config.pretrained == "none":
        model = _random(config, name)
    elif name.startswith(HUB):
        model = _from_hub(config)
    else:
        model = _from_file(config, name, architecture)

    def tokenizer() -> Tokenizer:
        try:
            return open_clip.get_tokenizer(name, context_length=architecture["text_cfg"].get("context_length"))
        except Exception as error:  # transformers, the hub and the network each raise their own
            raise UserError(
                f"teacher.model {config.model}: its tokenizer cannot be loaded ({_reason(error)}): connect once, "
                "or set dataset.text_features to a .npy or .safetensors file"
            ) from error

    return Loaded(model, architecture["embed_dim"], tokenizer)


def weights_fingerprint(config: Teacher) -> dict[str, str]:
    """The teacher's part of a cache's fingerprint: sha256 of local files, names of everything else."""
    model = file_digest(_located(config.model)) if config.model.endswith(".json") else config.model
    if config.pretrained == "none":
        return {"model": model, "pretrained": "none: random weights, seed 0"}
    file = None if _is_tag(config) else _located(config.pretrained)
    return {"model": model, "pretrained": file_digest(file) if file and file.is_file() else config.pretrained}


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _located(name: str) -> Path:
    """A file named as given, or relative to configs/ (where the embedded teacher lives)."""
    path = Path(name)
    return path if path.is_file() else CONFIGS / name


def _reason(error: Exception) -> str:
    if "weights_only" in str(error):  # torch goes on to advise loading it unsafely
        return "it is no file of tensors alone"
    return reason(error)


def _is_tag(config: Teacher) -> bool:
    return not config.model.endswith(".json") and open_clip.is_pretrained_cfg(config.model, config.pretrained)


def _architecture(config: Teacher) -> tuple[str, dict[str, Any]]:
    """The name by which open_clip knows the model, and its config; a JSON file is made known."""
    name = config.model
    if name.endswith(".json"):
        path = _located(name)
        content = _read_json(path, name)
        open_clip.add_model_config(path)
        return path.stem, content
    if name.startswith(HUB):
        if config.pretrained not in ("hub", "none"):
            raise UserError(
                f"teacher.pretrained {config.pretrained!r}: a hub model includes its weights: "
                "set teacher.pretrained=hub"
            )
        try:
            return name, open_clip.get_model_config(name)
        except Exception as error:
            raise _unreachable(config, error) from error
    if name not in open_clip.list_models():
        raise UserError(
            f"unknown teacher.model {name!r}: give a name that open_clip lists (open_clip.list_models()), "
            "a JSON file, hf-hub:ORG/NAME, transformers, or the name of an installed plug-in"
        )
    return name, open_clip.get_model_config(name)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"teacher.model: cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"teacher.model: {name} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= content.keys():
        raise UserError(f"teacher.model: {name} is not an open_clip config with embed_dim, vision_cfg and text_cfg")
    return content


def _random(config: Teacher, name: str) -> Any:
    """The same weights in every process, and no trace in torch's generator."""
    print(
        f"warning: teacher.pretrained=none: the weights of teacher.model {config.model} are random (seed 0); "
        "this tries the pipeline, its results mean nothing",
        file=sys.stderr,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, force_preprocess_cfg=_normalisation(config)
            )
    except Exception as error:
        raise UserError(f"teacher.model {config.model} cannot be built: {_reason(error)}") from error


def _from_hub(config: Teacher) -> Any:
    try:
        return open_clip.create_model(config.model, require_pretrained=True)
    except Exception as error:
        raise _unreachable(config, error) from error


def _unreachable(config: Teacher, error: Exception) -> UserError:
    return UserError(
        f"teacher.model {config.model} is not in the Hugging Face cache and cannot be loaded from the hub "
        f"({_reason(error)}): connect once, or give a JSON config and a local file as teacher.model and .pretrained"
    )


def _from_file(config: Teacher, name: str, architecture: dict[str, Any]) -> Any:
    """Weights of a tag, downloaded or cached, or of a local file."""
    named = not config.model.endswith(".json")
    quick = bool(architecture.get("quick_gelu", False))
    if named:
        _refuse_other_activation(config, quick)
    file = _downloaded(config) if _is_tag(config) else _located(config.pretrained)
    if not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name) if named else []
        raise UserError(
            f"teacher.pretrained {config.pretrained!r} is neither a file nor a tag of {config.model} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    archive = _is_torchscript(file)
    if archive and not quick:
        existing = _twin(name) if _twin(name) in open_clip.list_models() else "ViT-B-16-quickgelu or the like"
        raise UserError(
            f"teacher.pretrained {config.pretrained} is an OpenAI archive, trained with QuickGELU, but "
            f"teacher.model {config.model} computes GELU: "
            + (f"use teacher.model={existing}" if named else 'set "quick_gelu": true in it')
        )
    try:
        if archive:
            return _from_openai_archive(file, architecture)
        return open_clip.create_model(name, pretrained=str(file), force_preprocess_cfg=_normalisation(config))
    except Exception as error:  # open_clip, torch and safetensors each raise their own
        raise UserError(
            f"teacher.pretrained {config.pretrained}: the weights cannot be loaded into {config.model}: "
            f"{_reason(error)}"
        ) from error


def _downloaded(config: Teacher) -> Path:
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(config.model, config.pretrained)))
    except Exception as error:
        raise UserError(
            f"teacher.pretrained {config.pretrained}: the weights of {config.model} cannot be downloaded "
            f"({_reason(error)}): connect once, or set teacher.pretrained to a local file of them"
        ) from error


def _twin(name: str) -> str:
    """The model of the other activation, whether or not there is one."""
    return name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else name + "-quickgelu"


def _refuse_other_activation(config: Teacher, quick: bool) -> None:
    """UserError, where open_clip would only warn and compute wrong features."""
    twin = _twin(config.model)
    if twin not in open_clip.list_models() or not open_clip.is_pretrained_cfg(twin, config.pretrained):
        return
    if bool(open_clip.get_pretrained_cfg(twin, config.pretrained).get("quick_gelu", False)) != quick:
        trained, computed = ("GELU", "QuickGELU") if quick else ("QuickGELU", "GELU")
        raise UserError(
            f"teacher.pretrained {config.pretrained} was trained with {trained}, but teacher.model {config.model} "
            f"computes {computed}: use teacher.model={twin}"
        )


def _normalisation(config: Teacher) -> dict[str, Any]:
    """Mean and std of the tag; for a local file, which holds none, those of most tags of the model.

    Nothing for JSON files and models without tags: open_clip's default is OpenAI's. Hub models bring their own.
    """
    if config.model.endswith(".json"):
        return {}
    tags = [config.pretrained] if _is_tag(config) else open_clip.list_pretrained_tags_by_model(config.model)
    found = Counter(
        (tag["mean"], tag["std"]) for tag in (open_clip.get_pretrained_cfg(config.model, tag) for tag in tags)
    )
    return dict(zip(("mean", "std"), found.most_common(1)[0][0], strict=True)) if found else {}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def _from_openai_archive(path: Path, architecture: dict[str, Any]) -> Any:
    """Load into the named architecture; open_clip's loader would guess one from the tensors' shapes."""
    state = load_openai_model(str(path), precision="fp32", device="cpu").state_dict()
    model = open_clip.CLIP(**architecture)
    model.load_state_dict(state)
    open_clip.set_model_preprocess_cfg(
        model, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    )
    return model
