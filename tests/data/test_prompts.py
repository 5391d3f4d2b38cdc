"""Rows of every shape become prompts with their truth and columns, and come back from the prepared folder as such."""

import json

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.types import Message, Origin
from tunesmith.data.formats import RawRow, detect_format, parse_row
from tunesmith.data.prepare import load_prepared, prepare_data
from tunesmith.data.prompts import Prompt
from tunesmith.data.render import Renderer
from tunesmith.data.survey import check

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}


def parse(value):
    fmt = detect_format([value], rows="prompts")
    return parse_row(RawRow(value, Origin("train.jsonl:17", "train.jsonl", 17)), fmt, "prompts")


def said(messages):
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "answer": "4"},
        {"prompt": [USER], "solution": "4"},
        {"prompt": [USER], "ground_truth": 4},
        {"prompt": [USER], "completion": [FOUR]},
        {"prompt": [USER], "completion": "4"},
        {"prompt": "2+2?", "completion": [FOUR]},
        {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER], "answer": "4"},
        {"messages": [USER, FOUR]},
        {"messages": [USER], "answer": "4"},
        {"messages": [USER, {"role": "assistant", "content": "It is 4."}], "answer": "4"},
        {"conversations": [HUMAN, GPT]},
        {"instruction": "2+2?", "output": "4"},
        {"instruction": "2+2?", "input": "", "response": "4"},
        {"instruction": "2+2?", "answer": "4"},
        {"question": "2+2?", "answer": "4"},
    ],
)
def test_a_row_of_every_shape_is_a_prompt_with_its_truth(row):
    prompt = parse(row)
    assert prompt.kind == "chat"
    assert said(prompt.messages) == said(prompt.prompt) == [("user", "2+2?")]
    assert prompt.truth == prompt.answer == prompt.columns["answer"] == "4"


def test_a_string_is_raw_text():
    prompt = parse({"prompt": "2 + 2 =", "completion": " 4"})
    assert (prompt.kind, said(prompt.messages), prompt.truth) == ("completion", [("user", "2 + 2 =")], " 4")


def test_only_the_last_answer_is_cut_off():
    turns = [{"role": "system", "content": "Be brief"}, USER, FOUR, {"role": "user", "content": "sure?"}]
    expected = [("system", "Be brief"), ("user", "2+2?"), ("assistant", "4"), ("user", "sure?")]
    assert said(parse({"messages": turns}).messages) == expected
    assert parse({"messages": turns}).truth is None
    answered = parse({"messages": [*turns, {"role": "assistant", "content": "yes"}]})
    assert (said(answered.messages), answered.truth) == (expected, "yes")
    assert said(parse({"prompt": turns[1:], "system": "Be brief"}).messages) == expected


def test_all_other_columns_are_kept_as_json():
    row = {
        "prompt": [USER],
        "solution": "4",
        "level": 3,
        "tests": [{"in": 1}],
        "p": float("nan"),
        "cluster": "a",
    }
    prompt = parse(row)
    assert prompt.columns == {
        "solution": "4",
        "answer": "4",
        "level": 3,
        "tests": [{"in": 1}],
        "p": None,
        "cluster": "a",
    }
    assert prompt.extra["cluster"] == "a"


def test_a_truth_that_is_no_text_is_only_a_column():
    prompt = parse({"prompt": [USER], "answer": ["4", "four"]})
    assert prompt.truth is None
    assert prompt.columns == {"answer": ["4", "four"]}


def test_an_answer_that_is_labelled_bad_is_no_truth():
    assert parse({"messages": [USER, FOUR], "label": False}).truth is None
    assert parse({"messages": [USER, FOUR], "kto_tag": True}).truth == "4"


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt is a number"),
        ({"prompt": []}, "no turn before the answer"),
        ({"messages": [FOUR]}, "no turn before the answer"),
        ({"prompt": [USER, FOUR]}, "the prompt's last message is from 'assistant'"),
        ({"messages": [FOUR, USER]}, "the conversation opens with 'assistant'"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "opens with 'system'"),
        ({"prompt": [USER], "system": 3}, "system is a number"),
        ({"prompt": "2+2?", "system": "Be brief"}, "system beside a prompt that is raw text"),
        ({"prompt": "a\0b"}, "contains a NUL character"),
        ({"question": ""}, "the instruction is empty"),
    ],
)
def test_a_bad_prompt_is_named_in_one_line(row, finding):
    with pytest.raises(DataError, match=rf"^train\.jsonl:17: .*{finding}"):
        parse(row)


def test_unknown_keys_are_told_with_the_shapes_of_prompts():
    with pytest.raises(DataError, match=r"rows with keys text; known shapes are prompts \(prompt\)"):
        detect_format([{"text": "a"}], rows="prompts")


# --- from file to folder ----------------------------------------------------------------------------------------------

WORDS = ["cat", "dog", "house", "tree", "river", "stone", "cloud", "bird", "fish", "lamp"]


@pytest.fixture
def prompt_file(write_lines):
    rows = [
        {"prompt": [{"role": "user", "content": f"{word * 9}?"}], "solution": word, "n": n, "tags": ["é"]}
        for n, word in enumerate(WORDS)
    ]
    return write_lines(*[json.dumps(row) for row in rows])


@pytest.fixture
def prepare(make_job, chat_tokenizer, tmp_path):
    def run(path, **data):
        job = make_job(train=str(path), **data)
        return prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "prepared", rows="prompts")

    return run


