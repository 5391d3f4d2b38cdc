"""What our own engine says of its first steps is what its training does, row for row and number for number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.api.parity import list_examples, run_parity_task, split_rows
from tunesmith.api.tasks import TrainTask
from tunesmith.core.events import ignore_event
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.parity import ParityRecord
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Origin, TokenRow
from tunesmith.data.prepare import load_prepared
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import Job, ModelSpec
from tunesmith.models.layout import make_batch
from tunesmith.training.order import order_rows


def token_row(ids: list[int], mask: list[int]) -> TokenRow:
    return TokenRow(ids, mask, Origin("x:1", "x", 0), hash_row(ids, mask))


@pytest.mark.parametrize("share_prefix", [False, True])
def test_rows_are_told_apart_again(share_prefix: bool) -> None:
    # Ten tokens alike are enough to be stored once; the stream is filled up to 64 with documents that are no rows.
    rows = [token_row([*range(10), 20 + n, 30 + n], [0] * 10 + [1, n % 2]) for n in range(3)]
    batch = make_batch(rows, round_tokens=64, share_prefix=share_prefix)

    assert bool(batch.layout.shared) is share_prefix
    assert split_rows(batch) == [(list(row.ids), list(row.mask)) for row in rows]


def test_rows_stand_in_the_order_of_their_step_and_strangers_last() -> None:
    first, second, empty = token_row([1, 2], [0, 1]), token_row([3, 4], [0, 1]), token_row([5, 6], [0, 0])
    seen = [([9, 9], [0, 1]), ([3, 4], [0, 1]), ([1, 2], [0, 1])]

    digests = [example.digest for example in list_examples([first, second, empty], seen)]
    assert digests == [first.row_id, second.row_id, empty.row_id, hash_row([9, 9], [0, 1])]


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2}, "full"], ids=["lora", "full"])
def test_the_record_is_of_the_steps_that_training_takes(tmp_path: Path, method: Any) -> None:
    job: dict[str, Any] = {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": method,
        "train": {
            "steps": 3, "batch_rows": 3, "learning_rate": 1e-3, "evaluate_every": "never", "precision": "fp32",
            "weight_decay": 0.1,
        },
    }  # fmt: skip
    tunesmith.train(job, out=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    base = resolve_model(ModelSpec(name="tunesmith/tiny"))
    task = TrainTask(
        label="lora parity", job=read_json(run.job), out=str(tmp_path / "parity"), prepared=str(run.prepared),
        model_folder=str(base.folder), model_name=base.name, revision=None, key="", parity_steps=2,
    )  # fmt: skip

    run_parity_task(task, ignore_event)

    record = ParityRecord.from_json(read_json(tmp_path / "parity" / "parity.json"))
    taken = [line for _, line in read_jsonl(run.steps)][:2]
    assert [(s.loss, s.grad_norm, *(s.learning_rates or ())[:1]) for s in record.steps] == [
        (line["loss"], line["grad_norm"], line["learning_rate"]) for line in taken
    ]
    order = order_rows(load_prepared(run.prepared).rows("train"), batch_rows=3, seed=0).steps_from(None)
    assert [[e.digest for e in s.examples or ()] for s in record.steps] == [
        [row.row_id for row in next(order).rows] for _ in record.steps
    ]
    assert record.state_dtypes == ("float32",)
    assert sum(_size(p.shape) for p in record.parameters or ()) == read_json(run.record)["trained_parameters"]
    assert [group.weight_decay for group in record.groups or ()] == [0.1] + [0.0] * (method == "full")
    assert Job.model_validate(task.job).train.steps == 3


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
