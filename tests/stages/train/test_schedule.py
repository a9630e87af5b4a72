"""A schedule that cannot do what its settings say is said, or refused before anything is made."""

from pathlib import Path

import pytest

from configs.load import resolve
from configs.schema import CONFIGS, Train
from stages.train.learner import out_of_proportion, warm_up_and_poly
from tests.conftest import World

EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))


@pytest.mark.parametrize(("iterations", "warm_up"), [(20_000, 1500), (1000, 75), (40, 3), (1, 0)])
def test_the_warm_up_is_a_share_of_the_iterations(iterations: int, warm_up: int) -> None:
    schedule = Train(iterations=iterations)
    assert schedule.warm_up == warm_up and not out_of_proportion(schedule)
    assert Train(iterations=iterations, warmup=7).warm_up == 7


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_keep_their_warm_up(file: Path) -> None:
    """Their settings' fingerprints, too: the number itself stands in them."""
    assert resolve(config=file).train.warmup == (50 if file.stem == "scenes" else 1500)


@pytest.mark.parametrize(("iterations", "warmup"), [(1000, 1500), (1000, 600), (6, 5), (3, 100), (2, 2)])
def test_a_rate_that_is_never_reached_is_said(iterations: int, warmup: int) -> None:
    (line,) = out_of_proportion(Train(iterations=iterations, warmup=warmup))
    highest = max(warm_up_and_poly(step, warmup, iterations) for step in range(iterations))
    assert f"train.warmup {warmup:,} is out of proportion" in line
    assert f"reaches at most {highest:.0%} of train.lr" in line


def test_an_average_that_is_longer_than_the_training_is_said() -> None:
    (line,) = out_of_proportion(Train(iterations=1000, ema=0.9995))
    assert "train.ema 0.9995 averages over 2,000 iterations, of 1,000" in line
    assert not out_of_proportion(Train(iterations=20_000, ema=0.999))


def test_training_says_so(world: World, tmp_path: Path) -> None:
    arguments = ("train", "--cache", "caches/tiny", "--config", world.config, "--run", tmp_path / "run")
    said = world.run(*arguments, "--set=train.warmup=9", "--set=train.iterations=2").stderr
    assert "warning: train.warmup 9 is out of proportion to train.iterations 2" in said


@pytest.mark.parametrize(
    "settings",
    [
        ("student.model=swin-t", "train.batch_size=16", "train.accumulate=16"),
        ("student.model=swin-t", "train.batch_size=1"),
        ("views.size=32", "train.batch_size=4", "train.accumulate=4"),
    ],
)
def test_batch_norm_of_one_image_is_refused(world: World, settings: tuple[str, ...]) -> None:
    line = world.fails("train", "--cache", "caches/tiny", "--config", world.config, *(f"--set={s}" for s in settings))
    assert "train.accumulate" in line and "one image at a time" in line


def test_batch_norm_of_one_image_a_process_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.train.stage.world_size", lambda: 4)
    swin = ("--set=student.model=swin-t", "--set=student.weights=none", "--set=train.batch_size=4")
    line = world.fails("train", "--cache", "caches/tiny", "--config", world.config, *swin)
    assert "one image at a time" in line and "4 processes" in line


@pytest.mark.parametrize(
    "setting",
    [
        "train.iterations=100000000000000000000", "train.iterations=99999999", "train.batch_size=10000000000",
        "train.seed=99999999999999999999", "train.workers=1e30", "train.checkpoint_every=10000000000000000000000",
        "train.warmup=100000000000", "train.lr=.inf", "loss.tau=.inf", "loss.beta=.nan", "loss.bank=10000000000000",
        "loss.label_stride=1000000000", "views.size=1000000000", "views.count=100000000000",
        "views.ratio=[1, 1.0e+300]", "views.ratio=[1.0e-300, 1]",
        "views.seed=99999999999999999999", "pseudo_labels.windows=[2000000000]",
        "pseudo_labels.iterations=10000000000", "student.channels=1000000000", "evaluate.stride=10000000000",
        "evaluate.gamma=.inf", "evaluate.gamma=.nan", "storage.shard_images=100000000000", "dataset.limit=1e400",
    ],
)  # fmt: skip
def test_numbers_beyond_all_measure_are_refused(world: World, setting: str) -> None:
    section = setting.partition("=")[0]
    line = world.fails("train", "--cache", "caches/tiny", "--config", world.config, "--set", setting)
    assert section.partition(".")[0] in line and len(line) < 400
