"""Rows from every kind of place, and one-line errors for files that are not what they should be."""

import json
from types import SimpleNamespace

import pytest

from tunesmith.core.errors import DataError, TunesmithError
from tunesmith.data.sources import find_sources, mix_rows, read_rows

ROW = '{"text": "hello"}'


def source(path, revision=None):
    return find_sources(SimpleNamespace(path=str(path), revision=revision))


def values(found):
    return [row.value for row in read_rows(found)]


def test_rows_carry_file_and_line(write_lines):
    path = write_lines(ROW, "", ROW)
    rows = list(read_rows(source(path)["train"]))
    assert [row.origin.place for row in rows] == ["train.jsonl:1", "train.jsonl:3"]


def test_json_csv_and_parquet_give_the_same_rows(tmp_path, write_lines):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": "a, b", "output": "c"}, {"instruction": "d\ne", "output": "f"}]
    write_lines(json.dumps(rows), name="r.json")
    (tmp_path / "r.csv").write_text('instruction,output\n"a, b",c\n"d\ne",f\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    write_lines(*map(json.dumps, rows), name="r.jsonl")
    for name in ("r.json", "r.csv", "r.parquet", "r.jsonl"):
        assert values(source(tmp_path / name)["train"]) == rows, name


def test_csv_places_are_lines_of_the_file(tmp_path):
    (tmp_path / "r.csv").write_text('text\n"a\nb"\nc\n')
    assert [row.origin.place for row in read_rows(source(tmp_path / "r.csv")["train"])] == [
        "r.csv:2",
        "r.csv:4",
    ]


def test_messages_survive_csv_and_parquet(tmp_path):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "r.parquet")
    with (tmp_path / "r.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["messages"])
        writer.writerow([json.dumps(messages)])
    assert values(source(tmp_path / "r.parquet")["train"]) == [{"messages": messages}]
    assert values(source(tmp_path / "r.csv")["train"]) == [{"messages": messages}]


def test_a_folder_with_named_files_brings_its_splits(tmp_path, write_lines):
    write_lines(ROW)
    write_lines(ROW, name="valid.jsonl")
    write_lines(ROW, name="test-00000-of-00001.jsonl")
    write_lines("{}", name="schema.json")
    assert sorted(source(tmp_path)) == ["test", "train", "validation"]


def test_a_folder_without_split_names_is_train(tmp_path, write_lines):
    write_lines(ROW, name="a.jsonl")
    write_lines(ROW, ROW, name="b.jsonl")
    found = source(tmp_path)
    assert list(found) == ["train"]
    assert len(values(found["train"])) == 3


def test_a_glob_reads_its_files_in_name_order(tmp_path, write_lines):
    write_lines('{"text": "2"}', name="b.jsonl")
    write_lines('{"text": "1"}', name="a.jsonl")
    assert [row["text"] for row in values(source(tmp_path / "*.jsonl")["train"])] == ["1", "2"]


def test_the_bundled_tickets_bring_three_splits():
    assert sorted(source("tunesmith/tickets")) == ["test", "train", "validation"]


def test_hub_data_without_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TunesmithError) as caught:
        source("someone/some-data-that-is-not-there")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(
        "someone/some-data-that-is-not-there: is neither a local file nor in the hub"
    )
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "bad UTF-8": (b'{"text": "\xff"}', "t.jsonl:2", "is not UTF-8"),
    "NUL": (b'{"text": "\x00"}', "t.jsonl:2", "NUL byte"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "t.jsonl:2", "'text' appears twice"),
    "NaN": (b'{"text": NaN}', "t.jsonl:2", "NaN is not JSON"),
    "Infinity": (b'{"text": -Infinity}', "t.jsonl:2", "Infinity is not JSON"),
    "lone surrogate": (b'{"text": "\\ud800"}', "t.jsonl:2", "lone surrogate"),
    "not an object": (b'["text"]', "t.jsonl:2", "a row that is a list"),
    "a number": (b"7", "t.jsonl:2", "a row that is a number"),
    "overflow": (b'{"text": 1e999}', "t.jsonl:2", "1e999 is too large for a number"),
    "not JSON": (b"hello", "t.jsonl:2", "Expecting value"),
    "50 MB": (b'{"text": "' + b"a" * 50_000_000 + b'"}', "t.jsonl:2", "row is larger than 32 MB"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_line_is_told_in_one_line_and_can_be_skipped(write_lines, name):
    line, place, finding = BAD_FILES[name]
    found = source(write_lines(ROW, line, ROW, name="t.jsonl"))["train"]
    with pytest.raises(DataError) as caught:
        values(found)
    assert str(caught.value).startswith(f"{place}: ")
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    rejected = []
    rows = list(
        read_rows(found, on_bad=lambda origin, raw, error: rejected.append((origin.place, str(error))))
    )
    assert len(rows) == 2
    assert [entry[0] for entry in rejected] == [place]


def test_a_truncated_last_line_is_named(write_lines):
    path = write_lines(ROW, '{"text": "hel', name="t.jsonl", end=b"")
    with pytest.raises(DataError, match=r"t\.jsonl:2: last line is cut off"):
        values(source(path)["train"])


def test_a_byte_order_mark_is_named(write_lines):
    with pytest.raises(DataError, match=r"t\.jsonl:1: starts with a byte order mark"):
        values(source(write_lines(b"\xef\xbb\xbf" + ROW.encode(), name="t.jsonl"))["train"])


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="no rows"):
        values(source(tmp_path / name)["train"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        source("x" * 5000)
    assert "no such file or folder" in str(caught.value)
    with pytest.raises(DataError) as caught:
        source(tmp_path / "gone.jsonl")
    assert "gone.jsonl: no such file or folder" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("t.csv", "a,a\n1,2\n", "t.csv:1: a column name appears twice; columns have different names. Rename"),
        ("t.csv", "a,b\n1\n", "not 2 fields like the header"),
        ("t.csv", 'a,b\n1,2\n3,"4"5\n', "t.csv:3: "),
        ("t.csv", b"a,b\n1,2\n3,\xff\n", "t.csv:3: is not UTF-8"),
        (
            "t.json",
            '[{"a": 1},\n{"a" 2}]',
            "t.json:2: Expecting ':' delimiter at column 6; the file is one JSON",
        ),
        ("t.json", '[{"a": 1e999}]', "1e999 is too large for a number"),
        ("t.json", '{"a": 1}', "not a list of rows"),
        ("t.parquet", "hello", "rule"),
        ("t.txt", "hello", 'Write plain text as rows {"text": ...} of a .jsonl file'),
    ],
)
def test_other_files_that_are_not_what_they_say(tmp_path, name, text, finding):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        values(source(tmp_path / name)["train"])
    assert "on-bad-row" not in str(caught.value) or "fields like the header" in finding
    assert finding in str(caught.value) or (finding == "rule" and "the file is Parquet" in str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_mix_keeps_half_or_repeats_by_content_not_by_order():
    keys = [f"row {n}" for n in range(10)]
    half = {keys[n] for n in mix_rows(keys, weight=0.5, seed=0)}
    backwards = keys[::-1]
    assert half == {backwards[n] for n in mix_rows(backwards, weight=0.5, seed=0)}
    assert len(half) == 5
    twice_and_a_half = mix_rows(keys, weight=2.5, seed=0)
    assert len(twice_and_a_half) == 25
    assert {keys[n] for n in twice_and_a_half if twice_and_a_half.count(n) == 3} == half
    assert half != {keys[n] for n in mix_rows(keys, weight=0.5, seed=1)}
