"""Frozen projections in 4 or 8 bits: how they are held, and the operators that multiply with them.

Two pairs of operators, each a product and its gradient. `packed_linear` unpacks the weight to the dtype of x and
multiplies; `fp8_linear` takes x in fp8 codes, multiplies codes, and its gradient does the same with dY. A compiler sees
an operator and its shapes, never what it unpacks; on a GPU that goes through one buffer (scratch.py). What quantises x
and dY is plain torch around the operators, so that it can be fused into what made them.

On a CPU, and for every shape a kernel does not take, the operators are their own definition in plain torch.

T: tokens  I: inputs  O: outputs of all parts
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core.errors import ModelError
from tunesmith.models import nf4_kernel, scratch
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.fp8 import ALIGNMENT, FP8, LARGEST, Fp8Matrix, multiply, quantize_rows, quantize_tensor
from tunesmith.models.operators import operator
from tunesmith.models.quant import BLOCK, INT8_STEP, Int8Matrix, Nf4Matrix, dequantize_dynamic, dequantize_nf4

Compute = Literal["auto", "bf16", "fp8"]
Matrix = Nf4Matrix | Int8Matrix | Fp8Matrix


# --- unpacking --------------------------------------------------------------------------------------------------------


def _read_parts(
    kind: str, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> list[tuple[slice, list[Tensor]]]:
    """(rows, tensors) of each part. int8, fp8: codes, scale. nf4: packed, absmax; nf4-double: outer and offset, too."""
    width = 4 if kind == "nf4-double" else 2
    ends = list(itertools.accumulate(sizes, initial=0))
    return [
        (slice(ends[number], ends[number + 1]), list(tensors[number * width : (number + 1) * width]))
        for number in range(len(sizes))
    ]


def _dense_part(kind: str, tensors: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(outputs, I) in plain torch."""
    if kind == "int8":
        return tensors[0].float().mul_((tensors[1] * INT8_STEP)[:, None]).to(dtype)
    if kind == "fp8":
        return tensors[0].float().mul_(tensors[1][:, None]).to(dtype)
    absmax = tensors[1]
    if kind == "nf4-double":
        absmax = dequantize_dynamic(absmax, tensors[2]) + tensors[3]
    return dequantize_nf4(tensors[0], absmax, dtype).view(shape)


def unpack(
    kind: str, tensors: Sequence[Tensor], sizes: Sequence[int], inputs: int, dtype: torch.dtype
) -> Tensor:
    """The (O, I) weight in `dtype`; on a GPU in the scratch buffer."""
    parts = _read_parts(kind, tensors, sizes)
    if len(parts) == 1 and not tensors[0].is_cuda:
        return _dense_part(kind, parts[0][1], (sizes[0], inputs), dtype)
    weight_OI = scratch.take((sum(sizes), inputs), dtype, tensors[0].device)
    for rows, part in parts:
        if kind.startswith("nf4") and nf4_kernel.available(tensors[0].device):
            nf4_kernel.unpack_into(weight_OI[rows], *_all_four(part))
        else:
            weight_OI[rows] = _dense_part(kind, part, (rows.stop - rows.start, inputs), dtype)
    return weight_OI


