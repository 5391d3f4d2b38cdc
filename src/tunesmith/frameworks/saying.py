"""How a framework was told what the job fixes, and what it made of that: found by asking its adapter, never typed.

A setting says a number of the job if it changes when that number does; `translate` is pure, so that can be tried.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from tunesmith.core.frameworks import Fixed
from tunesmith.frameworks.handoff import Handoff, Lora
from tunesmith.frameworks.port import Port

# What the worker reads for itself: the handoff, and what it is to find in the framework's own arguments.
_NOT_SAID = ("handoff", "expected")
# How transformers shows any setting whose name ends in `_token`.
_HIDDEN = re.compile(r"<[A-Z_]+_TOKEN>")
_ABSENT = object()
_NOTHING: tuple[Any, ...] = (None, "none", [], {}, "")


@dataclass(frozen=True, slots=True)
class Saying:
    """See `FrameworkPage`, whose fields these are."""

    fixed: tuple[Fixed, ...]
    told: dict[str, str]
    altered: dict[str, tuple[str, ...]]
    defaults: dict[str, str]


def describe_saying(port: Port, handoff: Handoff, resolved: Mapping[str, Any]) -> Saying:
    """resolved: the framework's whole configuration as it was used, by part; {} if it did not get that far."""
    said, expected = _read_settings(port, handoff)
    moved: dict[str, tuple[Any, dict[str, str]]] = {}
    for name, value, other in _change_each(handoff):
        changed, _ = _read_settings(port, other)
        _, follow = moved.setdefault(name, (value, {}))
        # A setting may be said only where the job asks for it.
        follow |= {
            key: show_value(said[key]) if key in said else "(not said)"
            for key in (*said, *changed)
            if said.get(key, _ABSENT) != changed.get(key, _ABSENT)
        }
    fixed = [Fixed(name, show_value(value), follow) for name, (value, follow) in moved.items() if follow]
    follows = {key for each in fixed for key in each.said}
    used = flatten(resolved)
    named = {_own_name(key): item for key, item in (expected | said).items()}
    return Saying(
        fixed=tuple(fixed),
        told={key: show_value(item) for key, item in said.items() if key not in follows},
        altered={
            _own_name(key): (show_value(named[_own_name(key)]), show_value(item))
            for key, item in used.items()
            if _own_name(key) in named and not _is_same(named[_own_name(key)], item)
        },
        defaults={key: show_value(item) for key, item in used.items() if _own_name(key) not in named},
    )


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1, "c": {}}} -> {"a.b": 1, "a.c": {}}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= flatten(cast("dict[str, Any]", item), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def show_value(value: Any) -> str:
    """As JSON, text without quotes; cut at 200 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _own_name(key: str) -> str:
    """`sft.learning_rate` -> `learning_rate`: parts are ours, or the record's."""
    return key.partition(".")[2] or key


def _is_same(said: Any, used: Any) -> bool:
    if isinstance(used, str) and _HIDDEN.fullmatch(used):
        return True
    if isinstance(said, list) and isinstance(used, list):
        return sorted(map(str, cast("list[Any]", said))) == sorted(map(str, cast("list[Any]", used)))
    return said == used or (said in _NOTHING and used in _NOTHING)


def _read_settings(port: Port, handoff: Handoff) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the adapter's files say, and what they expect to find in the framework's own words."""
    said, expected = dict[str, Any](), dict[str, Any]()
    for text in port.translate(handoff).files.values():
        try:
            settings = json.loads(text)
        except ValueError:
            continue
        said |= flatten({key: item for key, item in settings.items() if key not in _NOT_SAID})
        expected |= flatten(settings.get("expected") or {})
    return said, expected


def _change_each(handoff: Handoff) -> Iterator[tuple[str, Any, Handoff]]:
    """(name, value, the handoff with another value) of every number, choice and list; texts are paths and names."""
    for name, value, other in _changes(handoff):
        yield name, value, dataclasses.replace(handoff, **{name: other})
    if handoff.lora:
        for name, value, other in _changes(handoff.lora):
            lora = dataclasses.replace(handoff.lora, **{name: other})
            yield f"lora.{name}", value, dataclasses.replace(handoff, lora=lora)


def _changes(value: Handoff | Lora) -> Iterator[tuple[str, Any, Any]]:
    for name, hint in get_type_hints(type(value)).items():
        given = getattr(value, name)
        for other in _others(given, hint):
            yield name, given, other


def _others(value: Any, hint: Any) -> tuple[Any, ...]:
    """Other values of its kind: all choices, another number, a longer list. None where none can be made up."""
    if get_origin(hint) is Literal:
        return tuple(item for item in get_args(hint) if item != value)
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, (int, float)):
        return (2 * value + 1,)
    return ((*cast("tuple[Any, ...]", value), "another"),) if isinstance(value, tuple) else ()
