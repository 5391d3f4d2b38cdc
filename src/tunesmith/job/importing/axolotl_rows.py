"""Axolotl's `datasets`: where rows come from, their shape, and which of their turns are trained.

Source: axolotl 0.21.0, axolotl/utils/schemas/datasets.py, axolotl/prompt_strategies/ and axolotl/prompters.py.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

from typing import Any

from tunesmith.job.importing.rules import At, Implied, NotSupported, Taken, Turn, names, number
from tunesmith.job.importing.sources import is_file, mixed, source

_SHAREGPT = {"role": "from", "content": "value"}
_MESSAGES = {"role": "role", "content": "content"}


def rows(_: Any, at: At) -> Any:
    """`data.train` from datasets, with the template that the first one asks for."""
    items = at.items("datasets")
    return mixed([_source(item) for item in items])


def validation_rows(_: Any, at: At) -> Any:
    first, *more = at.items("test_datasets")
    item = _source(first)
    path = item if isinstance(item, str) else item["path"]
    if more:
        raise NotSupported("several validation sets; the first in their place", instead=path)
    return path


def _source(item: At) -> str | dict[str, Any]:
    path, files, split = str(item.within("path") or ""), item.within("data_files"), item.within("split")
    weight = item.within("weight")
    if path in ("json", "csv", "parquet", "text") and files:
        path, files = names(files)[0], names(files)[1:]
    if files:
        raise NotSupported("data_files of one data set; name each file as a data set", fatal=True)
    here = is_file(path) or item.files.find(path) is not None
    return source(
        item.files.name(path),
        split=None if here or not split else str(split),
        format=_shape(item),
        revision=item.within("revision"),
        weight=None if weight is None else number(weight, item),
    )


def _shape(item: At) -> str | None:
    kind = str(item.within("type") or "").partition(".")[0].partition(":")[0]
    if kind == "chat_template":
        return "sharegpt" if (item.within("field_messages") or "messages") == "conversations" else "messages"
    return {"alpaca": "alpaca", "alpaca_chat": "alpaca", "sharegpt": "sharegpt", "completion": "text"}.get(
        kind
    )


def kind_of_rows(value: Any, at: At) -> Any:
    """`type:`, which fixes the shape of the rows and how they are written as text."""
    kind = str(value).partition(":")[0]
    if kind in ("chat_template", "sharegpt"):
        if any(item.within("type") == "alpaca" for item in at.items("datasets")):
            raise NotSupported("a template of its own: a job has one for all rows", instead=rows(value, at))
        return rows(value, at)
    if kind == "completion":
        return Taken(rows(value, at), "rows of `text`, trained whole")
    if kind == "alpaca":
        raise NotSupported(
            "Axolotl's alpaca text, which opens with `Below is an instruction` and has a section for the input; "
            "the template alpaca, without these, in its place",
            instead=rows(value, at),
            also={"data.template": "alpaca"},
        )
    raise NotSupported(
        f"rows of type {value}; convert them to messages (see docs/data-formats.md)", fatal=True
    )


def split(value: Any, at: At) -> Any:
    if "[" in str(value):
        raise NotSupported(
            f"a part of a split ({value}); the whole split in its place", instead=rows(value, at)
        )
    return rows(value, at)


def messages_field(value: Any, at: At) -> Any:
    if value not in ("messages", "conversations"):
        raise NotSupported(f"rename the field {value} of the rows to `messages`")
    return rows(value, at)


def properties(value: Any, at: At) -> Any:
    """message_property_mappings: which fields of a message are role and content."""
    wanted = _SHAREGPT if at.within("field_messages") == "conversations" else _MESSAGES
    if not isinstance(value, dict) or any(value.get(key, name) != name for key, name in wanted.items()):
        fields = " and ".join(wanted.values())
        raise NotSupported(f"other fields of a message than {fields}; rename them in the rows")
    return Implied(f"rows of {wanted['role']} and {wanted['content']} are read")


def message_field(ours: str) -> Turn:
    def turn(value: Any, at: At) -> Implied:
        wanted = (_SHAREGPT if at.within("field_messages") == "conversations" else _MESSAGES)[ours]
        if value != wanted:
            raise NotSupported(f"rename {value} to {wanted} in the rows")
        return Implied(f"{wanted} is read")

    return turn


def trained_roles(value: Any, _: At) -> Implied:
    if set(names(value)) <= {"assistant", "gpt"} and value:
        return Implied("answers are what is trained")
    raise NotSupported(f"training on the roles {value}; here answers alone are trained")