def unpack_fp8(
    kind: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    inputs: int,
    inverse: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """The weight's e4m3 codes, (O, I) or transposed (I, O), contiguous; on a GPU in the scratch buffer, unless they are
    stored so. Of an fp8 matrix the first tensor is read alone.

    inverse: fp32 (O,), what a row of NF4 values is multiplied by to give codes.
    """
    device, outputs = tensors[0].device, sum(sizes)
    if kind == "fp8":
        if not transposed:
            return tensors[0]
        codes = scratch.take((inputs, outputs), FP8, device)
        if nf4_kernel.available(device):
            nf4_kernel.transpose_into(codes.view(torch.uint8), tensors[0].view(torch.uint8))
        else:
            codes.view(torch.uint8).copy_(tensors[0].view(torch.uint8).t())
        return codes
    assert inverse is not None
    codes = scratch.take((inputs, outputs) if transposed else (outputs, inputs), FP8, device)
    for rows, part in _read_parts(kind, tensors, sizes):
        out, shape = codes[:, rows] if transposed else codes[rows], (rows.stop - rows.start, inputs)
        if nf4_kernel.available(device) and inputs % BLOCK == 0:
            nf4_kernel.unpack_fp8_into(
                out, *_all_four(part), inverse=inverse[rows], shape=shape, transposed=transposed
            )
        else:
            part_codes = _fp8_part(kind, part, shape, inverse[rows]).view(torch.uint8)
            out.view(torch.uint8).copy_(part_codes.t() if transposed else part_codes)
    return codes


def _fp8_part(kind: str, tensors: list[Tensor], shape: tuple[int, int], inverse: Tensor) -> Tensor:
    values = _dense_part(kind, tensors, shape, torch.float32).mul_(inverse[:, None])
    return values.clamp_(-LARGEST, LARGEST).to(FP8)


def _all_four(part: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return (part[0], part[1], part[2], part[3]) if len(part) == 4 else (part[0], part[1], None, None)


# --- operators --------------------------------------------------------------------------------------------------------


def _packed_linear_like(x: Tensor, kind: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], sum(sizes))


@operator(_packed_linear_like)
def _packed_linear(x: Tensor, kind: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """x W^T, (T, O) in the dtype of x."""
    return x @ unpack(kind, tensors, sizes, x.shape[1], x.dtype).t()


def _packed_linear_gradient_like(
    grad: Tensor, kind: str, tensors: Sequence[Tensor], sizes: Sequence[int], inputs: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], inputs)


@operator(_packed_linear_gradient_like)
def _packed_linear_gradient(
    grad: Tensor, kind: str, tensors: Sequence[Tensor], sizes: Sequence[int], inputs: int
) -> Tensor:
    """dY W, (T, I) in the dtype of dY."""
    return grad @ unpack(kind, tensors, sizes, inputs, grad.dtype)


def _fp8_linear_like(
    codes: Tensor,
    code_scale: Tensor,
    kind: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    scale: Tensor,
    inverse: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], sum(sizes), dtype=dtype)


@operator(_fp8_linear_like)
def _fp8_linear(
    codes: Tensor,
    code_scale: Tensor,
    kind: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    scale: Tensor,
    inverse: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x W^T, (T, O), of x in codes."""
    weight = unpack_fp8(kind, tensors, sizes, codes.shape[1], inverse, transposed=False)
    return multiply(codes, code_scale, weight, scale, dtype)


def _fp8_linear_gradient_like(
    codes: Tensor,
    code_scale: Tensor,
    kind: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    inputs: int,
    inverse: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], inputs, dtype=dtype)


@operator(_fp8_linear_gradient_like)
def _fp8_linear_gradient(
    codes: Tensor,
    code_scale: Tensor,
    kind: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    inputs: int,
    inverse: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dY W, (T, I), of dY times the weight's scales in codes: the right operand is W's codes alone."""
    weight = unpack_fp8(kind, tensors, sizes, inputs, inverse, transposed=True)
    return multiply(codes, code_scale, weight, None, dtype)


# --- differentiable ---------------------------------------------------------------------------------------------------


class _ProjectPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, sizes, *stored):
        ctx.kind, ctx.sizes, ctx.inputs = kind, sizes, x.shape[1]
        ctx.save_for_backward(*stored)
        return _packed_linear(x, kind, stored, sizes)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        stored = ctx.saved_tensors  # read once: a checkpoint gives them out once
        grad = _packed_linear_gradient(grad, ctx.kind, stored, ctx.sizes, ctx.inputs)
        return grad, None, None, *[None] * len(stored)


