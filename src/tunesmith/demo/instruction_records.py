"""Notes of everyday domains and the JSON record each one holds, with a schema drawn at random per conversation.

A schema is a handful of fields; every field has a kind (person, code, thing, ...), a random key, and a few sentence
frames that carry its value. Labels (concepts such as rain, fear, hurry) are never named in the note, only meant.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tunesmith.demo.instruction_labels import (
    draw_any_labels,
    draw_clause,
    draw_fragment,
    draw_level,
    draw_meant_labels,
    draw_own_labels,
    draw_wrappers,
)
from tunesmith.demo.instruction_values import (
    TABLES,
    Stock,
    draw_code,
    draw_date,
    draw_name,
    draw_number,
    draw_place,
    draw_thing,
    misspell,
)

KEYS: dict[str, list[str]] = TABLES["keys"]
FRAMES: dict[str, list[str]] = TABLES["frames"]
PLAIN_SHARE = 0.55  # of the schemas: can be understood without an example
MEANT_KINDS = (("label", 0.7), ("label", 0.35), ("labels", 0.65), ("level", 0.5))  # kind, share of schemas


@dataclass
class Field:
    """One field of a schema: its kind, key, how often it is absent, its frames or its label -> clauses."""

    kind: str
    key: str
    absent: float
    frames: list[str] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)
    wrappers: list[str] = field(default_factory=lambda: ["{}"])
    default: str | None = None
    parts: tuple[str, str] = ("value", "unit")


def draw_key(draw: random.Random, kind: str, words: list[str], is_plain: bool = False) -> str:
    """A field name; mostly arbitrary words, so that only the context can tell it, unless it shall be plain."""
    style = draw.random()
    if is_plain or style < 0.3:
        return draw.choice(KEYS[kind])
    if style < 0.8:
        return draw.choice(words)
    return draw.choice(
        (
            f"{draw.choice(words)}_{draw.choice(KEYS[kind])}",
            draw.choice(words).capitalize(),
            draw.choice(words)[:4],
        )
    )


def draw_frame(draw: random.Random, kind: str, sentences: list[str]) -> str:
    """An invented frame: a value amid words of some sentence, as in 'the old {} looked at'; a thing has an article."""
    before, after = draw_fragment(draw, sentences, 1, 4), draw_fragment(draw, sentences, 1, 3)
    if kind == "thing" and draw.random() < 0.8:
        article = draw.choice(("the", "the", "a", "my", "our"))
        return draw.choice(
            (f"{before} {article} {{}}", f"{before} {article} {{}} {after}", f"{article} {{}} {after}")
        )
    return draw.choice(
        (f"{before} {{}}", f"{before} {{}} {after}", f"{before}: {{}}", f"{before}, {{}}", f"{{}} {after}")
    )


@dataclass(frozen=True)
class Schema:
    """The fields of a conversation's records.

    A plain one can be understood without an example: keys and labels mean what they say. Listed labels stand in its
    system prompt; else any concept may come.
    """

    fields: list[Field]
    is_plain: bool
    is_listed: bool


def draw_schema(draw: random.Random, stock: Stock) -> Schema:
    """Two to nine fields with distinct keys, at least two of them copied."""
    is_plain = draw.random() < PLAIN_SHARE
    copied = draw.sample(sorted(FRAMES), draw.randint(2, 5))
    meant = [kind for kind, chance in MEANT_KINDS if draw.random() < chance]
    # Two fields whose labels are not known from the prompt could not be told apart without an example.
    is_listed = (is_plain and (len(meant) > 1 or draw.random() < 0.6)) or (
        not is_plain and draw.random() < 0.3
    )
    kinds = copied + meant
    draw.shuffle(kinds)
    schema = Schema([], is_plain, is_listed)
    keys: set[str] = set()
    used: set[str] = set()
    for kind in kinds:
        key = draw_key(draw, kind, stock.words, is_plain)
        while key in keys:
            key = draw_key(draw, kind, stock.words, is_plain)
        keys.add(key)
        one = Field(kind, key, draw.choice((0.0, 0.0, 0.2, 0.5)))
        if kind in FRAMES:
            give_frames(draw, one, stock, is_plain)
        else:
            give_labels(draw, one, stock, used, schema)
        schema.fields.append(one)
    return schema


def give_frames(draw: random.Random, one: Field, stock: Stock, is_plain: bool) -> None:
    """The sentences that carry a copied field's value."""
    frames = FRAMES[one.kind]
    one.frames = draw.sample(frames, draw.choice((1, 2, 4, min(7, len(frames)))))
    if not is_plain and draw.random() < 0.5:
        one.frames = [draw_frame(draw, one.kind, stock.sentences) for _ in range(draw.choice((1, 2, 3, 12)))]
    if one.kind in ("money", "quantity"):
        named = (("sum", "currency"), ("value", "unit"), ("amount", "unit"), ("n", "in"), ("number", "of"))
        words = stock.words
        invented = (draw_key(draw, "quantity", words), draw_key(draw, "code", words) + "s")
        one.parts = draw.choice(named) if is_plain or draw.random() < 0.25 else invented


