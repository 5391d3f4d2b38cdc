"""LLaMA-Factory's dataset_info.json: names of data sets to files, hub ids and the columns and tags of their rows.

Source: llamafactory 0.9.5, llamafactory/data/{parser,loader,converter}.py.
"""

# pyright: standard
# Untyped values of YAML and JSON pass through here; strict would only ask for casts.

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import JobError
from tunesmith.job.importing.rules import At, NotSupported, Turn, names
from tunesmith.job.importing.sources import PREFERENCES, mixed, source

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_COLUMNS = {
    "alpaca": {**_ALPACA, "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "tools": "tools"},
}
_TAGS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


def rows(key: str) -> Turn:
    """The rule of `dataset` and `eval_dataset`: names of dataset_info.json made into sources."""

    def turn(value: Any, at: At) -> Any:
        found = [_named(name, at) for name in names(value)]
        unread = "; ".join(dict.fromkeys(remark for _, remark in found if remark))
        sources = [item for item, _ in found]
        if key == "eval_dataset":
            first = sources[0]
            if len(sources) > 1:
                raise NotSupported("several validation sets; the first in their place", instead=first)
            sources = [first if isinstance(first, str) else first["path"]]
        if unread:
            raise NotSupported(unread, instead=mixed(sources))
        return mixed(sources)

    return turn


def _named(name: str, at: At) -> tuple[str | dict[str, Any], str]:
    """One data set, with a remark."""
    folder = at["dataset_dir"]
    if folder == "ONLINE":
        return source(name, split="train"), ""
    info = _dataset_info(str(folder), at)
    entry = info.get(name)
    if not isinstance(entry, dict):
        raise NotSupported(f"{folder}/dataset_info.json has no data set {name!r}", fatal=True)
    if entry.get("ranking") or entry.get("kto_tag"):
        raise NotSupported(f"data set {name!r} holds preferences: {PREFERENCES}", fatal=True)
    return _entry_source(name, entry, str(folder), at)


def _dataset_info(folder: str, at: At) -> dict[str, Any]:
    path = at.files.find(f"{folder}/dataset_info.json")
    if path is None:
        raise NotSupported(
            f"{folder}/dataset_info.json is not there: run the import where LLaMA-Factory is run", fatal=True
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise JobError(f"{path}{line}", "is not JSON", cure="Mend it; LLaMA-Factory reads it too") from None
    if not isinstance(info, dict):
        raise JobError(str(path), "is not a JSON object", rule="it names data sets", cure="Check the file")
    return info


def _entry_source(name: str, entry: dict[str, Any], folder: str, at: At) -> tuple[str | dict[str, Any], str]:
    shape = str(entry.get("formatting", "alpaca"))
    if shape not in _COLUMNS:
        raise NotSupported(f"data set {name!r}: rows formatted as {shape}", fatal=True)
    if shape != "alpaca":  # rows of role and content are often declared as sharegpt with other tags
        shape = min(("sharegpt", "openai"), key=lambda other: len(_renamed(entry, other)))
    ours = "messages" if shape == "openai" else shape
    remarks = [f"{name}: {remark}" for remark in _renamed(entry, shape)]
    for key in ("subset", "num_samples", "folder"):
        if entry.get(key):
            remarks.append(f"{name}: {key} {entry[key]} is not followed")
    if "file_name" in entry:
        path = at.files.name(f"{folder}/{entry['file_name']}")
        return source(path, format=ours), "; ".join(remarks)
    if "hf_hub_url" in entry:
        split = str(entry.get("split", "train"))
        return source(str(entry["hf_hub_url"]), split=split, format=ours), "; ".join(remarks)
    raise NotSupported(
        f"data set {name!r} comes neither from a file nor from the Hugging Face Hub", fatal=True
    )


def _renamed(entry: dict[str, Any], shape: str) -> list[str]:
    """What must be renamed in the rows, in words."""
    columns = dict(entry.get("columns") or {})
    if shape != "alpaca":
        columns.setdefault("messages", "conversations")
    tags = {**_TAGS["sharegpt"], **dict(entry.get("tags") or {})} if shape != "alpaca" else {}
    wanted = [(columns, _COLUMNS[shape]), (tags, _TAGS.get(shape, {}))]
    found = []
    for given, ours in wanted:
        for key, value in given.items():
            fine = {
                ours.get(key),
                "context" if key == "query" else None,
                "response" if key == "response" else None,
            }
            if value and key in ours and value not in fine:
                found.append(f"rename {value} to {ours[key]} in the rows")
            elif value and key in ("history", "images", "videos", "audios"):
                found.append(f"the column {value} ({key}) is not read")
    return found
