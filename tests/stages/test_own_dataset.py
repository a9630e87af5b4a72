"""A stranger's dataset, described as the README says, goes through every verb: pictures of any kind and size."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.reader import open_cache
from pipeline.data.scenes import CLASSES, render_scene
from tests.conftest import ROOT, World, write_teacher

SIZE = 64
KINDS = ("L", "RGBA", "P", "CMYK", "EXIF", "LA", "1", "RGB")
SHORT = [
    "--set=teacher.model=tiny-vit.json", "--set=teacher.pretrained=tiny-vit.safetensors", f"--set=views.size={SIZE}",
    "--set=views.count=2", "--set=storage.shard_images=3",
]  # fmt: skip
TRAIN = [
    "--set=student.model=timm:tf_efficientnet_lite0", "--set=student.weights=none", "--set=student.channels=16",
    "--set=train.iterations=2", "--set=train.batch_size=3", "--set=train.workers=0", "--set=loss.label_stride=2",
]  # fmt: skip


def readme_yaml() -> str:
    """The YAML that the README shows for one's own dataset."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "my-photos" in block)


def save(image: np.ndarray, kind: str, folder: Path, name: str) -> None:
    picture = Image.fromarray(image)
    if kind == "EXIF":  # stored turned: shown upright by its orientation
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(folder / f"{name}.jpg", exif=exif)
    elif kind == "CMYK":
        picture.convert("CMYK").save(folder / f"{name}.JPEG")
    elif kind == "L":
        picture.convert("L").save(folder / f"{name}.bmp")
    else:
        picture.convert(kind).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> World:
    """my-photos.yaml, its names.txt and data/my-photos: 8 training pictures of every kind and size, 3 to test on."""
    world = World(tmp_path_factory.mktemp("own"))
    root = world.data / "my-photos"
    (root / "photos").mkdir(parents=True)
    (root / "masks").mkdir()
    write_teacher(world.folder)
    text = readme_yaml()
    text = text.replace("[cow, grass]", "[dots, clouds]").replace("{cow: [cow, bull, calf]}", "{dots: [dots, points]}")
    (world.folder / "my-photos.yaml").write_text(text)
    (world.folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    for split, count in (("train", len(KINDS)), ("val", 3)):
        for index in range(count):
            rng = np.random.default_rng([count, index])
            scene, mask = render_scene(rng, 96)
            width, height = rng.integers(20, 200, 2).tolist()
            image = np.asarray(Image.fromarray(scene).resize((width, height)))
            save(image, KINDS[index], root / "photos", f"{split}{index}")
            Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST).save(
                root / "masks" / f"{split}{index}.png"
            )
        (root / f"{split}.txt").write_text("".join(f"{split}{index}\n" for index in range(count)))
    return world


def test_the_readmes_yaml_is_short() -> None:
    assert len(readme_yaml().splitlines()) <= 15


def test_every_verb(own: World) -> None:
    assert own.run("datasets", "check", "my-photos.yaml").returncode == 0
    own.run("precompute", "--dataset", "my-photos.yaml", "--cache", "caches/own", *SHORT)
    cache = open_cache(own.folder / "caches" / "own")
    assert cache.image_ids == [f"train{index}" for index in range(len(KINDS))]
    assert cache.load("pseudo_labels").shape == (len(KINDS), 2, 8, 8)
    own.run("train", "--cache", "caches/own", "--run", "runs/own", *TRAIN)
    own.run("evaluate", "--run", "runs/own", "--json", "scores.json")
    scores = json.loads((own.folder / "scores.json").read_text())
    assert set(scores["iou"]) == set(CLASSES)
    assert 0 <= scores["pixel_accuracy"] <= 100
    sliding = ("--set", "evaluate.mode=slide", "--set", "evaluate.stride=40")
    own.run("evaluate", "--run", "runs/own", *sliding)
    picture = own.folder / "regions.png"
    shown = own.run("inspect-pseudolabels", "--cache", "caches/own", "--terminal", "--png", picture)
    assert "train0" in shown.stdout
    assert Image.open(picture).size[0] > 4 * SIZE


