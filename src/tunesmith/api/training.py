"""Train one model: prepare data, load the base, add adapters, run the one loop, save and describe the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tunesmith.api.aim import Aim, Setting
from tunesmith.api.fingerprints import describe_learning, fingerprint_data, fingerprint_run
from tunesmith.api.fp8_check import Fp8Check, multiplies_in_fp8, warn_of_emulation
from tunesmith.api.objectives import list_training_rows, open_aim
from tunesmith.api.opening import note_long_rows, open_job, open_run
from tunesmith.api.tasks import TrainTask
from tunesmith.api.trainable import (
    load_job_tokenizer,
    load_trainable,
    make_training_batch,
    training_lengths,
)
from tunesmith.core.errors import DataError, RunDirError, TrainingFailed
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.fingerprint import (
    describe_hardware,
    describe_versions,
    hash_json,
)
from tunesmith.core.jsonl import read_json, read_jsonl, read_settings, write_json
from tunesmith.core.quantities import format_number
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir, as_rundir_error
from tunesmith.core.types import TokenRow
from tunesmith.data.collect import Rejects
from tunesmith.data.examples import flatten
from tunesmith.data.prepare import Prepared, load_prepared, prepare_data
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.load import job_from
from tunesmith.job.objective import kind_of_rows
from tunesmith.job.resolve import ResolvedModel
from tunesmith.job.spec import Job, LoraSpec, TrainSpec
from tunesmith.training.schedule import auto_learning_rate

if TYPE_CHECKING:
    import torch

    from tunesmith.models.causal_lm import CausalLM
    from tunesmith.training.loop import Progress, TrainOutcome


def train(
    job: Job | Mapping[str, Any],
    *,
    out: str | Path,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    fresh: bool = False,
    on_event: OnEvent = ignore_event,
) -> RunRecord:
    """Train as the job says and leave everything in `out`.

    Called again with the same job it goes on after an interruption, and returns at once when the run is complete.
    fresh: start over, deleting what an earlier run of ours left in `out`.
    Raises TunesmithError in one line: JobError, DataError, ModelError, RunDirError, TrainingFailed, Interrupted.
    """
    job = job if isinstance(job, Job) else job_from(job)
    base = open_job(job)
    with open_run(out, fresh=fresh) as run:
        task = _prepare_task(job, base, run, on_bad_row=on_bad_row, on_event=on_event)
        if run.record.is_file():
            record = RunRecord.from_json(read_json(run.record), place=str(run.record))
            _refuse_other_data(record, fingerprint_data(job, load_prepared(run.prepared)), run)
            if record.status == "done":
                on_event(Event("note", text=f"{run.root} is complete; --fresh trains again"))
                return record
        return run_train_task(task, on_event)


def _refuse_other_data(record: RunRecord, fingerprints: Mapping[str, str], run: RunDir) -> None:
    """Raise RunDirError if the finished run in `run` saw other rows than the sources hold now."""
    for name, value in fingerprints.items():
        if record.fingerprints.get(name, value) != value:
            raise RunDirError(
                str(run.root),
                f"was trained when {name.removesuffix('_sha256')} was different",
                rule="a finished run stands for its data",
                cure="Give another --out, or --fresh to train again",
            )


def _prepare_task(
    job: Job, base: ResolvedModel, run: RunDir, *, on_bad_row: Literal["refuse", "skip"], on_event: OnEvent
) -> TrainTask:
    refuse_other_job(job, run)
    prepared, _ = prepare(job, base, run, on_bad_row=on_bad_row, on_event=on_event)
    try:
        write_json(run.job, job.model_dump(mode="json"))
    except OSError as error:
        raise as_rundir_error(error, run.root) from None
    return TrainTask(
        label="",
        job=job.model_dump(mode="json"),
        out=str(run.root),
        prepared=str(run.prepared),
        model_folder=str(base.folder),
        model_name=base.name,
        revision=base.revision,
        key=hash_json({"job": job.model_dump(mode="json"), "data": fingerprint_data(job, prepared)}),
        skip_bad_rows=on_bad_row == "skip",
    )


def refuse_other_job(job: Job, run: RunDir) -> None:
    """Raise RunDirError if `run` was begun with another job, naming the first key that differs."""
    if not run.job.is_file():
        return
    before, now = _flatten(read_json(run.job)), _flatten(job.model_dump(mode="json"))
    # What is judged afterwards, and how arms are compared, does not change a training.
    changed = [
        key
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(("evaluate.", "compare."))
    ]
    if changed:
        key = changed[0]
        raise RunDirError(
            str(run.root),
            f"was begun with {key}={before.get(key)!r}, not {now.get(key)!r}",
            rule="a run resumes under its own job",
            cure="Give another --out, or --fresh to start over",
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {
        key: item
        for name, child in value.items()
        for key, item in _flatten(child, f"{prefix}{name}.").items()
    }


def prepare(
    job: Job, base: ResolvedModel, run: RunDir, *, on_bad_row: Literal["refuse", "skip"], on_event: OnEvent
) -> tuple[Prepared, Tokenizer]:
    """Read, check, split and tokenise the data of a job into `run.prepared`; what was lost is said."""
    on_event(Event("stage", text="Preparing data"))
    tokenizer = load_job_tokenizer(job, base.folder)
    prepared = prepare_data(
        job, tokenizer=tokenizer, folder=run.prepared, on_bad_row=on_bad_row, rows=kind_of_rows(job.objective)
    )
    note_long_rows(prepared.report, job, base)
    for finding in prepared.report.findings:
        if finding.level == "error":
            raise DataError("data", finding.message, cure="See it with: tunesmith check")
        if finding.level == "warning":
            on_event(Event("warning", text=finding.message))
    return prepared, tokenizer


def run_train_task(task: TrainTask, on_event: OnEvent) -> RunRecord:
    """Carry out one training in this process and write its record."""
    from tunesmith.api.devices import describe_gpu, pick_device, pick_dtype, records_graphs, set_up_segments
    from tunesmith.api.planning import make_planner
    from tunesmith.models.sizes import count_parameters

    started, started_cpu = time.perf_counter(), time.process_time()
    job = Job.model_validate(task.job)
    run = RunDir(Path(task.out)).create()
    prepared = load_prepared(Path(task.prepared))
    device = pick_device()
    on_event(Event("progress", task.label, "loading"))
    tokenizer = load_job_tokenizer(job, Path(task.model_folder))
    fp8_check, warnings = None, list[str]()
    if multiplies_in_fp8(job.method_spec):
        fp8_check = Fp8Check(_first_rows(task, job, prepared, tokenizer), cast(LoraSpec, job.method_spec))
        warnings = warn_of_emulation(device, label=task.label, on_event=on_event)
    model = load_trainable(
        job,
        Path(task.model_folder),
        tokenizer,
        device,
        pick_dtype(job.train.precision, device),
        fp8_check=fp8_check,
    )
    if fp8_check:
        fp8_check.tell(label=task.label, on_event=on_event)
    loaded = time.perf_counter()
    set_up_segments(model, job, prepared, device)
    planner, warning = make_planner(model, job, training_lengths(job, prepared), device)
    if kind_of_rows(job.objective) == "prompts":
        planner = None  # what a step weighs is not known before answers are sampled
    if warning:
        warnings.append(warning)
        on_event(Event("warning", task.label, text=warning))
    rate = resolve_learning_rate(job, Path(task.model_folder))
    fingerprints = fingerprint_run(task, job, prepared)
    rejects = Rejects(run.stream_rejects if task.skip_bad_rows else None)
    built, ends = time.perf_counter(), list[float]()
    kept = {name: value for name, value in fingerprints.items() if name != "code"}
    learned = describe_learning(job)
    identity = hash_json({**kept, "method": learned["method"], "dtype": str(model.dtype)})
    with open_aim(
        Setting(job, model, prepared, tokenizer, run, task.label, identity, rejects, on_event)
    ) as aim:
        outcome = _run(
            lambda: _save(model, job, task, tokenizer, run),
            aim,
            model,
            job.train.model_copy(update={"learning_rate": rate}),
            run,
            make_batch=make_training_batch(job, device),
            loss=aim.objective,
            evaluate=aim.evaluate,
            on_step=_report_steps(task.label, on_event, ends),
            resume=task.resume,
            # Edited code does not stop a resume: the checkpoint's environment tells of it with a warning.
            identity={
                **learned,
                **{k: v for k, v in fingerprints.items() if k != "code"},
            },
            planner=planner,
            # A recorded batch has no place for a teacher's states. Sampled answers are of all lengths, and to sample
            # them needs the memory that graphs would hold.
            record_graphs=job.objective_spec.name != "distill"
            and kind_of_rows(job.objective) != "prompts"
            and records_graphs(model, device),
        )
        warnings += aim.doubts()
    trained = time.perf_counter()
    if job.data.streaming and (skipped := rejects.write()):
        text = f"{format_number(skipped, 'bad row')} of the stream skipped (see {run.stream_rejects.name})"
        outcome.warnings.append(text)
    outcome.warnings[:0] = warnings
    size_bytes = _save(model, job, task, tokenizer, run) if task.keep_weights else 0
    record = RunRecord(
        status="done",
        method=job.method_spec.name,
        framework="tunesmith",
        model=task.model_name,
        seed=job.train.seed,
        config=task.job,
        fingerprints=fingerprints,
        versions=describe_versions(),
        hardware={**describe_hardware(), **describe_gpu(device)},
        learning_rate=rate,
        total_parameters=count_parameters(model).total,
        fp8_check=fp8_check.to_json() if fp8_check else None,
        size_bytes=size_bytes,
        phases=None
        if outcome.continued_from is not None
        else _time_phases(run, [started, loaded, built, *ends[:1], trained, time.perf_counter()]),
        memory=_measure_memory(device),
        **_costs(outcome, time.perf_counter() - started, time.process_time() - started_cpu),
    )
    write_json(run.record, record.to_json())
    return record


def _run(
    save: Callable[[], int], aim: Aim, model: CausalLM, spec: TrainSpec, run: RunDir, **more: Any
) -> TrainOutcome:
    """The loop. If the answers that it samples run away, the last good weights are saved as a finished run's are."""
    from tunesmith.training.loop import train as run_loop

    try:
        return run_loop(model, aim.rows, spec, run, **more)
    except TrainingFailed as error:
        if aim.fall_back():
            save()
            kept = f"the weights before that are in {run.root}"
            raise TrainingFailed(
                error.place, error.finding, rule=error.rule, cure=f"{error.cure}; {kept}"
            ) from None
        raise


