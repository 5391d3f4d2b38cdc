"""Multiple choice: worked by hand, and on real benchmark files with real small models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.eval.choice import ChoiceScore, read_choices, render_choices, score_choices
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.load import load_model


def ask(choices: object, answer_index: object, *, kind: str = "chat") -> Conversation:
    turns = (Message("user", "Which one?"), Message("assistant", "a"))
    extra = {"choices": choices, "answer_index": answer_index}
    return Conversation(turns, Origin("quiz.jsonl:3", "quiz.jsonl", 2), extra=extra, kind=kind)  # type: ignore[arg-type]


def test_the_sum_and_the_value_per_byte_may_prefer_different_options():
    score = ChoiceScore(total=[-4.0, -6.0], per_byte=[-4.0 / 1, -6.0 / 3])
    assert (score.likeliest, score.likeliest_per_byte) == (0, 1)


def test_an_option_is_scored_as_the_answer_after_the_prompt_without_the_end_token(
    renderer: Renderer, model: CausalLM
):
    rows = render_choices(renderer, ask(["yes", "no"], 0), ["yes", "no"])
    prompt = renderer.render_question(ask(["yes", "no"], 0))
    score = score_choices(model, [rows], end_ids=renderer.stop_ids)[0]
    for option, total, per_byte in zip(["yes", "no"], score.total, score.per_byte, strict=True):
        ids = prompt + renderer.tokenizer.encode(option)
        with torch.no_grad():
            layout_free = [model_logits(model, ids[:at])[ids[at]] for at in range(len(prompt), len(ids))]
        assert total == pytest.approx(sum(layout_free), rel=1e-5)
        assert per_byte == pytest.approx(total / len(option))


def model_logits(model: CausalLM, ids: list[int]) -> list[float]:
    """Log-probabilities of the next token, one document at a time."""
    from tunesmith.models.layout import make_layout

    hidden = model.hidden(torch.tensor(ids), make_layout([len(ids)]))
    return model.head(hidden)[-1].log_softmax(-1).tolist()


@pytest.mark.parametrize(
    ("choices", "index", "finding"),
    [
        ("abcd", 0, "not a list"),
        (["a"], 0, "two or more"),
        (["a", "a"], 0, "different"),
        (["a", 3], 0, "texts"),
        (["a", "b"], 2, "`answer_index` is 2"),
        (["a", "b"], "A", "`answer_index` is 'A'"),
        (["a", "b"], True, "`answer_index` is True"),
    ],
)
def test_options_that_cannot_be_scored_are_refused_by_place(choices: object, index: object, finding: str):
    with pytest.raises(DataError, match=rf"quiz\.jsonl:3: .*{finding}"):
        read_choices(ask(choices, index))


def test_a_row_without_options_has_none():
    assert read_choices(ask(None, None)) is None


def open_real(shared: Path) -> tuple[CausalLM, Renderer]:
    folder = shared / "models" / "tinystories-656k"
    return load_model(folder), Renderer(load_tokenizer(folder))


def test_a_real_model_tells_grammatical_sentences_from_wrong_ones_above_chance(shared: Path):
    model, renderer = open_real(shared)
    lines = (shared / "eval" / "blimp_6paradigms.jsonl").read_text().strip().split("\n")
    pairs = [json.loads(line) for line in lines[::10]]
    questions = []
    for number, pair in enumerate(pairs):
        sentence = Message("assistant", pair["sentence_good"])
        row = Conversation((sentence,), Origin(f"blimp:{number}", "blimp", number), kind="text")
        questions.append(render_choices(renderer, row, [pair["sentence_good"], pair["sentence_bad"]]))
    scores = score_choices(model, questions, end_ids=renderer.stop_ids)
    right = sum(score.likeliest == 0 for score in scores)
    # 600 pairs: chance is 300 with a standard deviation of 12.2; four of them above.
    assert right > 300 + 4 * math.sqrt(600 / 4)


def test_a_real_model_knows_nothing_of_mmlu_and_scores_about_chance(shared: Path):
    model, renderer = open_real(shared)
    lines = (shared / "eval" / "mmlu_val.jsonl").read_text().strip().split("\n")[::8]
    questions, truths = [], []
    for number, line in enumerate(lines):
        row = json.loads(line)
        turns = (Message("user", f"Question: {row['question']}\nAnswer: "), Message("assistant", "?"))
        asked = Conversation(turns, Origin(f"mmlu:{number}", "mmlu", number), kind="completion")
        rows = render_choices(renderer, asked, [str(choice) for choice in row["choices"]])
        if max(len(option.ids) for option in rows) <= 512:
            questions.append(rows)
            truths.append("ABCD".index(row["answer"]))
    scores = score_choices(model, questions, end_ids=renderer.stop_ids)
    right = sum(s.likeliest_per_byte == truth for s, truth in zip(scores, truths, strict=True))
    spread = math.sqrt(len(truths) * 0.25 * 0.75)
    assert abs(right - len(truths) / 4) < 4 * spread
