"""Where rows come from: bundled names, files, folders, globs and hub ids; each row with its place.

A source is read lazily, row by row. A folder or hub data set may bring its own splits (`train`, `validation`, `test`).
"""

from __future__ import annotations

import csv
import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from tunesmith.core.bundled import bundled_path
from tunesmith.core.errors import DataError, SetupError
from tunesmith.core.jsonl import MAX_ROW_BYTES, parse_json, read_jsonl
from tunesmith.core.types import Origin
from tunesmith.data.formats import RawRow
from tunesmith.data.hub import drop_nulls, is_hub_id, list_hub_splits, read_hub
from tunesmith.data.turns import SKIP_CURE, name_type

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "heldout": "test",
}
OnBad = Callable[[Origin, Any, DataError], None]


class SourceLike(Protocol):
    """The part of the job's source spec that reading uses."""

    @property
    def path(self) -> str: ...
    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """One split of one source, found but not read.

    files: what to read; empty for a hub data set, which then has `hub` (id, split).
    name:  how rows call it in their places.
    """

    name: str
    split: str
    files: tuple[Path, ...] = ()
    hub: tuple[str, str] | None = None
    revision: str | None = None


def find_sources(source: SourceLike) -> dict[str, Source]:
    """The splits of a source: at least `train`, and `validation` and `test` if it brings them.

    Raises DataError if nothing is there; SetupError if a hub data set needs the `hub` extra.
    """
    text = source.path
    folder = bundled_path(text)
    if folder is not None:
        if not folder.is_dir():
            raise DataError(text, "the bundled data is missing", cure="Reinstall tunesmith")
        return _find_in_folder(folder, text)
    path = Path(text).expanduser()
    if os.path.isdir(path):  # unlike Path's, never raises (names too long, NUL)
        return _find_in_folder(path, text)
    if os.path.isfile(path):
        return {"train": Source(path.name, "train", (_check_suffix(path),))}
    if glob.has_magic(text):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(
                text, "matches no file", rule="a glob names at least one file", cure="Check the pattern"
            )
        return {"train": Source(text, "train", tuple(_check_suffix(file) for file in files))}
    if is_hub_id(text):
        splits, revision = list_hub_splits(text, revision=source.revision)
        return {
            _SPLIT_WORDS.get(ours, ours): Source(text, ours, hub=theirs, revision=revision)
            for ours, theirs in splits.items()
        }
    raise DataError(
        text,
        "no such file or folder",
        rule="a source is a bundled name, file, folder, glob or hub id",
        cure="Check the path",
    )


def _check_suffix(path: Path) -> Path:
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(
            str(path),
            f"a {path.suffix or 'nameless'} file",
            rule=f"rows are read from {', '.join(_SUFFIXES)}",
            cure='Write plain text as rows {"text": ...} of a .jsonl file',
        )
    return path


