"""Causal attention inside documents of a packed stream, grouped-query, with an optional sliding window.

`attend_plain` is the definition: each bucket through `F.scaled_dot_product_attention`. On an eager CPU run
`attend_folded` replaces it for short documents: the query heads of one key/value head are folded into rows, so scores
are two batched matrix products and one softmax; with bf16 that is 2.5 to 4 times faster up to 512 tokens. On a GPU
the variable-length flash kernel takes the whole stream in one call.

T: flat tokens  B: documents of a bucket  S: padded length  H: query heads  N: key/value heads  G: H / N  d: head width
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models.elementwise import rotate_, rotate_plain, runs_eager_cpu
from tunesmith.models.layout import Bucket, Layout

# Longest padded document that the folded path takes; beyond it the flash kernel's memory traffic wins.
FOLDED_MAX = {torch.bfloat16: 1024, torch.float16: 1024, torch.float32: 384}


@lru_cache(maxsize=64)
def make_mask(size: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a query may look, -inf elsewhere, (S, S). window counts the token itself; 0 is unlimited."""
    ahead = torch.arange(size)[None] - torch.arange(size)[:, None]
    hidden = ahead > 0
    if window:
        hidden |= ahead <= -window
    return torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)


def cap_scores(scores: Tensor, cap: float) -> Tensor:
    """cap * tanh(scores / cap); with cap 0, the scores."""
    return torch.tanh(scores / cap) * cap if cap else scores


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: Layout,
    *,
    num_kv_heads: int,
    scale: float,
    window: int,
    cap: float = 0.0,
) -> Tensor:
    """Rotate queries and keys, attend inside each document.

    qkv: (T, H + 2N, d), queries first, then keys, then values. cos, sin: (T, 1, d/2). Returns (T, H * d).
    """
    if runs_eager_cpu(qkv) and pad_fits(layout, qkv.dtype):
        return _FoldedAttention.apply(qkv, cos, sin, layout, num_kv_heads, scale, window, cap)
    heads = qkv.shape[1] - 2 * num_kv_heads
    turned = rotate_plain(qkv[:, : heads + num_kv_heads], cos, sin)
    q, k, v = turned[:, :heads], turned[:, heads:], qkv[:, heads + num_kv_heads :]
    return attend_rotated(q, k, v, layout, scale=scale, window=window, cap=cap)


def attend_rotated(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int, cap: float = 0.0
) -> Tensor:
    """Attention of queries (T, H, d) and keys that are rotated already. k, v: (T, N, d). Returns (T, H * d)."""
    # benchmarks/attention_choice.py measures which is fastest for what. The variable-length kernel has no softcap.
    if not takes_any_lengths(q.device, q.dtype, cap=cap):
        return attend_plain(q, k, v, layout, scale=scale, window=window, cap=cap)
    size = layout.max_length
    if layout.is_even and not 0 < window < size:
        return attend_even(q, k, v, size, scale=scale)
    return attend_varlen(q, k, v, layout, scale=scale, window=window)


