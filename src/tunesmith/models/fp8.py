"""Numbers and products in fp8 (e4m3: one sign, four exponent and three mantissa bits, at most 448).

A row (a token's activations or gradients, an output's weights) is divided by a scale that takes its largest magnitude
to 448, then rounded. A product of codes is exact in fp32, and scales are factors of whole rows, so that

    x W^T  =  (codes of x) (codes of W)^T * scale of the token * scale of the output

needs nothing but a matrix product of codes. In dY W the outputs are summed over, and their scales cannot leave the
sum: they are folded into dY before it is quantised, so that one copy of W serves both directions.

`multiply` runs on the fp8 units of a GPU; `emulate` is its definition in plain torch, on any device.

T: rows of the left operand  K: summed over  N: rows of the right operand
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.core.errors import SetupError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# Below any magnitude that matters, and far enough above zero for 448 / amax to be finite.
_TINY = 1e-30
# cuBLASLt and CUTLASS ask for rows of whole 16-byte units.
ALIGNMENT = 16


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 (T, K), scales fp32 (T, 1)): x = codes * scales. Plain operations, for a compiler to fuse."""
    wide = x_TK.float()
    amax = wide.abs().amax(1, keepdim=True).clamp(min=_TINY)
    return (wide * (LARGEST / amax)).clamp(-LARGEST, LARGEST).to(FP8), amax / LARGEST


def quantize_tensor(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 (T, K), one scale fp32 ()). A row's codes then depend on the other rows beside it."""
    wide = x_TK.float()
    amax = wide.abs().amax().clamp(min=_TINY)
    return (wide * (LARGEST / amax)).clamp(-LARGEST, LARGEST).to(FP8), amax / LARGEST


def emulate(
    a_TK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a b^T of codes with their scales, (T, N): products and sums in fp32, rounded once to `dtype`.

    a_scale: fp32, (T, 1) or one for all, (). b_scale: fp32 (N,), or None for ones.
    """
    y = (a_TK.float() @ b_NK.float().t()) * a_scale
    return (y if b_scale is None else y * b_scale).to(dtype)


def multiply(
    a_TK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `emulate` says, on the fp8 units of a GPU; there rounded to bf16 first, and summed with fewer bits."""
    if not a_TK.is_cuda:
        return emulate(a_TK, a_scale, b_NK, b_scale, dtype)
    one_scale = a_scale.dim() == 0
    after = b_scale if one_scale else None
    if one_scale:
        b_row = a_scale.new_ones(())
    else:
        b_row = a_scale.new_ones(1, b_NK.shape[0]) if b_scale is None else b_scale.view(1, -1)
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a_TK.contiguous(),
        b_NK.t(),
        scale_a=a_scale,
        scale_b=b_row,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.to(dtype) if after is None else (y.float() * after).to(dtype)


class Fp8Matrix(nn.Module):
    """One (O, I) matrix: e4m3 codes (O, I), and a scale per row, fp32 (O,).

    Merged matrices need no parts of their own: a row's codes depend on that row alone.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = quantize_rows(weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale[:, 0].contiguous())

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes.float().mul_(self.scale[:, None]).to(dtype)


def check_fp8_device(device: torch.device, *, place: str, cure: str) -> None:
    """Raise SetupError if `device` is a GPU without fp8 units. A CPU emulates them."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise SetupError(
            place,
            f"is fp8, which {torch.cuda.get_device_name(device)} lacks (compute capability {major}.{minor})",
            rule="fp8 products need compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
            cure=cure,
        )
