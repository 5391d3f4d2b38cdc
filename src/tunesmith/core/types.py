"""Types that cross layers. Nouns only; no behaviour beyond what keeps them consistent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ConversationKind = Literal["chat", "completion", "text"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: `place` is `train.jsonl:17` (line), `data.parquet:17` (row) or `org/name:train:17`."""

    place: str
    source: str
    index: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn out of the loss; `extra` carries template fields
    (`tool_calls`, `name`, `tool_call_id`, `reasoning_content`) through to the chat template untouched."""

    role: Role
    content: str
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Conversation:
    """One data row in the one shape that rendering knows.

    kind "chat":        rendered with the chat template; assistant turns of weight > 0 are trained.
    kind "completion":  two messages, user (the prompt) and assistant (the completion), joined as raw text
                        without a template; the completion and the EOS after it are trained.
    kind "text":        one assistant message; every token is trained.

    rejected: of a pair, where `messages` is the chosen conversation, the other one; both begin with the same prompt.
    label:    of a labelled row, whether its answer is good.
    columns:  of a prompt that the model answers itself, where `messages` ends with the question, the row's other
              columns.
    truth:    of such a prompt, the right answer, where there is one.
    """

    messages: tuple[Message, ...]
    origin: Origin
    kind: ConversationKind = "chat"
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    columns: Mapping[str, Any] | None = None
    truth: str | None = None

    @property
    def is_prompt(self) -> bool:
        return self.columns is not None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the answer is given to: all before the last turn, of a preference all before the first trained one."""
        if self.is_prompt:
            return self.messages
        if not self.rejected and self.label is None:
            return self.messages[:-1]
        first = next(n for n, m in enumerate(self.messages) if m.role == "assistant" and m.weight > 0)
        return self.messages[:first]

    @property
    def all_messages(self) -> tuple[Message, ...]:
        """Every turn, the prompt of a pair once."""
        return self.messages + self.rejected[len(self.prompt) :] if self.rejected else self.messages

    @property
    def answer(self) -> str:
        """Text of the last assistant turn: the truth when this row is a test row."""
        if self.is_prompt:
            return self.truth or ""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A rendered row: what every method, framework and judge gets.

    ids:   token ids, (T,).
    mask:  1 where the token is a *target* (its own prediction is trained or scored), else 0, (T,). mask[0] is 0.
    row_id: hash of (ids, mask); equal rows have equal ids.
    num_answer_bytes: UTF-8 bytes of the trained text, for bits per byte.
    numbers: what an objective knows of the row and no token tells: by name one number, or one for each target token.
    """

    ids: Sequence[int]
    mask: Sequence[int]
    origin: Origin
    row_id: str
    num_answer_bytes: int = 0
    numbers: Mapping[str, float | Sequence[float]] = field(default_factory=dict[str, Any])

    @property
    def num_targets(self) -> int:
        return sum(self.mask)


@dataclass(frozen=True)
class RowGroup:
    """Rows that a loss needs in one forward pass: of a pair, the chosen one and the rejected one.

    To whoever plans and counts it is one row, with the tokens of all.
    """

    rows: tuple[TokenRow, ...]

    @cached_property
    def ids(self) -> list[int]:
        return [token for row in self.rows for token in row.ids]

    @cached_property
    def mask(self) -> list[int]:
        return [target for row in self.rows for target in row.mask]

    @property
    def origin(self) -> Origin:
        return self.rows[0].origin

    @property
    def row_id(self) -> str:
        return "+".join(row.row_id for row in self.rows)


# What a step counts and a forward pass is planned by.
Example = TokenRow | RowGroup
