"""Checks that clip-zss works on this machine: what is installed, and one image through every part."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image

from cache.reader import open_cache
from cache.verify import verify
from configs.errors import UserError
from configs.load import resolve
from configs.schema import Config, Train, Views
from pipeline.data.scenes import render_scene, scene_rng
from pipeline.openmp import faiss
from stages.apply.predict import Segmenter
from stages.common.devices import choose_device, keep_freed_memory, obstacle
from stages.common.progress import console
from stages.precompute.plan import size
from stages.precompute.stage import precompute
from stages.train.batches import lack_of_shared_memory, loader_workers
from stages.train.provenance import versions
from stages.train.stage import train
from stages.upkeep.agreement import agreement


@dataclass(frozen=True)
class Finding:
    """`fault`: the part does not work; otherwise `text` describes it."""

    part: str
    text: str
    fault: bool = False


def doctor(asked: str) -> Iterator[Finding]:
    """Yield findings: packages, devices, disk space, then stage one, cache verification, stage two, prediction."""
    yield Finding("python", f"{platform.python_version()}, {platform.platform()}")
    yield Finding("packages", ", ".join(f"{name} {number}" for name, number in versions().items()))
    yield Finding("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    yield from _gpus()
    yield Finding("faiss", f"{faiss.get_compile_options().strip()}; {faiss.get_num_gpus()} GPUs")
    for folder in (Path("."), Path(tempfile.gettempdir())):
        yield Finding("disk", f"{size(shutil.disk_usage(folder).free)} free in {folder.absolute()}")
    views, schedule = Views(), Train()
    count = loader_workers(schedule.workers)
    lack = lack_of_shared_memory(4 * views.size**2 * schedule.batch_size, count)  # RGB and a mask
    yield Finding("shared memory", lack or f"enough for train.workers={count}", fault=bool(lack))
    try:
        device = choose_device(asked)
    except UserError as error:
        yield Finding("device", str(error), fault=True)
        return
    yield Finding("device", device)
    keep_freed_memory()
    yield from _smoke(device)
    if device != "cpu":
        yield from _agreement(device)


def _gpus() -> Iterator[Finding]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):  # NVML counts unusable GPUs
        gpu = torch.cuda.get_device_properties(number)
        yield Finding("GPU", f"cuda:{number}: {gpu.name}, {size(gpu.total_memory)}, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        yield Finding("GPU", "mps: the GPU of this Mac")
    elif not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", f"none that torch can use ({build}: {obstacle('cuda')}); all runs on the processor")


def _smoke(device: str) -> Iterator[Finding]:
    """Run one scene through everything, in a temporary folder in the working folder."""
    try:
        place = tempfile.TemporaryDirectory(prefix="clip-zss-doctor-", dir=".")
    except OSError as error:
        yield Finding("disk", _reason(error), fault=True)
        return
    with place as name:
        folder = Path(name).absolute()
        cache, run, picture = folder / "cache", folder / "run", folder / "images" / "one.png"
        config = _one_image(folder, picture)

        def verified() -> None:
            damaged = verify(cache)
            if damaged:
                raise RuntimeError(f"{damaged[0].kind}: {damaged[0].path}")

        parts: dict[str, Callable[[], object]] = {
            "stage one": lambda: precompute(config, folder, str(cache), device),
            "cache": verified,
            "stage two": lambda: train(config, open_cache(cache), folder, run, device),
            "prediction": lambda: Segmenter.load(run, device)(picture),
        }
        for part, do in parts.items():
            start = time.perf_counter()
            try:
                with _silence(), chdir(folder):
                    do()
            except Exception as error:  # any error is a finding
                yield Finding(part, _reason(error), fault=True)
                return  # the later parts depend on it
            yield Finding(part, f"works, one image in {time.perf_counter() - start:.1f} s")


def _agreement(device: str) -> Iterator[Finding]:
    """Whether the device computes what the CPU does."""
    try:
        for found in agreement(device):
            yield Finding(found.part, f"beside the processor's, {found}", fault=not found.holds)
    except Exception as error:  # what is looked for
        yield Finding("agreement", _reason(error), fault=True)


def _one_image(folder: Path, picture: Path) -> Config:
    """A dataset of one image, and the settings to run it through everything: embedded teacher, random student."""
    image, mask = render_scene(scene_rng("val", 0))
    for path, pixels in ((picture, image), (folder / "masks" / "one.png", mask)):
        path.parent.mkdir()
        Image.fromarray(pixels).save(path)
    scenes = resolve("scenes").dataset
    split = {"images": "images/{id}.png", "masks": "masks/{id}.png"}
    dataset = {
        "name": "doctor", "root": ".", "splits": {"train": split}, "classes": list(scenes.classes),
        "unseen": list(scenes.unseen),
    }  # fmt: skip
    file = folder / "doctor.yaml"
    file.write_text(yaml.safe_dump(dataset))
    once = ("iterations=1", "batch_size=1", "validate_every=1", "validate_on=train")
    return resolve(str(file), None, [f"train.{text}" for text in once], runlocal=True)


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split())} ({type(error).__name__})"


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output of the parts."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
