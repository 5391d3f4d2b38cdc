# pyright: basic, reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""NF4 unpacked by one Triton kernel per matrix, straight into what a product reads: bf16, or codes in fp8.

The definitions are in quant.py and fp8.py, in plain torch; what is written here equals them bit for bit. The module
can be imported without Triton, and without a GPU; `available` is then False.

A block of 64 values is 32 bytes, the high nibble of each first, times one scale. With double quantisation the scale is
itself packed: level of its 8-bit code * largest of its 256 + offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.quant import BLOCK, dynamic_levels, nf4_levels

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_BLOCKS, _TILE_ROWS = 64, 64


def available(device: torch.device) -> bool:
    return triton is not None and device.type == "cuda"


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _unpack_blocks(packed, absmax, outer, offset, levels, nf4, block, inside, DOUBLE: tl.constexpr):
    """Values of the blocks numbered `block`, fp32 (blocks, 64)."""
    if DOUBLE:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        largest = tl.load(outer + block // 256, mask=inside, other=0.0)
        scale = tl.load(levels + code) * largest + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + at, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(nf4 + (byte >> 4)) * scale[:, None]
    low = tl.load(nf4 + (byte & 15)) * scale[:, None]
    return tl.interleave(high, low)


@_jit
def _unpack(
    packed,
    absmax,
    outer,
    offset,
    levels,
    nf4,
    out,
    num_blocks,
    DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    values = _unpack_blocks(packed, absmax, outer, offset, levels, nf4, block, inside, DOUBLE)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside[:, None])


@_jit
def _unpack_fp8(
    packed,
    absmax,
    outer,
    offset,
    levels,
    nf4,
    inverse,
    out,
    num_rows,
    row_blocks,
    stride,
    DOUBLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    block = row * row_blocks + tl.program_id(1)
    values = _unpack_blocks(packed, absmax, outer, offset, levels, nf4, block, inside, DOUBLE)
    values = values * tl.load(inverse + row, mask=inside, other=0.0)[:, None]
    codes = tl.clamp(values, -448.0, 448.0).to(out.dtype.element_ty)
    column = tl.program_id(1).to(tl.int64) * 64 + tl.arange(0, 64)
    if TRANSPOSED:
        at = column[:, None] * stride + row[None, :]
        tl.store(out + at, tl.trans(codes), mask=inside[None, :])
    else:
        at = row[:, None] * stride + column[None, :]
        tl.store(out + at, codes, mask=inside[:, None])


@_jit
def _transpose(matrix, out, rows, columns, SIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    at = row[:, None] * columns + column[None, :]
    tile = tl.load(matrix + at, mask=(row < rows)[:, None] & (column < columns)[None, :])
    at = column[:, None] * rows + row[None, :]
    tl.store(out + at, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


def _arguments(packed: Tensor, absmax: Tensor, outer: Tensor | None, offset: Tensor | None) -> list[Tensor]:
    # A pointer that is never read, where there is nothing to point at.
    doubly = (absmax, absmax) if outer is None or offset is None else (outer, offset)
    return [packed, absmax, *doubly, dynamic_levels(packed.device), nf4_levels(packed.device)]


def unpack_into(
    out: Tensor, packed: Tensor, absmax: Tensor, outer: Tensor | None, offset: Tensor | None
) -> None:
    """Write the values of a matrix to `out`, contiguous: products in fp32, rounded once."""
    count = out.numel() // BLOCK
    with torch.cuda.device_of(out):
        _unpack[(-(-count // _BLOCKS),)](
            *_arguments(packed, absmax, outer, offset),
            out,
            count,
            DOUBLE=outer is not None,
            BLOCKS=_BLOCKS,
            enable_fp_fusion=False,  # level * largest + offset in two roundings, as in plain torch
        )


def unpack_fp8_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    outer: Tensor | None,
    offset: Tensor | None,
    *,
    inverse: Tensor,
    shape: tuple[int, int],
    transposed: bool,
) -> None:
    """Write the values of an (O, I) matrix times `inverse` of their row, as e4m3, to `out` or its transpose.

    out: rows of (O, I), or columns of (I, O), of a larger matrix; its first stride is used. I: a multiple of 64.
    """
    rows, row_blocks = shape[0], shape[1] // BLOCK
    with torch.cuda.device_of(out):
        _unpack_fp8[(-(-rows // _TILE_ROWS), row_blocks)](
            *_arguments(packed, absmax, outer, offset),
            inverse,
            out,
            rows,
            row_blocks,
            out.stride(0),
            DOUBLE=outer is not None,
            TRANSPOSED=transposed,
            ROWS=_TILE_ROWS,
            enable_fp_fusion=False,
        )


def transpose_into(out: Tensor, matrix: Tensor) -> None:
    """Write the transpose of a contiguous matrix of bytes to `out`, contiguous."""
    rows, columns = matrix.shape
    with torch.cuda.device_of(out):
        _transpose[(-(-rows // _TILE_ROWS), -(-columns // _TILE_ROWS))](
            matrix, out, rows, columns, SIDE=_TILE_ROWS
        )
