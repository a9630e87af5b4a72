"""Whether a device computes what the CPU does: K-means, the losses and their gradients, a training step, resuming.

All is drawn on the CPU from a seed, in float32 without TF32. A GPU adds numbers up in another order, so most parts may
differ by the last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from configs.load import resolve
from configs.schema import Config, PseudoLabels
from pipeline.learning.criterion import Criterion
from pipeline.pseudo_labels import ANNOTATED, pseudo_labels
from pipeline.student.student import Student
from stages.train.batches import Batch
from stages.train.learner import Learner, make_learner

SIZE, GRID, WIDTH, IMAGES, GROUPS = 64, 8, 64, 4, 3
SETTINGS = (
    "student.model=segformer-b0", "student.weights=none", "student.drop_path=0", "train.precision=fp32",
    "train.compile=false", "train.ema=null",
)  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """`difference` of a part on the device from the same on the CPU, and how much is `allowed`."""

    part: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"differs by {self.difference:.1e}; {self.allowed:.0e} is allowed"


def agreement(device: str) -> Iterator[Agreement]:
    """Yield the parts one by one; some seconds."""
    with _plain_float32():
        yield Agreement("K-means labels, share of tokens", _kmeans(device), 0.0)
        losses, gradients = _losses(device)
        yield Agreement("losses", losses, 1e-5)
        yield Agreement("gradients of the losses", gradients, 1e-4)
        losses, gradients = _step(device)
        yield Agreement("losses of a training step", losses, 1e-4)
        yield Agreement("gradients of a training step", gradients, 1e-2)
        yield Agreement("a resumed step, weights", _resume(device), 0.0 if device == "cpu" else 1e-4)


def _kmeans(device: str) -> float:
    """By torch's K-means, in float64 on both; other devices than CUDA have FAISS, on the CPU, for lack of float64."""
    rng = np.random.default_rng(0)
    objects = rng.normal(size=(12, WIDTH)).astype(np.float32)
    tokens = objects[rng.integers(0, 12, (IMAGES, 4 * GRID, 4 * GRID))] + rng.normal(size=WIDTH).astype(np.float32)
    tokens += 0.7 * rng.normal(size=tokens.shape).astype(np.float32)
    free = rng.random(tokens.shape[:3]) < 0.7
    if not device.startswith(("cuda", "cpu")):
        return 0.0
    found = [pseudo_labels(torch.from_numpy(tokens).to(on), free, PseudoLabels(), "torch") for on in ("cpu", device)]
    return float(np.mean([(own != other).mean() for own, other in zip(*found, strict=True)]))


def _losses(device: str) -> tuple[float, float]:
    """Of all terms of Eq. 8 and of local distillation, on drawn features."""
    features = torch.randn(IMAGES, WIDTH, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(1))
    criterion, found = _criterion(_config()).eval(), []
    for on in ("cpu", device):
        own, given = deepcopy(criterion).to(on), features.to(on).requires_grad_()
        moved = _batch(0, on)
        losses = own(given, moved.cls_tokens, moved.seen, moved.groups, moved.rows, moved.region_tokens)
        torch.stack(list(losses.values())).sum().backward()
        leaves = [given, *own.parameters()]
        found.append(({name: value.item() for name, value in losses.items()}, _gradients(leaves)))
    return _apart(*(losses for losses, _ in found)), _distance(*(gradients for _, gradients in found))


def _step(device: str) -> tuple[float, float]:
    found = []
    for on in ("cpu", device):
        learner = _learner(on)
        losses = learner.step([_batch(0, on)], ["image"] * IMAGES)
        found.append((losses, _gradients(learner.student.parameters())))
    return _apart(*(losses for losses, _ in found)), _distance(*(gradients for _, gradients in found))


def _resume(device: str) -> float:
    """The second step of a learner, and of one that was restored after the first."""
    learner, other = _learner(device), _learner(device)
    learner.step([_batch(0, device)], ["image"] * IMAGES)
    other.restore(deepcopy(learner.state()))
    for one in (learner, other):
        one.step([_batch(1, device)], ["image"] * IMAGES)
    return _distance(*(list(one.student.state_dict().values()) for one in (learner, other)))


def _config() -> Config:
    return resolve("scenes", assignments=SETTINGS)


def _learner(device: str) -> Learner:
    config = _config()
    torch.manual_seed(0)
    student = Student(config.student, WIDTH).train()
    for module in student.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # a GPU draws other numbers from the same seed
    return make_learner(config, student.to(device), _criterion(config).eval().to(device), device)


def _criterion(config: Config) -> Criterion:
    """In eval mode it draws nothing."""
    torch.manual_seed(0)
    return Criterion(config.loss, nn.functional.normalize(torch.randn(len(config.dataset.seen_indices), WIDTH), dim=1))


def _batch(seed: int, device: str) -> Batch:
    """Images half of whose pixels are annotated, in blocks of a token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    free = torch.rand(IMAGES, GRID, GRID, generator=generator) < 0.5
    groups = torch.randint(0, GROUPS, free.shape, generator=generator).masked_fill(~free, ANNOTATED)
    seen = torch.randint(0, len(_config().dataset.seen_indices), free.shape, generator=generator)
    seen = seen.masked_fill(free, ANNOTATED).repeat_interleave(SIZE // GRID, 1).repeat_interleave(SIZE // GRID, 2)
    on_cpu = seen.to(torch.uint8), groups.to(torch.uint8)
    return Batch(
        pixels=draw(IMAGES, 3, SIZE, SIZE).to(device),
        seen=on_cpu[0].to(device),
        cls_tokens=draw(IMAGES, WIDTH).to(device),
        groups=on_cpu[1].to(device),
        rows=torch.arange(IMAGES, device=device),
        region_tokens=(30 * draw(IMAGES, GROUPS, WIDTH)).clamp(-127, 127).to(device, torch.int8),
        on_cpu=on_cpu,
    )


def _gradients(leaves: Iterator[Tensor] | list[Tensor]) -> list[Tensor]:
    return [leaf.grad.detach() for leaf in leaves if leaf.grad is not None]


def _apart(first: dict[str, float], second: dict[str, float]) -> float:
    """The largest difference of two losses of one name, relative to the first."""
    return max(abs(value - second[name]) / max(abs(value), 1e-6) for name, value in first.items())


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Of two lists of tensors as one vector each, relative to the first's length."""
    one, other = (torch.cat([part.detach().cpu().double().flatten() for part in parts]) for parts in (first, second))
    return float((one - other).norm() / one.norm())


@contextmanager
def _plain_float32() -> Iterator[None]:
    """Neither TF32 nor convolutions that a GPU chooses by their speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
