"""What training cost elsewhere: loss on general text before and after, and how far answers moved from the base.

The base is the same model with its adapters off, or the base's own weights after full fine-tuning.
K: target positions of one batch, D: width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.errors import DataError, JobError
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.types import Origin, TokenRow
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.eval.nll import (
    BUDGET_TOKENS,
    CHUNK_LOGITS,
    MIN_CHUNK_ROWS,
    plan_batches,
    score_rows,
    summarize_scores,
)
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch, make_batch
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


class Forgetting:
    """Forgetting of models with one base, whose own numbers are computed once.

    windows: general text (`read_general_text`).
    base:    the base's weights; None for adapters, whose base is the model with adapters off.
    """

    def __init__(self, windows: Sequence[TokenRow], *, base: CausalLM | None = None) -> None:
        self.windows, self.base = windows, base
        self._base_nll: float | None = None
        self._base_hidden: dict[tuple[int, ...], Tensor] = {}

    def measure(self, model: CausalLM, task_rows: Sequence[TokenRow]) -> dict[str, float]:
        """`general_nll`, `general_nll_base` (nats per token), `general_tokens` and `kl_from_base` (nats per token).

        task_rows: rows whose answer positions the divergence is averaged over; the first `MAX_KL_ROWS` are used.
        """
        result = {
            "general_nll": summarize_scores(score_rows(model, self.windows))["nll"],
            "general_nll_base": self._score_base(model),
            "general_tokens": float(sum(row.num_targets for row in self.windows)),
        }
        if task_rows:
            result["kl_from_base"] = self.measure_divergence(model, task_rows[:MAX_KL_ROWS])
        return result

    def _score_base(self, model: CausalLM) -> float:
        if self._base_nll is None:
            with as_base(model, self.base) as base:
                self._base_nll = summarize_scores(score_rows(base, self.windows))["nll"]
        return self._base_nll

    @torch.no_grad()
    def measure_divergence(self, model: CausalLM, rows: Sequence[TokenRow]) -> float:
        """KL(model || base) at the target positions of `rows`, exact over the vocabulary: nats, mean over positions.

        sum_v p(v) (log p(v) - log q(v)) with p the model's and q the base's next-token distribution, in fp32, added
        up in fp64. Raises ValueError if the rows have no target.
        """
        rows_per_chunk = max(MIN_CHUNK_ROWS, CHUNK_LOGITS // model.config.vocab_size)
        total, num_positions = 0.0, 0
        for numbers in plan_batches([len(row.ids) for row in rows], budget_tokens=BUDGET_TOKENS):
            batch = make_batch([rows[number] for number in numbers], device=model.device)
            hidden_KD = model.hidden(batch.ids_T, batch.layout, batch.sources_K)
            hidden_base_KD = self._run_base(model, batch)
            for hidden, hidden_base in zip(
                hidden_KD.split(rows_per_chunk), hidden_base_KD.split(rows_per_chunk), strict=True
            ):
                log_p = model.head(hidden).float().log_softmax(-1)
                with as_base(model, self.base) as base:
                    log_q = base.head(hidden_base).float().log_softmax(-1)
                total += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
            num_positions += batch.num_targets
        if not num_positions:
            raise ValueError("no target position to measure the divergence at")
        return total / num_positions

    def _run_base(self, model: CausalLM, batch: Batch) -> Tensor:
        """The base's hidden states at the batch's sources, (K, D): kept, as they are far smaller than its logits."""
        key = (*batch.layout.lengths, *batch.ids_T.tolist(), *batch.sources_K.tolist())
        if key not in self._base_hidden:
            with as_base(model, self.base) as base:
                self._base_hidden[key] = base.hidden(batch.ids_T, batch.layout, batch.sources_K)
        return self._base_hidden[key]