def _find_in_folder(folder: Path, name: str) -> dict[str, Source]:
    """A folder's rows: files named after splits are those splits, otherwise all files are `train`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(name, f"no {', '.join(_SUFFIXES)} file in this folder", cure="Check the path")
    named: dict[str, list[Path]] = {}
    for file in files:
        if (word := _split_word(file, folder)) is not None:
            named.setdefault(word, []).append(file)
    if "train" not in named:
        if named:
            raise DataError(
                name,
                f"files for {' and '.join(sorted(named))} but none for train",
                rule="a folder with named splits has train.jsonl (or .json, .csv, .parquet)",
            )
        named = {"train": files}
    return {split: Source(name, split, tuple(paths)) for split, paths in named.items()}


def _split_word(file: Path, folder: Path) -> str | None:
    """`train.jsonl`, `train-00000-of-00002.parquet` and `train/part.jsonl` belong to train."""
    for part in (file.stem, *(parent.name for parent in file.relative_to(folder).parents)):
        word = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def read_rows(source: Source, *, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    """Rows of one split in order, in constant memory for .jsonl, .csv and .parquet.

    on_bad: gets the origin, the row (bytes where it is no JSON) and the error of one that cannot be read; without it
            the error is raised.
    """
    if source.hub is not None:
        for number, value in enumerate(read_hub(*source.hub, revision=source.revision), 1):
            place = f"{source.name}:{source.split}:{number}"
            yield RawRow(value, Origin(place, source.name, number))
        return
    for path in source.files:
        label = path.name if len(source.files) == 1 else str(path)
        yield from _read_file(path, label, source.name, on_bad)


def _read_file(path: Path, label: str, source: str, on_bad: OnBad | None) -> Iterator[RawRow]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    empty = True
    for number, value, error in readers[path.suffix.lower()](path, label):
        empty = False
        origin = Origin(f"{label}:{number}", source, number)
        if error is None and not isinstance(value, dict):
            error = DataError(
                origin.place,
                f"a row that is {name_type(value)}",
                rule="a row is a JSON object",
                cure=SKIP_CURE,
            )
        if error is not None:
            if on_bad is None:
                raise error
            on_bad(origin, value, error)
            continue
        yield RawRow(cast("dict[str, Any]", value), origin)
    if empty:
        raise DataError(label, "no rows", rule="a source has at least one row", cure="Check the file")


_Numbered = Iterator[tuple[int, Any, DataError | None]]


def _read_jsonl(path: Path, label: str) -> _Numbered:
    bad: list[tuple[int, bytes, DataError]] = []

    def keep(number: int, raw: bytes, error: DataError) -> None:
        bad.append((number, raw, error))

    for number, value in read_jsonl(path, name=label, on_bad=keep):
        yield from _take_all(bad)
        yield number, value, None
    yield from _take_all(bad)


def _take_all(bad: list[tuple[int, bytes, DataError]]) -> _Numbered:
    yield from bad
    bad.clear()


def _read_json(path: Path, label: str) -> _Numbered:
    """One JSON list of rows; `{"data": [...]}` is read too. Held in memory as a whole."""
    value = parse_json(_read_bytes(path, label), place=label, whole=True)
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        keys = [key for key, item in items.items() if isinstance(item, list)]
        value = items[keys[0]] if len(keys) == 1 else items
    if not isinstance(value, list):
        raise DataError(
            label,
            "not a list of rows",
            rule="a .json file holds one list",
            cure="Use .jsonl for one row a line",
        )
    for number, row in enumerate(cast("list[Any]", value), 1):
        yield number, row, None


def _read_bytes(path: Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(label, error.strerror or str(error), cure="Check the path") from None


def _read_csv(path: Path, label: str) -> _Numbered:
    """Rows by the header's names; the number is that of the row's first line."""
    csv.field_size_limit(MAX_ROW_BYTES)
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            if handle.read(1) == "\ufeff":
                raise DataError(
                    label,
                    "starts with a byte order mark",
                    rule="CSV is plain UTF-8",
                    cure="Save it without BOM",
                )
            handle.seek(0)
            reader = csv.DictReader(handle, strict=True)
            if reader.fieldnames and len(set(reader.fieldnames)) != len(reader.fieldnames):
                raise DataError(
                    f"{label}:1",
                    "a column name appears twice",
                    rule="columns have different names",
                    cure="Rename one of them",
                )
            line = reader.line_num + 1
            for row in reader:
                error = None
                if None in row or None in row.values():
                    error = DataError(
                        f"{label}:{line}",
                        f"not {len(reader.fieldnames or ())} fields like the header",
                        rule="every row has the header's fields",
                        cure=SKIP_CURE,
                    )
                yield line, {key: _read_cell(value) for key, value in row.items()}, error
                line = reader.line_num + 1
    except UnicodeDecodeError:
        raise DataError(
            f"{label}:{_find_undecodable(path)}",
            "is not UTF-8",
            rule="rows are UTF-8",
            cure="Convert the file to UTF-8",
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{label}:{line}", str(error), rule="the file is CSV with a header", cure="Repair the file"
        ) from None
    except OSError as error:
        raise DataError(label, error.strerror or str(error), cure="Check the path") from None


def _find_undecodable(path: Path) -> int:
    """The first line that is not UTF-8, from 1. A reader of text only knows how far into its own buffer it came."""
    number = 1
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _read_cell(value: Any) -> Any:
    """A cell that holds a JSON list or object (`messages` saved to CSV) is read as such."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}" and value:
        try:
            parsed = parse_json(value.encode(), place="")
        except DataError:
            return value
        rows = cast("list[Any]", parsed) if isinstance(parsed, list) else []
        return rows if rows and isinstance(rows[0], dict) else value
    return value


def _read_parquet(path: Path, label: str) -> _Numbered:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise SetupError(
            label, "reading .parquet needs pyarrow", cure="Run: pip install 'tunesmith[hub]'"
        ) from None
    number = 0
    try:
        table = parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, drop_nulls(row), None
    except (OSError, ValueError) as error:
        raise DataError(
            label, str(error).splitlines()[0], rule="the file is Parquet", cure="Fetch the file again"
        ) from None


def mix_rows(keys: Sequence[str], *, weight: float, seed: int) -> list[int]:
    """Row numbers of one source in a mix: `weight` 0.5 keeps half of the rows, 2 repeats each, 1.5 repeats half.

    Which rows are kept or repeated follows their content hashes (`keys`) and the seed, not their order.
    """
    whole, part = divmod(weight, 1.0)
    numbers = list(range(len(keys))) * int(whole)
    extra = math.floor(part * len(keys) + 0.5)
    if extra:
        order = sorted(
            range(len(keys)), key=lambda n: hashlib.sha256(f"mix:{seed}:{keys[n]}".encode()).digest()
        )
        numbers += sorted(order[:extra])
    return numbers
