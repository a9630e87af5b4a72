"""The test protocol against the slow reference, from image files to confusion matrices."""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from configs.dataset import Dataset
from configs.load import dataset_settings
from configs.schema import Config
from pipeline import metrics
from pipeline.data.dataset import SegmentationDataset
from pipeline.inference import Cut, class_logits, short_side_to, sliding, whole, windows
from pipeline.metrics import CalibratedStacking
from stages.apply.evaluate import evaluate_predictor
from stages.apply.predictor import Predictor, student_predictor
from tests import reference
from tests.pipeline.data.trees import Tree
from tests.pipeline.draws import draw, draw_classes
from tests.reference import NONE, Array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS = 5
# Kinds of image: the sides (height, width) are drawn between these.
SHAPES = {
    "any": ((3, 90), (3, 90)),
    "small": ((1, 12), (1, 12)),
    "square": ((5, 80), (0, 0)),
    "long": ((7, 12), (40, 90)),
    "tall": ((40, 90), (7, 12)),
    "line": ((1, 1), (1, 30)),
    "column": ((1, 30), (1, 1)),
}
MASKS = ("all", "void", "some void", "one class", "blocks")
# Cases of which no pixel's two best logits, in float64, are within 2e-5 of each other: float32 decides alike.
SEEDS = (
    0, 2, 3, 5, 7, 8, 10, 11, 16, 17, 19, 20, 21, 24, 25, 26, 27, 28, 29, 30, 31, 34, 35, 36, 37, 38, 39, 40, 41, 43,
    44, 45, 46, 47, 48, 49, 52, 53, 54, 56, 57, 58, 59, 62, 63, 64, 65, 66, 67, 70, 73, 74, 77, 80, 81, 82, 83, 86, 87,
)  # fmt: skip


