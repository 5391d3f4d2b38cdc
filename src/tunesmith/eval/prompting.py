"""What each arm reads before it answers: the row alone, the row after examples, or the row after what was retrieved.

Examples come from train only and are shown as earlier turns of the same chat, the system prompt once. A prompt that
would not fit the model's context holds fewer examples, and how many rows that met is said.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.render import Renderer
from tunesmith.eval.retrieval import Passage, Retriever, read_passages
from tunesmith.job.spec import EvaluateSpec

PromptingKind = Literal["zero-shot", "few-shot", "rag"]
PASSAGES_NOTE = "Use these passages where they help."


@dataclass(frozen=True, slots=True)
class Prompt:
    """One test row as an arm sees it.

    ids:          what the model reads before it answers.
    conversation: the row with its examples or passages, the true answer last.
    num_shots:    examples or passages shown.
    """

    ids: list[int]
    conversation: Conversation
    num_shots: int


def build_prompts(
    kind: PromptingKind,
    renderer: Renderer,
    test: Sequence[Conversation],
    *,
    train: Sequence[Conversation],
    spec: EvaluateSpec,
    seed: int,
    max_prompt_tokens: int,
) -> tuple[list[Prompt], list[str]]:
    """The prompt of every test row, and a warning for each thing that did not go as asked.

    seed: draws the examples of few-shot, the same for all rows; retrieval does not depend on it.
    max_prompt_tokens: above it, a prompt loses examples (few-shot: the last; rag: the least similar) until it fits.
    Raises ValueError if examples are asked for and `train` is empty.
    """
    if kind == "zero-shot":
        shown = [_Shown(conversation) for conversation in test]
    elif kind == "few-shot":
        shots = draw_shots(train, count=spec.shots, seed=seed)
        shown = [_Shown(conversation, shots=shots) for conversation in test]
    elif spec.documents is not None:
        shown = _retrieve_passages(test, folder=Path(spec.documents), count=spec.retrieved)
    else:
        shown = _retrieve_shots(test, train=train, count=spec.retrieved)
    prompts = [_fit_prompt(renderer, item, max_prompt_tokens=max_prompt_tokens) for item in shown]
    return prompts, _warn_about_fit(kind, prompts, shown, max_prompt_tokens=max_prompt_tokens)


def draw_shots(train: Sequence[Conversation], *, count: int, seed: int) -> list[Conversation]:
    """`count` different training rows, drawn with `seed`. Raises ValueError if there are none."""
    if not train:
        raise ValueError("examples need training rows")
    chosen = random.Random(seed).sample(range(len(train)), min(count, len(train)))
    return [train[position] for position in chosen]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A test row and what goes before it, in the order in which it is given up when there is no room."""

    conversation: Conversation
    shots: Sequence[Conversation] = ()
    passages: Sequence[Passage] = ()
    similar: bool = False

    @property
    def num_shots(self) -> int:
        return len(self.shots) + len(self.passages)

    def arrange(self, count: int) -> Conversation:
        """The row after its first `count` examples or passages; the most similar stands next to the question."""
        if self.passages:
            return add_passages(self.conversation, list(self.passages[:count])[::-1])
        shots = list(self.shots[:count])
        return add_shots(self.conversation, shots[::-1] if self.similar else shots)


def _retrieve_shots(
    test: Sequence[Conversation], *, train: Sequence[Conversation], count: int
) -> list[_Shown]:
    if not train:
        raise ValueError("retrieval needs training rows or evaluate.documents")
    index = Retriever([read_question(conversation) for conversation in train])
    return [
        _Shown(row, shots=[train[hit] for hit in index.find(read_question(row), count)], similar=True)
        for row in test
    ]


def _retrieve_passages(test: Sequence[Conversation], *, folder: Path, count: int) -> list[_Shown]:
    passages = read_passages(folder)
    index = Retriever([passage.text for passage in passages])
    return [
        _Shown(row, passages=[passages[hit] for hit in index.find(read_question(row), count)], similar=True)
        for row in test
    ]


def read_question(conversation: Conversation) -> str:
    """What the user says before the answer: never the answer itself."""
    return "\n".join(m.content for m in conversation.messages[:-1] if m.role == "user")


