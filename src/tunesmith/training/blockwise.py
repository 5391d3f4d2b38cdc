"""Optimizer states in 8 bits: block-wise, with a dynamic (nearly logarithmic) set of levels.

A block of 256 values shares one fp32 scale, its largest magnitude; each value is the nearest of 256 levels in [-1, 1]
or [0, 1]. One outlier therefore spoils 255 neighbours at most. Levels and blocks are those of bitsandbytes.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, sections 2.1 and 2.2.

B: blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7


@dataclass(frozen=True)
class Levels:
    """Values that a code can stand for, and tables that find the nearest one.

    values: (256,) ascending.   middles: (256,) between a value and the next, the last infinite.
    lowest: (65536,) by the upper 16 bits of a float: code of the smallest number with these bits.
    """

    values: Tensor
    middles: Tensor
    lowest: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the levels nearest to `x`, fp32 in [-1, 1].

        Two look-ups in place of a binary search, which takes ten times as long on a CPU: numbers that share their upper
        16 bits lie closer together than two levels, so at most one middle is between them.
        """
        key = (x.view(torch.int32) >> 16) & 0xFFFF
        lowest = self.lowest.index_select(0, key.view(-1)).view(x.shape).int()
        middle = self.middles.index_select(0, lowest.view(-1)).view(x.shape)
        return (lowest + (x > middle)).to(torch.uint8)

    def value_of(self, codes: Tensor) -> Tensor:
        """fp32 level of each code."""
        return self.values.index_select(0, codes.view(-1).int()).view(codes.shape)


def list_levels(*, signed: bool) -> list[float]:
    """The 256 levels, ascending.

    Seven decades below 1. The k-th from below (k from 0) is cut into 2^k equal parts with a sign, 2^(k+1) without, and
    each part's middle is a level; 0 and 1 complete them. Worked out for the lowest decade without sign, 1e-7 to 1e-6:
    parts 1e-7..5.5e-7 and 5.5e-7..1e-6, levels 3.25e-7 and 7.75e-7.
    """
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        top = 10.0 ** (decade - _DECADES + 1)
        parts = 2**decade if signed else 2 ** (decade + 1)
        middles = [top * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        found += middles + [-value for value in middles] if signed else middles
    return sorted(found)


@cache
def make_levels(device: torch.device, *, signed: bool) -> Levels:
    values = torch.tensor(list_levels(signed=signed), dtype=torch.float32)
    middles = torch.cat(((values[:-1] + values[1:]) / 2, torch.tensor([torch.inf])))
    key = torch.arange(1 << 16, dtype=torch.int64)
    # Of the negative numbers with the same upper bits, the smallest has all lower bits set.
    bits = (key << 16) | torch.where(key >= 1 << 15, 0xFFFF, 0)
    smallest = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    lowest = torch.bucketize(smallest.nan_to_num(), middles[:-1]).to(torch.uint8)
    return Levels(values.to(device), middles.to(device), lowest.to(device))


def quantize(x: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """(codes, scales) of fp32 blocks (B, 256): uint8 (B, 256), fp32 (B, 1)."""
    scales = x.abs().amax(1, keepdim=True)
    # A block of zeros has no scale to divide by.
    return levels.nearest(x / scales.clamp(min=torch.finfo(torch.float32).tiny)), scales


def dequantize(codes: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """fp32 blocks (B, 256)."""
    return levels.value_of(codes) * scales


def count_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK)
