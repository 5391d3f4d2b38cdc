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


def check_in_backward(train: TrainSpec, method: FullSpec | LoraSpec, *, place: str) -> None:
    """Raise JobError if `train.optimizer_in_backward` is on and cannot be obeyed."""
    if not train.optimizer_in_backward:
        return

    def refuse(finding: str, rule: str, cure: str) -> JobError:
        return JobError(place, f"train.optimizer_in_backward is on, and {finding}", rule=rule, cure=cure)

    if isinstance(method, LoraSpec):
        cure = "Leave it out, or set method: full"
        raise refuse(f"the method is {method.name}", "adapters' gradients take next to no memory", cure)
    if train.clip_norm is not None:
        rule = "gradients are clipped by a norm that is known when all are there"
        raise refuse(f"train.clip_norm is {train.clip_norm:g}", rule, "Set train.clip_norm: null")
    if train.optimizer == "muon":
        rule = "muon updates matrices of one shape together"
        raise refuse("train.optimizer is muon", rule, "Set train.optimizer: adamw, adamw-8bit or adamw-bf16")
    if train.precision == "fp16":
        rule = "fp16 repeats steps whose gradients overflow"
        raise refuse("train.precision is fp16", rule, "Set train.precision: bf16")
