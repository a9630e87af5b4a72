"""The embedded dataset `scenes`: procedural images of shapes over textures, with exact masks.

Every image holds 1-5 things (shapes) over 2 stuff regions (textures), with occlusion, rotation and scale.
Colours are drawn per image: things are lighter than stuff; otherwise colour does not depend on the class.
The files it writes are an ordinary dataset (image, mask, split list): `configs/datasets/scenes.yaml` reads
them through the same reader as any other.

Image `i` of a split depends on nothing but (RENDER_VERSION, split, i): rendering is deterministic and can be
resumed or parallelised freely.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

THINGS = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "moon", "arrow", "flower", "hourglass", "bolt",
)  # fmt: skip
STUFF = ("stripes", "checks", "dots", "waves", "bricks", "zigzag", "grid", "clouds")
CLASSES = THINGS + STUFF
SIZE = 128
SPLITS = {"train": 2000, "holdout": 200, "val": 200}
RENDER_VERSION = 1
MAX_TURN = np.pi / 6  # things are turned by up to this either way, and mirrored half the time; textures by any angle
TEXTURE_CONTRAST = 0.35  # distance between a texture's two colours in the RGB cube of side 1
# Things are lighter than stuff, whatever their hue: shapes stand out from textures, and a small ViT learns them in
# minutes. Within things and within stuff, colour says nothing of the class.
STUFF_BRIGHTNESS, THING_BRIGHTNESS = (0.0, 0.5), (0.55, 1.0)

_SUPERSAMPLE = 4


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """Regular polygon, or a star when `inner` gives the radius of the dents."""
    count = corners if inner is None else 2 * corners
    radius = np.ones(count)
    if inner is not None:
        radius[1::2] = inner
    return _polar(radius, np.arange(count) * 2 * np.pi / count - np.pi / 2)  # a corner on top


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1) / 17


def _moon() -> np.ndarray:
    outer = _polar(np.ones(40), np.linspace(0.9, 2 * np.pi - 0.9, 40))
    # The inner arc runs back between the same two horns, bulging the same way.
    top, bottom = outer[-1], outer[0]
    centre = np.array([0.72, 0.0])
    start, end = top - centre, bottom - centre
    first = np.arctan2(start[1], start[0]) % (2 * np.pi)
    last = np.arctan2(end[1], end[0])
    inner = centre + _polar(np.full(40, np.hypot(*start)), np.linspace(first, last, 40))
    return np.concatenate([outer, inner]) - np.array([-0.15, 0.0])


_CIRCLE_ANGLE = np.linspace(0, 2 * np.pi, 60, endpoint=False)
_CIRCLE = _polar(np.full(60, 0.92), _CIRCLE_ANGLE)
_SQUARE = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
_CROSS = np.array(
    [(-0.28, -0.95), (0.28, -0.95), (0.28, -0.28), (0.95, -0.28), (0.95, 0.28), (0.28, 0.28),
     (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.28), (-0.95, 0.28), (-0.95, -0.28), (-0.28, -0.28)]
)  # fmt: skip
_ARROW = np.array([(-1, -0.22), (0.1, -0.22), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.22), (-1, 0.22)])
_HOURGLASS = np.array([(-0.7, -0.95), (0.7, -0.95), (0.1, 0), (0.7, 0.95), (-0.7, 0.95), (-0.1, 0)])
_BOLT = np.array([(0.15, -1), (-0.6, 0.15), (-0.08, 0.15), (-0.3, 1), (0.6, -0.25), (0.06, -0.25), (0.5, -1)])

# Outline in the unit disc, and the hole (if any) cut out of it.
_OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "circle": (_CIRCLE, None),
    "square": (_SQUARE, None),
    "triangle": (_regular(3), None),
    "star": (_regular(5, inner=0.42), None),
    "heart": (_heart(), None),
    "cross": (_CROSS, None),
    "ring": (_CIRCLE, _CIRCLE * 0.58),
    "moon": (_moon(), None),
    "arrow": (_ARROW, None),
    "flower": (_polar(0.7 + 0.3 * np.cos(6 * _CIRCLE_ANGLE), _CIRCLE_ANGLE), None),
    "hourglass": (_HOURGLASS, None),
    "bolt": (_BOLT, None),
}


def _soft(signed: np.ndarray) -> np.ndarray:
    """A threshold at 0 with a soft edge, for antialiasing."""
    return np.clip(0.5 + 2.5 * signed, 0, 1)


def _line(position: np.ndarray, width: float) -> np.ndarray:
    """1 on lines of `width` (a share of the period) at the integers, 0 between them."""
    return _soft(4 * (width / 2 - np.abs((position + 0.5) % 1 - 0.5)))


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    shifted = u / 2 + 0.5 * (np.floor(v) % 2)
    return np.maximum(_line(v, 0.22), _line(shifted, 0.12))


def _triangle_wave(x: np.ndarray) -> np.ndarray:
    return 2 * np.abs(x % 1 - 0.5)


_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda u, v: _soft(np.sin(2 * np.pi * u)),
    "checks": lambda u, v: _soft(2 * np.sin(np.pi * u) * np.sin(np.pi * v)),
    "dots": lambda u, v: _soft(3 * (0.32 - np.hypot(u % 1 - 0.5, v % 1 - 0.5))),
    "waves": lambda u, v: _soft(np.sin(2 * np.pi * (v + 0.35 * np.sin(np.pi * u)))),
    "bricks": _bricks,
    "zigzag": lambda u, v: _soft(np.sin(2 * np.pi * (v + 1.2 * _triangle_wave(u / 2)))),
    "grid": lambda u, v: np.maximum(_line(u, 0.22), _line(v, 0.22)),
}


def texture(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """A random rotation, phase and scale of stuff class `name`: (size, size) float32 blend weights in [0, 1]."""
    if name == "clouds":
        weight = np.zeros((size, size), np.float32)
        for cells, strength in ((size // 24, 1.0), (size // 10, 0.6)):
            noise = Image.fromarray(rng.standard_normal((cells + 1, cells + 1)).astype(np.float32))
            weight += strength * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        return np.asarray(np.clip(0.5 + 0.45 * weight, 0, 1))
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(10, 18)
    y, x = np.mgrid[:size, :size].astype(np.float32) / np.float32(period)
    phase_u, phase_v = rng.uniform(0, 8, 2)
    u = np.cos(angle) * x + np.sin(angle) * y + phase_u
    v = np.cos(angle) * y - np.sin(angle) * x + phase_v
    return _TEXTURES[name](u, v).astype(np.float32)


def coverage(rng: np.random.Generator, name: str, radius: float, centre: tuple[float, float], size: int) -> np.ndarray:
    """Share of each pixel that thing `name`, randomly turned, covers: (size, size) float32, centre (x, y) in pixels."""
    angle, mirror = rng.uniform(-MAX_TURN, MAX_TURN), rng.choice((-1, 1))
    scale = _SUPERSAMPLE
    canvas = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(canvas)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for outline, fill in zip(_OUTLINES[name], (255, 0), strict=True):
        if outline is not None:
            points = (outline * (mirror, 1) @ turn * radius + np.array(centre)) * scale
            draw.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    return np.asarray(canvas.reduce(scale), np.float32) / 255


def _colour(rng: np.random.Generator, brightness: tuple[float, float], taken: Sequence[np.ndarray] = ()) -> np.ndarray:
    """A random RGB colour with channels in the range `brightness`: of eight draws, the one least like those `taken`."""
    draws = rng.uniform(*brightness, (8, 3))
    if not taken:
        return draws[0]
    return draws[np.linalg.norm(draws[:, None] - np.stack(taken)[None], axis=2).min(axis=1).argmax()]


def _paint_stuff(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """A texture in two dark colours; the lighter one is drawn on the darker one."""
    ground = _colour(rng, STUFF_BRIGHTNESS)
    draws = rng.uniform(*STUFF_BRIGHTNESS, (8, 3))
    figure = draws[np.abs(np.linalg.norm(draws - ground, axis=1) - TEXTURE_CONTRAST).argmin()]
    if figure.sum() < ground.sum():
        ground, figure = figure, ground
    weight = texture(rng, name, size)[..., None]
    return weight * figure + (1 - weight) * ground


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light and sensor noise; returns uint8."""
    size = image.shape[0]
    ramp = np.linspace(-1, 1, size)
    slope_x, slope_y = rng.uniform(-0.12, 0.12, 2)
    light = 1 + slope_x * ramp[None, :, None] + slope_y * ramp[:, None, None]
    noisy = image * light + rng.standard_normal(image.shape, np.float32) * 0.02
    return np.asarray(np.clip(noisy * 255 + 0.5, 0, 255).astype(np.uint8))


