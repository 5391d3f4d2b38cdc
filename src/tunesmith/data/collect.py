"""From sources to conversations by split: formats detected, bad rows refused or set aside, held-out rows cut off."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import OR_SKIP, dump_json, write_jsonl
from tunesmith.core.quantities import format_number
from tunesmith.core.types import Conversation, Origin
from tunesmith.data.checks import CheckReport, SourceFacts, SplitFacts
from tunesmith.data.formats import FormatName, RawRow, detect_format, parse_row, shape_of
from tunesmith.data.preferences import rows_of_shape, unpair
from tunesmith.data.sources import Source, find_sources, mix_rows, read_rows
from tunesmith.data.split import Likeness, assign_splits
from tunesmith.job.objective import RowKind
from tunesmith.job.spec import DataSpec, SourceSpec, as_source_specs

DEFAULT_SHARE = 0.1
_DETECT_ROWS = 100


@dataclass(slots=True)
class Rejects:
    """Bad rows set aside with their reasons.

    path: where `write` puts them; None refuses instead of collecting, unless `collect` says to count only.
    """

    path: Path | None
    collect: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def __post_init__(self) -> None:
        self.collect = self.collect or self.path is not None

    def add(self, origin: Origin, row: Any, error: DataError) -> None:
        """row: as the file has it, whole; bytes where they are no JSON, which are kept as text."""
        reason = str(error).removesuffix(OR_SKIP)
        entry = {"place": origin.place, "source": origin.source, "reason": reason}
        self.rows.append(entry | ({"row": _as_json(row)} if self.path else {}))

    def write(self) -> int:
        """Write the file, if there is anything to write; returns its number of rows."""
        # A stream meets a bad row again in every pass. Files of different folders can share name and line.
        different = {dump_json(row): row for row in self.rows}
        if self.path is not None and different:
            write_jsonl(self.path, different.values())
        return len(different)


def _as_json(row: Any) -> Any:
    """A row as JSON can hold it: cells of a table may be dates, or NaN."""
    if isinstance(row, bytes):
        return row.decode("utf-8", errors="replace").rstrip("\r\n")
    return json.loads(json.dumps(row, default=str), parse_constant=str)


def read_conversations(
    source: Source, rejects: Rejects, facts: SourceFacts, *, fmt: str = "auto", kind: RowKind = "answers"
) -> Iterator[Conversation]:
    """Conversations of one split of one source. The shape is detected from its first rows unless `fmt` names it.

    kind: what the objective learns from. Raises DataError if the shape is of another; pairs are taken apart for labels.
    """
    before = len(rejects.rows)
    rows = read_rows(source, on_bad=rejects.add if rejects.collect else None)
    head: list[RawRow] = []
    failure: DataError | None = None
    try:
        head.extend(itertools.islice(rows, _DETECT_ROWS))
    except DataError as error:
        # Told after the rows before it have been looked at, so that the first bad row is the one named.
        failure = error
    if head:
        found = _detect(head, kind, skip=rejects.collect) if fmt == "auto" else fmt
        facts.format = found
        _refuse_other_kind(source, found, kind)
        for raw in itertools.chain(head, rows):
            try:
                conversation = parse_row(raw, cast("FormatName", found), kind)
            except DataError as error:
                if not rejects.collect:
                    raise
                rejects.add(raw.origin, raw.value, error)
                continue
            facts.num_rows += 1
            if conversation.rejected and kind == "labelled":
                yield from unpair(conversation)
            else:
                yield conversation
    facts.num_rejected = len(rejects.rows) - before
    if failure is not None:
        raise failure


# Of each kind of rows: what they have, whose they are, and what such an objective needs.
_KINDS: dict[RowKind, tuple[str, str, str]] = {
    "answers": ("answers", "sft", "objective sft learns from answers"),
    "pairs": (
        "chosen and rejected answers",
        "dpo (or orpo, simpo, reward)",
        "this objective learns from pairs of a chosen and a rejected answer",
    ),
    "labelled": ("answers with a label", "kto", "objective kto learns from answers with a label"),
    "prompts": ("prompts", "grpo or ppo, with rewards", "this objective answers prompts"),
}
# Preferences that are answers, too, once their shape is named.
_AS_ANSWERS = {
    "alpaca_pairs": "alpaca",
    "labelled": "prompt_completion",
    "messages_labelled": "messages",
    "sharegpt_labelled": "sharegpt",
    "alpaca_labelled": "alpaca",
}


def _refuse_other_kind(source: Source, shape: str, kind: RowKind) -> None:
    """Raise DataError if rows of a shape are not what the objective learns from, nor can be made of them."""
    found: RowKind = "prompts" if shape == "prompts" else rows_of_shape(shape)
    if (found, kind) == ("answers", "prompts") and shape != "text":
        return
    if found == kind or (found, kind) == ("pairs", "labelled"):
        return
    what, objectives, _ = _KINDS[found]
    other = "another source (docs/data-formats.md)"
    if kind == "answers" and shape in _AS_ANSWERS:
        other = f"the source format: {_AS_ANSWERS[shape]} to learn every answer"
    raise DataError(
        source.name,
        f"its rows are {what} ({shape})",
        rule=_KINDS[kind][2],
        cure=f"Set objective: {objectives}, or give {other}",
    )


def _detect(head: Sequence[RawRow], kind: RowKind, *, skip: bool) -> FormatName:
    """The one shape of the rows; where bad rows are set aside, the commonest, and rows of another are bad."""
    shapes = [shape_of(raw.value, kind) for raw in head]
    known = Counter([shape for shape in shapes if shape is not None])
    if skip and known:
        return cast("FormatName", known.most_common(1)[0][0])
    odd = next((n for n, shape in enumerate(shapes) if shape is None or shape != shapes[0]), 0)
    return detect_format((raw.value for raw in head), place=head[odd].origin.place, rows=kind)


@dataclass(frozen=True, slots=True)
class Collected:
    """Conversations by split, and how alike they are."""

    splits: dict[str, list[Conversation]]
    likeness: Likeness


def collect_splits(
    data: DataSpec, rejects: Rejects, report: CheckReport, kind: RowKind = "answers"
) -> Collected:
    """Conversations of train, validation and test, as the job asks; facts about sources go to the report."""
    if data.streaming:
        check_stream_splits(data)
    parts = [_read_source(spec, data, rejects, report, kind) for spec in as_source_specs(data.train)]
    held_out: dict[str, list[Conversation]] = {}
    shares: dict[str, float] = {}
    for name, wish in (("test", data.split.test), ("validation", data.split.validation)):
        own = [c for _, part in parts for c in part.get(name, [])]
        if wish == "auto" and own:
            held_out[name] = own
        elif isinstance(wish, str) and wish != "auto":
            held_out[name] = _read_named(wish, name, rejects, report, kind)
        elif share := DEFAULT_SHARE if wish == "auto" else float(wish):
            shares[name] = share
    everything = [c for _, part in parts for c in part["train"]] + [
        c for rows in held_out.values() for c in rows
    ]
    likeness = Likeness(everything)
    train = [(spec, _deduplicate(part["train"], data, report, likeness)) for spec, part in parts]
    if shares:
        train = _cut_off(train, shares, data, held_out, likeness)
    mixed: list[Conversation] = []
    for spec, rows in train:
        keys = [likeness.hash_of(c) for c in rows]
        mixed += [rows[n] for n in mix_rows(keys, weight=spec.weight, seed=data.seed)]
    found = {"train": mixed, "validation": held_out.get("validation"), "test": held_out.get("test")}
    kept = {
        name: rows
        for name, rows in found.items()
        if rows is not None and not (data.streaming and name == "train")
    }
    return Collected(kept, likeness)


def check_stream_splits(data: DataSpec) -> None:
    """Streaming takes held-out rows from named files only: a share cannot be cut from rows not yet read."""
    own = {name for spec in as_source_specs(data.train) for name in find_sources(spec)}
    for name in ("validation", "test"):
        wish: Any = getattr(data.split, name)
        if (wish == "auto" and name not in own) or (not isinstance(wish, str) and wish > 0):
            raise DataError(
                f"data.split.{name}",
                "streaming cannot cut a share of the rows",
                rule="with data.streaming the held-out splits are named files",
                cure=f"Set data.split.{name} to a file, or to 0",
            )


def _read_source(
    spec: SourceSpec, data: DataSpec, rejects: Rejects, report: CheckReport, kind: RowKind
) -> tuple[SourceSpec, dict[str, list[Conversation]]]:
    """All splits that a source brings and the job will use; a streaming job reads its training rows later."""
    wanted = {n for n in ("validation", "test") if getattr(data.split, n) == "auto"}
    found = find_sources(spec)
    if "train" not in found:
        raise DataError(spec.path, "no train split", rule="training rows come from a split named train")
    part: dict[str, list[Conversation]] = {"train": []}
    for name, source in found.items():
        if name in wanted or (name == "train" and not data.streaming):
            part[name] = _read_all(source, name, spec.format, rejects, report, kind)
    return spec, part


def _read_named(
    text: str, name: str, rejects: Rejects, report: CheckReport, kind: RowKind
) -> list[Conversation]:
    """A held-out split named by its own source: the split of that name, else the source's only rows."""
    found = find_sources(SourceSpec(path=text))
    return _read_all(found.get(name, found["train"]), name, "auto", rejects, report, kind)


