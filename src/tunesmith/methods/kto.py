"""Kahneman-Tversky optimisation: answers with a label each.

N: answers
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.job.objective import KtoSpec


def kto_loss(gain_N: Tensor, desirable_N: Tensor, spec: KtoSpec, *, baseline: Tensor) -> Tensor:
    """Loss of each answer, (N,): weight * (1 - value), the value growing with the gain of good answers.

    gain_N:      log-probability of the answer under the policy minus under the reference, nats.
    desirable_N: 1 for good answers, 0 for bad ones.
    baseline:    what the policy gained on answers to other prompts, nats, at least 0 and without a gradient.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8.
    """
    sign_N = 2 * desirable_N - 1
    weight_N = torch.where(desirable_N > 0, spec.desirable_weight, spec.undesirable_weight)
    return weight_N * torch.sigmoid(-spec.beta * sign_N * (gain_N - baseline))
