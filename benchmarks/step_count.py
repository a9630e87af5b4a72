"""Bytes, operations and waits of one training step, counted on fake tensors: nothing is computed or timed.

    python -m benchmarks.step_count            # prints the right-hand columns of benchmarks/step_count.md

The step: K = 156 seen classes, 16 images of 512 x 512 with 6 groups each, R of 512 channels at stride 4, labels at
every pixel, all losses on, a single process, from R to R's gradient: what the student does is its own affair.

- bytes: each operation reads its inputs once and writes its outputs once. `gather` and the like read what they pick;
  composite operations count as the kernels that torch runs one after the other. Nothing is kept in a cache. Of Triton's
  kernels every argument is read or written once; see pixel_kernels.py.
- operations: those that start a kernel, so neither views nor allocations. Attention and dropout are one each, as on a
  GPU.
- waits: operations for which the host stops until a GPU has done all its work, because it needs a value or a size. What
  is computed on the CPU in any case (`layout`, `_centres`) is left out.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from configs.load import resolve
from configs.schema import Loss
from pipeline.learning import criterion as criterion_
from pipeline.learning import labels as labels_
from pipeline.learning import pixel_bands, pixel_kernels, pixel_loss
from pipeline.learning.criterion import Criterion
from pipeline.learning.pixel_loss import pixel_losses
from stages.train import learner as learner_
from stages.train.batches import Batch
from stages.train.learner import make_learner

SEEN, IMAGES, GROUPS, SIZE, STRIDE, WIDTH, GRID = 156, 16, 6, 512, 4, 512, 32
KERNELS = {"logsumexp": 6, "bincount": 2}  # passes over the input of what is one operation here and several kernels
PICK = {"gather", "index_select", "index", "embedding"}  # read as much as they write
ADD_AT = {"scatter_add_", "index_add_", "index_put_", "scatter_", "_index_put_impl_"}  # touch as much as they are given
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "device",
    "sym_size",
    "sym_stride",
    "sym_numel",
    "sym_storage_offset",
    "lift_fresh",
    "set_",
    "_unsafe_view",
    "promote_types",
    "_record_function_enter_new",
    "_record_function_exit",
}
WAITS = {"nonzero", "bincount", "_unique2", "_local_scalar_dense", "masked_select", "is_nonzero", "equal"}
HOST = {"cpu", "tolist", "numpy"}  # methods that fetch a tensor; on a CPU the dispatcher does not see them

ORDER = ("seen", "cls_token", "groups", "image_ids", "region_tokens")


class Finished(Exception):
    """The optimiser's step is reached."""


class Count(TorchDispatchMode):
    """Counts what runs in the block, from `reset` on.

    Attributes:
        held, base, most: bytes of all tensors that were made in the block and still exist; at `reset`; the most since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.reset()

    def reset(self) -> None:
        self.bytes = self.operations = 0
        self.base = self.most = self.held
        self.waits: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            if (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.held)
        if name in WAITS or (name.startswith("index") and any(i.dtype in (torch.bool, torch.uint8) for i in inputs[1:])
                             and name in ("index", "index_put_", "_index_put_impl_")):  # fmt: skip
            self.waits[name] += 1
        if name in FREE or func.is_view:
            return out
        moved = _moved(name, inputs, outputs)
        self.operations += 1
        self.bytes += moved
        self.largest[name] += moved
        return out

    def _free(self, size: int) -> None:
        self.held -= size


class Fetched(TorchFunctionMode):
    """Counts the methods that bring a tensor to the host."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in HOST and isinstance(args[0], Tensor):
            self.count.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Kernel:
    """In place of one of Triton's: only counts."""

    def __init__(self, count: Count, name: str) -> None:
        self.count, self.name = count, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*args: Any, **options: Any) -> None:
            moved = sum(_bytes(a) for a in args if isinstance(a, Tensor))
            self.count.operations += 1
            self.count.bytes += moved
            self.count.largest[self.name] += moved

        return start


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    def quietly(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return quietly


def attention(q: Tensor, k: Tensor, v: Tensor, mask: None = None, dropout_p: float = 0.0) -> Tensor:
    """The kernel that torch chooses on a GPU in float32."""
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p)[0]
    return found


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """As on a GPU."""
    found: Tensor = torch.ops.aten.native_dropout(x, p, training)[0]
    return found


def faked(module: nn.Module, device: str = "cpu") -> nn.Module:
    """With fake parameters.

    A module cannot be made with them: nn.TransformerDecoder copies its layers, and copies of fake tensors end the
    process later, with a segmentation fault.
    """
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return module._apply(lambda tensor: torch.empty_like(tensor, device=device))


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    different = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in inputs}.values()
    written = sum(_bytes(t) for t in outputs)
    if name in PICK:
        return sum(_bytes(t) for t in inputs[1:]) + 2 * written
    if name in ADD_AT:
        given = inputs[-1] if inputs[-1].numel() > 1 else inputs[1]
        return sum(_bytes(t) for t in inputs[1:]) + 2 * given.numel() * inputs[0].element_size()
    if name in ("scatter_add", "index_add"):  # on a copy
        return 2 * _bytes(inputs[0]) + sum(_bytes(t) for t in inputs[1:]) + 2 * _bytes(inputs[-1])
    if name in ("zero_", "fill_", "zeros", "new_zeros", "zeros_like", "ones", "full", "arange", "full_like"):
        return written
    return KERNELS.get(name, 1) * sum(_bytes(t) for t in different) + written


