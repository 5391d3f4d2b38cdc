"""Arms that learn something else than answers, or go on from another arm: what they may say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.core.errors import JobError
from tunesmith.job.objective import as_objective_spec, kind_of_rows
from tunesmith.job.spec import ArmSpec, FullSpec, Job, LoraSpec

if TYPE_CHECKING:
    from tunesmith.comparing.plan import PlannedArm


def check_comparison(job: Job) -> None:
    """Raise JobError if the job's own rows are no answers, or its metric is not measured."""
    if job.objective_spec.name != "sft":
        raise JobError(
            "objective",
            f"is {job.objective_spec.name}",
            rule="the job's rows are answers that all arms are judged on, and objectives are the arms' own",
            cure="Give it to an arm: {method: lora, objective: ..., starts_from: lora, data: {train: FILE}}",
        )
    key = {"reward": "rewards", "preference_accuracy": "preferences"}.get(job.compare.metric)
    if key and not getattr(job.evaluate, key):
        raise JobError(
            "compare.metric",
            f"is {job.compare.metric}, and evaluate.{key} names nothing",
            rule="the declared metric decides",
            cure=f"Give evaluate.{key}",
        )


def find_start(spec: ArmSpec, before: Sequence[PlannedArm], place: str) -> PlannedArm:
    """The arm that `starts_from` names, among those before. Raises JobError if it is not there, or does not train."""
    named = next((arm for arm in before if arm.name == spec.starts_from), None)
    if named is not None and named.trained_by is not None:
        return named
    trained = ", ".join(arm.name for arm in before if arm.trained_by) or "none"
    raise JobError(
        f"{place}.starts_from",
        f"{spec.starts_from!r} " + ("is no arm before this one" if named is None else "does not train"),
        rule=f"a training goes on from that of an arm before it: {trained}",
        cure="Name one of them, or move it up",
    )


def keep_method(
    spec: ArmSpec, method: FullSpec | LoraSpec, start: PlannedArm, place: str
) -> FullSpec | LoraSpec:
    """The method of an arm that goes on from `start`: the same. Raises JobError if the arm says another."""
    assert start.method is not None
    if method == start.method or (isinstance(spec.method, str) and spec.method == start.method.name):
        return start.method
    raise JobError(
        f"{place}.method",
        f"differs from that of {start.name}, which it starts from",
        rule="a training goes on with the same trained weights",
        cure=f"Write `method: {start.method.name}`",
    )


def check_objective(spec: ArmSpec, job: Job, place: str) -> None:
    """Raise JobError for an objective that no arm can have, or whose rows are nowhere."""
    objective = as_objective_spec(spec.objective or "sft")
    kind = kind_of_rows(objective)
    for key in ("data", "starts_from"):
        if spec.framework != "tunesmith" and getattr(spec, key) is not None:
            raise JobError(
                f"{place}.{key}",
                f"is given, and the framework is {spec.framework}",
                rule="other frameworks are handed the job's rows and the base model",
                cure=f"Leave {key} out, or the framework",
            )
    if objective.name == "reward":
        raise JobError(
            f"{place}.objective",
            "is reward",
            rule="arms answer the test rows, and a reward model answers nothing",
            cure="Train it with: tunesmith train, then score pairs with: tunesmith eval",
        )
    if spec.data is None and (kind in ("pairs", "labelled") or (kind == "prompts" and job.data.streaming)):
        wanted = "prompts" if kind == "prompts" else "pairs" if kind == "pairs" else "labelled answers"
        raise JobError(
            place,
            f"{objective.name} without rows of its own",
            rule=f"it learns from {wanted}, and the job's rows are answers",
            cure="Give the arm data: {train: FILE}",
        )
