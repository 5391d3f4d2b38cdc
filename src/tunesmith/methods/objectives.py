"""From `objective` in a job to what the loop minimises.

N: rows of a batch  P: pairs, of which row 2p is chosen and row 2p + 1 rejected
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import Example, TokenRow
from tunesmith.job.objective import (
    DistillSpec,
    DpoSpec,
    GrpoSpec,
    KtoSpec,
    ObjectiveSpec,
    OrpoSpec,
    PpoSpec,
    RewardSpec,
    SimpoSpec,
)
from tunesmith.methods.distill import Teacher, distill_objective
from tunesmith.methods.kto import kto_loss
from tunesmith.methods.logprobs import count_row_targets, sum_rows, token_logps
from tunesmith.methods.objective import LossSum, Objective
from tunesmith.methods.policy_objectives import grpo_objective, ppo_objective
from tunesmith.methods.preference import PairLogps, PairLoss, dpo_loss, orpo_loss, reward_loss, simpo_loss
from tunesmith.methods.sft import round_up, sft_loss
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch

REFERENCE = "reference_logp"
"""Number of a row: the log-probability of its targets under the reference, summed, nats."""
DESIRABLE = "desirable"
"""Number of a labelled row: 1 for a good answer, 0 for a bad one."""
_PAIR_MEASURES = ("accuracy", "margin", "chosen_reward", "rejected_reward")
_KTO_MEASURES = ("accuracy", "margin")

RunRows = Callable[[CausalLM, Sequence[TokenRow]], Tensor]


def needs_reference(spec: ObjectiveSpec) -> bool:
    return isinstance(spec, DpoSpec | KtoSpec)


def make_objective(
    spec: ObjectiveSpec,
    *,
    baseline: KtoBaseline | None = None,
    terms: Sequence[str] = (),
    teacher: Teacher | None = None,
) -> Objective:
    """The objective of a spec.

    baseline: of `kto` alone, which needs one. terms: of `grpo` and `ppo`, numbers of rows that are logged.
    teacher: of `distill` alone, which needs one.
    """
    if isinstance(spec, DpoSpec):
        return _of_pairs(lambda policy, frozen: dpo_loss(policy, _given(frozen), spec))
    if isinstance(spec, OrpoSpec):
        return _of_pairs(lambda policy, _: orpo_loss(policy, weight=spec.weight))
    if isinstance(spec, SimpoSpec):
        return _of_pairs(lambda policy, _: simpo_loss(policy, beta=spec.beta, margin=spec.margin))
    if isinstance(spec, KtoSpec):
        if baseline is None:
            raise ValueError("kto needs the answers of other prompts: give a KtoBaseline")
        return _of_answers(spec, baseline)
    if isinstance(spec, DistillSpec):
        if teacher is None:
            raise ValueError("distill needs a teacher")
        return distill_objective(spec, teacher)
    if isinstance(spec, RewardSpec):
        return _of_scores(spec)
    if isinstance(spec, GrpoSpec):
        return grpo_objective(spec, terms=terms)
    if isinstance(spec, PpoSpec):
        return ppo_objective(spec, terms=terms)
    return Objective(sft_loss)


def answer_logps(model: CausalLM, batch: Batch) -> Tensor:
    """Log-probability of each row's targets, summed, (N,), nats."""
    return sum_rows(token_logps(model, batch), batch)


def score_answers(model: CausalLM, batch: Batch) -> Tensor:
    """A reward model's score of each row, read behind its last token, (N,), fp32."""
    if model.score is None:
        raise ValueError("a model without a score gives none: CausalLM.add_score")
    ends_N = batch.layout.cumulative_N1[1 : batch.num_rows + 1].long() - 1
    hidden_ND = model.hidden(batch.ids_T, batch.layout, round_up(ends_N))[: batch.num_rows]
    return F.linear(hidden_ND.to(model.score.weight.dtype), model.score.weight).squeeze(1)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _of_pairs(loss: Callable[[PairLogps, PairLogps | None], PairLoss]) -> Objective:
    def run(model: CausalLM, batch: Batch) -> LossSum:
        tokens_N = count_row_targets(batch)
        policy = _pair(answer_logps(model, batch), tokens_N)
        frozen = batch.numbers.get(REFERENCE)
        found = loss(policy, None if frozen is None else _pair(frozen.to(policy.chosen.dtype), tokens_N))
        return LossSum(found.losses.sum(), batch.num_targets, _measure_pairs(found))

    return Objective(run, measures=_PAIR_MEASURES, per_example=True)


