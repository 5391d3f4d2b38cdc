# pyright: basic, reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""The gate of a feed-forward layer and its gradient, one Triton kernel each: every value is read and written once.

The definitions are in gated.py, in plain torch. Everything between loading and storing is in fp32, rounded once. The
module can be imported without Triton, and without a GPU; `available` is then False.

T: tokens  F: feed-forward width  R: ranks of the adapters that read the gate's output
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_ROWS, _COLUMNS = 32, 128
# tl.dot takes no shorter sums.
_LEAST_RANKS = 16


def available(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64


def jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@jit
def _activate(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    if SILU:
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        # gelu: gate * sigmoid(2 u) with u = sqrt(2 / pi) * (gate + 0.044715 gate^3), which is its tanh form.
        twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        sigmoid = tl.sigmoid(twice)
        value = gate * sigmoid
        rise = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = sigmoid + gate * sigmoid * (1.0 - sigmoid) * rise
    return value, slope


@jit
def _gate(
    opened,
    out,
    num_rows,
    width,
    opened_stride,
    out_stride,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = opened + row[:, None] * opened_stride + column[None, :]
    value, _ = _activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), SILU)
    value *= tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * out_stride + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@jit
def _gate_gradient(
    grad,
    inner,
    a,
    opened,
    out,
    num_rows,
    width,
    ranks,
    grad_stride,
    inner_stride,
    a_stride,
    opened_stride,
    SILU: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """RANKS: `ranks` rounded up to a power of two, or 0 without adapters."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < num_rows, column < width
    inside = rows[:, None] & columns[None, :]
    slope = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    if RANKS:
        rank = tl.arange(0, RANKS)
        at = inner + row[:, None] * inner_stride + rank[None, :]
        left = tl.load(at, mask=rows[:, None] & (rank < ranks)[None, :], other=0.0)
        at = a + rank[:, None].to(tl.int64) * a_stride + column[None, :]
        right = tl.load(at, mask=(rank < ranks)[:, None] & columns[None, :], other=0.0)
        slope += tl.dot(left, right, input_precision="ieee")
    at = opened + row[:, None] * opened_stride + column[None, :]
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    value, rise = _activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), SILU)
    at = out + row[:, None] * (2 * width).to(tl.int64) + column[None, :]
    tl.store(at, (slope * up * rise).to(out.dtype.element_ty), mask=inside)
    tl.store(at + width, (slope * value).to(out.dtype.element_ty), mask=inside)


def gate_into(out_TF: Tensor, opened: Tensor, kind: str) -> None:
    """Write act(gate) * up of `opened` (T, 2F) to `out_TF`, whose rows may lie apart."""
    tokens, width = out_TF.shape
    with torch.cuda.device_of(out_TF):
        _gate[(-(-tokens // _ROWS), -(-width // _COLUMNS))](
            opened, out_TF, tokens, width, opened.stride(0), out_TF.stride(0),
            SILU=kind == "silu", ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip


def gate_gradient(
    grad_TF: Tensor, inner_TR: Tensor | None, a_RF: Tensor | None, opened: Tensor, kind: str
) -> Tensor:
    """Gradient of `opened` (T, 2F) from that of the gate's output, grad + inner A. Rows of all may lie apart."""
    tokens, width = grad_TF.shape
    out = opened.new_empty(tokens, 2 * width)
    if inner_TR is None or a_RF is None:  # pointers that are never read
        inner_TR, a_RF, ranks, wide_ranks = grad_TF, grad_TF, 0, 0
    else:
        ranks = a_RF.shape[0]
        wide_ranks = max(_LEAST_RANKS, 1 << (ranks - 1).bit_length())
    with torch.cuda.device_of(out):
        _gate_gradient[(-(-tokens // _ROWS), -(-width // _COLUMNS))](
            grad_TF, inner_TR, a_RF, opened, out, tokens, width, ranks,
            grad_TF.stride(0), inner_TR.stride(0), a_RF.stride(0), opened.stride(0),
            SILU=kind == "silu", RANKS=wide_ranks, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out