def give_labels(draw: random.Random, one: Field, stock: Stock, used: set[str], schema: Schema) -> None:
    """The labels of a field that is meant, never said, and the clauses that mean them."""
    one.wrappers = ["{}"] if draw.random() < 0.5 else draw_wrappers(draw, stock.sentences)
    count = {"label": draw.randint(2, 6), "labels": draw.randint(3, 8), "level": 2}[one.kind]
    if one.kind == "level" and draw.random() < 0.6:
        one.labels = draw_level(draw, stock, used)
    if one.labels:
        pass
    elif not schema.is_plain:
        one.labels = draw_any_labels(draw, stock, count, used)
    elif schema.is_listed:
        one.labels = draw_meant_labels(draw, stock, count, used)
    else:
        one.labels = draw_own_labels(draw, stock, 40, used)
    if one.kind == "level" or (not schema.is_plain and draw.random() < 0.2):
        one.default = draw.choice(("normal", "none", "other", "medium", draw.choice(stock.words)))
        if schema.is_plain:
            one.default = "normal"
    one.absent = 0.4 if one.default else 0.0 if one.kind == "labels" else one.absent


def draw_value(draw: random.Random, one: Field, stock: Stock) -> tuple[Any, str]:
    """(value for the record, value as written in the note) of a copied field."""
    if one.kind in ("money", "quantity"):
        table = TABLES["money"] if one.kind == "money" else TABLES["units"]
        unit = draw.choice(tuple(table))
        number = draw_number(draw)
        return {one.parts[0]: number, one.parts[1]: unit}, draw.choice(table[unit]).format(number)
    if one.kind == "count":
        count = draw.randint(2, 400)
        return count, str(count)
    if one.kind == "time":
        clock = f"{draw.randint(0, 23)}:{draw.randint(0, 59):02d}"
        return clock, clock
    if one.kind == "thing":
        thing = draw_thing(draw, stock)
        return thing, thing
    text = {"person": draw_name, "code": draw_code, "date": draw_date, "place": draw_place}[one.kind](draw)
    return text, text


