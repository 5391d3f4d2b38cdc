"""Quantisation by torchao (extra `quant`): of a finished model, and felt by a model in training.

`make_config` is the one place that says which of torchao's configurations a scheme means. `quantize_weight` applies it
to a weight; `make_fake_quantizers` derives from it what training rounds with, so that a model is trained for exactly
what `quantize_model` makes of it. Nothing of torchao's numbers is written a second time here.

Every projection is quantised, adapters folded in, from fp32; embeddings, head and norms stay. Scales run along inputs:
merged projections (rows of several matrices) have the scales that their parts would have.

T: tokens  I: inputs  O: outputs of all parts
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.errors import ModelError, SetupError
from tunesmith.models.lora import merge_table

if TYPE_CHECKING:
    from tunesmith.job.spec import QuantizeSpec
    from tunesmith.models.causal_lm import CausalLM

_BITS = {"int8": 8, "fp8": 8, "int4": 4, "int8-int4": 4}


def check_torchao(*, place: str) -> None:
    """Raise SetupError, naming the setting at `place`, if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise SetupError(
            place, "needs torchao, which is not installed", cure="Install it: pip install 'tunesmith[quant]'"
        )


def check_groups(name: str, num_inputs: int, spec: QuantizeSpec, *, place: str = "") -> None:
    """Raise ModelError if the inputs of the matrix `name` do not divide into the groups that share a scale."""
    size = spec.inputs_per_scale
    if size and num_inputs % size:
        fits = [each for each in (256, 128, 64, 32) if num_inputs % each == 0]
        raise ModelError(
            place or name,
            f"{name} has {num_inputs} inputs, which do not divide into groups of {size}",
            cure=f"Write group_size: {fits[0]}" if fits else "Use scheme int8 or fp8, which have no groups",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao's import reports GPU libraries that are not for this machine; users can do nothing about them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def make_config(spec: QuantizeSpec) -> Any:
    """torchao's configuration (`AOBaseConfig`) of a scheme. Raises SetupError if torchao is not installed."""
    check_torchao(place=spec.scheme)
    with _quiet():
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8DynamicActivationIntxWeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
        )
    # `set_inductor_config` would change settings of the whole process.
    if spec.scheme == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if spec.scheme == "fp8":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    assert spec.inputs_per_scale
    groups, int4 = PerGroup(spec.inputs_per_scale), torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    return (IntxWeightOnlyConfig if spec.scheme == "int4" else Int8DynamicActivationIntxWeightConfig)(
        int4, groups
    )


def quantize_weight(weight_OI: Tensor, spec: QuantizeSpec) -> Any:
    """torchao's tensor of a weight: codes `qdata` (O, I) and `scale`; `dequantize()` has the dtype of `weight_OI`.

    Raises ModelError if the inputs do not divide into groups.
    """
    check_groups("weight", weight_OI.shape[1], spec)
    config = make_config(spec)
    from torchao.quantization import quantize_

    shell = nn.Sequential(nn.Linear(*reversed(weight_OI.shape), bias=False, device="meta"))
    shell[0].weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    quantize_(shell, config)
    return shell[0].weight.detach()


def make_fake_quantizers(spec: QuantizeSpec) -> tuple[nn.Module | None, nn.Module]:
    """What torchao rounds activations (None: not at all) and weights with while it trains for an int4 scheme."""
    config = make_config(spec)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    shell = nn.Sequential(nn.Linear(spec.inputs_per_scale or 1, 1, bias=False, device="meta"))
    with _quiet():
        quantize_(shell, QATConfig(config, step=QATStep.PREPARE))
    prepared: Any = shell[0]
    return prepared.activation_fake_quantizer, prepared.weight_fake_quantizer


# --- after training ---------------------------------------------------------------------------------------------------


class QuantizedRows(nn.Module):
    """A projection's quantised weight, as a judge multiplies with it: dequantised once, activations rounded each time.

    weight: (O, I) in the compute dtype, the values that torchao's tensor dequantises to. A `PackedWeight`.
    stored_bytes: what codes (two int4 a byte) and scales take on disk.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, activation: nn.Module | None, stored_bytes: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.activation, self.stored_bytes = activation, stored_bytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x if self.activation is None else self.activation(x), self.weight, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.linear(x, bias)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight

    def form(self) -> None:
        """torchao's rounding of activations is not written for a compiler of ours."""


def quantize_model(model: CausalLM, spec: QuantizeSpec) -> None:
    """Fold adapters in and quantise every projection, in place, one at a time.

    Raises ModelError if a projection's inputs do not divide into groups, SetupError without torchao.
    """
    activation = make_fake_quantizers(spec)[0] if spec.scheme == "int8-int4" else None
    for projection in model.projections():
        check_groups(projection.names[0], projection.in_features, spec)
        quantized = quantize_weight(projection.effective(), spec)
        scales = quantized.scale
        packed = QuantizedRows(
            quantized.dequantize().to(projection.dtype),
            activation=activation,
            stored_bytes=quantized.numel() * _BITS[spec.scheme] // 8 + scales.numel() * scales.element_size(),
        )
        projection.weight, projection.packed, projection.quantizer = None, packed, None
        for number in range(len(projection.adapters)):
            projection.drop_adapter(number)
    for table in model.tables():
        merge_table(table)
    model.adapter_config = None


def count_stored_bytes(model: CausalLM) -> int:
    """Bytes that a quantised model takes on disk: codes and scales, and the rest as the checkpoint stores it."""
    dtype = getattr(torch, "float32" if model.config.dtype == "auto" else model.config.dtype)
    total, quantized = 0, set[str]()
    for projection in model.projections():
        if isinstance(projection.packed, QuantizedRows):
            total += projection.packed.stored_bytes
            quantized |= {f"{name}.weight" for name in projection.names}
    rest = (tensor.numel() for name, tensor in model.weights() if name not in quantized)
    return total + sum(rest) * dtype.itemsize


# --- in training ------------------------------------------------------------------------------------------------------


class QuantizedProduct:
    """A projection's product in quantisation-aware training; see `projection.FakeQuantizer`."""

    def __init__(self, spec: QuantizeSpec) -> None:
        self.activation, self.weight = make_fake_quantizers(spec)

    def linear(self, x: Tensor, weigh: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        def round_weight() -> Tensor:
            return self.weight(weigh()).to(x.dtype)

        # Rounding keeps several fp32 matrices for its backward; made again there, only the rounded weight stays.
        weight: Any = (
            checkpoint(round_weight, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else round_weight()
        )
        return F.linear(x if self.activation is None else self.activation(x), weight, bias)


def fake_quantize_model(model: CausalLM, spec: QuantizeSpec) -> None:
    """Let every projection round its operands as `quantize_model` will, in place; validation feels it too.

    Raises ModelError if a projection's inputs do not divide into groups, SetupError without torchao.
    """
    product = QuantizedProduct(spec)
    for projection in model.projections():
        check_groups(projection.names[0], projection.in_features, spec)
        projection.quantizer = product