def _time_phases(run: RunDir, marks: Sequence[float]) -> dict[str, float]:
    """Seconds by phase, as frameworks' workers tell them; what came before the first mark, the parent adds.

    marks: when loading began and ended, the loop began, its first step ended, the loop ended, and saving ended.
    """
    loading, building, first, rest, saving = (after - before for before, after in pairwise(marks))
    steps = sum(line["step_seconds"] for _, line in read_jsonl(run.steps) if line["step"] > 1)
    times = {"loading": loading, "building": building, "first step": first, "steps": steps}
    return times | {"validating": max(0.0, rest - steps), "saving": saving}


def _measure_memory(device: torch.device) -> dict[str, int]:
    """The three peaks of this process, in bytes, by the names that frameworks' workers give them."""
    import torch

    from tunesmith.training.meter import peak_bytes

    peaks = {"resident": peak_bytes(torch.device("cpu"))}
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        peaks |= {"allocated": peak_bytes(device), "reserved": reserved}
    return peaks


def _first_rows(task: TrainTask, job: Job, prepared: Prepared, tokenizer: Tokenizer) -> Sequence[TokenRow]:
    """Rows of the first optimizer step. Bad rows of a stream are left to the training itself to report."""
    from tunesmith.training.order import order_rows

    rows = list_training_rows(job, Rejects(None, collect=task.skip_bad_rows), prepared, tokenizer)
    order = order_rows(rows, batch_rows=job.train.batch_rows, seed=job.train.seed)
    return flatten(next(order.steps_from(None)).rows)


