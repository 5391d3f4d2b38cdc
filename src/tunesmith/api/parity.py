"""What our own engine does in the first steps of a job, in the record that frameworks' workers write of theirs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.api.devices import pick_device, pick_dtype, set_up_segments
from tunesmith.api.tasks import TrainTask
from tunesmith.api.trainable import load_job_tokenizer, load_trainable, make_training_batch
from tunesmith.api.training import resolve_learning_rate
from tunesmith.core.errors import TunesmithError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.fingerprint import describe_versions, hash_row
from tunesmith.core.jsonl import write_json
from tunesmith.core.parity import Example, Parameter, ParameterGroup, ParityRecord, ParityStep
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import TokenRow
from tunesmith.data.examples import flatten
from tunesmith.data.prepare import load_prepared
from tunesmith.job.spec import FullSpec, Job, TrainSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch
from tunesmith.training.loop import choose_budget
from tunesmith.training.optim import LossScale
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.order import order_rows
from tunesmith.training.schedule import count_steps, count_warmup_steps, learning_rate_at
from tunesmith.training.step import Stepper

# Values of each frozen matrix in a record.
BASE_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute the same steps. budget_tokens: of a micro-batch; None is the job's. backwards: rows of a step in
    the opposite order. own_decoder: False computes with transformers' modules, and their attention."""

    budget_tokens: int | None = None
    backwards: bool = False
    own_decoder: bool = True
    precision: Literal["fp32"] | None = None


# What must not matter, and rounds otherwise: noise is what these differ by (comparing/noise.py).
BENIGN = (Way(budget_tokens=1), Way(budget_tokens=sys.maxsize, backwards=True), Way(own_decoder=False))
# In 16 bits what is summed in which order is the least of it.
BENIGN_16_BIT = (*BENIGN, Way(precision="fp32"))


def run_parity_task(task: TrainTask, on_event: OnEvent) -> ParityRecord:
    """Take the first steps of a job as the training loop does, and write what they were to the task's folder; and once
    more in every benign way."""
    run = RunDir(Path(task.out)).create()
    record = take_first_steps(task, on_event, Way())
    regrouped: list[Any] = []
    for way in BENIGN if record.precision == "float32" else BENIGN_16_BIT:
        try:
            regrouped.append(take_first_steps(task, on_event, way).to_json())
        except (TunesmithError, MemoryError, torch.OutOfMemoryError) as error:
            text = f"noise is measured without one of its runs: {str(error).splitlines()[0]}"
            on_event(Event("warning", task.label, text=text))
    write_json(run.regrouped, regrouped)
    write_json(run.parity, record.to_json())
    return record


def take_first_steps(task: TrainTask, on_event: OnEvent, way: Way) -> ParityRecord:
    job, prepared, device = Job.model_validate(task.job), load_prepared(Path(task.prepared)), pick_device()
    on_event(Event("progress", task.label, "loading"))
    base, spec = Path(task.model_folder), job.train
    dtype = pick_dtype(way.precision or spec.precision, device)
    tokenizer = load_job_tokenizer(job, base)
    model = load_trainable(job, base, tokenizer, device, dtype, own_decoder=way.own_decoder)
    set_up_segments(model, job, prepared, device)
    source = order_rows(prepared.rows("train"), batch_rows=spec.batch_rows, seed=spec.seed)
    total = count_steps(epochs=spec.epochs, steps=spec.steps, steps_per_epoch=source.steps_per_epoch or 1)
    parameters = _list_parameters(model, job)
    optimizer = make_optimizer(model, dict(model.named_trainable()), spec)
    seen: list[tuple[list[int], list[int]]] = []

    def watched_loss(model: CausalLM, batch: Batch) -> Any:
        seen.extend(split_rows(batch))
        return sft_loss(model, batch)

    stepper = Stepper(
        model,
        optimizer,
        make_batch=make_training_batch(job, device),
        loss=watched_loss,
        device=device,
        budget_tokens=way.budget_tokens or choose_budget(spec, device),
        clip_norm=spec.clip_norm,
        scale=LossScale(enabled=dtype == torch.float16),
    )
    steps: list[ParityStep] = []
    state_dtypes: tuple[str, ...] = ()
    groups = _list_groups(parameters, spec)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(spec.seed)
        for number, step in zip(range(min(task.parity_steps, total)), source.steps_from(None), strict=False):
            rate = learning_rate_at(
                number,
                total_steps=total,
                warmup_steps=count_warmup_steps(total, warmup=spec.warmup),
                peak=resolve_learning_rate(job, base),
                schedule=spec.schedule,
            )
            seen.clear()
            rows = step.rows[::-1] if way.backwards else step.rows
            result = stepper.take(rows, step=number + 1, learning_rate=rate)
            steps.append(
                ParityStep(
                    examples=tuple(list_examples(flatten(step.rows), seen)),
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    learning_rates=(rate,) * len(groups),
                    clip_norm=spec.clip_norm or 0.0,
                )
            )
            if not state_dtypes:
                state_dtypes = _list_dtypes(optimizer.state_tensors())
            on_event(Event("step", task.label, done=number + 1, total=task.parity_steps, loss=result.loss))
    stepper.close()
    return ParityRecord(
        framework="tunesmith",
        versions=describe_versions(),
        precision=str(dtype).removeprefix("torch."),
        steps=tuple(steps),
        parameters=parameters,
        groups=groups,
        state_dtypes=state_dtypes,
        base=_sample_base(model, job),
    )


