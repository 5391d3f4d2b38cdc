"""What lies between a block's products, put together so that every value is read and written once.

A compiler left alone makes a gate's gradient read its inputs once for each of its halves, a rotation's gradient all
three of its inputs for every channel, copies x to lay x A beside it, and adds the adapters' share of an output or a
gradient in a pass of its own, or in a product that copies first. The operators here it passes by: on a GPU they are
fused_kernels.py's, anywhere else their own definition in plain torch.

T: tokens  I, O: inputs and outputs of a projection  F: feed-forward width  H, N: query, key/value heads  d: head width
R: ranks of a projection's adapters together, filled up  S: those of the projection that opens the gate
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.models import fused_kernels
from tunesmith.models.elementwise import gate_gradient_plain, gate_plain, rotate_plain
from tunesmith.models.operators import operator

# --- operators --------------------------------------------------------------------------------------------------------


def _fold_inner_like(both: Tensor, a_RI: Tensor) -> Tensor:
    return both.new_empty(both.shape[0], a_RI.shape[1])


@operator(_fold_inner_like)
def _fold_inner(both: Tensor, a_RI: Tensor) -> Tensor:
    """(T, I + R) -> the first I columns plus the last R times A, (T, I)."""
    width = a_RI.shape[1]
    if fused_kernels.available(both, a_RI.shape[0]):
        return fused_kernels.add_product(both, both[:, width:], a_RI)
    return both[:, :width] + both[:, width:] @ a_RI


def _gate_wide_like(opened: Tensor, a_RF: Tensor, *_: Any) -> Tensor:
    return opened.new_empty(opened.shape[0], a_RF.shape[0] + a_RF.shape[1])


@operator(_gate_wide_like)
def _gate_wide(opened: Tensor, a_RF: Tensor, kind: str) -> Tensor:
    """[gated, gated A^T], (T, F + R), where gated is act(gate) * up of `opened`, (T, 2F)."""
    ranks, width = a_RF.shape
    wide = opened.new_empty(opened.shape[0], width + ranks)
    if fused_kernels.available(opened):
        fused_kernels.gate_into(wide[:, :width], opened, None, None, kind)
    else:
        wide[:, :width] = gate_plain(opened, kind)
    torch.mm(wide[:, :width], a_RF.t(), out=wide[:, width:])
    return wide


def _gate_adapted_like(opened: Tensor, *_: Any) -> Tensor:
    return opened.new_empty(opened.shape[0], opened.shape[1] // 2)


@operator(_gate_adapted_like)
def _gate_adapted(opened: Tensor, inner_TS: Tensor, b_S: Tensor, kind: str) -> Tensor:
    """act(gate) * up of opened + inner B^T, (T, F)."""
    if not fused_kernels.available(opened, inner_TS.shape[1]):
        return gate_plain(opened + inner_TS @ b_S.t(), kind)
    gated = opened.new_empty(opened.shape[0], opened.shape[1] // 2)
    fused_kernels.gate_into(gated, opened, inner_TS, b_S, kind)
    return gated


def _gate_gradient_like(grad: Tensor, grad_inner: Any, a: Any, opened: Tensor, *_: Any) -> Tensor:
    return opened.new_empty(opened.shape)


@operator(_gate_gradient_like)
def _gate_gradient(
    grad: Tensor,
    grad_inner_TR: Tensor | None,
    a_RF: Tensor | None,
    opened: Tensor,
    inner_TS: Tensor | None,
    b_S: Tensor | None,
    kind: str,
) -> Tensor:
    """Gradient of opened + inner B^T, (T, 2F), from that of the gate's output, grad + grad_inner A.

    grad: (T, F); with A and without grad_inner (T, F + R), which holds it.
    """
    width = opened.shape[1] // 2
    if a_RF is not None and grad_inner_TR is None:
        grad, grad_inner_TR = grad[:, :width], grad[:, width:]
    ranks = max(0 if a_RF is None else a_RF.shape[0], 0 if inner_TS is None else inner_TS.shape[1])
    if fused_kernels.available(opened, ranks):
        return fused_kernels.gate_gradient(grad, grad_inner_TR, a_RF, opened, inner_TS, b_S, kind)
    if a_RF is not None and grad_inner_TR is not None:
        grad = grad + grad_inner_TR @ a_RF
    if inner_TS is not None and b_S is not None:
        opened = opened + inner_TS @ b_S.t()
    return gate_gradient_plain(grad, opened, kind)


def _join_heads_like(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *_: Any) -> Tensor:
    heads = grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1]
    return grad_q.new_empty(grad_q.shape[0], heads * grad_q.shape[2])


@operator(_join_heads_like)
def _join_heads(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of all heads before rotation, (T, (H + 2N) d)."""
    if fused_kernels.available(grad_q):
        return fused_kernels.join_heads(grad_q, grad_k, grad_v, cos.contiguous(), sin.contiguous())
    # The gradient of a rotation is the rotation back.
    turned = [rotate_plain(grad, cos, -sin) for grad in (grad_q, grad_k)]
    return torch.cat((*turned, grad_v), 1).flatten(1)


