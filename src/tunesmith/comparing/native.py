"""Row by row: what a framework makes of raw rows by its own preprocessing, and what we made of them. Pure.

A row is cut into what agrees at its start, what agrees at its end, and a middle that does not; the differences between
renderings that are really met (a second BOS, no EOS, a cut, a newline after the end marker) leave a middle that says
which of them it was. Tokens that no side trains after the last one that it does are nobody's business: no loss and no
gradient depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.core.native import NativeExample, NativeKind, NativeTokens
from tunesmith.core.types import TokenRow

IGNORED = -100
MAX_EXAMPLES = 5
_SHOWN_TOKENS, _SHOWN_CHARS = 12, 60
_LEAST_TAIL = 4
KINDS: dict[str, tuple[str, str]] = {
    "missing row": ("Row left out", "leaves out {rows}"),
    "cut end": ("Cut at the end", "cuts {tokens} from the end of {rows}"),
    "cut start": ("Cut at the start", "cuts {tokens} from the start of {rows}"),
    "cut inside": ("Cut inside", "leaves {tokens} out of the middle of {rows}"),
    "not cut": ("Not cut where ours is", "keeps {tokens} that we cut from {rows}"),
    "extra bos": ("BOS more", "begins {rows} with a BOS too many"),
    "missing bos": ("BOS missing", "begins {rows} without BOS"),
    "bos inside": ("BOS inside", "writes {tokens} of BOS more inside of {rows}"),
    "missing stop": ("Stop token missing", "ends {rows} without the stop token"),
    "untrained stop": ("Stop token not trained", "does not train the stop token in {rows}"),
    "trained prompt": ("Prompt trained", "trains {tokens} of the prompt in {rows}"),
    "trained template": ("Template trained", "trains {tokens} after or between the answers of {rows}"),
    "untrained answer": ("Answer not trained", "leaves {tokens} of answers untrained in {rows}"),
    "moved labels": ("Labels moved", "has labels that are other tokens than their own in {rows}"),
    "other tokens": ("Other tokens", "makes other tokens of {rows}"),
}
"""Name -> title, and what the framework does, as a clause. In the order in which they are told."""


@dataclass(frozen=True, slots=True)
class TheirRow:
    """A line of `native.jsonl`. row: its number among the raw rows. labels: -100 where no loss counts; unshifted."""

    row: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """What both sides were told. stop_ids: tokens that end an answer. decode: the text of ids."""

    stop_ids: Collection[int]
    bos_id: int | None
    max_tokens: int
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class _Found:
    """A difference in one row. at: place in our row; at_theirs: in theirs. tokens: how many it concerns."""

    kind: str
    tokens: int
    at: int
    at_theirs: int


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def compare_rows(
    framework: str, ours: Sequence[TokenRow], theirs: Mapping[int, TheirRow], rules: Rules
) -> NativeTokens:
    """What differs, by kind. theirs: by the number of the row in `ours`; rows that are missing were left out."""
    rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    examples: dict[str, list[NativeExample]] = {}
    same = their_tokens = their_targets = 0
    for number, row in enumerate(ours):
        their = theirs.get(number)
        found = list(find_differences(row, their, rules))
        same += not found
        if their is not None:
            their_tokens += len(their.input_ids)
            their_targets += sum(label != IGNORED for label in their.labels[1:])
        for kind in dict.fromkeys(item.kind for item in found):
            items = [item for item in found if item.kind == kind]
            rows[kind] = rows.get(kind, 0) + 1
            tokens[kind] = tokens.get(kind, 0) + sum(item.tokens for item in items)
            shown = examples.setdefault(kind, [])
            if len(shown) < MAX_EXAMPLES:
                shown.append(_show(row, their, items[0], rules))
    kinds = [
        NativeKind(name, title, rows[name], tokens[name], examples[name])
        for name, (title, _) in KINDS.items()
        if name in rows
    ]
    targets = sum(row.num_targets for row in ours)
    says = _tell(framework, len(ours), same, their_targets - targets, kinds)
    total = sum(len(row.ids) for row in ours)
    return NativeTokens(framework, len(ours), same, total, their_tokens, targets, their_targets, kinds, says)


def find_differences(ours: TokenRow, theirs: TheirRow | None, rules: Rules) -> Iterator[_Found]:
    """Everything in which one row differs; nothing if the model is trained on the same."""
    if theirs is None:
        yield _Found("missing row", len(ours.ids), 0, 0)
        return
    # Nothing before the first token could predict it, so it carries no loss.
    marks = [0, *(int(label != IGNORED) for label in theirs.labels[1:])]
    moved = [
        at
        for at, (token, label) in enumerate(zip(theirs.input_ids, theirs.labels, strict=True))
        if at and label not in (token, IGNORED)
    ]
    if moved:
        yield _Found("moved labels", len(moved), moved[0], moved[0])
    a, b = _Row(list(ours.ids), list(ours.mask)), _Row(list(theirs.input_ids), marks)
    leads = [_count_bos(row.ids, rules.bos_id) for row in (a, b)]
    if leads[0] != leads[1]:
        kind = "extra bos" if leads[1] > leads[0] else "missing bos"
        yield _Found(kind, abs(leads[1] - leads[0]), min(leads), min(leads))
    full_lengths = len(a), len(b)
    bos = -1 if rules.bos_id is None or rules.bos_id in rules.stop_ids else rules.bos_id
    a_places, b_places = range(leads[0], len(a)), range(leads[1], len(b))
    more = _pick(b, b_places).ids.count(bos) - _pick(a, a_places).ids.count(bos)
    if more > 0:
        start = _count_equal(a.ids[leads[0] :], b.ids[leads[1] :])
        yield _Found("bos inside", more, a_places.start + start, b_places.start + start)
        if trained := sum(mark for token, mark in zip(b.ids, b.mask, strict=True) if token == bos):
            yield _Found("trained template", trained, a_places.start + start, b_places.start + start)
        a_places = [at for at in a_places if a.ids[at] != bos]
        b_places = [at for at in b_places if b.ids[at] != bos]
    for item in _compare_bodies(_pick(a, a_places), _pick(b, b_places), full_lengths, rules):
        at, at_theirs = [*a_places, len(a)][item.at], [*b_places, len(b)][item.at_theirs]
        yield _Found(item.kind, item.tokens, at, at_theirs)


def _pick(row: _Row, places: Sequence[int]) -> _Row:
    return _Row([row.ids[at] for at in places], [row.mask[at] for at in places])


def _count_bos(ids: Sequence[int], bos_id: int | None) -> int:
    count = 0
    while count < len(ids) and ids[count] == bos_id:
        count += 1
    return count


def _compare_bodies(a: _Row, b: _Row, full_lengths: tuple[int, int], rules: Rules) -> Iterator[_Found]:
    """a, b: ours and theirs without BOS. full_lengths: with it, which is what a limit counts."""
    start = _count_equal(a.ids, b.ids)
    end = _count_equal(a.ids[start:][::-1], b.ids[start:][::-1])
    first = next((at for at, kept in enumerate(a.mask) if kept), len(a))
    yield from _compare_masks(a, b, range(start), 0, first, rules)
    yield from _compare_masks(a, b, range(len(a) - end, len(a)), len(b) - len(a), first, rules)
    if max(len(a), len(b)) > start + end:
        yield from _compare_middles(a, b, start, end, full_lengths, rules)


def _compare_middles(
    a: _Row, b: _Row, start: int, end: int, full_lengths: tuple[int, int], rules: Rules
) -> Iterator[_Found]:
    """Rows whose first `start` and last `end` tokens agree, and what lies between does not."""
    left, more = len(a) - start - end, len(b) - start - end
    if not more and start == len(b):
        # Theirs is the beginning of ours.
        only_stop = left == 1 and a.ids[-1] in rules.stop_ids and full_lengths[1] < rules.max_tokens
        yield _Found("missing stop" if only_stop else "cut end", left, start, start)
    elif not more and end == len(b):
        yield _Found("cut start", left, 0, 0)
    elif not more and full_lengths[1] >= rules.max_tokens:
        yield _Found("cut inside", left, start, start)
    elif not left and start == len(a):
        # Ours is the beginning of theirs; untrained tokens after it change nothing.
        if trained := sum(b.mask[start:]):
            kind = "not cut" if full_lengths[0] >= rules.max_tokens else "trained template"
            yield _Found(kind, trained, start, start)
    elif left == 1 and not end and a.mask[-1] and a.ids[-1] in rules.stop_ids and not _holds(b, start, rules):
        yield _Found("missing stop", 1, start, start)
        if trained := sum(b.mask[start:]):
            yield _Found("trained template", trained, start, start)
    elif not left and (trained := _count_before_stop(a, b, range(start, start + more), rules)):
        yield _Found("trained template", trained, start, start)
    elif min(full_lengths) >= rules.max_tokens and (size := _find_tail(a.ids, b.ids, start)):
        # Both at the limit: ours lost its end, theirs a piece before it.
        yield _Found("cut inside", len(a) - size - start, start, start)
        if trained := sum(b.mask[start + size :]):
            yield _Found("not cut", trained, len(a), start + size)
    else:
        yield _Found("other tokens", max(left, more), start, start)


def _count_before_stop(a: _Row, b: _Row, places: range, rules: Rules) -> int:
    """Trained tokens that theirs has more, if they stand between an answer of ours and its stop token."""
    at = places.start
    ends = at > 0 and a.mask[at - 1] and a.ids[at] in rules.stop_ids
    return sum(b.mask[place] for place in places) if ends else 0


def _find_tail(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """How many of a's last tokens b goes on with from `start`; 0 if too few to tell."""
    sizes = range(len(a) - start - 1, _LEAST_TAIL - 1, -1)
    return next((size for size in sizes if a[-size:] == b[start : start + size]), 0)


