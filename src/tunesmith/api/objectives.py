"""A job's objective, ready for the loop: examples, loss, validation, and what the reference thinks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.core.errors import RunDirError
from tunesmith.core.fingerprint import hash_json, hash_rows
from tunesmith.core.rundir import as_rundir_error
from tunesmith.core.types import Example, TokenRow
from tunesmith.data.batch import plan_micro_batches
from tunesmith.data.examples import WithNumber, flatten
from tunesmith.data.prepare import Prepared
from tunesmith.job.objective import KtoSpec
from tunesmith.job.spec import Job

if TYPE_CHECKING:
    from tunesmith.methods.objective import Objective
    from tunesmith.models.causal_lm import CausalLM

MakeBatch = Callable[[Sequence[Any], Any], Any]


class Aim(NamedTuple):
    """examples: of the training split. evaluate: mean loss over the validation split, nats per example; None without
    one."""

    objective: Objective
    examples: Sequence[Example]
    evaluate: Callable[[], float] | None


def take_aim(
    job: Job,
    model: CausalLM,
    prepared: Prepared,
    *,
    make_batch: MakeBatch,
    cache: Path,
    identity: str,
    budget_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Aim:
    """The objective of a job whose rows are examples: pairs, or labelled answers.

    The model is as training finds it: the reference, whose log-probabilities are kept in `cache`.
    identity: what else than rows decides them (weights, precision), for that file.
    """
    from tunesmith.methods.objectives import (
        REFERENCE,
        KtoBaseline,
        answer_logps,
        make_objective,
        mismatch,
        needs_reference,
    )

    spec = job.objective_spec

    def run(rows: Sequence[TokenRow], on_rows: Callable[[int], None] = lambda _: None) -> Any:
        """Log-probability of each row's targets, without gradients."""
        import torch

        found = torch.empty(len(rows), dtype=torch.float32)
        with torch.no_grad():
            for numbers in plan_micro_batches([len(row.ids) for row in rows], budget_tokens=budget_tokens):
                batch = make_batch([rows[number] for number in numbers], model.device)
                found[numbers] = answer_logps(model, batch).float().cpu()
                on_rows(len(numbers))
        return found

    splits: dict[str, Sequence[Any]] = {
        name: prepared.examples(name) for name in ("train", "validation") if name in prepared.splits
    }
    others: dict[str, list[TokenRow]] = {}
    if isinstance(spec, KtoSpec):
        others = {name: mismatch(flatten(examples)) for name, examples in splits.items()}
    if needs_reference(spec):
        measured = {name: flatten(examples) for name, examples in splits.items()}
        measured |= {f"{name}.others": rows for name, rows in others.items()}
        values = _measure_reference(model, measured, run, cache, identity, on_progress)
        splits = {name: WithNumber(examples, REFERENCE, values[name]) for name, examples in splits.items()}
        others = {
            name: list(WithNumber(rows, REFERENCE, values[f"{name}.others"])) for name, rows in others.items()
        }

    def make(name: str) -> Objective:
        if name not in others:
            return make_objective(spec)
        by_id = {row.row_id: row for row in others[name]}
        return make_objective(spec, baseline=KtoBaseline(by_id, lambda _, rows: run(rows).to(model.device)))

    evaluate = None
    if "validation" in splits:
        evaluate = _make_validation(
            model, make("validation"), splits["validation"], make_batch, budget_tokens
        )
    return Aim(make("train"), splits["train"], evaluate)


def _make_validation(
    model: CausalLM, objective: Objective, examples: Sequence[Example], make_batch: MakeBatch, budget: int
) -> Callable[[], float]:
    def evaluate() -> float:
        import torch

        total = 0.0
        lengths = [len(example.ids) for example in examples]
        with torch.no_grad():
            if objective.before_step is not None:
                objective.before_step(model, examples)
            for numbers in plan_micro_batches(lengths, budget_tokens=budget):
                batch = make_batch([examples[number] for number in numbers], model.device)
                total += objective.loss(model, batch).total.item()
        return total / len(examples)

    return evaluate


def _measure_reference(
    model: CausalLM,
    rows: dict[str, list[TokenRow]],
    run: Callable[..., Any],
    cache: Path,
    identity: str,
    on_progress: Callable[[int, int], None],
) -> dict[str, list[float]]:
    """Log-probabilities of rows under the model as it is, by split; read from `cache` if they are the same rows and
    weights."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    key = hash_json(
        {name: hash_rows(row.row_id for row in split) for name, split in rows.items()} | {"": identity}
    )
    if cache.is_file():
        try:
            with safe_open(str(cache), "pt") as kept:
                if kept.metadata().get("key") == key:
                    return {name: kept.get_tensor(name).tolist() for name in rows}
        except Exception as error:  # whatever a damaged file raises
            raise RunDirError(
                str(cache), f"cannot be read ({error})", cure="Delete it; it is computed again"
            ) from None
    total, done = sum(map(len, rows.values())), 0
    was_training = model.training
    model.train(False)

    def count(number: int) -> None:
        nonlocal done
        done += number
        on_progress(done, total)

    found = {name: run(split, count) for name, split in rows.items()}
    model.train(was_training)
    try:
        partial = cache.with_name(cache.name + ".tmp")
        save_file({name: torch.as_tensor(values) for name, values in found.items()}, partial, {"key": key})
        partial.replace(cache)
    except OSError as error:
        raise as_rundir_error(error, cache) from None
    return {name: values.tolist() for name, values in found.items()}
