"""Notes of everyday domains and the JSON record each one holds, with a schema drawn at random per conversation.

A schema is a handful of fields; every field has a kind (person, code, thing, ...), a random key, and a few sentence
frames that carry its value. Labels (concepts such as rain, fear, hurry) are never named in the note, only meant.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLES: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("task_notes.toml").read_text(encoding="utf-8")
)
KEYS: dict[str, list[str]] = TABLES["keys"]
FRAMES: dict[str, list[str]] = TABLES["frames"]
VOWELS = ("a", "a", "e", "e", "i", "i", "o", "u", "ia", "ea", "ee", "au", "ai", "oa", "y")
ONSETS = tuple(
    "b c d f g h j k l m n p r s t v w z br ch cl dr gr kl kr ph pr qu sh st th tr ll nd ng rt ss tt".split()
)
CODAS = (
    "",
    "",
    "",
    "n",
    "l",
    "s",
    "r",
    "m",
    "d",
    "th",
    "ck",
    "na",
    "ta",
    "ne",
    "lle",
    "rd",
    "x",
    "ger",
    "us",
)
PLAIN_SHARE = 0.55  # of the schemas: can be understood without an example
MEANT_KINDS = (("label", 0.7), ("label", 0.35), ("labels", 0.65), ("level", 0.5))  # kind, share of schemas


def draw_syllables(draw: random.Random) -> str:
    """A made-up word, which can only be copied."""
    start = draw.choice(("", *ONSETS)) + draw.choice(VOWELS)
    middle = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((0, 1, 1, 2))))
    return start + middle + draw.choice(CODAS)


def draw_name(draw: random.Random) -> str:
    """A given name: a known one, or one made up of known parts or of syllables."""
    style = draw.random()
    if style < 0.4:
        return draw.choice(TABLES["given"])
    if style < 0.6:
        return draw.choice(TABLES["starts"]) + draw.choice(TABLES["ends"])
    return draw_syllables(draw).capitalize()


def draw_place(draw: random.Random) -> str:
    return (
        draw.choice(TABLES["starts"])
        + draw.choice(TABLES["ends"])
        + draw.choice(("", "ville", "burg", " Hill", "field", "port", " Bay"))
    )


def draw_code(draw: random.Random) -> str:
    """An identifier of a random shape, such as 4821, QX-73, 55/210 or #A19."""
    shape = draw.choice(
        (
            "####",
            "#####",
            "######",
            "@-####",
            "@-#####",
            "@@####",
            "@@###",
            "####-###",
            "##/##",
            "#@#@",
            "@@-##",
            "###",
            "@##",
            "##.###",
        )
    )
    body = "".join(
        str(draw.randint(0, 9)) if c == "#" else draw.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") if c == "@" else c
        for c in shape
    )
    return draw.choice(("", "", "", "", "#", "no")) + body


def draw_date(draw: random.Random) -> str:
    day, month, year = draw.randint(1, 28), draw.randint(0, 11), draw.randint(1890, 2040)
    name = TABLES["months"][month]
    numbers = (f"{day:02d}/{month + 1:02d}", f"{year}-{month + 1:02d}-{day:02d}", f"{day}.{month + 1}.")
    written = (f"{day} {name}", f"{name} {day}", f"{day} {name} {year}", f"{name[:3]} {day}")
    return draw.choice((*numbers, *written, draw.choice(TABLES["days"])))


@dataclass(frozen=True)
class Stock:
    """What tasks are made from: frequent words and sentences of the texts, and concepts with their clauses.

    nouns, adjectives: words that follow an article; empty lists fall back to `words`.
    topics: for each of many words, short fragments of the texts that hold it.
    """

    words: list[str]
    sentences: list[str]
    concepts: dict[str, list[str]]
    nouns: list[str] = field(default_factory=list)
    adjectives: list[str] = field(default_factory=list)
    topics: list[list[str]] = field(default_factory=list)


