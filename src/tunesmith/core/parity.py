"""What a framework really did in its first optimizer steps, as its worker saw it: what the parity gates compare.

A worker writes it in a short run of its own, with injected adapters, apart from the runs that are timed and judged.
What could not be seen is None, which a gate calls UNVERIFIED and never PASS. Plain data, no judgement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.core.checked import read_checked
from tunesmith.core.errors import DataError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Example:
    """One row as it reached the model.

    digest:         `fingerprint.hash_row` of its ids without padding, and of 1 where a label carries loss, else 0; of 2
                    where that label is not the token itself.
    labelled_pads:  labels that carry loss where the padding is.
    """

    digest: str
    num_tokens: int
    num_target_tokens: int
    labelled_pads: int = 0


@dataclass(frozen=True, slots=True)
class ParityStep:
    """One optimizer step. loss: nats per target token over the whole step, before its update. grad_norm: L2 over all
    trained parameters, before clipping. learning_rates: of this update, one for each parameter group.

    clip_norm: what gradients were clipped to; 0 where they were not.
    applied_norm: L2 over all trained parameters as the optimizer's step found them, so after clipping: what was really
        done, where clip_norm is what was asked.
    """

    examples: tuple[Example, ...] | None
    loss: float | None
    grad_norm: float | None
    learning_rates: tuple[float, ...] | None
    clip_norm: float | None
    applied_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained parameter before the first step. name: as PEFT or transformers saves it, without wrappers' prefixes:
    `model.layers.0.mlp.up_proj.lora_A.weight`.

    std: of its values as the framework drew them, before anything was injected.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    std: float | None


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """What an optimizer does with some parameters. kind: `adamw`, `adamw-8bit`, ... as in `train.optimizer`."""

    kind: str
    names: tuple[str, ...]
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """See the module. precision: what products were computed in, `float32`, `bfloat16`, `float16`.

    state_dtypes: dtypes of the optimizer's states after the first step.
    base:         of each frozen matrix (`model.layers.0.mlp.up_proj`) some values, evenly spread, as they are unpacked
                  to fp32; empty where nothing is frozen.
    """

    framework: str
    versions: dict[str, str]
    precision: str
    steps: tuple[ParityStep, ...]
    parameters: tuple[Parameter, ...] | None
    groups: tuple[ParameterGroup, ...] | None
    state_dtypes: tuple[str, ...] | None = None
    base: dict[str, tuple[float, ...]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any, *, place: str = "parity record") -> ParityRecord:
        """Raises DataError naming the field that is missing, of another type, or not finite."""
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:  # pyright: ignore[reportUnknownMemberType]
            raise DataError(place, "is no parity record", rule=f"this version reads schema {SCHEMA}")
        given: dict[str, Any] = {**value}
        return read_checked(cls, {key: item for key, item in given.items() if key != "schema"}, place=place)
