"""How large a model is: parameters and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """total counts each matrix once (a tied head with its embedding, a packed weight by its values), with adapters."""

    trainable: int
    total: int
    base: int


def count_parameters(model: CausalLM) -> ParameterCount:
    """Numbers of parameters. A table that an adapter trains whole counts in `trainable` and once more in `total`."""
    seen = {id(p): p.numel() for p in model.parameters()}
    packed = sum(p.in_features * p.out_features for p in model.projections() if p.packed is not None)
    adapters = sum(
        p.numel() for lora in model.projections() for _, _, part in lora.loras() for p in part.parameters()
    )
    adapters += sum(table.tuned.numel() for table in model.tables() if table.tuned is not None)
    total = sum(seen.values()) + packed
    return ParameterCount(sum(p.numel() for p in model.trainable_parameters()), total, total - adapters)
