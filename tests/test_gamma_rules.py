"""The rules that benchmarks/gamma_rules.py compares, against every one of its thresholds."""

import runpy
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

Rules = dict[str, Any]


@pytest.fixture(scope="module")
def script() -> Rules:
    return runpy.run_path(str(ROOT / "benchmarks" / "gamma_rules.py"))


def harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0


def test_balance_equals_the_slow_reference(script: Rules) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        yes, no, weights = rng.normal(1, 1, 30), rng.normal(0, 1, 20), rng.random(20)
        found = script["best"](script["above"](yes), 1 - script["above"](no, weights))
        scores = [harmonic((yes > g).mean(), weights[no <= g].sum() / weights.sum()) for g in script["THRESHOLDS"]]
        at_found = harmonic((yes > found).mean(), weights[no <= found].sum() / weights.sum())
        assert at_found == pytest.approx(max(scores))


def test_training_hiou_equals_the_slow_reference(script: Rules) -> None:
    rng = np.random.default_rng(1)
    truth, best_seen = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    annotated = truth < 3  # the last class is hidden
    best_seen[annotated & (rng.random(60) < 0.7)] = 0
    margins = rng.normal(np.where(annotated, 1, 0), 1)

    def score(gamma: float) -> float:
        predicted, whole = np.where(margins > gamma, best_seen, 3), np.where(annotated, truth, 3)
        ious = [((predicted == k) & (whole == k)).sum() / ((predicted == k) | (whole == k)).sum() for k in range(4)]
        return harmonic(float(np.mean(ious[:3])), float(ious[3]))

    found = script["training_hiou"](margins, best_seen, truth, annotated)
    assert score(found) == pytest.approx(max(map(score, script["THRESHOLDS"])))


def test_groups_have_their_mean_and_area(script: Rules) -> None:
    groups, images = np.array([0, 0, 1, 0, 7]), np.array([0, 0, 0, 1, 1])
    values, area = script["group_margins"](np.array([1.0, 3.0, 5.0, -1.0, 0.5]), groups, images)
    assert values.tolist() == [2, 5, -1, 0.5] and area.tolist() == [2, 1, 1, 1]


def test_the_lower_mode_equals_the_slow_reference(script: Rules) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        values, weights = np.concatenate([rng.normal(0, 1, 9), rng.normal(6, 1, 7)]), rng.random(16)
        splits = []
        for threshold in np.sort(values)[:-1]:
            low = values <= threshold
            parts = [np.average(values[part], weights=weights[part]) for part in (low, ~low)]
            splits.append((weights[low].sum() * weights[~low].sum() * (parts[0] - parts[1]) ** 2, low))
        wanted = max(splits, key=lambda split: split[0])[1]
        np.testing.assert_array_equal(script["lower_mode"](values, weights), wanted)
