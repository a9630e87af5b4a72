"""How fast the gallery of 2,000 views is in headless Chromium: writes one of random views, opens it, uses it.

    python -m benchmarks.gallery --output /tmp/gallery-2000

Views are as large as ViT-B/16's at 512 pixels: 32 x 32 tokens, up to 80 regions, 171 classes.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from configs.load import resolve
from pipeline.data.dataset import IGNORE
from pipeline.data.scenes import render_scene
from stages.inspect.gallery.collect import View, find_regions
from stages.inspect.gallery.write import write_gallery
from stages.inspect.regions import describe
from tests.stages.inspect.browser import Browser, chromium

GRID, REGIONS, WIDTH, SIDE, THRESHOLD = 32, 80, 512, 384, 0.8
ROUNDS = 5


def views(count: int, classes: int, distinct: int = 40) -> Iterator[View]:
    """`count` views; from the first `distinct` on they repeat, under new ids."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(classes, WIDTH))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    made: list[View] = []
    for number in range(count):
        if len(made) < distinct:
            made.append(_view(rng, text.astype(np.float32)))
        row = dataclasses.replace(made[number % distinct].row, image_id=f"{number:012d}")
        yield dataclasses.replace(made[number % distinct], row=row)


def _view(rng: np.random.Generator, text: np.ndarray) -> View:
    """Regions are the cells that are nearest to random points; those of one of ten kinds look alike."""
    picture, mask = render_scene(rng, 128)
    picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE)))
    mask = mask.repeat(3, axis=0).repeat(3, axis=1)
    truth = mask[6::12, 6::12]
    points, cells = rng.uniform(0, GRID, (REGIONS, 2)), np.stack(np.mgrid[:GRID, :GRID], axis=-1) + 0.5
    clusters = np.linalg.norm(cells[:, :, None] - points, axis=-1).argmin(axis=-1).astype(np.uint8)
    clusters[:4] = IGNORE
    kinds = rng.normal(size=(10, WIDTH))[rng.integers(0, 10, 256)] + 0.3 * rng.normal(size=(256, WIDTH))
    tokens = (kinds[clusters] + 0.5 * rng.normal(size=(GRID, GRID, WIDTH))).astype(np.float32)
    regions = find_regions(tokens, clusters, clusters, text, THRESHOLD)
    row, seeds = describe("", 0, clusters, clusters, truth), [(7, 16), (3, 64)]
    return View(row, picture, mask, truth, clusters, clusters, seeds, regions)


def use(browser: Browser, page: Path) -> dict[str, float]:
    """Seconds of opening, filtering, sorting, moving lambda, and scrolling."""
    start = time.perf_counter()
    browser.open(page)
    browser.until("document.querySelector('article canvas') && gallery.groups(0)")
    browser.settle()
    found = {"open, first views drawn": time.perf_counter() - start}
    for name, control, value in (
        ("filter by 10 letters of the id", "search", "0000000001"),
        ("no filter", "search", ""),
        ("sort by groups", "sort", "groups"),
        ("one step of lambda, near views drawn", "slider", "0.75"),
    ):
        found[name] = browser.run(f"""new Promise((done) => {{
            const control = document.getElementById('{control}'), start = performance.now();
            control.value = '{value}';
            control.dispatchEvent(new Event('input'));
            requestAnimationFrame(() => requestAnimationFrame(() => done((performance.now() - start) / 1000)));
        }})""")
    start = time.perf_counter()
    browser.until("document.getElementById('count').textContent.includes('fusing')")
    browser.until("!document.getElementById('count').textContent.includes('fusing')", seconds=300)
    found["all views fused at the new lambda"] = time.perf_counter() - start
    frames = browser.run("""new Promise((done) => {
        const frames = [];
        let before = performance.now();
        const step = (now) => {
            window.scrollBy(0, 120);
            frames.push(now - before);
            before = now;
            frames.length < 120 ? requestAnimationFrame(step) : done(frames.slice(1));
        };
        requestAnimationFrame(step);
    })""")
    found["scrolling 120 pixels a frame: median frame"] = float(np.median(frames)) / 1000
    found["95 % of the frames are shorter than"] = float(np.percentile(frames, 95)) / 1000
    return found


def main() -> None:
    """Prints a table of medians and extremes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = resolve("coco-stuff")
    start = time.process_time()
    made = views(arguments.views, len(config.dataset.classes))
    page = write_gallery(config, "random views", made, arguments.output)
    size = sum(file.stat().st_size for file in page.parent.rglob("*") if file.is_file())
    print(f"{arguments.views} views, {size / 1e6:.0f} MB, written in {time.process_time() - start:.0f} s of CPU time")
    print(f"index: {(page.parent / 'gallery-index.js').stat().st_size / 1e6:.2f} MB")
    rounds = []
    for _ in range(ROUNDS):
        with chromium() as browser:
            rounds.append(use(browser, page))
            assert not browser.errors, browser.errors
    print(f"| what | median of {ROUNDS} (least to most), s |\n|---|---|")
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        print(f"| {name} | {median(values):.3f} ({min(values):.3f} to {max(values):.3f}) |")


if __name__ == "__main__":
    main()
