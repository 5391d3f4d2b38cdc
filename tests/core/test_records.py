"""Records survive the disk, and a record of another shape is refused by name."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import DataError, Interrupted, JobError
from tunesmith.core.fingerprint import describe_hardware, describe_versions, hash_row, hash_rows
from tunesmith.core.records import AnswerRecord, StepRecord

STEP = StepRecord(
    step=3, epoch=0.5, loss=1.25, grad_norm=0.5, learning_rate=1e-4, num_tokens=10, num_target_tokens=4,
    step_seconds=0.1, peak_bytes=1,
)  # fmt: skip


def test_a_record_reads_back_equal() -> None:
    assert StepRecord.from_json(STEP.to_json()) == STEP


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"schema": 2}, "record schema 2"),
        ({"extra": 1}, "unknown record field 'extra'"),
        ({"schema": None}, "None"),
    ],
)
def test_another_shape_is_refused(change: dict[str, object], finding: str) -> None:
    with pytest.raises(DataError, match=finding):
        StepRecord.from_json({**STEP.to_json(), **change}, place="steps.jsonl:1")


def test_a_missing_field_is_refused() -> None:
    value = STEP.to_json()
    del value["loss"]
    with pytest.raises(DataError, match="loss"):
        StepRecord.from_json(value)


def test_answer_defaults_are_not_shared_between_rows() -> None:
    first, second = (
        AnswerRecord(row=n, row_id="", place="", cluster="", question="", truth="") for n in (0, 1)
    )
    assert first.scores is not second.scores


def test_row_hashes_tell_ids_masks_and_order_apart() -> None:
    hashes = {hash_row([1, 2, 3], [0, 1, 1]), hash_row([1, 2, 3], [0, 0, 1]), hash_row([1, 3, 2], [0, 1, 1])}
    assert len(hashes) == 3
    assert hash_row([1, 2, 3], [0, 1, 1]) == hash_row((1, 2, 3), bytes([0, 1, 1]))
    assert hash_rows(["a", "b"]) != hash_rows(["b", "a"])


def test_versions_and_hardware_are_described_without_importing_torch() -> None:
    assert describe_versions()["python"].startswith("3.")
    assert describe_hardware()["cores"] >= 1


def test_an_error_is_one_line_of_place_finding_rule_cure() -> None:
    error = JobError("job.yaml:4", "unknown key\n 'x'", rule="keys are fixed", cure="Remove it")
    assert str(error) == "job.yaml:4: unknown key 'x'; keys are fixed. Remove it"


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_interruptions_exit_with_128_plus_the_signal(number: int, code: int) -> None:
    assert Interrupted("run", "stopped", signal_number=number).exit_code == code
