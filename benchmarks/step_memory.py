"""GPU memory of a training step of the paper's students, reckoned on fake tensors: nothing is computed.

    python -m benchmarks.step_memory   # prints the table of docs/students.md

16 images of 512 x 512 in bf16. What is added up, in GB of 10^9 bytes:

- state: weights, their gradients and AdamW's two averages, in float32.
- activations: what the student's forward pass keeps for the backward pass, and R in float32.
- losses: the most that the losses hold at once beside R, by the kernels of pixel_kernels.py (step_count.py counts it).
- block: where blocks are recomputed, twice what the largest keeps: its activations and as many gradients. The losses
  are done by then, so only the larger of the two is added.

Left out: the CUDA context, cuDNN's workspaces, and what the allocator cannot use again. Attention counts with its
matrices, which a GPU's kernels do not keep.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_count import IMAGES, SIZE, WIDTH, Count, faked, of_step
from configs.schema import Student as StudentConfig
from pipeline.student.student import Student

STUDENTS = ("segformer-b4", "segnext-b", "swin-b")


def of_student(name: str, checkpointing: bool) -> tuple[int, int, int]:
    """Bytes of its weights, of what a forward pass keeps, and of what the largest block keeps."""
    student = Student(StudentConfig(model=name, weights="none"), WIDTH).train()
    if checkpointing:
        student.recompute_blocks()
    largest, count = 0, Count()

    def before(block: nn.Module, inputs: object) -> None:
        count.reset()

    def after(block: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        largest = max(largest, count.held - count.base)

    for path, module in student.named_modules():
        if path.rpartition(".")[0].endswith("blocks"):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with FakeTensorMode(allow_non_fake_inputs=True), count:
        faked(student, "cuda")
        weights = count.held
        # As torch.autocast does, which needs a GPU.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        features = student(torch.empty(IMAGES, 3, SIZE, SIZE, device="cuda"))
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
        features = features.float()
    return weights, count.held - weights, largest


def main() -> None:
    found = of_step(kernels=True)
    losses = found.most - found.base
    print("| student | state | activations | losses | sum | with `train.checkpointing`: activations | block | sum |")
    print("|---|---|---|---|---|---|---|---|")
    for name in STUDENTS:
        weights, kept, largest = of_student(name, False)
        _, fewer, _ = of_student(name, True)
        state, block = 4 * weights, 2 * largest
        sizes = (state, kept, losses, state + kept + losses, fewer, block, state + fewer + max(losses, block))
        print(f"| {name} | " + " | ".join(f"{size / 1e9:.1f}" for size in sizes) + " |", flush=True)


if __name__ == "__main__":
    main()
