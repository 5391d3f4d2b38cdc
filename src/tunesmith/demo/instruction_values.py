"""Values of the self-made pre-training tasks: names, places, codes, dates, things, numbers, misspelt words.

A share of them is made up, so that it can only be copied.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

TABLES: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("task_notes.toml").read_text(encoding="utf-8")
)
VOWELS = ("a", "a", "e", "e", "i", "i", "o", "u", "ia", "ea", "ee", "au", "ai", "oa", "y")
ONSETS = tuple(
    "b c d f g h j k l m n p r s t v w z br ch cl dr gr kl kr ph pr qu sh st th tr ll nd ng rt ss tt".split()
)
CODAS = tuple(",,,n,l,s,r,m,d,th,ck,na,ta,ne,lle,rd,x,ger,us".split(","))


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

    concepts: theme -> concept -> [its other names, clause, clause, ...].
    nouns, adjectives: words that follow an article; empty lists fall back to `words`.
    topics: for each of many words, short fragments of the texts that hold it.
    """

    words: list[str]
    sentences: list[str]
    concepts: dict[str, dict[str, list[str]]]
    nouns: list[str] = field(default_factory=list)
    adjectives: list[str] = field(default_factory=list)
    topics: list[list[str]] = field(default_factory=list)

    @cached_property
    def meanings(self) -> dict[str, list[str]]:
        """The concepts of all themes."""
        return {name: listed for concepts in self.concepts.values() for name, listed in concepts.items()}


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
    looks = (
        TABLES["looks"] if is_real and draw.random() < 0.5 else draw.choice((adjectives, nouns, stock.words))
    )
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