def split_rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each row that a batch holds, put together again from the stream. Fillers have no targets."""
    tokens = [places.tolist() for places in batch.layout.find_tokens()]
    stream = batch.ids_T.tolist()
    rows = [([stream[place] for place in places], [0] * len(places)) for places in tokens]
    for source, row in zip(batch.sources_K.tolist(), batch.row_K.tolist(), strict=True):
        # A source is its row's own: from there on, tokens lie one after the other.
        rows[row][1][len(tokens[row]) - (tokens[row][-1] - source)] = 1
    return [row for row in rows if any(row[1])]


def list_examples(rows: Sequence[TokenRow], seen: Sequence[tuple[list[int], list[int]]]) -> list[Example]:
    """What the model was given, in the order of the step's rows; what is none of them comes last.

    Micro-batches are filled by length, and rows without a target are left out: neither changes a step.
    """
    left = [Example(hash_row(ids, mask), len(ids), sum(mask)) for ids, mask in seen]
    ordered: list[Example] = []
    for row in rows:
        example = Example(hash_row(row.ids, row.mask), len(row.ids), row.num_targets)
        if example in left:
            left.remove(example)
            ordered.append(example)
        elif not example.num_target_tokens:
            ordered.append(example)
    return ordered + left


def _list_parameters(model: CausalLM, job: Job) -> tuple[Parameter, ...]:
    """Merged matrices are told apart again: a parameter is what transformers or PEFT would call one."""
    if isinstance(job.method_spec, FullSpec):
        named = dict(model.weights())
    else:
        named = {name: parameter.detach() for name, parameter in model.named_trainable()}
    return tuple(
        Parameter(name, tuple(tensor.shape), _name(tensor), float(tensor.double().std(correction=0)))
        for name, tensor in named.items()
    )


def _sample_base(model: CausalLM, job: Job) -> dict[str, tuple[float, ...]]:
    """Values of each frozen matrix, at the places that a worker looks at."""
    found = dict[str, tuple[float, ...]]()
    if isinstance(job.method_spec, FullSpec):
        return found
    for projection in model.projections():
        weight = projection.weight if projection.packed is None else projection.packed.dense(torch.float32)
        assert weight is not None
        for name, rows in projection.rows():
            values = weight[rows].detach().flatten()
            places = [n * (values.numel() - 1) // (BASE_SAMPLES - 1) for n in range(BASE_SAMPLES)]
            found[name] = tuple(values[places].float().tolist())
    return found


def _list_groups(parameters: Sequence[Parameter], spec: TrainSpec) -> tuple[ParameterGroup, ...]:
    """As our optimizers have them: weight decay is for matrices only."""
    groups = (
        ([p.name for p in parameters if len(p.shape) >= 2], spec.weight_decay),
        ([p.name for p in parameters if len(p.shape) < 2], 0.0),
    )
    return tuple(
        ParameterGroup(spec.optimizer, tuple(names), decay, spec.beta1, spec.beta2, spec.epsilon)
        for names, decay in groups
        if names
    )


def _list_dtypes(states: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(sorted({_name(tensor) for name, tensor in states.items() if not name.startswith("step.")}))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
