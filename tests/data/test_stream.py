"""Streaming gives every row once, resumes exactly, and does not grow."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.prepare import prepare_data
from tunesmith.data.stream import HashSet, open_stream

NUM_ROWS = 200


def row(number):
    return json.dumps({"prompt": f"number {number}?", "completion": f" it is {number}"})


@pytest.fixture
def stream(write_lines, make_job, chat_tokenizer):
    """Opens a stream over 200 different rows, 10 of which stand twice."""

    def open_(lines=None, **data):
        path = write_lines(*(lines or [row(n) for n in [*range(NUM_ROWS), *range(10)]]))
        options = {"split": {"validation": 0.0, "test": 0.0}, "streaming": True, "shuffle_window": 32, **data}
        return open_stream(make_job(train=str(path), **options).data, tokenizer=chat_tokenizer, seed=3)

    return open_


def test_each_row_comes_once_and_repeats_are_dropped(stream):
    found = stream()
    places = Counter(r.origin.place for r in found.rows())
    assert places == Counter(f"train.jsonl:{n + 1}" for n in range(NUM_ROWS))
    assert found.facts.num_exact_duplicates == 10
    assert found.num_taken == NUM_ROWS


def test_rows_are_shuffled_within_the_window_by_seed_and_epoch(stream):
    first = [r.origin.index for r in stream().rows(epoch=0)]
    assert first == [r.origin.index for r in stream().rows(epoch=0)]
    assert first != [r.origin.index for r in stream().rows(epoch=1)]
    assert first != sorted(first)
    # A row cannot come before the window has reached it.
    assert all(index <= position + 32 + 1 for position, index in enumerate(first))


@pytest.mark.parametrize("taken", [0, 1, 31, 150, 199])
def test_a_resumed_stream_goes_on_with_the_same_rows(stream, taken):
    whole = [r.row_id for r in stream().rows()]
    assert [r.row_id for r in stream().rows(skip=taken)] == whole[taken:]


def test_rows_that_are_too_long_are_dropped_and_counted(stream):
    long_row = json.dumps({"prompt": "a", "completion": "the log " * 200})
    found = stream([row(1), long_row, row(2)], max_tokens=60)
    assert [r.origin.index for r in found.rows()].count(2) == 0
    assert found.facts.num_dropped == 1


def test_held_out_splits_are_named_files(stream, write_lines, make_job, chat_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"data\.split\.validation: streaming cannot cut a share of the rows"):
        stream(split={"validation": 0.1, "test": 0.0})
    held_out = write_lines(row(1000), row(1001), name="held_out.jsonl")
    train = write_lines(row(1))
    job = make_job(train=str(train), split={"validation": str(held_out), "test": 0.0}, streaming=True)
    prepared = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "prepared")
    assert prepared.splits == ("validation",)
    assert len(prepared.rows("validation")) == 2


def test_a_json_list_cannot_be_streamed(write_lines, make_job, chat_tokenizer):
    path = write_lines(f"[{row(1)}]", name="train.json")
    job = make_job(train=str(path), split={"validation": 0.0, "test": 0.0}, streaming=True)
    with pytest.raises(DataError, match=r"a \.json file cannot be streamed"):
        open_stream(job.data, tokenizer=chat_tokenizer)


def test_the_hash_set_remembers_what_it_was_given():
    found = HashSet()
    values = [0, 1, 2**64 - 1, *range(5000, 5000 * 17, 17)]
    assert [found.add(value) for value in values] == [True, False, *[True] * (len(values) - 2)], (
        "0 and 1 share a slot"
    )
    assert not any(found.add(value) for value in values)
    assert len(found) == len(values) - 1


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("TUNESMITH_STREAM_GB"), reason="set TUNESMITH_STREAM_GB to the size to stream"
)
@pytest.mark.timeout(0)
def test_memory_stays_flat_over_a_large_file(tmp_path, chat_folder):
    size = float(os.environ["TUNESMITH_STREAM_GB"]) * 1e9
    code = textwrap.dedent(
        """
        import json, os, resource, sys, time
        from tunesmith.data.stream import open_stream
        from tunesmith.data.tokenizer import load_tokenizer
        from tunesmith.job.spec import DataSpec

        path, model, size = sys.argv[1], sys.argv[2], float(sys.argv[3])
        # Most of a row is a field that training does not use: reading is what must not grow.
        filler = "where it came from " * 800

        def write(path):
            number = 0
            with open(path, "w") as handle:
                while handle.tell() < size:
                    for _ in range(1000):
                        number += 1
                        text = f"the cat {number} sat on the mat {number} " * 30
                        row = {"prompt": f"number {number}?", "completion": text, "source": filler}
                        handle.write(json.dumps(row) + "\\n")
        write(path)
        data = DataSpec(train=path, split={"validation": 0, "test": 0}, streaming=True, max_tokens=4096)
        stream = open_stream(data, tokenizer=load_tokenizer(model))
        samples, started = [], time.monotonic()
        for number, row in enumerate(stream.rows()):
            if number % 5000 == 0:
                pages = int(open("/proc/self/statm").read().split()[1])
                samples.append(pages * resource.getpagesize() // 2**20)
        print(json.dumps({"rows": number + 1, "seconds": time.monotonic() - started, "mb": samples}))
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.jsonl"), str(chat_folder), str(size)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    print(found)
    settled = found["mb"][1:]
    assert max(settled) - settled[0] < 48, "a window, a batch and 8 bytes a row"