def takes_any_lengths(device: torch.device, dtype: torch.dtype, *, cap: float) -> bool:
    """Whether there is a kernel that reads where documents begin from a tensor, and is the same for all lengths."""
    return not cap and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def attend_even(q: Tensor, k: Tensor, v: Tensor, size: int, *, scale: float) -> Tensor:
    """Attention where all documents have `size` tokens: a batch without padding, for which torch's choice of kernels
    is wider (on Hopper cuDNN's, half again as fast as the variable-length one)."""
    q, k, v = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def pad_fits(layout: Layout, dtype: torch.dtype) -> bool:
    return layout.buckets[-1].padded_length <= FOLDED_MAX[dtype]


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int, cap: float = 0.0
) -> Tensor:
    """Plain reference on any device. q: (T, H, d), already rotated; k, v: (T, N, d). Returns (T, H * d)."""
    pieces = []
    for bucket in layout.buckets:
        size = bucket.padded_length

        def pad(x: Tensor, bucket: Bucket = bucket, size: int = size) -> Tensor:
            return (
                x.index_select(0, bucket.gather_BS).unflatten(0, (bucket.num_documents, size)).transpose(1, 2)
            )

        mask = make_mask(size, window, q.dtype, q.device) if cap or 0 < window < size else None
        if mask is not None and cap:
            out = _attend_capped(pad(q), pad(k), pad(v), mask, scale, cap)
        else:
            out = F.scaled_dot_product_attention(
                pad(q), pad(k), pad(v), attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        pieces.append(out.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, bucket.inside_n))
    order_T = layout.order_T
    out = torch.cat(pieces)
    return out if order_T is None else out.index_select(0, order_T)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """q: (B, H, S, d), k and v: (B, N, S, d). Softmax in fp32 (fp64 stays). Returns (B, H, S, d)."""
    queries = q.unflatten(1, (k.shape[1], -1))
    scores = cap_scores(queries @ k[:, :, None].transpose(-1, -2) * scale, cap) + mask
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    probs = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    return (probs @ v[:, :, None]).flatten(1, 2)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int) -> Tensor:
    """Variable-length flash attention (CUDA, 16-bit). Arguments as `attend_plain`; documents share nothing."""
    assert not layout.shared
    longest = layout.max_length
    left = window - 1 if window else None
    out = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.cumulative_N1,
        layout.cumulative_N1,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=0 if window else None,
    )[0]
    return out.flatten(1)


