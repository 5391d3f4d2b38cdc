"""What must survive an interruption for the rest of a run to be the same, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import JobError, RunDirError, TrainingFailed
from tunesmith.core.fingerprint import hash_code, hash_json
from tunesmith.core.jsonl import dump_json
from tunesmith.core.records import StepRecord
from tunesmith.job.spec import TrainSpec
from tunesmith.training.checkpoint import Checkpoint
from tunesmith.training.optim import LossScale, Optimizer, copy_tensors
from tunesmith.training.step import read_random, set_random

# Keys of `train:` that may differ when a run continues: they decide nothing about the weights. (The last two decide
# how sums are rounded; changing it is allowed, because another machine may need it, and warned about.)
_FREE_KEYS = ("save_every", "keep_checkpoints", "trackers", "micro_batch_tokens", "memory_limit")


@dataclass(slots=True)
class Best:
    """Lowest validation loss so far and the trained weights that gave it, copied to the CPU."""

    step: int
    loss: float
    weights: dict[str, Tensor]


@dataclass(slots=True)
class Pending:
    """A step that is taken but whose validation was cut off: validation comes first when the run continues."""

    record: StepRecord
    ends_epoch: bool


@dataclass(slots=True)
class TrainState:
    """Everything about a run's progress that isn't a tensor of the optimizer. `step` counts finished steps."""

    step: int = 0
    position: Mapping[str, Any] | None = None
    best: Best | None = None
    pending: Pending | None = None
    epoch: float = 0.0
    last_loss: float = 0.0
    last_validation_loss: float | None = None
    warnings: list[str] = field(default_factory=list)

    def warn(self, *texts: str) -> None:
        """Note what the person should know at the end, each thing once."""
        self.warnings += [text for text in texts if text not in self.warnings]


def describe_run(
    spec: TrainSpec, named: Mapping[str, nn.Parameter], *, rows: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to this run. rows: hash of the training rows in order."""
    shapes = {name: list(parameter.shape) for name, parameter in named.items()}
    identity = {
        "train": {key: item for key, item in spec.model_dump().items() if key not in _FREE_KEYS},
        "trained_weights": {"tensors": len(shapes), "sha256": hash_json(shapes)},
        "training_rows": rows,
        **given,
    }
    return json.loads(dump_json(identity))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What decides the rounding of sums: equal bits are promised only where this is equal."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "device": name, "threads": threads, "code": hash_code()[:12]}


def refuse_other_run(stored: Mapping[str, Any], now: Mapping[str, Any], *, place: Path) -> None:
    """Raise JobError listing every key that differs between a checkpoint's run and this one."""
    before, after = _flatten(stored), _flatten(now)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return
    diff = ", ".join(f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in changed)
    raise JobError(
        changed[0],
        f"changed since the checkpoint in {place}: {diff}",
        rule="a run continues with the job it began with",
        cure="Restore the job, or start anew with another --out",
    )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def pack_tensors(
    state: TrainState, optimizer: Optimizer, *, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors of a checkpoint. Weights are the optimizer's masters; the model's own are these, rounded.

    Raises TrainingFailed if anything is not finite: such a checkpoint would replace a good one.
    """
    files = {
        "weights": dict(optimizer.masters),
        "optimizer": optimizer.state_tensors(),
        "random": read_random(device),
    }
    if state.best is not None and state.best.weights and state.best.step != state.step:
        files["best"] = state.best.weights
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingFailed(
                    f"step {state.step}",
                    f"{key} ({name}) is not finite",
                    rule="nothing that isn't finite is saved",
                    cure="Lower train.learning_rate, and continue from the checkpoint before",
                )
    return files


def pack_state(
    state: TrainState,
    *,
    scale: LossScale,
    micro_batches: Mapping[str, Any],
    totals: Mapping[str, float],
    identity: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "step": state.step,
        "position": state.position,
        "epoch": state.epoch,
        "last_loss": state.last_loss,
        "last_validation_loss": state.last_validation_loss,
        "best": None if state.best is None else {"step": state.best.step, "loss": state.best.loss},
        "pending": None
        if state.pending is None
        else {"record": state.pending.record.to_json(), "ends_epoch": state.pending.ends_epoch},
        "loss_scale": {
            "value": scale.value,
            "steps_without_overflow": scale.steps_without_overflow,
            "overflows": scale.overflows,
        },
        "micro_batches": dict(micro_batches),
        "totals": dict(totals),
        "warnings": state.warnings,
        "identity": dict(identity),
        "environment": dict(environment),
    }


def restore(
    checkpoint: Checkpoint,
    *,
    named: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    scale: LossScale,
    device: torch.device,
) -> TrainState:
    """Put weights, optimizer, loss scale and random state back; returns the rest. Identities are compared before."""
    stored = checkpoint.state
    try:
        optimizer.load(weights=checkpoint.tensors("weights"), states=checkpoint.tensors("optimizer"))
    except ValueError as error:
        raise RunDirError(str(checkpoint.folder), str(error), rule="a checkpoint fits its model") from None
    scale.value = stored["loss_scale"]["value"]
    scale.steps_without_overflow = stored["loss_scale"]["steps_without_overflow"]
    scale.overflows = stored["loss_scale"]["overflows"]
    set_random(checkpoint.tensors("random"), device)
    state = TrainState(
        step=stored["step"],
        position=stored["position"],
        epoch=stored["epoch"],
        last_loss=stored["last_loss"],
        last_validation_loss=stored["last_validation_loss"],
        warnings=list(stored["warnings"]),
    )
    if pending := stored["pending"]:
        state.pending = Pending(StepRecord.from_json(pending["record"]), pending["ends_epoch"])
    if best := stored["best"]:
        # The best step's own checkpoint holds these weights already.
        weights = copy_weights(named) if best["step"] == state.step else checkpoint.tensors("best")
        state.best = Best(best["step"], best["loss"], weights)
    return state


def copy_weights(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of trained weights on the CPU, in the model's own precision."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in named.items()}


def put_weights(named: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    copy_tensors({name: parameter.detach() for name, parameter in named.items()}, weights)
