"""Log-probabilities of target tokens that gradients can flow through, for losses that weigh whole answers.

No (K, V) tensor is ever kept: the head runs over a chunk of tokens at a time. A target of -1 only fills a batch up; its
log-probability is 0.

K: target tokens  C: tokens of a chunk  D: width  V: vocabulary  N: rows of a batch
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
        factor = 1 / temperature
        score = partial(score_tokens, factor=factor)
        if model.segments is not None:
            score = partial(_score_scaled, score=model.segments.score_chunk, factor=factor)
        return _HeadLogps.apply(hidden_KD, model.head_weight, batch.targets_K, rows, factor, score)
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
    return sum_rows((batch.targets_K >= 0).float(), batch)


def _score_scaled(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, *, score: Callable[..., Any], factor: float
) -> tuple[Tensor, Tensor]:
    return score(hidden_CD if factor == 1 else hidden_CD * factor, weight_VD, targets_C)


def _chunk_logps(model: CausalLM, hidden_CD: Tensor, targets_C: Tensor, factor: float) -> Tensor:
    logits = model.head(hidden_CD)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * factor
    logps_C = logits.gather(1, targets_C.clamp(min=0)[:, None]).squeeze(1) - logits.logsumexp(-1)
    return logps_C * (targets_C >= 0)


def score_tokens(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, *, factor: float
) -> tuple[Tensor, Tensor]:
    """`segments.score_chunk` of logits times `factor`, as a CPU is fast with it; gradients of fillers are no zeros."""
    logits = hidden_CD @ weight_VD.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if factor == 1 else logits.mul_(factor)
    kept_C1, picked_C1 = (targets_C >= 0)[:, None].to(logits.dtype), targets_C.clamp(min=0)[:, None]
    top_C1, own_C1 = logits.amax(-1, keepdim=True), logits.gather(1, picked_C1)
    probs = torch.softmax(logits, -1)
    # log softmax = logit - largest logit + log(largest probability): no second pass of exponentials.
    logps_C1 = own_C1 - top_C1 + probs.amax(-1, keepdim=True).log_()
    probs.scatter_add_(1, picked_C1, -kept_C1)
    return -(logps_C1 * kept_C1).squeeze(1), probs.to(hidden_CD.dtype)


class _HeadLogps(torch.autograd.Function):
    """log softmax(factor * hidden @ weight^T)[target], softmax in fp32 (fp64 stays), and 0 where the target is -1. Rows
    of `hidden_KD` beyond the targets are fillers without a result or a gradient.

    score: (hidden states, weight, targets) -> cross-entropies, and their gradients with respect to factor * logits.

    What a token's log-probability weighs comes with the backward pass. Of a frozen head nothing is summed over tokens,
    so each row's gradient is formed for a weight of 1 while its logits are there, and only scaled then. A trained
    head's is a sum of weighted rows: its logits are computed again.
    """

    @staticmethod
    def forward(ctx, hidden_KD, weight_VD, targets_K, rows, factor, score):
        wide = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        logps_K = torch.empty(len(targets_K), dtype=wide, device=hidden_KD.device)
        pull_KD = torch.zeros_like(hidden_KD) if needs_hidden and not needs_weight else None
        for start in range(0, len(targets_K), rows):
            span = slice(start, min(start + rows, len(targets_K)))
            losses_C, grad_logits = score(hidden_KD[span], weight_VD, targets_K[span])
            logps_K[span] = -losses_C
            if pull_KD is not None:
                torch.mm(grad_logits, weight_VD, out=pull_KD[span])
        ctx.save_for_backward(targets_K, *((hidden_KD, weight_VD) if pull_KD is None else (pull_KD,)))
        ctx.rows, ctx.factor, ctx.score = rows, factor, score
        return logps_K

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_K):  # pyright: ignore[reportIncompatibleMethodOverride]
        targets_K, *others = ctx.saved_tensors
        weights_K1 = (grad_K * (targets_K >= 0) * -ctx.factor)[:, None]
        if len(others) == 1:
            [pull_KD] = others
            rest = len(pull_KD) - len(targets_K)
            return (pull_KD * F.pad(weights_K1, (0, 0, 0, rest))).to(pull_KD.dtype), *[None] * 5
        hidden_KD, weight_VD = others
        grad_hidden = torch.zeros_like(hidden_KD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=grad_K.dtype)
        for start in range(0, len(targets_K), ctx.rows):
            span = slice(start, min(start + ctx.rows, len(targets_K)))
            _, grad_logits = ctx.score(hidden_KD[span], weight_VD, targets_K[span])
            weighted = (grad_logits * weights_K1[span]).to(hidden_KD.dtype)
            if grad_hidden is not None:
                torch.mm(weighted, weight_VD, out=grad_hidden[span])
            grad_weight += weighted.t() @ hidden_KD[span]
        return grad_hidden, grad_weight.to(weight_VD.dtype), *[None] * 4
