"""Whether frameworks did the work that our own engine does, from what their runs and ours left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.api.native import compare_native
from tunesmith.comparing.arms import read_steps
from tunesmith.comparing.noise import measure_noise
from tunesmith.comparing.parity import allow_other_tokens, judge_parity
from tunesmith.comparing.plan import PlannedArm, share_references
from tunesmith.comparing.token_gate import hold_trainings
from tunesmith.core.comparison import Parity
from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.jsonl import read_json
from tunesmith.core.parity import ParityRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.batch import plan_epochs
from tunesmith.data.prepare import Prepared
from tunesmith.job.spec import Job


@dataclass(frozen=True, slots=True)
class Gatekeeper:
    """What all arms of a comparison share. base: the base model's folder."""

    run: RunDir
    job: Job
    prepared: Prepared
    base: Path

    def judge(self, arms: Sequence[PlannedArm], failures: dict[str, str]) -> dict[str, Parity]:
        """Arm of another framework -> whether its work was ours.

        arms: all; those in `failures` are left out, and one whose own account of its rows cannot be read is added."""
        found: dict[str, Parity] = {}
        references = share_references(self.job, arms)
        for arm in arms:
            if arm.is_foreign and arm.name not in failures:
                try:
                    found[arm.name] = self._judge_arm(arm, references[arm.name])
                except (ArmFailed, DataError) as error:
                    failures[arm.name] = f"parity: {error}"
        return found

    def _judge_arm(self, arm: PlannedArm, reference_of: str) -> Parity:
        shown = self.run.parity_run(arm.name, "parity")
        reference = self.run.parity_run(reference_of, "reference")
        theirs, ours = (
            ParityRecord.from_json(read_json(folder.parity), place=str(folder.parity))
            for folder in (shown, reference)
        )
        regrouped = [ParityRecord.from_json(value) for value in read_json(reference.regrouped)]
        parity = judge_parity(ours, theirs, measure_noise([ours, *regrouped]))
        if self.job.compare.track == "native":
            compare_native(self.run, arm.name, arm.framework, self.job, self.prepared, self.base)
            return allow_other_tokens(parity)
        return self._hold_trainings(arm, parity)

    def _hold_trainings(self, arm: PlannedArm, parity: Parity) -> Parity:
        """The target tokens of every step that was trained, with every seed, against those of the job's rows."""
        targets = [sum(row.mask) for row in self.prepared.rows("train")]
        wanted, trained = dict[int, list[int]](), dict[int, list[int]]()
        for seed in arm.seeds:
            steps = read_steps(self.run.arm(arm.name, seed))
            trained[seed] = [step.num_target_tokens for step in steps]
            batch_rows = arm.batch_rows or self.job.train.batch_rows
            epochs = plan_epochs(len(targets), batch_rows=batch_rows, seed=seed, steps=len(steps))
            planned = [sum(targets[row] for row in step) for epoch in epochs for step in epoch]
            wanted[seed] = planned[: len(steps)]
        gates = [
            hold_trainings(gate, arm.framework, wanted, trained) if gate.name == "tokens" else gate
            for gate in parity.gates
        ]
        return replace(parity, gates=gates)
