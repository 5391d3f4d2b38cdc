"""PPO and GRPO as objectives: what a batch of sampled answers costs.

Rows are prompts with a sampled answer. What sampling knew of them travels as their numbers, one for each token of an
answer, and its reward.

K: sampled tokens of a batch  N: answers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from tunesmith.job.objective import GrpoSpec, PpoSpec
from tunesmith.methods.logprobs import count_row_targets, head_logps, source_states, sum_rows, token_logps
from tunesmith.methods.objective import LossSum, Objective
from tunesmith.methods.policy import clipped_policy_loss, clipped_value_loss, count_clipped, estimate_kl
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch

OLD, ADVANTAGE, TOKEN_REFERENCE = "old_logp", "advantage", "reference_logp"
RETURN, OLD_VALUE, REWARD = "return", "old_value", "reward"
_MEASURES = ("reward", "answer_tokens", "clipped")


def grpo_objective(spec: GrpoSpec, *, terms: Sequence[str] = ()) -> Objective:
    """terms: numbers of rows that are worth logging beside the reward: what it is made of."""
    measures = (*_MEASURES, *terms, *(("kl",) if spec.beta else ()))

    def run(model: CausalLM, batch: Batch) -> LossSum:
        logps_K = token_logps(model, batch, temperature=spec.temperature)
        losses_K, found = _weigh(logps_K, batch, spec, terms, clip_high=spec.clip_high)
        if spec.beta:
            kl_K = estimate_kl(logps_K, batch.numbers[TOKEN_REFERENCE])
            losses_K = losses_K + spec.beta * kl_K
            found["kl"] = kl_K.detach().sum()
        if spec.normalise == "answer":
            losses_K = losses_K / count_row_targets(batch)[batch.row_K]
        elif spec.normalise == "length":
            losses_K = losses_K / spec.max_new_tokens
        return LossSum(losses_K.sum(), batch.num_targets, found)

    return Objective(run, measures=measures, per_example=spec.normalise != "tokens")


def ppo_objective(spec: PpoSpec, *, terms: Sequence[str] = ()) -> Objective:
    """terms: as of `grpo_objective`."""

    def run(model: CausalLM, batch: Batch) -> LossSum:
        hidden_KD = source_states(model, batch)
        logps_K = head_logps(model, hidden_KD, batch, temperature=spec.temperature)
        losses_K, found = _weigh(logps_K, batch, spec, terms)
        values_K, numbers = expect(model, hidden_KD, batch), batch.numbers
        value_K = clipped_value_loss(values_K, numbers[OLD_VALUE], numbers[RETURN], clip=spec.value_clip)
        value_K = value_K * (batch.targets_K >= 0)
        kl_K = (logps_K - numbers[TOKEN_REFERENCE]).detach()
        means_N = sum_rows(value_K.detach(), batch) / count_row_targets(batch)
        found |= {"kl": kl_K.sum(), "value_loss": means_N.sum()}
        return LossSum((losses_K + spec.value_weight * value_K).sum(), batch.num_targets, found)

    return Objective(run, measures=(*_MEASURES, *terms, "kl", "value_loss"))


def expect(model: CausalLM, hidden_KD: Tensor, batch: Batch) -> Tensor:
    """The reward that the model expects before each sampled token, (K,)."""
    assert model.score is not None
    kept_KD = hidden_KD[: batch.num_targets].to(model.score.weight.dtype)
    return F.linear(kept_KD, model.score.weight).squeeze(1)


def _weigh(
    logps_K: Tensor,
    batch: Batch,
    spec: GrpoSpec | PpoSpec,
    terms: Sequence[str],
    *,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy losses of tokens, and what is worth logging."""
    numbers: Mapping[str, Tensor] = batch.numbers
    # Of answers that the weights as they are have sampled, what they say is what they said.
    old_K = numbers[OLD].to(logps_K.dtype) if OLD in numbers else logps_K.detach()
    given = (logps_K, old_K, numbers[ADVANTAGE])
    counts_N = count_row_targets(batch)
    clipped_N = sum_rows(
        count_clipped(*(t.detach() for t in given), clip=spec.clip, clip_high=clip_high), batch
    )
    found = {
        "reward": numbers[REWARD].sum(),
        "answer_tokens": counts_N.sum(),
        "clipped": (clipped_N / counts_N).sum(),
        **{term: numbers[term].sum() for term in terms},
    }
    return clipped_policy_loss(*given, clip=spec.clip, clip_high=clip_high), found
