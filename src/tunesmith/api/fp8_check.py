"""What fp8 products do to the loss, measured before the first step: told, recorded, and refused if it is too much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.core.errors import TrainingFailed
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.types import TokenRow
from tunesmith.job.spec import LoraSpec

if TYPE_CHECKING:
    import torch

    from tunesmith.models.causal_lm import CausalLM

LIMIT = 0.005
"""Largest relative difference of the loss that is trained on."""
# Weights of the reference may have to be carried to the GPU in every pass: few, large ones.
_PASS_TOKENS = 8192


def multiplies_in_fp8(method: object) -> bool:
    return isinstance(method, LoraSpec) and "fp8" in (method.storage, method.compute)


@dataclasses.dataclass
class Fp8Check:
    """Mean loss in nats of the first step's rows under the base model, with the products it had and in fp8.

    rows: the first step's. Tokens that the job adds have no embedding yet: the last known one stands in for them.
    """

    rows: Sequence[TokenRow]
    method: LoraSpec
    reference_loss: float = math.nan
    fp8_loss: float = math.nan
    dtype: str = ""

    @property
    def difference(self) -> float:
        """Relative to the loss without fp8."""
        return self.fp8_loss / self.reference_loss - 1

    def measure_reference(self, model: CausalLM) -> None:
        self.reference_loss = self._find_loss(model)

    def measure(self, model: CausalLM) -> None:
        self.fp8_loss, self.dtype = self._find_loss(model), str(model.dtype).removeprefix("torch.")

    def tell(self, *, label: str, on_event: OnEvent) -> None:
        """Say what was measured. Raises TrainingFailed if the losses are further apart than `LIMIT`."""
        without = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(self.dtype, self.dtype)
        if self.method.storage != "fp8":
            without += " products of the nf4 base"
        told = (
            f"fp8 changes the loss of the first step's rows by {self.difference:+.3%}, from {self.reference_loss:.4f} "
            f"with {without} to {self.fp8_loss:.4f}"
        )
        if not abs(self.difference) <= LIMIT:
            key, cure = ("base", "full, int8 or nf4") if self.method.storage == "fp8" else ("compute", "auto")
            raise TrainingFailed(
                f"method.{key}", told, rule=f"{LIMIT:.1%} is allowed", cure=f"Train with {key}: {cure}"
            )
        on_event(Event("note", label, text=told))

    def _find_loss(self, model: CausalLM) -> float:
        from tunesmith.eval.nll import score_rows, summarize_scores

        rows, last = self.rows, model.config.vocab_size - 1
        if self.method.new_tokens:
            rows = [
                dataclasses.replace(row, ids=[min(int(token), last) for token in row.ids]) for row in rows
            ]
        return summarize_scores(score_rows(model, rows, budget_tokens=_PASS_TOKENS))["nll"]

    def to_json(self) -> dict[str, float]:
        return {
            "reference_loss": self.reference_loss,
            "fp8_loss": self.fp8_loss,
            "difference": self.difference,
        }


def warn_of_emulation(device: torch.device, *, label: str, on_event: OnEvent) -> list[str]:
    """Say that this device has no fp8 units; the warnings that the record keeps."""
    if device.type != "cpu":
        return []
    text = "fp8 products are emulated on a CPU: as a GPU rounds them, and slower than bf16"
    on_event(Event("warning", label, text=text))
    return [text]
