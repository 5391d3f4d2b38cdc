"""What a training will take of a card's memory, and how long: before it, from shapes; in it, for its plan."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.api.opening import open_base
from tunesmith.api.teacher import count_teacher_bytes
from tunesmith.api.trainable import (
    ROUND_TOKENS,
    load_job_tokenizer,
    load_trainable,
    make_training_batch,
    training_lengths,
)
from tunesmith.core.errors import JobError, ModelError, SetupError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.quantities import format_gib, parse_bytes
from tunesmith.data.batch import plan_epoch
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.job.load import job_from
from tunesmith.job.objective import DistillSpec, kind_of_rows
from tunesmith.job.spec import Job, LoraSpec, TrainSpec, as_method_spec
from tunesmith.models.config import load_config
from tunesmith.models.memory import MemoryModel
from tunesmith.training.planner import CARDS, CPU_BUDGET, Card, MemoryPlan, Planner, Workload, describe_setup
from tunesmith.training.schedule import count_steps

if TYPE_CHECKING:
    import torch

    from tunesmith.models.causal_lm import CausalLM
    from tunesmith.models.decoder import Decoder


# Steps whose rows say how they divide into micro-batches.
_TYPICAL_STEPS = 16


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """One method of `plan`. seconds: of all steps, without validation, loading and compiling; None on a CPU."""

    name: str
    is_own: bool
    trained_parameters: int
    plan: MemoryPlan
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "plan": self.plan.to_json()}


@dataclass(frozen=True, slots=True)
class Planned:
    """What `plan` found. total_tokens: of all steps; limit_bytes: what the plans stay within."""

    card: str
    limit_bytes: int
    steps: int
    total_tokens: int
    compiled: bool
    methods: list[MethodPlan]

    def to_json(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "methods": [method.to_json() for method in self.methods]}


def plan(
    job: Job | Mapping[str, Any],
    *,
    probe: bool = False,
    device: str | None = None,
    memory: str | None = None,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    on_event: OnEvent = ignore_event,
) -> Planned:
    """Predicted peak memory and time of the job's method and of full, lora and qlora, without training.

    probe:  load the job's own model and take two micro-steps, which correct its row.
    device: a card of `CARDS` that need not be here. memory: of it, as in "24GiB"; default: what it has, or has free.
    Raises TunesmithError in one line; ModelError for a model that only the fallback runs.
    """
    from tunesmith.api.devices import compiles

    job = job if isinstance(job, Job) else job_from(job)
    if probe and (device or memory):
        raise JobError("plan --probe", "measures this machine", cure="Leave out --device and --memory")
    if probe and isinstance(job.objective_spec, DistillSpec):
        raise JobError("plan --probe", "measures a model without its teacher", cure="Leave out --probe")
    base = open_base(job)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_job_tokenizer(job, base.folder)
        prepared = prepare_data(
            job,
            tokenizer=tokenizer,
            folder=Path(scratch) / "prepared",
            on_bad_row=on_bad_row,
            rows=kind_of_rows(job.objective),
        )
        card, here = _find_card(device, memory)
        limit = card.memory_bytes
        if job.train.memory_limit != "auto":
            limit = min(limit, parse_bytes(job.train.memory_limit))
        lengths = training_lengths(job, prepared)
        steps, tokens = _count_work(job, lengths)
        value_bytes = _value_bytes(job, here)
        teacher_bytes = count_teacher_bytes(job, base.folder, value_bytes=value_bytes)
        found: list[MethodPlan] = []
        compiled = False
        for name, method in _list_methods(job):
            spec = _fit_optimizer(job.train, method)
            model = _model_memory(base.folder)
            values = MemoryModel(model, describe_setup(method, spec, value_bytes=value_bytes, compiled=True))
            compiled = card.name != "CPU" and compiles(
                job, values.config.num_layers * values.block_values, tokens
            )
            setup = describe_setup(method, spec, value_bytes=value_bytes, compiled=compiled)
            planner = Planner(
                MemoryModel(model, setup),
                _make_workload(job, lengths),
                card,
                limit,
                None if job.train.micro_batch_tokens == "auto" else job.train.micro_batch_tokens,
                is_cpu=card.name == "CPU",
                beside_bytes=teacher_bytes,
            )
            made = planner.plan()
            is_own = method == job.method_spec
            if is_own and probe:
                on_event(Event("progress", "", "probing"))
                made = _probe(job, base.folder, tokenizer, prepared, planner)
            seconds = None if card.name == "CPU" else made.seconds_per_1k * tokens / 1000
            found.append(MethodPlan(name, is_own, planner.model.trained_values, made, seconds))
    return Planned(card.name, limit, steps, tokens, compiled, found)


# --- for a training ---------------------------------------------------------------------------------------------------


def make_planner(
    model: CausalLM, job: Job, lengths: Sequence[int], device: torch.device
) -> tuple[Planner | None, str | None]:
    """The planner of a training on a GPU, and a warning. None on a CPU, and for models that only the fallback runs.

    Raises SetupError if the job sets a limit that is not kept: by the fallback, or because nothing fits in it.
    """
    from tunesmith.models.decoder import Decoder

    limit_given = job.train.memory_limit != "auto"
    if device.type != "cuda":
        return None, "train.memory_limit is for GPUs; nothing limits this CPU run" if limit_given else None
    if not isinstance(model, Decoder):
        if limit_given:
            raise SetupError(
                "train.memory_limit",
                f"is set, and {model.config.model_type} runs through transformers",
                rule="memory is planned for the own decoder's families",
                cure="Leave it out, and set train.micro_batch_tokens",
            )
        return None, None
    planner = build_planner(model, job, lengths, _describe_gpu(device))
    least = planner.plan()
    if limit_given and least.peak_bytes > planner.limit_bytes:
        raise SetupError(
            "train.memory_limit",
            f"is {job.train.memory_limit}, and the least that training takes is {format_gib(least.peak_bytes)}",
            rule="the limit holds weights, optimizer states and one row",
            cure="Raise it, lower data.max_tokens, or take method: qlora",
        )
    return planner, None


def build_planner(model: Decoder, job: Job, lengths: Sequence[int], card: Card) -> Planner:
    """The planner of a model that is loaded, for `card`. lengths: tokens of every training row."""
    from tunesmith.api.devices import records_graphs

    setup = describe_setup(
        job.method_spec,
        job.train,
        value_bytes=model.dtype.itemsize,
        compiled=model.segments is not None and model.segments.is_compiled and model.has_plain_form,
    )
    if model.adapter_config is not None:  # it may be one that training goes on from
        setup = dataclasses.replace(
            setup,
            rank=model.adapter_config.rank,
            targets=tuple(model.adapter_config.targets),
            tuned_tables=sum(table.tuned is not None for table in model.tables()),
            fused=model.has_plain_form and not model.adapter_config.dropout,
            recorded=records_graphs(model, model.device),
        )
    asked, limit = job.train.micro_batch_tokens, job.train.memory_limit
    return Planner(
        MemoryModel(model.config, setup),
        _make_workload(job, lengths),
        card,
        card.memory_bytes if limit == "auto" else parse_bytes(limit),
        None if asked == "auto" else asked,
        beside_bytes=count_teacher_bytes(job, model.folder, value_bytes=model.dtype.itemsize),
    )


def _make_workload(job: Job, lengths: Sequence[int]) -> Workload:
    """The first steps' rows, and the longest of all."""
    steps = plan_epoch(len(lengths), batch_rows=job.train.batch_rows, seed=job.train.seed, epoch=0)
    # The last one of an epoch may be smaller; one alone may be a step of few tokens.
    steps = steps[: max(1, min(_TYPICAL_STEPS, len(steps) - 1))]
    typical = tuple(tuple(int(lengths[row]) for row in step) for step in steps)
    longest = int(max(lengths))
    # Rows of a stream are not known: all of a step may be long.
    known = [longest] * job.train.batch_rows if job.data.streaming else sorted(lengths)
    return Workload(typical, longest, ROUND_TOKENS, int(sum(known[-job.train.batch_rows :])))


