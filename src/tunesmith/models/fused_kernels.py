# pyright: basic, reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""Triton kernels of what lies between a block's products: every value is read and written once.

fused.py has their definitions in plain torch. Between loading and storing everything is in fp32. The module can be
imported without Triton, and without a GPU; `available` is then False.

T: tokens  F: feed-forward width  R, S: ranks of the adapters that read the gate, that feed it  H, N: heads  d: width
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

# Tokens and columns of a program, the fastest of eight tilings of an 8B model's shapes on an H200; the second where
# adapters of the projection that opens the gate are added, too.
_TILE, _TILE_ADAPTED = (16, 128), (64, 64)
_HEAD_ROWS = 16
# tl.dot takes no shorter sums.
_LEAST_RANKS = 16
# A program holds all ranks at once: of 512 bytes, with tiles as above, they take 74 kB of shared memory. RTX cards have
# 99 kB, an H200 227.
_MOST_RANK_BYTES = 512


def available(tensor: Tensor, ranks: int = 0) -> bool:
    """Whether the kernels take tensors like this one, with so many ranks of adapters that are added to them."""
    fits = _round_ranks(ranks) * tensor.itemsize <= _MOST_RANK_BYTES
    return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64 and fits


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _product(
    left,
    right,
    row,
    rows,
    column,
    columns,
    left_stride,
    rank_stride,
    column_stride,
    ranks,
    RANKS: tl.constexpr,
):
    """A tile of left @ right, fp32. left: (rows, ranks). right: (ranks, columns), with any strides."""
    rank = tl.arange(0, RANKS)
    inside = rank < ranks
    at = left + row[:, None] * left_stride + rank[None, :]
    left_tile = tl.load(at, mask=rows[:, None] & inside[None, :], other=0.0)
    at = right + rank[:, None] * rank_stride + column[None, :] * column_stride
    right_tile = tl.load(at, mask=inside[:, None] & columns[None, :], other=0.0)
    return tl.dot(left_tile, right_tile, input_precision="ieee")


