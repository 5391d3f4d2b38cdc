"""Hub data sets through `datasets`, imported only when one is named. Revisions are pinned to a commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import DataError, SetupError
from tunesmith.job.resolve import is_offline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


def is_hub_id(text: str) -> bool:
    """`org/name` or `org/name:split`."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".jsonl", ".json", ".csv", ".parquet"))


def list_hub_splits(text: str, *, revision: str | None) -> tuple[dict[str, tuple[str, str]], str | None]:
    """Splits of a hub data set, ours to (id, theirs), and the commit that the revision resolves to.

    `org/name:split` gives that split as `train` and nothing else.
    Raises SetupError without the `hub` extra, DataError if the data set cannot be reached or read.
    """
    name, _, wanted = text.partition(":")
    datasets = _import_datasets(text)
    commit = resolve_commit(name, revision)
    try:
        found: list[str] = list(datasets.get_dataset_split_names(name, revision=commit))
    except Exception as error:
        raise _unreachable(text, error) from None
    if wanted:
        if wanted not in found:
            raise DataError(text, f"no split {wanted!r}", rule=f"its splits are {', '.join(found)}")
        return {"train": (name, wanted)}, commit
    if "train" not in found:
        raise DataError(
            text, "no split 'train'", rule=f"its splits are {', '.join(found)}", cure="Write org/name:split"
        )
    return {split: (name, split) for split in found}, commit


def read_hub(name: str, split: str, *, revision: str | None) -> Iterator[dict[str, Any]]:
    """Rows of one split, read from the local cache that `datasets` keeps."""
    datasets = _import_datasets(name)
    try:
        rows: Any = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        raise _unreachable(name, error) from None
    for row in rows:
        yield drop_nulls(row)


def resolve_commit(name: str, revision: str | None) -> str | None:
    """The commit behind a branch or tag; None for a local folder, and offline the revision as given."""
    if Path(name).exists():
        return None
    if is_offline() or (revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision)):
        return revision
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:
        raise _unreachable(name, error) from None


def _import_datasets(place: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError:
        raise SetupError(
            place,
            "hub data sets need the datasets library",
            rule="no local file or folder has this name",
            cure="Run: pip install 'tunesmith[hub]', or check the path",
        ) from None


def _unreachable(place: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if is_offline():
        return DataError(
            place,
            "is neither a local file nor in the hub cache",
            rule="HF_HUB_OFFLINE is set",
            cure="Check the path, or unset HF_HUB_OFFLINE",
        )
    return DataError(
        place, f"cannot be read from the hub ({reason})", cure="Check the name, the network and HF_TOKEN"
    )


def drop_nulls(value: Any) -> Any:
    """A row without nulls: tables fill the absent keys of nested objects with them."""
    if isinstance(value, Mapping):
        return {k: drop_nulls(v) for k, v in cast("Mapping[str, Any]", value).items() if v is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in cast("list[Any]", value)]
    return value
