"""How every verb begins: the base model's folder is sound, and the output folder is ours. Before any data is read."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tunesmith.api.rewards import check_rewards
from tunesmith.comparing.plan import PlannedArm, job_of_arm
from tunesmith.core.errors import JobError, ModelError, RunDirError
from tunesmith.core.rundir import RunDir, as_rundir_error
from tunesmith.data.checks import CheckReport, Finding
from tunesmith.frameworks.environments import require_environment
from tunesmith.frameworks.port import HardwarePort, Port, Reason
from tunesmith.frameworks.ports import find_port
from tunesmith.job.objective import DistillSpec, RolloutSpec
from tunesmith.job.resolve import ResolvedModel, resolve_model
from tunesmith.job.spec import Job, LoraSpec, QuantizeSpec
from tunesmith.models.adapter_config import check_lora
from tunesmith.models.config import load_config
from tunesmith.models.headers import check_model, list_expected
from tunesmith.training.trackers import check_trackers


def open_base(job: Job) -> ResolvedModel:
    """The job's base model. Raises ModelError in one line if its files, or an adapter to go on from, are unsound, or if
    the job's method asks for layers that it has not."""
    base = resolve_model(job.model_spec)
    config = check_model(base.folder)
    if isinstance(job.method_spec, LoraSpec):
        check_lora(job.method_spec, config)
    return base


def open_job(job: Job, arms: Sequence[PlannedArm] = ()) -> ResolvedModel:
    """The base, once everything was looked at that can be refused before data is read: `check`, `train` and `compare`
    begin with it.

    arms: what is compared; without any, the job's own method is trained.
    Raises ModelError, and SetupError for what this machine lacks.
    """
    base = open_base(job)
    _check_objective(job, base)
    check_trackers(job.train.trackers)
    if job.train.precision == "fp16":
        from tunesmith.api.devices import pick_device, pick_dtype

        pick_dtype(job.train.precision, pick_device())
    if not arms:
        check_quantize(job.method_spec.qat_spec, base, place="method.qat")
    for arm in arms:
        place = f"compare.arms, {arm.name}"
        try:
            if isinstance(arm.method, LoraSpec):
                check_lora(arm.method, load_config(base.folder))
            if arm.trains:
                _check_objective(job_of_arm(job, arm, seed=arm.seeds[0]), base)
        except (JobError, ModelError) as e:
            raise type(e)(f"{place}: {e.place}", e.finding, rule=e.rule, cure=e.cure) from None
        check_quantize(arm.quantize, base, place=place)
        if arm.is_foreign:
            check_framework(arm.framework, job_of_arm(job, arm, seed=arm.seeds[0]), place=place)
    return base


def _check_objective(job: Job, base: ResolvedModel) -> None:
    """Raise JobError or ModelError for rewards or a teacher that cannot be used."""
    if isinstance(job.objective_spec, RolloutSpec):
        check_rewards(job.objective_spec.terms)
    if isinstance(job.objective_spec, DistillSpec):
        from tunesmith.api.teacher import check_teacher  # which stands on what begins here

        check_teacher(job, base.folder)


def check_framework(name: str, job: Job, *, place: str) -> None:
    """Raise JobError if the framework cannot do what `job` asks, SetupError if it is not installed.

    job: of one arm. place: the arm.
    """
    port = find_port(name)
    if (reason := port.can(job) or _can_here(port, job)) is not None:
        raise JobError(
            f"{place}: {reason.key}",
            reason.finding,
            rule="a framework does all that the job fixes, or its arm is refused",
            cure=reason.cure,
        )
    require_environment(name)


def _can_here(port: Port, job: Job) -> Reason | None:
    """What stands in a framework's way on this machine. torch is only asked where hardware has a say."""
    if not isinstance(port, HardwarePort):
        return None
    from tunesmith.api.devices import pick_device, pick_dtype

    device = pick_device()
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[
        str(pick_dtype(job.train.precision, device)).removeprefix("torch.")
    ]
    return port.can_on(job, device=device.type, precision=precision)


def check_quantize(spec: QuantizeSpec | None, base: ResolvedModel, *, place: str) -> None:
    """Raise SetupError without torchao, ModelError if a matrix of the own decoder's does not divide into groups.

    place: the setting. What only the fallback runs is looked at when it is loaded.
    """
    if spec is None:
        return
    from tunesmith.models.quantize import check_groups, check_torchao

    check_torchao(place=place)
    config = load_config(base.folder)
    for name, shape in list_expected(config).items() if config.own else ():
        if name.endswith("_proj.weight"):
            check_groups(name, shape[1], spec, place=place)


def note_long_rows(report: CheckReport, job: Job, base: ResolvedModel) -> None:
    """Add a finding for each split with rows beyond the model's context that `data.max_tokens` lets through."""
    context, limit = load_config(base.folder).max_positions, job.data.max_tokens
    for name, split in report.splits.items():
        longest = min(split.length_percentiles.get("100", 0), limit)
        if longest > context:
            message = (
                f"{name}: rows of up to {longest} tokens go beyond the model's context ({context}); "
                f"set data.max_tokens to {context}"
            )
            report.findings.append(Finding("warning", "longer_than_context", message, split=name))


@contextmanager
def open_run(
    out: str | Path, *, fresh: bool, verb: Literal["train", "compare"] = "train"
) -> Generator[RunDir]:
    """Own the folder `out` while the block runs; a failed write inside it (disk full) becomes one line.

    fresh: delete what an earlier run of ours left there.
    verb:  what is to run; the results of the other verb are not mixed with its own.
    Raises RunDirError if it is in use, cannot be written, or holds other people's files or another verb's results.
    """
    run = RunDir(Path(out)).create()
    with run.lock(), writing_to(run):
        if not run.is_own():
            raise RunDirError(
                str(run.root),
                "holds no run of ours",
                rule="out is a folder of its own, and --fresh deletes only runs",
                cure="Give another --out",
            )
        if fresh:
            run.clear()
        if run.verb not in (None, verb):
            raise RunDirError(
                str(run.root),
                f"holds what {run.verb} wrote",
                rule=f"{verb} wants a folder of its own",
                cure="Give another --out, or --fresh to delete it and start over",
            )
        yield run


@contextmanager
def writing_to(run: RunDir) -> Generator[None]:
    """Turn a failed write inside the block (disk full, read-only) into one line."""
    try:
        yield
    except OSError as error:
        raise as_rundir_error(error, run.root) from None
