"""Single bits flipped at random places of a cache: `verify` must find each, and `repair` restore identical bytes.

    OMP_NUM_THREADS=1 python benchmarks/bit_flips.py    # 1,000 flips; exits 1 on any difference

The cache is one of scenes, made by `precompute`. Each flip is alone when `verify` looks, and must be reported as the
only damage, in the file it is in. A fifth of the flips each go to shards, records, the manifest, the other small
files, and the copies, for shards are most of the bytes. Then as many as leave each other alone, one a shard or small
file at most, are put in again and repaired together, the shards by the teacher. Workers are threads, which start at
once.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import chdir, suppress
from functools import partial
from pathlib import Path

from dask.distributed import LocalCluster
from kills import contents  # beside this file

import cli
import stages.precompute.workers
from cache.layout import COPIES, MANIFEST, SHARDS, copy_key
from cache.verify import verify
from configs.errors import UserError
from stages.precompute.repair import repair

SCENES = [
    "--dataset", "scenes", "--set", "dataset.limit=48", "--set", "storage.shard_images=2", "--set",
    "storage.dense_tokens=float16",
]  # fmt: skip


class Failure(Exception):
    """What must hold does not."""


def kind(key: str, manifest_files: set[str]) -> str:
    """What sort of file of the cache it is."""
    if key == MANIFEST:
        return "manifest"
    if key.startswith(f"{COPIES}/"):
        return "copies"
    if key.startswith(f"{SHARDS}/"):
        return "records"
    return "ids, text features, array metadata" if key in manifest_files else "shards"


def flip(path: Path, bit: int) -> None:
    """Changes bit `bit`, counted from the start of the file, and nothing else."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def unit(key: str) -> str:
    """What is repaired at once: a shard with its record, or a small file. Two flips of one unit would hide each other.

    A damaged record vouches for no file of its shard, so one that is flipped too is not reported beside it.
    """
    found = re.match(rf"{SHARDS}/(\d+)\.json$|arrays/\w+/c\.(\d+)\.\d", key)
    return str(int(found[1] or found[2])) if found else key


def run(cache: Path, flips: int, seed: int) -> tuple[Counter[str], int]:
    """Flips of each kind, all found and repaired, and the number of repairs. `cache` is complete, before and after.

    Raises:
        Failure: a flip is not found, something else is, or a repair gives other bytes.
    """
    whole, draw, tally, repairs = contents(cache), random.Random(seed), Counter[str](), 0
    if damage := verify(cache):
        raise Failure(f"verify finds {damage[:3]} before any flip")
    copied = {key for key in whole if copy_key(key) in whole}
    kinds: dict[str, list[str]] = {}
    for key in whole:
        kinds.setdefault(kind(key, copied), []).append(key)
    for place, (name, keys) in enumerate(sorted(kinds.items())):
        wanted = flips // len(kinds) + (place < flips % len(kinds))
        while tally[name] < wanted:
            batch: dict[str, int] = {}  # key -> bit
            units: set[str] = set()
            while tally[name] < wanted and (free := [key for key in keys if unit(key) not in units]):
                key = draw.choices(free, [len(whole[key]) for key in free])[0]
                batch[key] = draw.randrange(8 * len(whole[key]))
                units.add(unit(key))
                _find(cache, key, batch[key])
                tally[name] += 1
            _repair(cache, batch, whole)
            repairs += 1
    return tally, repairs


def _find(cache: Path, key: str, bit: int) -> None:
    """One flip alone, which is taken back."""
    flip(cache / key, bit)
    found = [(damage.kind, damage.key) for damage in verify(cache)]
    if found != [("changed", key)]:
        raise Failure(f"bit {bit} of {key} was flipped, verify says {found}")
    flip(cache / key, bit)


def _repair(cache: Path, flips: dict[str, int], whole: dict[str, bytes]) -> None:
    """All of `flips` at once, and a repair."""
    for key, bit in flips.items():
        flip(cache / key, bit)
    found = {damage.key for damage in verify(cache)}
    if found != flips.keys():
        raise Failure(f"of {sorted(flips)}, flipped together, verify finds {sorted(found)}")
    repair(str(cache), Path("data"), "cpu")
    if contents(cache) != whole:
        raise Failure(f"repair of {flips} gives other bytes")
    if damage := verify(cache):
        raise Failure(f"verify finds {damage[:3]} after a repair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages.precompute.workers.LocalCluster = partial(LocalCluster, processes=False)  # type: ignore[misc]
    with tempfile.TemporaryDirectory(dir=".") as folder, chdir(folder):
        cache = Path("cache").absolute()
        sys.argv = ["clip-zss", "precompute", *SCENES, "--cache", str(cache)]
        with suppress(SystemExit):  # all is well or not: `run` looks
            cli.main()
        try:
            tally, repairs = run(cache, arguments.flips, arguments.seed)
        except (Failure, UserError) as failure:
            sys.exit(f"FAILED: {failure}")
    for name, count in sorted(tally.items()):
        print(f"{count:5d}  {name}")
    print(f"{sum(tally.values()):5d}  flips, each found by verify; {repairs} repairs, after each identical bytes")


if __name__ == "__main__":
    main()
