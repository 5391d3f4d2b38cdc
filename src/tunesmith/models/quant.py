"""Frozen weights in 4 or 8 bits, in pure torch, on any device.

nf4: the format of bitsandbytes. Values in row order, blocks of 64; a block stores its largest magnitude and, per value,
     the number of the nearest of 16 levels (normal quantiles); the first value of a pair lies in the high nibble.
     Double quantisation: the block maxima minus their mean, in blocks of 256, as 8-bit "dynamic" codes.
     Sources: Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantisation); 2021, arXiv:2110.02861 (codes).
int8: symmetric per output channel. CB int8 (O, I) and SCB fp32 (O,): weight = CB * SCB / 127, SCB the largest
     magnitude of the row: the storage of LLM.int8() without outlier columns (Dettmers et al. 2022, arXiv:2208.07339).

Every matrix of a checkpoint is quantised on its own, also where rows of several are merged into one projection.
Embeddings, head, norms and biases stay in the compute dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ModelError

BLOCK, OUTER_BLOCK = 64, 256
# Levels of NF4, as published with QLoRA.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@lru_cache(maxsize=8)
def nf4_levels(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _nf4_bounds(device: torch.device) -> Tensor:
    levels = nf4_levels(torch.device("cpu"))
    return ((levels[1:] + levels[:-1]) / 2).to(device)


@lru_cache(maxsize=8)
def _nf4_pairs(device: torch.device) -> Tensor:
    """Both values of every byte, as one complex number each so that one look-up fetches two, (256,)."""
    byte = torch.arange(256)
    levels = nf4_levels(torch.device("cpu"))
    return torch.view_as_complex(torch.stack((levels[byte >> 4], levels[byte & 15]), -1)).to(device)


@lru_cache(maxsize=8)
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 levels of the signed dynamic 8-bit code, ascending, fp32.

    Seven decades below 1; decade i is cut into 2^i equal pieces of which the middles are levels, with both signs;
    zero and one complete them.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _dynamic_bounds(device: torch.device) -> Tensor:
    levels = dynamic_levels(torch.device("cpu"))
    return ((levels[1:] + levels[:-1]) / 2).to(device)


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(packed bytes (n/2, 1), block maxima (n/64,)) of a matrix whose size is a multiple of 64."""
    blocks = weight.detach().reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled.flatten(), _nf4_bounds(weight.device), out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2])[:, None], absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat values, products in fp32, rounded once to `dtype`."""
    pairs = _nf4_pairs(packed.device).index_select(0, packed.flatten().to(torch.int32))
    values = torch.view_as_real(pairs).view(-1, BLOCK)
    return values.mul_(absmax[:, None]).to(dtype).flatten()


def quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """(8-bit codes (n,), block maxima (ceil(n / 256),)) of a flat fp32 tensor."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % OUTER_BLOCK)).view(-1, OUTER_BLOCK)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax.clamp(min=1e-38))[:, None]).flatten()[:count].clamp(-1, 1)
    # bitsandbytes on a CPU rounds to 65,536 steps of [-1, 1] before it looks for the nearest level; so do we.
    steps = ((scaled + 1) * 32767.5 + 0.5).floor() / 65535 * 2 - 1
    return torch.bucketize(steps, _dynamic_bounds(values.device), out_int32=True).to(torch.uint8), absmax


def dequantize_dynamic(codes: Tensor, absmax: Tensor) -> Tensor:
    values = dynamic_levels(codes.device).index_select(0, codes.to(torch.int32))
    return values * absmax.repeat_interleave(OUTER_BLOCK)[: len(values)]


class Nf4Matrix(nn.Module):
    """One (O, I) matrix in NF4."""

    packed: Tensor
    absmax: Tensor  # fp32 (n/64,), or uint8 codes with double quantisation
    outer_absmax: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: Tensor, *, double_quant: bool) -> None:
        super().__init__()
        if weight.numel() % BLOCK:
            raise ModelError(
                "",
                f"a matrix of {list(weight.shape)} values does not divide into blocks of {BLOCK}",
                cure="Use base: int8 or base: full",
            )
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        packed, absmax = quantize_nf4(weight)
        self.register_buffer("packed", packed)
        outer = offset = None
        if double_quant:
            offset = absmax.mean()
            absmax, outer = quantize_dynamic(absmax - offset)
        self.register_buffer("absmax", absmax)
        self.register_buffer("outer_absmax", outer)
        self.register_buffer("offset", offset)

    def scales(self) -> Tensor:
        """fp32 maxima of the blocks, (n/64,)."""
        if self.outer_absmax is None or self.offset is None:
            return self.absmax
        return dequantize_dynamic(self.absmax, self.outer_absmax) + self.offset

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(self.packed, self.scales(), dtype).view(self.shape)


# A product, not a quotient: CUDA divides by a number as it likes, and codes would mean other weights there.
INT8_STEP = 1 / 127


class Int8Matrix(nn.Module):
    """One (O, I) matrix in int8 with a scale per row."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        wide = weight.detach().float()
        absmax = wide.abs().amax(1)
        self.register_buffer(
            "codes", (wide * (127.0 / absmax.clamp(min=1e-38))[:, None]).round().to(torch.int8)
        )
        self.register_buffer("absmax", absmax)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes.float().mul_((self.absmax * INT8_STEP)[:, None]).to(dtype)
