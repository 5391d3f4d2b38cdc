"""Labels of the self-made pre-training tasks: words for everyday concepts, and the clauses that mean them."""

from __future__ import annotations

import random
import re

from tunesmith.demo.instruction_values import TABLES, Stock


def draw_fragment(draw: random.Random, sentences: list[str], low: int, high: int) -> str:
    """A few words in a row out of some sentence, lower case, without marks at the ends."""
    parts = draw.choice(sentences).lower().split()
    at = draw.randint(0, max(0, len(parts) - high))
    return " ".join(parts[at : at + draw.randint(low, high)]).strip(".,;!?'")


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


def draw_concepts(draw: random.Random, stock: Stock, count: int, used: set[str]) -> list[str]:
    """`count` concepts not used yet, mostly of one theme: near each other, so that they are hard to tell apart."""
    pool: dict[str, list[str]] = stock.meanings
    if draw.random() < 0.6:
        pool = stock.concepts[draw.choice(sorted(stock.concepts))]
    free = [name for name in pool if name not in used]
    chosen = draw.sample(free, min(count, len(free)))
    used.update(chosen)
    return chosen


def draw_level(draw: random.Random, stock: Stock, used: set[str]) -> dict[str, list[str]]:
    """Label -> clauses of two opposite concepts not used yet, by their names or as two ends of a scale; or nothing."""
    opposites = [
        row
        for row in TABLES["opposites"]
        if set(row[:2]) <= stock.meanings.keys() and not used & set(row[:2])
    ]
    if not opposites:
        return {}
    first, second, *names = draw.choice(opposites)
    used.update((first, second))
    ends = draw.choice([(first, second), *names])
    return {end: stock.meanings[concept][1:] for end, concept in zip(ends, (first, second), strict=True)}


def draw_own_labels(draw: random.Random, stock: Stock, count: int, used: set[str]) -> dict[str, list[str]]:
    """Label -> clauses for `count` concepts not used yet, by their own names."""
    return {name: stock.meanings[name][1:] for name in draw_concepts(draw, stock, count, used)}


def draw_meant_labels(draw: random.Random, stock: Stock, count: int, used: set[str]) -> dict[str, list[str]]:
    """The same, by any of the words that mean the concept."""
    chosen = draw_concepts(draw, stock, count, used)
    names = {name: draw.choice([name, name, *stock.meanings[name][0].split(", ")]) for name in chosen}
    return {label: stock.meanings[name][1:] for name, label in names.items()}


def draw_any_labels(draw: random.Random, stock: Stock, count: int, used: set[str]) -> dict[str, list[str]]:
    """The same, by a word that means the concept or by an arbitrary one, which earlier answers alone define.

    Some labels stand for fragments of the texts.
    """
    is_named, few, with_letters = draw.random() < 0.6, draw.random() < 0.25, draw.random() < 0.03
    concept_share = draw.choice((1.0, 1.0, 0.3))
    labels = {}
    for at, concept in enumerate(draw_concepts(draw, stock, count, used)):
        others, *clauses = stock.meanings[concept]
        label = draw.choice([concept, *others.split(", ")])
        if draw.random() > concept_share:
            clauses = draw_fragments(draw, stock)
            label = draw.choice(stock.words)
        label = chr(65 + at) if with_letters else label if is_named else draw.choice(stock.words)
        labels[label] = draw.sample(clauses, min(4, len(clauses))) if few else clauses
    return labels
