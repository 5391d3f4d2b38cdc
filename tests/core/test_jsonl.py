"""Strict JSON: everything Python's own reader lets through silently is refused with file and line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import dump_json, parse_json, read_json, read_jsonl, write_json, write_jsonl


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": -1e999}', "-1e999 is too large for a number"),
        (b'{"a": "b', "Unterminated string starting at column 7"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": "\x00"}', "NUL byte"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": 1} {"b": 2}', "text after the JSON value at column 9"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "Expecting value at column 1"),
        (b"1" * 5000, "thousands of digits"),
    ],
)
def test_what_is_not_strict_json_is_refused_in_one_line(raw: bytes, finding: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_json(raw, place="x.jsonl:3")
    message = str(caught.value)
    assert message.startswith("x.jsonl:3: ")
    assert finding in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_a_whole_file_is_told_by_line_and_never_advised_to_skip_rows(tmp_path: Path) -> None:
    for raw, finding in [
        (
            b'[\n{"a": 1},\n{"a" 2}]',
            "x.json:3: Expecting ':' delimiter at column 6; the file is one JSON value",
        ),
        (b'[\n"\x00"]', "x.json:2: contains a NUL byte"),
        (b'[\n\n"\xff"]', "x.json:3: byte 4 is not UTF-8"),
        (b'{"a": 1, "a": 2}', "x.json: key 'a' appears twice; the file is strict JSON"),
    ]:
        with pytest.raises(DataError) as caught:
            parse_json(raw, place="x.json", whole=True)
        assert str(caught.value).startswith(finding)
        assert "on-bad-row" not in str(caught.value)
    (tmp_path / "x.json").write_text('{\n"a": }')
    with pytest.raises(DataError, match=r"x\.json:2: Expecting value at column 6; .*Correct it"):
        read_json(tmp_path / "x.json")


def test_escaped_surrogate_pairs_are_one_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', place="x") == "\U0001f600"


def test_lines_keep_their_numbers_over_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_a_last_line_that_is_cut_off_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "unfin')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: last line is cut off"):
        list(read_jsonl(path))


def test_bad_lines_are_handed_over_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{bad}\n{"a": 3}\n')
    rejected: list[tuple[int, bytes]] = []
    rows = list(read_jsonl(path, on_bad=lambda line, raw, _: rejected.append((line, raw))))
    assert rows == [(1, {"a": 1}), (3, {"a": 3})]
    assert rejected == [(2, b"{bad}\n")]


def test_a_huge_row_is_refused_without_holding_it_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as handle:
        handle.write(b'{"a": 1}\n{"a": "')
        for _ in range(50):
            handle.write(b"x" * 2**20)
        handle.write(b'"}\n{"a": 3}\n')
    rejected: list[str] = []
    tracemalloc.start()
    rows = list(
        read_jsonl(path, max_row_bytes=2**20, on_bad=lambda _line, _raw, error: rejected.append(str(error)))
    )
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [line for line, _ in rows] == [1, 3]
    assert "rows.jsonl:2: row is larger than 1 MB" in rejected[0]
    assert peak_bytes < 8 * 2**20


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file or directory"):
        list(read_jsonl(Path("nowhere.jsonl")))


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    value = {"text": "ä \U0001f600 \u2028", "n": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_jsonl(tmp_path / "a.jsonl", [value, value])
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == [value, value]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl"]


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"loss": float("nan")})
