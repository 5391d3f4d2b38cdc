"""Plain data from JSON that somebody else wrote: every field is there, of its type, and finite, or one line says which.

For dataclasses of strings, numbers, flags, tuples, dictionaries and other such dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tunesmith.core.errors import DataError

T = TypeVar("T")
# Beyond it, what reads a number on can fail, as turning it into a float does.
_LARGEST = 2**63 - 1
_NAMES: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_checked(kind: type[T], value: Any, *, place: str) -> T:
    """`value` as a `kind`, a dataclass. Raises DataError naming the field: `parity.json: steps[3].loss: ...`.

    Fields with defaults may be missing; unknown ones are refused.
    """
    return cast(T, _read(kind, value, place, ""))


def _read(kind: Any, value: Any, place: str, at: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _read(next(item for item in inner if item is not type(None)), value, place, at)
    if origin is Literal:
        if value not in inner:
            raise _wrong(place, at, f"is {str(value)[:60]!r}", f"it is one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        items = cast("list[Any]", _expect((list, tuple), value, "a list", place, at))
        return tuple(_read(inner[0], item, place, f"{at}[{number}]") for number, item in enumerate(items))
    if origin is dict:
        pairs = cast("dict[str, Any]", _expect(dict, value, "an object", place, at))
        return {key: _read(inner[1], item, place, f"{at}.{key}") for key, item in pairs.items()}
    if dataclasses.is_dataclass(kind):
        return _read_fields(cast(type, kind), value, place, at)
    if type(value) is int and abs(value) > _LARGEST:
        raise _wrong(place, at, f"is a number of {len(str(abs(value)))} digits", "whole numbers have 64 bits")
    if kind is float and type(value) is int:
        value = float(value)
    # Exactly that type: True is an int to isinstance.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(place, at, f"is {str(value)[:60]!r}", f"it is {_NAMES[kind]}")
    return value


def _read_fields(kind: type, value: Any, place: str, at: str) -> Any:
    given = cast("dict[str, Any]", _expect(dict, value, "an object", place, at))
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)
    if unknown := sorted(given.keys() - fields.keys()):
        raise _wrong(place, at, f"unknown field {unknown[0]!r}", f"{kind.__name__} has {', '.join(fields)}")
    nothing = dataclasses.MISSING
    needed = {n for n, f in fields.items() if f.default is nothing and f.default_factory is nothing}
    if missing := sorted(needed - given.keys()):
        raise _wrong(place, at, f"has no {missing[0]!r}", f"{kind.__name__} needs it")
    dotted = f"{at}." if at else ""
    return kind(**{name: _read(hints[name], item, place, dotted + name) for name, item in given.items()})


def _expect(kind: type | tuple[type, ...], value: Any, name: str, place: str, at: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(place, at, f"is {str(value)[:60]!r}", f"it is {name}")
    return value


def _wrong(place: str, at: str, finding: str, rule: str) -> DataError:
    return DataError(f"{place}: {at}" if at else place, finding, rule=rule)
