"""Multiple choice by likelihood: which of the given options does the model find likeliest after the prompt?

Two readings, both kept: the sum of log-likelihoods (what the model would say) and the same per byte of the option
(which does not favour short options). `choice_accuracy` is the second one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.render import Renderer
from tunesmith.eval.nll import score_rows
from tunesmith.eval.prompting import keep_last_stretch
from tunesmith.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """Log-likelihood of each option given the prompt, nats, the turn's end token left out; and per byte."""

    total: list[float]
    per_byte: list[float]

    @property
    def likeliest(self) -> int:
        """The option with the highest sum; of equals, the first."""
        return self.total.index(max(self.total))

    @property
    def likeliest_per_byte(self) -> int:
        return self.per_byte.index(max(self.per_byte))


def read_choices(conversation: Conversation) -> tuple[list[str], int] | None:
    """The options of a row and the index of the true one; None if the row has no `choices`.

    Raises DataError if they are not a list of at least two different texts with an index into it.
    """
    choices, index = conversation.extra.get("choices"), conversation.extra.get("answer_index")
    if choices is None:
        return None
    place = conversation.origin.place
    if (
        not isinstance(choices, list)
        or len(set(map(str, choices))) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise DataError(
            place, "`choices` is not a list of two or more different texts", cure="Repair the row"
        )
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise DataError(
            place,
            f"`answer_index` is {index!r}",
            rule=f"it counts from 0 to {len(choices) - 1}",
            cure="Repair the row",
        )
    return choices, index


def render_choices(renderer: Renderer, conversation: Conversation, choices: Sequence[str]) -> list[TokenRow]:
    """One row per option: the conversation with the option as its last answer, and only that answer scored."""
    rows: list[TokenRow] = []
    for choice in choices:
        answer = dataclasses.replace(conversation.messages[-1], content=choice, weight=1.0)
        option = dataclasses.replace(conversation, messages=(*conversation.messages[:-1], answer))
        row = keep_last_stretch(renderer.render_conversation(option)[-1])
        rows.append(dataclasses.replace(row, num_answer_bytes=len(choice.encode())))
    return rows


def score_choices(
    model: CausalLM,
    questions: Sequence[Sequence[TokenRow]],
    *,
    end_ids: Collection[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[ChoiceScore]:
    """Score the options of every question: one list of rows (`render_choices`) per question, same order."""
    flat = [row for options in questions for row in options]
    scores = iter(score_rows(model, flat, end_ids=end_ids, on_progress=on_progress))
    result: list[ChoiceScore] = []
    for options in questions:
        mine = [next(scores) for _ in options]
        total = [-score.nll_content for score in mine]
        result.append(
            ChoiceScore(total, [t / max(1, score.num_bytes) for t, score in zip(total, mine, strict=True)])
        )
    return result