def draw_thing(draw: random.Random, stock: Stock) -> str:
    """A thing by name: one or two nouns, mostly with something before them; sometimes arbitrary or made-up words."""
    nouns, adjectives = stock.nouns or stock.words, stock.adjectives or stock.words
    if draw.random() < 0.12:
        return " ".join(draw.choice(stock.words) for _ in range(draw.choice((1, 2, 2, 3))))
    # Mostly real objects: what else is named in a note is then not taken for the thing.
    is_real = draw.random() < 0.7
    objects = TABLES["objects"] if is_real else nouns
    thing = draw.choice(objects) if draw.random() < 0.88 else draw_syllables(draw)
    if draw.random() < 0.4:
        thing = f"{draw.choice((nouns, objects, stock.words)[draw.randrange(3)])} {thing}"
    style = draw.random()
    if style < 0.3:
        return thing
    looks = TABLES["looks"] if is_real and draw.random() < 0.5 else draw.choice((adjectives, nouns, stock.words))
    start = draw.choice(looks)
    if style > 0.93:
        start = draw_place(draw)
    elif style > 0.86:
        start = draw_syllables(draw)
    elif style > 0.8:
        start = f"{start}-{draw.choice(nouns)}"
    return f"{start.capitalize() if draw.random() < 0.15 else start} {thing}"


def draw_number(draw: random.Random) -> int | float:
    whole = draw.choice((draw.randint(1, 30), draw.randint(10, 400)))
    return (
        whole
        if draw.random() < 0.5
        else float(f"{whole}.{draw.choice(('', str(draw.randint(0, 9))))}{draw.randint(1, 9)}")
    )


def misspell(draw: random.Random, word: str) -> str:
    """Swap, drop or double one inner letter of a longer lower-case word."""
    if len(word) < 5 or not word.isalpha() or not word.islower():
        return word
    at = draw.randint(1, len(word) - 2)
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return draw.choice((swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]))


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


def draw_fragment(draw: random.Random, sentences: list[str], low: int, high: int) -> str:
    """A few words in a row out of some sentence, lower case, without marks at the ends."""
    parts = draw.choice(sentences).lower().split()
    at = draw.randint(0, max(0, len(parts) - high))
    return " ".join(parts[at : at + draw.randint(low, high)]).strip(".,;!?'")


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


def draw_wrappers(draw: random.Random, sentences: list[str]) -> list[str]:
    """Frames for whole clauses, such as 'he said, {}'; one of them is often the bare clause."""
    wrappers = []
    for _ in range(draw.choice((1, 2, 3, 12))):
        piece = draw_fragment(draw, sentences, 1, 4)
        wrappers.append(
            draw.choice(("{}", f"{piece}, {{}}", f"{piece}: {{}}", f"{piece} {{}}", f"{{}}, {piece}"))
        )
    return wrappers


def draw_clause(draw: random.Random, clauses: list[str]) -> str:
    """One of `clauses`, with one choice of each group of alternatives, such as [rain|hail]."""
    clause = draw.choice(clauses)
    return re.sub(r"\[([^]]*)]", lambda group: draw.choice(group[1].split("|")), clause)


def draw_fragments(draw: random.Random, stock: Stock) -> list[str]:
    """Clauses without a common meaning: they share a word or a few, or nothing at all."""
    if draw.random() < 0.55 and stock.topics:
        topics = [draw.choice(stock.topics) for _ in range(draw.choice((1, 1, 2, 3)))]
        return [clause for topic in topics for clause in draw.sample(topic, min(4, len(topic)))]
    return [draw_fragment(draw, stock.sentences, 3, 7) for _ in range(draw.randint(1, 6))]


