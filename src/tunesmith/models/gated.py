"""A feed-forward layer's gate together with what reads it, and a gradient that touches every value once.

A compiler left alone makes the gate's gradient read its inputs once for each of its halves, copies the gate's output
to lay x A beside it, and adds the adapters' share of the gradient in a pass of its own. Two operators, which it passes
by, do better: `gate_wide` writes the output where the product reads it, `gate_gradient` adds that share on the way. On
a GPU they are gate_kernel.py's kernels; anywhere else their own definition in plain torch.

T: tokens  O: outputs  F: feed-forward width  R: ranks of the adapters together, filled up
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.models import gate_kernel
from tunesmith.models.elementwise import gate_gradient_plain, gate_plain


@torch.library.custom_op("tunesmith::gate_wide", mutates_args=())
def _gate_wide(opened: Tensor, a_RF: Tensor, kind: str) -> Tensor:
    """[gated, gated A^T], (T, F + R), where gated is act(gate) * up of `opened`, (T, 2F)."""
    ranks, width = a_RF.shape
    wide = opened.new_empty(opened.shape[0], width + ranks)
    if gate_kernel.available(opened):
        gate_kernel.gate_into(wide[:, :width], opened, kind)
    else:
        wide[:, :width] = gate_plain(opened, kind)
    torch.mm(wide[:, :width], a_RF.t(), out=wide[:, width:])
    return wide


@_gate_wide.register_fake
def _(opened: Tensor, a_RF: Tensor, kind: str) -> Tensor:
    return opened.new_empty(opened.shape[0], a_RF.shape[0] + a_RF.shape[1])


@torch.library.custom_op("tunesmith::gate_gradient", mutates_args=())
def _gate_gradient(
    grad_TF: Tensor, inner_TR: Tensor | None, a_RF: Tensor | None, opened: Tensor, kind: str
) -> Tensor:
    """Gradient of `opened` (T, 2F) from that of the gate's output, which is grad + inner A."""
    if gate_kernel.available(opened):
        return gate_kernel.gate_gradient(grad_TF, inner_TR, a_RF, opened, kind)
    if inner_TR is not None and a_RF is not None:
        grad_TF = grad_TF + inner_TR @ a_RF
    return gate_gradient_plain(grad_TF, opened, kind)


@_gate_gradient.register_fake
def _(grad_TF: Tensor, inner_TR: Tensor | None, a_RF: Tensor | None, opened: Tensor, kind: str) -> Tensor:
    return opened.new_empty(opened.shape)


class _Gate(torch.autograd.Function):
    """See `open_gate`. Nothing works in place: torch 2.11 compiles such functions to wrong gradients."""

    @staticmethod
    def forward(ctx, opened, a_RF, kind, keep):
        gated = gate_plain(opened, kind)
        inner_TR = opened.new_empty(opened.shape[0], 0) if a_RF is None else gated @ a_RF.t()
        ctx.save_for_backward(opened, a_RF, gated if keep and a_RF is not None else None)
        ctx.kind = kind
        return gated, inner_TR

    @staticmethod
    def backward(ctx, grad_TF, grad_inner_TR):  # pyright: ignore[reportIncompatibleMethodOverride]
        opened, a_RF, gated = ctx.saved_tensors
        if a_RF is None:
            return _gate_gradient(grad_TF, None, None, opened, ctx.kind), None, None, None
        grad_a = grad_inner_TR.t() @ (gate_plain(opened, ctx.kind) if gated is None else gated)
        return _gate_gradient(grad_TF, grad_inner_TR, a_RF, opened, ctx.kind), grad_a, None, None


class _GateJoined(torch.autograd.Function):
    """See `project_gated`."""

    @staticmethod
    def forward(ctx, opened, a_RF, b_OR, joined, kind, keep):
        wide = _gate_wide(opened, a_RF, kind)
        ctx.save_for_backward(opened, a_RF, joined, wide if keep else None)
        ctx.kind = kind
        return wide @ joined.t()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        opened, a_RF, joined, wide = ctx.saved_tensors
        wide = _gate_wide(opened, a_RF, ctx.kind) if wide is None else wide
        width = a_RF.shape[1]
        both = grad @ joined
        grad_TF, grad_inner_TR = both[:, :width], both[:, width:]
        grad_a, grad_b = grad_inner_TR.t() @ wide[:, :width], grad.t() @ wide[:, width:]
        grad_opened = _gate_gradient(grad_TF, grad_inner_TR, a_RF, opened, ctx.kind)
        return grad_opened, grad_a, grad_b, None, None, None


def open_gate(opened: Tensor, a_RF: Tensor | None, kind: str, *, keep: bool = True) -> tuple[Tensor, Tensor]:
    """act(gate) * up of `opened` (T, 2F), (T, F), and its product with A^T, (T, R); without A, R is 0.

    keep: keep the gate's output for the backward pass; else it is made again there.
    """
    gated, inner_TR = _Gate.apply(opened, a_RF, kind, keep)
    return gated, inner_TR


def project_gated(
    opened: Tensor, a_RF: Tensor, b_OR: Tensor, joined: Tensor, kind: str, *, keep: bool = True
) -> Tensor:
    """gated W^T + (gated A^T) B^T, (T, O), in one product with `joined`, which is [W, B] and frozen: the gradient of B
    goes to `b_OR`, of which only that is used. keep: as in `open_gate`."""
    y = _GateJoined.apply(opened, a_RF, b_OR, joined, kind, keep)
    assert isinstance(y, Tensor)
    return y
