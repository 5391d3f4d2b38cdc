"""Objectives in the stepper: how a step is cut changes nothing, and training begins where the formulas say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_row, make_rows, relative_error

from tunesmith.core.types import Example, RowGroup, TokenRow
from tunesmith.data.examples import WithNumber, flatten
from tunesmith.job.objective import GrpoSpec, ObjectiveSpec, PpoSpec, as_objective_spec, kind_of_rows
from tunesmith.job.spec import LoraSpec, TrainSpec
from tunesmith.methods.objective import Objective
from tunesmith.methods.objectives import (
    DESIRABLE,
    REFERENCE,
    KtoBaseline,
    answer_logps,
    make_objective,
    mismatch,
)
from tunesmith.methods.policy_objectives import (
    ADVANTAGE,
    OLD,
    OLD_VALUE,
    RETURN,
    REWARD,
    TOKEN_REFERENCE,
)
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
from tunesmith.training.optim import LossScale
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.step import Stepper, StepResult

LENGTHS = [20, 31, 6, 9, 14, 40, 5, 17, 11, 12, 33, 8, 21, 10, 7, 26]


def make_batch_of(examples: Sequence[Example], device: torch.device) -> Any:
    return make_batch(flatten(examples), device=device, round_tokens=16)


def open_adapted(folder: Any, *, trained: bool = False, device: str = "cpu") -> Any:
    """A model with adapters, fresh (equal to its base) or as if it had been trained."""
    model = load_model(folder, device=device)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    model.add_score()
    if trained:
        draw = torch.Generator().manual_seed(3)
        for parameter in model.trainable_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw).to(device)
    return model


def run(model: Any, rows: Sequence[TokenRow]) -> torch.Tensor:
    with torch.no_grad():
        return answer_logps(model, make_batch(rows, device=model.device))


def aim(spec: ObjectiveSpec, base: Any) -> tuple[Objective, list[Example]]:
    """An objective and eight examples for it, `base` being the reference."""
    rows = make_rows(LENGTHS)
    if spec.name == "reward":
        return make_objective(spec), [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
    if kind_of_rows(spec) == "pairs":
        examples: list[Any] = [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        return make_objective(spec), list(WithNumber(examples, REFERENCE, run(base, rows).tolist()))
    rows = rows[:8]
    labels = [float(at % 2) for at in range(8)]
    known = WithNumber(WithNumber(rows, DESIRABLE, labels), REFERENCE, run(base, rows).tolist())
    others = mismatch(rows)
    others = list(WithNumber(others, REFERENCE, run(base, others).tolist()))
    baseline = KtoBaseline({row.row_id: row for row in others}, run)
    return make_objective(spec, baseline=baseline), list(known)


def take_step(model: Any, objective: Objective, examples: list[Example], *, budget: int) -> StepResult:
    spec = TrainSpec(optimizer="adamw")
    stepper = Stepper(
        model,
        make_optimizer(model, dict(model.named_trainable()), spec),
        make_batch=make_batch_of,
        loss=objective,
        device=model.device,
        budget_tokens=budget,
        clip_norm=None,
        scale=LossScale(enabled=False),
    )
    return stepper.take(examples, step=1, learning_rate=1e-2)


SPECS: list[Any] = [
    "dpo",
    {"name": "dpo", "loss": "ipo"},
    {"name": "dpo", "sft_weight": 1.0, "length_normalised": True},
    "orpo",
    "simpo",
    "kto",
    "reward",
    {"name": "reward", "center": 0.1},
]


ROLLOUTS: list[Any] = [
    GrpoSpec(name="grpo", rewards=["exact_match"]),
    GrpoSpec(name="grpo", rewards=["exact_match"], normalise="answer", beta=0.1),
    PpoSpec(name="ppo", rewards=["exact_match"]),
]


def spec_of(value: Any) -> ObjectiveSpec:
    if isinstance(value, GrpoSpec | PpoSpec):
        return value
    if isinstance(value, str):
        return as_objective_spec(value)
    return as_objective_spec(value["name"]).model_copy(update=value)


@pytest.mark.parametrize("value", SPECS, ids=str)
def test_eight_examples_at_once_are_eight_by_themselves(hf_folders: Any, device: str, value: Any) -> None:
    folder = hf_folders("qwen2")[0]
    objective, examples = aim(spec_of(value), open_adapted(folder, device=device))
    results, weights = [], []
    for budget in (1, 60, 10_000):
        model = open_adapted(folder, trained=True, device=device)
        results.append(take_step(model, objective, examples, budget=budget))
        weights.append(torch.cat([p.detach().flatten() for p in model.trainable_parameters()]))
    for result, weight in zip(results[1:], weights[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
        assert result.measures == pytest.approx(results[0].measures, rel=1e-4)
        # Adam's first step is the gradient's sign: where a gradient is rounding alone, it may turn.
        assert relative_error(weight, weights[0]) < 1e-2
    assert results[0].grad_norm > 0


@pytest.mark.parametrize(("value", "expected"), [("dpo", math.log(2)), ("kto", 0.5), ("reward", math.log(2))])
def test_training_begins_at_the_reference(hf_folders: Any, device: str, value: str, expected: float) -> None:
    model = open_adapted(hf_folders("llama")[0], device=device)
    objective, examples = aim(as_objective_spec(value), model)
    result = take_step(model, objective, examples, budget=100)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.measures["margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("value", SPECS, ids=str)
def test_gradients_are_those_of_the_definition(hf_folders: Any, device: str, value: Any) -> None:
    """Against autograd through logits of every row alone, in fp64 behind the model's own hidden states."""
    folder, spec = hf_folders("llama")[0], spec_of(value)
    objective, examples = aim(spec, open_adapted(folder, device=device))
    found = open_adapted(folder, trained=True, device=device)
    if objective.before_step is not None:
        objective.before_step(found, examples)
    objective.loss(found, make_batch_of(examples, found.device)).total.backward()
    plain = open_adapted(folder, trained=True, device=device)
    rows = flatten(examples)
    logps = []
    for row in rows:
        batch = make_batch([row], device=device)
        hidden_TD = plain.hidden(batch.ids_T, batch.layout)
        logits = plain.head(hidden_TD)[batch.sources_K].double()
        logp = logits.log_softmax(-1).gather(1, batch.targets_K[:, None]).sum()
        score = (hidden_TD[-1].double() * plain.score.weight.double()).sum()
        logps.append(score if spec.name == "reward" else logp)
    define_loss(spec, rows, logps, objective).backward()
    both = zip(found.trainable_parameters(), plain.trainable_parameters(), strict=True)
    for one, other in both:
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or relative_error(one.grad, other.grad) < 1e-4