# --- differentiable ---------------------------------------------------------------------------------------------------
# Nothing below works in place: torch 2.11 compiles such functions to wrong gradients.


class _ProjectJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a_RI, b_OR, joined):
        inner_TR = x @ a_RI.t()
        ctx.save_for_backward(x, inner_TR, a_RI, joined)
        return torch.cat((x, inner_TR), 1) @ joined.t()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inner_TR, a_RI, joined = ctx.saved_tensors
        both = grad @ joined
        grad_a = both[:, x.shape[1] :].t() @ x
        return _fold_inner(both, a_RI), grad_a, grad.t() @ inner_TR, None


def project_joined(x: Tensor, a_RI: Tensor, b_OR: Tensor, joined: Tensor) -> Tensor:
    """x W^T + (x A^T) B^T, (T, O), in one product with `joined`, which is [W, B] and frozen: the gradient of B goes to
    `b_OR`, of which only that is used."""
    y = _ProjectJoined.apply(x, a_RI, b_OR, joined)
    assert isinstance(y, Tensor)
    return y


class _GateJoined(torch.autograd.Function):
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
        grad_a, grad_b = both[:, width:].t() @ wide[:, :width], grad.t() @ wide[:, width:]
        grad_opened = _gate_gradient(both, None, a_RF, opened, None, None, ctx.kind)
        return grad_opened, grad_a, grad_b, None, None, None


def project_gated(
    opened: Tensor, a_RF: Tensor, b_OR: Tensor, joined: Tensor, kind: str, *, keep: bool = True
) -> Tensor:
    """`project_joined` of act(gate) * up of `opened`, (T, 2F).

    keep: keep the gate's output for the backward pass; else it is made again there.
    """
    y = _GateJoined.apply(opened, a_RF, b_OR, joined, kind, keep)
    assert isinstance(y, Tensor)
    return y


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, opened, inner_TS, b_S, a_RF, kind, keep):
        gated = _open(opened, inner_TS, b_S, kind)
        inner_TR = opened.new_empty(opened.shape[0], 0) if a_RF is None else gated @ a_RF.t()
        kept = gated if keep and a_RF is not None else None
        ctx.save_for_backward(opened, inner_TS, b_S, a_RF, kept)
        ctx.kind = kind
        return gated, inner_TR

    @staticmethod
    def backward(ctx, grad_TF, grad_inner_TR):  # pyright: ignore[reportIncompatibleMethodOverride]
        opened, inner_TS, b_S, a_RF, gated = ctx.saved_tensors
        grad_a = grad_inner = grad_b = None
        if a_RF is not None:
            gated = _open(opened, inner_TS, b_S, ctx.kind) if gated is None else gated
            grad_a = grad_inner_TR.t() @ gated
        grad_opened = _gate_gradient(
            grad_TF, None if a_RF is None else grad_inner_TR, a_RF, opened, inner_TS, b_S, ctx.kind
        )
        if inner_TS is not None:
            grad_inner, grad_b = grad_opened @ b_S, grad_opened.t() @ inner_TS
        return grad_opened, grad_inner, grad_b, grad_a, None, None


def _open(opened: Tensor, inner_TS: Tensor | None, b_S: Tensor | None, kind: str) -> Tensor:
    # Alone it is left to the compiler, which puts it together with what reads it.
    if inner_TS is None or b_S is None:
        return gate_plain(opened, kind)
    return _gate_adapted(opened, inner_TS, b_S, kind)


def open_gate(
    opened: Tensor,
    inner_TS: Tensor | None,
    b_S: Tensor | None,
    a_RF: Tensor | None,
    kind: str,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """act(gate) * up of opened + inner B^T, (T, F), and its product with A^T, (T, R); without A, R is 0.

    opened: (T, 2F). b_S: (2F, S). keep: as in `project_gated`.
    """
    gated, inner_TR = _Gate.apply(opened, inner_TS, b_S, a_RF, kind, keep)
    return gated, inner_TR


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads, num_kv_heads):
        ctx.save_for_backward(cos, sin)
        heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
        # Values that were a window into all heads would keep all of them until the backward pass.
        return (
            rotate_plain(q, cos, sin),
            rotate_plain(k, cos, sin),
            v.clone(memory_format=torch.contiguous_format),
        )

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _join_heads(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None, None, None


def split_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, d), rotated keys and values (T, N, d) of (T, (H + 2N) d). cos, sin: (T, 1, d/2), of whole
    heads."""
    q, k, v = _SplitHeads.apply(qkv, cos, sin, num_heads, num_kv_heads)
    return q, k, v
