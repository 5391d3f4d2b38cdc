"""Between a run and its checkpoints: what is saved when, what a run continues from, what it may not continue from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import RunDirError
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import TrainSpec
from tunesmith.training.checkpoint import (
    delete_old_checkpoints,
    list_checkpoints,
    open_newest,
    write_checkpoint,
)
from tunesmith.training.meter import Meter
from tunesmith.training.planner import MemoryPlan
from tunesmith.training.state import (
    TrainState,
    describe_environment,
    pack_state,
    pack_tensors,
    refuse_other_run,
    restore,
)
from tunesmith.training.step import Stepper


class Keeper:
    """Saves and restores one run. `identity` must be equal for a checkpoint to fit; see `state.describe_run`."""

    def __init__(
        self,
        run_dir: RunDir,
        spec: TrainSpec,
        *,
        named: Mapping[str, nn.Parameter],
        stepper: Stepper,
        meter: Meter,
        identity: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._run_dir, self._spec, self._named, self._stepper = run_dir, spec, named, stepper
        self._meter, self._device = meter, device
        self.identity, self._environment = identity, describe_environment(device)
        self.continued_from: int | None = None
        self.saved_step: int | None = None
        self.plan: MemoryPlan | None = None

    def open(self, *, resume: bool) -> TrainState:
        """The state to go on from, with weights, optimizer and random state put back; a fresh one if there is none.

        Raises RunDirError if all checkpoints are damaged, or if there are some and `resume` is false; JobError if
        they belong to another job.
        """
        parent = self._run_dir.checkpoints
        if not resume:
            if list_checkpoints(parent):
                raise RunDirError(
                    str(self._run_dir.root),
                    "holds checkpoints of an earlier run",
                    rule="a run never overwrites another",
                    cure="Resume that run, or give another --out",
                )
            return TrainState()
        checkpoint, warnings = open_newest(parent)
        if checkpoint is None:
            return TrainState()
        stored, optimizer, scale = checkpoint.state, self._stepper.optimizer, self._stepper.scale
        refuse_other_run(stored["identity"], self.identity, place=checkpoint.folder)
        state = restore(checkpoint, named=self._named, optimizer=optimizer, scale=scale, device=self._device)
        state.warn(*warnings)
        self.continued_from = self.saved_step = state.step
        self._meter.continue_from(stored["totals"])
        self._continue_micro_batches(state, stored["micro_batches"])
        for key, value in self._environment.items():
            was = stored["environment"].get(key)
            if was != value:
                state.warn(
                    f"{key} changed after step {state.step} ({was} to {value}): equal to rounding only"
                )
        return state

    def _continue_micro_batches(self, state: TrainState, stored: Mapping[str, Any]) -> None:
        asked = self._describe_asked()
        if changed := [key for key, value in asked.items() if stored["asked"].get(key) != value]:
            state.warn(f"train.{changed[0]} changed after step {state.step}: equal to rounding only")
            return
        # The schedule of micro-batches is part of the bits: one halved by lack of memory stays halved. So is what a
        # compiler made of what each block keeps.
        self._stepper.budget_tokens = stored["budget_tokens"]
        self.plan = None if stored["plan"] is None else MemoryPlan.from_json(stored["plan"])

    def _describe_asked(self) -> dict[str, int | str]:
        spec = self._spec
        return {"micro_batch_tokens": spec.micro_batch_tokens, "memory_limit": spec.memory_limit}

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, then delete those beyond `train.keep_checkpoints`."""
        tensors = pack_tensors(state, self._stepper.optimizer, device=self._device)
        described = pack_state(
            state,
            scale=self._stepper.scale,
            micro_batches={
                "asked": self._describe_asked(),
                "budget_tokens": self._stepper.budget_tokens,
                "plan": None if self.plan is None else self.plan.to_json(),
            },
            totals=self._meter.totals(),
            identity=self.identity,
            environment=self._environment,
        )
        write_checkpoint(self._run_dir.checkpoints, state.step, tensors=tensors, state=described)
        delete_old_checkpoints(self._run_dir.checkpoints, keep=self._spec.keep_checkpoints)
        self.saved_step = state.step
