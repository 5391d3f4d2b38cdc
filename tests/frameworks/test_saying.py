"""How a framework was told what a job fixes is found by changing the job and looking what moves."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from test_port import HANDOFF, QLORA

from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.port import Reason, Translation
from tunesmith.frameworks.ports import PORTS
from tunesmith.frameworks.saying import describe_saying, show_value
from tunesmith.job.spec import Job


class Tiny:
    """Says three things of a job, two of them in one setting; its worker reads the handoff and what it expects."""

    name = "tiny"

    def can(self, job: Job) -> Reason | None:
        return None

    def translate(self, handoff: Handoff) -> Translation:
        own: dict[str, Any] = {"compile": True} if handoff.compile else {}
        settings = {
            "handoff": handoff.to_json(),
            "own": own
            | {
                "rate": handoff.learning_rate,
                "rows": [handoff.batch_rows, handoff.micro_rows],
                "pack": False,
            },
            "expected": {"arguments": {"eval_batch": 4}},
        }
        return Translation({"tiny.json": json.dumps(settings), "note.txt": "no settings"}, ())


def test_a_setting_says_what_it_moves_with() -> None:
    saying = describe_saying(Tiny(), HANDOFF, {})

    assert {each.name: each.said for each in saying.fixed} == {
        "batch_rows": {"own.rows": "[16, 4]"},
        "micro_rows": {"own.rows": "[16, 4]"},
        "learning_rate": {"own.rate": "0.0003"},
        "compile": {"own.compile": "(not said)"},
    }
    assert saying.told == {"own.pack": "false"}


def test_what_was_used_otherwise_than_said_is_told_and_the_rest_are_defaults() -> None:
    used = {"args": {"rate": 3e-4, "pack": True, "eval_batch": 8, "workers": {"num": 2}, "hub_token": None}}
    saying = describe_saying(Tiny(), HANDOFF, used)

    assert saying.altered == {"pack": ("false", "true"), "eval_batch": ("4", "8")}
    assert saying.defaults == {"args.workers.num": "2", "args.hub_token": "null"}


def test_nothing_said_in_another_way_is_no_alteration() -> None:
    # TRL's own words for nothing, for a list in another order, and for a setting that transformers never shows.
    used = {
        "arguments": {"report_to": [], "eos_token": "<EOS_TOKEN>", "max_steps": 120},
        "peft default": {"target_modules": ["down_proj", "q_proj"], "r": 8},
    }
    saying = describe_saying(PORTS["trl"], HANDOFF, used)
    assert (saying.altered, saying.defaults) == ({}, {})


def test_every_number_that_a_job_fixes_is_said_to_trl_or_is_the_workers() -> None:
    said = {each.name for each in describe_saying(PORTS["trl"], QLORA, {}).fixed}
    numbers = {
        field.name
        for field in dataclasses.fields(Handoff)
        if not isinstance(getattr(HANDOFF, field.name), str)
    }
    # Validation, its best weights and parity runs are the worker's own, the same for all frameworks. Raw rows are of
    # the native track alone.
    ours = {"evaluate_every", "keep_best", "parity_steps", "lora", "raw"}
    assert numbers - ours <= said
    assert {"schedule", "precision", "lora.rank", "lora.alpha", "lora.dropout", "lora.targets"} <= said


def test_a_long_value_is_cut() -> None:
    assert show_value("x" * 300) == "x" * 199 + "…"
    assert show_value(None) == "null"