class _ProjectFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, scale, inverse, *stored):
        codes, code_scale = _quantize(x, plan)
        ctx.plan, ctx.inputs = plan, x.shape[1]
        ctx.save_for_backward(scale, inverse, *stored)
        return _fp8_linear(codes, code_scale, plan.kind, stored, plan.sizes, scale, inverse, x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, inverse, *stored = ctx.saved_tensors
        codes, code_scale = _quantize(grad.float() * scale, ctx.plan)
        plan = ctx.plan
        grad = _fp8_linear_gradient(
            codes, code_scale, plan.kind, stored, plan.sizes, ctx.inputs, inverse, grad.dtype
        )
        return grad, None, None, None, *[None] * len(stored)


class _PackedLinear(torch.autograd.Function):
    """`packed_linear` with less ado, for eager runs on a CPU; never traced by a compiler."""

    @staticmethod
    def forward(ctx, x, packed, bias):
        ctx.packed = packed
        return packed.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.packed.gradient(grad), None, None


# --- the weights of a projection --------------------------------------------------------------------------------------


class PackedTensors(NamedTuple):
    """What a product with a packed weight reads.

    stored: of each part what it holds. scale, inverse: fp32 (O,), for products in fp8; inverse with NF4 only.
    """

    stored: tuple[Tensor, ...]
    scale: Tensor | None
    inverse: Tensor | None


class PackedPlan(NamedTuple):
    """How it reads it; equal for the same projection of all blocks. See `PackedRows` for the words."""

    kind: str
    sizes: tuple[int, ...]
    compute: str
    scaling: str


def project_packed(x: Tensor, tensors: PackedTensors, plan: PackedPlan) -> Tensor:
    """x W^T, differentiable in x, with operators that a compiler knows. x: (T, I)."""
    if plan.compute == "fp8":
        # Of an fp8 matrix, codes alone: the rest is its scale, and a compiler takes no tensor twice.
        stored = tensors.stored[:1] if plan.kind == "fp8" else tensors.stored
        y = _ProjectFp8.apply(x, plan, tensors.scale, tensors.inverse, *stored)
    else:
        y = _ProjectPacked.apply(x, plan.kind, plan.sizes, *tensors.stored)
    assert isinstance(y, Tensor)
    return y


def _quantize(x: Tensor, plan: PackedPlan) -> tuple[Tensor, Tensor]:
    return quantize_rows(x) if plan.scaling == "rows" else quantize_tensor(x)


class PackedRows(nn.Module):
    """Matrices in 4 or 8 bits, merged by rows into one projection.

    compute: "fp8" multiplies codes (always with an fp8 base), else the weight is unpacked to the dtype of x.
    scaling: "rows" gives each token its own scale; "tensor" all of them one, which makes a result depend on what lies
             beside it in the batch, and is faster on some builds.
    """

    scale: Tensor | None
    inverse: Tensor | None

    def __init__(self, parts: Sequence[Matrix]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        first = parts[0]
        if isinstance(first, Nf4Matrix):
            self.kind = "nf4" if first.outer_absmax is None else "nf4-double"
        else:
            self.kind = "int8" if isinstance(first, Int8Matrix) else "fp8"
        self.compute: Literal["auto", "fp8"] = "auto"
        self.scaling: Literal["rows", "tensor"] = "rows"
        self.sizes = tuple(_shape(part)[0] for part in parts)
        self.inputs = _shape(first)[1]
        self.register_buffer("scale", None)
        self.register_buffer("inverse", None)
        if isinstance(first, Fp8Matrix):
            self.compute, self.scale = "fp8", first.scale

    def set_compute(self, compute: Literal["auto", "fp8"]) -> None:
        """Multiply in fp8, or in the dtype of x. The codes of NF4 values have a scale per row, found here once."""
        if compute == "fp8" and self.scale is None:
            amax = torch.cat([_find_amax(part.dense(torch.float32)) for part in self._matrices()])
            self.scale, self.inverse = amax / LARGEST, LARGEST / amax
        self.compute = compute

    def _matrices(self) -> list[Any]:
        return list(self.parts)

    def tensors(self) -> PackedTensors:
        stored = tuple(tensor for part in self._matrices() for tensor in _stored(part))
        return PackedTensors(stored, self.scale, self.inverse)

    def plan(self) -> PackedPlan:
        return PackedPlan(self.kind, self.sizes, self.compute, self.scaling)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The (O, I) weight that products in `dtype` see: never an operand's fp8 rounding of NF4 values."""
        dense = [part.dense(dtype) for part in self._matrices()]
        return torch.cat(dense) if len(dense) > 1 else dense[0]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, differentiable in x and known to a compiler. x: (T, I)."""
        if self.compute != "fp8" and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _PackedLinear.apply(x, self, bias)
        y = project_packed(x, self.tensors(), self.plan())
        return y if bias is None else y + bias

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias without a gradient, for a node that has its own."""
        if self.compute != "fp8":
            return F.linear(x, self.dense(x.dtype), bias)
        with torch.no_grad():
            return self.linear(x, bias)

    def gradient(self, grad: Tensor) -> Tensor:
        """dY W, the gradient of x in `linear`. dY: (T, O)."""
        if self.compute != "fp8":
            return grad @ self.dense(grad.dtype)
        stored, scale, inverse = self.tensors()
        assert scale is not None
        codes, code_scale = _quantize(grad.float() * scale, self.plan())
        return _fp8_linear_gradient(
            codes, code_scale, self.kind, list(stored), list(self.sizes), self.inputs, inverse, grad.dtype
        )

    def form(self) -> tuple[PackedTensors, PackedPlan]:
        """What `project_packed` reads, and how."""
        return self.tensors(), self.plan()

    def scratch_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the shared buffer that its products need."""
        return sum(self.sizes) * self.inputs * (1 if self.compute == "fp8" else dtype.itemsize)


class LentRows:
    """A projection's own dense weight, wherever it lies, moved to where it is used for each product: the reference that
    a packed model is measured against, which then never has to fit the GPU whole."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.to(x.device, x.dtype), bias)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight.to(grad.device, grad.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(x, bias)

    def form(self) -> None:
        """It is carried over product by product, which no compiler should see."""


def _shape(part: Matrix) -> tuple[int, int]:
    outputs, inputs = part.shape if isinstance(part, Nf4Matrix) else part.codes.shape
    return outputs, inputs


def _stored(part: Matrix) -> list[Tensor]:
    if isinstance(part, Nf4Matrix):
        doubly = (part.outer_absmax, part.offset)
        return [part.packed, part.absmax, *(tensor for tensor in doubly if tensor is not None)]
    return [part.codes, part.absmax if isinstance(part, Int8Matrix) else part.scale]


def _find_amax(values: Tensor) -> Tensor:
    return values.abs_().amax(1).clamp(min=1e-30)


# --- models -----------------------------------------------------------------------------------------------------------


def lend_weights(model: CausalLM) -> None:
    """Leave the projections' weights where they are when `model` is moved, and carry them over product by product."""
    for projection in model.projections():
        assert projection.weight is not None
        projection.weight, projection.packed = None, LentRows(projection.weight.detach())


def pack_model(
    model: CausalLM, base: str, *, double_quant: bool, device: torch.device | str, compute: Compute = "auto"
) -> None:
    """Replace the weights of all projections by 4- or 8-bit ones, in place, one at a time on `device`."""
    largest = 0
    for projection in model.projections():
        lent = projection.packed
        weight = lent.weight if isinstance(lent, LentRows) else projection.weight
        assert weight is not None
        weight = weight.detach()
        if base == "fp8" or compute == "fp8":
            _check_alignment(projection.names[0], weight, torch.device(device))
        parts: list[Any] = []
        if base == "fp8":
            parts.append(Fp8Matrix(weight.to(device)))
        else:
            for name, rows in projection.rows():
                matrix = weight[rows].to(device)
                try:
                    parts.append(
                        Int8Matrix(matrix) if base == "int8" else Nf4Matrix(matrix, double_quant=double_quant)
                    )
                except ModelError as error:
                    raise ModelError(f"{name}.weight", error.finding, cure=error.cure) from None
        packed = PackedRows(parts)
        projection.weight, projection.packed = None, packed
        if compute == "fp8":
            packed.set_compute("fp8")
        largest = max(largest, packed.scratch_bytes(projection.dtype))
    if torch.device(device).type == "cuda":
        scratch.reserve(torch.device(device), largest)


def set_compute(model: CausalLM, compute: Literal["auto", "fp8"]) -> None:
    """Switch every packed projection between products in fp8 and in the compute dtype."""
    for projection in model.projections():
        assert isinstance(projection.packed, PackedRows)
        projection.packed.set_compute(compute)


def _check_alignment(name: str, weight: Tensor, device: torch.device) -> None:
    if device.type == "cuda" and (weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT):
        raise ModelError(
            f"{name}.weight",
            f"has {weight.shape[0]} x {weight.shape[1]} values",
            rule=f"fp8 products on a GPU need multiples of {ALIGNMENT}",
            cure="Use base: full, int8 or nf4 with compute: bf16",
        )
