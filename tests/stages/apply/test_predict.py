"""Own photos, own words: what is asked of CLIP, what is written, and photos of every kind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import stages.apply.predict
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.photos import find_photos, read_photo
from pipeline.data.scenes import CLASSES, render_scene
from pipeline.data.views import normalise
from pipeline.teacher.clip import FrozenClip
from stages.apply.predict import Segmenter, cls_attention, coco_rle, predict
from stages.apply.predictor import Predictor, student_predictor
from stages.apply.words import parse_words, read_words
from tests.conftest import SIZE, World

UNSEEN = ("heart", "ring", "arrow", "dots", "bricks", "clouds")  # of the world


@pytest.fixture(scope="module")
def segmenter(trained: Path) -> Segmenter:
    """Its class features are at right angles to the mean feature: else so short a training finds one class only."""
    made = Segmenter.load(trained, "cpu")
    student = made.run.student
    with torch.inference_mode():
        mean = student(normalise(scene(0)[None], student.mean, student.std)).mean(dim=(0, 2, 3))
        random = torch.randn(made.run.text_features.shape, generator=torch.Generator().manual_seed(0))
        random -= (random @ mean)[:, None] * mean / mean.square().sum()
    made.run.text_features = torch.nn.functional.normalize(random, dim=1)
    return made


@pytest.fixture
def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("CLIP is not needed")

    monkeypatch.setattr(FrozenClip, "__init__", refuse)


def scene(seed: int, size: int = SIZE) -> np.ndarray:
    return render_scene(np.random.default_rng(seed), size)[0]


def slow_logits(segmenter: Segmenter, image: np.ndarray, features: torch.Tensor) -> np.ndarray:
    """R . T less spread (K, H, W) of the whole image, upsampled: for images as large as views.size."""
    student = segmenter.run.student
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        logits = torch.einsum("bchw,kc->bkhw", student(pixels[None]), features)
        logits -= torch.einsum("kc,cd,kd->k", features, student.spread, features).sqrt()[:, None, None]
        return torch.nn.functional.interpolate(logits, size=image.shape[:2], mode="bilinear")[0].numpy()


def test_training_classes_need_no_clip(segmenter: Segmenter, no_clip: None) -> None:
    image, unseen = scene(0), [CLASSES.index(name) for name in UNSEEN]
    for rows in ([3, 0, CLASSES.index("heart")], [CLASSES.index("heart"), 5, 7], list(range(len(CLASSES)))):
        features, hidden = segmenter.run.text_features[rows], np.isin(rows, unseen)
        logits = slow_logits(segmenter, image, features)
        gamma = float(np.median(logits[~hidden].max(axis=0) - logits[hidden].max(axis=0)))  # both sides win somewhere
        wanted = (logits - gamma * ~hidden[:, None, None]).argmax(axis=0)
        assert 0.1 < np.isin(wanted, np.flatnonzero(hidden)).mean() < 0.9
        found = Segmenter(segmenter.run, gamma)(image, None if len(rows) > 3 else [CLASSES[row] for row in rows])
        assert found.dtype == np.uint8 and (found == wanted).mean() > 0.999


def test_what_the_training_classes_win_is_none_of_these(segmenter: Segmenter, no_clip: None) -> None:
    """A pixel is 255 where a training class that was not asked for has the highest logit."""
    image = scene(0)
    for asked in (["heart"], [CLASSES[3], "heart", CLASSES[0]], list(CLASSES)):
        rows = [CLASSES.index(name) for name in asked]
        rows += [row for row in range(len(CLASSES)) if row not in rows]
        logits = slow_logits(segmenter, image, segmenter.run.text_features[rows])
        hidden = np.isin(rows, [CLASSES.index(name) for name in UNSEEN])
        gamma = float(np.median(logits[~hidden].max(axis=0) - logits[hidden].max(axis=0)))
        wanted = (logits - gamma * ~hidden[:, None, None]).argmax(axis=0)
        wanted[wanted >= len(asked)] = 255
        found = Segmenter(segmenter.run, gamma)(image, asked, others=True)
        assert found.dtype == np.uint8 and (found == wanted).mean() > 0.999
        assert (found == 255).any() == (len(asked) < len(CLASSES))
    words = segmenter.vocabulary([CLASSES[3], "heart"], others=True)
    assert words.names == (CLASSES[3], "heart") and len(words.features) == len(CLASSES)


def test_a_synonym_does_not_compete_with_its_own_class(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where the new words are kept
    words = segmenter.vocabulary([f"something|{CLASSES[0]}", "heart"], others=True)
    assert len(words.features) == len(CLASSES)  # two asked for, and all others but CLASSES[0] and heart
    assert not any(torch.equal(row, segmenter.run.text_features[0]) for row in words.features)


def test_none_of_these_in_what_predict_writes(world: World, trained: Path, tmp_path: Path) -> None:
    Image.fromarray(scene(0)).save(tmp_path / "photo.png")
    world.run("predict", tmp_path / "photo.png", "--run", trained, "--classes", "heart", "--others", "--rle",
              "--output", tmp_path / "found", "--gamma", "0")  # fmt: skip
    mask = np.asarray(Image.open(tmp_path / "found" / "photo.png.mask.png"))
    assert set(np.unique(mask)) <= {0, 255} and (mask == 255).any()
    written = json.loads((tmp_path / "found" / "photo.png.rle.json").read_text())
    assert [one["category_name"] for one in written] == ["heart"] * bool((mask == 0).any())


def test_a_thousand_words(segmenter: Segmenter, no_clip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of 16 bits, in the file too; a legend and run lengths of the words that were found."""
    words, rng = [f"word {index}" for index in range(1000)], np.random.default_rng(0)
    features = rng.normal(size=(1000, segmenter.run.text_features.shape[1])).astype(np.float32)
    features = torch.nn.functional.normalize(torch.from_numpy(features), dim=1)

    def of_words(config: Config, asked: list[tuple[str, ...]], *_: object) -> list[np.ndarray]:
        return [features[[words.index(name)]].numpy() for (name,) in asked]

    monkeypatch.setattr("stages.apply.words.word_features", of_words)
    image = scene(0)
    for others in (False, True):
        rows = torch.cat([features, segmenter.run.text_features]) if others else features
        logits, hidden = slow_logits(segmenter, image, rows), np.arange(len(rows)) < 1000
        hidden[[1000 + CLASSES.index(name) for name in UNSEEN] if others else []] = True
        gamma = float(np.median(logits[~hidden].max(axis=0) - logits[hidden].max(axis=0))) if others else 0.0
        wanted = (logits - gamma * ~hidden[:, None, None]).argmax(axis=0)
        wanted[wanted >= 1000] = 65535
        own = Segmenter(segmenter.run, gamma)
        found = own(image, words, others=others)
        assert found.dtype == np.uint16 and (found == wanted).mean() > 0.999
        assert (found == 65535).any() == others and (found > 255).any()
        Image.fromarray(image).save(tmp_path / "a.png")
        predict(own, [tmp_path / "a.png"], words, tmp_path / "out", rle=True, others=others)
        with Image.open(tmp_path / "out" / "a.png.mask.png") as written:
            assert written.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(written), found)
        lengths = json.loads((tmp_path / "out" / "a.png.rle.json").read_text())
        assert [one["category_name"] for one in lengths] == [words[i] for i in np.unique(found) if i < 1000]
        for one in lengths:
            np.testing.assert_array_equal(coco.decode(one["segmentation"]), found == one["category_id"])
        with Image.open(tmp_path / "out" / "a.png.overlay.png") as shown:
            assert shown.height == SIZE + 24 * -(-len(np.unique(found)) // 4) + 6  # the legend has what was found


def test_new_words_are_encoded_together(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    passes = []
    encode = FrozenClip.text_features

    def counted(self: FrozenClip, names: list[tuple[str, ...]], templates: str) -> torch.Tensor:
        passes.append(len(names))
        return encode(self, names, templates)

    monkeypatch.setattr(FrozenClip, "text_features", counted)
    first = Segmenter(segmenter.run).vocabulary(["cow|bull", "grass", "sky"])
    more = Segmenter(segmenter.run).vocabulary(["river", "sky", "cow|bull", "road"])
    assert passes == [3, 2]
    torch.testing.assert_close(more.features[[2, 1]], first.features[[0, 2]])
    alone = Segmenter(segmenter.run).vocabulary(["road"]).features
    torch.testing.assert_close(alone, more.features[[3]])


def test_a_training_class_that_is_any_of_several_words(segmenter: Segmenter, no_clip: None) -> None:
    """The best of its channels counts, asked for or as one of the others."""
    run, image = segmenter.run, scene(2)
    prompts = {"heart": {"any": ["heart", "love", "valentine"]}}
    dataset = run.config.dataset.model_validate(run.config.dataset.model_dump() | {"prompts": prompts})
    place, drawn = CLASSES.index("heart"), np.random.default_rng(1).normal(size=(2, run.text_features.shape[1]))
    more = torch.nn.functional.normalize(torch.from_numpy(drawn.astype(np.float32)), dim=1)
    features = torch.cat([run.text_features[: place + 1], more, run.text_features[place + 1 :]])
    changed = replace(run, config=run.config.model_copy(update={"dataset": dataset}), text_features=features)
    for asked in ([*CLASSES], ["heart", CLASSES[0]], [CLASSES[0], CLASSES[5]]):
        rows = [CLASSES.index(name) for name in asked]
        rows += [row for row in range(len(CLASSES)) if row not in rows]
        logits = slow_logits(segmenter, image, run.text_features[rows])
        extra = slow_logits(segmenter, image, more).max(axis=0)
        logits[rows.index(place)] = np.maximum(logits[rows.index(place)], extra)
        wanted = logits.argmax(axis=0)
        assert (wanted == rows.index(place)).any()
        found = Segmenter(changed, 0.0)(image, asked, others=True)
        assert (found == np.where(wanted < len(asked), wanted, 255)).mean() > 0.999


def test_gamma_moves_pixels_to_the_unseen_classes(segmenter: Segmenter, no_clip: None) -> None:
    image = scene(1)
    words = [CLASSES[0], "heart"]
    assert (Segmenter(segmenter.run, gamma=1e6)(image, words) == 1).all()
    assert (Segmenter(segmenter.run, gamma=-1e6)(image, words) == 0).all()


def test_new_words_meet_the_text_tower_once(
    segmenter: Segmenter, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["cow|bull|calf", CLASSES[2], "grass"]
    found = Segmenter(segmenter.run).vocabulary(words)
    teacher = FrozenClip(segmenter.run.config.teacher)
    templates = segmenter.run.config.dataset.templates
    new = teacher.text_features([["cow", "bull", "calf"], ["grass"]], templates)
    wanted = torch.stack([new[0], segmenter.run.text_features[2], new[1]])
    torch.testing.assert_close(found.features, wanted)
    assert found.names == ("cow", CLASSES[2], "grass") and found.seen == [1] and found.unseen == [0, 2]

    def refuse(*_: object) -> None:
        raise AssertionError("the features are kept")

    monkeypatch.setattr(FrozenClip, "__init__", refuse)
    torch.testing.assert_close(Segmenter(segmenter.run).vocabulary(words).features, wanted)


def test_a_word_is_kept_whatever_list_it_was_in(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loads = []
    load = FrozenClip.__init__

    def counted(self: FrozenClip, *arguments: object) -> None:
        loads.append(arguments)
        load(self, *arguments)

    monkeypatch.setattr(FrozenClip, "__init__", counted)
    first = Segmenter(segmenter.run).vocabulary(["cow", "grass", "sky"])
    assert len(loads) == 1
    other = Segmenter(segmenter.run).vocabulary(["sky", "cow"])
    assert len(loads) == 1 and torch.equal(other.features, first.features[[2, 0]])
    Segmenter(segmenter.run).vocabulary(["cow|bull", "sky"])
    assert len(loads) == 2


def test_one_text_is_no_list_of_words(segmenter: Segmenter, no_clip: None) -> None:
    with pytest.raises(UserError, match=r"such as \['star'\]"):
        segmenter(scene(0), "star")


def test_a_class_of_the_training_by_other_names_is_new(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = segmenter.vocabulary([f"{CLASSES[0]}|something else", "heart"])
    assert not torch.allclose(found.features[0], segmenter.run.text_features[0])
    assert found.seen == [0]  # it is that class still


@pytest.mark.parametrize(
    ("classes", "message"),
    [("cow,,grass", "'' must not be empty"), ("cow|", "'' must not be empty"), ("cow, cow", "is listed twice"),
     ("", "'' must not be empty"), (",".join(map(str, range(65536))), "65,536 classes; give 1 to 65,535")],
)  # fmt: skip
def test_wrong_words(classes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_words(read_words(classes))


def test_words_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cow|bull\n\n grass \n")
    wanted = {"cow": ("cow", "bull"), "grass": ("grass",)}
    assert parse_words(read_words(str(tmp_path / "names.txt"))) == wanted
    assert parse_words(read_words("cow|bull\ngrass")) == wanted  # "$(cat names.txt)"
    (tmp_path / "windows.txt").write_bytes("\ufeffcow|bull\r\ngrass\r\n".encode())
    assert parse_words(read_words(str(tmp_path / "windows.txt"))) == wanted
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="0 classes"):
        parse_words(read_words(str(tmp_path / "empty.txt")))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad\.txt is not a UTF-8 text file"):
        read_words(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (4, 4), (1, 9), (9, 1)])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_run_lengths(shape: tuple[int, int], classes: int) -> None:
    mask = np.random.default_rng([*shape, classes]).integers(0, classes, shape).astype(np.uint8)
    found = coco_rle(mask, [f"class {index}" for index in range(classes)])
    assert [entry["category_id"] for entry in found] == sorted(set(mask.ravel().tolist()))
    for entry in json.loads(json.dumps(found)):
        inside = mask == entry["category_id"]
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), inside)
        assert entry["area"] == inside.sum() and entry["category_name"] == f"class {entry['category_id']}"
        left, top, width, height = map(int, entry["bbox"])
        box = np.zeros(shape, bool)
        box[top : top + height, left : left + width] = True
        assert not (inside & ~box).any()
        assert inside[top].any() and inside[top + height - 1].any()
        assert inside[:, left].any() and inside[:, left + width - 1].any()


def odd_photos(folder: Path) -> dict[str, tuple[int, int]]:
    """Photos of every kind, and their (width, height)."""
    picture = Image.fromarray(scene(5, 48)).resize((48, 36))
    made: dict[str, tuple[int, int]] = {}

    def save(name: str, image: Image.Image, **options: object) -> None:
        image.save(folder / name, **options)
        made[name] = image.size

    for mode in ("L", "LA", "RGBA", "P", "1", "RGB"):
        save(f"{mode}.png", picture.convert(mode))
    for mode in ("CMYK", "L", "RGB"):
        save(f"{mode}.jpg", picture.convert(mode))
    save("YCbCr.tif", picture.convert("YCbCr"))
    save("LAB.tif", picture.convert("LAB"))
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    save("16-bit.png", Image.fromarray(grey))
    save("16-bit.tif", Image.fromarray(grey))
    save("palette.gif", picture.convert("P"))
    save("animated.gif", picture, save_all=True, append_images=[picture.rotate(90)] * 2)
    save("clear.gif", picture.convert("P"), transparency=3)
    save("phone.HEIC", picture, format="HEIF")
    for name in ("photo.webp", "photo.bmp", "photo.tiff", "photo.ppm", "photo.tga", "photo.ico", "photo.jp2"):
        save(name, picture.resize((32, 32)))
    save("dot.png", picture.resize((1, 1)))
    save("line.png", picture.resize((300, 1)))
    save("column.png", picture.resize((1, 300)))
    save("UPPER.JPG", picture)
    save("a name with spaces & <b>.png", picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", picture, exif=exif)
    made["turned.jpg"] = picture.size[::-1]
    return made


BROKEN = {"empty.jpg": b"", "text.png": b"not an image", "cut.png": None, "header.gif": b"GIF89a", "float.tif": None}


def test_odd_photos_give_a_result_or_a_line(world: World, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    made = odd_photos(folder)
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data or b"")
    whole = (folder / "RGB.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.random.default_rng(0).random((9, 9), np.float32)).save(folder / "float.tif")
    (folder / "notes.txt").write_text("no photo")
    done = world.run("predict", folder, "--run", trained, "--output", tmp_path / "out", "--rle", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == len(BROKEN) and all(any(name in line for line in lines) for name in BROKEN)
    assert "5 photos failed" in done.stderr
    for name, size in made.items():
        mask = Image.open(tmp_path / "out" / f"{name}.mask.png")
        assert mask.size == size and mask.mode == "P" and np.asarray(mask).max() < len(CLASSES)
        overlay = Image.open(tmp_path / "out" / f"{name}.overlay.png")
        assert overlay.width >= min(size) and overlay.height > size[1]
        (first, *_) = json.loads((tmp_path / "out" / f"{name}.rle.json").read_text())
        assert first["segmentation"]["size"] == [size[1], size[0]]
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {f"{name}{end}" for name in made for end in (".mask.png", ".overlay.png", ".rle.json")}


def test_nothing_stands_that_is_of_another_time(world: World, trained: Path, tmp_path: Path) -> None:
    """Another answer about the same photo replaces all of the first; no photo, no results."""
    photo, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(scene(0)).save(photo)
    world.run("predict", photo, "--run", trained, "--output", out, "--rle")
    (out / "a.png.notes").touch()  # the user's
    done = world.run("predict", photo, "--run", trained, "--output", out)
    assert f"results: {out}" in done.stdout
    assert sorted(file.name for file in out.iterdir()) == ["a.png.mask.png", "a.png.notes", "a.png.overlay.png"]
    photo.write_bytes(b"no photo any more")
    done = world.run("predict", photo, "--run", trained, "--output", out, check=False)
    assert done.returncode == 2 and not done.stdout and "the others are done" not in done.stderr
    assert [file.name for file in out.iterdir()] == ["a.png.notes"]


def test_shares_of_each_mask(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[int, str]] = []
    monkeypatch.setattr(stages.apply.predict, "legend", lambda names, *_: told.append(dict(names)))
    words = segmenter.vocabulary([CLASSES[2], CLASSES[0], CLASSES[1], CLASSES[5]])
    first, second = np.zeros((20, 20), np.uint8), np.full((20, 20), 2, np.uint8)
    first[0, 0], second[:10] = 3, 0
    stages.apply.predict._legend([first, second], words)
    assert told[0] == {0: f"{CLASSES[2]} 100, 50 %", 2: f"{CLASSES[1]} 0, 50 %", 3: f"{CLASSES[5]} < 1, 0 %"}
    assert list(told[0]) == [0, 2, 3]


def test_pixels_as_people_see_them(tmp_path: Path) -> None:
    grey = np.array([[0, 255 * 256, 256]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "16.png")
    assert read_photo(tmp_path / "16.png")[0].tolist() == [[0] * 3, [255] * 3, [1] * 3]
    clear = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png")[0].tolist() == [[255] * 3, [10, 20, 30]]


def test_a_photo_larger_than_a_mask_is_made(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    image = scene(2, 128)
    whole = segmenter(image)
    monkeypatch.setattr("stages.apply.predict.MOST_PIXELS", 64 * 64)
    small = segmenter(image)
    assert small.shape == whole.shape == (128, 128)
    assert (small[::2, ::2] == small[1::2, 1::2]).all()
    assert 0.8 < (small == whole).mean() < 1


def test_compare_and_attention(world: World, trained: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    Image.fromarray(scene(3)).resize((90, 64)).save(tmp_path / "a.png")
    world.run("predict", tmp_path / "a.png", "--run", trained, "--classes", f"{CLASSES[0]}, heart", "--output",
              tmp_path / "out", "--compare", "--attention")  # fmt: skip
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {f"a.png.{kind}.png" for kind in ("mask", "overlay", "compare", "attention")}
    assert Image.open(tmp_path / "out" / "a.png.attention.png").size == (90, 64)
    weights = cls_attention(segmenter.run, FrozenClip(segmenter.run.config.teacher), scene(3))
    assert weights.sum() == pytest.approx(1, abs=1e-5) and weights.min() >= 0
    with torch.inference_mode():
        student, teacher = segmenter.run.student, FrozenClip(segmenter.run.config.teacher)

        def normalised(of: object) -> torch.Tensor:
            return (torch.from_numpy(scene(3)) / 255 - torch.tensor(of.mean)).div(torch.tensor(of.std)).permute(2, 0, 1)

        features, query = student(normalised(student)[None])[0], teacher.encode(normalised(teacher)[None])[0][0]
    wanted = np.exp([[float(features[:, y, x] @ query) / 4 for x in range(16)] for y in range(16)])  # C = 16
    np.testing.assert_allclose(weights, wanted / wanted.sum(), rtol=1e-3)


def test_the_teacher_beside_it_is_asked_for_the_same_features(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the run, which may come of a file or of other prompts than the class's name."""
    asked = []

    def dense_predictor(teacher: FrozenClip, features: torch.Tensor, config: Config, classes: list[int]) -> Predictor:
        asked.append(features)
        assert classes == [0, 1]
        return student_predictor(segmenter.run.student, features, config)

    monkeypatch.setattr(stages.apply.predict, "dense_predictor", dense_predictor)
    Image.fromarray(scene(3)).save(tmp_path / "a.png")
    predict(segmenter, [tmp_path / "a.png"], [CLASSES[4], CLASSES[1]], tmp_path / "out", compare=True)
    assert torch.equal(asked[0], segmenter.run.text_features[[4, 1]])


def test_an_open_picture_is_read_like_its_file(segmenter: Segmenter, no_clip: None, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(scene(4)[:40]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(scene(4)[..., 0].astype(np.uint16) * 257).save(tmp_path / "16.png")
    clear = np.dstack([scene(4), np.where(np.arange(SIZE) < 30, 0, 255)[:, None] * np.ones((1, SIZE))])
    Image.fromarray(clear.astype(np.uint8)).save(tmp_path / "clear.png")
    for name in ("turned.png", "16.png", "clear.png"):
        with Image.open(tmp_path / name) as picture:
            np.testing.assert_array_equal(segmenter(picture), segmenter(tmp_path / name), strict=True)


@pytest.mark.parametrize("image", [scene(0)[..., 0], scene(0) / 255, scene(0)[..., [0, 0, 1, 2]], scene(0)[:0]])
def test_an_array_that_is_no_image_is_named(segmenter: Segmenter, no_clip: None, image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"an image array must be \(H, W, 3\) uint8"):
        segmenter(image)


def test_a_folder_of_photos_has_other_things_too(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.webp", "film.mpg", "scan.pdf", "notes.txt", "a.webp.mask.png", "a.webp.overlay.png"):
        (tmp_path / name).touch()
    assert find_photos([tmp_path]) == [tmp_path / "a.webp", tmp_path / "b.JPG"]


def test_what_cannot_be_found(world: World, trained: Path, tmp_path: Path) -> None:
    assert "no such photo" in world.fails("predict", tmp_path / "none.jpg", "--run", trained)
    (tmp_path / "empty").mkdir()
    assert "contains no readable photo" in world.fails("predict", tmp_path / "empty", "--run", trained)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(scene(0)).save(tmp_path / folder / "same.png")
    assert "2 photos are named same.png" in world.fails("predict", tmp_path / "one", tmp_path / "two", "--run", trained)
    assert find_photos([tmp_path / "one", tmp_path / "two" / "same.png"]) == [
        tmp_path / "one" / "same.png", tmp_path / "two" / "same.png",
    ]  # fmt: skip
