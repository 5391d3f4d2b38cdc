"""Preference rows of every shape become pairs and labelled answers; bad ones end in one line with their place."""

import json
import re
from pathlib import Path

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.types import Message, Origin
from tunesmith.data.formats import RawRow, detect_format, parse_row, shape_of
from tunesmith.data.preferences import SHAPES, rows_of_shape, unpair

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
HUMAN = {"from": "human", "value": "2+2?"}
HH = "\n\nHuman: 2+2?\n\nAssistant: "


def parse(value, rows="pairs"):
    fmt = detect_format([value], rows=rows)
    return parse_row(RawRow(value, Origin("train.jsonl:17", "train.jsonl", 17)), fmt)


def said(messages):
    return [(message.role, message.content) for message in messages]


ASKED = [("user", "2+2?")]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("pairs", {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
        ("pairs", {"prompt": [USER], "chosen": FOUR, "rejected": FIVE}),
        ("pairs", {"prompt": [USER], "chosen": "4", "rejected": "5"}),
        ("pairs", {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]}),
        (
            "pairs",
            {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE], "messages": [USER, FOUR]},
        ),
        ("messages_pairs", {"messages": [USER], "chosen": FOUR, "rejected": FIVE}),
        ("messages_pairs", {"messages": [USER], "chosen": "4", "rejected": "5"}),
        (
            "sharegpt_pairs",
            {
                "conversations": [HUMAN],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
        ),
        (
            "alpaca_pairs",
            {"instruction": "2+2?", "input": "", "output": "no", "chosen": "4", "rejected": "5"},
        ),
        ("alpaca_pairs", {"question": "2+2?", "chosen": "4", "rejected": "5"}),
        ("conversation_pairs", {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
        ("hh_pairs", {"chosen": HH + "4", "rejected": HH + "5"}),
    ],
)
def test_a_pair_of_every_shape_is_one_prompt_with_two_answers(shape, row):
    assert shape_of(row, "pairs") == shape_of(row) == shape
    pair = parse(row)
    assert pair.kind == "chat"
    assert said(pair.prompt) == ASKED
    assert said(pair.messages) == [*ASKED, ("assistant", "4")]
    assert said(pair.rejected) == [*ASKED, ("assistant", "5")]
    assert [m.weight for m in pair.messages] == [m.weight for m in pair.rejected] == [0.0, 1.0]


def test_strings_with_a_prompt_are_raw_text():
    pair = parse({"prompt": "The cat", "chosen": " sat.", "rejected": " ran."})
    assert pair.kind == "completion"
    assert said(pair.messages) == [("user", "The cat"), ("assistant", " sat.")]
    assert said(pair.rejected) == [("user", "The cat"), ("assistant", " ran.")]


def test_only_what_differs_is_trained_and_earlier_answers_are_not():
    more = {"role": "user", "content": "and 3+3?"}
    six, seven = ({"role": "assistant", "content": text} for text in ("6", "7"))
    pair = parse({"chosen": [USER, FOUR, more, six], "rejected": [USER, FOUR, more, seven]})
    assert [m.weight for m in pair.messages] == [0.0, 0.0, 0.0, 1.0]
    assert said(pair.prompt) == [("user", "2+2?"), ("assistant", "4"), ("user", "and 3+3?")]
    assert len(pair.all_messages) == 5


def test_answers_of_several_turns_are_trained_whole():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    tool = {"role": "tool", "content": "4"}
    pair = parse(
        {"prompt": [USER], "chosen": [call, tool, FOUR], "rejected": FIVE, "tools": [{"name": "add"}]}
    )
    assert [m.weight for m in pair.messages if m.role == "assistant"] == [1.0, 1.0]
    assert len(pair.rejected) == 2
    assert pair.tools[0]["function"] == {"name": "add"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": FOUR, "rejected": FIVE},
        {"conversations": [HUMAN], "chosen": FOUR, "rejected": FIVE},
        {"instruction": "2+2?", "chosen": "4", "rejected": "5"},
        {"chosen": HH + "4", "rejected": HH + "5"},
    ],
)
def test_a_system_text_beside_the_turns_comes_first_on_both_sides(row):
    pair = parse({"system": "Be brief.", **row})
    for side in (pair.messages, pair.rejected):
        assert side[0] == Message("system", "Be brief.", 0.0)
        assert [m.role for m in side] == ["system", "user", "assistant"]


