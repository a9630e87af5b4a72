"""The embedded dataset: deterministic, exact masks, and colours that tell nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.load import resolve
from pipeline.data import scenes
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.scenes import CLASSES, SPLITS, STUFF, THINGS, coverage, render_scene, scene_rng, write_scenes
from tests.reference import NONE, Array

RENDERS = 400


@pytest.fixture(scope="module")
def renders() -> tuple[Array, Array]:
    """Images (N, 128, 128, 3) and masks (N, 128, 128) of the training split."""
    images, masks = zip(*(render_scene(scene_rng("train", i)) for i in range(RENDERS)), strict=True)
    return np.stack(images), np.stack(masks)


@pytest.mark.parametrize("size", [128, 64])
def test_a_render_is_its_generators(size: int) -> None:
    image, mask = render_scene(np.random.default_rng(5), size)
    assert image.shape == (size, size, 3) and mask.shape == (size, size)
    assert image.dtype == mask.dtype == np.uint8
    for found, expected in zip(render_scene(np.random.default_rng(5), size), (image, mask), strict=True):
        assert found.tobytes() == expected.tobytes()
    assert render_scene(np.random.default_rng(6), size)[0].tobytes() != image.tobytes()


def test_every_split_has_streams_of_its_own() -> None:
    """The embedded teacher never saw an image that the student trains or tests on."""
    streams = [*SPLITS, "pretrain", "pretrain_eval"]
    drawn = {scene_rng(split, index).bytes(16) for split in streams for index in range(50)}
    assert len(drawn) == 50 * len(streams)
    assert scene_rng("val", 3).bytes(16) == scene_rng("val", 3).bytes(16)


def test_classes_of_a_scene(renders: tuple[Array, Array]) -> None:
    """1-5 things over at most 2 kinds of stuff, all of CLASSES somewhere."""
    found = [np.unique(mask) for mask in renders[1]]
    assert set(np.concatenate(found)) == set(range(20))
    things = [int((classes < len(THINGS)).sum()) for classes in found]
    stuff = [int((classes >= len(THINGS)).sum()) for classes in found]
    assert min(things) == 1 and 4 <= max(things) <= 5
    assert set(stuff) <= {1, 2} and sum(stuff) > 1.9 * RENDERS
    counts = np.bincount(np.concatenate(found), minlength=20)
    assert counts.min() > RENDERS / 12  # no class is rare


def test_dataset_settings_are_the_renderers() -> None:
    dataset = resolve(dataset="scenes").dataset
    assert dataset.classes == CLASSES == THINGS + STUFF
    assert {split: files.count for split, files in dataset.splits.items()} == SPLITS
    assert len(dataset.unseen) >= 6
    assert set(dataset.unseen) & set(THINGS) and set(dataset.unseen) & set(STUFF)
    seen = set(dataset.classes) - set(dataset.unseen)
    assert seen & set(THINGS) and seen & set(STUFF)
    assert dataset.generator == "scenes" and dataset.ignore_index == (NONE,)


def inside(mask: Array) -> Array:
    """Pixels all of whose neighbours have the same class, without the outermost pixels."""
    same = np.ones((mask.shape[0] - 2, mask.shape[1] - 2), bool)
    for y in range(3):
        for x in range(3):
            same &= mask[y : y + same.shape[0], x : x + same.shape[1]] == mask[1:-1, 1:-1]
    return same


def test_masks_are_exact(renders: tuple[Array, Array]) -> None:
    """A thing has one colour: inside its mask neighbours are alike, and across the mask's border they are not."""
    within, across = [], []
    for image, mask in zip(*renders, strict=True):
        step = np.abs(image[1:-1, 1:-1].astype(int) - image[1:-1, 2:]).mean(axis=2)
        thing = mask[1:-1, 1:-1] < len(THINGS)
        flat = inside(mask) & thing
        within.append(step[flat])
        left, right = image[:, :-4].astype(int), image[:, 4:]
        border = (mask[:, :-4] != mask[:, 4:]) & (np.minimum(mask[:, :-4], mask[:, 4:]) < len(THINGS))
        across.append(np.abs(left - right).mean(axis=2)[border])
    assert (np.concatenate(within) > 25).mean() < 0.01
    assert (np.concatenate(across) > 25).mean() > 0.8


def regions(images: Array, masks: Array) -> tuple[Array, Array]:
    """Mean colours (M, 3) and classes (M,) of what each image shows of each class."""
    means, classes = [], []
    for image, mask in zip(images, masks, strict=True):
        for index in np.unique(mask):
            means.append(image[mask == index].mean(axis=0))
            classes.append(int(index))
    return np.array(means), np.array(classes)


