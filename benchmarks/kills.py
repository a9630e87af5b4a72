"""SIGKILLs at random moments of a precompute of scenes, which is resumed after each: nothing may be lost or differ.

    OMP_NUM_THREADS=1 python benchmarks/kills.py    # 200 kills, 20 minutes on two cores; exits 1 on any difference

Each kill hits, by chance, the main process and its workers together, the main process alone (its workers must then
end by themselves), or one worker alone (the run must go on without it). A run that was completed before its kill starts
anew: from nothing, or without a few records. Each time a run is completed, and in the end, the cache must be, byte for
byte, that of an undisturbed run.

Runs are forked from this process, which has imported everything, and so are their workers: a start takes a second in
place of twenty. (Threads that NumPy starts would not survive a fork: hence OMP_NUM_THREADS.) A worker may
also hang in its fork, now and then, as threads' locks do not survive one: FAILED then shows where. `--spawn` starts
`python cli.py` and its workers as users do. What follows the options goes to `precompute` in place of scenes.
"""

import argparse
import faulthandler
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dask.config

import cli
import stages.precompute.stage  # noqa: F401 (imported here, it need not be in every run)
from cache.layout import MANIFEST, SHARDS
from cache.verify import verify
from stages.precompute.plan import TIMING

SCENES = ["--dataset", "scenes", "--set", "dataset.limit=400", "--set", "storage.shard_images=8"]
ORPHANS_END_WITHIN = 30.0  # seconds
STUCK = 300.0  # seconds without an end, nor a kill: the run hangs
START = 0.4  # of a run's time at most goes by before its first shard
HITS = ("all processes", "the main process", "a worker")
DIED_TOO_OFTEN = "died four times"


class Failure(Exception):
    """What must hold does not."""


