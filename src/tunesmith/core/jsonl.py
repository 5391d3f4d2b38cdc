"""Strict JSON and JSONL: what Python's `json` lets through silently is refused with file and line.

Refused: bad UTF-8, NUL bytes, duplicate keys, NaN, Infinity and numbers that overflow to it, lone surrogates, a
truncated last line, rows above `max_row_bytes`. A UTF-8 byte order mark at the start of a file is refused too: read
literally it would become part of the first key.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from tunesmith.core.errors import DataError, ModelError

MAX_ROW_BYTES = 32 * 1024 * 1024
# The end of a cure, where the fault is one row's.
OR_SKIP = ", or pass --on-bad-row skip"
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Bad(ValueError):
    """A finding inside one JSON document, before file and line are known."""


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Bad(f"key {key!r} appears twice")
            seen.add(key)
    return row


def _reject_constant(name: str) -> NoReturn:
    raise _Bad(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Bad(f"{text[:20]} is too large for a number")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant, parse_float=_parse_float
)


def parse_json(raw: bytes, *, place: str, whole: bool = False) -> Any:
    """Parse one JSON document strictly. Raises DataError naming `place`.

    whole: a file and not one line of it; `place` then gets the line of the fault where that is known.
    """
    subject = "the file is" if whole else "every line is"
    cure = "Repair the file" if whole else f"Repair the line{OR_SKIP}"

    def at(byte: int) -> str:
        line = raw.count(b"\n", 0, byte) + 1
        return f"{place}:{line}" if whole else place

    if raw.startswith(b"\xef\xbb\xbf"):
        raise DataError(
            place, "starts with a byte order mark", rule="JSON is plain UTF-8", cure="Save it without BOM"
        )
    if (byte := raw.find(b"\x00")) >= 0:
        raise DataError(at(byte), "contains a NUL byte", rule="JSON is text", cure=cure)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            at(error.start),
            f"byte {error.start} is not UTF-8",
            rule="JSON is UTF-8",
            cure="Convert the file to UTF-8",
        ) from None
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
        if text[end:].strip(" \t\r\n"):
            raise _Bad(f"text after the JSON value at column {end + 1}")
    except _Bad as error:
        raise DataError(place, str(error), rule=f"{subject} strict JSON", cure=cure) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}:{error.lineno}" if whole else place,
            f"{error.msg.removesuffix(' at')} at column {error.colno}",
            rule=f"{subject} one JSON value",
            cure=cure,
        ) from None
    except ValueError:  # Python refuses to convert integers of more than 4,300 digits
        raise DataError(
            place,
            "holds a number of thousands of digits",
            rule="whole numbers have at most 4,300 digits",
            cure=cure,
        ) from None
    except RecursionError:
        raise DataError(place, "nested too deeply", rule=f"{subject} shallow JSON", cure=cure) from None
    # json only makes lone surrogates from \ud800-style escapes, so plain rows skip the deep scan.
    if "\\u" in text and _has_surrogate(value):
        raise DataError(place, "contains a lone surrogate escape", rule="text is valid Unicode", cure=cure)
    return value


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in cast("dict[str, Any]", value).items())
    if isinstance(value, list):
        return any(_has_surrogate(v) for v in cast("list[Any]", value))
    return False


def read_jsonl(
    path: Path,
    *,
    name: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    on_bad: Callable[[int, bytes, DataError], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each non-blank line, in constant memory.

    name: how errors call the file (default: its path).
    on_bad: gets (line, raw bytes, error) of a bad line, and reading goes on; without it the error is raised.
    """
    label = name or str(path)
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(label, error.strerror or str(error), cure="Check the path") from None
    with handle:
        for number, raw in _numbered_lines(handle, max_row_bytes):
            if raw is not None and not raw.strip():
                continue
            place = f"{label}:{number}"
            try:
                if raw is None:
                    raise DataError(
                        place,
                        f"row is larger than {max_row_bytes // 2**20} MB",
                        rule="one row fits one training example",
                        cure="Split the row",
                    )
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raise DataError(
                        place,
                        "starts with a byte order mark",
                        rule="JSONL is plain UTF-8",
                        cure="Save it without BOM",
                    )
                try:
                    value = parse_json(raw, place=place)
                except DataError as error:
                    if raw.endswith(b"\n") or not error.finding.startswith(
                        ("Unterminated", "Expecting", "Invalid")
                    ):
                        raise
                    raise DataError(
                        place,
                        f"last line is cut off ({error.finding})",
                        rule="every line is one JSON value",
                        cure="Write the file again; it is incomplete",
                    ) from None
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(number, raw or b"", error)
                continue
            yield number, value


def _numbered_lines(handle: Any, max_row_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines with numbers; None stands for a line above the limit, skipped without holding it in memory."""
    number = 0
    while raw := handle.readline(max_row_bytes + 1):
        number += 1
        if len(raw) > max_row_bytes:
            while raw and not raw.endswith(b"\n"):
                raw = handle.readline(max_row_bytes)
            yield number, None
        else:
            yield number, raw


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the parent: after a crash the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text that `parse_json` accepts: NaN and Infinity raise ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document atomically."""
    write_bytes_atomic(path, (dump_json(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read one JSON document strictly. Raises DataError if it is missing or bad."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), cure="Check the path") from None
    try:
        return parse_json(raw, place=str(path), whole=True)
    except DataError as error:
        raise DataError(
            error.place,
            error.finding,
            rule="the file is one strict JSON value",
            cure="Correct it, or have it made again",
        ) from None


def read_settings(path: Path) -> dict[str, Any]:
    """One JSON file of a model or adapter folder. Raises ModelError naming it, if it is not one strict JSON object."""
    cure = "Correct it, or fetch the model's files again"
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(
            error.place, error.finding, rule="a model's settings are strict JSON", cure=cure
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            str(path), "is no JSON object", rule="a model's settings are one JSON object", cure=cure
        )
    return cast("dict[str, Any]", value)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows atomically, one JSON value a line."""
    write_bytes_atomic(path, "".join(dump_json(row) + "\n" for row in rows).encode())