def test_a_cache_outlives_another_split(own: World) -> None:
    """A test split is added and the data moved after stage one: the cache is still good."""
    text = (own.folder / "my-photos.yaml").read_text() + "root: elsewhere\n"
    test_split = "  test: {images: 'x/{id}.png', masks: 'y/{id}.png'}\n"
    (own.folder / "more.yaml").write_text(text.replace("  val:", f"{test_split}  val:"))
    more = ("--dataset", "more.yaml", "--data-root", "data/my-photos")
    assert "nothing to do" in own.run("precompute", *more, "--cache", "caches/own", *SHORT).stderr
    own.run("train", *more, "--cache", "caches/own", "--run", "runs/more", *TRAIN)
    lacking = ("train", *more, "--cache", "caches/own", "--run", "runs/lacking", *TRAIN, "--set", "views.count=3")
    assert "views.count: cache 2, asked 3" in own.fails(*lacking)
    (own.folder / "bank.yaml").write_text("loss: {bank: 1}\n")  # names no dataset: that of the cache
    own.run("train", "--config", "bank.yaml", "--run", "runs/bank", *TRAIN)
    assert "bank: 1" in (own.folder / "runs" / "bank" / "config.yaml").read_text()


def test_other_words_for_the_same_classes(own: World) -> None:
    """New prompts ask the text tower; the classes stay seen and unseen."""
    arguments = ("evaluate", "--run", "runs/own", "--json", "words.json")
    before = len(list((own.folder / "caches" / "text").glob("my-photos-*")))
    own.run(*arguments, "--set", "dataset.prompts.star=[sun, asterisk]")
    assert len(list((own.folder / "caches" / "text").glob("my-photos-*"))) == before + 1
    found = json.loads((own.folder / "words.json").read_text())
    assert found["dataset"] == "my-photos" and found["miou_unseen"] is not None
    assert "NaN" not in (own.folder / "words.json").read_text()


def test_another_dataset_is_scored_by_its_own_names(own: World) -> None:
    """Cross-dataset: other classes, no seen or unseen ones; the text features are made once and kept."""
    root = own.data / "shapes"
    (root / "i").mkdir(parents=True)
    (root / "m").mkdir()
    for index in range(2):
        image, mask = render_scene(np.random.default_rng(index), 70)
        Image.fromarray(image).save(root / "i" / f"{index}.png")
        Image.fromarray((mask >= 12).astype(np.uint8)).save(root / "m" / f"{index}.png")
    (own.folder / "shapes.yaml").write_text(
        "name: shapes\nsplits: {val: {images: 'i/{id}.png', masks: 'm/{id}.png'}}\nclasses: [thing, stuff]\n"
        "prompts: {stuff: [texture, pattern]}\nunseen: [stuff]\n"
    )
    arguments = ("evaluate", "--run", "runs/own", "--dataset", "shapes.yaml", "--json", "cross.json")
    first = own.run(*arguments)
    assert "mIoU" in first.stdout and "unseen" not in first.stdout
    features = list((own.folder / "caches" / "text").glob("shapes-*.safetensors"))
    assert len(features) == 1
    before = json.loads((own.folder / "cross.json").read_text())
    assert before["dataset"] == "shapes" and before["hiou"] is None
    assert before["miou"] == pytest.approx(np.mean([iou for iou in before["iou"].values() if iou is not None]))
    written = features[0].stat().st_mtime_ns
    own.run(*arguments)
    assert json.loads((own.folder / "cross.json").read_text()) == before
    assert features[0].stat().st_mtime_ns == written


def test_a_broken_image_stops_or_is_left_out(own: World) -> None:
    """`skip` lists it in the manifest; training and inspection leave it out."""
    listing = own.data / "my-photos" / "train.txt"
    whole = listing.read_text()
    broken = own.data / "my-photos" / "photos" / "broken.png"
    broken.write_bytes((own.data / "my-photos" / "photos" / "train1.png").read_bytes()[:120])
    listing.write_text(f"train0\nbroken\nabsent\n{whole.partition(chr(10))[2]}")
    try:
        arguments = ("precompute", "--dataset", "my-photos.yaml", "--cache", "caches/broken", *SHORT)
        assert "photos/broken.png" in own.fails(*arguments)
        done = own.run(*arguments, "--on-error", "skip")
        assert "2 images were skipped" in done.stderr
        manifest = json.loads((own.folder / "caches" / "broken" / "manifest.json").read_text())
        assert set(manifest["skipped"]) == {"broken", "absent"}
        assert "photos/broken.png" in manifest["skipped"]["broken"]
        cache = open_cache(own.folder / "caches" / "broken")
        assert cache.kept_rows.tolist() == [0, 3, 4, 5, 6, 7, 8, 9]
        assert (cache.load("pseudo_labels")[1:3] == 255).all()
        own.run("train", "--cache", "caches/broken", "--run", "runs/broken", *TRAIN, "--set", "train.iterations=8")
        assert "left out" in own.fails("inspect-pseudolabels", "--cache", "caches/broken", "--image", "broken")
        own.run("inspect-pseudolabels", "--cache", "caches/broken", "--count", "99")
        again = own.run(*arguments)
        assert "nothing to do" in again.stderr and "2 images were skipped" in again.stderr
    finally:
        listing.write_text(whole)
