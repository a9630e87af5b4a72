"""Metrics of generalized zero-shot segmentation, Eq. 9, and calibrated stacking."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline import metrics
from pipeline.inference import ClassLogits, Window
from pipeline.metrics import (
    CalibratedStacking,
    best_of,
    calibrated_argmax,
    confusion_matrix,
    harmonic_mean,
    scores,
    seen_margins,
)
from tests import reference
from tests.pipeline.draws import as_logits, draw, draw_classes
from tests.reference import NONE, Array

# Number of classes, seen and unseen ones.
CLASSES = [(5, [0, 2, 3], [1, 4]), (5, [1, 4], [0, 2, 3]), (3, [0, 1, 2], []), (2, [1], [0]), (1, [0], [])]


def assert_scores(matrix: Array, seen: list[int], unseen: list[int]) -> None:
    """The reference gives fractions."""
    expected: dict[str, Any] = reference.scores(matrix, seen, unseen)
    found = scores(matrix, seen, unseen)
    wanted = [100 * expected[name] for name in ("pAcc", "mIoU", "mIoU_seen", "mIoU_unseen", "hIoU")]
    means = [found.pixel_accuracy, found.miou, found.miou_seen, found.miou_unseen, found.hiou]
    assert means == pytest.approx(wanted, nan_ok=True)
    np.testing.assert_allclose(found.iou, 100 * expected["IoU"])


@pytest.mark.parametrize("none", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("classes", [1, 2, 20, 255, 256, 847])
@pytest.mark.parametrize("at_once", [5, 2**20])
def test_confusion_matrix(at_once: int, classes: int, none: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of more than 255 classes have 16 bits."""
    monkeypatch.setattr("pipeline.metrics.PIXELS", at_once)
    rng, ignored = np.random.default_rng(classes), NONE if classes <= 255 else 65535
    truth = np.where(rng.random((9, 14)) < none, ignored, rng.integers(0, classes, (9, 14)))
    truth = truth.astype(np.uint8 if classes <= 255 else np.uint16)
    prediction = rng.integers(0, classes, (9, 14)).astype(np.int32)
    found = confusion_matrix(torch.tensor(truth), torch.tensor(prediction), classes).numpy()
    np.testing.assert_array_equal(found, reference.confusion(truth, prediction, classes, ignored), strict=True)
    assert found.sum() == (truth != ignored).sum()


def test_confusion_matrix_has_the_truth_in_rows() -> None:
    truth, prediction = torch.tensor([[0, 0, 1, NONE]], dtype=torch.uint8), torch.tensor([[0, 2, 1, 1]])
    assert confusion_matrix(truth, prediction, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_scores(classes: int, seen: list[int], unseen: list[int], seed: int) -> None:
    """With classes that are absent, from the truth, the prediction or both, in most draws."""
    rng = np.random.default_rng([classes, seed])
    matrix = (
        rng.integers(0, 50, (classes, classes)) * rng.integers(0, 2, (1, classes)) * rng.integers(0, 2, (classes, 1))
    )
    assert_scores(matrix, seen, unseen)


@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
@pytest.mark.parametrize("kind", ["empty", "perfect", "all wrong", "only seen", "only unseen"])
def test_scores_of_extremes(kind: str, classes: int, seen: list[int], unseen: list[int]) -> None:
    matrix = np.zeros((classes, classes), np.int64)
    rows = {"only seen": seen, "only unseen": unseen, "empty": []}.get(kind, range(classes))
    for row in rows:
        matrix[row, (row + 1) % classes if kind == "all wrong" else row] = 7
    assert_scores(matrix, seen, unseen)
    if kind == "perfect" and unseen:
        assert scores(matrix, seen, unseen).hiou == pytest.approx(100)


def test_scores_by_hand() -> None:
    """IoU 3 / 4, 2 / 4 and, absent, nan; the mean over seen classes leaves the absent one out."""
    found = scores(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), [0, 2], [1])
    assert found.iou[:2] == pytest.approx([75, 200 / 3]) and np.isnan(found.iou[2])
    assert (found.miou_seen, found.miou_unseen) == pytest.approx((75, 200 / 3))
    assert found.miou == pytest.approx((75 + 200 / 3) / 2)
    assert found.hiou == pytest.approx(2 * 75 * 200 / 3 / (75 + 200 / 3))
    assert found.pixel_accuracy == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize(("seen", "unseen", "expected"), [(0, 0, 0), (50, 0, 0), (0, 50, 0), (40, 60, 48), (7, 7, 7)])
