"""Prompts of the arms: what is shown, in which order, and what happens when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.render import Renderer
from tunesmith.eval.prompting import add_shots, attach_answer, build_prompts, draw_shots, keep_last_stretch
from tunesmith.job.spec import EvaluateSpec


def make_chat(question: str, answer: str, *, index: int = 0) -> Conversation:
    turns = (Message("system", "Answer as JSON."), Message("user", question), Message("assistant", answer))
    return Conversation(turns, Origin(f"rows.jsonl:{index + 1}", "rows.jsonl", index))


TRAIN = [make_chat(f"question {word}", f"answer {word}", index=n) for n, word in enumerate("abcdefgh")]
TEST = [make_chat("question c please", "truth one"), make_chat("something about f", "truth two", index=1)]
ROOM = 10_000


def build(kind, renderer, *, test=TEST, train=TRAIN, room=ROOM, seed=0, **spec):
    prompts, warnings = build_prompts(
        kind, renderer, test, train=train, spec=EvaluateSpec(**spec), seed=seed, max_prompt_tokens=room
    )
    return [renderer.tokenizer.decode(prompt.ids) for prompt in prompts], prompts, warnings


def test_zero_shot_shows_the_row_without_its_answer(renderer: Renderer):
    texts, _, warnings = build("zero-shot", renderer)
    assert texts[0] == (
        "<|im_start|>system\nAnswer as JSON.<|im_end|>\n<|im_start|>user\nquestion c please<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert warnings == []


def test_few_shot_shows_the_same_examples_to_every_row_and_the_system_prompt_once(renderer: Renderer):
    texts, prompts, _ = build("few-shot", renderer, shots=3)
    for text, row in zip(texts, TEST, strict=True):
        assert text.count("Answer as JSON.") == 1
        assert text.count("<|im_start|>user") == 4
        assert text.endswith(f"user\n{row.messages[1].content}<|im_end|>\n<|im_start|>assistant\n")
    shared = [text.split("<|im_start|>user")[1:4] for text in texts]
    assert shared[0] == shared[1]
    assert [prompt.num_shots for prompt in prompts] == [3, 3]


def test_another_seed_draws_other_examples_and_the_same_seed_the_same(renderer: Renderer):
    first, again, other = (build("few-shot", renderer, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_prompt_holds_the_true_answer(renderer: Renderer):
    for kind in ("zero-shot", "few-shot", "rag"):
        for text, row in zip(build(kind, renderer)[0], TEST, strict=True):
            assert row.answer not in text


def test_retrieval_shows_the_most_similar_example_last(renderer: Renderer):
    texts, _, _ = build("rag", renderer, retrieved=2)
    assert texts[0].split("<|im_start|>user\n")[2].startswith("question c<|im_end|>")
    assert "answer f" in texts[1].split("<|im_start|>user\n")[2]


def test_passages_of_a_documents_folder_stand_above_the_question(renderer: Renderer, tmp_path: Path):
    (tmp_path / "a.md").write_text("Something about f is in this passage.")
    (tmp_path / "b.md").write_text("Another matter entirely.")
    texts, prompts, _ = build("rag", renderer, retrieved=1, documents=str(tmp_path))
    assert (
        "passages where they help.\n\n[1] Something about f is in this passage.\n\nsomething about f<|im_end|>"
        in texts[1]
    )
    assert prompts[1].num_shots == 1


def test_a_prompt_that_does_not_fit_holds_fewer_examples_and_this_is_said(renderer: Renderer):
    whole = len(build("few-shot", renderer, shots=4)[1][0].ids)
    _, prompts, warnings = build("few-shot", renderer, shots=4, room=whole - 1)
    assert prompts[0].num_shots == 3
    assert len(prompts[0].ids) <= whole - 1
    assert warnings[0].startswith("few-shot: 2 of 2 prompts hold fewer than 4 examples (3 to 3)")


def test_a_row_that_does_not_fit_alone_is_counted(renderer: Renderer):
    _, prompts, warnings = build("rag", renderer, room=10)
    assert [prompt.num_shots for prompt in prompts] == [0, 0]
    assert any("2 of 2 prompts leave too little context" in warning for warning in warnings)


def test_examples_carry_no_weight_and_bring_no_second_system_prompt():
    shown = add_shots(TEST[0], TRAIN[:2])
    assert [m.role for m in shown.messages] == ["system", *["user", "assistant"] * 3]
    assert [m.weight for m in shown.messages if m.role == "assistant"] == [0.0, 0.0, 1.0]


def test_raw_text_gets_its_examples_above_the_prompt():
    def raw(question: str, answer: str) -> Conversation:
        turns = (Message("user", question), Message("assistant", answer))
        return Conversation(turns, Origin("x:1", "x", 0), kind="completion")

    shown = add_shots(raw("2+2=", "4"), [raw("1+1=", "2"), raw("3+3=", "6")])
    assert shown.messages[0].content == "1+1=2\n\n3+3=6\n\n2+2="
    assert shown.answer == "4"


def test_fewer_training_rows_than_asked_for_are_all_shown_and_none_is_refused():
    assert len(draw_shots(TRAIN[:2], count=5, seed=0)) == 2
    with pytest.raises(ValueError, match="training rows"):
        draw_shots([], count=5, seed=0)


def test_an_answer_attached_to_a_longer_prompt_equals_rendering_the_longer_chat(renderer: Renderer):
    multi = Conversation(
        (
            Message("user", "first"),
            Message("assistant", "reply one"),
            Message("user", "second"),
            Message("assistant", "reply two"),
        ),
        Origin("m.jsonl:1", "m.jsonl", 0),
    )
    for conversation in (TEST[0], multi):
        longer = add_shots(conversation, TRAIN[:3])
        row = renderer.render_conversation(conversation)[0]
        attached = attach_answer(renderer.render_question(longer), row)
        whole = renderer.render_conversation(longer)[0]
        assert attached is not None
        assert list(attached.ids) == list(whole.ids)
        assert list(attached.mask) == list(whole.mask)
        assert attached.num_targets == row.num_targets


def test_an_answer_is_not_attached_to_a_prompt_that_lacks_its_earlier_turns(renderer: Renderer):
    multi = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    row = renderer.render_conversation(Conversation(tuple(multi), Origin("m:1", "m", 0)))[0]
    assert attach_answer(renderer.render_prompt([Message("user", "z")]), row) is None


def test_only_the_last_answer_is_kept_for_options(renderer: Renderer):
    multi = [
        Message("user", "a"),
        Message("assistant", "bb"),
        Message("user", "c"),
        Message("assistant", "dd"),
    ]
    row = keep_last_stretch(
        renderer.render_conversation(Conversation(tuple(multi), Origin("m:1", "m", 0)))[0]
    )
    assert (
        renderer.tokenizer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m]) == "dd<|im_end|>"
    )
