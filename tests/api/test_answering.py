"""Prompts in, rows to learn from out: what is written, what a second run asks for, what is counted and refused."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback, Said, fail, say

import tunesmith
from tunesmith.api import answer_prompts
from tunesmith.core.errors import DataError, RunDirError, SetupError
from tunesmith.core.events import Event

KEY = "sk-secret-0123456789"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_prompts(folder: Path, count: int = 6) -> Path:
    return write(folder / "prompts.jsonl", [{"prompt": f"Question {number}?"} for number in range(count)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(prompts: Path, loopback: Loopback, **settings: Any) -> Any:
    given = {"out": prompts.parent / "answers.jsonl", "model": "large", "endpoint": loopback.url, **settings}
    return answer_prompts(prompts, **given)


def test_answers_are_rows_that_sft_learns_from(tmp_path: Path, loopback: Loopback) -> None:
    result = answer(write_prompts(tmp_path, 40), loopback, max_tokens=50, temperature=0.5)
    assert result.counts == {"answered": 40, "cut": 0, "empty": 0, "refused": 0}
    assert (result.prompts, result.kept, result.prompt_tokens, result.answer_tokens) == (40, 0, 320, 160)
    assert loopback.asked[0].body["max_tokens"] == 50
    assert loopback.asked[0].body["temperature"] == 0.5
    rows = sorted(read(tmp_path / "answers.jsonl"), key=lambda row: row["messages"][0]["content"])
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "Question 0?"},
            {"role": "assistant", "content": "To Question 0?"},
        ]
    }
    report = tunesmith.check({"model": "tunesmith/tiny", "data": {"train": str(tmp_path / "answers.jsonl")}})
    assert not report.errors
    assert sum(split.num_rows for split in report.splits.values()) == 40


def test_prompts_come_in_every_shape_and_their_old_answers_are_left_out(
    tmp_path: Path, loopback: Loopback
) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Which is darker?"},
        {"role": "assistant", "content": "the old answer"},
    ]
    answer(write(tmp_path / "rows.jsonl", [{"messages": chat, "cluster": "colours"}]), loopback)
    assert loopback.asked[0].body["messages"] == chat[:3]
    # The teacher's answer is learned; an earlier turn is not its own.
    (row,) = read(tmp_path / "answers.jsonl")
    assert row["messages"] == [
        chat[0],
        {**chat[1], "weight": 0},
        chat[2],
        {"role": "assistant", "content": "To Which is darker?"},
    ]
    assert row["cluster"] == "colours"


def test_a_system_message_is_asked_with_and_learned_with(tmp_path: Path, loopback: Loopback) -> None:
    own = {"prompt": [{"role": "system", "content": "Own."}, {"role": "user", "content": "b"}]}
    plain = {"prompt": [{"role": "user", "content": "a"}]}
    answer(write(tmp_path / "prompts.jsonl", [plain, own]), loopback, system="Be brief.", parallel=1)
    first, second = read(tmp_path / "answers.jsonl")
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert second["messages"][0] == {"role": "system", "content": "Own."}
    assert loopback.asked[0].body["messages"] == first["messages"][:-1]


def test_what_is_no_good_answer_is_left_out_counted_and_asked_again(
    tmp_path: Path, loopback: Loopback
) -> None:
    told: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "warning":
            told.append(event.text)

    loopback.script(
        say("good"), say("half", "length"), say(""), say(None, refusal="no"), fail(400, "long"), say("ok")
    )
    first = answer(write_prompts(tmp_path), loopback, parallel=1, on_event=listen)
    assert first.counts == {"answered": 2, "cut": 1, "empty": 1, "refused": 2}
    assert (
        told
        == first.warnings
        == [
            "1 answer cut by the limit of tokens and left out: prompts.jsonl:2",
            "1 answer empty and left out: prompts.jsonl:3",
            "2 answers refused: prompts.jsonl:4 (no), prompts.jsonl:5 (400: long)",
        ]
    )
    kept = (tmp_path / "answers.jsonl").read_text()
    asked = len(loopback.asked)
    second = answer(tmp_path / "prompts.jsonl", loopback)
    assert (second.kept, second.counts["answered"]) == (2, 4)
    assert len(loopback.asked) == asked + 4
    assert (tmp_path / "answers.jsonl").read_text().startswith(kept)
    third = answer(tmp_path / "prompts.jsonl", loopback)
    assert (third.kept, sum(third.counts.values())) == (6, 0)


def test_a_prompt_that_comes_twice_is_answered_twice(tmp_path: Path, loopback: Loopback) -> None:
    rows = write(tmp_path / "prompts.jsonl", [{"prompt": "Same?"}, {"prompt": "Same?"}])
    loopback.script(say("one"), say(""), say("two"))
    assert answer(rows, loopback, parallel=1).counts["answered"] == 1
    assert answer(rows, loopback, parallel=1).kept == 1
    assert [row["messages"][1]["content"] for row in read(tmp_path / "answers.jsonl")] == ["one", "two"]


def test_half_a_line_is_cut_off_and_its_prompt_asked_again(tmp_path: Path, loopback: Loopback) -> None:
    prompts, out = write_prompts(tmp_path), tmp_path / "answers.jsonl"
    answer(prompts, loopback)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    result = answer(prompts, loopback)
    assert (result.kept, result.counts["answered"]) == (5, 1)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, loopback: Loopback) -> None:
    prompts, out = write_prompts(tmp_path, 40), tmp_path / "answers.jsonl"
    loopback.answer = lambda _, body: Said(say("slow"), seconds=0.05)
    child = multiprocessing.get_context("fork").Process(
        target=answer, args=(prompts, loopback), kwargs={"parallel": 2}
    )
    child.start()
    while not out.is_file() or out.read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    time.sleep(0.2)  # for what was under way
    had, asked = out.read_bytes().count(b"\n"), len(loopback.asked)
    result = answer(prompts, loopback)
    assert had < 40
    assert (result.kept, result.counts["answered"]) == (had, 40 - had)
    assert len(loopback.asked) == asked + 40 - had
    assert len(read(out)) == 40


def test_answers_of_another_kind_are_not_mixed(tmp_path: Path, loopback: Loopback) -> None:
    prompts = write_prompts(tmp_path)
    answer(prompts, loopback)
    with pytest.raises(RunDirError, match=r"was begun with model='large', not 'small'.*--fresh"):
        answer(prompts, loopback, model="small")
    with pytest.raises(RunDirError, match="temperature=None, not 1"):
        answer(prompts, loopback, temperature=1.0)
    loopback.script(say("anew"))
    assert answer(prompts, loopback, model="small", fresh=True).kept == 0
    assert {row["messages"][1]["content"] for row in read(tmp_path / "answers.jsonl")} == {"anew"}


def test_the_key_is_in_no_file(tmp_path: Path, loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    result = answer(write_prompts(tmp_path), loopback)
    assert loopback.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert len(written) == 3
    assert KEY not in "".join(written) + json.dumps(result.to_json())


def test_nothing_but_refusals_is_an_end(tmp_path: Path, loopback: Loopback) -> None:
    loopback.script(fail(400, "max_tokens is not supported"))
    with pytest.raises(SetupError, match=r"refuses the first 5 requests \(400: max_tokens is not"):
        answer(write_prompts(tmp_path, 50), loopback, parallel=1)
    time.sleep(0.1)
    assert len(loopback.asked) <= 6  # one may have been under way


def test_other_peoples_files_are_left_alone(tmp_path: Path, loopback: Loopback) -> None:
    prompts = write_prompts(tmp_path)
    before = prompts.read_text()
    with pytest.raises(RunDirError, match="holds no answers of ours"):
        answer(prompts, loopback, out=prompts, fresh=True)
    with pytest.raises(RunDirError, match=r"is no \.jsonl file"):
        answer(prompts, loopback, out=tmp_path / "answers.txt")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RunDirError, match=r"folder\.jsonl"):
        answer(prompts, loopback, out=tmp_path / "folder.jsonl")
    assert prompts.read_text() == before
    assert not loopback.asked


def test_a_file_has_one_writer(tmp_path: Path, loopback: Loopback) -> None:
    prompts = write_prompts(tmp_path)
    answer(prompts, loopback)
    with (tmp_path / "answers.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunDirError, match="in use by another process"):
            answer(prompts, loopback)


def test_bad_prompts_are_refused_before_anyone_is_asked_or_skipped(
    tmp_path: Path, loopback: Loopback
) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": [{"role": "user", "content": "b"}], "tools": [tool]}]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: the prompt is empty"):
        answer(prompts, loopback)
    assert not loopback.asked
    result = answer(prompts, loopback, on_bad_row="skip")
    assert (result.prompts, result.counts["answered"]) == (1, 1)
    assert result.warnings[0].startswith("2 bad rows skipped, the first: prompts.jsonl:2")
    with pytest.raises(DataError, match=r"all 1 rows are bad.*The first: bad\.jsonl:1: the prompt is empty"):
        answer(write(tmp_path / "bad.jsonl", rows[1:2]), loopback, on_bad_row="skip")
    write(prompts, [rows[0], rows[2]])
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: uses tools"):
        answer(prompts, loopback)