@_jit
def _activate(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    if SILU:
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        # gelu: gate * sigmoid(2 u) with u = sqrt(2 / pi) * (gate + 0.044715 gate^3), which is its tanh form.
        sigmoid = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        value = gate * sigmoid
        rise = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = sigmoid + gate * sigmoid * (1.0 - sigmoid) * rise
    return value, slope


@_jit
def _load_opened(
    opened,
    inner,
    b,
    row,
    rows,
    column,
    columns,
    width,
    opened_stride,
    inner_stride,
    b_stride,
    ranks,
    RANKS: tl.constexpr,
):
    """Tiles of gate and up, fp32: opened + inner B^T."""
    inside = rows[:, None] & columns[None, :]
    at = opened + row[:, None] * opened_stride + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if RANKS:
        gate += _product(inner, b, row, rows, column, columns, inner_stride, 1, b_stride, ranks, RANKS)
        up += _product(inner, b, row, rows, width + column, columns, inner_stride, 1, b_stride, ranks, RANKS)
    return gate, up


@_jit
def _gate(
    opened, inner, b, out, num_rows, width, ranks, opened_stride, inner_stride, b_stride, out_stride,
    SILU: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < num_rows, column < width
    gate, up = _load_opened(
        opened,
        inner,
        b,
        row,
        rows,
        column,
        columns,
        width,
        opened_stride,
        inner_stride,
        b_stride,
        ranks,
        RANKS,
    )
    value, _ = _activate(gate, SILU)
    at = out + row[:, None] * out_stride + column[None, :]
    tl.store(at, (value * up).to(out.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@_jit
def _gate_gradient(
    grad, grad_inner, a, opened, inner, b, out, num_rows, width, read_ranks, ranks,
    grad_stride, grad_inner_stride, a_stride, opened_stride, inner_stride, b_stride,
    SILU: tl.constexpr, READ_RANKS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < num_rows, column < width
    inside = rows[:, None] & columns[None, :]
    slope = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    if READ_RANKS:
        slope += _product(
            grad_inner, a, row, rows, column, columns, grad_inner_stride, a_stride, 1, read_ranks, READ_RANKS
        )
    gate, up = _load_opened(
        opened,
        inner,
        b,
        row,
        rows,
        column,
        columns,
        width,
        opened_stride,
        inner_stride,
        b_stride,
        ranks,
        RANKS,
    )
    value, rise = _activate(gate, SILU)
    at = out + row[:, None] * (2 * width).to(tl.int64) + column[None, :]
    tl.store(at, (slope * up * rise).to(out.dtype.element_ty), mask=inside)
    tl.store(at + width, (slope * value).to(out.dtype.element_ty), mask=inside)


@_jit
def _add_product(
    base, left, right, out, num_rows, width, ranks, base_stride, left_stride, right_stride,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < num_rows, column < width
    inside = rows[:, None] & columns[None, :]
    value = tl.load(base + row[:, None] * base_stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    value += _product(left, right, row, rows, column, columns, left_stride, right_stride, 1, ranks, RANKS)
    at = out + row[:, None] * width.to(tl.int64) + column[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside)


@_jit
def _join_heads(
    grad_q, grad_k, grad_v, cos, sin, out, num_rows, query_heads, heads, half,
    q_token, q_head, k_token, k_head, v_token, v_head, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens. HALF: `half` rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    grad, token = grad_q + head * q_head, q_token
    if head >= query_heads:
        grad, token = grad_k + (head - query_heads) * k_head, k_token
    if head >= query_heads + heads:
        grad, token = grad_v + (head - query_heads - heads) * v_head, v_token
    lane = tl.arange(0, HALF)
    inside = (row < num_rows)[:, None] & (lane < half)[None, :]
    at = grad + row[:, None] * token + lane[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    # Values aren't rotated.
    turned = inside & (head < query_heads + heads)
    angle = row[:, None] * half + lane[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    at = out + (row[:, None] * (query_heads + 2 * heads) + head) * (2 * half) + lane[None, :]
    tl.store(at, (first * c + second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * c - first * s).to(out.dtype.element_ty), mask=inside)


# --- launching --------------------------------------------------------------------------------------------------------


def _round_ranks(ranks: int) -> int:
    return max(_LEAST_RANKS, 1 << max(0, ranks - 1).bit_length())


def _grid(tokens: int, width: int, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-tokens // tile[0]), -(-width // tile[1])


def gate_into(out_TF: Tensor, opened: Tensor, inner_TS: Tensor | None, b_S: Tensor | None, kind: str) -> None:
    """Write act(gate) * up of opened + inner B^T, (T, 2F), to `out_TF`. b_S: (2F, S). Rows of all may lie apart."""
    tokens, width = out_TF.shape
    ranks = 0
    if inner_TS is None or b_S is None:  # pointers that are never read
        inner_TS = b_S = opened
    else:
        ranks = inner_TS.shape[1]
    tile = _TILE_ADAPTED if ranks else _TILE
    with torch.cuda.device_of(out_TF):
        _gate[_grid(tokens, width, tile)](
            opened, inner_TS, b_S, out_TF, tokens, width, ranks,
            opened.stride(0), inner_TS.stride(0), b_S.stride(0), out_TF.stride(0),
            SILU=kind == "silu", RANKS=_round_ranks(ranks) if ranks else 0, ROWS=tile[0], COLUMNS=tile[1],
        )  # fmt: skip


def gate_gradient(
    grad_TF: Tensor,
    grad_inner_TR: Tensor | None,
    a_RF: Tensor | None,
    opened: Tensor,
    inner_TS: Tensor | None,
    b_S: Tensor | None,
    kind: str,
) -> Tensor:
    """Gradient of opened + inner B^T, (T, 2F), from that of the gate's output, grad + grad_inner A."""
    tokens, width = grad_TF.shape[0], opened.shape[1] // 2
    out = opened.new_empty(tokens, 2 * width)
    read_ranks = ranks = 0
    if grad_inner_TR is None or a_RF is None:
        grad_inner_TR = a_RF = opened
    else:
        read_ranks = a_RF.shape[0]
    if inner_TS is None or b_S is None:
        inner_TS = b_S = opened
    else:
        ranks = inner_TS.shape[1]
    tile = _TILE_ADAPTED if ranks else _TILE
    with torch.cuda.device_of(out):
        _gate_gradient[_grid(tokens, width, tile)](
            grad_TF, grad_inner_TR, a_RF, opened, inner_TS, b_S, out, tokens, width, read_ranks, ranks,
            *(tensor.stride(0) for tensor in (grad_TF, grad_inner_TR, a_RF, opened, inner_TS, b_S)),
            SILU=kind == "silu", READ_RANKS=_round_ranks(read_ranks) if read_ranks else 0,
            RANKS=_round_ranks(ranks) if ranks else 0, ROWS=tile[0], COLUMNS=tile[1],
        )  # fmt: skip
    return out


def add_product(base: Tensor, left_TR: Tensor, right_RI: Tensor) -> Tensor:
    """base + left @ right, (T, I), contiguous; of `base` the first I columns. Rows of all may lie apart."""
    tokens, (ranks, width) = base.shape[0], right_RI.shape
    out = base.new_empty(tokens, width)
    with torch.cuda.device_of(out):
        _add_product[_grid(tokens, width, _TILE)](
            base, left_TR, right_RI, out, tokens, width, ranks,
            base.stride(0), left_TR.stride(0), right_RI.stride(0),
            RANKS=_round_ranks(ranks), ROWS=_TILE[0], COLUMNS=_TILE[1],
        )  # fmt: skip
    return out


def join_heads(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of rotated queries (T, H, d), rotated keys and values (T, N, d) -> that of all heads before rotation,
    (T, (H + 2N) d). cos, sin: (T, 1, d/2), contiguous."""
    tokens, query_heads, width = grad_q.shape
    heads = grad_k.shape[1]
    out = grad_q.new_empty(tokens, (query_heads + 2 * heads) * width)
    grads = [grad if grad.stride(2) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    half = width // 2
    with torch.cuda.device_of(out):
        _join_heads[(-(-tokens // _HEAD_ROWS), query_heads + 2 * heads)](
            *grads, cos, sin, out, tokens, query_heads, heads, half,
            *(stride for grad in grads for stride in grad.stride()[:2]),
            HALF=1 << (half - 1).bit_length(), ROWS=_HEAD_ROWS,
        )  # fmt: skip
    return out
