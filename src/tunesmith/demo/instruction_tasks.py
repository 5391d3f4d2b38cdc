"""Self-made instruction tasks for pre-training: copying, extraction, rewriting, questions, labels, JSON records.

Everything is drawn at random, field names and label sets included, and most conversations hold several solved
examples: the model can only do well by imitating what stands in its context. No task deals with customer support or
orders, and no schema has the field set of `tunesmith/tickets` (a test checks this).

    make_conversation(random.Random(0), stock) -> [{"role": "user", ...}, {"role": "assistant", ...}, ...]
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from pathlib import Path

from tunesmith.demo.instruction_labels import (
    draw_any_labels,
    draw_clause,
    draw_meant_labels,
    draw_own_labels,
    draw_wrappers,
)
from tunesmith.demo.instruction_records import make_record_pairs
from tunesmith.demo.instruction_values import (
    Stock,
    draw_code,
    draw_date,
    draw_name,
    draw_place,
    draw_thing,
    misspell,
)

Message = dict[str, str]
Pair = tuple[str, str]


def load_concepts() -> dict[str, dict[str, list[str]]]:
    """Theme -> concept -> [its other names, comma-separated, clause, clause, ...], from `task_concepts.toml`.

    A clause may hold groups of alternatives: [rain|hail].
    """
    return tomllib.loads(Path(__file__).with_name("task_concepts.toml").read_text(encoding="utf-8"))


def turns(draw: random.Random, system: str, pairs: list[Pair]) -> list[Message]:
    """Question and answer pairs as a conversation; now and then all but the last stand in one prompt."""
    messages = [{"role": "system", "content": system}] if system else []
    if len(pairs) > 1 and draw.random() < 0.12:
        ask, tell = draw.choice((("Input", "Output"), ("Q", "A"), ("Text", "Answer")))
        shown = "\n\n".join(f"{ask}: {question}\n{tell}: {answer}" for question, answer in pairs[:-1])
        pairs = [(f"{shown}\n\n{ask}: {pairs[-1][0]}\n{tell}:", pairs[-1][1])]
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def words_of(draw: random.Random, stock: Stock, low: int, high: int) -> list[str]:
    return [draw.choice(stock.words) for _ in range(draw.randint(low, high))]


def copy_text(draw: random.Random, stock: Stock) -> list[Message]:
    """Repeat a sentence, random words, or a made-up code exactly."""

    def one() -> str:
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(stock.sentences)
        if kind < 0.7:
            return " ".join(words_of(draw, stock, 2, 12))
        return " ".join(draw_code(draw) for _ in range(draw.randint(1, 5)))

    ask = draw.choice(
        (
            "Repeat: {}",
            "Copy this exactly: {}",
            "Say the following again.\n{}",
            "{}\n\nRepeat the text above.",
        )
    )
    texts = [one() for _ in range(draw.randint(1, 4))]
    return turns(draw, "", [(ask.format(text), text) for text in texts])


def transform_words(draw: random.Random, stock: Stock) -> list[Message]:
    """A rule shown by examples only, or named: reverse, first, last, upper case, replace, sort, count, number ..."""
    old, new = draw.choice(stock.words), draw.choice(stock.words)
    rules: list[tuple[str, Callable[[list[str]], str]]] = [
        ("Write the words in reverse order", lambda words: " ".join(reversed(words))),
        ("Give the first word", lambda words: words[0]),
        ("Give the last word", lambda words: words[-1]),
        ("Give the second word", lambda words: words[1]),
        ("Write in capitals", lambda words: " ".join(words).upper()),
        ("Sort by alphabet", lambda words: " ".join(sorted(words))),
        ("How many words", lambda words: str(len(words))),
        ("Separate with commas", lambda words: ", ".join(words)),
        ("Number the words", lambda words: "\n".join(f"{at}. {word}" for at, word in enumerate(words, 1))),
        ("Make a JSON list", lambda words: "[" + ",".join(f'"{word}"' for word in words) + "]"),
        (f"Replace the first word with {old}", lambda words: " ".join([old, *words[1:]])),
        (f"Put {new} at the end", lambda words: " ".join([*words, new])),
        ("Leave out the first word", lambda words: " ".join(words[1:])),
    ]
    name, rule = draw.choice(rules)
    named = draw.random() < 0.5
    pairs = []
    for _ in range(draw.randint(1 if named else 3, 7)):
        words = words_of(draw, stock, 2, 8)
        pairs.append((" ".join(words), rule(words)))
    return turns(draw, name + "." if named else "", pairs)


def restore_text(draw: random.Random, stock: Stock) -> list[Message]:
    """Rewriting: correct misspelt sentences, fill in a left-out word that stands elsewhere, or change the case."""
    kind = draw.choice(("typos", "case", "join"))
    pairs = []
    for _ in range(draw.randint(1, 3)):
        text = draw.choice(stock.sentences)
        if kind == "typos":
            spoilt = " ".join(misspell(draw, word) if draw.random() < 0.3 else word for word in text.split())
            pairs.append((spoilt, text))
        elif kind == "case":
            pairs.append((text.lower(), text))
        else:
            pairs.append(("\n".join(text.split()), text))
    system = {
        "typos": "Correct the spelling.",
        "case": "Correct the capital letters.",
        "join": "Join the lines.",
    }[kind]
    return turns(draw, system, pairs)


def answer_questions(draw: random.Random, stock: Stock) -> list[Message]:
    """A few facts about people, then questions whose answers stand in the facts."""
    people = [draw_name(draw) for _ in range(draw.randint(2, 5))]
    facts, questions = [], []
    relations = (
        ("{p} lives in {x}.", "Where does {p} live?", draw_place),
        ("{p} has the number {x}.", "Which number does {p} have?", draw_code),
        ("{p} was born on {x}.", "When was {p} born?", draw_date),
        (
            "{p} brought a {x}.",
            "What did {p} bring?",
            lambda d: draw_thing(d, stock),
        ),
        ("The friend of {p} is {x}.", "Who is the friend of {p}?", draw_name),
    )
    for person in people:
        for fact, question, value in draw.sample(relations, draw.randint(1, 3)):
            answer = value(draw)
            facts.append(fact.format(p=person, x=answer))
            questions.append((question.format(p=person), answer))
    if draw.random() < 0.3:
        facts.insert(draw.randint(0, len(facts)), draw.choice(stock.sentences))
    draw.shuffle(facts)
    asked = draw.sample(questions, min(len(questions), draw.randint(1, 4)))
    first = (" ".join(facts) + "\n" + asked[0][0], asked[0][1])
    return turns(draw, draw.choice(("", "Answer the question.", "Answer briefly.")), [first, *asked[1:]])


def label_clauses(draw: random.Random, stock: Stock) -> list[Message]:
    """Name the concept(s) of short texts; labels are the concept's name, its second name, or an arbitrary word."""
    style = draw.choice(("own", "meant", "any"))
    is_listed = style == "meant" or (style == "any" and draw.random() < 0.5)
    count = 40 if style == "own" else draw.randint(2, 8)
    draw_labels = {"own": draw_own_labels, "meant": draw_meant_labels, "any": draw_any_labels}[style]
    labels = draw_labels(draw, stock, count, set())
    wrappers = ["{}"] if draw.random() < 0.5 else draw_wrappers(draw, stock.sentences)
    many = draw.random() < 0.3
    pairs = []
    for _ in range(draw.randint(4, 24)):
        found = (
            draw.sample(sorted(labels), draw.randint(1, min(3, len(labels))))
            if many
            else [draw.choice(sorted(labels))]
        )
        clauses = [draw.choice(wrappers).replace("{}", draw_clause(draw, labels[label])) for label in found]
        if draw.random() < 0.2:
            clauses.insert(0, draw.choice(stock.sentences)[:120])
        text = ". ".join(clause[0].upper() + clause[1:] for clause in clauses) + "."
        pairs.append((text, ", ".join(found)))
    listed = " " + ", ".join(labels) + "." if is_listed else ""
    system = draw.choice(("Name the topic.", "Which label fits?", "Classify.", "What is it about?")) + listed
    return turns(draw, system if is_listed or draw.random() < 0.8 else "", pairs)


