"""Sentences about numbers that should not be believed at first sight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.core.records import AnswerRecord
from tunesmith.eval.metrics import NOT_JSON, parse_answer

MAX_TRUNCATED = 0.01
MIN_PROSE_PERPLEXITY = 1.5
PROSE_WORDS = 8


def find_doubts(
    answers: Sequence[AnswerRecord], metrics: dict[str, float], *, vocab_size: int, max_new_tokens: int
) -> list[str]:
    """Warnings about an arm's likelihood and generated answers."""
    doubts: list[str] = []
    nll = metrics.get("nll")
    if nll is not None and nll > math.log(vocab_size):
        doubts.append(
            f"nll {nll:.2f} is above ln({vocab_size}) = {math.log(vocab_size):.2f}, worse than guessing each token: "
            "look for padding in the loss, a doubled BOS or the wrong template"
        )
    if nll is not None and math.exp(nll) < MIN_PROSE_PERPLEXITY and is_prose(answers):
        doubts.append(
            f"perplexity {math.exp(nll):.2f} on prose is hardly possible without the answers in the training rows: "
            "check the overlap of train and test, and what is counted as a target"
        )
    generated = [answer for answer in answers if answer.answer is not None]
    cut = sum(not answer.finished for answer in generated)
    if generated and cut / len(generated) > MAX_TRUNCATED:
        doubts.append(
            f"{cut} of {len(generated)} generated answers were cut at evaluate.max_new_tokens ({max_new_tokens}) "
            "or at the end of the context"
        )
    return doubts


def doubt_lengths(lengths: Sequence[int], *, max_positions: int) -> list[str]:
    """A warning if scored rows, of so many tokens, go beyond the model's context."""
    if not (long := sum(length > max_positions for length in lengths)):
        return []
    return [
        f"{long} of {len(lengths)} scored rows are longer than the model's context ({max_positions} tokens): what lies "
        "beyond it counts in nll, at places the model has not learned"
    ]


def is_prose(answers: Sequence[AnswerRecord]) -> bool:
    """Whether the true answers are running text: not JSON, and eight words or more on average."""
    if not answers or any(parse_answer(answer.truth) is not NOT_JSON for answer in answers):
        return False
    return sum(len(answer.truth.split()) for answer in answers) / len(answers) >= PROSE_WORDS
