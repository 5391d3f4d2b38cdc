"""The trainings behind a comparison's arms as frameworks are compared by them: phases, memory, tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.comparison import ArmResult, Comparison
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir

OWN = "tunesmith"


@dataclass(frozen=True, slots=True)
class Training:
    """One training of an arm. job: what decides it, seed and learning rate aside. rates: trained and non-pad tokens a
    second, None if it had one step."""

    record: RunRecord
    rates: tuple[float, float] | None

    @property
    def job(self) -> dict[str, Any]:
        config = dict(self.record.config)
        train = {**config.get("train", {})}
        for name in ("seed", "learning_rate"):
            train.pop(name, None)
        return {**config, "train": train}

    def phase(self, *names: str) -> float | None:
        phases = self.record.phases or {}
        found = [phases[name] for name in names if name in phases]
        return sum(found) if found else None

    def bytes(self, name: str) -> float | None:
        return (self.record.memory or {}).get(name)


def read_trainings(folder: RunDir, comparison: Comparison) -> dict[str, list[Training]]:
    """Arm -> its finished trainings, in the order of seeds."""
    found: dict[str, list[Training]] = {}
    for arm in comparison.arms:
        runs = [folder.arm(arm.name, seed) for seed in comparison.record["job"]["compare"]["seeds"]]
        found[arm.name] = [_read_training(run) for run in runs if run.record.is_file()]
    return found


def _read_training(run: RunDir) -> Training:
    record = RunRecord.from_json(read_json(run.record), place=str(run.record))
    steps = [line for _, line in read_jsonl(run.steps)] if run.steps.is_file() else []
    return Training(record, measure_rates(steps))


def measure_rates(steps: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(trained, all) tokens a second without warm-up: the first step, of longer runs a tenth of them, at most five."""
    counted = steps[max(1, min(5, len(steps) // 10)) :]
    seconds = sum(step["step_seconds"] for step in counted)
    if seconds <= 0:
        return None
    return tuple(sum(step[key] for step in counted) / seconds for key in ("num_target_tokens", "num_tokens"))  # type: ignore[return-value]


def find_ours(
    arm: ArmResult, comparison: Comparison, trainings: dict[str, list[Training]]
) -> ArmResult | None:
    """The arm of our own engine that trains the same job, or None."""
    if not trainings[arm.name]:
        return None
    job = trainings[arm.name][0].job
    own = (a for a in comparison.arms if a.framework == OWN and a.trained_by == a.name and trainings[a.name])
    return next((a for a in own if trainings[a.name][0].job == job), None)
