"""Log-probabilities of target tokens that gradients can flow through, for losses that weigh whole answers.

What a token's log-probability weighs in such a loss is known only when its answer is summed up, so the backward pass
computes a chunk's logits again: one product of the head more than SFT's loss, and no (K, V) tensor is ever kept.

K: target tokens  C: tokens of a chunk  D: width  V: vocabulary  N: rows of a batch
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.methods.sft import choose_chunk, round_up
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch


def token_logps(
    model: CausalLM, batch: Batch, *, chunk: int | None = None, temperature: float = 1.0
) -> Tensor:
    """log p(target | what precedes it in its row) of every target token, (K,), nats, fp32 (fp64 of an fp64 model).

    chunk: target tokens per piece of the head; changes memory, never the result (up to rounding).
    temperature: logits are divided by it, as a sampler does.
    """
    return head_logps(model, source_states(model, batch), batch, chunk=chunk, temperature=temperature)


def source_states(model: CausalLM, batch: Batch) -> Tensor:
    """Hidden states that targets are predicted from, and fillers behind them, (K or more, D)."""
    if batch.num_targets == 0:
        raise ValueError("a batch without target tokens has no log-probabilities")
    return model.hidden(batch.ids_T, batch.layout, round_up(batch.sources_K))


def head_logps(
    model: CausalLM, hidden_KD: Tensor, batch: Batch, *, chunk: int | None = None, temperature: float = 1.0
) -> Tensor:
    """`token_logps` from hidden states that are there already."""
    rows = chunk or choose_chunk(model, hidden_KD.device)
    if model.has_plain_head:
        return _HeadLogps.apply(hidden_KD, model.head_weight, batch.targets_K, rows, 1 / temperature)
    kept_KD = hidden_KD[: batch.num_targets]
    chunks = zip(kept_KD.split(rows), batch.targets_K.split(rows), strict=True)
    return torch.cat(
        [checkpoint(_chunk_logps, model, *pair, 1 / temperature, use_reentrant=False) for pair in chunks]
    )


def sum_rows(values_K: Tensor, batch: Batch) -> Tensor:
    """Sums over the target tokens of each row, (N,)."""
    return values_K.new_zeros(batch.num_rows).index_add(0, batch.row_K, values_K)


def count_row_targets(batch: Batch) -> Tensor:
    """Target tokens of each row, (N,), fp32."""
    ones_K = torch.ones(batch.num_targets, device=batch.row_K.device)
    return sum_rows(ones_K, batch)


def _chunk_logps(model: CausalLM, hidden_CD: Tensor, targets_C: Tensor, factor: float) -> Tensor:
    logits = model.head(hidden_CD)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * factor
    return logits.gather(1, targets_C[:, None]).squeeze(1) - logits.logsumexp(-1)


class _HeadLogps(torch.autograd.Function):
    """log softmax(hidden @ weight^T)[target], softmax in fp32 (fp64 stays). Rows of `hidden_KD` beyond the targets are
    fillers without a result or a gradient."""

    @staticmethod
    def forward(ctx, hidden_KD, weight_VD, targets_K, rows, factor):
        wide = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        count = len(targets_K)
        logps_K = torch.empty(count, dtype=wide, device=hidden_KD.device)
        norms_K = torch.empty(count, dtype=wide, device=hidden_KD.device)
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            logits = (hidden_KD[span] @ weight_VD.t()).to(wide) * factor
            norms_K[span] = logits.logsumexp(-1)
            logps_K[span] = logits.gather(1, targets_K[span, None]).squeeze(1) - norms_K[span]
        ctx.save_for_backward(hidden_KD, weight_VD, targets_K, norms_K)
        ctx.rows, ctx.factor = rows, factor
        return logps_K

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_K):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_KD, weight_VD, targets_K, norms_K = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_KD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=norms_K.dtype) if needs_weight else None
        for start in range(0, len(targets_K), ctx.rows):
            span = slice(start, min(start + ctx.rows, len(targets_K)))
            hidden_CD, weights_C1 = hidden_KD[span], grad_K[span, None] * ctx.factor
            logits = (hidden_CD @ weight_VD.t()).to(norms_K.dtype) * ctx.factor
            # d log p / d logits = one_hot(target) - probabilities
            grad_logits = logits.sub_(norms_K[span, None]).exp_().mul_(-weights_C1)
            grad_logits.scatter_add_(1, targets_K[span, None], weights_C1)
            narrow = grad_logits.to(hidden_KD.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden_CD
        grad_weight = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None
