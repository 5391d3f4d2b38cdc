"""Losses over pairs of answers to one prompt, from the log-probabilities of both.

P: pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.job.objective import DpoSpec


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of answers, summed over their tokens, nats, and the answers' tokens; each (P,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __post_init__(self) -> None:
        shapes = {t.shape for t in (self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens)}
        if len(shapes) > 1:
            raise ValueError(f"log-probabilities of pairs have shapes {sorted(map(tuple, shapes))}; one each")

    def per_token(self) -> PairLogps:
        """Averages over the answers' tokens in place of sums."""
        return PairLogps(
            self.chosen / self.chosen_tokens,
            self.rejected / self.rejected_tokens,
            self.chosen_tokens,
            self.rejected_tokens,
        )


@dataclass(frozen=True, slots=True)
class PairLoss:
    """losses: of each pair, nats. chosen, rejected: implicit rewards, beta times what the policy gained over the
    reference (without one: its log-probability). Each (P,)."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


def dpo_loss(policy: PairLogps, frozen: PairLogps, spec: DpoSpec) -> PairLoss:
    """-log sigmoid(beta * margin) of each pair, or what `spec.loss` puts in its place.

    The margin is how much more the policy prefers the chosen answer than `frozen` does, in nats.
    Raises ValueError if the shapes differ: broadcasting would mix pairs.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences"; robust: Ray Chowdhury et al. 2024, arXiv:2403.00409; ipo: Azar et al. 2023, arXiv:2310.12036, Eq. 17;
    hinge: Zhao et al. 2023, arXiv:2305.10425.
    """
    if policy.chosen.shape != frozen.chosen.shape:
        raise ValueError(
            f"{policy.chosen.shape[0]} pairs of the policy, {frozen.chosen.shape[0]} of the reference"
        )
    tokens = policy.chosen_tokens
    mean_nll = -policy.chosen / tokens
    if spec.length_normalised or spec.loss == "ipo":
        policy, frozen = policy.per_token(), frozen.per_token()
    gain_chosen, gain_rejected = policy.chosen - frozen.chosen, policy.rejected - frozen.rejected
    margin = gain_chosen - gain_rejected
    flipped = spec.label_smoothing
    right, wrong = F.logsigmoid(spec.beta * margin), F.logsigmoid(-spec.beta * margin)
    if spec.loss == "sigmoid":
        losses = -(1 - flipped) * right - flipped * wrong
    elif spec.loss == "robust":
        losses = (-(1 - flipped) * right + flipped * wrong) / (1 - 2 * flipped)
    elif spec.loss == "hinge":
        losses = torch.relu(1 - spec.beta * margin)
    else:
        losses = (margin - 1 / (2 * spec.beta)) ** 2
    if spec.sft_weight:
        losses = losses + spec.sft_weight * mean_nll
    return PairLoss(losses, spec.beta * gain_chosen, spec.beta * gain_rejected)


def orpo_loss(policy: PairLogps, *, weight: float) -> PairLoss:
    """Mean negative log-likelihood of the chosen answer, and -log sigmoid of the log odds ratio times `weight`.

    The odds of an answer are p / (1 - p) with p its mean probability per token (geometric).
    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    policy = policy.per_token()

    def log_odds(logp: Tensor) -> Tensor:
        # log(1 - p) of p = exp(logp); a certain answer (logp = 0) keeps finite odds.
        return logp - torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).eps)))

    ratio = log_odds(policy.chosen) - log_odds(policy.rejected)
    losses = -policy.chosen - weight * F.logsigmoid(ratio)
    return PairLoss(losses, policy.chosen, policy.rejected)


def simpo_loss(policy: PairLogps, *, beta: float, margin: float) -> PairLoss:
    """-log sigmoid(beta * (mean log-probability of chosen - of rejected) - margin) of each pair.

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    policy = policy.per_token()
    chosen, rejected = beta * policy.chosen, beta * policy.rejected
    return PairLoss(-F.logsigmoid(chosen - rejected - margin), chosen, rejected)


def reward_loss(chosen_P: Tensor, rejected_P: Tensor, *, center: float) -> PairLoss:
    """-log sigmoid(score of chosen - score of rejected), and `center` times the squared sum of both.

    Source: Bradley and Terry 1952; Eisenstein et al. 2023, arXiv:2312.09244 (centering).
    """
    losses = -F.logsigmoid(chosen_P - rejected_P) + center * (chosen_P + rejected_P) ** 2
    return PairLoss(losses, chosen_P, rejected_P)
