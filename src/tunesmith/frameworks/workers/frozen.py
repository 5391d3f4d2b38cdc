"""The frozen base under adapters, as a framework made it: whether it is stored as the job says, and values of it.

A worker's module, like hf.py. bitsandbytes is looked at through what its layers carry, so that it need not be there.
"""

from __future__ import annotations

import copy

import torch
from transformers.pytorch_utils import Conv1D
from worker import Failure, Run

BLOCK = 64
# Values of each matrix that a parity record holds, evenly spread: `tunesmith.api.parity` takes the same.
SAMPLES = 16


def check_base(model, handoff: dict) -> None:
    """Raises Failure if a matrix is stored or multiplied otherwise than the job says, or the head is quantised."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[handoff["precision"]]
    wanted = ("nf4", BLOCK, handoff["double_quant"], dtype) if handoff["base"] == "nf4" else None
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    for name, layer in _list_frozen(model):
        state, expected = _state_of(layer), None if layer is head else wanted
        found = state and (state.quant_type, state.blocksize, bool(state.nested), layer.compute_dtype)
        if found != expected:
            raise Failure(f"keeps {name} {_tell(found)}, where the job keeps it {_tell(expected)}")


def _tell(stored: tuple | None) -> str:
    if stored is None:
        return "unquantised"
    kind, block, doubly, dtype = stored
    return f"in {kind}, blocks of {block}{', quantised scales' if doubly else ''}, products in {dtype}"


def keep_layout(model) -> None:
    """On CPUs with bf16 instructions bitsandbytes (0.50) packs a weight anew in its first forward pass for evaluation,
    for products in bf16 without a gradient, and leaves it so: training after a validation would be another."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def keep_adapters_fp32(run: Run, model) -> None:
    """TRL casts adapters on a 4-bit base to bf16, whatever the precision; ours are fp32, as are its own elsewhere."""
    cast = [p for p in model.parameters() if p.requires_grad and p.dtype != torch.float32]
    if run.handoff["base"] == "full" or not cast:
        return
    for parameter in cast:
        parameter.data = parameter.data.to(torch.float32)
    run.warn("adapters on a 4-bit base, which TRL casts to bf16, are kept in fp32, as our engine does")


def sample_base(model) -> dict[str, list[float]]:
    """Values of every frozen matrix under adapters, as products see them before they are rounded to their dtype, by
    the layer's name in `model`."""
    found = {}
    for name, layer in _list_frozen(model):
        values = _dense(layer).flatten()
        places = [n * (values.numel() - 1) // (SAMPLES - 1) for n in range(SAMPLES)]
        found[name] = values[places].float().tolist()
    return found


def count_values(model) -> int:
    """Parameters, two for every byte that holds two."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    for _, layer in _list_frozen(model):
        if state := _state_of(layer):
            sizes[id(layer.weight)] = state.shape.numel()
    return sum(sizes.values())


def _list_frozen(model) -> list[tuple[str, torch.nn.Linear]]:
    """(name, layer) of all linear layers whose weight is not trained; adapters are."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and not layer.weight.requires_grad
    ]


def _state_of(layer):
    """bitsandbytes' QuantState, or None."""
    return getattr(layer.weight, "quant_state", None)


@torch.no_grad()
def _dense(layer) -> torch.Tensor:
    state = _state_of(layer)
    if state is None:
        return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(state)
    state.dtype = torch.float32
    return dequantize_4bit(layer.weight.data, state)