@pytest.mark.parametrize("kind", [range(len(THINGS)), range(len(THINGS), len(CLASSES))], ids=["things", "stuff"])
def test_colour_does_not_tell_the_class(kind: range, renders: tuple[Array, Array]) -> None:
    """Within things and within stuff, the classes' mean colours in half of the images name the others by chance."""
    colours, classes = regions(*renders)
    chosen = np.isin(classes, kind)
    colours, classes = colours[chosen], classes[chosen]
    spread, half = colours.std(axis=0), len(colours) // 2
    assert spread.min() > 15
    means = np.stack([colours[classes == index].mean(axis=0) for index in kind])
    assert np.abs((means - colours.mean(axis=0)) / spread).max() < 0.5
    known, known_classes = colours[:half], classes[:half]
    centres = np.stack([known[known_classes == index].mean(axis=0) for index in kind])
    nearest = np.linalg.norm(colours[half:, None] - centres[None], axis=2).argmin(axis=1) + kind[0]
    assert (nearest == classes[half:]).mean() < 1 / len(kind) + 0.06


@pytest.mark.parametrize("name", THINGS)
def test_coverage(name: str) -> None:
    """A thing fills a part of its disc, and is turned and mirrored anew by each draw."""
    rng = np.random.default_rng(0)
    drawn = [coverage(rng, name, 20, (31, 33), 64) for _ in range(3)]
    y, x = np.mgrid[:64, :64] + 0.5
    for cover in drawn:
        assert cover.shape == (64, 64) and cover.dtype == np.float32 and cover.min() == 0 and cover.max() == 1
        share = cover.sum() / (np.pi * 20**2)
        assert 0.1 < share < 1
        assert cover[np.hypot(x - 31, y - 33) > 20 * 1.35].max() == 0
        assert name == "moon" or (cover[33, 31] < 0.5) == (name == "ring")
    assert coverage(np.random.default_rng(0), name, 20, (-90, 33), 64).max() == 0


@pytest.mark.parametrize("name", STUFF)
def test_textures_are_neither_flat_nor_noise(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        weights = scenes.texture(rng, name, 64)
        assert weights.shape == (64, 64) and weights.min() >= 0 and weights.max() <= 1
        assert weights.std() > 0.15 and np.abs(np.diff(weights, axis=0)).mean() < weights.std()


@pytest.mark.parametrize("names", [("moon", "grid", "waves"), ("dots", "clouds", "bolt", "circle", "checks")])
def test_scenes_of_some_classes_alone(names: tuple[str, ...]) -> None:
    masks = [render_scene(np.random.default_rng(index), 48, names)[1] for index in range(30)]
    assert {CLASSES[index] for index in np.unique(np.stack(masks))} == set(names)


@pytest.mark.parametrize("index", range(20))
def test_render_concept(index: int) -> None:
    image = scenes.render_concept(np.random.default_rng(index), index, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    splits = {"train": 3, "holdout": 1, "val": 2}
    monkeypatch.setattr(scenes, "SPLITS", splits)
    yield splits


def test_written_scenes_are_an_ordinary_dataset(small: dict[str, int], tmp_path: Path) -> None:
    config = resolve(dataset="scenes").dataset
    counted = {split: files.model_copy(update={"count": small[split]}) for split, files in config.splits.items()}
    config = config.model_copy(update={"splits": counted})
    for split, count in small.items():
        dataset = SegmentationDataset(config, tmp_path / "data", split)
        assert len(dataset) == count and len(set(dataset.ids)) == count
        for row in range(count):
            for found, expected in zip(dataset.pair(row), render_scene(scene_rng(split, row)), strict=True):
                np.testing.assert_array_equal(found, expected, strict=True)
    root = tmp_path / "data" / "scenes"
    assert len(list(root.rglob("*.png"))) == 2 * 6 and len(list(root.rglob("*"))) == 2 * 6 + 3 + 3
    assert {path.name for path in root.parent.iterdir()} == {"scenes"}


def snapshot(root: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("the power was cut")


@pytest.mark.usefixtures("small")
def test_scenes_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    root = tmp_path / "deep" / "below" / "scenes"
    write_scenes(root, lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]
    before = snapshot(root)
    monkeypatch.setattr(scenes, "render_scene", fail)
    write_scenes(root, lambda *call: calls.append(call))
    assert snapshot(root) == before and len(calls) == 6


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_failure_leaves_nothing_to_trust(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data" / "scenes"
    rendered = 0

    def render(rng: np.random.Generator, **_: object) -> tuple[Array, Array]:
        nonlocal rendered
        if rendered == after:
            fail()
        rendered += 1
        return render_scene(rng, 32)

    monkeypatch.setattr(scenes, "render_scene", render)
    with pytest.raises(RuntimeError, match="the power was cut"):
        write_scenes(root)
    assert list(root.parent.iterdir()) == []
    rendered = -1_000
    write_scenes(root)
    assert len(list(root.rglob("*.png"))) == 12
    Image.open(root / "images" / "val-00001.png").load()


@pytest.mark.usefixtures("small")
def test_another_process_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finished while this one rendered: its files stay, and nothing is left beside them."""
    root = tmp_path / "scenes"

    def render(rng: np.random.Generator, **_: object) -> tuple[Array, Array]:
        root.mkdir(exist_ok=True)
        (root / "theirs").touch()
        return render_scene(rng, 32)

    monkeypatch.setattr(scenes, "render_scene", render)
    write_scenes(root)
    assert [path.name for path in root.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