def _count_work(job: Job, lengths: Sequence[int]) -> tuple[int, int]:
    """(optimizer steps, tokens in all of them)."""
    per_epoch = -(-len(lengths) // job.train.batch_rows)
    if job.data.streaming:
        steps = job.train.steps or 0
        return steps, int(steps * job.train.batch_rows * sum(lengths) / len(lengths))
    steps = count_steps(epochs=job.train.epochs, steps=job.train.steps, steps_per_epoch=per_epoch)
    return steps, int(steps / per_epoch * sum(lengths))


# --- methods and cards ------------------------------------------------------------------------------------------------


def _list_methods(job: Job) -> list[tuple[str, Any]]:
    """The job's own method, then the others by their names, with their defaults and its rank."""
    own = job.method_spec
    name = own.name
    if isinstance(own, LoraSpec) and own.base != "auto":
        name += f", {own.base}"
    if isinstance(own, LoraSpec) and own.compute != "auto":
        name += f", {own.compute} products"
    others = [as_method_spec(other) for other in ("full", "lora", "qlora")]
    if isinstance(own, LoraSpec):
        others = [
            other.model_copy(update={"rank": own.rank}) if isinstance(other, LoraSpec) else other
            for other in others
        ]
    same = own.name if name == own.name else None
    return [(name, own), *((other.name, other) for other in others if other.name != same)]


def _fit_optimizer(train: TrainSpec, method: Any) -> TrainSpec:
    if isinstance(method, LoraSpec) and train.optimizer in ("muon", "adamw-bf16"):
        return train.model_copy(update={"optimizer": "adamw"})
    return train


def _model_memory(folder: Path) -> Any:
    config = load_config(folder)
    if not config.own:
        raise ModelError(
            str(folder),
            f"{config.model_type} runs through transformers ({config.why_not})",
            rule="memory is planned for the own decoder's families",
            cure="Train it, and look at peak_bytes in its record",
        )
    return config


def _find_card(device: str | None, memory: str | None) -> tuple[Card, Any]:
    """The card to plan for, and the torch device if it is this machine's own."""
    if device is None and memory is None:
        from tunesmith.api.devices import pick_device

        here = pick_device()
        return (_describe_gpu(here), here) if here.type == "cuda" else (_describe_cpu(), here)
    if device is not None and device.lower() not in CARDS:
        raise JobError("--device", f"is {device!r}", cure=f"Choose from {', '.join(CARDS)}")
    card = CARDS[(device or "h100").lower()]
    if memory is None:
        return card, None
    try:
        return dataclasses.replace(
            card, name=card.name if device else "GPU", memory_bytes=parse_bytes(memory)
        ), None
    except ValueError as error:
        raise JobError("--memory", str(error)) from None


def _describe_gpu(device: torch.device) -> Card:
    """The GPU that is here, with the memory that is free or already ours."""
    import torch

    name = torch.cuda.get_device_name(device)
    known = [card for key, card in CARDS.items() if key in name.lower().replace(" ", "")]
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return dataclasses.replace(known[0] if known else CARDS["h100"], name=name, memory_bytes=free)


def _describe_cpu() -> Card:
    """The host's memory. Speeds stand for nothing: none is told."""
    import os

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34
    return dataclasses.replace(CARDS["h100"], name="CPU", memory_bytes=memory)


def _value_bytes(job: Job, here: Any) -> int:
    if here is not None:
        from tunesmith.api.devices import pick_dtype

        return pick_dtype(job.train.precision, here).itemsize
    return 4 if job.train.precision == "fp32" else 2


def _probe(job: Job, folder: Path, tokenizer: Any, prepared: Prepared, planner: Planner) -> MemoryPlan:
    """The plan after two micro-steps of the job's own model."""
    from tunesmith.api.devices import pick_device, pick_dtype, set_up_segments
    from tunesmith.methods.sft import sft_loss
    from tunesmith.training.optim import LossScale
    from tunesmith.training.optimizers import make_optimizer
    from tunesmith.training.probe import settle_plan
    from tunesmith.training.step import Stepper

    if job.data.streaming:
        raise JobError("plan --probe", "takes rows that are held in memory", cure="Leave out data.streaming")
    device = pick_device()
    model = load_trainable(job, folder, tokenizer, device, pick_dtype(job.train.precision, device))
    set_up_segments(model, job, prepared, device)
    stepper = Stepper(
        model,
        make_optimizer(model, dict(model.named_trainable()), job.train),
        make_batch=make_training_batch(job, device),
        loss=sft_loss,
        device=device,
        budget_tokens=CPU_BUDGET,
        clip_norm=job.train.clip_norm,
        scale=LossScale(enabled=False),
    )
    rows = prepared.rows("train")
    first = plan_epoch(len(rows), batch_rows=job.train.batch_rows, seed=job.train.seed, epoch=0)[0]
    return settle_plan(planner, stepper, [rows[row] for row in first], device, always_probe=True)
