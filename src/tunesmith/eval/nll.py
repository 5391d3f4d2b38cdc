"""Negative log-likelihood of true answers, row by row: sums in nats, divided once by whoever reports them.

Rows are packed by length without padding and no token sees another row, so the company a row is scored in never
changes its score. T: flat tokens of a batch, K: its target tokens, V: vocabulary, D: width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import ArmFailed
from tunesmith.core.types import TokenRow
from tunesmith.eval.shared_prefix import find_shared_prefix
from tunesmith.infer.generate import pick_greedy
from tunesmith.models.cache import Session, SharedPrefix
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import make_batch

BUDGET_TOKENS = 2048
"""Tokens of one forward pass. Never changes a score, only speed and memory."""
BEHIND_TOKENS = 1536
"""The same behind a shared prefix, where attention to the prefix is what memory and caches are spent on."""
CHUNK_LOGITS, MIN_CHUNK_ROWS = 2**22, 128
"""Logits held at a time, 16 MB in fp32; more where a large vocabulary would leave too few positions for a product."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """Likelihood of one row's targets.

    nll:         sum over target tokens, nats.
    nll_content: the same without the turn's end tokens.
    num_bytes:   UTF-8 bytes of the answer.
    """

    nll: float
    nll_content: float
    num_target_tokens: int
    num_content_tokens: int
    num_bytes: int


@torch.no_grad()
def score_rows(
    model: CausalLM,
    rows: Sequence[TokenRow],
    *,
    end_ids: Collection[int] = (),
    budget_tokens: int = BUDGET_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[RowScore]:
    """Score the target tokens of each row, in the order given.

    end_ids: tokens that end a turn; `nll_content` leaves them out.
    on_progress: called with (rows done, rows in all).
    Raises ArmFailed if a likelihood is not finite, naming the row.
    """
    scores: dict[int, RowScore] = {}
    prefix = find_shared_prefix(model, rows)
    cut, budget = 0 if prefix is None else prefix.length, min(budget_tokens, choose_budget(prefix))
    for batch in plan_batches([len(row.ids) - cut for row in rows], budget_tokens=budget):
        nll_K = score_tokens(model, [rows[number] for number in batch], prefix=prefix).tolist()
        start = 0
        for number in batch:
            row = rows[number]
            scores[number] = sum_row(row, nll_K[start : start + row.num_targets], end_ids)
            start += row.num_targets
        if on_progress:
            on_progress(len(scores), len(rows))
    return [scores[number] for number in range(len(rows))]


def choose_budget(prefix: SharedPrefix | None) -> int:
    return BUDGET_TOKENS if prefix is None else BEHIND_TOKENS


def plan_batches(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Row numbers of each forward pass: neighbours in length, at most `budget_tokens` together.

    A row above the budget gets a pass of its own.
    """
    batches: list[list[int]] = []
    used = 0
    for number in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or used + lengths[number] > budget_tokens:
            batches.append([])
            used = 0
        batches[-1].append(number)
        used += lengths[number]
    return batches


def score_tokens(model: CausalLM, rows: Sequence[TokenRow], *, prefix: SharedPrefix | None = None) -> Tensor:
    """NLL of every target token of the rows, in order: (K,), float64 on the CPU, nats.

    prefix: the beginning that all rows share, already run.
    """
    if prefix is None:
        batch = make_batch(rows, device=model.device)
        return compute_nll(model, model.hidden(batch.ids_T, batch.layout, batch.sources_K), batch.targets_K)
    assert isinstance(model, Decoder)
    batch = make_batch([cut_prefix(row, prefix.length) for row in rows], device=model.device)
    hidden_KD = Session(model, batch.split_ids(), prefix=prefix).prefill(batch.sources_K)
    return compute_nll(model, hidden_KD, batch.targets_K)


def cut_prefix(row: TokenRow, length: int) -> TokenRow:
    """The row without its first tokens."""
    return dataclasses.replace(row, ids=row.ids[length:], mask=row.mask[length:])


def compute_nll(model: CausalLM, hidden_KD: Tensor, ids_K: Tensor) -> Tensor:
    """-log p(id | hidden) for each position: (K,), float64 on the CPU, nats."""
    return read_logits(model, hidden_KD, ids_K)[0]


def read_logits(model: CausalLM, hidden_KD: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(id | hidden) in nats, float64, and the likeliest id of each position: (K,) each, on the CPU.

    Softmax in fp32 over chunks of positions, so that the logits of a large vocabulary never exist at once.
    """
    rows_per_chunk = max(MIN_CHUNK_ROWS, CHUNK_LOGITS // model.config.vocab_size)
    nll = [torch.zeros(0, dtype=torch.float64)]
    likeliest = [torch.zeros(0, dtype=torch.int64)]
    for hidden, ids in zip(hidden_KD.split(rows_per_chunk), ids_K.split(rows_per_chunk), strict=True):
        logits = model.head(hidden).float()
        nll.append((logits.logsumexp(-1) - logits.gather(-1, ids[:, None])[:, 0]).double().cpu())
        likeliest.append(pick_greedy(logits).cpu())
    return torch.cat(nll), torch.cat(likeliest)


def sum_row(row: TokenRow, nll_K: Sequence[float], end_ids: Collection[int]) -> RowScore:
    target_ids = [token for token, bit in zip(row.ids, row.mask, strict=True) if bit]
    content = [nll for token, nll in zip(target_ids, nll_K, strict=True) if token not in end_ids]
    total = math.fsum(nll_K)
    if not math.isfinite(total):
        raise ArmFailed(
            row.origin.place, "its likelihood is not finite", rule="a model gives every row a number"
        )
    return RowScore(total, math.fsum(content), len(target_ids), len(content), row.num_answer_bytes)


def add_scores(scores: Sequence[RowScore]) -> RowScore:
    """Rows of one conversation as one."""
    return RowScore(
        nll=sum(score.nll for score in scores),
        nll_content=sum(score.nll_content for score in scores),
        num_target_tokens=sum(score.num_target_tokens for score in scores),
        num_content_tokens=sum(score.num_content_tokens for score in scores),
        num_bytes=sum(score.num_bytes for score in scores),
    )


def summarize_scores(scores: Sequence[RowScore]) -> dict[str, float]:
    """Token-weighted means over rows: `nll`, `nll_content`, `perplexity` (= exp nll) and `bits_per_byte`.

    nll is sum of nats / sum of target tokens; bits_per_byte is sum of nats / (ln 2 * sum of answer bytes), the one
    figure that compares models with different tokenizers. A mean over nothing is left out.
    """
    nats, tokens = sum(s.nll for s in scores), sum(s.num_target_tokens for s in scores)
    content, content_tokens = sum(s.nll_content for s in scores), sum(s.num_content_tokens for s in scores)
    num_bytes = sum(s.num_bytes for s in scores)
    summary: dict[str, float] = {}
    if tokens:
        summary["nll"] = nats / tokens
        # exp overflows a float above 709 nats; a model that bad is said so by its nll.
        summary["perplexity"] = math.exp(min(nats / tokens, 700.0))
    if content_tokens:
        summary["nll_content"] = content / content_tokens
    if num_bytes:
        summary["bits_per_byte"] = nats / (math.log(2) * num_bytes)
    return summary
