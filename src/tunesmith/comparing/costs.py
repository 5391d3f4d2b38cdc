"""What an arm cost and what it is: means over seeds of the runs' own records."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tunesmith.comparing.arms import ArmFiles
from tunesmith.core.comparison import ArmResult
from tunesmith.core.records import RunRecord


def describe_arm(arm: ArmFiles) -> ArmResult:
    """An `ArmResult` without metrics. Costs are per seed: one training (shared or own) plus one scoring."""
    plan, runs, evals = arm.plan, list(arm.runs.values()), list(arm.evals.values())
    train_wall, train_cpu = mean(run.wall_seconds for run in runs), mean(run.cpu_seconds for run in runs)
    eval_wall, eval_cpu = mean(e.wall_seconds for e in evals), mean(e.cpu_seconds for e in evals)
    on_gpu = any(run.hardware.get("gpu") for run in runs)
    method = plan.method.name if plan.method else "none"
    return ArmResult(
        name=plan.name,
        kind=plan.kind,
        framework=plan.framework,
        method=method,
        prompting=plan.prompting,
        status="missing" if not arm.seeds else "done" if len(arm.seeds) == len(plan.seeds) else "partial",
        trained_by=plan.trained_by,
        deterministic=plan.deterministic,
        seeds=arm.seeds,
        metrics={},
        per_seed={},
        learning_rate=runs[0].learning_rate if runs else 0.0,
        steps=_mean_count(runs, lambda run: run.steps),
        trained_parameters=_mean_count(runs, lambda run: run.trained_parameters),
        total_parameters=_mean_count(runs, lambda run: run.total_parameters),
        train_tokens=_mean_count(runs, lambda run: run.train_tokens),
        target_tokens=_mean_count(runs, lambda run: run.target_tokens),
        wall_seconds=train_wall + eval_wall,
        cpu_seconds=train_cpu + eval_cpu,
        train_wall_seconds=train_wall,
        train_cpu_seconds=train_cpu,
        eval_wall_seconds=eval_wall,
        eval_cpu_seconds=eval_cpu,
        gpu_seconds=train_wall if on_gpu else 0.0,
        tune_wall_seconds=sum(trial.wall_seconds for trial in arm.trials),
        peak_bytes=max([run.peak_bytes for run in runs] + [e.peak_bytes for e in evals], default=0),
        size_bytes=round(mean(e.size_bytes for e in evals))
        if plan.quantize
        else _mean_count(runs, lambda run: run.size_bytes),
        forgetting=_mean_forgetting(arm),
        trials=arm.trials,
        quantize=plan.quantize.label if plan.quantize else None,
        objective=plan.objective.name,
        starts_from=plan.starts_from if plan.trains else None,
    )


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 for nothing, which costs nothing."""
    items = list(values)
    return sum(items) / len(items) if items else 0.0


def _mean_count(runs: list[RunRecord], read: Callable[[RunRecord], float]) -> int:
    return round(mean(read(run) for run in runs))


def _mean_forgetting(arm: ArmFiles) -> dict[str, float] | None:
    records = [e.forgetting for e in arm.evals.values() if e.forgetting]
    if not records:
        return None
    shared = [key for key in records[0] if all(key in record for record in records)]
    return {key: mean(record[key] for record in records) for key in shared}
