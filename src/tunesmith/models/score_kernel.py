# pyright: basic, reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""Cross-entropy and its gradient from logits by one Triton kernel, in their place: they are read twice, written once.

The definition is `segments.score_chunk`. The module can be imported without Triton, and without a GPU; `available` is
then False.

C: tokens of a chunk  V: vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Logits that a program holds at a time: four of them keep an H200's multiprocessor waiting for memory alone.
_BLOCK, _WARPS = 8192, 16


def available(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _score(logits, targets, losses, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One token. In fp32: the logarithm of the sum over a running maximum, then the softmax less the target's one."""
    row = tl.program_id(0).to(tl.int64)
    at, target = logits + row * stride, tl.load(targets + row)
    kept = target >= 0
    largest, total = float("-inf"), 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(at + column, mask=column < WIDTH, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher), 0)
        largest = higher
    log_sum = largest + tl.log(total)
    picked = tl.load(at + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(kept, log_sum - picked, 0.0))
    tl.debug_barrier()  # the target's logit is read before it is written over
    weight = tl.where(kept, 1.0, 0.0)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        value = tl.load(at + column, mask=inside, other=float("-inf")).to(tl.float32)
        grad = tl.exp(value - log_sum) * weight - tl.where(column == target, 1.0, 0.0)
        tl.store(at + column, grad.to(logits.dtype.element_ty), mask=inside)


def score_in_place(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, fp32 (C,), 0 where the target is -1. `logits_CV`, whose rows may lie apart,
    then hold their gradients."""
    losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
    with torch.cuda.device_of(logits_CV):
        _score[(len(logits_CV),)](
            logits_CV,
            targets_C,
            losses_C,
            logits_CV.stride(0),
            WIDTH=logits_CV.shape[1],
            BLOCK=min(_BLOCK, max(16, 1 << (logits_CV.shape[1] - 1).bit_length())),
            num_warps=_WARPS,
        )
    return losses_C
