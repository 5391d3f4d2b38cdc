"""Combinations of settings that each are valid alone and cannot be used together."""

from __future__ import annotations

from tunesmith.core.errors import JobError
from tunesmith.job.spec import FullSpec, LoraSpec, TrainSpec


def check_optimizer(train: TrainSpec, method: FullSpec | LoraSpec, *, place: str) -> None:
    """Raise JobError if `train.optimizer` cannot train with this method or precision. place: of the setting."""
    if train.optimizer in ("muon", "adamw-bf16") and isinstance(method, LoraSpec):
        why = {
            "muon": "muon updates the layers' own matrices",
            "adamw-bf16": "adapters are small and stay in fp32",
        }
        raise JobError(
            place,
            f"train.optimizer is {train.optimizer}, and the method is {method.name}",
            rule=why[train.optimizer],
            cure="Set method: full, or train.optimizer: adamw or adamw-8bit",
        )
    if train.optimizer == "adamw-bf16" and train.precision == "fp16":
        raise JobError(
            place,
            "train.optimizer is adamw-bf16, and train.precision is fp16",
            rule="fp16 cannot hold every bf16 weight",
            cure="Set train.precision: bf16, or train.optimizer: adamw",
        )
