from itertools import chain, islice

import pytest
from train_tiny import TinyDecoder, hash_tensors, make_batch, make_rows, make_spec, sum_loss

from tunesmith.core.errors import DataError, Interrupted, JobError
from tunesmith.core.rundir import RunDir
from tunesmith.training.loop import train
from tunesmith.training.order import EpochOrder, StreamOrder


class Stream:
    """Seven rows a pass, rotated by the epoch; counts what it has to read."""

    def __init__(self):
        self.read = 0

    def rows(self, *, epoch, skip):
        rows = make_rows(7)
        for index in range(7):
            self.read += 1
            if index >= skip:
                yield rows[(index + epoch) % 7]


def take(source, count, position=None):
    return list(islice(source.steps_from(position), count))


def ids(steps):
    return [[row.row_id for row in step.rows] for step in steps]


@pytest.mark.parametrize(
    "source",
    [EpochOrder(make_rows(7), batch_rows=3, seed=1), StreamOrder(Stream(), batch_rows=3, fingerprint="x")],
    ids=["sequence", "stream"],
)
def test_continuing_from_any_position_gives_the_very_same_steps(source):
    # 7 rows in batches of 3 are three steps a pass: 3, 3, 1.
    steps = take(source, 8)
    assert [len(step.rows) for step in steps] == [3, 3, 1, 3, 3, 1, 3, 3]
    assert [step.ends_epoch for step in steps] == [False, False, True] * 2 + [False, False]
    for index in range(7):
        assert ids(take(source, 7 - index, steps[index].position)) == ids(steps[index + 1 :])


def test_every_epoch_has_every_row_once_in_another_order():
    steps = ids(take(EpochOrder(make_rows(7), batch_rows=3, seed=1), 6))
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(row.row_id for row in make_rows(7))


def test_the_fingerprint_changes_with_any_row():
    assert EpochOrder(make_rows(7), batch_rows=3, seed=0).fingerprint() != (
        EpochOrder(make_rows(8)[1:], batch_rows=3, seed=0).fingerprint()
    )


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no training rows"):
        EpochOrder([], batch_rows=3, seed=0)

    class Empty:
        def rows(self, *, epoch, skip):
            return iter(())

    with pytest.raises(DataError, match="has no usable row"):
        take(StreamOrder(Empty(), batch_rows=3, fingerprint="x"), 1)


def test_a_stream_reads_one_batch_ahead_and_no_further():
    stream = Stream()
    take(StreamOrder(stream, batch_rows=2, fingerprint="x"), 1)
    assert stream.read == 4


def stream_run(root, *, stop=0, resume=False, fingerprint="x", **spec):
    import os
    import signal

    def ask(progress):
        if progress.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    model = TinyDecoder(dropout=0.2)
    train(
        model,
        StreamOrder(Stream(), batch_rows=3, fingerprint=fingerprint),
        make_spec(**{"steps": 8, "save_every": "epoch", **spec}),
        RunDir(root).create(),
        make_batch=make_batch,
        loss=sum_loss,
        on_step=ask,
        resume=resume,
    )
    return hash_tensors(dict(model.named_parameters()))


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_streaming_run_continues_exactly(tmp_path, stop):
    whole = stream_run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        stream_run(tmp_path / "cut", stop=stop)
    assert stream_run(tmp_path / "cut", resume=True) == whole


def test_a_stream_of_other_data_is_refused_on_resume(tmp_path):
    with pytest.raises(Interrupted):
        stream_run(tmp_path, stop=2)
    with pytest.raises(JobError, match="training_rows was 'x' and is 'y'"):
        stream_run(tmp_path, resume=True, fingerprint="y")


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(JobError, match=r"train.steps.*data.streaming"):
        stream_run(tmp_path, steps=None)