def draw_labels(
    draw: random.Random, stock: Stock, count: int, used: set[str], is_plain: bool = False
) -> dict[str, list[str]]:
    """Label -> clauses for `count` concepts not used yet.

    Plain labels are the concepts' own names. Others stand for an everyday concept by one of its names or an arbitrary
    word, or for fragments of the texts. An arbitrary label is defined by the earlier answers alone.
    """
    chosen = draw.sample([name for name in stock.concepts if name not in used], count)
    used.update(chosen)
    if is_plain:
        return {concept: stock.concepts[concept][1:] for concept in chosen}
    is_named, few, with_letters = draw.random() < 0.6, draw.random() < 0.25, draw.random() < 0.03
    concept_share = draw.choice((1.0, 1.0, 0.3))
    labels = {}
    for at, concept in enumerate(chosen):
        others, *clauses = stock.concepts[concept]
        label = draw.choice([concept, *others.split(", ")])
        if draw.random() > concept_share:
            clauses = draw_fragments(draw, stock)
            label = draw.choice(stock.words)
        label = chr(65 + at) if with_letters else label if is_named else draw.choice(stock.words)
        labels[label] = draw.sample(clauses, min(4, len(clauses))) if few else clauses
    return labels


def draw_parts(draw: random.Random, stock: Stock, is_plain: bool) -> tuple[str, str]:
    """The keys of a number and its unit."""
    if is_plain or draw.random() < 0.25:
        named = (("sum", "currency"), ("value", "unit"), ("amount", "unit"), ("n", "in"), ("number", "of"))
        return draw.choice(named)
    return draw_key(draw, "quantity", stock.words), draw_key(draw, "code", stock.words) + "s"


def draw_schema(draw: random.Random, stock: Stock, is_plain: bool) -> list[Field]:
    """Three to eight fields with distinct keys, at least one of them copied.

    A plain schema can be understood without an example: keys and labels mean what they say.
    """
    copied = draw.sample(sorted(FRAMES), draw.randint(2, 5))
    meant = [kind for kind, chance in MEANT_KINDS if draw.random() < chance]
    kinds = copied + meant
    draw.shuffle(kinds)
    keys: set[str] = set()
    used: set[str] = set()
    schema = []
    for kind in kinds:
        key = draw_key(draw, kind, stock.words, is_plain)
        while key in keys:
            key = draw_key(draw, kind, stock.words, is_plain)
        keys.add(key)
        one = Field(kind, key, draw.choice((0.0, 0.0, 0.2, 0.5)))
        if kind in FRAMES:
            one.frames = draw.sample(FRAMES[kind], draw.choice((1, 2, 4, min(7, len(FRAMES[kind])))))
            if not is_plain and draw.random() < 0.5:
                one.frames = [
                    draw_frame(draw, kind, stock.sentences) for _ in range(draw.choice((1, 2, 3, 12)))
                ]
            if kind in ("money", "quantity"):
                one.parts = draw_parts(draw, stock, is_plain)
        else:
            one.wrappers = ["{}"] if draw.random() < 0.5 else draw_wrappers(draw, stock.sentences)
            count = {"label": draw.randint(2, 6), "labels": draw.randint(3, 8), "level": 2}[kind]
            if is_plain and len(meant) == 1:
                count = 40  # any of many: which labels there are is not known from the conversation
            one.labels = draw_labels(draw, stock, count, used, is_plain)
            one.default = (
                draw.choice(("normal", "none", "other", "medium", draw.choice(stock.words)))
                if kind == "level" or draw.random() < 0.2
                else None
            )
            if is_plain:
                one.default = "normal" if kind == "level" else None
            one.absent = 0.4 if one.default else 0.0 if kind == "labels" else one.absent
        schema.append(one)
    return schema


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
    draw: random.Random, schema: list[Field], stock: Stock
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(record without absent keys, key -> the clauses that say it), pairs of fields sometimes in one clause."""
    record: dict[str, Any] = {}
    clauses: dict[str, list[str]] = {}
    written: dict[str, tuple[str, str]] = {}
    for one in schema:
        if draw.random() < one.absent:
            if one.default:
                record[one.key] = one.default
            continue
        if one.kind in FRAMES:
            record[one.key], text = draw_value(draw, one, stock)
            written[one.kind] = (one.key, text)
            frame = draw.choice(one.frames)
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
        said = [draw.choice(one.wrappers).replace("{}", draw_clause(draw, one.labels[name])) for name in found]
        clauses[one.key] = said[:1] + [draw.choice(TABLES["joiners"]) + clause for clause in said[1:]]
    fitting = [frame for frame in TABLES["pair_frames"] if frame[0] in written and frame[1] in written]
    if fitting and draw.random() < 0.5:
        first, second, frame = draw.choice(fitting)
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
    draw: random.Random, clauses: dict[str, list[str]], habit: dict[str, Any], sentences: list[str]
) -> str:
    """The note that says `clauses`, in the conversation's habits: order, style, opening, decoys, misspellings."""
    keys = [key for key in habit["order"] if key in clauses]
    if habit["shuffled"]:
        draw.shuffle(keys)
    parts = [clause for key in keys for clause in clauses[key]]
    if draw.random() < habit["decoy"]:
        decoy = draw.choice(
            (
                draw.choice(TABLES["decoys"]).format(draw_code(draw)),
                draw.choice(TABLES["decoy_people"]).format(draw_name(draw)),
                draw.choice(TABLES["decoy_dates"]).format(draw_date(draw)),
                draw.choice(sentences)[:90],
            )
        )
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