def test_harmonic_mean(seen: float, unseen: float, expected: float) -> None:
    assert harmonic_mean(seen, unseen) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_calibrated_argmax(classes: int, seen: list[int], unseen: list[int], seed: int) -> None:
    logits = draw(np.random.default_rng(seed), classes, 5, 8).astype(np.float32)
    gammas = [0.0, -0.7, 0.3, 1.5, 100.0, -100.0]
    found = calibrated_argmax(as_logits(logits), logits.shape[1:], seen, unseen, gammas)
    assert len(found) == len(gammas)
    for gamma, prediction in zip(gammas, found, strict=True):
        np.testing.assert_array_equal(prediction, reference.calibrated_argmax(logits, seen, gamma))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_gamma_ties_go_to_the_smallest_class(classes: int, seen: list[int], unseen: list[int], seed: int) -> None:
    """Whole logits and gammas tie in most pixels: seen with seen, unseen with unseen, and each with the other."""
    logits = np.random.default_rng(seed).integers(-1, 2, (classes, 9, 9)).astype(np.float32)
    gammas = [-1.0, 0.0, 1.0, 2.0]
    for gamma, prediction in zip(
        gammas, calibrated_argmax(as_logits(logits), logits.shape[1:], seen, unseen, gammas), strict=True
    ):
        np.testing.assert_array_equal(prediction, reference.calibrated_argmax(logits, seen, gamma))


@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_calibrated_stacking(classes: int, seen: list[int], unseen: list[int]) -> None:
    """Images of different sizes, one of them all ignored, with logits of their size."""
    rng, gammas = np.random.default_rng(classes), [0.0, 0.5, -1.0]
    stacking = CalibratedStacking(classes, seen, unseen, gammas)
    expected = np.zeros((3, classes, classes), np.int64)
    for size, none in [((4, 6), 0.2), ((3, 3), 1.0), ((1, 7), 0.0)]:
        logits, truth = draw(rng, classes, *size).astype(np.float32), draw_classes(rng, size, none, classes)
        stacking.update(truth, as_logits(logits))
        for row, gamma in enumerate(gammas):
            expected[row] += reference.confusion(truth, reference.calibrated_argmax(logits, seen, gamma), classes)
    np.testing.assert_array_equal(stacking.confusions, expected)
    for found, matrix in zip(stacking.scores(), expected, strict=True):
        np.testing.assert_equal(vars(found), vars(scores(matrix, seen, unseen)))


