"""What training cost elsewhere: loss on general text before and after, and how far answers moved from the base.

The base is the same model with its adapters off, or the base's own weights after full fine-tuning.
K: positions of one chunk, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tunesmith.core.errors import DataError, JobError
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.types import Origin, TokenRow
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.eval.nll import BUDGET_TOKENS, CHUNK_LOGITS, plan_batches, score_rows, summarize_scores
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import make_batch
from tunesmith.models.lora import set_enabled

WINDOW_TOKENS = 256
MAX_WINDOWS = 64
MAX_KL_ROWS = 100


def read_general_text(
    path: Path, tokenizer: Tokenizer, *, window_tokens: int = WINDOW_TOKENS, max_windows: int = MAX_WINDOWS
) -> list[TokenRow]:
    """Held-out general text (.txt, or .jsonl with `text`) as windows of fixed length, every token but the first scored.

    Each window begins with the BOS token where the tokenizer has one. Of a longer text the windows are taken evenly
    over its whole length, always the same ones. Raises JobError if the file is missing or too short for one window,
    DataError if it is not text.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode("\n\n".join(_read_texts(path)))
    body = window_tokens - len(start)
    windows = [ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    if not windows:
        raise JobError(
            str(path), f"holds {len(ids)} tokens", rule=f"one window is {body}", cure="Give a longer text"
        )
    count = min(max_windows, len(windows))
    chosen = [windows[number * len(windows) // count] for number in range(count)]
    return [
        TokenRow(
            ids=[*start, *window],
            mask=[0] + [1] * (len(start) + len(window) - 1),
            origin=Origin(f"{path.name}:window {number}", str(path), number),
            row_id="",
        )
        for number, window in enumerate(chosen)
    ]


def _read_texts(path: Path) -> list[str]:
    if path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8")]
        except OSError as error:
            raise JobError(str(path), error.strerror or str(error), cure="Check evaluate.general") from None
        except UnicodeDecodeError as error:
            raise DataError(
                str(path), f"byte {error.start} is not UTF-8", cure="Convert the file to UTF-8"
            ) from None
    texts: list[str] = []
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{path}:{number}", "no `text`", rule="general text has one text a row")
        texts.append(row["text"])
    return texts


@contextmanager
def as_base(model: CausalLM, base: CausalLM | None) -> Iterator[CausalLM]:
    """The base inside the block: `base` where given, else `model` with its adapters off."""
    if base is not None:
        yield base
        return
    set_enabled(model, False)
    try:
        yield model
    finally:
        set_enabled(model, True)


def measure_forgetting(
    model: CausalLM,
    *,
    windows: Sequence[TokenRow],
    task_rows: Sequence[TokenRow],
    base: CausalLM | None = None,
) -> dict[str, float]:
    """`general_nll`, `general_nll_base` (nats per token), `general_tokens` and `kl_from_base` (nats per token).

    windows:   general text (`read_general_text`).
    task_rows: rows whose answer positions the divergence is averaged over; the first `MAX_KL_ROWS` are used.
    base:      the base's weights; None for an adapter, whose base is the model with adapters off.
    """
    after = summarize_scores(score_rows(model, windows))
    with as_base(model, base) as origin:
        before = summarize_scores(score_rows(origin, windows))
    result = {
        "general_nll": after["nll"],
        "general_nll_base": before["nll"],
        "general_tokens": float(sum(row.num_targets for row in windows)),
    }
    if task_rows:
        result["kl_from_base"] = measure_divergence(model, task_rows[:MAX_KL_ROWS], base=base)
    return result


@torch.no_grad()
def measure_divergence(model: CausalLM, rows: Sequence[TokenRow], *, base: CausalLM | None = None) -> float:
    """KL(model || base) at the target positions of `rows`, exact over the vocabulary: nats, mean over positions.

    sum_v p(v) (log p(v) - log q(v)) with p the model's and q the base's next-token distribution, in fp32, added up
    in fp64. Raises ValueError if the rows have no target.
    """
    device = model.device
    rows_per_chunk = max(1, CHUNK_LOGITS // model.config.vocab_size // 2)
    total, num_positions = 0.0, 0
    for batch in plan_batches([len(row.ids) for row in rows], budget_tokens=BUDGET_TOKENS):
        made = make_batch([rows[number] for number in batch], device=device)
        hidden_KD = model.hidden(made.ids_T, made.layout, made.sources_K)
        with as_base(model, base) as origin:
            hidden_base_KD = origin.hidden(made.ids_T, made.layout, made.sources_K)
        for hidden, hidden_base in zip(
            hidden_KD.split(rows_per_chunk), hidden_base_KD.split(rows_per_chunk), strict=True
        ):
            log_p = model.head(hidden).float().log_softmax(-1)
            with as_base(model, base) as origin:
                log_q = origin.head(hidden_base).float().log_softmax(-1)
            total += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
        num_positions += made.num_targets
    if not num_positions:
        raise ValueError("no target position to measure the divergence at")
    return total / num_positions
