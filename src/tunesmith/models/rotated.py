"""Queries, keys and values out of one projection, the first two rotated, with a gradient that is written once.

A compiler left alone reads all three gradients for every channel that it writes. An operator that it passes by does
better: on a GPU rotate_kernel.py's kernel, anywhere else its own definition in plain torch.

T: tokens  H, N: query, key/value heads  d: head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.models import rotate_kernel
from tunesmith.models.elementwise import rotate_plain


@torch.library.custom_op("tunesmith::join_heads", mutates_args=())
def _join_heads(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of all heads before rotation, (T, (H + 2N) d)."""
    if rotate_kernel.available(grad_q):
        return rotate_kernel.join_heads(grad_q, grad_k, grad_v, cos.contiguous(), sin.contiguous())
    # The gradient of a rotation is the rotation back.
    turned = [rotate_plain(grad, cos, -sin) for grad in (grad_q, grad_k)]
    return torch.cat((*turned, grad_v), 1).flatten(1)


@_join_heads.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1]
    return grad_q.new_empty(grad_q.shape[0], heads * grad_q.shape[2])


class _SplitHeads(torch.autograd.Function):
    """See `split_heads`."""

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
        cos, sin = ctx.saved_tensors
        return _join_heads(grad_q, grad_k, grad_v, cos, sin), None, None, None, None


def split_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, d), rotated keys and values (T, N, d) of (T, (H + 2N) d). cos, sin: (T, 1, d/2), of whole
    heads."""
    q, k, v = _SplitHeads.apply(qkv, cos, sin, num_heads, num_kv_heads)
    return q, k, v
