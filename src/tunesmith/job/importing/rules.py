"""What a framework's table says of each of its keys: which key of ours, by which rule, and their default.

A key's name is its path, with `[]` for the items of a list: `datasets[].path`. A rule (`turn`) gets the value and the
whole configuration, and answers with our value, `Taken` (a value with a remark), `Implied`, or raises `NotSupported`.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNSET: Any = type("Unset", (), {"__repr__": lambda _: "UNSET"})()


@dataclass(frozen=True, slots=True)
class Taken:
    """A value of ours with what a reader should know about it. also: further keys that it decides."""

    value: Any
    remark: str = ""
    also: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Implied:
    """Nothing to write: we do the same, or it changes no result."""

    remark: str


class NotSupported(Exception):
    """Changes the result and cannot be said in a job. instead: what the job says in its place.

    fatal: without it there is no job at all.
    """

    def __init__(
        self,
        reason: str,
        *,
        instead: Any = UNSET,
        also: Mapping[str, Any] | None = None,
        fatal: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.instead, self.also, self.fatal = reason, instead, also or {}, fatal


class WrongValue(Exception):
    """A value that the framework itself would refuse; says what it should be. key: whose, if not the one looked at."""

    key = ""


@dataclass(frozen=True, slots=True)
class Files:
    """Finds what a configuration names. config: its file. out: the job file, whose paths are relative to its folder."""

    config: Path
    out: Path

    def find(self, name: str) -> Path | None:
        """The file or folder of a name, looked for where the command runs, then beside the configuration."""
        for folder in (Path(), self.config.parent):
            path = folder / os.path.expanduser(name)
            if os.path.exists(path):
                return path
        return None

    def name(self, name: str) -> str:
        """As the job should write it: relative to the job if it is here, else (a hub id) unchanged."""
        found = self.find(name)
        if found is None or os.path.isabs(os.path.expanduser(name)):
            return name
        return Path(os.path.relpath(found.absolute(), self.out.parent.absolute())).as_posix()


@dataclass(frozen=True, slots=True)
class At:
    """The configuration as rules see it.

    values: by path (`datasets[0].path`). table: the framework's keys. item: `datasets[0].` while a rule looks at a key
    of that item, else empty.
    """

    values: Mapping[str, Any]
    table: Mapping[str, Key]
    files: Files
    item: str = ""

    def __getitem__(self, name: str) -> Any:
        """The value in the file, else their default, else None."""
        value = self.values.get(name)
        if value is None and name in self.table and self.table[name].default is not UNSET:
            return self.table[name].default
        return value

    def on(self, name: str) -> bool:
        """Whether a switch, which may be another key than the one looked at, is on."""
        return self._read(name, truth)

    def number(self, name: str, kind: Turn | None = None) -> Any:
        """The number under another key, or None. kind: `whole` for whole numbers."""
        return None if self[name] is None else self._read(name, lambda value: (kind or number)(value, self))

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        try:
            return read(self[name])
        except WrongValue as error:
            error.key = name
            raise

    def given(self, name: str) -> bool:
        return self.values.get(name) is not None

    def within(self, name: str) -> Any:
        """The value of a sibling key within the same list item."""
        return self.values.get(self.item + name)

    def items(self, name: str) -> list[At]:
        """One view for each item of a list of mappings."""
        heads = dict.fromkeys(
            match[0] for path in self.values if (match := re.match(re.escape(name) + r"\[\d+\]\.", path))
        )
        return [At(self.values, self.table, self.files, head) for head in heads]


Turn = Callable[[Any, At], Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of theirs. to: ours, dotted. default: theirs, UNSET if it decides nothing. required: they have none.

    adapter: matters only where adapters are trained. nullable: an empty value is a value, not an absence.
    """

    turn: Turn
    to: str = ""
    note: str = ""
    default: Any = UNSET
    adapter: bool = False
    required: bool = False
    nullable: bool = False
    status: str = "mapped"


@dataclass(frozen=True, slots=True)
class Habit:
    """What a framework does without a key for it, and how a job says the same."""

    text: str
    to: str
    value: Any


@dataclass(frozen=True, slots=True)
class Framework:
    """One dialect. name: for --from. source: where in its code the defaults stand.

    telltale: keys that no other framework has. method: `full`, `lora` or `qlora`.
    """

    name: str
    title: str
    version: str
    source: str
    table: Mapping[str, Key]
    telltale: frozenset[str]
    method: Callable[[At], str]
    habits: Sequence[Habit] = ()


def as_is(value: Any, _: At) -> Any:
    return value


def to(target: str, turn: Turn = as_is, note: str = "", **more: Any) -> Key:
    """A key that becomes one of ours."""
    return Key(turn, target, note, **more)


def implied(note: str) -> Key:
    return Key(lambda _value, _at: Implied(note), note=note, status="implied")


def refused(
    reason: str,
    *,
    off: Sequence[Any] = (),
    needs: str = "",
    to: str = "",
    instead: Any = UNSET,
    fatal: bool = False,
) -> Key:
    """A key that we cannot express, unless its value is one that does nothing (`off`, always None, false, 0, empty),
    or the key that switches it on (`needs`) is off."""

    def turn(value: Any, at: At) -> Implied:
        if not value or value in off or (needs and not at[needs]):
            return Implied("off" if not needs or at[needs] else f"without effect: {needs} is off")
        raise NotSupported(reason, instead=instead, fatal=fatal)

    return Key(turn, to, reason, status="not supported")


def switch(turn: Turn) -> Turn:
    """A rule that only a switch turned on decides."""
    return lambda value, at: turn(value, at) if truth(value) else Implied("off")


def each(names: str, key: Key, prefix: str = "") -> dict[str, Key]:
    """The same key under many names, separated by blanks."""
    return {prefix + name: key for name in names.split()}


def number(value: Any, _: At) -> float:
    """A number; also as text, which is how YAML 1.1 reads `2e-5`."""
    try:
        read = float(value)
        if isinstance(value, bool) or not math.isfinite(read):
            raise ValueError
        return read
    except (TypeError, ValueError, OverflowError):
        raise WrongValue("a number") from None


def whole(value: Any, at: At) -> int:
    if (given := number(value, at)) != int(given):
        raise WrongValue("a whole number")
    return int(given)


def truth(value: Any) -> bool:
    """A switch as YAML 1.1 and command lines write it."""
    if isinstance(value, str):
        if (word := value.strip().lower()) in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0", "", "none", "null"):
            return False
        raise WrongValue("true or false")
    return bool(value)


def flag(value: Any, _: At) -> bool:
    return truth(value)


def names(value: Any, _: At = UNSET) -> list[str]:
    """A list of names, also written as one text with commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()] or None
    if not isinstance(value, list):
        raise WrongValue("a list of names")
    return [str(item) for item in value]
