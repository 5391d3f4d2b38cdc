"""From a job's data section to a prepared folder that every arm, framework and the judge read.

prepared/
  prepared.json                  splits, fingerprints; what rows are, unless they are answers
  checks.json                    CheckReport
  train.safetensors              ids int32, mask uint8, offsets int64 (rows + 1)
  train.rows.jsonl               place, row_id, cluster, conversation, bytes of each token row, and its numbers
  train.conversations.jsonl      the conversations behind them
  validation.*                   the same
  sealed/test.*                  the same: hand over the folder without it, and no trainer can see a test row

Of pairs, rows 2p and 2p + 1 are the chosen and the rejected one. Of prompts, rows have no target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_rows
from tunesmith.core.jsonl import dump_json, read_json, read_jsonl, write_bytes_atomic, write_json, write_jsonl
from tunesmith.core.rundir import as_rundir_error
from tunesmith.core.types import Conversation, Origin, TokenRow
from tunesmith.data.checks import (
    CheckReport,
    SplitFacts,
    find_findings,
    find_special_tokens,
    measure_overlaps,
    sort_findings,
)
from tunesmith.data.collect import Rejects, collect_splits
from tunesmith.data.conversation_json import conversation_from_json, conversation_to_json
from tunesmith.data.fitting import RenderedSplit, render_split
from tunesmith.data.preference_checks import find_in_preferences, measure_preferences
from tunesmith.data.prompts import Prompt, make_prompt
from tunesmith.data.render import Renderer
from tunesmith.data.row_pairs import RowPairs
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.objective import RowKind
from tunesmith.job.spec import DataSpec

SPLITS = ("train", "validation", "test")


class HasData(Protocol):
    """A job, or anything with its `data` section."""

    @property
    def data(self) -> DataSpec: ...


class TokenRows(Sequence[TokenRow]):
    """Token rows over flat arrays; a row is made when asked for and copies nothing."""

    def __init__(
        self,
        ids_T: npt.NDArray[np.int32],
        mask_T: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.int64],
        facts: Sequence[Mapping[str, Any]],
    ) -> None:
        # Views of memory, not arrays: their items are Python integers, so sum() cannot overflow a byte.
        self._ids, self._mask = memoryview(cast("Any", ids_T)), memoryview(cast("Any", mask_T))
        self._offsets: list[int] = offsets.tolist()
        self._facts = facts
        self.lengths: list[int] = np.diff(offsets).tolist()

    def __len__(self) -> int:
        return len(self._facts)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start, end = self._offsets[index], self._offsets[index + 1]
        fact = self._facts[index]
        return TokenRow(
            ids=self._ids[start:end],
            mask=self._mask[start:end],
            origin=Origin(fact["place"], fact["source"], fact["index"]),
            row_id=fact["row_id"],
            num_answer_bytes=fact["bytes"],
            numbers=fact.get("numbers", {}),
        )


class Prepared:
    """A prepared folder, read split by split when asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cache: dict[str, Any] = {}

    @cached_property
    def _index(self) -> dict[str, Any]:
        return cast("dict[str, Any]", read_json(self.folder / "prepared.json"))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits whose files are there; a folder handed to a trainer has no test."""
        return tuple(name for name in self._index["splits"] if self._path(name, "safetensors").is_file())

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's rows, of the template and of the tokenizer."""
        return dict(self._index["fingerprints"])

    @property
    def kind(self) -> RowKind:
        """What the conversations are: answers, pairs, labelled answers, or prompts."""
        return self._index.get("rows", "answers")

    @cached_property
    def report(self) -> CheckReport:
        return CheckReport.from_json(cast("dict[str, Any]", read_json(self.folder / "checks.json")))

    def rows(self, split: str) -> TokenRows:
        """Token rows of a split. Raises DataError if its files are missing or damaged."""
        return self._once(("rows", split), lambda: self._read_rows(split))

    def examples(self, split: str) -> TokenRows | RowPairs:
        """What `train.batch_rows` counts: the token rows of a split, or its pairs, each a `RowGroup` of chosen and
        rejected."""
        return RowPairs(self.rows(split)) if self.kind == "pairs" else self.rows(split)

    def prompts(self, split: str) -> list[Prompt]:
        """What the model is to answer, one for each row of a split that was prepared for it."""
        rows, asked = self.rows(split), self.conversations(split)
        return [
            make_prompt(row, asked[n]) for row, n in zip(rows, self.conversation_numbers(split), strict=True)
        ]

    def conversations(self, split: str) -> list[Conversation]:
        """The conversations that have rows in a split."""
        path = self._path(split, "conversations.jsonl")
        return self._once(
            ("conversations", split),
            lambda: [conversation_from_json(value) for _, value in read_jsonl(path)],
        )

    def clusters(self, split: str) -> list[str]:
        """Cluster id of each token row: rows of one cluster are resampled together."""
        return [fact["cluster"] for fact in self._facts(split)]

    def conversation_numbers(self, split: str) -> list[int]:
        """For each token row, the number of its conversation in `conversations(split)`."""
        return [fact["conversation"] for fact in self._facts(split)]

    def conversation_clusters(self, split: str) -> list[str]:
        """Cluster id of each conversation."""
        found = dict(zip(self.conversation_numbers(split), self.clusters(split), strict=True))
        return [found[number] for number in range(len(self.conversations(split)))]

    def _facts(self, split: str) -> list[dict[str, Any]]:
        path = self._path(split, "rows.jsonl")
        return self._once(("facts", split), lambda: [value for _, value in read_jsonl(path)])

    def _once(self, key: tuple[str, str], read: Any) -> Any:
        name = "/".join(key)
        if name not in self._cache:
            self._cache[name] = read()
        return self._cache[name]

    def _path(self, split: str, suffix: str) -> Path:
        return _split_path(self.folder, split, suffix)

    def _read_rows(self, split: str) -> TokenRows:
        path = self._path(split, "safetensors")
        try:
            arrays = load(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                str(path),
                f"split {split!r} is not in this folder",
                rule=f"it holds {', '.join(self.splits) or 'no split'}",
            ) from None
        except (OSError, SafetensorError) as error:
            raise DataError(str(path), f"cannot be read ({error})", cure="Prepare the data again") from None
        facts = self._facts(split)
        offsets = cast("npt.NDArray[np.int64]", arrays["offsets"])
        if len(offsets) != len(facts) + 1 or int(offsets[-1]) != len(arrays["ids"]):
            raise DataError(str(path), "does not match its rows.jsonl", cure="Prepare the data again")
        return TokenRows(
            cast("npt.NDArray[np.int32]", arrays["ids"]),
            cast("npt.NDArray[np.uint8]", arrays["mask"]),
            offsets,
            facts,
        )