def batch() -> dict[str, Tensor]:
    """The criterion's arguments: blobs of seen classes, and a third of the tokens in groups."""
    torch.manual_seed(0)
    free = torch.rand(IMAGES, 1, 8, 8) < 0.33
    free[:, :, 0, :GROUPS] = True
    classes = torch.randint(0, SEEN, (IMAGES, 1, 8, 8)).double().masked_fill(free, 255)
    seen = nn.functional.interpolate(classes, SIZE)[:, 0].to(torch.uint8)
    numbers = torch.randint(0, GROUPS, (IMAGES, 1, 8, 8)).double()
    numbers[:, 0, 0, :GROUPS] = torch.arange(GROUPS).double()
    groups = nn.functional.interpolate(numbers.masked_fill(~free, 255), GRID)[:, 0].to(torch.uint8)
    return {
        "cls_token": torch.randn(IMAGES, WIDTH), "seen": seen, "groups": groups, "image_ids": torch.arange(IMAGES),
        "region_tokens": torch.randint(-127, 128, (IMAGES, 58, WIDTH)).to(torch.int8),
    }  # fmt: skip


def draw_features() -> Tensor:
    maps = torch.empty(IMAGES, SIZE // STRIDE, SIZE // STRIDE, WIDTH)  # channels last, as the student's
    return maps.permute(0, 3, 1, 2).requires_grad_()


def counted(work: Callable[[Count], Any], kernels: bool) -> Count:
    """By the kernels, or by bands as large as a GPU's."""
    count = Count()
    pixel_loss.way = lambda logits: pixel_kernels if kernels else pixel_bands  # type: ignore[assignment]
    pixel_kernels._reduce, pixel_kernels._gather = Kernel(count, "_reduce"), Kernel(count, "_gather")
    as_on_gpu = mock.patch.multiple(nn.functional, scaled_dot_product_attention=attention, dropout=dropout)
    with suppress(Finished), as_on_gpu, FakeTensorMode(allow_non_fake_inputs=True), Fetched(count), count:
        work(count)
    return count


def of_pixel_losses(kernels: bool) -> Count:
    """From R, prototypes and labels to both losses, and back to R's gradient."""
    given, text = batch(), nn.functional.normalize(torch.randn(SEEN, WIDTH), dim=1)
    numbers = torch.arange(IMAGES)[:, None, None] * GROUPS + SEEN
    group = nn.functional.interpolate(given["groups"][:, None].double(), SIZE)[:, 0].long() + numbers
    labels = torch.where(given["seen"] == 255, group, given["seen"].long())

    def work(count: Count) -> None:
        features, alpha = draw_features(), torch.ones((), requires_grad=True)
        prototypes = torch.randn(GROUPS * IMAGES, WIDTH, requires_grad=True)
        count.reset()
        found = pixel_losses(features, text, prototypes, alpha, 2.0, labels, SEEN)
        (found["nel"] + found["ce"]).backward()

    return counted(work, kernels)


class Given(nn.Module):
    """A student whose R is its parameter."""

    head_lr_factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(draw_features())

    def with_auxiliary(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.features, None

    def parameter_groups(self, lr: float, factor: float, decay: float) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": lr}]


def of_step(kernels: bool) -> Count:
    """From R to the optimiser's step: all losses, and back to R's gradient."""
    given, text = batch(), nn.functional.normalize(torch.randn(SEEN, WIDTH), dim=1)
    criterion_.layout = uncounted(criterion_.layout)
    criterion_.tokens_of_groups = uncounted(criterion_.tokens_of_groups)
    labels_._centres = uncounted(labels_._centres)
    learner_.Fetch = uncounted(lambda tensor: None)  # a GPU sends it while it works
    on_cpu, schedule = (given["seen"], given["groups"]), resolve(dataset="scenes")
    student, criterion = Given(), Criterion(Loss(), text)

    def finish(optimizer: torch.optim.Optimizer) -> None:
        raise Finished

    def work(count: Count) -> None:
        learner = make_learner(schedule, faked(student), faked(criterion), "cpu")  # type: ignore[arg-type]
        learner.scaler.step = finish  # type: ignore[method-assign]
        count.reset()
        learner.step([Batch(torch.empty(IMAGES), *(given[name] for name in ORDER), on_cpu)], [""] * IMAGES)

    return counted(work, kernels)


def main() -> None:
    pixel_bands.CPU_BAND = pixel_bands.GPU_BAND
    for kernels in (True, False):
        for name, count in (("pixel losses", of_pixel_losses(kernels)), ("all losses", of_step(kernels))):
            waits = ", ".join(f"{number} {kind}" for kind, number in count.waits.most_common()) or "none"
            way = "kernels" if kernels else "bands"
            print(f"{name}, {way}: {count.bytes / 1e9:.1f} GB, {count.operations:,} operations, waits: {waits}")
            most = ", ".join(f"{kind} {moved / 1e9:.1f}" for kind, moved in count.largest.most_common(9))
            print("   most bytes:", most, flush=True)


if __name__ == "__main__":
    main()
