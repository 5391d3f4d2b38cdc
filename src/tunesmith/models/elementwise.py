"""RMSNorm, gates and rotary embedding: plain differentiable ops, and a faster pair of passes for eager CPU runs.

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


def norm_rms_plain(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, computed in fp32 (fp64 stays), rounded once at
    the end."""
    y = x if x.dtype == torch.float64 else x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * _shift(weight_D.to(y.dtype), offset)).to(x.dtype)


def norm_rms(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`norm_rms_plain`, saving only the input and one number per row."""
    run = _NormRms.apply if runs_eager_cpu(x) else norm_rms_plain
    return run(x, weight_D, eps, offset)


def _shift(weight: Tensor, offset: float) -> Tensor:
    return weight + offset if offset else weight


class _NormRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps, offset):
        x32 = x.float()
        size = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight_D, scale)
        ctx.offset = offset
        return (x32 * scale).mul_(_shift(weight_D.float(), offset)).to(x.dtype)

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
            grad_unit = grad * _shift(weight_D.float(), ctx.offset)
            along = (grad_unit * x32).mean(-1, keepdim=True).mul_(scale * scale * scale)
            grad_x = grad_unit.mul_(scale).addcmul_(x32, along, value=-1).to(x.dtype)
        return grad_x, grad_weight, None, None


def gate_plain(gate_up_TF: Tensor, kind: str = "silu") -> Tensor:
    """act(gate) * up of a merged (T, 2F) projection -> (T, F). kind: silu | gelu_tanh."""
    gate, up = gate_up_TF.chunk(2, -1)
    return _open(gate, kind) * up


def gate_gradient_plain(grad_TF: Tensor, gate_up_TF: Tensor, kind: str) -> Tensor:
    """Gradient of `gate_plain`'s argument, (T, 2F)."""
    gate, up = gate_up_TF.chunk(2, -1)
    grad_gate = torch.empty_like(gate)
    _close(grad_TF * up, gate, kind, into=grad_gate)
    return torch.cat((grad_gate, grad_TF * _open(gate, kind)), -1)


def gate(gate_up_TF: Tensor, kind: str = "silu") -> Tensor:
    return (_Gate.apply if runs_eager_cpu(gate_up_TF) else gate_plain)(gate_up_TF, kind)


def _open(gate: Tensor, kind: str) -> Tensor:
    return F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")


def _close(grad: Tensor, gate: Tensor, kind: str, *, into: Tensor) -> None:
    """The gradient of `_open`."""
    aten = torch.ops.aten
    if kind == "silu":
        aten.silu_backward.grad_input(grad, gate, grad_input=into)
    else:
        aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=into)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_TF, kind):
        gate, up = gate_up_TF.chunk(2, -1)
        opened = _open(gate, kind)
        ctx.save_for_backward(gate_up_TF, opened)
        ctx.kind = kind
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_up_TF, opened = ctx.saved_tensors
        gate, up = gate_up_TF.chunk(2, -1)
        grad_in = torch.empty_like(gate_up_TF)
        grad_gate, grad_up = grad_in.chunk(2, -1)
        torch.mul(grad, opened, out=grad_up)
        _close(grad * up, gate, ctx.kind, into=grad_gate)
        return grad_in, None


def make_inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of channels, fp32, (d/2,); fewer where only a share of a head is rotated.

    linear: positions are divided by `factor`. llama3: wavelengths longer than original_max_positions / low_freq_factor
    are slowed by `factor`, shorter than original_max_positions / high_freq_factor kept, between them interpolated.
    none: no angle, so that layers without rotation run the same operations.
    Source: Su et al. 2021, arXiv:2104.09864; the Llama 3.1 model card for the scaling.
    """
    width = int(head_dim * rope.share)
    exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    if rope.kind == "none":
        return torch.zeros_like(exponent)
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
    """Rotate channel i with channel i + d/2, the pairing of Hugging Face weights.

    cos and sin with fewer than d/2 channels rotate as many pairs at the head's start; the rest passes.
    """
    width = 2 * cos.shape[-1]
    if width < x_THd.shape[-1]:
        return torch.cat((rotate_plain(x_THd[..., :width], cos, sin), x_THd[..., width:]), -1)
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
    x_MSd = x_MSd[..., : cos_Sd.shape[-1]]
    first, second = x_MSd.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    x_MSd.mul_(cos_Sd).addcmul_(swapped, sin_Sd, value=-1 if inverse else 1)
