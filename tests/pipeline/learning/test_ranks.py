"""Two processes with half a batch each learn what one learns from the whole."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import Loss
from pipeline.learning.criterion import Criterion
from pipeline.learning.ranks import average_gradients, averaged, gathered, rank, summed, world_size

C, SEEN, SIDE, GRID, BATCH, STEPS = 16, 3, 24, 4, 4, 10


def batch(step: int) -> dict[str, Tensor]:
    """Pixels, CLS tokens, seen masks and groups; some shares of it have no group, or no seen pixel, or neither."""
    draw = np.random.default_rng(step)
    seen = draw.integers(0, SEEN, (BATCH, SIDE, SIDE))
    free = draw.random((BATCH, GRID, GRID)) < 0.5
    if step % 3 == 1:
        free[:2] = False  # the first rank has no group
    if step % 3 == 2:
        free[2:] = True  # the second one has no seen pixel
    if step == 5:
        free[:] = False
    if step == 6:
        free[:] = True
    seen[free.repeat(SIDE // GRID, axis=1).repeat(SIDE // GRID, axis=2)] = 255
    if step == 7:
        seen[:2], free[:2] = 255, False  # no label at all on the first rank
    groups = np.where(free, draw.integers(0, 3, free.shape), 255)
    return {
        "pixels": torch.from_numpy(draw.normal(size=(BATCH, 3, SIDE, SIDE)).astype(np.float32)),
        "cls_token": torch.from_numpy(draw.normal(size=(BATCH, C)).astype(np.float32)),
        "seen": torch.from_numpy(seen.astype(np.uint8)),
        "groups": torch.from_numpy(groups.astype(np.uint8)),
        "region_tokens": torch.from_numpy(draw.integers(-127, 128, (BATCH, 5, C)).astype(np.int8)),
        "ids": torch.from_numpy(draw.integers(0, 8, BATCH)),
    }


def learn(settings: dict[str, Any], index: int, world: int, folder: Path) -> None:
    """Ten steps of one of the ranks; writes its parameters and the losses to a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=world)
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, C, 1)
    )
    unused = nn.Parameter(torch.ones(3))
    text = nn.functional.normalize(torch.randn(SEEN, C), dim=1)
    criterion = Criterion(Loss(bank=2, label_stride=1, local_weight=0.3, **settings), text)  # with 3, SGD diverges
    parameters = [*student.parameters(), *criterion.parameters(), unused]
    # Not Adam: an attention's key bias has no gradient but rounding, which Adam would blow up to steps of full length.
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    shown = []
    for step in range(STEPS):
        share = {name: whole.chunk(world)[index] for name, whole in batch(step).items()}
        features = student(share["pixels"])
        given = (share[name] for name in ("cls_token", "seen", "groups", "ids", "region_tokens"))
        losses = criterion(features, *given, auxiliary=features[:, :, ::2, ::2])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        average_gradients(parameters)
        optimizer.step()
        shown.append(torch.stack([averaged(loss) for loss in losses.values()]))
    assert unused.grad is None
    found = {str(number): parameter.detach() for number, parameter in enumerate(parameters)}
    save_file({**found, "losses": torch.stack(shown)}, folder / f"{world}-{index}.safetensors")
    if world > 1:
        dist.destroy_process_group()


def _spawned(index: int, settings: dict[str, Any], folder: str) -> None:
    learn(settings, index, 2, Path(folder))


@pytest.mark.parametrize(
    "settings", [{}, {"nel_channels": "all", "unit_query": True, "unit_features": True, "bce_negatives": False}]
)
def test_two_ranks_learn_what_one_learns(tmp_path: Path, settings: dict[str, Any]) -> None:
    learn(settings, 0, 1, tmp_path)
    mp.spawn(_spawned, (settings, str(tmp_path)), nprocs=2)
    whole, *halves = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert whole["losses"].shape == (STEPS, 6)
    for half in halves:
        for name, wanted in whole.items():
            torch.testing.assert_close(half[name], wanted, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name))
    for name, value in halves[0].items():
        assert torch.equal(value, halves[1][name]), name  # the ranks never drift apart


def test_one_process_is_its_own_world() -> None:
    value = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gathered(value) is value and summed(value) is value
    assert torch.equal(averaged(value), value.detach().double())
