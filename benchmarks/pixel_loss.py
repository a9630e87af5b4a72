"""NEL and cross-entropy in bands (pipeline/learning/pixel_loss.py) against the plain formula on whole logits.

    OMP_NUM_THREADS=1 python -m benchmarks.pixel_loss    # prints the table of benchmarks/pixel_loss.md; minutes

Forward and backward, float32, labels at 512 x 512. Where the plain formula would need more than `LIMIT` its memory is
reckoned from the batch of one image, to which it is proportional, and it is not run. On a CPU one thread's CPU time is
taken, on a GPU the wall's; the two ways take turns and the ratio is the median of the rounds' ratios. Memory is what
torch holds at most beyond the arguments.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from stages.common.devices import choose_device, keep_freed_memory, synchronize
from tests.pipeline.learning import bands, plain
from tests.pipeline.learning.memory import peak_bytes

SIZE, ROUNDS, LIMIT = 512, 3, 8e9  # bytes
CASES = [  # images, channels of the features, seen classes, pseudo prototypes, stride of the features
    (1, 512, 171, 30, 4), (2, 512, 171, 30, 4), (2, 512, 171, 200, 4), (2, 512, 171, 30, 8), (4, 512, 171, 30, 4),
    (16, 512, 171, 30, 4),
]  # fmt: skip

Formula = Callable[..., dict[str, Tensor]]


def draw(batch: int, channels: int, seen: int, pseudo: int, stride: int, device: str) -> list[Tensor]:
    """Features, text, prototypes, alpha, and labels in blobs; a tenth of the pixels has none."""
    torch.manual_seed(0)
    text = normalize(torch.randn(seen, channels), dim=1)
    features = torch.randn(batch, channels, SIZE // stride, SIZE // stride, requires_grad=True)
    prototypes, alpha = torch.randn(pseudo, channels, requires_grad=True), torch.ones((), requires_grad=True)
    blobs = torch.randint(0, seen + pseudo, (batch, 1, 5, 5)).masked_fill_(torch.rand(batch, 1, 5, 5) < 0.1, -1)
    labels = interpolate(blobs.double(), SIZE)[:, 0].long()
    return [t.detach().to(device).requires_grad_(t.requires_grad) for t in (features, text, prototypes, alpha, labels)]


def step(formula: Formula, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the sum of both losses."""
    *leaves, labels = tensors
    losses = formula(*leaves, 2.0, labels)
    return torch.autograd.grad(losses["nel"] + losses["ce"], [leaf for leaf in leaves if leaf.requires_grad])


def seconds(formula: Formula, tensors: list[Tensor], device: str) -> float:
    clock = time.perf_counter if device.startswith("cuda") else time.thread_time
    synchronize(device)
    started = clock()
    step(formula, tensors)
    synchronize(device)
    return clock() - started


def peak(formula: Formula, tensors: list[Tensor], device: str) -> int:
    if not device.startswith("cuda"):
        return peak_bytes(lambda: step(formula, tensors))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(formula, tensors)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    device = choose_device("auto")
    if "--keep-freed-memory" in sys.argv:
        keep_freed_memory()
    print(f"torch {torch.__version__}, {platform.machine()}, {device}, {torch.get_num_threads()} thread(s)\n")
    print("| images | channels C | logits N | stride | plain, GB | bands, GB | ratio | plain, s | bands, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for batch, channels, seen, pseudo, stride in CASES:
        tensors = draw(batch, channels, seen, pseudo, stride, device)
        single = peak(plain.pixel_losses, draw(1, channels, seen, pseudo, stride, device), device)
        whole, reckoned = single * batch, single * batch > LIMIT
        ours = peak(bands.losses, tensors, device)
        times: dict[str, list[float]] = {"plain": [], "bands": []}
        for _ in range(ROUNDS):
            times["bands"].append(seconds(bands.losses, tensors, device))
            if not reckoned:
                times["plain"].append(seconds(plain.pixel_losses, tensors, device))
        if not reckoned:
            whole = peak(plain.pixel_losses, tensors, device)
        memory = f"{'reckoned ' if reckoned else ''}{whole / 1e9:.2f} | {ours / 1e9:.3f} | {ours / whole:.3f}"
        taken = f"not run | {statistics.median(times['bands']):.2f} | -"
        if not reckoned:
            ratio = statistics.median(b / p for b, p in zip(times["bands"], times["plain"], strict=True))
            taken = f"{statistics.median(times['plain']):.2f} | {statistics.median(times['bands']):.2f} | {ratio:.2f}"
        print(f"| {batch} | {channels} | {seen + pseudo} | {stride} | {memory} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
