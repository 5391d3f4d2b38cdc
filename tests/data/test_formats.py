"""Rows of every shape become conversations; bad rows end in one line with their place."""

import json

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.types import Origin
from tunesmith.data.formats import RawRow, detect_format, parse_row

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def parse(value, fmt=None):
    return parse_row(
        RawRow(value, Origin("train.jsonl:17", "train.jsonl", 17)), fmt or detect_format([value])
    )


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def test_messages_keep_roles_weights_and_tools():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": [tool]}
    conversation = parse(row)
    assert turns(conversation) == [("user", "2+2?"), ("assistant", "4")] * 2
    assert [m.weight for m in conversation.messages] == [1.0, 0.0, 1.0, 1.0]
    assert conversation.tools == (tool,)


def test_text_parts_are_joined():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            ANSWER,
        ]
    }
    assert turns(parse(row))[0] == ("user", "2+2?")


def test_tool_call_arguments_become_objects_and_null_content_stays_null():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    message = parse(row).messages[1]
    assert message.content == ""
    assert message.extra["content"] is None
    assert message.extra["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_alpaca_puts_the_input_after_a_blank_line():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}
    assert turns(parse(row)) == [("system", "Be brief."), ("user", "Add.\n\n2 and 2"), ("assistant", "4")]


def test_alpaca_reads_the_names_of_dolly():
    row = {"instruction": "Add.", "context": "", "response": "4"}
    assert turns(parse(row)) == [("user", "Add."), ("assistant", "4")]


def test_sharegpt_names_become_roles():
    row = {
        "conversations": [
            {"from": "human", "value": "add 1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    conversation = parse(row)
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].extra["tool_calls"][0]["function"]["name"] == "add"
    assert conversation.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def test_prompt_and_completion_strings_are_raw_text():
    conversation = parse({"prompt": "The cat", "completion": " sat."})
    assert conversation.kind == "completion"
    assert turns(conversation) == [("user", "The cat"), ("assistant", " sat.")]


def test_prompt_and_completion_lists_are_a_chat_that_trains_the_completion_only():
    conversation = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert conversation.kind == "chat"
    assert [m.weight for m in conversation.messages if m.role == "assistant"] == [0.0, 1.0]


def test_plain_text_is_one_trained_message():
    conversation = parse({"text": "Once upon a time"})
    assert (conversation.kind, conversation.answer) == ("text", "Once upon a time")


@pytest.mark.parametrize("key", ["cluster", "family"])
def test_a_cluster_given_with_the_row_is_kept(key):
    assert parse({"messages": [USER, ANSWER], key: "greetings"}).extra["cluster"] == "greetings"


def test_unknown_keys_are_listed_with_the_shapes_known():
    with pytest.raises(DataError) as caught:
        detect_format([{"question": "a", "reply": "b"}], place="train.jsonl")
    text = str(caught.value)
    assert text.startswith("train.jsonl: rows with keys question, reply;")
    assert "messages" in text
    assert "alpaca" in text
    assert "\n" not in text


def test_two_shapes_in_one_source_are_refused():
    with pytest.raises(DataError, match="beside rows of shape messages"):
        detect_format([{"messages": []}, {"text": "a"}])


BAD_ROWS = {
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}, ANSWER]}, "role 'robot'"),
    "missing role": ({"messages": [{"content": "a"}, ANSWER]}, "has no role"),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, ANSWER]},
        "two system messages (1 and 2)",
    ),
    "late system": (
        {"messages": [USER, {"role": "system", "content": "a"}, ANSWER]},
        "system message is number 2",
    ),
    "empty answer": (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        "answer in message 2 is empty",
    ),
    "no assistant": ({"messages": [USER]}, "no assistant turn"),
    "user last": ({"messages": [USER, ANSWER, USER]}, "last message is from 'user'"),
    "assistant first": ({"messages": [ANSWER]}, "opens with 'assistant'"),
    "messages is text": ({"messages": "hello"}, "messages is a string"),
    "messages is null": ({"messages": None}, "messages is null"),
    "no messages": ({"messages": []}, "no messages"),
    "message is text": ({"messages": ["hello", ANSWER]}, "message 1 is a string"),
    "content is a number": (
        {"messages": [{"role": "user", "content": 4}, ANSWER]},
        "content that is a number",
    ),
    "content is null": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "content that is null"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, ANSWER]},
        "a part that is not text",
    ),
    "weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight 0.5"),
    "nothing trained": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant turn has weight 0"),
    "tools": ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a string that is not JSON"),
    "call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]},
        "without a function name",
    ),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "prompt is a number": ({"prompt": 1, "completion": "b"}, "prompt is a number"),
    "no instruction": ({"instruction": " ", "output": "b"}, "instruction is empty"),
    "output is a list": ({"instruction": "a", "output": ["b"]}, "output is a list"),
    "turn without value": ({"conversations": [{"from": "human"}]}, "turn 1 has no from or no value"),
    "text is empty": ({"text": ""}, "text is empty"),
    "NUL": (
        {"messages": [USER, {"role": "assistant", "content": "a\0b"}]},
        "contains a NUL character; rows are text",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_told_in_one_line(name):
    value, finding = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        parse(value)
    text = str(caught.value)
    assert text.startswith("train.jsonl:17: ")
    assert finding in text
    assert "\n" not in text
    assert "--on-bad-row skip" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "shape", "num_rows"),
    [
        ("sft/alpaca_en_demo.json", "alpaca", None),
        ("sft/code_alpaca_2k.json", "alpaca", None),
        ("sft/dolly_part_no_context.jsonl", "alpaca", 4211),
        ("sft/raschka_instruction_1100.json", "alpaca", 1100),
        ("sft/glaive_toolcall_en_demo.json", "sharegpt", None),
        ("sft/sgd_chat_1500.jsonl", "messages", 1500),
        ("format_samples/torchtune_chat_tiny.json", "sharegpt", None),
        ("format_samples/torchtune_instruct_tiny.json", "alpaca", 2),
        ("format_samples/torchtune_alpaca_tiny.json", "alpaca", None),
    ],
)
def test_real_sets_are_recognised_and_parsed(shared, path, shape, num_rows):
    text = (shared / path).read_text()
    values = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert detect_format(values[:100]) == shape
    bad = []
    for value in values:
        try:
            parse(value, shape)
        except DataError as error:
            bad.append(error.finding)
    assert num_rows is None or len(values) == num_rows
    assert len(bad) <= len(values) // 50, bad[:3]


def test_the_options_of_a_multiple_choice_row_reach_the_judge() -> None:
    row = {"prompt": "Sky?", "completion": " blue", "choices": [" blue", " green"], "answer_index": 0}
    parsed = parse_row(RawRow(row, Origin("rows.jsonl:1", "rows.jsonl", 1)), "prompt_completion")
    assert parsed.extra["choices"] == [" blue", " green"]
    assert parsed.extra["answer_index"] == 0
