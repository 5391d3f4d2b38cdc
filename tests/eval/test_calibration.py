"""Calibration of pairwise probabilities: values worked by hand, and models whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.eval.calibration import measure_calibration


def test_four_pairs_worked_by_hand() -> None:
    # sigmoid(ln 3) = 0.75, sigmoid(ln 9) = 0.9: three bets at 75%, two of them won, one at 90%, lost.
    third, ninth = math.log(3), math.log(9)
    found = measure_calibration([third, third, -third, -ninth], bins=5)
    assert found["log_loss"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25) + math.log(0.1)) / 4)
    assert found["brier"] == pytest.approx((2 * 0.0625 + 0.5625 + 0.81) / 4)
    assert [(row["pairs"], row["won"]) for row in found["bins"]] == [(3, pytest.approx(2 / 3)), (1, 0.0)]
    assert found["calibration_error"] == pytest.approx((3 * abs(2 / 3 - 0.75) + 0.9) / 4)


def test_a_model_that_knows_nothing_is_a_coin() -> None:
    found = measure_calibration([0.0] * 10)
    assert found["log_loss"] == pytest.approx(math.log(2))
    assert (found["brier"], found["calibration_error"]) == (0.25, 0.0)


@pytest.mark.parametrize(("scale", "most"), [(1.0, 0.02), (3.0, 1.0)])
def test_a_model_that_says_what_is_so_is_calibrated_and_one_that_boasts_is_not(
    scale: float, most: float
) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 1, 40_000)
    won = random.random(40_000) < 1 / (1 + np.exp(-truth))
    found = measure_calibration((scale * np.where(won, truth, -truth)).tolist())
    assert found["calibration_error"] < most
    assert (found["calibration_error"] > 0.1) == (scale > 1)


def test_scores_far_apart_do_not_overflow() -> None:
    found = measure_calibration([-5000.0, 5000.0])
    assert found["log_loss"] == pytest.approx(2500.0)
    assert found["brier"] == pytest.approx(0.5)


def test_no_pair_is_no_measure() -> None:
    with pytest.raises(ValueError, match="no pair"):
        measure_calibration([])