def add_shots(conversation: Conversation, shots: Sequence[Conversation]) -> Conversation:
    """The row with examples before it, which carry no weight in the loss.

    A chat gets them as earlier turns after its own system prompt; raw text gets them above its prompt, a blank line
    between two.
    """
    if not shots:
        return conversation
    if conversation.kind == "chat":
        system = tuple(m for m in conversation.messages[:1] if m.role == "system")
        earlier = tuple(
            dataclasses.replace(message, weight=0.0)
            for shot in shots
            for message in shot.messages
            if message.role != "system"
        )
        return dataclasses.replace(
            conversation, messages=system + earlier + conversation.messages[len(system) :]
        )
    texts = ["".join(message.content for message in shot.messages) for shot in shots]
    return _replace_question(conversation, "\n\n".join([*texts, conversation.messages[0].content]))


def add_passages(conversation: Conversation, passages: Sequence[Passage]) -> Conversation:
    """The row with passages above its last question, numbered, after one sentence that says what they are."""
    if not passages:
        return conversation
    numbered = [f"[{number}] {passage.text}" for number, passage in enumerate(passages, 1)]
    asked = [m for m in conversation.messages[:-1] if m.role == "user"]
    question = asked[-1].content if asked else ""
    return _replace_question(conversation, "\n\n".join([PASSAGES_NOTE, *numbered, question]))


def _replace_question(conversation: Conversation, text: str) -> Conversation:
    """The row with another text in its last user turn."""
    messages = list(conversation.messages)
    for position in range(len(messages) - 2, -1, -1):
        if messages[position].role == "user":
            messages[position] = dataclasses.replace(messages[position], content=text)
            return dataclasses.replace(conversation, messages=tuple(messages))
    raise ValueError(f"{conversation.origin.place}: no user turn before the answer")


def _fit_prompt(renderer: Renderer, shown: _Shown, *, max_prompt_tokens: int) -> Prompt:
    """The prompt with as many examples as fit; without any, it stays as long as the row itself is."""
    count = shown.num_shots
    while True:
        conversation = shown.arrange(count)
        ids = renderer.render_question(conversation)
        if len(ids) <= max_prompt_tokens or count == 0:
            return Prompt(ids, conversation, count)
        count -= 1


def _warn_about_fit(
    kind: str, prompts: Sequence[Prompt], shown: Sequence[_Shown], *, max_prompt_tokens: int
) -> list[str]:
    warnings: list[str] = []
    kept = [p.num_shots for p, s in zip(prompts, shown, strict=True) if p.num_shots < s.num_shots]
    asked = max((item.num_shots for item in shown), default=0)
    if kept:
        warnings.append(
            f"{kind}: {len(kept)} of {len(prompts)} prompts hold fewer than {asked} examples ({min(kept)} to "
            f"{max(kept)}), because no more fit {max_prompt_tokens} tokens of context beside the answer"
        )
    if long := sum(len(prompt.ids) > max_prompt_tokens for prompt in prompts):
        warnings.append(
            f"{kind}: {long} of {len(prompts)} prompts leave too little context for the answer "
            f"(above {max_prompt_tokens} tokens)"
        )
    return warnings


def attach_answer(prompt_ids: Sequence[int], row: TokenRow) -> TokenRow | None:
    """`row`'s targets after another prompt: the same answer tokens, scored under what this arm reads.

    The row before its last stretch of targets must be the end of the prompt as far back as it holds targets (earlier
    trained turns of the same chat); otherwise None, and the caller renders the longer chat as a whole.
    """
    start = find_last_stretch(row.mask)
    mask = [0] * len(prompt_ids)
    for back in range(1, 1 + start - _find_first(row.mask)):
        if back > len(prompt_ids) or prompt_ids[-back] != row.ids[start - back]:
            return None
        mask[-back] = row.mask[start - back]
    if not prompt_ids:
        return None
    return dataclasses.replace(row, ids=[*prompt_ids, *row.ids[start:]], mask=[*mask, *row.mask[start:]])


def keep_last_stretch(row: TokenRow) -> TokenRow:
    """The row with only its last unbroken run of targets scored: the last answer."""
    start = find_last_stretch(row.mask)
    return dataclasses.replace(row, mask=[0] * start + list(row.mask[start:]))


def _find_first(mask: Sequence[int]) -> int:
    return next((position for position, bit in enumerate(mask) if bit), len(mask))


def find_last_stretch(mask: Sequence[int]) -> int:
    """Where the last unbroken run of targets begins; the length if there is none."""
    end = next((position for position in range(len(mask) - 1, -1, -1) if mask[position]), len(mask))
    while end > 0 and end < len(mask) and mask[end - 1]:
        end -= 1
    return end