def _read_all(
    source: Source, name: str, fmt: str, rejects: Rejects, report: CheckReport, kind: RowKind
) -> list[Conversation]:
    facts = SourceFacts(name=source.name, split=name, format=fmt, revision=source.revision)
    report.sources.append(facts)
    rows = list(read_conversations(source, rejects, facts, fmt=fmt, kind=kind))
    if not rows:
        raise DataError(
            source.name,
            "its only row is bad" if facts.num_rejected == 1 else f"all {facts.num_rejected} rows are bad",
            rule="a source has at least one good row",
            cure=f"The first: {rejects.rows[0]['reason']}" if rejects.rows else "",
        )
    return rows


def _deduplicate(
    rows: list[Conversation], data: DataSpec, report: CheckReport, likeness: Likeness
) -> list[Conversation]:
    """Rows without exact repeats if the job asks for that; repeats are counted either way."""
    facts = report.splits.setdefault("train", SplitFacts())
    first: dict[str, Conversation] = {}
    for row in rows:
        first.setdefault(likeness.hash_of(row), row)
    facts.num_exact_duplicates += len(rows) - len(first)
    return list(first.values()) if data.deduplicate == "exact" else rows


def _cut_off(
    train: Sequence[tuple[SourceSpec, list[Conversation]]],
    shares: dict[str, float],
    data: DataSpec,
    held_out: dict[str, list[Conversation]],
    likeness: Likeness,
) -> list[tuple[SourceSpec, list[Conversation]]]:
    """Cut held-out rows off the training rows by groups; the cut rows go to `held_out`."""
    flat = [row for _, rows in train for row in rows]
    names = assign_splits(likeness.find_split_groups(flat), shares=shares, seed=data.seed)
    for name in shares:
        held_out[name] = [row for row, split in zip(flat, names, strict=True) if split == name]
        if not held_out[name]:
            raise DataError(
                "data.split",
                f"{name} would be empty: {format_number(len(flat), 'row')} in too few groups of near-duplicates",
                rule="each split gets at least one group",
                cure=f"Give more rows, or name a file under data.split.{name}",
            )
    cut = iter(names)
    return [(spec, [row for row in rows if next(cut) == "train"]) for spec, rows in train]