def test_prompts_come_back_with_truth_and_columns(prepare, prompt_file, tmp_path, chat_tokenizer):
    prepare(prompt_file, split={"validation": 0.2, "test": 0.2})
    read = load_prepared(tmp_path / "prepared")
    assert read.kind == "prompts"
    renderer = Renderer(chat_tokenizer)
    found = {split: read.prompts(split) for split in ("train", "validation", "test")}
    assert [len(prompts) for prompts in found.values()] == [6, 2, 2]
    for prompt in (prompt for prompts in found.values() for prompt in prompts):
        word, n = prompt.truth, prompt.columns["n"]
        question = (Message("user", f"{word * 9}?"),)
        assert prompt == Prompt(
            ids=renderer.render_prompt(question),
            question=question,
            truth=WORDS[n],
            columns={"solution": word, "answer": word, "n": n, "tags": ["é"]},
            origin=prompt.origin,
            row_id=prompt.row_id,
        )
        assert prompt.origin.place == f"train.jsonl:{n + 1}"
    for split in found:
        assert [list(row.ids) for row in read.examples(split)] == [p.ids for p in found[split]]
        assert not any(any(row.mask) for row in read.rows(split))


def test_a_raw_prompt_ends_where_its_answer_begins(prepare, write_lines, chat_tokenizer):
    path = write_lines('{"prompt": "The cat", "completion": " sat."}')
    (prompt,) = prepare(path, split={"validation": 0.0, "test": 0.0}).prompts("train")
    assert (prompt.question, prompt.truth) == ("The cat", " sat.")
    assert chat_tokenizer.decode(prompt.ids) == "The cat"


def test_answers_are_those_prompts_that_sft_learns_from(prepare, write_lines, chat_tokenizer):
    """The same file for SFT and for what comes after it: a prompt is an SFT row up to its answer."""
    path = write_lines(json.dumps({"messages": [USER, FOUR]}))
    (prompt,) = prepare(path, split={"validation": 0.0, "test": 0.0}).prompts("train")
    conversation = parse_row(RawRow({"messages": [USER, FOUR]}, prompt.origin), "messages")
    (row,) = Renderer(chat_tokenizer).render_conversation(conversation)
    assert list(row.ids[: list(row.mask).index(1)]) == prompt.ids


def test_equal_prompts_are_one_whatever_their_truth(prepare, write_lines):
    rows = [{"prompt": [USER], "answer": str(n)} for n in range(3)]
    path = write_lines(*map(json.dumps, rows))
    prepared = prepare(path, split={"validation": 0.0, "test": 0.0}, deduplicate="exact")
    assert [p.truth for p in prepared.prompts("train")] == ["0"]
    assert prepared.report.splits["train"].num_exact_duplicates == 2


def test_equal_prompts_stay_on_one_side(prepare, write_lines):
    rows = [
        {"prompt": [{"role": "user", "content": f"{word * 9}?"}], "answer": str(n)}
        for n in range(4)
        for word in WORDS
    ]
    path = write_lines(*map(json.dumps, rows))
    prepared = prepare(path, split={"validation": 0.2, "test": 0.2}, deduplicate="none")
    sides = [
        {p.question[0].content for p in prepared.prompts(split)} for split in ("train", "validation", "test")
    ]
    assert [len(side) for side in sides] == [6, 2, 2]
    assert len(set.union(*sides)) == len(WORDS)


def test_a_fingerprint_holds_truths_and_columns(prepare, write_lines):
    prints = {
        prepare(
            write_lines(json.dumps({"prompt": [USER], **columns})), split={"validation": 0.0, "test": 0.0}
        ).fingerprints["train_sha256"]
        for columns in ({"answer": "4"}, {"answer": "5"}, {"answer": "4", "level": 1})
    }
    assert len(prints) == 3


def test_max_tokens_is_of_the_prompt(prepare, write_lines):
    long = {"role": "user", "content": "why " * 200}
    path = write_lines(json.dumps({"prompt": [USER], "answer": "x " * 500}), json.dumps({"prompt": [long]}))
    off = {"validation": 0.0, "test": 0.0}
    prepared = prepare(path, split=off, max_tokens=60)
    assert [said(p.question) for p in prepared.prompts("train")] == [[("user", "2+2?")]]
    assert prepared.report.splits["train"].num_dropped == 1
    with pytest.raises(
        DataError, match=r"train.jsonl:2: a prompt of \d+ tokens, with data.too_long: truncate"
    ):
        prepare(path, split=off, max_tokens=60, too_long="truncate")


def test_what_is_checked_of_prompts(make_job, prompt_file, write_lines, chat_tokenizer):
    job = make_job(train=str(prompt_file), split={"validation": 0.0, "test": 0.0})
    report = check(job, tokenizer=chat_tokenizer, rows="prompts")
    assert report.findings == []
    assert report.sources[0].format == "prompts"
    assert (report.splits["train"].num_rows, report.splits["train"].num_targets) == (10, 0)
    path = write_lines(json.dumps({"prompt": [USER]}), name="bare.jsonl")
    job = make_job(train=str(path), split={"validation": 0.0, "test": 0.0})
    (finding,) = check(job, tokenizer=chat_tokenizer, rows="prompts").findings
    assert (finding.level, finding.code, finding.count) == ("note", "prompts_without_truth", 1)


def test_a_shape_that_is_named_is_of_its_objective(make_job, write_lines, chat_tokenizer):
    path = write_lines(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    for fmt, rows, said in (
        ("pairs", "prompts", "this objective answers prompts. Set objective: dpo"),
        ("text", "prompts", r"its rows are answers \(text\); this objective answers prompts"),
        ("prompts", "answers", r"its rows are prompts \(prompts\); objective sft learns from answers"),
    ):
        job = make_job(train=[{"path": str(path), "format": fmt}], split={"validation": 0.0, "test": 0.0})
        with pytest.raises(DataError, match=said):
            check(job, tokenizer=chat_tokenizer, rows=rows)
