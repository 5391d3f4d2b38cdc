"""Notes of everyday domains and the JSON record each one holds, with a schema drawn at random per conversation.

A schema is a handful of fields; every field has a kind (person, code, thing, ...), a random key, and a few sentence
frames that carry its value. Labels (concepts such as rain, fear, hurry) are never named in the note, only meant.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

GIVEN = (
    "Abigail Agnes Alan Alma Andrew Angus Anton Astrid Basil Bella Bertha Boris Cecil Chloe Clive Conrad Cora Dean Della "
    "Duncan Edna Elsa Enid Ernest Esther Ethel Eugene Fanny Fergus Flora Floyd Gemma Gilbert Gloria Harold Hazel Hilda "
    "Homer Horace Ida Irma Isaac Ivy Jasper Joan Joel Judith Julian Kurt Lena Leroy Lionel Lois Luke Mabel Magnus Marion "
    "Mavis Milo Mona Nell Nigel Norman Olive Oliver Owen Pansy Pearl Percy Polly Ralph Rex Rita Roland Rufus Sadie Selma "
    "Silas Stella Sybil Thea Theo Tilda Toby Una Vernon Viola Wanda Wendy Wilma Yorick Zelda Ali Amara Chen Diego Farid Goran "
    "Haruto Imani Jamal Kenji Lakshmi Mateo Nadia Pablo Rania Sanjay Tariq Uma Wei Yara"
).split()
STARTS = "Ba Be Bo Bra Ca Co Da De Do El Fa Fe Ga Go Gra Ha He Ja Jo Ka Ke La Le Lo Ma Me Mo Na Ne No Or Pa Pe Ra Re Ro Sa Se So Ta Te Ti Va Ve Vi Wa We Ya Za".split()  # fmt: skip # noqa: E501
ENDS = "bel bert den der dine do fin go ka la lan lee leth lin lo man mar mine na nard ne nia nor ra ran rick ris ron sa sen sha ta tel ter than tine ton vin wen win".split()  # fmt: skip # noqa: E501
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONEY = {
    "EUR": ("{} euros", "€{}", "EUR {}", "{} EUR"), "USD": ("{} dollars", "${}", "USD {}"), "GBP": ("{} pounds", "£{}", "GBP {}"),
    "JPY": ("{} yen", "¥{}", "JPY {}"), "CHF": ("{} francs", "CHF {}"), "INR": ("{} rupees", "INR {}"),
}  # fmt: skip
UNITS = {
    "kg": ("{} kg", "{} kilos"), "km": ("{} km", "{} kilometres"), "mi": ("{} miles", "{} mi"), "h": ("{} hours", "{} h"),
    "l": ("{} litres", "{} l"), "cup": ("{} cups",), "m": ("{} m", "{} metres"), "C": ("{} degrees", "{} °C"), "g": ("{} grams", "{} g"),
}  # fmt: skip

DOMAINS = (
    "Loan", "Sighting", "Recipe", "Weather note", "Appointment", "Log entry", "Auction lot", "Letter", "Diary", "Concert",
    "Lesson", "Plant", "Match report", "Patient visit", "Trip", "Museum piece", "Rental", "Race", "Meeting", "Star", "Note",
    "Rehearsal", "Harvest", "Walk", "Fossil", "Radio call", "Ship", "Hotel stay", "Film", "Vote",
)  # fmt: skip
OPENINGS = (
    "dear diary,", "hello,", "log entry.", "good evening,", "report from the field.", "hi {0},", "dear {0},", "hello {0},",
    "to the museum.", "a short note.", "this morning,", "here is what I know.", "good day,", "notes", "hey,", "listen.",
    "for the record.", "please write this down.", "greetings from the coast.", "it is {0}'s turn to read this.", "dear all,",
)  # fmt: skip
CLOSINGS = (
    "that is all.", "more later.", "good night.", "thank you.", "many greetings,", "bye,", "with best wishes,", "so much for today.",
    "thanks,", "yours truly,", "end of note.", "cheers,", "see you soon,", "take care,",
)  # fmt: skip
JOINERS = ("", "", "also, ", "and ", "then ", "besides, ", "what is more, ", "after that, ", "plus ", "at the same time ", "oh, and ")

KEYS = {
    "person": "name who person guest reader pilot author by writer member visitor from signed host singer".split(),
    "code": "id code number ref no tag key index case file card ticket seat lot".split(),
    "thing": "item thing object title subject what piece topic about tool dish plant".split(),
    "date": "date day when since on dated start due".split(),
    "time": "time hour at clock begins".split(),
    "place": "place where city town location site in station".split(),
    "count": "count how_many number_of n total people pieces".split(),
    "quantity": "weight size length measure amount quantity distance duration".split(),
    "money": "price cost fee fare sum amount paid value fine".split(),
    "label": "mood kind type state weather class group event theme status category sort wish reason".split(),
    "labels": "topics events tags kinds moods themes things happenings notes problems findings".split(),
    "level": "pace haste level degree priority speed noise danger".split(),
}
FRAMES = {
    "person": (
        "my name is {}", "{} here", "this is {}", "signed, {}", "{}", "- {}", "yours, {}", "written by {}", "I am {}", "name: {}",
        "best, {}", "told by {}", "with love from {}", "{} speaking", "from {}", "{}, teacher", "{} again", "noted by {}", "regards, {}",
    ),
    "code": (
        "the number is {}", "no. {}", "ref {}", "code {}", "it is filed under {}", "see {}", "{}", "id: {}", "the card says {}",
        "you find it under {}", "it is marked {}", "the tag reads {}", "registered as {}", "my number was {}", "look up {}", "re {}:",
        "on the slip stands {}", "number: {}", "I was given {}", "(file {})",
    ),
    "thing": (
        "it is about the {}", "we saw a {}", "I borrowed the {}", "regarding the {}", "item: {}", "the {} again", "someone found a {}",
        "a note on the {}", "we talked about the {}", "I keep the {} at home", "there was the {}", "I mean the {}", "my {}", "{}",
        "it concerns a {}", "we chose the {} for the hall", "the {} was meant for my sister", "they showed us the {}", "subject: {}",
    ),
    "date": (
        "on {}", "it happened on {}", "date: {}", "that was {}", "since {}", "dated {}", "it was {} then", "on {} it began", "the day was {}",
        "I remember {} well", "around {}", "it is due on {}",
    ),
    "time": ("at {}", "it began at {}", "time: {}", "the clock showed {}", "we met at {}", "{} sharp", "by {}"),
    "place": ("in {}", "we were in {}", "place: {}", "it was near {}", "written in {}", "far from here, in {}", "the town was {}", "we came to {}"),
    "count": ("there were {} of them", "count: {}", "{} in all", "we counted {}", "{} altogether", "I saw {}", "as many as {}"),
    "quantity": ("it measured {}", "{} in total", "it came to {}", "size: {}", "about {}", "we needed {}", "that makes {}"),
    "money": (
        "the fare was {}", "it cost {}", "it was sold for {}", "{} was collected", "the ticket was {}", "price: {}", "I paid {}",
        "we gave {} for it", "that made {}", "{} paid", "the sum was {}", "it is worth {}",
    ),
}  # fmt: skip
PAIR_FRAMES = (
    ("thing", "date", "on {1} I saw the {0}"), ("thing", "date", "the {0} that came on {1}"), ("thing", "date", "the {0} of {1}"),
    ("thing", "date", "we took the {0}, that was {1}"), ("thing", "date", "I got the {0} on {1}"), ("thing", "date", "it was {1} when we found the {0}"),
    ("person", "place", "{0} from {1}"), ("person", "place", "I am {0} and live in {1}"), ("thing", "place", "the {0} in {1}"),
    ("thing", "code", "the {0} with the number {1}"), ("date", "time", "on {0} at {1}"), ("thing", "money", "the {0} for {1}"),
    ("code", "date", "{0} of {1}"), ("count", "thing", "{0} times the {1}"),
)  # fmt: skip
DECOYS = ("not {}", "{} is another matter", "the earlier one, {}, is done", "forget {}", "do not mix it up with {}", "{} was fine", "the old number was {}")
DECOY_PEOPLE = ("I told {} about it", "{} was not there", "my friend {} says hello", "ask {} if you like", "{} laughed")


def draw_name(draw: random.Random) -> str:
    return draw.choice(GIVEN) if draw.random() < 0.5 else draw.choice(STARTS) + draw.choice(ENDS)


def draw_place(draw: random.Random) -> str:
    return draw.choice(STARTS) + draw.choice(ENDS) + draw.choice(("", "ville", "burg", " Hill", "field", "port", " Bay"))


def draw_code(draw: random.Random) -> str:
    """An identifier of a random shape, such as 4821, QX-73, 55/210 or #A19."""
    shape = draw.choice(("####", "#####", "######", "@-####", "@-#####", "@@####", "@@###", "####-###", "##/##", "#@#@", "@@-##", "###", "@##", "##.###"))
    body = "".join(str(draw.randint(0, 9)) if c == "#" else draw.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") if c == "@" else c for c in shape)
    return draw.choice(("", "", "", "", "#", "no")) + body


def draw_date(draw: random.Random) -> str:
    day, month, year = draw.randint(1, 28), draw.randint(0, 11), draw.randint(1890, 2040)
    name = MONTHS[month]
    return draw.choice((
        f"{day} {name}", f"{name} {day}", f"{day:02d}/{month + 1:02d}", f"{day} {name} {year}", f"{year}-{month + 1:02d}-{day:02d}",
        draw.choice(DAYS), f"{name[:3]} {day}", f"{day}.{month + 1}.",
    ))  # fmt: skip


def draw_thing(draw: random.Random, words: list[str]) -> str:
    """One to three frequent words, sometimes capitalised: something whose extent only the sentence shows."""
    parts = [draw.choice(words) for _ in range(draw.choice((1, 2, 2, 2, 3)))]
    if draw.random() < 0.2:
        parts[0] = draw.choice((parts[0].capitalize(), draw_place(draw)))
    return " ".join(parts)


def draw_number(draw: random.Random) -> int | float:
    whole = draw.choice((draw.randint(1, 30), draw.randint(10, 400)))
    return whole if draw.random() < 0.5 else float(f"{whole}.{draw.choice(('', str(draw.randint(0, 9))))}{draw.randint(1, 9)}")


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
    default: str | None = None
    parts: tuple[str, str] = ("value", "unit")


def draw_labels(draw: random.Random, concepts: dict[str, list[str]], count: int, used: set[str]) -> dict[str, list[str]]:
    """Label -> clauses for `count` concepts not used yet; the label may be a second name or an arbitrary letter."""
    chosen = draw.sample([name for name in concepts if name not in used], count)
    used.update(chosen)
    style, few = draw.random(), draw.random() < 0.4
    labels = {}
    for at, name in enumerate(chosen):
        clauses = concepts[name][1:]
        label = name if style < 0.5 else concepts[name][0] if style < 0.85 else chr(65 + at)
        labels[label] = draw.sample(clauses, 4) if few else clauses
    return labels


def draw_schema(draw: random.Random, concepts: dict[str, list[str]]) -> list[Field]:
    """Three to eight fields with distinct keys, at least one of them copied."""
    copied = draw.sample(sorted(FRAMES), draw.randint(2, 5))
    meant = [kind for kind, chance in (("label", 0.6), ("labels", 0.5), ("level", 0.5)) if draw.random() < chance]
    kinds = copied + meant
    draw.shuffle(kinds)
    keys: set[str] = set()
    used: set[str] = set()
    schema = []
    for kind in kinds:
        key = draw.choice([key for key in KEYS[kind] if key not in keys])
        keys.add(key)
        one = Field(kind, key, draw.choice((0.0, 0.0, 0.2, 0.5)))
        if kind in FRAMES:
            one.frames = draw.sample(FRAMES[kind], draw.choice((1, 2, 4, min(7, len(FRAMES[kind])))))
            if kind in ("money", "quantity"):
                one.parts = draw.choice((("sum", "currency"), ("value", "unit"), ("amount", "unit"), ("n", "in"), ("number", "of")))
        else:
            one.labels = draw_labels(draw, concepts, {"label": draw.randint(2, 6), "labels": draw.randint(3, 8), "level": 2}[kind], used)
            one.default = draw.choice(("normal", "none", "other", "medium")) if kind == "level" or draw.random() < 0.2 else None
            one.absent = 0.4 if one.default else 0.0 if kind == "labels" else one.absent
        schema.append(one)
    return schema


def draw_value(draw: random.Random, one: Field, words: list[str]) -> tuple[Any, str]:
    """(value for the record, value as written in the note) of a copied field."""
    if one.kind in ("money", "quantity"):
        table = MONEY if one.kind == "money" else UNITS
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
        thing = draw_thing(draw, words)
        return thing, thing
    text = {"person": draw_name, "code": draw_code, "date": draw_date, "place": draw_place}[one.kind](draw)
    return text, text


def fill_record(draw: random.Random, schema: list[Field], words: list[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
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
            record[one.key], text = draw_value(draw, one, words)
            written[one.kind] = (one.key, text)
            clauses[one.key] = [draw.choice(one.frames).format(text)]
            continue
        names = list(one.labels)
        found = draw.sample(names, min(len(names), draw.choice((1, 1, 2, 2, 3)))) if one.kind == "labels" else [draw.choice(names)]
        record[one.key] = found if one.kind == "labels" else found[0]
        said = [draw.choice(one.labels[name]) for name in found]
        clauses[one.key] = said[:1] + [draw.choice(JOINERS) + clause for clause in said[1:]]
    fitting = [frame for frame in PAIR_FRAMES if frame[0] in written and frame[1] in written]
    if fitting and draw.random() < 0.5:
        first, second, frame = draw.choice(fitting)
        clauses[written[first][0]] = [frame.format(written[first][1], written[second][1])]
        del clauses[written[second][0]]
    return record, clauses


def join_note(draw: random.Random, clauses: list[str], style: str) -> str:
    """One note out of its clauses, in one of four ways of writing."""
    if style == "lower":
        return ", ".join(clauses)
    if style == "lines":
        return "\n".join(clause[0].upper() + clause[1:] for clause in clauses)
    if style == "bullets":
        return "\n".join(f"- {clause}" for clause in clauses)
    sentences = [clause[0].upper() + clause[1:] for clause in clauses]
    return " ".join(clause if clause[-1] in ".,!?:" else clause + "." for clause in sentences)


def write_note(draw: random.Random, clauses: dict[str, list[str]], habit: dict[str, Any], sentences: list[str]) -> str:
    """The note that says `clauses`, in the conversation's habits: order, style, opening, decoys, misspellings."""
    keys = [key for key in habit["order"] if key in clauses]
    if habit["shuffled"]:
        draw.shuffle(keys)
    parts = [clause for key in keys for clause in clauses[key]]
    if draw.random() < habit["decoy"]:
        decoy = draw.choice((draw.choice(DECOYS).format(draw_code(draw)), draw.choice(DECOY_PEOPLE).format(draw_name(draw)), draw.choice(sentences)[:90]))
        parts.insert(draw.randint(0, len(parts)), decoy)
    if draw.random() < habit["opening"]:
        parts.insert(0, draw.choice(habit["openings"]).format(draw_name(draw)))
    if draw.random() < habit["closing"]:
        parts.insert(max(1, len(parts) - 1), draw.choice(CLOSINGS))
    if draw.random() < habit["typos"]:
        parts = [" ".join(misspell(draw, word) if draw.random() < 0.05 else word for word in part.split(" ")) for part in parts]
    return join_note(draw, [part for part in parts if part], habit["style"])


def write_system(draw: random.Random, schema: list[Field]) -> str:
    """A system prompt that names the fields, sometimes their labels, or says nothing."""
    keys = [one.key for one in schema]
    if draw.random() < 0.3:
        keys = [f"{one.key} ({'|'.join(one.labels)})" if one.labels else one.key for one in schema]
    listed = ", ".join(keys)
    return draw.choice((
        "", f"{draw.choice(DOMAINS)} to JSON: {listed}.", f"{draw.choice(DOMAINS)} to JSON: {listed}.", f"Write as JSON: {listed}.",
        f"Extract {listed} as JSON.", f"JSON with the keys {listed}.", "Note to JSON.",
    ))  # fmt: skip


def make_record_pairs(
    draw: random.Random, words: list[str], sentences: list[str], concepts: dict[str, list[str]]
) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, note and compact JSON pairs) of one random schema."""
    schema = draw_schema(draw, concepts)
    habit = {
        "order": [one.key for one in schema], "shuffled": draw.random() < 0.4, "decoy": draw.choice((0.0, 0.3, 0.8)),
        "opening": draw.choice((0.0, 0.5, 1.0)), "openings": draw.sample(OPENINGS, draw.choice((1, 2, 8))),
        "closing": draw.choice((0.0, 0.4)), "typos": draw.choice((0.0, 0.0, 0.5)), "style": "plain",
    }  # fmt: skip
    draw.shuffle(habit["order"])
    with_null = draw.random() < 0.1
    mixed = draw.random() < 0.4  # every note in its own way of writing, or all alike
    style = draw.choice(("plain", "plain", "lower", "lines", "bullets"))
    pairs = []
    for _ in range(draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 9))):
        habit["style"] = draw.choice(("plain", "lower", "lines", "bullets")) if mixed else style
        record, clauses = fill_record(draw, schema, words)
        if not clauses:
            continue
        if with_null:
            record |= {one.key: None for one in schema if one.key not in record}
        ordered = {one.key: record[one.key] for one in schema if one.key in record}
        pairs.append((write_note(draw, clauses, habit, sentences), json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))))
    if not pairs:
        return make_record_pairs(draw, words, sentences, concepts)
    return write_system(draw, schema), pairs
