"""What frameworks are told of raw rows in the native track, word for word, and what they cannot be told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_port import GOLDEN, HANDOFF

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import NativePort, Translation
from tunesmith.frameworks.ports import PORTS

RAW = RawRows(
    rows="/raw.jsonl", kind="chat", trains="the answer", max_tokens=512, too_long="truncate", bos="",
    stop_token="<|end|>", template="{{ messages }}", end_token="<|end|>", system_turn="<|system|>{{content}}<|end|>",
    marks_answers=False, extras="", report="/run/framework/native.jsonl",
)  # fmt: skip
COMPLETION: dict[str, Any] = {"kind": "completion", "template": None, "end_token": "", "system_turn": None}
TEXT: dict[str, Any] = {**COMPLETION, "kind": "text", "trains": "everything"}


def translate(name: str, **changes: Any) -> Translation:
    handoff = dataclasses.replace(HANDOFF, raw=dataclasses.replace(RAW, **changes))
    assert Handoff.from_json(json.loads(json.dumps(handoff.to_json())), place="handoff.json") == handoff
    return PORTS[name].translate(handoff)


def read_settings(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads(translate(name, **changes).files[f"{name}.json"])


@pytest.mark.parametrize("name", PORTS)
def test_a_framework_is_told_how_to_prepare_chats(name: str) -> None:
    translation = translate(name)

    told = (GOLDEN / f"{name}-native.json").read_text(encoding="utf-8")
    assert translation.files[f"{name}.json"] == told
    assert Path(translation.argv[0]).is_file()


@pytest.mark.parametrize("name", PORTS)
@pytest.mark.parametrize("kind", [{}, COMPLETION, TEXT], ids=["chat", "completion", "text"])
def test_the_limit_is_said_and_rows_are_not_taken_for_tokens(name: str, kind: dict[str, Any]) -> None:
    settings = read_settings(name, **kind)
    arguments = settings.get("arguments") or settings["sft"]

    limit = {"llamafactory": "cutoff_len", "axolotl": "sequence_len"}.get(name, "max_length")
    tokens = {"llamafactory": "tokenized_path", "axolotl": "skip_prepare_dataset"}.get(name, "dataset_kwargs")
    assert arguments[limit] == 512
    assert not arguments[tokens]


# --- what is trained --------------------------------------------------------------------------------------------------

IN_TEMPLATE = "/run/framework/template.jinja"


@pytest.mark.parametrize(
    ("changes", "splits", "completion", "assistant", "template"),
    [
        ({}, True, True, False, IN_TEMPLATE),
        ({"marks_answers": True}, False, False, True, IN_TEMPLATE),
        ({"marks_answers": True, "trains": "all answers"}, False, False, True, IN_TEMPLATE),
        ({"marks_answers": True, "trains": "last answer"}, True, True, False, IN_TEMPLATE),
        (COMPLETION, False, True, False, None),
        (TEXT, False, False, False, None),
    ],
)
def test_trl_is_told_what_its_own_preprocessing_trains(
    changes: dict[str, Any], splits: bool, completion: bool, assistant: bool, template: str | None
) -> None:
    settings = read_settings("trl", **changes)
    sft = settings["sft"]

    assert settings["splits_answer"] is splits
    assert (sft["completion_only_loss"], sft["assistant_only_loss"]) == (completion, assistant)
    assert sft["chat_template_path"] == template
    assert (sft["max_length"], sft["eos_token"], sft["packing"]) == (512, "<|end|>", False)
    assert sft["dataset_kwargs"] is None


def test_trl_gets_the_template_as_a_file() -> None:
    assert translate("trl").files["template.jinja"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("trains", "last"), [("the answer", False), ("all answers", False), ("last answer", True)]
)
def test_unsloth_finds_answers_by_the_template_and_may_train_the_last_one(trains: str, last: bool) -> None:
    settings = read_settings("unsloth", trains=trains)

    assert settings["chat_template"] == "{{ messages }}"
    assert settings["masking"]["last_response_only"] is last
    assert (settings["masking"]["instruction_part"], settings["masking"]["response_part"]) == (None, None)
    assert settings["sft"]["assistant_only_loss"] is False
    assert read_settings("unsloth", **TEXT)["masking"] is None
    assert read_settings("unsloth", **COMPLETION)["sft"]["completion_only_loss"] is True


@pytest.mark.parametrize(
    ("trains", "field"),
    [("the answer", None), ("all answers", None), ("last answer", "train"), ("some answers", "train")],
)
def test_axolotl_is_told_in_each_message_where_not_all_answers_are_trained(
    trains: str, field: str | None
) -> None:
    settings = read_settings("axolotl", trains=trains)
    (rows,) = settings["arguments"]["datasets"]

    assert settings["train_field"] == rows["message_field_training"] == field
    assert rows["roles_to_train"] == ["assistant"]
    assert (rows["chat_template"], rows["chat_template_jinja"]) == ("jinja", "{{ messages }}")


def test_axolotl_is_told_what_ends_a_turn_in_the_template() -> None:
    assert read_settings("axolotl", end_token="<|eot|>")["arguments"]["eot_tokens"] == ["<|eot|>"]
    assert read_settings("axolotl", end_token="")["arguments"]["eot_tokens"] == ["<|end|>"]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("drop", "drop"), ("truncate", "truncate"), ("refuse", "raise")]
)
def test_axolotl_does_with_long_rows_what_the_job_does(ours: str, theirs: str) -> None:
    assert read_settings("axolotl", too_long=ours)["arguments"]["excess_length_strategy"] == theirs


def test_axolotl_puts_nothing_around_prompts_and_texts() -> None:
    (pairs,) = read_settings("axolotl", **COMPLETION)["arguments"]["datasets"]
    assert (pairs["type"]["format"], pairs["type"]["no_input_format"]) == ("{instruction}", "{instruction}")
    assert (pairs["type"]["field_instruction"], pairs["type"]["field_output"]) == ("prompt", "completion")
    (texts,) = read_settings("axolotl", **TEXT)["arguments"]["datasets"]
    assert (texts["type"], texts["field"]) == ("completion", "text")


def test_llamafactory_reads_the_template_off_the_tokenizer_that_it_is_given() -> None:
    settings = read_settings("llamafactory")
    assert settings["arguments"]["template"] is None
    assert settings["chat_template"] == "{{ messages }}"
    info = json.loads(translate("llamafactory").files["dataset_info.json"])["handed"]
    assert (info["file_name"], info["formatting"]) == (settings["raw_file"], "sharegpt")
    assert settings["arguments"]["dataset_dir"] == "/run/framework"
    for trains, masks in (("all answers", False), ("last answer", True)):
        assert read_settings("llamafactory", trains=trains)["arguments"]["mask_history"] is masks


def test_llamafactory_gets_a_template_for_prompts_that_adds_bos_and_eos_alone() -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}"

    assert read_settings("llamafactory", **COMPLETION)["chat_template"].startswith(template)
    with_bos = read_settings("llamafactory", **COMPLETION, bos="<s>")["chat_template"]
    assert with_bos.startswith("{{ bos_token }}" + template)
    texts = read_settings("llamafactory", **TEXT)
    assert (texts["arguments"]["stage"], texts["chat_template"]) == ("pt", None)


# --- what cannot be told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PORTS)
def test_the_rows_of_most_jobs_can_be_prepared(name: str) -> None:
    port = PORTS[name]
    assert isinstance(port, NativePort)
    for changes in ({}, {"trains": "last answer"}, COMPLETION, {**TEXT, "too_long": "drop"}):
        assert port.can_prepare(dataclasses.replace(RAW, **changes)) is None


EVERY = tuple(PORTS)
UNREADABLE = "LLaMA-Factory reads a chat template off a system turn alone"


@pytest.mark.parametrize(
    ("names", "changes", "key", "finding"),
    [
        (EVERY, {"kind": "several kinds"}, "data.train", "wants all rows of one shape"),
        (EVERY, {"extras": "tools"}, "data.train", "the rows have tools"),
        (
            ("trl", "llamafactory", "unsloth"),
            {"trains": "some answers"},
            "data.train",
            "no weight for a single",
        ),
        (("trl",), {"trains": "all answers"}, "data.template", "only where the chat template marks them"),
        (("axolotl",), {**TEXT, "too_long": "truncate"}, "data.too_long", "several rows of a text"),
        (("llamafactory",), {"system_turn": None}, "data.template", UNREADABLE),
        (("llamafactory",), {"system_turn": "<|start|>"}, "data.template", UNREADABLE),
        (("llamafactory",), {"bos": "<s>"}, "data.template", "the <s> that the tokenizer adds"),
    ],
)
def test_what_a_framework_cannot_be_told_is_a_reason(
    names: tuple[str, ...], changes: dict[str, Any], key: str, finding: str
) -> None:
    refused = {name: PORTS[name].can_prepare(dataclasses.replace(RAW, **changes)) for name in EVERY}  # pyright: ignore

    assert {name for name, reason in refused.items() if reason} == set(names)
    for name in names:
        assert refused[name].key == key
        assert finding in refused[name].finding
