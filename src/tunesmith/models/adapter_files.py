"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.` + the module's checkpoint name + `.lora_A.weight`, `.lora_B.weight` or
`.lora_magnitude_vector`; a module trained whole is stored under its own name. Plain `peft` loads the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.jsonl import write_json
from tunesmith.core.rundir import as_rundir_error
from tunesmith.models.adapter_config import ADAPTER_CONFIG as CONFIG
from tunesmith.models.adapter_config import ADAPTER_WEIGHTS as WEIGHTS
from tunesmith.models.adapter_config import (
    PREFIX,
    AdapterConfig,
    check_shape,
    match_pattern,
    read_adapter_config,
    read_adapter_header,
    refuse_rank,
    refuse_tensor,
)
from tunesmith.models.causal_lm import CausalLM, TokenTable
from tunesmith.models.projection import LoraPart, Projection
from tunesmith.models.weights import read_tensors, write_tensors


def save_adapter(model: CausalLM, folder: Path, *, base_name: str, revision: str | None = None) -> None:
    """Write the adapters of `model`, fp32, config last: a folder without it was interrupted.

    base_name: hub id or folder that loaders find the base under.
    Raises ValueError if the model has no adapter, RunDirError if the disk refuses.
    """
    config = model.adapter_config
    if config is None:
        raise ValueError("the model has no adapter to save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        write_tensors(collect_tensors(model), folder / WEIGHTS)
        write_json(folder / CONFIG, _describe(model, config, base_name, revision))
    except OSError as error:
        raise as_rundir_error(error, folder) from None


def collect_tensors(model: CausalLM) -> dict[str, Tensor]:
    """PEFT key -> tensor of everything the adapter trains."""
    tensors: dict[str, Tensor] = {}
    for projection in model.projections():
        for name, _, lora in projection.loras():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = lora.a.detach()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = lora.b.detach()
            if lora.magnitude is not None:
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = lora.magnitude.detach()
    for table in model.tables():
        if table.tuned is not None:
            tensors[f"{PREFIX}{table.name}.weight"] = table.tuned.detach()
    if model.untied_head is None and model.embedding.tuned is not None:
        # Loaders that do not tie adapters read the head from its own key.
        tensors[f"{PREFIX}{model.head_name}.weight"] = model.embedding.tuned.detach().clone()
    return tensors


def _describe(model: CausalLM, config: AdapterConfig, base_name: str, revision: str | None) -> dict[str, Any]:
    saved = list(config.modules_to_save)
    if config.tied and saved:
        saved = [model.embedding.name.rpartition(".")[2], model.head_name.rpartition(".")[2]]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "auto_mapping": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "ensure_weight_tying": bool(config.tied and saved),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": any(projection.transposed for projection in model.projections()),
        "init_lora_weights": True,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
    }


def load_adapter(model: CausalLM, folder: Path | str, *, trainable: bool = False) -> AdapterConfig:
    """Attach the adapter in `folder`, made here or by PEFT, in place.

    Raises ModelError for adapters of another base or kind, naming the tensor and both shapes.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    stored = read_adapter_header(folder)
    tensors = {name.removeprefix(PREFIX): t.float() for name, t in read_tensors(stored, stored).items()}
    place = str(folder / WEIGHTS)
    for projection in model.projections():
        for number, (name, rows) in enumerate(projection.rows()):
            if f"{name}.lora_A.weight" in tensors:
                lora = _take_part(tensors, name, projection, rows, config, place)
                projection.adapters[number] = lora.to(model.device).requires_grad_(trainable)
        projection.dropout = config.dropout
    _take_tables(model, tensors, config, place, trainable=trainable)
    if tensors:
        name = next(iter(tensors))
        refuse_tensor(place, name, tensors[name].shape)
    model.adapter_config = config
    return config


def _take_part(
    tensors: dict[str, Tensor],
    name: str,
    projection: Projection,
    rows: slice,
    config: AdapterConfig,
    place: str,
) -> LoraPart:
    a = tensors.pop(f"{name}.lora_A.weight")
    b = tensors.pop(f"{name}.lora_B.weight", torch.empty(0, 0))
    rank, outputs = a.shape[0], rows.stop - rows.start
    check_shape(place, f"{name}.lora_A.weight", a.shape, (rank, projection.in_features))
    check_shape(place, f"{name}.lora_B.weight", b.shape, (outputs, rank))
    stated = match_pattern(config.rank_pattern, name, config.rank)
    if stated != rank:
        refuse_rank(place, f"{name}.lora_A.weight", rank, stated)
    magnitude = None
    if config.dora:
        magnitude = tensors.pop(f"{name}.lora_magnitude_vector", torch.empty(0))
        check_shape(place, f"{name}.lora_magnitude_vector", magnitude.shape, (outputs,))
    alpha, scale = config.scale_of(name, rank)
    return LoraPart(a, b, scale=scale, alpha=alpha, magnitude=magnitude)


def _take_tables(
    model: CausalLM, tensors: dict[str, Tensor], config: AdapterConfig, place: str, *, trainable: bool
) -> None:
    """Whole matrices: embedding and head, perhaps with more rows than the base has."""
    embed = tensors.pop(f"{model.embedding.name}.weight", None)
    head = tensors.pop(f"{model.head_name}.weight", None)
    if embed is None and head is None:
        return
    rows = (embed if embed is not None else head).shape[0]  # pyright: ignore[reportOptionalMemberAccess]
    if rows > model.config.vocab_size:
        model.resize_vocabulary(rows)
    if model.untied_head is None:
        if config.tied or (embed is not None and head is not None and torch.equal(embed, head)):
            head = None if embed is not None else head
            embed, head = (embed if embed is not None else head), None
        else:
            # PEFT trained one of two uses of a tied matrix: from here on they are two.
            model.untie_head()
    for table, tensor in ((model.embedding, embed), (model.head_table, head)):
        if tensor is not None:
            check_shape(
                place,
                f"{table.name}.weight",
                tensor.shape,
                (model.config.vocab_size, model.config.hidden_size),
            )
            table.tuned = nn.Parameter(tensor.to(table.weight.device), requires_grad=trainable)
    assert isinstance(model.embedding, TokenTable)