def _holds(row: _Row, start: int, rules: Rules) -> bool:
    return any(token in rules.stop_ids for token in row.ids[start:])


def _count_equal(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _compare_masks(a: _Row, b: _Row, places: range, shift: int, first: int, rules: Rules) -> Iterator[_Found]:
    """Labels where the tokens agree. shift: from a place in our row to the one in theirs. first: our first target."""
    for at in places:
        ours, theirs = bool(a.mask[at]), bool(b.mask[at + shift])
        if ours and not theirs:
            kind = "untrained stop" if a.ids[at] in rules.stop_ids else "untrained answer"
            yield _Found(kind, 1, at, at + shift)
        elif theirs and not ours:
            yield _Found("trained prompt" if at < first else "trained template", 1, at, at + shift)


# --- words ------------------------------------------------------------------------------------------------------------


def _show(ours: TokenRow, theirs: TheirRow | None, found: _Found, rules: Rules) -> NativeExample:
    their_ids = theirs.input_ids[found.at_theirs :] if theirs else ()
    pieces = [_shorten(ids, rules) for ids in (ours.ids[found.at :], their_ids)]
    return NativeExample(ours.origin.place, found.at, *pieces)


def _shorten(ids: Sequence[int], rules: Rules) -> str:
    text = rules.decode(list(ids[:_SHOWN_TOKENS]))
    short = len(ids) <= _SHOWN_TOKENS and len(text) <= _SHOWN_CHARS
    return text if short else text[:_SHOWN_CHARS] + "…"


def _tell(framework: str, rows: int, same: int, extra: int, kinds: Sequence[NativeKind]) -> str:
    if same == rows:
        return f"{framework} makes the same tokens and labels of all {_count(rows, 'row')}"
    differ = f"{rows - same:,} of {_count(rows, 'row')} {'differs' if rows - same == 1 else 'differ'}"
    head = f"{framework} trains as many tokens as we do, and {differ}"
    if extra:
        more = "more token" if extra > 0 else "fewer token"
        head = f"{framework} trains {_count(abs(extra), more)}; {differ}"
    clauses = [
        KINDS[kind.name][1].format(rows=_count(kind.rows, "row"), tokens=_count(kind.tokens, "token"))
        for kind in kinds
    ]
    return f"{head}: it {'; it '.join(clauses)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
