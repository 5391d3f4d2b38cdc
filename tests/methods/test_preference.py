"""Losses over pairs, against values worked by hand and against autograd of the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from tunesmith.job.objective import DpoSpec
from tunesmith.methods.preference import PairLogps, dpo_loss, orpo_loss, reward_loss, simpo_loss


def pairs(chosen: float, rejected: float, tokens: tuple[int, int] = (2, 4)) -> PairLogps:
    return PairLogps(*(torch.tensor([float(value)]) for value in (chosen, rejected, *tokens)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


POLICY, FROZEN = pairs(-1.0, -3.0), pairs(-2.0, -2.5)
# Gains 1.0 and -0.5, a margin of 1.5; per token (2 and 4 tokens) 0.5 and -0.125, a margin of 0.625.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -math.log(sigmoid(0.1 * 1.5))),
        ({"beta": 0.5}, -math.log(sigmoid(0.75))),
        (
            {"beta": 0.5, "label_smoothing": 0.1},
            -0.9 * math.log(sigmoid(0.75)) - 0.1 * math.log(sigmoid(-0.75)),
        ),
        (
            {"beta": 0.5, "loss": "robust", "label_smoothing": 0.1},
            (-0.9 * math.log(sigmoid(0.75)) + 0.1 * math.log(sigmoid(-0.75))) / 0.8,
        ),
        ({"beta": 0.5, "loss": "hinge"}, 0.25),
        ({"beta": 0.8, "loss": "hinge"}, 0.0),
        ({"beta": 0.5, "loss": "ipo"}, (0.625 - 1.0) ** 2),
        ({"beta": 0.5, "length_normalised": True}, -math.log(sigmoid(0.5 * 0.625))),
        ({"beta": 0.5, "sft_weight": 2.0}, -math.log(sigmoid(0.75)) + 2.0 * 0.5),
    ],
    ids=str,
)
def test_dpo_by_hand(settings: dict[str, object], expected: float) -> None:
    found = dpo_loss(POLICY, FROZEN, DpoSpec(name="dpo", **settings))  # type: ignore[arg-type]
    assert found.losses.item() == pytest.approx(expected, rel=1e-6)


def test_dpo_begins_at_the_logarithm_of_two() -> None:
    assert dpo_loss(POLICY, POLICY, DpoSpec(name="dpo")).losses.item() == pytest.approx(math.log(2), rel=1e-7)


def test_implicit_rewards_are_beta_times_the_gains() -> None:
    found = dpo_loss(POLICY, FROZEN, DpoSpec(name="dpo", beta=0.5))
    assert (found.chosen.item(), found.rejected.item()) == pytest.approx((0.5, -0.25))


def test_simpo_by_hand() -> None:
    # Means -0.5 and -0.75: 2 * 0.25 - 0.3.
    found = simpo_loss(POLICY, beta=2.0, margin=0.3)
    assert found.losses.item() == pytest.approx(-math.log(sigmoid(0.2)), rel=1e-6)


def test_orpo_by_hand() -> None:
    p, q = math.exp(-0.5), math.exp(-0.75)
    ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
    found = orpo_loss(POLICY, weight=0.3)
    assert found.losses.item() == pytest.approx(0.5 - 0.3 * math.log(sigmoid(ratio)), rel=1e-6)


def test_orpo_of_a_certain_answer_is_finite() -> None:
    logps = pairs(0.0, -3.0)
    logps.chosen.requires_grad_()
    found = orpo_loss(logps, weight=0.3)
    found.losses.sum().backward()
    assert torch.isfinite(found.losses).all()
    assert torch.isfinite(logps.chosen.grad).all()  # type: ignore[arg-type]


def test_a_reward_model_learns_the_difference_of_scores() -> None:
    found = reward_loss(torch.tensor([1.0]), torch.tensor([-0.5]), center=0.1)
    assert found.losses.item() == pytest.approx(-math.log(sigmoid(1.5)) + 0.1 * 0.25, rel=1e-6)


def test_pairs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 pairs of the policy, 2 of the reference"):
        dpo_loss(POLICY, PairLogps(*[torch.zeros(2)] * 4), DpoSpec(name="dpo"))
    with pytest.raises(ValueError, match="one each"):
        PairLogps(torch.zeros(2), torch.zeros(3), torch.ones(2), torch.ones(2))
