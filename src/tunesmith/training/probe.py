"""The plan meets the machine: a micro-batch is rehearsed where memory is scarce, and what it took corrects the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.core.types import Example
from tunesmith.data.batch import plan_micro_batches
from tunesmith.training.meter import allocated_bytes, peak_bytes, reset_peak_bytes
from tunesmith.training.planner import MemoryPlan, Planner
from tunesmith.training.step import Stepper, count_targets

# Where even a rehearsal doesn't fit, a step is taken to need so much more than predicted, and planned again.
_OUT_OF_MEMORY_FACTOR = 1.25
_MOST_TRIES = 4


def follow_plan(model: Any, plan: MemoryPlan) -> None:
    model.levels, model.loss_chunk_bytes = plan.levels, plan.loss_chunk_bytes


def settle_plan(
    planner: Planner,
    stepper: Stepper,
    rows: Sequence[Example],
    device: torch.device,
    *,
    always_probe: bool = False,
) -> MemoryPlan:
    """Plan with what the allocator holds now; unless there is room to spare, rehearse, and plan with what that took.

    rows: of a typical step. Weights, states and generators are as before; model and stepper follow the plan.
    """
    if device.type == "cuda":
        with torch.no_grad():
            getattr(
                stepper.model, "head_weight", None
            )  # its copy in the compute dtype is made when first asked for
        planner.resident_bytes = allocated_bytes(device)
    plan = planner.plan()
    for _ in range(_MOST_TRIES):
        follow_plan(stepper.model, plan)
        stepper.budget_tokens = plan.budget_tokens
        if plan.is_roomy and not always_probe:
            return plan
        took = _rehearse(stepper, rows, plan, device)
        if took is not None:
            corrected = planner.correct(plan, **took)
            follow_plan(stepper.model, corrected)
            stepper.budget_tokens = corrected.budget_tokens
            return corrected
        planner.step_factor *= _OUT_OF_MEMORY_FACTOR
        plan = dataclasses.replace(planner.plan(), probe={"out_of_memory": plan.describe_levels()})
    return plan


def _rehearse(
    stepper: Stepper, rows: Sequence[Example], plan: MemoryPlan, device: torch.device
) -> dict[str, int] | None:
    """What the largest micro-batch of `rows` took: `tokens`, bytes `resident` before it and `peak`. None: too much.

    Of two passes the second counts: the first compiles, and makes what then stays (workspaces, copies of weights).
    """
    rows = [row for row in rows if count_targets(row)] or rows
    lengths = [len(row.ids) for row in rows]
    groups = plan_micro_batches(lengths, budget_tokens=plan.budget_tokens)
    group = max(groups, key=lambda numbers: sum(lengths[number] for number in numbers))
    chosen = [rows[number] for number in group]
    resident = 0
    stepper.model.train()
    for _ in range(2):
        resident = allocated_bytes(device)
        reset_peak_bytes(device)
        if not stepper.rehearse(chosen):
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return None
    taken = {
        "tokens": sum(len(row.ids) for row in chosen),
        "resident_bytes": resident,
        "peak_bytes": peak_bytes(device),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the rehearsal's sizes would only split the room of the plan's
    return taken
