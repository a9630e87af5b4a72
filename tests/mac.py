"""A Mac's GPU played on the CPU: device `mps`, which computes nothing in float64 and mixes with nothing on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")


class OnMac(Tensor):
    """What says that it is on `mps`; `inside` is its content, on the CPU."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "OnMac":
        assert inside.dtype != torch.float64, "Cannot convert a MPS Tensor to float64 dtype"
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inside.size(), inside.stride(), inside.storage_offset(), dtype=inside.dtype, device=MPS
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        return compute(function, inputs, options or {})


def compute(function: Callable[..., Any], inputs: Any, options: dict[str, Any]) -> Any:
    """On the CPU; the result is on the Mac if the arguments are, or `device` says so."""
    tensors = [value for value in tree_flatten((inputs, options))[0] if isinstance(value, Tensor)]
    there = any(isinstance(tensor, OnMac) for tensor in tensors)
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not copies:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnMac) and tensor.ndim]
        assert not strangers, f"{function}: tensors on mps and cpu"
    asked = options.get("device")
    if asked is not None:
        there, options = torch.device(asked).type == "mps", {**options, "device": CPU}
    plain = tree_map(lambda value: value.inside if isinstance(value, OnMac) else value, (inputs, options))
    found = function(*plain[0], **plain[1])
    if function in IN_PLACE or getattr(function, "_schema", None) and function._schema.is_mutable and found is plain[0][0]:
        return inputs[0]
    return tree_map(lambda value: OnMac(value) if there and isinstance(value, Tensor) else value, found)


IN_PLACE = ()


class Mac(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch would ask for the device itself
    def __torch_dispatch__(self, function: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        return compute(function, inputs, options or {})