def draw_sides(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    height, width = (int(rng.integers(low, high + 1)) for low, high in SHAPES[kind])
    return height, width or height


def draw_truth(kind: str, shape: tuple[int, int], classes: int, rng: np.random.Generator) -> Array:
    if kind == "one class":
        return np.full(shape, rng.integers(0, classes), np.uint8)
    if kind == "blocks":
        return draw_classes(rng, shape, 0.1, classes)[:: 1 + shape[0] // 3].repeat(1 + shape[0] // 3, 0)[: shape[0]]
    return draw_classes(rng, shape, {"all": 0.0, "void": 1.0, "some void": 0.4}[kind], classes)


class FakeStudent(nn.Module):
    """R = tanh(conv + its mean over the window), stride 4: what a pixel gets depends on the window it is seen in.

    Pixels are brought back to bytes and go on in float64, so that this and `dense` differ by a float32's rounding.
    """

    stride, mean, std = 4, MEAN, STD

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.kernel = draw(rng, CHANNELS, 3, 4, 4, scale=0.3)

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32 and pixels.shape[1] == 3
        std, mean = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (STD, MEAN))
        shown = 255 * (pixels.double() * std + mean)
        torch.testing.assert_close(shown, shown.round(), rtol=0, atol=1e-3)
        height, width = pixels.shape[-2:]
        padded = nn.functional.pad(shown.round() / 255 - 0.5, (0, -width % 4, 0, -height % 4))
        found = nn.functional.conv2d(padded, torch.from_numpy(self.kernel), stride=4)
        return (found + found.mean(dim=(2, 3), keepdim=True)).tanh().float()

    def classify(self, pixels: Tensor, text_features: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bkhw", self(pixels), text_features)

    def dense(self, image: Array) -> Array:
        """(h, w, 3) uint8 -> (C, ceil(h / 4), ceil(w / 4)), in NumPy."""
        height, width = image.shape[:2]
        rows, columns = -(-height // 4), -(-width // 4)
        padded = np.zeros((4 * rows, 4 * columns, 3))
        padded[:height, :width] = image / 255 - 0.5
        out = np.zeros((CHANNELS, rows, columns))
        for y, x in np.ndindex(rows, columns):
            block = padded[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            out[:, y, x] = (self.kernel * block.transpose(2, 0, 1)).sum(axis=(1, 2, 3))
        return np.tanh(out + out.mean(axis=(1, 2), keepdims=True))


@dataclass
class Case:
    """One random evaluation, written to a folder of its own."""

    folder: Path
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.mode = "slide" if self.seed % 2 else "whole"
        self.size = int(rng.integers(16, 65))
        self.stride = int(rng.integers(8, self.size + 1))
        self.classes = int(rng.integers(1, 21))
        unseen = rng.permutation(self.classes)[: rng.integers(0, self.classes)]
        names = [f"class {index}" for index in range(self.classes)]
        self.seen = sorted(set(range(self.classes)) - set(unseen.tolist()))
        self.gammas = [0.0, *np.round(rng.normal(size=rng.integers(1, 4)), 3).tolist()]
        self.student = FakeStudent(rng).eval()
        words = rng.integers(1, 4, self.classes) if self.seed % 3 == 0 else np.ones(self.classes, int)
        self.class_of = np.arange(self.classes).repeat(words).tolist()
        self.text = reference.unit(draw(rng, len(self.class_of), CHANNELS)).astype(np.float32)
        tree = Tree(self.folder)
        self.pairs = []
        kinds, masks = list(SHAPES), list(MASKS)
        while len(self.pairs) < 2:
            shape = draw_sides(kinds[(self.seed // 2 + 3 * len(self.pairs)) % len(kinds)], rng)
            if (2 * max(shape) * self.size) % (2 * min(shape)) == min(shape):
                continue  # half a pixel: nothing says whether the long side is rounded up or down
            mask = draw_truth(masks[(self.seed // 2 + len(self.pairs)) % len(masks)], shape, self.classes, rng)
            self.pairs.append((rng.integers(0, 256, (*shape, 3)).astype(np.uint8), mask))
            tree.add(str(len(self.pairs)), *self.pairs[-1])
        prompts = {
            name: {"any": [f"word {i}" for i in range(n)]} for name, n in zip(names, words, strict=True) if n > 1
        }
        changes: dict[str, Any] = {"classes": names, "unseen": [names[i] for i in unseen], "prompts": prompts}
        self.dataset = tree.read(**changes)

    def predictor(self, **changes: Any) -> Predictor:
        evaluation = {"mode": self.mode, "stride": self.stride} | changes
        config = Config(dataset=self.dataset.config, views={"size": self.size}, evaluate=evaluation)  # type: ignore[arg-type]
        return student_predictor(self.student, torch.from_numpy(self.text), config)  # type: ignore[arg-type]

    def expected(self) -> Array:
        stride = self.stride if self.mode == "slide" else None
        return reference.evaluate(
            self.pairs, self.student.dense, self.text, self.seen, self.gammas, self.size, stride, self.class_of
        )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[CalibratedStacking]:
    """The confusion matrices that evaluation makes, which it gives away as scores only."""
    made = []

    class Recorded(CalibratedStacking):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("stages.apply.evaluate.CalibratedStacking", Recorded)
    return made


def assert_evaluation(case: Case, counted: list[CalibratedStacking]) -> None:
    found = evaluate_predictor(case.predictor(), case.dataset, case.gammas)
    expected = case.expected()
    np.testing.assert_array_equal(counted[-1].confusions.numpy(), expected, strict=True)
    unseen = [index for index in range(case.classes) if index not in case.seen]
    for matrix, row in zip(expected, found, strict=True):
        wanted: dict[str, Any] = reference.scores(matrix, case.seen, unseen)
        names = ("pAcc", "mIoU", "mIoU_seen", "mIoU_unseen", "hIoU")
        shown = [row.pixel_accuracy, row.miou, row.miou_seen, row.miou_unseen, row.hiou]
        assert shown == pytest.approx([100 * wanted[name] for name in names], nan_ok=True)
        np.testing.assert_allclose(row.iou, 100 * wanted["IoU"])


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation(seed: int, tmp_path: Path, counted: list[CalibratedStacking]) -> None:
    """Two images each, of all kinds and sizes: every count in every confusion matrix is the reference's."""
    assert_evaluation(Case(tmp_path, seed), counted)


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_evaluation_a_few_classes_at_a_time(
    seed: int, tmp_path: Path, counted: list[CalibratedStacking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_VALUES", 9000)
    assert_evaluation(Case(tmp_path, seed), counted)


@pytest.mark.parametrize("name", ["pascal-voc-21", "pascal-context-60"])
@pytest.mark.parametrize("seed", range(2))
def test_protocols_with_background(seed: int, name: str, tmp_path: Path, counted: list[CalibratedStacking]) -> None:
    """Background is hidden in training, and in the test a class: of VOC any of 39 words."""
    rng, config = np.random.default_rng(seed), Dataset.model_validate(dataset_settings(name))
    root, pairs = tmp_path / config.root, []
    files = config.splits["val"]
    for index in range(3):
        mask = np.where(rng.random((20, 30)) < 0.4, 0, rng.choice([*range(len(config.classes)), 255], (20, 30)))
        mask = mask.astype(np.uint8)
        pairs.append((rng.integers(0, 256, (20, 30, 3)).astype(np.uint8), mask))
        for part, pattern in zip(pairs[-1], (files.images.replace(".jpg", ".png"), files.masks[0].files), strict=True):
            path = root / pattern.replace("{id}", str(index))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part).save(path)
    for split in config.splits.values():
        for index, listing in enumerate(split.ids):
            (root / listing).parent.mkdir(parents=True, exist_ok=True)
            (root / listing).write_text("0\n1\n2\n" if split is files else f"{index}\n")
    splits = {
        key: one.model_copy(update={"images": files.images.replace(".jpg", ".png")})
        for key, one in config.splits.items()
    }
    config = config.model_copy(update={"splits": splits})
    assert (SegmentationDataset(config, tmp_path, "train").training_pair(0)[1][pairs[0][1] == 0] == NONE).all()
    text, student = (
        reference.unit(draw(rng, len(config.channels), CHANNELS)).astype(np.float32),
        FakeStudent(rng).eval(),
    )
    settings = Config(dataset=config, views={"size": 20})  # type: ignore[arg-type]
    predict = student_predictor(student, torch.from_numpy(text), settings)  # type: ignore[arg-type]
    evaluate_predictor(predict, SegmentationDataset(config, tmp_path, "val"), [0.0, 0.2])
    words = [39 if index == 0 and "voc" in name else 1 for index in range(len(config.classes))]
    class_of = np.arange(len(words)).repeat(words).tolist()
    expected = reference.evaluate(pairs, student.dense, text, config.seen_indices, [0.0, 0.2], 20, None, class_of)
    np.testing.assert_array_equal(counted[-1].confusions.numpy(), expected, strict=True)
    assert expected[0, 0].sum() > 600 and 0 in config.unseen_indices


@pytest.mark.parametrize("seed", range(6))
def test_one_window_is_the_whole(seed: int, tmp_path: Path) -> None:
    """Of square images of any size, bit for bit, whatever the stride."""
    case, rng = Case(tmp_path, seed), np.random.default_rng(seed)
    for side in (1, 9, case.size, 90):
        image = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        everything = list(range(len(case.text)))
        expected = case.predictor(mode="whole")(image).upsampled(everything)
        assert expected.shape == (len(case.text), case.size, case.size) and expected.isfinite().all()
        for stride in (1, 8, case.stride, case.size):
            assert torch.equal(case.predictor(mode="slide", stride=stride)(image).upsampled(everything), expected)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("unseen", [(), ("b", "d"), ("a", "b", "c")])
def test_equal_classes_tie_in_every_pixel(
    unseen: tuple[str, ...], mode: str, size: int, tmp_path: Path, counted: list[CalibratedStacking]
) -> None:
    """Constant logits, and gammas that are differences of theirs; whole numbers, so that ties are exact."""
    tree, rng = Tree(tmp_path), np.random.default_rng(0)
    pairs = [(np.zeros((size, width, 3), np.uint8), draw_classes(rng, (size, width), 0.1, 4)) for width in (size, 70)]
    for name, pair in enumerate(pairs):
        tree.add(str(name), *pair)
    dataset = tree.read(classes=("a", "b", "c", "d"), unseen=unseen)
    config = Config(dataset=dataset.config, views={"size": size}, evaluate={"mode": mode, "stride": 8})  # type: ignore[arg-type]
    student = FakeStudent(rng)
    student.forward = lambda pixels: torch.ones(len(pixels), 1, *(-(-side // 4) for side in pixels.shape[2:]))  # type: ignore[method-assign]
    for values in ([2, 2, 2, 2], [1, 2, 2, 1], [3, 2, 3, 2], [2, 2, 3, 2]):
        text, gammas = np.array(values, np.float32)[:, None], [0.0, 1.0, -1.0]
        predict = student_predictor(student, torch.from_numpy(text), config)  # type: ignore[arg-type]
        found = evaluate_predictor(predict, dataset, gammas)
        expected = reference.evaluate(
            pairs,
            lambda window: np.ones((1, *(-(-side // 4) for side in window.shape[:2]))),
            text,
            dataset.config.seen_indices,
            gammas,
            size,
            8 if mode == "slide" else None,
        )
        np.testing.assert_array_equal(counted[-1].confusions.numpy(), expected, strict=True)
        assert all(np.isfinite([row.miou, row.miou_seen]).all() for row in found)
        assert all(np.isnan([row.miou_unseen, row.hiou]).any() != bool(unseen) for row in found)


@pytest.mark.parametrize("size", [1, 16, 63, 512])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (7, 7), (375, 500), (500, 333), (20, 1000), (512, 683)])
def test_short_side(shape: tuple[int, int], size: int) -> None:
    """One side is exact, the other nearest to the ratio, and pixels are Pillow's."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = short_side_to(image, size)
    height, width = found.shape[:2]
    assert found.dtype == np.uint8 and found.shape[2] == 3 and (width >= height) == (shape[1] >= shape[0])
    if max(shape) <= 8 * min(shape):
        assert min(height, width) == size and abs(max(height, width) - max(shape) * size / min(shape)) <= 0.5
    else:
        assert (
            max(height, width) == 8 * size
            and abs(min(height, width) - max(1, min(shape) * 8 * size / max(shape))) <= 0.5
        )
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, expected)
    assert (height, width) == reference.short_side_size(*shape, size)


@pytest.mark.parametrize("side", [1, 7, 16, 64, 200, 300])
def test_windows(side: int) -> None:
    """Against walking along the side until the border is reached; every pixel is in a window."""
    for stride in {1, 3, 8, 43, side} & set(range(1, side + 1)):
        for length in range(1, 201):
            expected, start = [], 0
            while start + side < length:
                expected.append((start, start + side))
                start += stride
            expected.append((max(length - side, 0), length))
            assert windows(length, side, stride) == expected == reference.window_spans(length, side, stride)
            assert len(expected) == max(math.ceil((length - side) / stride), 0) + 1
            assert set().union(*(range(*span) for span in expected)) == set(range(length))


def test_slide_averages_overlaps() -> None:
    """Windows 0-4, 3-7 and 6-10 of a strip, of logits 1, 2 and 3 and twice that."""
    calls = []

    def classify(pixels: Tensor) -> Tensor:
        calls.append(pixels.clone())
        return torch.tensor([1.0, 2.0]).view(1, 2, 1, 1) * len(calls)

    strip = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    (found,) = class_logits([Cut(strip, sliding(4, 10, 4, 3))], classify, 4, MEAN, STD)
    expected = torch.tensor([1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]).expand(4, 10)
    assert found.size == (4, 10)
    assert torch.equal(found.upsampled([0, 1]), torch.stack([expected, 2 * expected]))
    assert torch.equal(found.upsampled([1]), 2 * expected[None])
    for start, pixels in zip((0, 3, 6), calls, strict=True):
        np.testing.assert_allclose(pixels, normalised(strip[:, start : start + 4]), rtol=1e-5, atol=1e-6)


def normalised(image: Array) -> Array:
    expected: Array = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    return expected


@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 24), (17, 23), (3, 40)])
def test_class_logits(shape: tuple[int, int], stride: int) -> None:
    """R . T of the text features as they are, upsampled by the stride and cropped, which equals upsampling R first."""
    rng = np.random.default_rng([*shape, stride])
    cells = (-(-shape[0] // stride), -(-shape[1] // stride))
    features, text = draw(rng, 5, *cells, scale=4).astype(np.float32), draw(rng, 3, 5).astype(np.float32)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)

    def classify(pixels: Tensor) -> Tensor:
        np.testing.assert_allclose(pixels, normalised(image), rtol=1e-5, atol=1e-6)
        return torch.einsum("bchw,kc->bkhw", torch.from_numpy(features[None]).requires_grad_(), torch.from_numpy(text))

    found = class_logits([Cut(image, whole(*shape))], classify, stride, MEAN, STD)[0].upsampled([0, 1, 2])
    assert found.shape == (3, *shape) and not found.requires_grad and found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.window_logits(features, text, shape, stride), rtol=0, atol=1e-4)
    upsampled = reference.bilinear(features[None], (cells[0] * stride, cells[1] * stride))[0]
    expected = np.einsum("chw,kc->khw", upsampled, text)[:, : shape[0], : shape[1]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (4, 3), (11, 2)])
@pytest.mark.parametrize("source", [(1, 1), (4, 3), (5, 2)])
def test_the_reference_interpolates_between_centres(source: tuple[int, int], size: tuple[int, int]) -> None:
    """Pixel by pixel: tents of one cell's width around the centres of the cells, the border cells beyond them."""
    maps = draw(np.random.default_rng(0), 1, 2, *source)
    found = reference.bilinear(maps, size)
    for y, x in np.ndindex(size):
        place = [(at + 0.5) * cells / wanted for at, cells, wanted in zip((y, x), source, size, strict=True)]
        inside = [min(max(at, 0.5), cells - 0.5) for at, cells in zip(place, source, strict=True)]
        value = np.zeros(2)
        for row, column in np.ndindex(source):
            share = [max(0.0, 1 - abs(at - c - 0.5)) for at, c in zip(inside, (row, column), strict=True)]
            value += share[0] * share[1] * maps[0, :, row, column]
        np.testing.assert_allclose(found[0, :, y, x], value, atol=1e-12)


LARGE = """
import re, numpy as np, torch
from pipeline.inference import ClassLogits, Window
from pipeline.metrics import CalibratedStacking, best_of
def peak():  # of this process only: a child's ru_maxrss begins at its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
small = ClassLogits((8, 8), 4, (Window((0, 8, 0, 8), torch.randn(9, 2, 2)),))
best_of(small, [0, 1], (8, 8))  # what torch itself takes comes first
before = peak()
logits = ClassLogits((1024, 1024), 4, (Window((0, 1024, 0, 1024), torch.randn(847, 256, 256)),))
stacking = CalibratedStacking(847, list(range(840)), list(range(840, 847)), [0.0])
stacking.update(np.full((1024, 1024), 300, np.uint16), logits)
assert stacking.confusions[0, 300].sum() == 1024 * 1024 and stacking.confusions[0, 300, 840:].any()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_many_classes() -> None:
    """847 classes counted at 1024 x 1024: at most a tenth of what the logits at that size and at R's stride take."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    naive = 847 * 4 * (1024 * 1024 + 256 * 256)
    assert float(done.stdout) < naive / 10, f"{float(done.stdout) / naive:.3f}"