def test_text_of_human_and_assistant_keeps_blank_lines_within_a_turn():
    pair = parse({"chosen": HH + "4\n\nSure.", "rejected": HH + "5\n\nHuman: no\n\nAssistant: 4"})
    assert pair.messages[-1].content == "4\n\nSure."
    assert [m.role for m in pair.rejected] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("labelled", {"prompt": [USER], "completion": [FOUR]}),
        ("labelled", {"prompt": [USER], "completion": "4"}),
        ("labelled", {"prompt": "2+2?", "completion": FOUR}),
        ("messages_labelled", {"messages": [USER, FOUR]}),
        ("sharegpt_labelled", {"conversations": [HUMAN, {"from": "gpt", "value": "4"}]}),
        ("alpaca_labelled", {"instruction": "2+2?", "output": "4"}),
    ],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_labelled_row_of_every_shape_is_an_answer_and_its_label(shape, row, key):
    for label in (True, False):
        labelled = {**row, key: label}
        assert shape_of(labelled, "labelled") == shape_of(labelled) == shape
        conversation = parse(labelled, "labelled")
        assert said(conversation.messages) == [*ASKED, ("assistant", "4")]
        assert conversation.label is label
        assert not conversation.rejected


def test_only_the_last_answer_of_a_conversation_is_labelled():
    conversation = parse({"messages": [USER, FIVE, USER, FOUR], "label": True}, "labelled")
    assert [m.weight for m in conversation.messages] == [0.0, 0.0, 0.0, 1.0]


def test_a_labelled_completion_of_strings_is_raw_text():
    conversation = parse({"prompt": "The cat", "completion": " sat.", "label": False}, "labelled")
    assert (conversation.kind, conversation.label) == ("completion", False)


def test_a_pair_comes_apart_into_a_good_and_a_bad_answer():
    good, bad = unpair(parse({"prompt": [USER], "chosen": "4", "rejected": "5"}))
    assert (said(good.messages)[-1], good.label) == (("assistant", "4"), True)
    assert (said(bad.messages)[-1], bad.label) == (("assistant", "5"), False)
    assert not good.rejected
    assert not bad.rejected


def test_a_column_named_label_makes_no_preference_of_rows_whose_answers_are_learned():
    row = {"messages": [USER, FOUR]}
    assert shape_of({**row, "label": "arithmetic"}) == "messages"
    assert shape_of({**row, "chosen": True}) == "messages"
    assert shape_of({"text": "4", "label": True}) == "text"
    assert shape_of({**row, "label": "yes"}, "labelled") == "messages_labelled"
    assert shape_of({"prompt": "2+2?", "label": True}) is None
    assert shape_of({"prompt": "2+2?", "label": True}, "labelled") == "labelled"
    assert shape_of({"prompt": "2+2?", **row, "label": True}) == "messages_labelled"


