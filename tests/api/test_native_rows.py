"""What frameworks are handed in the native track, and which jobs are refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.api.native import check_native, describe_raw
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import JobError
from tunesmith.core.jsonl import read_jsonl
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.frameworks.handoff import RawRows
from tunesmith.frameworks.ports import PORTS
from tunesmith.frameworks.trl import Trl
from tunesmith.job.load import job_from
from tunesmith.job.spec import Job

BASE = BUNDLED["tunesmith/tiny"]
WORDS = ("red", "blue", "green", "brown", "grey", "white", "black", "pink")


def chat(word: str, answers: int = 1, **fields: Any) -> dict[str, Any]:
    turns = [
        {"role": role, "content": f"{word} {role} {number}"}
        for number in range(answers)
        for role in ("user", "assistant")
    ]
    return {"messages": turns, **fields}


def prepared(folder: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[Job, Prepared]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = job_from(
        {
            "model": "tunesmith/tiny",
            "data": {
                "train": str(folder / "rows.jsonl"),
                "split": {"validation": 0.2, "test": 0.2},
                **data,
            },
            "compare": {"track": "native"},
        }
    )
    return job, prepare_data(job, tokenizer=load_tokenizer(BASE), folder=folder / "prepared")


def describe(folder: Path, rows: list[dict[str, Any]], **data: Any) -> RawRows:
    job, data_rows = prepared(folder, rows, **data)
    return describe_raw(job, data_rows, BASE, report=folder / "native.jsonl")


def test_training_rows_are_handed_as_they_were_read_and_no_others(tmp_path: Path) -> None:
    rows = [chat(word) for word in WORDS]
    raw = describe(tmp_path, rows)
    handed = [value for _, value in read_jsonl(Path(raw.rows))]
    job, data = prepared(tmp_path, rows)

    assert all(value in rows for value in handed)
    assert len(handed) == len(data.rows("train")) == 4
    sealed = {c.messages[0].content for name in ("test", "validation") for c in data.conversations(name)}
    assert sealed
    assert not sealed & {value["messages"][0]["content"] for value in handed}
    assert raw.max_tokens == job.data.max_tokens
    assert (raw.kind, raw.trains, raw.marks_answers, raw.stop_token) == (
        "chat",
        "the answer",
        False,
        "<|end|>",
    )
    assert raw.template == (BASE / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "kind", "trains"),
    [
        ([chat(word, 2) for word in WORDS], "chat", "all answers"),
        (
            [
                {"prompt": turns[:3], "completion": turns[3:]}
                for turns in (chat(word, 2)["messages"] for word in WORDS)
            ],
            "chat",
            "last answer",
        ),
        (
            [
                {"messages": [*turns[:3], {**turns[3], "weight": 0}, *turns[4:]]}
                for turns in (chat(word, 3)["messages"] for word in WORDS)
            ],
            "chat",
            "some answers",
        ),
        ([{"prompt": word, "completion": "yes"} for word in WORDS], "completion", "the answer"),
        ([{"text": f"a {word} thing"} for word in WORDS], "text", "everything"),
    ],
)
def test_what_is_trained_is_told(tmp_path: Path, rows: list[dict[str, Any]], kind: str, trains: str) -> None:
    raw = describe(tmp_path, rows)

    assert (raw.kind, raw.trains) == (kind, trains)
    assert (raw.template is None) == (kind != "chat")


def test_fields_beside_roles_and_texts_are_told(tmp_path: Path) -> None:
    rows = [chat(word) for word in WORDS]
    for row in rows:
        row["messages"][0]["name"] = "Ann"

    assert describe(tmp_path, rows).extras == "'name' in a message"


def test_what_a_template_writes_is_told(tmp_path: Path) -> None:
    raw = describe(tmp_path, [chat(word) for word in WORDS], too_long="truncate")

    assert raw.system_turn == "<|bos|><|system|>{{content}}<|end|><|assistant|>"
    assert (raw.end_token, raw.bos, raw.too_long) == ("<|end|>", "", "truncate")


def test_answers_that_are_not_trained_are_marked_in_their_rows(tmp_path: Path) -> None:
    rows = [chat(word, 2) for word in WORDS]
    for row in rows[::2]:
        row["messages"][1]["weight"] = 0
    raw = describe(tmp_path, rows)

    handed = [value for _, value in read_jsonl(Path(raw.rows))]
    assert raw.trains == "some answers"
    unmarked = [row for row in handed if "train" not in row]
    marked = [row["train"] for row in handed if "train" in row]
    assert unmarked
    assert marked == [[False, False, False, True]] * (len(handed) - len(unmarked))
    assert not any("weight" in message for row in handed for message in row["messages"])


def test_a_template_without_system_turns_is_refused_for_llamafactory(tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text(
        "{{- bos_token -}}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{{- raise_exception('no system turns') -}}{%- endif -%}"
        "{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}",
        encoding="utf-8",
    )
    job, data = prepared(tmp_path, [chat(word) for word in WORDS], template=str(tmp_path / "plain.jinja"))

    with pytest.raises(
        JobError, match=r"data\.template: LLaMA-Factory reads a chat template off a system turn"
    ):
        check_native("llamafactory", job, data, BASE, place="arm")
    check_native("axolotl", job, data, BASE, place="arm")


def test_a_framework_that_cannot_be_told_so_is_refused(tmp_path: Path) -> None:
    job, data = prepared(tmp_path, [chat(word, 2) for word in WORDS])

    with pytest.raises(
        JobError, match=r"compare\.arms, lora-trl: data\.template: TRL trains several answers"
    ):
        check_native("trl", job, data, BASE, place="compare.arms, lora-trl")


def test_a_framework_without_a_native_track_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        name, can, translate = "axolotl", Trl.can, Trl.translate

    monkeypatch.setitem(PORTS, "axolotl", Plain())
    job, data = prepared(tmp_path, [chat(word) for word in WORDS])

    with pytest.raises(JobError, match="axolotl's own preprocessing cannot be compared yet"):
        check_native("axolotl", job, data, BASE, place="arm")


def test_a_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    # Earlier answers lose their first character, so that each answer needs a row of its own.
    (tmp_path / "rewrites.jinja").write_text(
        "{{- bos_token -}}{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
        "{%- if m.role == 'assistant' and not loop.last -%}{{- m.content[1:] -}}{%- else -%}{{- m.content -}}"
        "{%- endif -%}{{- '<|end|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}",
        encoding="utf-8",
    )
    job, data = prepared(
        tmp_path, [chat(word, 2) for word in WORDS], template=str(tmp_path / "rewrites.jinja")
    )

    with pytest.raises(JobError, match="some conversations are several rows of ours"):
        check_native("trl", job, data, BASE, place="arm")
