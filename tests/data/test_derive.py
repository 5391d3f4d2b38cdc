"""Prompts made of answered rows: the same rows, the same splits, their answers the truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import DataError
from tunesmith.data.derive import derive_prompts, list_prompts, name_question
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.load import job_from

TOKENIZER = load_tokenizer(BUNDLED["tunesmith/tiny"])


def prepare(folder: Path, rows: list[dict[str, object]]) -> tuple[Prepared, Renderer]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_from({"model": "tunesmith/tiny", "data": {"train": str(path), "split": {"test": 0.3}}})
    return prepare_data(job, tokenizer=TOKENIZER, folder=folder / "prepared"), Renderer(TOKENIZER, job.data)


def chat(number: int) -> dict[str, object]:
    turns = [("system", "Add."), ("user", f"{number} and {number}?"), ("assistant", str(2 * number))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_prompts_keep_their_splits_and_no_test_row_becomes_one(tmp_path: Path) -> None:
    prepared, renderer = prepare(tmp_path, [chat(number) for number in range(40)])
    derived = derive_prompts(prepared, renderer, tmp_path / "prompts")
    assert derived.kind == "prompts"
    assert "test" not in derived.splits
    for split in ("train", "validation"):
        asked, answered = derived.prompts(split), prepared.conversations(split)
        assert [prompt.origin for prompt in asked] == [row.origin for row in answered]
        assert [prompt.truth for prompt in asked] == [row.answer for row in answered]
        assert derived.conversation_clusters(split) == prepared.conversation_clusters(split)
    sealed = {name_question(row) for row in prepared.conversations("test")}
    assert not sealed & {name_question(row) for row in derived.conversations("train")}


def test_a_prompt_ends_where_the_answer_began(tmp_path: Path) -> None:
    prepared, renderer = prepare(tmp_path, [chat(number) for number in range(40)])
    asked = list_prompts(prepared, renderer, "test", count=3)
    assert list(asked) == [0, 1, 2]
    for number, prompt in asked.items():
        row = prepared.rows("test")[number]
        first = list(row.mask).index(1)
        assert list(prompt.ids) == list(row.ids)[:first]
        assert dict(prompt.columns) == {"answer": prompt.truth}


def test_questions_are_the_same_whatever_answers_them_and_whoever_is_asked(tmp_path: Path) -> None:
    prepared, _ = prepare(tmp_path, [chat(number) for number in range(20)])
    named = {name_question(row) for split in prepared.splits for row in prepared.conversations(split)}
    assert named == {f"user: {number} and {number}?" for number in range(20)}


def test_plain_text_asks_nothing(tmp_path: Path) -> None:
    prepared, renderer = prepare(tmp_path, [{"text": f"Once upon a time, {n} of them."} for n in range(20)])
    with pytest.raises(DataError, match="is plain text; a prompt ends with a question"):
        derive_prompts(prepared, renderer, tmp_path / "prompts")
