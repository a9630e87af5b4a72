"""Training by two processes, as torchrun starts them, beside training by one."""

import json
import os
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from timm.layers import DropPath
from torch import nn

import stages.train.stage
from configs.errors import UserError
from configs.load import resolve
from configs.schema import Train
from pipeline.student.student import Student
from stages.common.caches import choose_cache
from stages.train.learner import Learner
from stages.train.ranks import own_draws
from tests.conftest import World

STEPS = 10


class Exact(Student):
    """Its norms know one image alone (synchronised batch norm needs a GPU), and it draws no random numbers."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    norm = nn.GroupNorm(1, child.num_features)
                    setattr(module, name, nn.Sequential(norm, getattr(child, "act", nn.Identity())))
                elif isinstance(child, nn.Dropout2d | DropPath):
                    setattr(module, name, nn.Identity())


def train(folder: Path, run: str, stop_at: int | None = None, **settings: object) -> None:
    """Ten steps in this process, of however many ranks its environment says; or less, ended as by a kill."""
    torch.set_num_threads(1)
    os.chdir(folder)
    cache = choose_cache("caches/tiny", None)
    fixed = {"iterations": STEPS, "validate_every": STEPS, "checkpoint_every": 5, "batch_size": 4, **settings}
    assignments = [f"train.{name}={value}" for name, value in fixed.items()]
    # Not the decoder: its key biases have no gradient but rounding, which AdamW blows up to steps of full length.
    config = resolve(config=folder / "tiny-experiment.yaml", assignments=[*assignments, "loss.synthesizer=mlp"])
    step = Learner.step

    def step_or_die(self: Learner, *arguments: object) -> dict[str, float]:
        if self.iteration == stop_at:
            os._exit(0)
        return step(self, *arguments)  # type: ignore[arg-type]

    with (
        mock.patch.object(stages.train.stage, "Student", Exact),
        mock.patch.object(stages.train.stage, "Validation"),
        mock.patch.object(Learner, "step", step_or_die),
    ):
        stages.train.stage.Validation.return_value.best = None  # type: ignore[attr-defined]
        stages.train.stage.Validation.return_value.choose_gamma.return_value = 0.5  # type: ignore[attr-defined]
        stages.train.stage.train(config, cache, folder / "data", folder / "runs" / run, "cpu")


def _rank(rank: int, folder: Path, port: int, run: str, stop_at: int | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TMPDIR": str(folder / "temporary")}
    train(folder, run, stop_at)


def two_ranks(folder: Path, run: str, stop_at: int | None = None) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir(exist_ok=True)
    mp.spawn(_rank, (folder, port, run, stop_at), nprocs=2)
    assert not list((folder / "temporary").glob("*.npy"))  # in which the ranks shared the cache's arrays


def losses(folder: Path, run: str) -> torch.Tensor:
    lines = (folder / "runs" / run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[json.loads(line)[name] for name in ("global", "bce", "nel", "ce")] for line in lines])


@pytest.fixture(scope="module")
def one(world: World) -> torch.Tensor:
    train(world.folder, "one-rank")
    return losses(world.folder, "one-rank")


def test_two_ranks_learn_what_one_learns(world: World, one: torch.Tensor) -> None:
    two_ranks(world.folder, "two-ranks")
    torch.testing.assert_close(losses(world.folder, "two-ranks"), one, rtol=1e-5, atol=1e-5)


def test_another_number_of_ranks_goes_on(world: World, one: torch.Tensor) -> None:
    """Killed in the seventh step; the checkpoint is of the fifth."""
    two_ranks(world.folder, "two-then-one", stop_at=6)
    train(world.folder, "two-then-one")
    torch.testing.assert_close(losses(world.folder, "two-then-one"), one, rtol=1e-5, atol=1e-5)


def test_micro_batches_train_and_say_what_they_are_not(world: World, one: torch.Tensor, capsys) -> None:
    train(world.folder, "micro", accumulate=2)
    assert "train.accumulate 2: InfoNCE's negatives" in capsys.readouterr().err
    found = losses(world.folder, "micro")
    assert found.isfinite().all() and not torch.allclose(found, one, rtol=1e-3)


def test_ranks_share_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Train(iterations=3, batch_size=12, accumulate=2)
    monkeypatch.setattr("stages.train.ranks.world_size", lambda: 3)
    drawn = []
    for rank in range(3):
        monkeypatch.setattr("stages.train.ranks.rank", lambda rank=rank: rank)
        drawn.append(own_draws(schedule, 1))
    first = [12, 13, 18, 19, 24, 25, 30, 31]
    assert drawn == [first, [draw + 2 for draw in first], [draw + 4 for draw in first]]
    with pytest.raises(UserError, match=r"batch_size 10 cannot be split among 3 processes x train.accumulate 2"):
        own_draws(Train(batch_size=10, accumulate=2), 0)
