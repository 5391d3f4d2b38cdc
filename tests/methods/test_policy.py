"""Policy losses and advantages, against values worked by hand and slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tunesmith.methods.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    compare_in_group,
    count_clipped,
    estimate_advantages,
    estimate_kl,
    whiten,
)


def test_a_ratio_of_one_costs_the_negative_advantage_and_pulls_by_it() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses = clipped_policy_loss(logps, logps.detach(), torch.tensor([0.5, -2.0]), clip=0.2)
    losses.sum().backward()
    assert losses.tolist() == [-0.5, 2.0]
    assert logps.grad is not None
    assert logps.grad.tolist() == [-0.5, 2.0]


def test_a_token_that_has_moved_far_enough_has_no_gradient() -> None:
    # Ratios 1.5 and 0.5: with the advantage's sign both are beyond 1 +- 0.2; against it, neither is clipped.
    old = torch.zeros(4)
    logps = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    losses = clipped_policy_loss(logps, old, advantages, clip=0.2)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-1.2, 0.8, 1.5, -0.5])
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 0.0, 1.5, -0.5])
    assert count_clipped(logps.detach(), old, advantages, clip=0.2).tolist() == [1, 1, 0, 0]


def test_the_upper_bound_may_be_wider() -> None:
    logps = torch.tensor([1.25]).log()
    given = (logps, torch.zeros(1), torch.ones(1))
    assert clipped_policy_loss(*given, clip=0.2, clip_high=0.28).item() == pytest.approx(-1.25)
    assert count_clipped(*given, clip=0.2, clip_high=0.28).item() == 0
    assert count_clipped(*given, clip=0.2).item() == 1


def test_kl_is_zero_at_the_reference_and_right_on_average() -> None:
    assert estimate_kl(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    policy, frozen = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / frozen).log()).sum()
    assert (policy * estimate_kl(policy.log(), frozen.log())).sum().item() == pytest.approx(
        exact.item(), rel=1e-6
    )


def test_a_value_may_not_run_away_from_what_it_was() -> None:
    # 0.5 (1 - 3)^2 = 2; held to 0.2 it is 0.5 (0.2 - 3)^2 = 3.92, the larger one.
    found = clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([3.0]), clip=0.2)
    assert found.item() == pytest.approx(3.92)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_advantages_are_those_of_the_definition(gamma: float, gae_lambda: float) -> None:
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=7).tolist(), draw.normal(size=7).tolist()

    def advantage(at: int) -> float:
        if at == 7:
            return 0.0
        ahead = values[at + 1] if at < 6 else 0.0
        return rewards[at] + gamma * ahead - values[at] + gamma * gae_lambda * advantage(at + 1)

    advantages, returns = estimate_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages.tolist() == pytest.approx([advantage(at) for at in range(7)])
    assert returns.tolist() == pytest.approx([advantage(at) + values[at] for at in range(7)])


def test_without_discount_and_with_rewards_trusted_a_return_is_what_is_still_to_come() -> None:
    _, returns = estimate_advantages([1.0, 0.0, 2.0], [5.0, -3.0, 0.5], gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == pytest.approx([3.0, 2.0, 2.0])


def test_answers_are_held_against_their_group() -> None:
    assert compare_in_group([1, 0, 0, 1], by_deviation=False).tolist() == [0.5, -0.5, -0.5, 0.5]
    deviation = math.sqrt(1 / 3)
    assert compare_in_group([1, 0, 0, 1], by_deviation=True)[0] == pytest.approx(0.5 / deviation, rel=1e-3)
    assert compare_in_group([2, 2, 2], by_deviation=True).tolist() == [0, 0, 0]


def test_whitening_of_equal_values_divides_by_nothing() -> None:
    assert whiten(np.array([3.0, 3.0])).tolist() == [0.0, 0.0]
    assert whiten(np.array([3.0, 3.0]), center=False).tolist() == [3.0, 3.0]
    assert whiten(np.array([1.0, 3.0]), center=False).tolist() == pytest.approx([1.0, 3.0])