def load_prepared(folder: str | Path) -> Prepared:
    """Open a prepared folder. Raises DataError if it is not one."""
    root = Path(folder)
    if not (root / "prepared.json").is_file():
        raise DataError(
            str(root), "not a prepared folder", rule="it holds prepared.json", cure="Prepare the data again"
        )
    return Prepared(root)


def prepare_data(
    job: HasData,
    *,
    tokenizer: Tokenizer,
    folder: str | Path,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    splits: Sequence[str] = SPLITS,
    rejects: Path | None = None,
    rows: RowKind = "answers",
) -> Prepared:
    """Read, check, split and render a job's data into `folder`.

    on_bad_row: "refuse" raises at the first bad row; "skip" writes bad rows with their reasons to `rejects`, by default
    rejected_rows.jsonl beside `folder`.
    splits: which to write; cutting the others off happens all the same, so leaving test out changes no train row.
    rows: what the job's objective learns from (`kind_of_rows`); sources of another kind are refused.
    Raises DataError naming the row or source; RunDirError if the folder cannot be written.
    """
    root = Path(folder)
    path = rejects or root.parent / "rejected_rows.jsonl"
    collected = Rejects(path if on_bad_row == "skip" else None)
    renderer = Renderer(tokenizer, job.data)
    report, rendered = read_splits(job.data, renderer, collected, rows)
    try:
        root.mkdir(parents=True, exist_ok=True)
        collected.write()
        fingerprints = {"template_sha256": renderer.template_sha256, "tokenizer_sha256": tokenizer.sha256}
        for name, split in rendered.items():
            fingerprints[f"{name}_sha256"] = hash_rows(identify_rows(split))
            if name in splits:
                write_split(root, name, split)
        write_json(root / "checks.json", report.to_json())
        # Last: a folder with this file is complete.
        index = {"schema": 1, "splits": [n for n in rendered if n in splits], "fingerprints": fingerprints}
        write_json(root / "prepared.json", index if rows == "answers" else index | {"rows": rows})
    except OSError as error:
        raise as_rundir_error(error, root) from None
    return Prepared(root)


