# pyright: basic, reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""The gradient of rotated heads as one Triton kernel: read as attention leaves them, written as the projection wants
them. The definition is in rotated.py. The module can be imported without Triton; `available` is then False.

T: tokens  H, N: query, key/value heads  d: head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.models.gate_kernel import available, jit, tl

__all__ = ["available", "join_heads"]

_ROWS = 16


@jit
def _join_heads(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    out,
    num_rows,
    query_heads,
    heads,
    half,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One head of ROWS tokens. HALF: `half` rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    grad, token = grad_q + head * q_head, q_token
    if head >= query_heads:
        grad, token = grad_k + (head - query_heads) * k_head, k_token
    if head >= query_heads + heads:
        grad, token = grad_v + (head - query_heads - heads) * v_head, v_token
    lane = tl.arange(0, HALF)
    inside = (row < num_rows)[:, None] & (lane < half)[None, :]
    at = grad + row[:, None] * token + lane[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    # Values aren't rotated.
    turned = inside & (head < query_heads + heads)
    angle = row[:, None] * half + lane[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    at = out + (row[:, None] * (query_heads + 2 * heads) + head) * (2 * half) + lane[None, :]
    tl.store(at, (first * c + second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * c - first * s).to(out.dtype.element_ty), mask=inside)


def join_heads(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of rotated queries (T, H, d), rotated keys and values (T, N, d) -> that of all heads before rotation,
    (T, (H + 2N) d). cos, sin: (T, 1, d/2), contiguous; channels of a head lie side by side."""
    tokens, query_heads, width = grad_q.shape
    heads = grad_k.shape[1]
    out = grad_q.new_empty(tokens, (query_heads + 2 * heads) * width)
    grads = [grad if grad.stride(2) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    strides = [stride for grad in grads for stride in grad.stride()[:2]]
    half = width // 2
    with torch.cuda.device_of(out):
        _join_heads[(-(-tokens // _ROWS), query_heads + 2 * heads)](
            *grads, cos, sin, out, tokens, query_heads, heads, half, *strides,
            HALF=1 << (half - 1).bit_length(), ROWS=_ROWS,
        )  # fmt: skip
    return out
