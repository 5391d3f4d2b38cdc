"""`check` and `preview` of a stream: what they say of rows in memory, they say of streamed rows."""

import json

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.collect import Rejects
from tunesmith.data.survey import check, first_rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def count(number):
    words = " ".join(f"cat{n}" for n in range(number, number + 15))
    return {"prompt": f"say {words}?", "completion": f" {words}"}


@pytest.fixture
def sources(tmp_path):
    """40 training rows, a repeat, one too long; a test split with an equal row, a near one and a new one."""
    long_row = {"prompt": "a", "completion": "the log " * 200}
    train = [*(count(100 * n) for n in range(40)), count(0), long_row]
    near = {"prompt": count(100)["prompt"], "completion": count(100)["completion"] + " too"}
    return {
        "train": write_rows(tmp_path / "train.jsonl", train),
        "split": {
            "validation": 0.0,
            "test": write_rows(tmp_path / "test.jsonl", [count(0), near, count(90_000)]),
        },
        "max_tokens": 400,
    }


def test_a_streams_report_is_that_of_the_same_rows_in_memory(sources, make_job, chat_tokenizer):
    held = check(make_job(**sources), tokenizer=chat_tokenizer)
    streamed = check(make_job(**sources, streaming=True), tokenizer=chat_tokenizer)
    assert list(streamed.splits) == ["train", "test"]
    ours, theirs = streamed.splits["train"], held.splits["train"]
    assert (ours.num_rows, ours.num_exact_duplicates, ours.num_dropped) == (40, 1, 1)
    for name in ours.__slots__:
        if name not in ("num_clusters", "num_near_duplicates"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert streamed.overlap == held.overlap
    assert streamed.overlap["test"].num_exact == 1
    assert streamed.overlap["test"].num_near == 2
    assert [source.name for source in streamed.sources] == ["train.jsonl", "test.jsonl"]
    assert "streamed" in {finding.code for finding in streamed.findings}


def test_bad_rows_of_a_stream_are_refused_or_counted(sources, make_job, chat_tokenizer, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": 1}\n')
    job = make_job(**sources, streaming=True)
    with pytest.raises(DataError, match=r"train\.jsonl:43"):
        check(job, tokenizer=chat_tokenizer)
    report = check(job, tokenizer=chat_tokenizer, on_bad_row="skip")
    assert report.sources[0].num_rejected == 1
    assert report.splits["train"].num_rows == 40


def test_the_first_rows_of_a_stream_come_in_the_order_of_the_file(sources, make_job, chat_tokenizer):
    data = make_job(**sources, streaming=True).data
    rows = first_rows(data, chat_tokenizer, 3, Rejects(None))
    assert [row.origin.place for row in rows] == [f"train.jsonl:{n}" for n in (1, 2, 3)]
