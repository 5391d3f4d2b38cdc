"""RMSNorm, SwiGLU and rotary embedding: plain differentiable ops, and a faster pair of passes for eager CPU runs.

The plain functions are the definition; tests hold the fast ones to them. Under `torch.compile` and on a GPU the plain
ones are used: a compiler fuses them better, and it must not trace the in-place steps of the fast ones.

T: tokens  D: width  F: feed-forward width  H: heads  d: head width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models.config import RopeConfig


def runs_eager_cpu(x: Tensor) -> bool:
    """Whether the hand-written CPU passes apply."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and not torch.compiler.is_compiling()


def norm_rms_plain(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 (fp64 stays), rounded once at the end."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight_D.to(y.dtype)).to(x.dtype)


def norm_rms(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`norm_rms_plain`, saving only the input and one number per row."""
    return _NormRms.apply(x, weight_D, eps) if runs_eager_cpu(x) else norm_rms_plain(x, weight_D, eps)


class _NormRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x32 = x.float()
        size = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight_D, scale)
        return (x32 * scale).mul_(weight_D.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        x32 = x.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * scale).mul_(x32).flatten(0, -2).sum(0).to(weight_D.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # With u = grad * weight:  grad_x = scale * u - x * scale^3 * mean(u * x).
            grad_unit = grad * weight_D.float()
            along = (grad_unit * x32).mean(-1, keepdim=True).mul_(scale * scale * scale)
            grad_x = grad_unit.mul_(scale).addcmul_(x32, along, value=-1).to(x.dtype)
        return grad_x, grad_weight, None


def gate_silu_plain(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up of a merged (T, 2F) projection -> (T, F)."""
    gate, up = gate_up_TF.chunk(2, -1)
    return F.silu(gate) * up


def gate_silu(gate_up_TF: Tensor) -> Tensor:
    return _GateSilu.apply(gate_up_TF) if runs_eager_cpu(gate_up_TF) else gate_silu_plain(gate_up_TF)


class _GateSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_TF):
        gate, up = gate_up_TF.chunk(2, -1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_up_TF, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_up_TF, opened = ctx.saved_tensors
        gate, up = gate_up_TF.chunk(2, -1)
        grad_in = torch.empty_like(gate_up_TF)
        grad_gate, grad_up = grad_in.chunk(2, -1)
        torch.mul(grad, opened, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_in


def make_inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of channels, fp32, (d/2,).

    linear: positions are divided by `factor`. llama3: wavelengths longer than original_max_positions / low_freq_factor
    are slowed by `factor`, shorter than original_max_positions / high_freq_factor kept, between them interpolated.
    Source: Su et al. 2021, arXiv:2104.09864; the Llama 3.1 model card for the scaling.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * torch.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * inverse / rope.factor + blend * inverse
    return inverse


def make_rotation(inverse: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each position and channel pair, angles in fp32, each (T, 1, d/2)."""
    angle = positions_T.to(inverse.dtype)[:, None] * inverse
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


def rotate_plain(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + d/2, the pairing of Hugging Face weights."""
    first, second = x_THd.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_plain`, with the rounding of `rotate_` where that is used."""
    if not runs_eager_cpu(x_THd):
        return rotate_plain(x_THd, cos, sin)
    turned = x_THd.clone(memory_format=torch.contiguous_format)
    rotate_(turned, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    return turned


def rotate_(x_MSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, *, inverse: bool = False) -> None:
    """`rotate_plain` or its inverse in place, of whole documents. cos and sin of whole heads, sin negative in the first
    half: rows of d numbers instead of d/2 are twice as fast."""
    first, second = x_MSd.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    x_MSd.mul_(cos_Sd).addcmul_(swapped, sin_Sd, value=-1 if inverse else 1)
