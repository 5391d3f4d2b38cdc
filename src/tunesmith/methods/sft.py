"""Supervised fine-tuning: negative log-likelihood of the target tokens.

The head runs over target rows only, a chunk at a time, and the gradient with respect to the hidden states is formed
in the forward pass: no (T, V) tensor is ever kept.

K: target tokens  C: tokens of a chunk  D: width  V: vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.methods.objective import LossSum
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import ROUND_TARGETS, Batch
from tunesmith.models.memory import count_chunk_rows

# Logits of a chunk in fp32 take at most this much memory: what a core's cache likes, what keeps a GPU busy.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}


def sft_loss(model: CausalLM, batch: Batch, *, chunk: int | None = None) -> LossSum:
    """Sum of -log p(target | what precedes it in its row), over all target tokens of the batch.

    chunk: target tokens per piece of the head; changes memory, never the result (up to rounding).
    """
    if batch.num_targets == 0:
        raise ValueError("a batch without target tokens has no loss")
    hidden_KD = model.hidden(batch.ids_T, batch.layout, round_up(batch.sources_K))
    rows = chunk or choose_chunk(model, hidden_KD.device)
    if model.has_plain_head and model.segments is not None:
        total = _SegmentHeadLoss.apply(
            hidden_KD, model.head_weight, batch.targets_K, rows, model.segments.score_chunk
        )
    elif model.has_plain_head:
        total = _HeadLoss.apply(hidden_KD, model.head_weight, batch.targets_K, rows)
    else:
        total = hidden_KD.new_zeros((), dtype=torch.float32)
        kept_KD = hidden_KD[: batch.num_targets]
        for hidden_CD, targets_C in zip(kept_KD.split(rows), batch.targets_K.split(rows), strict=True):
            total = total + checkpoint(_chunk_loss, model, hidden_CD, targets_C, use_reentrant=False)
    return LossSum(total, batch.num_targets)


def choose_chunk(model: CausalLM, device: torch.device) -> int:
    """Target tokens per piece of the head."""
    return count_chunk_rows(model.config.vocab_size, model.loss_chunk_bytes or CHUNK_BYTES[device.type])


def round_up(sources_K: Tensor) -> Tensor:
    """The positions, the first repeated at the end up to a round number; the loss leaves the repeats out.

    Kernels are compiled and kept per shape: of round shapes there are few, and each comes back.
    """
    missing = -len(sources_K) % ROUND_TARGETS
    return torch.cat((sources_K, sources_K[:1].expand(missing))) if missing else sources_K


def _chunk_loss(model: CausalLM, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    logits = model.head(hidden_CD)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets_C, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of hidden @ weight^T, softmax in fp32 (fp64 stays).

    Rows of `hidden_KD` beyond the targets are fillers: no loss, no gradient.
    """

    @staticmethod
    def forward(ctx, hidden_KD, weight_VD, targets_K, rows):
        wide = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden_KD.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_KD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        for start in range(0, hidden_KD.shape[0], rows):
            span = slice(start, start + rows)
            hidden_CD, picked = hidden_KD[span], targets_K[span, None]
            logits = (hidden_CD @ weight_VD.t()).to(wide)
            top_C1, picked_C1 = logits.amax(-1, keepdim=True), logits[: len(picked)].gather(1, picked)
            probs = torch.softmax(logits, -1)
            # log softmax = logit - largest logit + log(largest probability): no second pass of exponentials.
            log_top_C1 = probs.amax(-1, keepdim=True).log_()
            total -= (picked_C1 - top_C1[: len(picked)] + log_top_C1[: len(picked)]).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = probabilities - one_hot(target)
            probs[: len(picked)].scatter_add_(1, picked, probs.new_full((1, 1), -1.0).expand_as(picked))
            probs[len(picked) :] = 0
            grad_logits = probs.to(hidden_KD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *scale_gradients(ctx, grad), None, None


class _SegmentHeadLoss(torch.autograd.Function):
    """`_HeadLoss` through a function that a compiler may have: one kernel from logits to their gradient."""

    @staticmethod
    def forward(ctx, hidden_KD, weight_VD, targets_K, rows, score_chunk):
        wide = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden_KD.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_KD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        targets = F.pad(targets_K, (0, len(hidden_KD) - len(targets_K)), value=-1)
        for start in range(0, len(hidden_KD), rows):
            span = slice(start, start + rows)
            losses, grad_logits = score_chunk(hidden_KD[span], weight_VD, targets[span])
            total += losses.sum()
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden_KD[span]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *scale_gradients(ctx, grad), None, None, None


def scale_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden states and head that a forward pass has formed, times what comes from behind."""
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
        None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
    )