def make_scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Masked scores of folded queries (B*N, M, d) and keys (B*N, S, d), (B*N, M, S)."""
    if cap:
        return cap_scores(torch.bmm(q, k.transpose(1, 2)) * scale, cap) + mask
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)


class _FoldedAttention(torch.autograd.Function):
    """Rotation and attention as one node, backward by hand. One gather brings the heads of all documents into padded
    blocks, one gather brings the results back (`Layout.fold`). Sums and softmax run in fp32 inside the kernels; scores
    and probabilities are stored in the compute dtype."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, layout, num_kv_heads, scale, window, cap):
        tokens, all_heads, width = qkv.shape
        groups = all_heads // num_kv_heads - 2
        whole, queries = layout.fold(num_kv_heads, groups)
        cos_Pd, sin_Pd = _tabulate(cos, sin, layout)
        blocks = qkv.reshape(-1, width).index_select(0, whole.into)
        mixed = blocks.new_empty(len(queries.into), width)
        all_probs = []
        for size, block in _split_blocks(blocks, layout, num_kv_heads, groups):
            rotate_(block.turned, cos_Pd[:size], sin_Pd[:size])
            mask = make_mask(size, window, qkv.dtype, qkv.device).repeat(groups, 1)
            scores = make_scores(block.q, block.k, mask, scale, cap)
            all_probs.append(torch.softmax(scores, -1))
            torch.bmm(all_probs[-1], block.v, out=mixed[block.queries].view_as(block.q))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(blocks, cos_Pd, sin_Pd, *all_probs)
        ctx.layout, ctx.num_kv_heads, ctx.scale, ctx.cap, ctx.shape = (
            layout,
            num_kv_heads,
            scale,
            cap,
            qkv.shape,
        )
        return mixed.index_select(0, queries.back).view(tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        blocks, cos_Pd, sin_Pd, *all_probs = ctx.saved_tensors
        groups = ctx.shape[1] // ctx.num_kv_heads - 2
        whole, queries = ctx.layout.fold(ctx.num_kv_heads, groups)
        # Foreign slots repeat a token of another place, so what flows into their outputs must be nothing.
        grad_mixed = grad.reshape(-1, ctx.shape[2]).index_select(0, queries.into)
        grad_mixed.index_fill_(0, queries.foreign, 0)
        grads = torch.empty_like(blocks)
        pairs = zip(
            _split_blocks(blocks, ctx.layout, ctx.num_kv_heads, groups),
            _split_blocks(grads, ctx.layout, ctx.num_kv_heads, groups),
            strict=True,
        )
        for ((size, block), (_, into)), probs in zip(pairs, all_probs, strict=True):
            grad_out = grad_mixed[block.queries].view_as(block.q)
            torch.bmm(probs.transpose(1, 2), grad_out, out=into.v)
            grad_probs = torch.bmm(grad_out, block.v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            if ctx.cap:
                # d cap * tanh(s / cap) / d s = 1 - tanh^2
                raw = torch.bmm(block.q, block.k.transpose(1, 2)).mul_(ctx.scale / ctx.cap)
                grad_scores = grad_scores * raw.tanh_().square_().neg_().add_(1)
            torch.bmm(grad_scores, block.k, out=into.q)
            torch.bmm(grad_scores.transpose(1, 2), block.q, out=into.k)
            rotate_(into.turned.mul_(ctx.scale), cos_Pd[:size], sin_Pd[:size], inverse=True)
        grad_qkv = grads.index_select(0, whole.back)
        for rows_m, blocks_cm in whole.copies:
            copies = grads.index_select(0, blocks_cm.flatten()).view(*blocks_cm.shape, -1)
            total = grad_qkv.index_select(0, rows_m) + copies.sum(0, dtype=torch.float32)
            grad_qkv.index_copy_(0, rows_m, total.to(grad_qkv.dtype))
        return grad_qkv.view(ctx.shape), *[None] * 7


class _Block(NamedTuple):
    """Views of one bucket's rows. q: (B*N, G*S, d); k, v: (B*N, S, d); turned: q and k as (B*N*(G+1), S, d);
    queries: where its queries lie among those of all buckets."""

    q: Tensor
    k: Tensor
    v: Tensor
    turned: Tensor
    queries: slice


def _split_blocks(blocks: Tensor, layout: Layout, kv: int, groups: int) -> Iterator[tuple[int, _Block]]:
    """(padded length, views) of each bucket in the folded rows of all, (R, d)."""
    at = 0
    for bucket in layout.buckets:
        size, pairs = bucket.padded_length, bucket.num_documents * kv
        rows = pairs * size
        chunk = blocks.narrow(0, at * (groups + 2), rows * (groups + 2))
        q, k, v = chunk.split((rows * groups, rows, rows))
        turned = chunk[: rows * (groups + 1)].view(-1, size, blocks.shape[1])
        yield (
            size,
            _Block(
                q.view(pairs, groups * size, -1),
                k.view(pairs, size, -1),
                v.view(pairs, size, -1),
                turned,
                slice(at * groups, (at + rows) * groups),
            ),
        )
        at += rows


def _tabulate(cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """cos and signed sin of positions 0 to the longest document's last, for whole heads: (P, d).

    x * cos + swap_halves(x) * sin is `rotate_plain(x)`. Rows past the document's end are for empty slots.
    """
    bucket = layout.buckets[-1]
    lengths = [layout.lengths[document] for document in bucket.documents]
    longest_P = bucket.gather_BS.view(bucket.num_documents, -1)[lengths.index(max(lengths))]
    cos_P, sin_P = cos[:, 0].index_select(0, longest_P), sin[:, 0].index_select(0, longest_P)
    return torch.cat((cos_P, cos_P), -1), torch.cat((-sin_P, sin_P), -1)


def fold_heads(turned: Tensor, bucket: Bucket, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B*N, G*S, d), k and v (B*N, S, d) of one bucket."""
    tokens, all_heads, width = turned.shape
    count, size, heads = bucket.num_documents, bucket.padded_length, all_heads - 2 * kv
    padded = turned.view(tokens, -1).index_select(0, bucket.gather_BS).view(count, size, all_heads, width)
    q = padded[:, :, :heads].unflatten(2, (kv, -1)).permute(0, 2, 3, 1, 4).reshape(count * kv, -1, width)
    k = padded[:, :, heads : heads + kv].transpose(1, 2).reshape(count * kv, size, width)
    v = padded[:, :, heads + kv :].transpose(1, 2).reshape(count * kv, size, width)
    return q, k, v


def unfold_heads(out: Tensor, bucket: Bucket, kv: int) -> Tensor:
    """(B*N, G*S, d) -> (B*S, H*d)."""
    count, size = bucket.num_documents, bucket.padded_length
    return out.view(count, kv, -1, size, out.shape[-1]).permute(0, 3, 1, 2, 4).reshape(count * size, -1)