def pair_of(chosen, rejected, **more):
    return {"prompt": [USER], "chosen": chosen, "rejected": rejected, **more}


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        (pair_of("4", "4"), "chosen and rejected are the same"),
        ({"prompt": "2+2", "chosen": " 4", "rejected": " 4"}, "chosen and rejected are the same"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "chosen and rejected are the same"),
        ({"prompt": "2+2?", "chosen": "4"}, "no 'rejected'"),
        (pair_of(None, "5"), "no 'chosen'"),
        (pair_of("", "5"), "chosen: the answer is empty"),
        (pair_of("4", " \n"), "rejected: the answer is empty"),
        (pair_of("4", [{**FIVE, "content": ""}]), "rejected: the answer in message 2 is empty"),
        (pair_of("4", 5), "rejected: a number"),
        (pair_of("4", []), "rejected: rejected is an empty list"),
        (pair_of("4", [{"content": "5"}]), "rejected: turn 1 has no from or no value"),
        ({"prompt": " ", "chosen": "4", "rejected": "5"}, "the prompt is empty"),
        ({"prompt": 2, "chosen": "4", "rejected": "5"}, "prompt is a number"),
        (
            {"prompt": "2+2", "chosen": "4", "rejected": "5", "system": "Be brief."},
            "system beside a prompt that is raw",
        ),
        (
            {"chosen": [USER, FOUR], "rejected": [{**USER, "content": "3+3?"}, FIVE]},
            "chosen and rejected share no user turn",
        ),
        (
            {"chosen": [USER, FOUR, USER, FOUR], "rejected": [USER, FOUR, {**USER, "content": "3+3?"}, FIVE]},
            "chosen and rejected differ first in message 3, which is from 'user'",
        ),
        (
            {"chosen": [USER, FOUR], "rejected": [USER, FOUR, USER, FIVE]},
            "chosen is only the beginning of the other",
        ),
        (
            {"prompt": "3+3?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
            "chosen: a conversation without the prompt's last turn",
        ),
        (pair_of([FOUR, USER], FIVE), "chosen: the last message is from 'user'"),
        (pair_of([FOUR, FOUR], FIVE), "chosen: message 3 is from 'assistant' after 'assistant'"),
        (
            pair_of([USER, FOUR], "5", prompt=[USER, FIVE, USER, USER]),
            "rejected: message 4 is from 'user' after 'user'",
        ),
        (pair_of("4", "5", prompt=[USER, FOUR]), "chosen: message 3 is from 'assistant' after 'assistant'"),
        (pair_of({**FOUR, "weight": 0}, FIVE), "chosen: message 2 has weight 0"),
        (pair_of("4", "5\0"), "contains a NUL character"),
        ({"chosen": "4", "rejected": "5"}, "chosen: the text does not begin with 'Human:'"),
        ({"chosen": HH + "4", "rejected": HH}, "rejected: the answer in message 2 is empty"),
    ],
)
def test_a_bad_pair_ends_in_one_line_with_its_place(row, finding):
    with pytest.raises(DataError) as caught:
        parse(row)
    assert str(caught.value).startswith(f"train.jsonl:17: {finding}")
    assert "--on-bad-row skip" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"prompt": "2+2?", "completion": "4", "label": "yes"}, "label is a string ('yes')"),
        ({"messages": [USER, FOUR], "label": 1.5}, "label is a number (1.5)"),
        ({"messages": [USER, FOUR], "label": 1}, "label is a number (1)"),
        ({"messages": [USER, FOUR], "label": None}, "label is null"),
        ({"conversations": [HUMAN], "kto_tag": True}, "the last message is from 'user'"),
        ({"messages": [USER, FOUR, FOUR], "label": True}, "message 3 is from 'assistant' after 'assistant'"),
        ({"prompt": "2+2?", "completion": "", "label": True}, "completion: the answer is empty"),
        ({"prompt": "2+2?", "completion": None, "label": True}, "no 'completion'"),
        ({"prompt": "2+2?", "label": True}, "no 'completion'"),
        ({"prompt": "2+2?", "completion": "4", "label": "y" * 99}, f"label is a string ('{'y' * 39});"),
    ],
)
def test_a_bad_labelled_row_ends_in_one_line_with_its_place(row, finding):
    with pytest.raises(DataError) as caught:
        parse(row, "labelled")
    assert str(caught.value).startswith(f"train.jsonl:17: {finding}")


def test_the_examples_in_the_documentation_are_what_they_say():
    page = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text()
    found = set()
    for line in page[page.index("## Preferences") :].splitlines():
        if line.startswith("| ") and (example := re.search(r"`(\{.*?\})`[;:, |]", line)):
            shape = line.split("|")[1].strip() or "pairs"
            row, rows = json.loads(example.group(1)), rows_of_shape(shape)
            assert shape_of(row, rows) == shape
            assert parse(row, rows).messages[-1].role == "assistant"
            found.add(shape)
    assert found == set(SHAPES)


def test_keys_of_no_preference_are_told_with_the_shapes_there_are():
    with pytest.raises(
        DataError, match=r"rows with keys better, worse; known shapes are pairs \(prompt, chosen"
    ):
        parse({"better": "4", "worse": "5"})


@pytest.mark.parametrize(
    ("name", "rows", "shape", "good", "bad"),
    [
        ("dpo_en_demo.json", "pairs", "sharegpt_pairs", 300, []),
        ("raschka_preference_1100.json", "pairs", "alpaca_pairs", 1094, ["chosen and rejected are the same"]),
        (
            "hh_harmless_test_a.jsonl",
            "pairs",
            "hh_pairs",
            1150,
            ["is empty; an answer has text", "is from 'assistant' after 'assistant'"],
        ),
        ("kto_en_demo.json", "labelled", "messages_labelled", 300, []),
    ],
)
def test_real_sets_are_read_and_their_bad_rows_named(shared, name, rows, shape, good, bad):
    text = (shared / "preference" / name).read_text()
    values = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    assert {shape_of(value, rows) for value in values} == {shape}
    errors = []
    for value in values:
        try:
            conversation = parse(value, rows)
        except DataError as error:
            errors.append(str(error))
            continue
        assert (conversation.label is None) == bool(conversation.rejected) == (rows == "pairs")
    assert len(errors) == len(values) - good
    assert all(any(reason in error for reason in bad) for error in errors)