@pytest.mark.parametrize("value", ["dpo", "orpo", "simpo", "reward"])
def test_a_prompt_that_both_answers_share_changes_no_loss_and_no_gradient(
    hf_folders: Any, value: str
) -> None:
    folder = hf_folders("llama")[0]
    prompts, answers = make_rows([24, 40, 30], seed=1), make_rows([9, 14, 70, 20, 5, 33], seed=2)
    rows = []
    for at, answer in enumerate(answers):
        prompt = prompts[at // 2].ids
        rows.append(make_row([*prompt, *answer.ids], [0] * len(prompt) + [1] * len(answer.ids)))
    pairs: list[Any] = [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
    objective = make_objective(as_objective_spec(value))
    found = []
    for share in (False, True):
        batch = make_batch(flatten(WithNumber(pairs, REFERENCE, [-9.0] * 6)), share_prefix=share)
        # The last token of a prompt is the source of a target, which each answer has for itself.
        assert batch.layout.num_tokens == sum(len(row.ids) for row in rows) - share * (23 + 39 + 29)
        model = open_adapted(folder, trained=True)
        total = objective.loss(model, batch).total
        total.backward()
        gradients = [p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]
        found.append((total.item(), torch.cat(gradients)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert relative_error(found[1][1], found[0][1]) < 1e-5


def sample_rows() -> list[Any]:
    """Answers with all that sampling knows of them, for PPO and GRPO."""
    draw = torch.Generator().manual_seed(5)

    def know(row: TokenRow) -> TokenRow:
        of_tokens = {
            name: torch.randn(row.num_targets, generator=draw).tolist()
            for name in (OLD, ADVANTAGE, TOKEN_REFERENCE, OLD_VALUE, RETURN)
        }
        of_tokens[OLD] = [-3 + 0.1 * value for value in of_tokens[OLD]]
        return replace(row, numbers={**of_tokens, REWARD: float(len(row.ids))})

    return [know(row) for row in make_rows(LENGTHS[:8])]


def lose_target(example: Any) -> Any:
    """The same with other tokens, and one target less in each row that has several."""
    if isinstance(example, RowGroup):
        return RowGroup(tuple(lose_target(row) for row in example.rows))
    row: TokenRow = example
    lost = row.num_targets > 1
    start = list(row.mask).index(1) + lost
    mask = [0] * start + [1] * (len(row.mask) - start)
    numbers = {n: v if isinstance(v, float) else v[lost:] for n, v in row.numbers.items()}  # type: ignore[index]
    return replace(row, ids=list(reversed(row.ids)), mask=mask, numbers=numbers)


@pytest.mark.parametrize("value", [*SPECS, *ROLLOUTS], ids=str)
def test_a_batch_filled_up_for_recording_costs_what_another_of_its_signature_does(
    hf_folders: Any, device: str, value: Any
) -> None:
    folder = hf_folders("llama")[0]
    spec = spec_of(value)
    if kind_of_rows(spec) == "prompts":
        objective, examples = make_objective(spec), sample_rows()
    else:
        objective, examples = aim(spec, open_adapted(folder, device=device))
    recorded, batch = (
        make_batch_of(step, torch.device(device))
        for step in (examples, [lose_target(examples[0]), *examples[1:]])
    )
    fixed = recorded.fixed()
    assert fixed.num_targets > recorded.num_targets > batch.num_targets
    assert recorded.signature(by_rows=True) == batch.signature(by_rows=True)
    fixed.copy_(batch)
    results = []
    for given in (batch, fixed):
        model = open_adapted(folder, trained=True, device=device)
        if objective.before_step is not None:
            objective.before_step(model, examples)
        found = objective.loss(model, given)
        found.total.backward()
        gradients = [p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]
        measures = {name: measure.item() for name, measure in found.measures.items()}
        results.append((found.total.item(), measures, torch.cat(gradients)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)
    assert relative_error(results[1][2], results[0][2]) < 1e-5


def test_batches_of_other_numbers_of_rows_differ_where_rows_are_weighed() -> None:
    one, other = (make_batch(make_rows([8] * count), round_tokens=64) for count in (2, 3))
    names = {"any_lengths": True}
    assert one.signature(**names, by_rows=True) != other.signature(**names, by_rows=True)


def define_loss(spec: Any, rows: list[TokenRow], logps: list[torch.Tensor], objective: Objective) -> Any:
    """The papers' formulas, example by example."""
    frozen = [row.numbers.get(REFERENCE, 0.0) for row in rows]
    total: Any = 0.0
    if spec.name == "kto":
        baseline = float(objective.before_step.__self__.value)  # type: ignore[union-attr]
        for row, logp, known in zip(rows, logps, frozen, strict=True):
            sign = 2 * float(row.numbers[DESIRABLE]) - 1  # type: ignore[arg-type]
            total = total + 1 - torch.sigmoid(spec.beta * sign * (logp - known - baseline))
        return total
    for at in range(0, len(rows), 2):
        good, bad, gain = logps[at], logps[at + 1], [logps[n] - frozen[n] for n in (at, at + 1)]
        tokens = [rows[n].num_targets for n in (at, at + 1)]
        mean_good, mean_bad = good / tokens[0], bad / tokens[1]
        mean_margin = gain[0] / tokens[0] - gain[1] / tokens[1]
        if spec.name == "dpo" and spec.loss == "ipo":
            total = total + (mean_margin - 0.5 / spec.beta) ** 2
        elif spec.name == "dpo" and spec.length_normalised:
            total = total - torch.log(torch.sigmoid(spec.beta * mean_margin)) - spec.sft_weight * mean_good
        elif spec.name == "dpo":
            total = total - torch.log(torch.sigmoid(spec.beta * (gain[0] - gain[1])))
        elif spec.name == "reward":
            total = total - torch.log(torch.sigmoid(good - bad)) + spec.center * (good + bad) ** 2
        elif spec.name == "simpo":
            total = total - torch.log(torch.sigmoid(spec.beta * (mean_good - mean_bad) - spec.margin))
        else:
            p, q = mean_good.exp(), mean_bad.exp()
            odds = (p / (1 - p)) / (q / (1 - q))
            total = total - mean_good - spec.weight * torch.log(torch.sigmoid(torch.log(odds)))
    return total


def test_an_answer_of_another_prompt_is_the_next_rows_prompt_and_the_rows_own_answer() -> None:
    first, second, third = make_rows([6, 7, 8])
    found = mismatch([first, second, third])
    start = [next(at for at, m in enumerate(row.mask) if m) for row in (first, second, third)]
    assert found[0].ids == [*second.ids[: start[1]], *first.ids[start[0] :]]
    assert sum(found[0].mask) == first.num_targets
    assert found[2].ids == [*first.ids[: start[0]], *third.ids[start[2] :]]


def test_an_answer_goes_behind_the_next_prompt_that_is_another_one() -> None:
    first, second = make_rows([6, 7])
    found = mismatch([first, first, second, second])
    start = [next(at for at, m in enumerate(row.mask) if m) for row in (first, second)]
    assert [row.ids[: start[1]] for row in found[:2]] == [second.ids[: start[1]]] * 2
    assert [row.ids[: start[0]] for row in found[2:]] == [first.ids[: start[0]]] * 2
    assert mismatch([first, first])[0].ids == first.ids
