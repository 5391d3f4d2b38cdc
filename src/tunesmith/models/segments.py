"""A block cut at its attention into two functions of tensors: how a GPU trains it, compiled or not.

`make_heads` computes queries, keys and values, `finish` what follows attention; attention itself runs between them,
as it is. Both read tensors and plain numbers only, the same for every block of a kind: a compiler compiles them once
for all blocks, whatever documents lie in the stream. The block's own methods define them; tests hold them together.

T: tokens  I, O: inputs and outputs of a projection  R: ranks of its adapters together  H, N: query, key/value heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.models import fused_kernels, score_kernel
from tunesmith.models.elementwise import gate_plain, norm_rms_plain, rotate_plain
from tunesmith.models.fused import open_gate, project_gated, project_joined, split_heads
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


class Projected(NamedTuple):
    """An output (T, O) whose adapters' share may be missing yet: y + inner B^T."""

    y: Tensor
    inner_TR: Tensor | None = None
    b_OR: Tensor | None = None

    def whole(self) -> Tensor:
        return (
            self.y if self.inner_TR is None or self.b_OR is None else self.y + self.inner_TR @ self.b_OR.t()
        )


def project(x: Tensor, tensors: LinearTensors, plan: LinearPlan) -> Projected:
    """x W^T + bias and the adapters' outputs. x: (T, I)."""
    weight = tensors.weight
    inner_TR = b_OR = None
    if plan.spans:
        a_RI, b_OR = _stack_a(tensors, plan, x), _lay_out_b(tensors, plan, x.dtype)
        if plan.is_joined and not plan.dropout:
            assert isinstance(weight, Tensor)
            return Projected(_add_bias(project_joined(x, a_RI, b_OR, weight), tensors))
        inner_TR = (F.dropout(x, plan.dropout) if plan.dropout else x) @ a_RI.t()
    if plan.is_joined:
        assert isinstance(weight, Tensor)
        weight = weight[:, : x.shape[1]]
    return Projected(_add_bias(_multiply(x, weight, plan), tensors), inner_TR, b_OR)


def project_opened(
    opened: Projected, tensors: LinearTensors, plan: LinearPlan, kind: str, *, keep: bool
) -> Tensor:
    """`project` of the output of the gate that `opened` opens, (T, O). keep: see fused.py."""
    if not plan.spans:
        gated, _ = open_gate(*opened, None, kind)
        return project(gated, tensors, plan).whole()
    a_RF, b_OR = _stack_a(tensors, plan, opened.y), _lay_out_b(tensors, plan, opened.y.dtype)
    if plan.is_joined:
        assert isinstance(tensors.weight, Tensor)
        return _add_bias(project_gated(opened.whole(), a_RF, b_OR, tensors.weight, kind, keep=keep), tensors)
    gated, inner_TR = open_gate(*opened, a_RF, kind, keep=keep)
    return _add_bias(_multiply(gated, tensors.weight, plan) + inner_TR @ b_OR.t(), tensors)


def _add_bias(y: Tensor, tensors: LinearTensors) -> Tensor:
    return y if tensors.bias is None else y + tensors.bias


def _uses_kernels(x: Tensor, plan: LinearPlan, *, keep: bool) -> bool:
    # A weight that is trained keeps the gate's output; only a compiler can make it again there.
    keeps_less = keep or bool(plan.spans) or torch.compiler.is_compiling()
    return fused_kernels.available(x) and not plan.dropout and keeps_less


def _multiply(x: Tensor, weight: Tensor | PackedTensors, plan: LinearPlan) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    assert plan.packed is not None
    return project_packed(x, weight, plan.packed)


def _stack_a(tensors: LinearTensors, plan: LinearPlan, like: Tensor) -> Tensor:
    """The adapters' A one below the other, (R, I), in the dtype of `like`."""
    inputs = tensors.a[0].shape[1]
    filler = [like.new_zeros(plan.filler, inputs)] if plan.filler else []
    return torch.cat([*(a.to(like.dtype) for a in tensors.a), *filler])


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


# How a segment makes what lies between two products: (function, *inputs), a context that gives the output. What is
# computed inside the context reads that output.
MakeElementwise = Callable[..., Any]


def make_and_keep(function: Callable[..., Tensor], *inputs: Tensor) -> Any:
    """Autograd keeps for the backward pass what it likes."""
    return nullcontext(function(*inputs))


@contextmanager
def make_again(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """Autograd keeps the inputs; the output, and what the function saves, is made again in the backward pass."""
    output = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(output, Tensor)
    place, shape = output.data_ptr(), output.shape  # the output itself must not outlive the context

    def again() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def pack(tensor: Tensor) -> Tensor | None:
        return None if (tensor.data_ptr(), tensor.shape) == (place, shape) else tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: again() if kept is None else kept):
        yield output