def _costs(outcome: TrainOutcome, wall_seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """The outcome's figures; loading and saving count, unless an interruption hid part of the time from us."""
    values = dataclasses.asdict(outcome)
    kept = {f.name for f in dataclasses.fields(RunRecord)} & values.keys()
    costs = {name: values[name] for name in kept}
    if outcome.continued_from is None:
        costs |= {"wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds}
    return costs


def resolve_learning_rate(job: Job, model_folder: Path) -> float:
    """The job's learning rate, or what follows from the model's width and the method."""
    if job.train.learning_rate != "auto":
        return job.train.learning_rate
    config = read_settings(model_folder / "config.json")
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 2048
    return auto_learning_rate(
        width,
        method=job.method_spec.name,
        family=str(config.get("model_type", "")),
        objective=job.objective_spec.name,
    )


def _report_steps(label: str, on_event: OnEvent, ends: list[float]) -> Any:
    """Tell of each step; when it ended is added to `ends`, seconds."""

    def report(progress: Progress) -> None:
        ends.append(time.perf_counter())
        on_event(
            Event(
                "step",
                label,
                done=progress.step,
                total=progress.total_steps,
                loss=progress.loss,
                tokens_per_second=progress.tokens_per_second,
                eta_seconds=progress.seconds_left,
                memory_bytes=progress.peak_bytes,
            )
        )

    return report


def _save(model: CausalLM, job: Job, task: TrainTask, tokenizer: Tokenizer, run: RunDir) -> int:
    """Save what was trained, ready for other tools; returns its size on disk in bytes."""
    from tunesmith.models.adapter_files import save_adapter
    from tunesmith.models.lora import merge
    from tunesmith.models.weights import save_classifier, save_model

    try:
        if job.objective_spec.name == "reward":
            # Whole, whatever was trained: readers of sequence classifiers know of no adapter.
            merge(model)
            save_classifier(model, run.model, source_folder=Path(task.model_folder), pad_id=tokenizer.pad_id)
            folder = run.model
        elif isinstance(job.method_spec, LoraSpec):
            save_adapter(model, run.adapter, base_name=task.model_name, revision=task.revision)
            tokenizer.save(run.adapter)
            folder = run.adapter
        else:
            save_model(model, run.model, source_folder=Path(task.model_folder))
            folder = run.model
    except OSError as error:
        raise as_rundir_error(error, run.root) from None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