@pytest.mark.parametrize("values", [1, 100, 2**24])
@pytest.mark.parametrize("source", [(1, 1), (4, 6), (5, 3), (20, 30)])
@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_logits_are_brought_to_the_size_of_the_truth(
    classes: int,
    seen: list[int],
    unseen: list[int],
    source: tuple[int, int],
    values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the decision, a few classes at a time; to get classes and to count them is to decide the same."""
    monkeypatch.setattr("pipeline.metrics.CHUNK_VALUES", values)
    rng, gammas = np.random.default_rng([classes, *source]), [0.0, 0.5, -1.0]
    stacking = CalibratedStacking(classes, seen, unseen, gammas)
    expected = np.zeros((3, classes, classes), np.int64)
    for size, none in [((9, 14), 0.2), ((1, 7), 0.0), ((8, 1), 0.3), ((10, 6), 1.0), ((4, 6), 0.0)]:
        logits, truth = draw(rng, classes, *source).astype(np.float32), draw_classes(rng, size, none, classes)
        stacking.update(truth, as_logits(logits))
        upsampled = reference.bilinear(logits[None], size)[0]
        for row, gamma in enumerate(gammas):
            prediction = reference.calibrated_argmax(upsampled, seen, gamma)
            expected[row] += reference.confusion(truth, prediction, classes)
            (found,) = calibrated_argmax(as_logits(logits), size, seen, unseen, [gamma])
            np.testing.assert_array_equal(found, prediction)
    np.testing.assert_array_equal(stacking.confusions, expected)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(("classes", "seen", "unseen"), CLASSES)
def test_constant_logits(classes: int, seen: list[int], unseen: list[int], gamma: float) -> None:
    """All classes tie: the smallest one of those that gamma favours, in every pixel; all pixels are of class 0."""
    wanted = {-1.0: seen[0], 0.0: 0, 1.0: unseen[0] if unseen else 0}[gamma]
    logits = as_logits(torch.full((classes, 3, 5), 0.3))
    for size in [(3, 5), (7, 11), (1, 2)]:
        assert (calibrated_argmax(logits, size, seen, unseen, [gamma])[0] == wanted).all()
        stacking = CalibratedStacking(classes, seen, unseen, [gamma])
        stacking.update(np.zeros(size, np.uint8), logits)
        assert stacking.confusions[0, 0, wanted] == size[0] * size[1] == stacking.confusions.sum()
        (row,) = stacking.scores()
        assert np.isfinite([row.pixel_accuracy, row.miou]).all() and np.isnan(row.hiou)
        assert (np.isnan(row.miou_seen), np.isnan(row.miou_unseen)) == (0 in unseen, 0 in seen)


@pytest.mark.parametrize(("classes", "seen", "unseen"), [case for case in CLASSES if case[2]])
def test_a_pixel_changes_sides_at_its_margin(classes: int, seen: list[int], unseen: list[int]) -> None:
    logits = as_logits(draw(np.random.default_rng(0), classes, 3, 4))
    margins = seen_margins(logits, seen, unseen)
    assert margins.shape == (12,)
    for pixel, margin in enumerate(margins.tolist()):
        before, after = calibrated_argmax(logits, (3, 4), seen, unseen, [margin - 1e-6, margin + 1e-6])
        assert before.flatten()[pixel] in seen and after.flatten()[pixel] in unseen


@pytest.mark.parametrize("way", ["_raise_one_by_one", "_raise_at_once"])
@pytest.mark.parametrize("values", [1, 3000, 2**22])
@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("shape", [(1, 150), (160, 1), (64, 80), (97, 131), (33, 103)])
@pytest.mark.parametrize("kind", ["random", "ties", "constant"])
def test_a_few_classes_at_a_time_is_the_naive_argmax(
    kind: str, shape: tuple[int, int], stride: int, values: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what torch gives when all classes are upsampled at once, the image's size being the mask's or not."""
    monkeypatch.setattr("pipeline.metrics.CHUNK_VALUES", values)
    monkeypatch.setattr("pipeline.metrics._raise_one_by_one", getattr(metrics, way))  # the other is a GPU's
    rng, classes = np.random.default_rng([*shape, stride]), 23
    cells = [-(-side // stride) for side in shape]
    drawn = draw(rng, classes, *cells) if kind == "random" else rng.integers(0, 1 + (kind == "ties"), (classes, *cells))
    logits = torch.from_numpy(drawn.astype(np.float32))
    found = ClassLogits(shape, stride, (Window((0, shape[0], 0, shape[1]), logits),))
    chosen = sorted(rng.permutation(classes)[: rng.integers(1, classes + 1)].tolist())
    upsampled = torch.nn.functional.interpolate(logits[None], scale_factor=stride, mode="bilinear")
    upsampled = upsampled[..., : shape[0], : shape[1]]
    for size in (shape, (60, 90)):
        naive = upsampled[0]
        if size != shape:
            naive = torch.nn.functional.interpolate(upsampled, size=size, mode="bilinear")[0]
        best, which = best_of(found, chosen, size)
        assert torch.equal(best, naive[chosen].amax(dim=0))
        assert torch.equal(which, torch.tensor(chosen)[naive[chosen].argmax(dim=0)])