def make_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    tensors: HeadsTensors,
    plan: BlockPlan,
    make: MakeElementwise | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, d), rotated keys and values (T, N, d) of hidden states (T, D)."""
    make = make or make_and_keep
    norm = partial(norm_rms_plain, eps=plan.eps, offset=plan.offset)
    with make(norm, x, tensors.norm_in) as normed:
        qkv = project(normed, tensors.qkv, plan.qkv).whole()
    whole = 2 * cos.shape[-1] * (plan.num_heads + 2 * plan.num_kv_heads) == qkv.shape[1]
    if tensors.norm_q is None and whole and fused_kernels.available(qkv):
        return split_heads(qkv, cos, sin, plan.num_heads, plan.num_kv_heads)
    heads = qkv.unflatten(1, (plan.num_heads + 2 * plan.num_kv_heads, -1))
    q, k, v = heads.split((plan.num_heads, plan.num_kv_heads, plan.num_kv_heads), 1)
    if tensors.norm_q is not None and tensors.norm_k is not None:
        with make(norm, q, tensors.norm_q) as q, make(norm, k, tensors.norm_k) as k:
            pass
    # Values that were a window into all heads would keep all of them until the backward pass.
    return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin), v.contiguous()


def finish(
    x: Tensor,
    attended: Tensor,
    tensors: FinishTensors,
    plan: BlockPlan,
    make: MakeElementwise | None = None,
    *,
    keep: bool = True,
) -> Tensor:
    """The block's output (T, D) from its input and the attention's output (T, H * d). keep: the gate's output, too."""
    make = make or make_and_keep
    norm = partial(norm_rms_plain, eps=plan.eps, offset=plan.offset)
    added = project(attended, tensors.out, plan.out).whole()
    if tensors.norm_out is not None:
        with make(norm, added, tensors.norm_out) as added:
            pass
    x = x + added
    with make(norm, x, tensors.norm_mlp) as normed:
        opened = project(normed, tensors.gate_up, plan.gate_up)
    if _uses_kernels(x, plan.down, keep=keep):
        added = project_opened(opened, tensors.down, plan.down, plan.gate, keep=keep)
    else:
        with make(partial(gate_plain, kind=plan.gate), opened.whole()) as gated:
            added = project(gated, tensors.down, plan.down).whole()
    if tensors.norm_down is not None:
        with make(norm, added, tensors.norm_down) as added:
            pass
    return x + added


def finish_kept(x: Tensor, attended: Tensor, tensors: FinishTensors, plan: BlockPlan) -> Tensor:
    """`finish` of the last block, over kept rows: a function of its own, so that it is compiled for its own shapes."""
    return finish(x, attended, tensors, plan)


def score_chunk(hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token from hidden @ weight^T, (C,), and its gradient with respect to these logits (C, V),
    in the compute dtype. Softmax in fp32 (fp64 stays). A target of -1 counts for nothing."""
    logits = hidden_CD @ weight_VD.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_sum_C1 = torch.logsumexp(logits, -1, keepdim=True)
    picked = torch.arange(logits.shape[1], device=logits.device) == targets_C[:, None]
    kept_C1 = (targets_C >= 0)[:, None]
    losses_C = (log_sum_C1 * kept_C1).squeeze(1) - torch.where(picked, logits, 0).sum(-1)
    grad = torch.where(picked, -1.0, 0.0) + torch.exp(logits - log_sum_C1) * kept_C1
    return losses_C, grad.to(hidden_CD.dtype)


def score_chunk_in_place(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    *,
    otherwise: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`score_chunk` by a kernel that leaves the gradient where the logits were; `otherwise` where there is none."""
    if not score_kernel.available(hidden_CD):
        return otherwise(hidden_CD, weight_VD, targets_C)
    logits = hidden_CD @ weight_VD.t()
    return score_kernel.score_in_place(logits, targets_C), logits


# A compiler finds a function by its code: what it shall compile in another way is a function of its own.
def make_heads_again(
    x: Tensor, cos: Tensor, sin: Tensor, tensors: HeadsTensors, plan: BlockPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """`make_heads`, compiled to keep products only."""
    return make_heads(x, cos, sin, tensors, plan)


def finish_again(x: Tensor, attended: Tensor, tensors: FinishTensors, plan: BlockPlan) -> Tensor:
    """`finish`, compiled to keep products only."""
    return finish(x, attended, tensors, plan, keep=False)


def finish_kept_again(x: Tensor, attended: Tensor, tensors: FinishTensors, plan: BlockPlan) -> Tensor:
    """`finish_kept`, compiled to keep products only."""
    return finish(x, attended, tensors, plan, keep=False)


class BlockFunctions(NamedTuple):
    """The functions of a block that keep the same."""

    make_heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    finish: Callable[..., Tensor]
    finish_kept: Callable[..., Tensor]


class Segments:
    """The functions of a block and of the head, plain or compiled.

    keep:  for the backward pass everything is kept that it needs.
    cheap: products and attention are kept; norms and gates are computed again, with the same values.
    """

    def __init__(self, *, compiled: bool) -> None:
        self.is_compiled = compiled
        if compiled:
            self.keep = BlockFunctions(_compile(make_heads), _compile(finish), _compile(finish_kept))
            self.cheap = BlockFunctions(
                _compile_lean(make_heads_again), _compile_lean(finish_again), _compile_lean(finish_kept_again)
            )
        else:
            again = partial(finish, make=make_again, keep=False)
            self.keep = BlockFunctions(make_heads, finish, finish_kept)
            self.cheap = BlockFunctions(partial(make_heads, make=make_again), again, again)
        otherwise = _compile(score_chunk) if compiled else score_chunk
        self.score_chunk = partial(score_chunk_in_place, otherwise=otherwise)


def _compile_lean(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled so that what feeds a product is made again in the backward pass, which its kernels read anyway."""
    compiled = _compile(function)

    def call(*arguments: Any) -> Any:
        import torch._functorch.config as partitioning

        with partitioning.patch(ban_recompute_materialized_backward=False):
            return compiled(*arguments)

    return call


def _compile(function: Any) -> Any:
    import torch._inductor.config as inductor

    # Fusing chained norms gives wrong gradients on torch 2.10 and 2.11 (pytorch issue 193061).
    if hasattr(inductor, "triton") and hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    return torch.compile(function, fullgraph=True)
