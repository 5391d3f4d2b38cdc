"""A block cut at its attention into two functions of tensors: how a GPU trains it, compiled or not.

`make_heads` computes queries, keys and values, `finish` what follows attention; attention itself runs between them,
as it is. Both read tensors and plain numbers only, the same for every block of a kind: a compiler compiles them once
for all blocks, whatever documents lie in the stream. The block's own methods define them; tests hold them together.

T: tokens  I, O: inputs and outputs of a projection  R: ranks of its adapters together  H, N: query, key/value heads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.elementwise import gate_plain, norm_rms_plain, rotate_plain
from tunesmith.models.packed import PackedTensors, project_packed
from tunesmith.models.projection import LinearPlan, LinearTensors


class HeadsTensors(NamedTuple):
    """What `make_heads` reads of a block."""

    norm_in: Tensor
    norm_q: Tensor | None
    norm_k: Tensor | None
    qkv: LinearTensors


class FinishTensors(NamedTuple):
    """What `finish` reads of a block."""

    norm_out: Tensor | None
    norm_mlp: Tensor
    norm_down: Tensor | None
    out: LinearTensors
    gate_up: LinearTensors
    down: LinearTensors


class BlockPlan(NamedTuple):
    """The numbers both read: equal for blocks of a kind."""

    num_heads: int
    num_kv_heads: int
    eps: float
    offset: float
    gate: str
    qkv: LinearPlan
    out: LinearPlan
    gate_up: LinearPlan
    down: LinearPlan


class _JoinedLinear(torch.autograd.Function):
    """[x, inner] [W, B]^T in one product; backward likewise. The gradient of B flows through `b_OR`, of which only that
    is used. Nothing here works in place: torch 2.11 compiles such functions to wrong gradients."""

    @staticmethod
    def forward(ctx, x, inner_TR, joined, b_OR):
        ctx.save_for_backward(inner_TR, joined)
        ctx.split = x.shape[1]
        return torch.cat((x, inner_TR), 1) @ joined.t()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        inner_TR, joined = ctx.saved_tensors
        both = grad @ joined
        return both[:, : ctx.split], both[:, ctx.split :], None, grad.t() @ inner_TR


def project(x: Tensor, tensors: LinearTensors, plan: LinearPlan) -> Tensor:
    """x W^T + bias plus the adapters' outputs, (T, O)."""
    weight = tensors.weight
    if not plan.spans:
        if isinstance(weight, Tensor):
            return F.linear(x, weight, tensors.bias)
        y = _multiply(x, weight, plan)
        return y if tensors.bias is None else y + tensors.bias
    dropped = F.dropout(x, plan.dropout) if plan.dropout else x
    filler = [x.new_zeros(plan.filler, x.shape[1])] if plan.filler else []
    inner_TR = dropped @ torch.cat([*(a.to(x.dtype) for a in tensors.a), *filler]).t()
    b_OR = _lay_out_b(tensors, plan, x.dtype)
    y = (
        _JoinedLinear.apply(x, inner_TR, weight, b_OR)
        if plan.is_joined
        else _multiply(x, weight, plan) + inner_TR @ b_OR.t()
    )
    assert isinstance(y, Tensor)
    return y if tensors.bias is None else y + tensors.bias


def _multiply(x: Tensor, weight: Tensor | PackedTensors, plan: LinearPlan) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    assert plan.packed is not None
    return project_packed(x, weight, plan.packed)


def _lay_out_b(tensors: LinearTensors, plan: LinearPlan, dtype: torch.dtype) -> Tensor:
    """The adapters' scaled B on the diagonal of one matrix, (O, R), zero elsewhere."""
    pieces, at, column = [], 0, 0
    ranks = [b.shape[1] for b in tensors.b]
    width = sum(ranks) + plan.filler
    for (start, stop), scale, b, rank in zip(plan.spans, plan.scales, tensors.b, ranks, strict=True):
        if start > at:
            pieces.append(b.new_zeros(start - at, width))
        pieces.append(F.pad(b * scale, (column, width - column - rank)))
        at, column = stop, column + rank
    if plan.num_outputs > at:
        pieces.append(tensors.b[0].new_zeros(plan.num_outputs - at, width))
    return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(dtype)


def make_heads(
    x: Tensor, cos: Tensor, sin: Tensor, tensors: HeadsTensors, plan: BlockPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, d), rotated keys and values (T, N, d) of hidden states (T, D)."""
    qkv = project(norm_rms_plain(x, tensors.norm_in, plan.eps, plan.offset), tensors.qkv, plan.qkv)
    heads = qkv.unflatten(1, (plan.num_heads + 2 * plan.num_kv_heads, -1))
    q, k, v = heads.split((plan.num_heads, plan.num_kv_heads, plan.num_kv_heads), 1)
    if tensors.norm_q is not None and tensors.norm_k is not None:
        q = norm_rms_plain(q, tensors.norm_q, plan.eps, plan.offset)
        k = norm_rms_plain(k, tensors.norm_k, plan.eps, plan.offset)
    return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin), v


def finish(x: Tensor, attended: Tensor, tensors: FinishTensors, plan: BlockPlan) -> Tensor:
    """The block's output (T, D) from its input and the attention's output (T, H * d)."""
    added = project(attended, tensors.out, plan.out)
    if tensors.norm_out is not None:
        added = norm_rms_plain(added, tensors.norm_out, plan.eps, plan.offset)
    x = x + added
    opened = project(
        norm_rms_plain(x, tensors.norm_mlp, plan.eps, plan.offset), tensors.gate_up, plan.gate_up
    )
    added = project(gate_plain(opened, plan.gate), tensors.down, plan.down)
    if tensors.norm_down is not None:
        added = norm_rms_plain(added, tensors.norm_down, plan.eps, plan.offset)
    return x + added


def finish_kept(x: Tensor, attended: Tensor, tensors: FinishTensors, plan: BlockPlan) -> Tensor:
    """`finish` of the last block, over kept rows: a function of its own, so that it is compiled for its own shapes."""
    return finish(x, attended, tensors, plan)


def score_chunk(hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of hidden @ weight^T, and its gradient with respect to these logits (C, V), in the
    compute dtype. Softmax in fp32 (fp64 stays). A target of -1 counts for nothing."""
    logits = hidden_CD @ weight_VD.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_sum_C1 = torch.logsumexp(logits, -1, keepdim=True)
    picked = torch.arange(logits.shape[1], device=logits.device) == targets_C[:, None]
    kept_C1 = (targets_C >= 0)[:, None]
    loss = (log_sum_C1 * kept_C1).sum() - torch.where(picked, logits, 0).sum()
    grad = torch.where(picked, -1.0, 0.0) + torch.exp(logits - log_sum_C1) * kept_C1
    return loss, grad.to(hidden_CD.dtype)


class Segments:
    """The functions of a block and of the head, plain or compiled."""

    def __init__(self, *, compiled: bool) -> None:
        self.is_compiled = compiled
        wrap: Callable[[Any], Any] = _compile if compiled else lambda function: function
        self.make_heads = wrap(make_heads)
        self.finish = wrap(finish)
        self.finish_kept = wrap(finish_kept)
        self.score_chunk = wrap(score_chunk)


def _compile(function: Any) -> Any:
    import torch._inductor.config as inductor

    # Fusing chained norms gives wrong gradients on torch 2.10 and 2.11 (pytorch issue 193061).
    if hasattr(inductor, "triton") and hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    return torch.compile(function, fullgraph=True)