def _of_scores(spec: RewardSpec) -> Objective:
    def run(model: CausalLM, batch: Batch) -> LossSum:
        scores_N = score_answers(model, batch)
        found = reward_loss(scores_N[0::2], scores_N[1::2], center=spec.center)
        return LossSum(found.losses.sum(), batch.num_targets, _measure_pairs(found))

    return Objective(run, measures=_PAIR_MEASURES, per_example=True)


def _pair(values_N: Tensor, tokens_N: Tensor) -> PairLogps:
    return PairLogps(values_N[0::2], values_N[1::2], tokens_N[0::2], tokens_N[1::2])


def _given(frozen: PairLogps | None) -> PairLogps:
    if frozen is None:
        raise ValueError(f"rows have no {REFERENCE}; a reference comes before training")
    return frozen


def _measure_pairs(found: PairLoss) -> Mapping[str, Tensor]:
    chosen, rejected = found.chosen.detach(), found.rejected.detach()
    higher = (chosen > rejected).sum()
    return _name(_PAIR_MEASURES, higher, (chosen - rejected).sum(), chosen.sum(), rejected.sum())


def _name(names: Sequence[str], *values: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, values, strict=True))


# --- labelled answers -------------------------------------------------------------------------------------------------


class KtoBaseline:
    """What the policy has gained over the reference on answers to other prompts: a mean over a whole step, so that it
    does not depend on how the step is cut into forward passes.

    others: of each row (by its `row_id`), its answer behind another row's prompt, with the reference's log-probability.
    run:    (model, rows) -> log-probability of each row's targets, (N,).
    """

    def __init__(self, others: Mapping[str, TokenRow], run: RunRows) -> None:
        self._others, self._run = others, run
        self.value: Tensor | None = None

    def before_step(self, model: CausalLM, examples: Sequence[Example]) -> None:
        rows = [self._others[example.row_id] for example in examples]
        frozen_N = torch.tensor([float(row.numbers[REFERENCE]) for row in rows])  # pyright: ignore[reportArgumentType]
        gain_N = self._run(model, rows) - frozen_N.to(model.device)
        value = gain_N.mean().clamp(min=0)
        # In its place: a recorded pass reads it there.
        self.value = value if self.value is None else self.value.copy_(value)


def mismatch(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Of each row, its answer behind the prompt of the next row that has another; behind its own if there is none."""
    prompts = [tuple(row.ids[: _prompt_length(row)]) for row in rows]
    nexts, count = list(range(len(rows))), len(rows)
    # From the end, twice around: the next row's prompt, or what comes next to it if that is the same.
    for place in reversed(range(2 * count)):
        at, after = place % count, (place + 1) % count
        nexts[at] = after if prompts[after] != prompts[at] else nexts[after]
    found: list[TokenRow] = []
    for at, row in enumerate(rows):
        other = prompts[nexts[at]]
        start = len(prompts[at])
        ids = [*other, *row.ids[start:]]
        mask = [*[0] * len(other), *row.mask[start:]]
        found.append(TokenRow(ids, mask, row.origin, row.row_id))
    return found


def _prompt_length(row: TokenRow) -> int:
    return next(at for at, target in enumerate(row.mask) if target)


def _of_answers(spec: KtoSpec, baseline: KtoBaseline) -> Objective:
    def run(model: CausalLM, batch: Batch) -> LossSum:
        logps_N, desirable_N = answer_logps(model, batch), batch.numbers[DESIRABLE]
        gain_N = logps_N - batch.numbers[REFERENCE].to(logps_N.dtype)
        assert baseline.value is not None, "before_step comes first"
        losses_N = kto_loss(gain_N, desirable_N, spec, baseline=baseline.value.to(logps_N.dtype))
        # How far a good answer's reward is above the baseline, or a bad one's below it.
        margin_N = spec.beta * (gain_N.detach() - baseline.value) * (2 * desirable_N - 1)
        return LossSum(
            losses_N.sum(), batch.num_targets, _name(_KTO_MEASURES, (margin_N > 0).sum(), margin_N.sum())
        )

    return Objective(run, measures=_KTO_MEASURES, per_example=True, before_step=baseline.before_step)
