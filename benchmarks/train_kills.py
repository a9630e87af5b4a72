"""SIGKILLs at random moments of a training on scenes, which is continued after each: nothing may differ in the end.

    OMP_NUM_THREADS=1 python benchmarks/train_kills.py    # 50 kills; exits 1 on any difference

Each time a run is completed, and in the end, its losses, scores, weights and its whole last checkpoint (optimiser,
bank, generators) must be, byte for byte, those of an undisturbed run; a completed run then starts anew. `--workers 2`
has the loader's workers in it: half of the kills hit the main process alone, and its workers must end by themselves.

Runs are forked from this process, which has imported everything, and so are their workers (see kills.py). `--folder`
names a working directory that holds data and `--cache`, in place of scenes and a cache that are made first.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from signal import SIGKILL

from kills import STUCK, Attempt, Failure
from torch.utils.data import DataLoader

import stages.train.batches
import stages.train.stage  # imported here, it need not be in every run
from stages.train.checkpoints import SUMS, TENSORS, Checkpoints
from stages.train.log import LOSSES, SCORES

SCENES = ["--dataset", "scenes", "--set", "dataset.limit=48"]
TRAIN = ["--set", "train.iterations=40", "--set", "train.batch_size=4", "--set", "train.checkpoint_every=5",
         "--set", "train.validate_every=20", "--set", "train.ema=0.9", "--set", "loss.bank=8"]  # fmt: skip
START = 0.3  # of a run's time at most goes by before its first step


def run_killed(folder: Path, arguments: Sequence[str], kills: int, seed: int, workers: int) -> Counter[str]:
    """Kills and continues; how often what happened.

    Args:
        folder: working directory; runs `whole` and `killed` are made in it.
        arguments: of the command line, without `--run`.
        workers: of the loader.

    Raises:
        Failure: a run fails otherwise than by a kill, leaves processes behind, or differs in the end.
    """
    draw, tally, steps = random.Random(seed), Counter[str](), set[int]()
    whole, killed = folder / "whole", folder / "killed"
    arguments = [*arguments, "--set", f"train.workers={workers}"]
    if workers:
        stages.train.batches.DataLoader = _forking  # type: ignore[misc]

    def finish(run: Path) -> float:
        start, attempt = time.monotonic(), Attempt(folder, [*arguments, "--run", str(run)], spawn=False)
        while (code := attempt.ended()) is None:
            time.sleep(0.02)
        if code:
            raise Failure(f"a run that was left alone exits with {code}: {attempt.log.read_text()[-3000:]}")
        return time.monotonic() - start

    duration = finish(whole)
    of = _lines(whole)
    while tally["kills"] < kills:
        attempt = Attempt(folder, [*arguments, "--run", str(killed)], spawn=False)
        # A few while it starts; most a little after a step, where it may save or validate; none if no step is left.
        starting = draw.random() < 0.1
        saved = _saved(killed)
        step = draw.randint(saved + 1, of) if saved < of else of + 1
        pause = draw.uniform(0, START * duration if starting else 2 * duration / of)
        begun = time.monotonic()
        reached, cut = begun if starting else None, False
        while (code := attempt.ended()) is None:
            now, lines = time.monotonic(), _lines(killed)
            cut = cut or lines <= saved  # what the log holds of steps that were lost goes when a run is continued
            if reached is None and cut and lines >= step:
                reached = now
            if reached is not None and now >= reached + pause:
                break
            if now > begun + STUCK:
                attempt.kill(alone=False)
                raise Failure(f"a run hangs: {attempt.log.read_text()[-3000:]}")
            time.sleep(0.002)
        alone = workers > 0 and draw.random() < 0.5
        if code is None and (code := attempt.kill(alone)) == -SIGKILL:
            tally["kills"] += 1
            tally["kills of the main process alone"] += alone
            tally[f"kills {_when(killed)}"] += 1
            steps.add(_lines(killed))
            continue
        if code:
            raise Failure(f"a run exits with {code}: {attempt.log.read_text()[-3000:]}")
        tally["runs completed, and equal"] += 1
        compare(killed, whole)
        shutil.rmtree(killed)
    finish(killed)
    compare(killed, whole)
    tally["runs completed, and equal"] += 1
    tally[f"of {of} steps that a kill came after"] = len(steps)
    return tally


def _forking(*arguments: object, **options: object) -> DataLoader:  # type: ignore[type-arg]
    """A loader whose workers need no imports."""
    return partial(DataLoader, *arguments)(**{**options, "multiprocessing_context": "fork"})  # type: ignore[arg-type]


def _lines(run: Path) -> int:
    """How many steps the log of a run holds."""
    return (run / LOSSES).read_bytes().count(b"\n") if (run / LOSSES).exists() else 0


def _saved(run: Path) -> int:
    """The iteration of the last checkpoint."""
    return max(Checkpoints(run, keep=1).iterations(), default=0)


def _when(run: Path) -> str:
    saved = Checkpoints(run, keep=1)
    if not saved.iterations():
        return "before the first checkpoint"
    if (saved.folder / ".partial").exists():
        return "while a checkpoint was saved"
    if _saved(run) == _lines(run):
        return "between a checkpoint and the next step"
    return "between steps"


def compare(killed: Path, whole: Path) -> None:
    """Failure where losses, scores, weights or the state at the end differ."""
    last = Checkpoints(whole, keep=1).iterations()[-1]
    files = [Path(LOSSES), Path(SCORES), Path("student.safetensors")]
    files += [Checkpoints(Path(), keep=1).path(last) / name for name in (SUMS, TENSORS)]
    if differing := [str(file) for file in files if (killed / file).read_bytes() != (whole / file).read_bytes()]:
        raise Failure(f"the runs differ in {differing}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("train", nargs="*", default=[*SCENES, *TRAIN], help="arguments of `train`, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        command = ["train", *arguments.train]
        try:
            if not arguments.folder:
                attempt = Attempt(folder, ["precompute", *SCENES, "--cache", "cache"], spawn=False)
                while (code := attempt.ended()) is None:
                    time.sleep(0.1)
                if code:
                    raise Failure(f"precompute exits with {code}: {attempt.log.read_text()[-3000:]}")
                command += ["--cache", "cache"]
            tally = run_killed(folder, command, arguments.kills, arguments.seed, arguments.workers)
        except Failure as failure:
            sys.exit(f"FAILED: {failure}")
    for what, count in sorted(tally.items()):
        print(f"{count:4d}  {what}")


if __name__ == "__main__":
    main()