class Attempt:
    """One `precompute`, in a session of its own."""

    def __init__(self, folder: Path, arguments: Sequence[str], spawn: bool) -> None:
        self.log = folder / "log.txt"
        if spawn:
            command = [sys.executable, str(Path(cli.__file__)), *arguments]
            with self.log.open("wb") as log:
                process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            self.pid = process.pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            _become_precompute(folder, self.log, arguments)

    def ended(self) -> int | None:
        """Exit code, or minus the signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def workers(self) -> list[int]:
        """Its children but multiprocessing's own helper."""
        return [
            pid for pid, (parent, _) in _processes().items()
            if parent == self.pid and b"resource_tracker" not in _command(pid)
        ]  # fmt: skip

    def kill(self, alone: bool) -> int:
        """The main process, or all of its session; when nothing is left, returns its exit code or minus the signal."""
        (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        deadline = time.monotonic() + ORPHANS_END_WITHIN
        while left := [pid for pid, (_, session) in _processes().items() if session == self.pid]:
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
                raise Failure(f"processes {left} outlive their run by {ORPHANS_END_WITHIN} s: {self.log.read_text()}")
            time.sleep(0.05)
        return code


def _become_precompute(folder: Path, log: Path, arguments: Sequence[str]) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # what orphans are asked for; forks inherit it
        sys.argv = ["clip-zss", *arguments]
        with dask.config.set({"distributed.worker.multiprocessing-method": "fork"}):
            cli.main()
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _processes() -> dict[int, tuple[int, int]]:
    """Pid -> (parent, session) of all that run, zombies left out; not those with threads that still hold files."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            threads = len(list((stat.parent / "task").iterdir()))
        except OSError:
            continue  # it has just ended
        if state != "Z" or threads > 1:
            found[int(stat.parent.name)] = (int(parent), int(session))
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of the cache; timing.json and the lock are no part of it."""
    files = (file for file in cache.rglob("*") if file.is_file() and file.name not in (TIMING, ".lock"))
    return {str(file.relative_to(cache)): file.read_bytes() for file in files}


def run_killed(
    folder: Path, arguments: Sequence[str], kills: int, seed: int, spawn: bool, hits: Sequence[str] = HITS
) -> Counter[str]:
    """Kills and resumes; what was hit, and when.

    Args:
        folder: working directory, which holds the data; caches `whole` and `killed` are made in it.
        arguments: of the command line, without `--cache`.
        hits: what is killed, one of these by chance.

    Raises:
        Failure: a run fails otherwise than by a kill, leaves processes behind, or the cache differs in the end.
    """
    draw, tally = random.Random(seed), Counter[str]()
    whole, killed = folder / "whole", folder / "killed"

    def finish(cache: Path) -> float:
        start, attempt = time.monotonic(), Attempt(folder, [*arguments, "--cache", str(cache)], spawn)
        while (code := attempt.ended()) is None:
            time.sleep(0.02)
        if code:
            raise Failure(f"an undisturbed run exits with {code}: {attempt.log.read_text()[-2000:]}")
        return time.monotonic() - start

    finish(whole)
    shutil.rmtree(whole)
    duration = finish(whole)  # the first made the class features too
    while tally["kills"] < kills:
        attempt = Attempt(folder, [*arguments, "--cache", str(killed)], spawn)
        done, of = (len(list(cache.glob(f"{SHARDS}/*.json"))) for cache in (killed, whole))
        likely = duration * max(START, 1 - done / of)  # or most runs would be completed before their kill
        if _kill_until_it_ends(attempt, killed, of, draw, likely, hits, tally, kills):
            _check(killed, whole)  # now: what is set back would hide it
            _set_back(killed, draw)
    finish(killed)
    _check(killed, whole)
    return tally


def _check(killed: Path, whole: Path) -> None:
    found, wanted = contents(killed), contents(whole)
    if found != wanted:
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise Failure(f"the caches differ in {differing[:10]}")
    if damage := verify(killed):
        raise Failure(f"verify finds {damage[:10]}")


def _kill_until_it_ends(
    attempt: Attempt, cache: Path, shards: int, draw: random.Random, duration: float, hits: Sequence[str],
    tally: Counter[str], kills: int,
) -> bool:  # fmt: skip
    """Whether the run was completed."""
    while True:
        # After the last kill a run that lost a worker must end well.
        moment = time.monotonic() + draw.uniform(0, duration) if tally["kills"] < kills else math.inf
        patience = time.monotonic() + STUCK + duration
        while (code := attempt.ended()) is None and time.monotonic() < moment:
            if time.monotonic() > patience:
                attempt.kill(alone=False)
                raise Failure(f"a run hangs: {attempt.log.read_text()[-2000:]}")
            time.sleep(0.002)
        if code is not None:
            too_often = code == 2 and DIED_TOO_OFTEN in attempt.log.read_text()
            tally["runs that gave up on a shard after four dead workers" if too_often else "runs completed"] += 1
            if code and not too_often:
                raise Failure(f"a run exits with {code}: {attempt.log.read_text()[-9000:]}")
            return code == 0
        hit = draw.choice(hits)
        victims = attempt.workers() if hit == "a worker" else []
        if hit == "a worker" and not victims:
            continue
        if not (cache / MANIFEST).exists():
            when = "before the manifest"
        else:
            pending = len(list(cache.glob(f"{SHARDS}/*.json"))) < shards
            when = "with shards pending" if pending else "after the last shard"
        if hit == "a worker":
            try:
                os.kill(draw.choice(victims), signal.SIGKILL)
            except ProcessLookupError:
                continue
        elif attempt.kill(alone=hit == "the main process") != -signal.SIGKILL:
            tally["runs that ended just before their kill"] += 1
            return False  # the next one says so
        tally["kills"] += 1
        tally[f"{hit}, {when}"] += 1
        if hit != "a worker":
            return False


def _set_back(cache: Path, draw: random.Random) -> None:
    """A complete cache, made incomplete: wholly or in part."""
    if draw.random() < 0.3:
        shutil.rmtree(cache)
        return
    records = sorted(cache.glob(f"{SHARDS}/*.json"))
    for record in draw.sample(records, draw.randint(1, len(records))):
        record.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hit", choices=HITS, action="append", help="Kill only this; repeatable.")
    parser.add_argument("--spawn", action="store_true")
    parser.add_argument("precompute", nargs="*", default=SCENES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        try:
            tally = run_killed(
                Path(folder).absolute(), ["precompute", *arguments.precompute], arguments.kills, arguments.seed,
                arguments.spawn, arguments.hit or HITS,
            )  # fmt: skip
        except Failure as failure:
            sys.exit(f"FAILED: {failure}")
    for what, count in sorted(tally.items()):
        print(f"{count:4d}  {what}")
    print("the cache is byte-identical to that of an undisturbed run whenever complete, and verify finds nothing")


if __name__ == "__main__":
    main()
