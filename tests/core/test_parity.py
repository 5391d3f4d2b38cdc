"""Parity records survive the disk; one that a framework's worker got wrong is refused by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.parity import Example, Parameter, ParameterGroup, ParityRecord, ParityStep

RECORD = ParityRecord(
    framework="trl",
    versions={"trl": "1.16.0"},
    precision="float32",
    steps=(ParityStep((Example("ab", 3, 2), Example("cd", 4, 1, 1)), 1.5, None, (0.1, 0.1), 1.0),),
    parameters=(Parameter("model.norm.weight", (8,), "float32", 0.0),),
    groups=(ParameterGroup("adamw", ("model.norm.weight",), 0.0, 0.9, 0.999, 1e-8),),
)


def as_json() -> Any:
    return json.loads(json.dumps(RECORD.to_json()))


def test_a_record_reads_back_equal() -> None:
    assert ParityRecord.from_json(as_json()) == RECORD


def test_what_could_not_be_seen_stays_unseen() -> None:
    value = as_json()
    value["steps"][0]["examples"] = value["parameters"] = None

    record = ParityRecord.from_json(value)
    assert record.steps[0].examples is None
    assert record.parameters is None


@pytest.mark.parametrize(
    ("path", "wrong", "finding"),
    [
        (("steps", 0, "loss"), "low", r"steps\[0\]\.loss: is 'low'; it is a number"),
        (("steps", 0, "examples", 1, "num_tokens"), 4.0, r"steps\[0\]\.examples\[1\]\.num_tokens: is '4\.0'"),
        (("steps", 0, "examples", 0, "num_tokens"), True, "is 'True'; it is a whole number"),
        (("parameters", 0, "std"), float("nan"), "std: is 'nan'"),
        (("groups", 0), {}, r"groups\[0\]: has no 'beta1'"),
        (("steps",), "none", "steps: is 'none'; it is a list"),
        (("schema",), 9, "this version reads schema 1"),
    ],
)
def test_a_malformed_record_is_refused_by_field(path: tuple[Any, ...], wrong: Any, finding: str) -> None:
    value = as_json()
    target = value
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = wrong

    with pytest.raises(DataError, match=finding):
        ParityRecord.from_json(value, place="parity.json")


def test_no_record_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="is no parity record"):
        ParityRecord.from_json([1, 2])
