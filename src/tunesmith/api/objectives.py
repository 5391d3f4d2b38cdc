"""A job's objective, ready for the loop: examples, loss, validation, and what the reference thinks of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.api.aim import Aim, Setting
from tunesmith.api.fingerprints import fingerprint_data
from tunesmith.api.prompt_aim import open_prompt_aim
from tunesmith.api.teacher import open_teacher
from tunesmith.api.trainable import training_lengths
from tunesmith.core.errors import RunDirError
from tunesmith.core.fingerprint import hash_json, hash_rows
from tunesmith.core.rundir import as_rundir_error
from tunesmith.core.types import Example, TokenRow
from tunesmith.data.batch import plan_micro_batches
from tunesmith.data.collect import Rejects
from tunesmith.data.examples import WithNumber, flatten
from tunesmith.data.prepare import Prepared
from tunesmith.data.stream import open_stream
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.objective import DistillSpec, KtoSpec, kind_of_rows
from tunesmith.job.spec import Job

if TYPE_CHECKING:
    from tunesmith.methods.objective import Objective


@contextmanager
def open_aim(setting: Setting) -> Generator[Aim]:
    """What a job's objective minimises, on which rows, and how it is validated."""
    kind = kind_of_rows(setting.job.objective)
    if kind == "prompts":
        with open_prompt_aim(setting) as aim:
            yield aim
    else:
        yield _aim_at_answers(setting) if kind == "answers" else _aim_at_examples(setting)


def _aim_at_answers(setting: Setting) -> Aim:
    from tunesmith.eval.nll import score_rows, summarize_scores
    from tunesmith.methods.objectives import make_objective

    job, prepared = setting.job, setting.prepared
    held_out = prepared.rows("validation") if "validation" in prepared.splits else None
    train = list_training_rows(job, setting.rejects, prepared, setting.tokenizer)
    evaluate: Callable[[], float] | None = None
    if isinstance(job.objective_spec, DistillSpec):
        setting.report("loading the teacher", 0, 0)
        lengths = [*training_lengths(job, prepared), *(len(row.ids) for row in held_out or ())]
        teacher = open_teacher(job, setting.model.folder, setting.tokenizer, lengths)
        objective = make_objective(job.objective_spec, teacher=teacher)
        evaluate = _make_validation(setting, objective, held_out) if held_out is not None else None
        return Aim(objective, train, evaluate)
    if held_out is not None:
        evaluate = lambda: summarize_scores(score_rows(setting.model, held_out))["nll"]  # noqa: E731
    return Aim(make_objective(job.objective_spec), train, evaluate)


def list_training_rows(job: Job, rejects: Rejects, prepared: Prepared, tokenizer: Tokenizer) -> Any:
    """Prepared examples, or a stream over sources too large to hold."""
    if not job.data.streaming:
        return prepared.examples("train")
    from tunesmith.training.order import StreamOrder

    stream = open_stream(job.data, tokenizer=tokenizer, seed=job.train.seed, rejects=rejects)
    fingerprint = fingerprint_data(job, prepared)["stream_sha256"]
    return StreamOrder(stream, batch_rows=job.train.batch_rows, fingerprint=fingerprint)


# --- examples ---------------------------------------------------------------------------------------------------------


def _aim_at_examples(setting: Setting) -> Aim:
    """Pairs, or labelled answers. The model as it is now is the reference, if the objective has one."""
    from tunesmith.methods.objectives import (
        REFERENCE,
        KtoBaseline,
        answer_logps,
        make_objective,
        mismatch,
        needs_reference,
    )

    spec, model, prepared = setting.job.objective_spec, setting.model, setting.prepared

    def run(examples: Sequence[Example], on_rows: Callable[[int], None] = lambda _: None) -> Any:
        """Log-probability of each row's targets, without gradients. Examples have equally many rows, which stay
        together: what they have in common is then computed once, as in training."""
        import torch

        size = len(flatten(examples[:1]))
        found = torch.empty(len(examples), size, dtype=torch.float32)
        lengths = [len(example.ids) for example in examples]
        with torch.no_grad():
            for numbers in plan_micro_batches(lengths, budget_tokens=setting.budget_tokens):
                batch = setting.make_batch([examples[number] for number in numbers], model.device)
                found[numbers] = answer_logps(model, batch).float().cpu().view(-1, size)
                on_rows(len(numbers) * size)
        return found.flatten()

    splits: dict[str, Sequence[Any]] = {
        name: prepared.examples(name) for name in ("train", "validation") if name in prepared.splits
    }
    others: dict[str, list[TokenRow]] = {}
    if isinstance(spec, KtoSpec):
        others = {name: mismatch(flatten(examples)) for name, examples in splits.items()}
    if needs_reference(spec):
        measured = splits | {f"{name}.others": rows for name, rows in others.items()}
        values = _measure_reference(setting, measured, run)
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
        evaluate = _make_validation(setting, make("validation"), splits["validation"])
    return Aim(make("train"), splits["train"], evaluate)


def _make_validation(
    setting: Setting, objective: Objective, examples: Sequence[Example]
) -> Callable[[], float]:
    from tunesmith.training.step import count_targets

    model = setting.model
    count = len(examples) if objective.per_example else sum(map(count_targets, examples))

    def evaluate() -> float:
        import torch

        total = 0.0
        lengths = [len(example.ids) for example in examples]
        with torch.no_grad():
            if objective.before_step is not None:
                objective.before_step(model, examples)
            for numbers in plan_micro_batches(lengths, budget_tokens=setting.budget_tokens):
                batch = setting.make_batch([examples[number] for number in numbers], model.device)
                total += objective.loss(model, batch).total.item()
        return total / count

    return evaluate


def _measure_reference(
    setting: Setting, examples: Mapping[str, Sequence[Example]], run: Callable[..., Any]
) -> dict[str, list[float]]:
    """Log-probabilities of examples' rows under the model as it is, by split; read from the run folder if they are
    there, of the same rows and weights."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    cache, model = setting.run.root / "reference.safetensors", setting.model
    rows = {name: flatten(split) for name, split in examples.items()}
    hashes = {name: hash_rows(row.row_id for row in split) for name, split in rows.items()}
    key = hash_json({**hashes, "": setting.identity})
    if cache.is_file():
        try:
            with safe_open(str(cache), "pt") as kept:
                if kept.metadata().get("key") == key:
                    return {name: kept.get_tensor(name).tolist() for name in rows}
        except (OSError, SafetensorError) as error:
            cure = "Delete it; it is computed again"
            raise RunDirError(str(cache), f"cannot be read ({error})", cure=cure) from None
    total, done = sum(map(len, rows.values())), 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        setting.report("the reference", done, total)

    was_training = model.training
    model.train(False)
    found = {name: run(split, count) for name, split in examples.items()}
    model.train(was_training)
    try:
        partial = cache.with_name(cache.name + ".tmp")
        save_file({name: torch.as_tensor(values) for name, values in found.items()}, partial, {"key": key})
        partial.replace(cache)
    except OSError as error:
        raise as_rundir_error(error, cache) from None
    return {name: values.tolist() for name, values in found.items()}