def match_meanings(draw: random.Random, stock: Stock) -> list[Message]:
    """Of several short texts, repeat the one that means the same as, or something else than, the others."""
    is_odd = draw.random() < 0.4
    ask = (
        "Which one is about something else?"
        if is_odd
        else draw.choice(("Which one means the same?", "Match."))
    )
    pairs = []
    for _ in range(draw.randint(1, 6)):
        concept, *others = draw.sample(sorted(stock.meanings), draw.randint(3, 6))
        if is_odd:
            others = [concept] * len(others)
            concept = draw.choice([name for name in stock.meanings if name != concept])
        clauses = {name: draw.sample(stock.meanings[name][1:], 6) for name in (concept, *others)}
        shown = [draw_clause(draw, [clauses[name].pop()]) for name in others]
        answer = draw_clause(draw, [clauses[concept].pop()])
        shown.insert(draw.randint(0, len(shown)), answer)
        question = "\n".join(f"- {clause}" for clause in shown)
        if not is_odd:
            question = draw_clause(draw, [clauses[concept].pop()]) + "\n" + question
        pairs.append((question, answer))
    return turns(draw, ask, pairs)


def map_words(draw: random.Random, stock: Stock) -> list[Message]:
    """A table of arbitrary pairs in the prompt, then look-ups: pure recall from the context."""
    keys = draw.sample(stock.words, draw.randint(3, 10))
    table = {key: draw.choice((draw_code(draw), draw.choice(stock.words))) for key in keys}
    shown = "\n".join(f"{key} = {value}" for key, value in table.items())
    asked = draw.choices(keys, k=draw.randint(1, 5))
    pairs = [(key, table[key]) for key in asked]
    pairs[0] = (shown + "\n" + asked[0], pairs[0][1])
    return turns(draw, "", pairs)


def continue_text(draw: random.Random, stock: Stock) -> list[Message]:
    """Complete a sentence of the training texts."""
    text = draw.choice(stock.sentences).split()
    cut = max(2, len(text) // 2)
    return turns(draw, "Continue the sentence.", [(" ".join(text[:cut]), " ".join(text[cut:]))])


def extract_record(draw: random.Random, stock: Stock) -> list[Message]:
    """JSON records of a random schema from notes of some everyday domain; zero to eight solved examples."""
    system, pairs = make_record_pairs(draw, stock)
    return turns(draw, system, pairs)


TASKS: tuple[tuple[Callable[[random.Random, Stock], list[Message]], float], ...] = (
    (extract_record, 0.62),
    (label_clauses, 0.14),
    (match_meanings, 0.05),
    (copy_text, 0.03),
    (transform_words, 0.04),
    (answer_questions, 0.05),
    (restore_text, 0.02),
    (map_words, 0.03),
    (continue_text, 0.02),
)


def make_conversation(draw: random.Random, stock: Stock) -> list[Message]:
    """One random conversation of any kind; the last message is the assistant's."""
    kinds, weights = zip(*TASKS, strict=True)
    return draw.choices(kinds, weights)[0](draw, stock)