def identify_rows(split: RenderedSplit) -> Iterator[str]:
    """What a fingerprint holds of each row: its tokens, a label where it has one, and what rewards know of a prompt."""
    for row, number in zip(split.rows, split.numbers, strict=True):
        asked = split.conversations[number]
        known = dump_json([asked.truth, asked.columns]) if asked.is_prompt else ""
        yield _identify(row) + known


def _identify(row: TokenRow) -> str:
    return f"{row.row_id}{dump_json(dict(row.numbers))}" if row.numbers else row.row_id


def read_splits(
    data: DataSpec, renderer: Renderer, rejects: Rejects, kind: RowKind = "answers"
) -> tuple[CheckReport, dict[str, RenderedSplit]]:
    """All splits in memory, and what is in them.

    A streaming job's training rows are left to `stream`; its held-out splits are prepared like any other's."""
    report = CheckReport()
    collected = collect_splits(data, rejects, report, kind)
    likeness = collected.likeness
    rendered: dict[str, RenderedSplit] = {}
    for name, conversations in collected.splits.items():
        facts = report.splits.setdefault(name, SplitFacts())
        rendered[name] = render_split(conversations, renderer, data, facts, rejects, likeness)
        if not rendered[name].rows:
            raise DataError(
                f"data, split {name}",
                f"none of its {len(conversations)} rows can be used",
                rule=f"a split has at least one row of at most {data.max_tokens} tokens",
                cure="Raise data.max_tokens, or give more rows",
            )
        if kind in ("pairs", "labelled"):
            split = rendered[name]
            report.preferences[name] = measure_preferences(kind, split.rows, split.conversations)
        facts.num_clusters = len({likeness.cluster_of(c) for c in conversations})
        different = {likeness.hash_of(c): likeness.near_group(c) for c in conversations}
        facts.num_near_duplicates = len(different) - len(set(different.values()))
        report.counts["rows_with_special_tokens"] = report.counts.get(
            "rows_with_special_tokens", 0
        ) + find_special_tokens(conversations, renderer)
    held_out = {name: rows for name, rows in collected.splits.items() if name != "train"}
    report.overlap = measure_overlaps(collected.splits.get("train", []), held_out, likeness)
    conclude(report, renderer, rejects)
    return report, rendered


def conclude(report: CheckReport, renderer: Renderer, rejects: Rejects) -> None:
    """Put into words what reading and rendering have counted."""
    report.counts |= dict(renderer.counts)
    report.counts["rows_refused_by_template"] = len(rejects.rows) - sum(
        source.num_rejected for source in report.sources
    )
    report.findings = sort_findings([*find_findings(report, renderer), *find_in_preferences(report)])


# --- files ------------------------------------------------------------------------------------------------------------


def _split_path(folder: Path, split: str, suffix: str) -> Path:
    return (folder / "sealed" if split == "test" else folder) / f"{split}.{suffix}"


def write_split(folder: Path, name: str, split: RenderedSplit) -> None:
    _split_path(folder, name, "x").parent.mkdir(parents=True, exist_ok=True)
    offsets = np.zeros(len(split.rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in split.rows], out=offsets[1:])
    arrays = {
        "ids": _join([row.ids for row in split.rows], np.int32),
        "mask": _join([row.mask for row in split.rows], np.uint8),
        "offsets": offsets,
    }
    write_bytes_atomic(_split_path(folder, name, "safetensors"), save(arrays))
    facts = [
        {
            "place": row.origin.place,
            "source": row.origin.source,
            "index": row.origin.index,
            "row_id": row.row_id,
            "bytes": row.num_answer_bytes,
            "cluster": split.clusters[number],
            "conversation": number,
            **({"numbers": dict(row.numbers)} if row.numbers else {}),
        }
        for row, number in zip(split.rows, split.numbers, strict=True)
    ]
    write_jsonl(_split_path(folder, name, "rows.jsonl"), facts)
    conversations = (conversation_to_json(c) for c in split.conversations)
    write_jsonl(_split_path(folder, name, "conversations.jsonl"), conversations)


def _join(parts: Iterable[Sequence[int]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])
