"""Batches made ahead of time are those made in time: same order, same losses, same errors, same resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from train_tiny import (
    TinyDecoder,
    hash_tensors,
    make_batch,
    make_rows,
    make_spec,
    measure_distance,
    run_tiny,
    sum_loss,
)

from tunesmith.core.errors import DataError
from tunesmith.core.rundir import RunDir
from tunesmith.training import step as step_module
from tunesmith.training.feed import Feed, StepsAhead
from tunesmith.training.order import EpochOrder, StepRows

CPU = torch.device("cpu")
SPEC = {"epochs": 2.5, "evaluate_every": 3, "save_every": 2, "learning_rate": 0.05, "micro_batch_tokens": 20}


@pytest.fixture(params=[False, True], ids=["in time", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The same test without the thread, which a CPU does not use by itself, and with it."""
    monkeypatch.setattr(step_module, "Feed", partial(Feed, ahead=request.param))
    return request.param


def train_once(root: Path, **more: object) -> tuple[str, list[str]]:
    """Hash of the trained weights, and the losses of all steps as they were logged."""
    model = TinyDecoder(dropout=0.2)
    run_tiny(root, make_spec(**SPEC), model=model, evaluate=lambda: measure_distance(model), **more)
    lines = RunDir(root).steps.read_text().splitlines()
    return hash_tensors(dict(model.named_parameters())), [line.split('"learning_rate"')[0] for line in lines]


def test_a_run_ahead_is_the_run_in_time_bit_for_bit(tmp_path, monkeypatch):
    in_time = train_once(tmp_path / "a")
    monkeypatch.setattr(step_module, "Feed", partial(Feed, ahead=True))

    assert train_once(tmp_path / "b") == in_time


def test_a_run_ahead_that_is_interrupted_resumes_where_the_rows_were(tmp_path, ahead):
    whole = train_once(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_seven(progress):
        if progress.step == 7:
            raise Stop

    with pytest.raises(Stop):
        train_once(tmp_path / "cut", on_step=stop_after_seven)
    # The checkpoint is that of step 6; rows of step 8 may have been read already.
    assert train_once(tmp_path / "cut", resume=True)[0] == whole[0]


def test_running_out_of_memory_repeats_the_step_with_the_same_result(tmp_path, ahead):
    def loss(model, batch):
        if batch[0].numel() > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum_loss(model, batch)

    outcome = run_tiny(tmp_path / "a", make_spec(), loss=loss)
    expected = run_tiny(tmp_path / "b", make_spec(micro_batch_tokens=outcome.micro_batch_tokens))

    assert outcome.loss == pytest.approx(expected.loss, rel=1e-4)
    assert any("out of memory, repeated" in warning for warning in outcome.warnings)


class SlowFeed(Feed):
    """Comes to its work when the main thread has gone on to the next step."""

    def _make(self, choose_rows):
        time.sleep(0.02)
        return super()._make(choose_rows)


@pytest.mark.parametrize("kind", [Feed, SlowFeed])
def test_only_the_first_batch_of_a_run_is_made_while_the_device_waits(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(step_module, "Feed", partial(kind, ahead=True))
    makers: list[str] = []

    def note(rows, device):
        makers.append(threading.current_thread().name)
        return make_batch(rows, device)

    run_tiny(tmp_path, make_spec(micro_batch_tokens=20), make_batch=note)

    assert len(makers) > 12  # steps of several micro-batches
    assert [name.startswith("feed") for name in makers] == [False] + [True] * (len(makers) - 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_a_row_that_cannot_be_read_fails_its_own_step_and_is_named(tmp_path, ahead):
    class Torn(EpochOrder):
        def steps_from(self, position) -> Iterator[StepRows]:
            for number, step in enumerate(super().steps_from(position), 1):
                if number == 4:
                    raise DataError("train.jsonl:17", "is not JSON")
                yield step

    seen: list[int] = []
    source = Torn(make_rows(22), batch_rows=4, seed=0)
    with pytest.raises(DataError, match=r"train.jsonl:17: is not JSON"):
        run_source(tmp_path, source, lambda progress: seen.append(progress.step))
    assert seen == [1, 2, 3]


def run_source(root: Path, source: EpochOrder, on_step) -> None:
    from tunesmith.training.loop import train

    run_dir = RunDir(root).create()
    with run_dir.lock():
        train(
            TinyDecoder(), source, make_spec(), run_dir, make_batch=make_batch, loss=sum_loss, on_step=on_step
        )


def test_a_batch_that_cannot_be_made_fails_in_the_main_thread_and_names_its_row(tmp_path, ahead):
    def refuse(rows, device):
        if bad := [row for row in rows if row.origin.place == "train.jsonl:9"]:
            raise ValueError(f"{bad[0].origin.place}: the first token is a target")
        return make_batch(rows, device)

    with pytest.raises(ValueError, match=r"train.jsonl:9: the first token") as caught:
        run_tiny(tmp_path, make_spec(), make_batch=refuse)
    assert any(entry.name == "_run_micro_batches" for entry in caught.traceback)


def make_steps(read: list[int]) -> Iterator[StepRows]:
    for number in range(100):
        read.append(number)
        yield StepRows(rows=make_rows(2), epoch=0.0, ends_epoch=False, position={"row": number})


def test_a_step_that_was_read_ahead_is_the_step_that_is_taken():
    read: list[int] = []
    ahead = StepsAhead(make_steps(read))
    for number in range(3):
        assert ahead.read(number).position == {"row": number}
        assert ahead.read(number + 1).position == {"row": number + 1}
        # A background thread that comes late meets a step that has been taken already.
        assert ahead.read(number).position == {"row": number}
    assert read == [0, 1, 2, 3]


def test_nothing_is_read_beyond_the_last_step(tmp_path, monkeypatch, ahead):
    taken: list[int] = []

    class Counted(EpochOrder):
        def steps_from(self, position):
            for step in super().steps_from(position):
                taken.append(len(taken))
                yield step

    steps: list[int] = []
    run_source(
        tmp_path, Counted(make_rows(22), batch_rows=4, seed=0), lambda progress: steps.append(progress.step)
    )
    assert len(taken) == len(steps)


def test_a_batch_begun_of_other_rows_is_not_used():
    feed = Feed(lambda rows, device: [row.origin.place for row in rows], CPU, ahead=True)
    rows = make_rows(4)
    try:
        feed.begin(lambda: rows[:2])
        assert feed.take(rows[2:]) == ["train.jsonl:3", "train.jsonl:4"]
        feed.begin(lambda: rows[:2])
        assert feed.take([rows[0], rows[1]]) == ["train.jsonl:1", "train.jsonl:2"]
        feed.begin(lambda: None)
        assert feed.take(rows[:1]) == ["train.jsonl:1"]
    finally:
        feed.close()