def fill_record(
    draw: random.Random, schema: Schema, stock: Stock
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(record without absent keys, key -> the clauses that say it), pairs of fields sometimes in one clause."""
    record: dict[str, Any] = {}
    clauses: dict[str, list[str]] = {}
    written: dict[str, tuple[str, str]] = {}
    for one in schema.fields:
        if draw.random() < one.absent:
            if one.default:
                record[one.key] = one.default
            continue
        if one.kind in FRAMES:
            record[one.key], text = draw_value(draw, one, stock)
            written[one.kind] = (one.key, text)
            frame = draw_clause(draw, one.frames)
            if frame.startswith("{}") and text[0].islower():
                frame = "the " + frame  # a value is never capitalised by its place in the note
            clauses[one.key] = [frame.replace("{}", text)]
            continue
        names = list(one.labels)
        found = (
            draw.sample(names, min(len(names), draw.choice((1, 1, 2, 2, 3, 3))))
            if one.kind == "labels"
            else [draw.choice(names)]
        )
        record[one.key] = found if one.kind == "labels" else found[0]
        said = [
            draw.choice(one.wrappers).replace("{}", draw_clause(draw, one.labels[name])) for name in found
        ]
        clauses[one.key] = said[:1] + [draw.choice(TABLES["joiners"]) + clause for clause in said[1:]]
    fitting = [frame for frame in TABLES["pair_frames"] if frame[0] in written and frame[1] in written]
    if fitting and draw.random() < 0.5:
        first, second, frame = draw.choice(fitting)
        frame = draw_clause(draw, [frame])
        clauses[written[first][0]] = [frame.format(written[first][1], written[second][1])]
        del clauses[written[second][0]]
    return record, clauses


def join_note(draw: random.Random, clauses: list[str], style: str) -> str:
    """One note out of its clauses, in one of four ways of writing."""
    if style == "lower":
        return ", ".join(clause.rstrip(",") for clause in clauses)
    if style == "lines":
        return "\n".join(clause[0].upper() + clause[1:] for clause in clauses)
    if style == "bullets":
        return "\n".join(f"- {clause}" for clause in clauses)
    sentences = [clause[0].upper() + clause[1:] for clause in clauses]
    return " ".join(clause if clause[-1] in ".,!?:" else clause + "." for clause in sentences)


def write_note(
    draw: random.Random, clauses: dict[str, list[str]], habit: dict[str, Any], stock: Stock
) -> str:
    """The note that says `clauses`, in the conversation's habits: order, style, opening, decoys, misspellings."""
    keys = [key for key in habit["order"] if key in clauses]
    if habit["shuffled"]:
        draw.shuffle(keys)
    parts = [clause for key in keys for clause in clauses[key]]
    if draw.random() < habit["decoy"]:
        table, value = draw.choice(
            (
                ("decoys", draw_code(draw)),
                ("decoy_people", draw_name(draw)),
                ("decoy_dates", draw_date(draw)),
                ("decoy_things", draw_thing(draw, stock)),
                ("", draw.choice(stock.sentences)[:90]),
            )
        )
        decoy = draw_clause(draw, TABLES[table]).format(value) if table else value
        parts.insert(draw.randint(0, len(parts)), decoy)
    if draw.random() < habit["opening"]:
        parts.insert(0, draw.choice(habit["openings"]).format(draw_name(draw)))
    if draw.random() < habit["closing"]:
        parts.insert(max(1, len(parts) - 1), draw.choice(TABLES["closings"]))
    if draw.random() < habit["typos"]:
        parts = [
            " ".join(misspell(draw, word) if draw.random() < 0.05 else word for word in part.split(" "))
            for part in parts
        ]
    return join_note(draw, [part for part in parts if part], habit["style"])


def write_system(draw: random.Random, schema: Schema) -> str:
    """A system prompt that names the fields, their labels if these are listed, or (unless plain) says nothing."""
    keys = [one.key for one in schema.fields]
    if schema.is_listed:
        keys = [f"{one.key} ({list_labels(one)})" if one.labels else one.key for one in schema.fields]
    listed = ", ".join(keys)
    titled = f"{draw.choice(TABLES['domains'])} to JSON: {listed}."
    other = f"{draw.choice(TABLES['domains'])} to JSON: {listed}."
    named = (f"Write as JSON: {listed}.", f"Extract {listed} as JSON.", f"JSON with the keys {listed}.")
    said = (titled, other, *named)
    return draw.choice(said if schema.is_plain else (*said, "Note to JSON.", ""))


def list_labels(one: Field) -> str:
    """The labels of a field as a system prompt lists them; a scale's default lies between its ends."""
    labels = list(one.labels)
    if one.default:
        labels.insert(1, one.default)
    return "|".join(labels)


def make_record_pairs(draw: random.Random, stock: Stock) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, note and compact JSON pairs) of one random schema."""
    schema = draw_schema(draw, stock)
    habit = {
        "order": [one.key for one in schema.fields], "shuffled": draw.random() < 0.4,
        "decoy": draw.choice((0.0, 0.3, 0.8)),
        "opening": draw.choice((0.0, 0.5, 1.0)), "openings": draw.sample(TABLES["openings"], draw.choice((1, 2, 8))),
        "closing": draw.choice((0.0, 0.4)), "typos": draw.choice((0.0, 0.0, 0.5)), "style": "plain",
    }  # fmt: skip
    draw.shuffle(habit["order"])
    with_null = draw.random() < 0.1
    mixed = draw.random() < 0.4  # every note in its own way of writing, or all alike
    style = draw.choice(("plain", "plain", "lower", "lines", "bullets"))
    pairs = []
    for _ in range(draw.choice((1, 1, 2, 3) if schema.is_plain else (1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9))):
        habit["style"] = draw.choice(("plain", "lower", "lines", "bullets")) if mixed else style
        record, clauses = fill_record(draw, schema, stock)
        if not clauses:
            continue
        if with_null:
            record |= {one.key: None for one in schema.fields if one.key not in record}
        ordered = {one.key: record[one.key] for one in schema.fields if one.key in record}
        pairs.append(
            (
                write_note(draw, clauses, habit, stock),
                json.dumps(ordered, ensure_ascii=False, separators=(",", ":")),
            )
        )
    if not pairs:
        return make_record_pairs(draw, stock)
    return write_system(draw, schema), pairs
