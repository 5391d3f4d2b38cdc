"""Low-rank adapters on a frozen model: add, switch off, fold in. Reading and writing them is adapter_files.py.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
arXiv:2402.09353.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ModelError
from tunesmith.models.adapter_config import (
    AdapterConfig,
    check_continued,
    check_modules,
    find_targets,
    shorten,
)
from tunesmith.models.adapter_files import load_adapter, save_adapter
from tunesmith.models.causal_lm import CausalLM, TokenTable
from tunesmith.models.projection import LoraPart

if TYPE_CHECKING:
    from tunesmith.job.spec import LoraSpec

__all__ = ["add_lora", "load_adapter", "merge", "save_adapter", "set_enabled"]


def add_lora(model: CausalLM, spec: LoraSpec, *, seed: int, num_tokens: int | None = None) -> None:
    """Attach trainable fp32 adapters to `model`, in place; outputs do not change until the first step.

    seed:        equal seeds give equal adapters for equal names, whatever else was drawn before.
    num_tokens:  with spec.new_tokens, how many ids the tokenizer has after they were added.
    Raises ModelError for targets or modules the model does not have, and for an adapter that contradicts `spec`.
    """
    if spec.adapter is not None:
        _continue_adapter(model, spec, num_tokens)
        return
    targets = find_targets(_linear_names(model), spec.targets)
    scale = spec.scaling_alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)
    for projection in model.projections():
        for number, (name, rows) in enumerate(projection.rows()):
            if name not in targets:
                continue
            outputs = rows.stop - rows.start
            lora = LoraPart(
                _draw_a(spec.rank, projection.in_features, seed=seed, name=name),
                torch.zeros(outputs, spec.rank),
                scale=scale,
                alpha=spec.scaling_alpha,
                magnitude=projection.effective()[rows].norm(dim=1).cpu() if spec.dora else None,
            )
            projection.adapters[number] = lora.to(model.device)
        projection.dropout = spec.dropout
    modules = tune_tables(model, spec.modules_to_save, num_tokens=num_tokens if spec.new_tokens else None)
    if spec.new_tokens and num_tokens is None:
        raise ValueError("new tokens need num_tokens, the size of the tokenizer that has them")
    model.adapter_config = AdapterConfig(
        rank=spec.rank,
        alpha=spec.scaling_alpha,
        dropout=spec.dropout,
        rslora=spec.rslora,
        dora=spec.dora,
        targets=tuple(shorten(targets) if spec.targets == "all-linear" else spec.targets),
        modules_to_save=modules,
        tied=model.untied_head is None,
    )


def _linear_names(model: CausalLM) -> list[str]:
    return [name for projection in model.projections() for name in projection.names]


def _draw_a(rank: int, inputs: int, *, seed: int, name: str) -> Tensor:
    """Uniform in +-1/sqrt(inputs): what kaiming_uniform with a = sqrt(5) gives, as in PEFT."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return (torch.rand(rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)


def tune_tables(model: CausalLM, modules: Sequence[str], *, num_tokens: int | None) -> tuple[str, ...]:
    """Give the embedding and/or head a trainable whole copy, larger if the vocabulary grew. Returns their names.

    On a tied model either name means the one matrix, which stays tied.
    """
    check_modules(modules, [table.name.rpartition(".")[2] for table in model.tables()])
    if num_tokens is not None and num_tokens > model.config.vocab_size:
        model.resize_vocabulary(num_tokens)
    wanted = {"lm_head" if module == "lm_head" else "embed_tokens" for module in modules}
    if num_tokens is not None:
        wanted = {"embed_tokens", "lm_head"}
    if wanted and model.untied_head is None:
        wanted = {"embed_tokens"}
    for module in sorted(wanted):
        table = model.head_table if module == "lm_head" else model.embedding
        table.tuned = nn.Parameter(table.weight.detach().float().clone())
    return tuple(sorted(wanted))


def _continue_adapter(model: CausalLM, spec: LoraSpec, num_tokens: int | None) -> None:
    """Load spec.adapter for further training. What the job says explicitly must agree with it."""
    assert spec.adapter is not None
    found = load_adapter(model, Path(spec.adapter), trainable=True)
    adapted = {name for projection in model.projections() for name, _, _ in projection.loras()}
    # A task file has every default written out. What was written and is a default is looked at before: `check_lora`.
    said = {key for key, field in type(spec).model_fields.items() if getattr(spec, key) != field.default}
    check_continued(spec, found, said, adapted=adapted, linears=_linear_names(model))
    if num_tokens is not None and num_tokens > model.config.vocab_size:
        raise ModelError(
            "method.new_tokens",
            "the continued adapter does not hold them",
            cure="Start a new adapter to add tokens",
        )
    dropout = spec.dropout if "dropout" in said else found.dropout
    for projection in model.projections():
        projection.dropout = dropout
    model.adapter_config = dataclasses.replace(found, dropout=dropout)


def set_enabled(model: CausalLM, enabled: bool) -> None:
    """Switch all adapters and tuned tables on or off: off is the base model."""
    for projection in model.projections():
        projection.enabled = enabled
    for table in model.tables():
        table.enabled = enabled


def merge(model: CausalLM) -> None:
    """Fold adapters and tuned tables into the weights, in place. Quantised weights become 16-bit where touched."""
    for projection in model.projections():
        if not projection.loras():
            continue
        kind = projection.dtype if projection.weight is None else projection.weight.dtype
        projection.weight = nn.Parameter(projection.effective().to(kind), requires_grad=False)
        projection.packed = None
        for number in range(len(projection.adapters)):
            projection.drop_adapter(number)
    for table in model.tables():
        merge_table(table)
    model.adapter_config = None


def merge_table(table: TokenTable) -> None:
    """Put the table that was trained whole in the base's place."""
    if table.tuned is not None:
        table.weight = nn.Parameter(table.tuned.detach().to(table.weight.dtype), requires_grad=False)
        table.tuned = None