def render_scene(
    rng: np.random.Generator, size: int = SIZE, names: Sequence[str] = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (size, size, 3) uint8 and mask (size, size) uint8 of class indices into CLASSES.

    No class but those of `names` occurs, among which one thing and two stuffs must be.
    """
    things, stuff = ([name for name in kind if name in names] for kind in (THINGS, STUFF))
    grounds = [stuff[index] for index in rng.choice(len(stuff), 2, replace=False)]
    stuff_images = [_paint_stuff(rng, name, size) for name in grounds]
    # A wavy border through a point near the middle.
    y, x = np.mgrid[:size, :size] / size - rng.uniform(0.35, 0.65, 2)[:, None, None]
    angle = rng.uniform(0, 2 * np.pi)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    side = across > rng.uniform(0, 0.1) * np.sin(2 * np.pi * (along * rng.uniform(1, 2) + rng.uniform()))
    image = np.where(side[..., None], *stuff_images)
    mask = np.where(side, *(CLASSES.index(name) for name in grounds)).astype(np.uint8)
    placed: list[tuple[float, float, float]] = []
    taken: list[np.ndarray] = []
    for _ in range(rng.integers(1, 6)):
        radius = rng.uniform(0.14, 0.25) * size
        for _attempt in range(10):
            cx, cy = rng.uniform(0.08 * size, 0.92 * size, 2)
            if all(np.hypot(cx - px, cy - py) > 0.75 * (radius + pr) for px, py, pr in placed):
                break
        else:
            continue
        placed.append((cx, cy, radius))
        thing = things[rng.integers(len(things))]
        cover = coverage(rng, thing, radius, (cx, cy), size)
        taken.append(_colour(rng, THING_BRIGHTNESS, taken))
        image = image + cover[..., None] * (taken[-1] - image)
        mask[cover > 0.5] = CLASSES.index(thing)
    return _finish(rng, image), mask


def render_concept(rng: np.random.Generator, index: int, size: int = SIZE) -> np.ndarray:
    """An image of one class, (size, size, 3) uint8: a thing on a plain background, or a texture all over."""
    if index >= len(THINGS):
        return _finish(rng, _paint_stuff(rng, CLASSES[index], size))
    image = np.broadcast_to(_colour(rng, STUFF_BRIGHTNESS), (size, size, 3))
    radius = rng.uniform(0.14, 0.25) * SIZE
    centre = tuple(rng.uniform(min(radius, size / 2), max(size - radius, size / 2), 2))
    cover = coverage(rng, THINGS[index], radius, centre, size)
    return _finish(rng, image + cover[..., None] * (_colour(rng, THING_BRIGHTNESS) - image))


def scene_rng(split: str, index: int) -> np.random.Generator:
    """The generator of image `index` of `split`; "pretrain" is the stream the embedded teacher learns from."""
    stream = [*SPLITS, "pretrain", "pretrain_eval"].index(split)
    return np.random.default_rng([RENDER_VERSION, stream, index])


def write_scenes(
    root: Path, progress: Callable[[int, int], None] | None = None, names: Sequence[str] = CLASSES
) -> None:
    """Renders the dataset below `root`: images/ID.png, masks/ID.png, splits/SPLIT.txt. About half a minute.

    `names`: the classes that may occur; masks hold indices into CLASSES all the same.

    The folder is rendered under another name and renamed at the end, so a kill leaves no incomplete dataset.
    """
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as aside:
        folder = Path(aside) / root.name
        for name in ("images", "masks", "splits"):
            (folder / name).mkdir(parents=True)
        done, total = 0, sum(SPLITS.values())
        for split, count in SPLITS.items():
            ids = [f"{split}-{index:05d}" for index in range(count)]
            for index, image_id in enumerate(ids):
                image, mask = render_scene(scene_rng(split, index), names=names)
                Image.fromarray(image).save(folder / "images" / f"{image_id}.png", compress_level=1)
                Image.fromarray(mask).save(folder / "masks" / f"{image_id}.png", compress_level=1)
                done += 1
                if progress:
                    progress(done, total)
            (folder / "splits" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        try:
            folder.rename(root)
        except OSError:
            if not root.exists():  # otherwise another process was first, with the same files
                raise
