"""Policy-gradient losses over sampled answers, and the advantages that they weigh tokens by.

K: sampled tokens of a batch  N: answers  T: tokens of one answer  G: answers to one prompt
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]


def clipped_policy_loss(
    logps_K: Tensor, old_K: Tensor, advantages_K: Tensor, *, clip: float, clip_high: float | None = None
) -> Tensor:
    """-min(ratio * advantage, clipped ratio * advantage) of each token, (K,).

    The ratio is the token's probability now over that at sampling; beyond 1 - clip or 1 + clip_high (default: clip)
    moving it further in the advantage's direction changes nothing.
    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7; two bounds: Yu et al. 2025, arXiv:2503.14476.
    """
    ratio_K = (logps_K - old_K).exp()
    bounded_K = ratio_K.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio_K * advantages_K, bounded_K * advantages_K)


def count_clipped(
    logps_K: Tensor, old_K: Tensor, advantages_K: Tensor, *, clip: float, clip_high: float | None = None
) -> Tensor:
    """Which tokens have no gradient because they have moved far enough, (K,), 1 or 0."""
    ratio_K = (logps_K - old_K).exp()
    above_K = (ratio_K > 1 + (clip if clip_high is None else clip_high)) & (advantages_K > 0)
    below_K = (ratio_K < 1 - clip) & (advantages_K < 0)
    return (above_K | below_K).to(logps_K.dtype)


def estimate_kl(logps_K: Tensor, reference_K: Tensor) -> Tensor:
    """KL of the policy from the reference by each sampled token, nats, never negative, unbiased, (K,).

    Source: Schulman 2020, "Approximating KL divergence", estimator k3.
    """
    gap_K = reference_K - logps_K
    return torch.expm1(gap_K) - gap_K


def clipped_value_loss(values_K: Tensor, old_K: Tensor, returns_K: Tensor, *, clip: float) -> Tensor:
    """Half the squared error of each value, or of the value held within `clip` of the old one if that is larger, (K,).

    Source: Schulman et al. 2017; the clipping is of OpenAI's baselines.
    """
    held_K = old_K + (values_K - old_K).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_K - returns_K) ** 2, (held_K - returns_K) ** 2)


def estimate_advantages(
    rewards_T: Sequence[float], values_T: Sequence[float], *, gamma: float, gae_lambda: float
) -> tuple[Floats, Floats]:
    """(advantages, returns) of the tokens of one answer, each (T,); after its last token nothing is worth anything.

    rewards_T: for choosing each token; values_T: expected before it.
    Source: Schulman et al. 2015, arXiv:1506.02438, Eq. 16.
    """
    values = np.asarray(values_T, dtype=np.float64)
    surprises = np.asarray(rewards_T, dtype=np.float64) + gamma * np.append(values[1:], 0.0) - values
    advantages = np.empty_like(surprises)
    ahead = 0.0
    for at in range(len(surprises) - 1, -1, -1):
        ahead = advantages[at] = surprises[at] + gamma * gae_lambda * ahead
    return advantages, advantages + values


def compare_in_group(rewards_G: Sequence[float], *, by_deviation: bool) -> Floats:
    """How much better each answer is than the mean of its group, (G,); in deviations of the group if asked. All zero
    if all are equal.

    Source: Shao et al. 2024, arXiv:2402.03300, 4.1.2; without the deviation: Liu et al. 2025, arXiv:2503.20783.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    above = rewards - rewards.mean()
    if not by_deviation:
        return above
    deviation = rewards.std(ddof=1)
    return above / (deviation + 1e-4)


def whiten(values: Floats, *, center: bool = True) -> Floats:
    """Brought to variance 1, and to mean 0 if asked; as they are where all are equal."""
    deviation = values.std()
    mean = values.mean()
    scaled = (values - mean) / (deviation + 1e-8) if deviation > 0 else np.zeros_like(values)
    return scaled if center else scaled + mean