def write_system(draw: random.Random, schema: list[Field], is_plain: bool) -> str:
    """A system prompt that names the fields, sometimes their labels, or (unless plain) says nothing."""
    keys = [one.key for one in schema]
    num_meant = sum(bool(one.labels) for one in schema)
    if num_meant > 1 if is_plain else draw.random() < 0.3:
        keys = [f"{one.key} ({'|'.join(one.labels)})" if one.labels else one.key for one in schema]
    listed = ", ".join(keys)
    titled = f"{draw.choice(TABLES['domains'])} to JSON: {listed}."
    other = f"{draw.choice(TABLES['domains'])} to JSON: {listed}."
    named = (f"Write as JSON: {listed}.", f"Extract {listed} as JSON.", f"JSON with the keys {listed}.")
    return draw.choice((titled, other, *named) if is_plain else (titled, other, *named, "Note to JSON.", ""))


def make_record_pairs(draw: random.Random, stock: Stock) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, note and compact JSON pairs) of one random schema."""
    is_plain = draw.random() < PLAIN_SHARE
    schema = draw_schema(draw, stock, is_plain)
    habit = {
        "order": [one.key for one in schema], "shuffled": draw.random() < 0.4, "decoy": draw.choice((0.0, 0.3, 0.8)),
        "opening": draw.choice((0.0, 0.5, 1.0)), "openings": draw.sample(TABLES["openings"], draw.choice((1, 2, 8))),
        "closing": draw.choice((0.0, 0.4)), "typos": draw.choice((0.0, 0.0, 0.5)), "style": "plain",
    }  # fmt: skip
    draw.shuffle(habit["order"])
    with_null = draw.random() < 0.1
    mixed = draw.random() < 0.4  # every note in its own way of writing, or all alike
    style = draw.choice(("plain", "plain", "lower", "lines", "bullets"))
    pairs = []
    for _ in range(draw.choice((1, 1, 2, 3) if is_plain else (1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9))):
        habit["style"] = draw.choice(("plain", "lower", "lines", "bullets")) if mixed else style
        record, clauses = fill_record(draw, schema, stock)
        if not clauses:
            continue
        if with_null:
            record |= {one.key: None for one in schema if one.key not in record}
        ordered = {one.key: record[one.key] for one in schema if one.key in record}
        pairs.append(
            (
                write_note(draw, clauses, habit, stock.sentences),
                json.dumps(ordered, ensure_ascii=False, separators=(",", ":")),
            )
        )
    if not pairs:
        return make_record_pairs(draw, stock)
    return write_system(draw, schema, is_plain), pairs
