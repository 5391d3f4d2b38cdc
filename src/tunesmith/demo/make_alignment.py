"""Make the bundled `tunesmith/tickets-prompts` and `tunesmith/tickets-preferences`: what to align a model with.

Prompts are tickets by other writers: what SFT learns from, and what PPO and GRPO answer themselves. Preferences are
pairs to further messages: the right record, and one with a fault that a reader in a hurry makes. No writer of the sealed
test of `tunesmith/tickets` is among them; the others are dealt anew, so that held-out writers are in no training rows.

    python -m tunesmith.demo.make_alignment --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.demo import make_tickets
from tunesmith.demo.make_tickets import (
    ISSUES,
    SYSTEM_PROMPT,
    URGENCIES,
    WANTS,
    Draw,
    Family,
    deal,
    draw_answer,
    load_families,
    read_wordings,
    write_message,
)
from tunesmith.demo.ticket_values import CURRENCIES

DEAL = "align 1:"
# Of the writers that tickets dealt to train and validation; the rest trains.
NUM_WRITERS = {"test": 30, "validation": 8}
PROMPTS = {"train": 480, "validation": 96, "test": 240}
PAIRS = {"train": 320, "validation": 96, "test": 240}
# How often each kind of fault is asked for; as many answers lose something as gain something.
FAULTS = {"label": 0.2, "too much": 0.3, "too little": 0.2, "value": 0.2, "format": 0.1}
KEYS = ("order", "name", "item", "date", "issues", "amount", "wants", "urgency")

Answer = dict[str, Any]
Others = dict[str, str]  # key -> a value that the message says of something else
Fault = Callable[[Answer, Others, Draw], "str | None"]


def deal_families() -> dict[str, list[Family]]:
    """Split -> its families. Held-out ones say what tickets' validation says, train what train says."""
    names = [family["name"] for family in read_wordings("writers")["family"]]
    tickets = deal(names, make_tickets.NUM_WRITERS)
    free = [name for name in names if tickets[name] != "test"]
    dealt = deal(free, NUM_WRITERS, salt=DEAL)
    wordings = {name: "train" if split == "train" else "validation" for name, split in dealt.items()}
    found: dict[str, list[Family]] = {split: [] for split in PROMPTS}
    for family in load_families(tickets | wordings):
        if family["split"] != "test":
            found[dealt.get(family["name"], "train")].append(family)
    return found


def write_record(answer: Answer) -> str:
    """A record as the right answer writes it."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


# --- faults: an answer to spoil, what its message might be misread for, draws -> the wrong record, or None -----------------


def change_label(answer: Answer, others: Others, draw: Draw) -> str | None:
    """Another trouble, wish or urgency."""
    key = draw.weighted(("issues", "wants", "urgency"), (0.6, 0.2, 0.2))
    if key == "issues":
        place = draw.below(len(answer["issues"]))
        answer["issues"][place] = draw.pick([label for label in ISSUES if label not in answer["issues"]])
    else:
        labels = WANTS if key == "wants" else URGENCIES
        answer[key] = draw.pick([label for label in labels if label != answer[key]])
    return write_record(answer)


def say_too_much(answer: Answer, others: Others, draw: Draw) -> str | None:
    """A trouble that nobody had, one said twice, or a value of something else where the message has none."""
    keys = [key for key in others if key not in answer]
    if keys and draw.chance(0.5):
        key = draw.pick(keys)
        answer[key] = others[key]
        return write_record({name: answer[name] for name in KEYS if name in answer})
    answer["issues"].append(draw.pick(ISSUES))
    return write_record(answer)


def say_too_little(answer: Answer, others: Others, draw: Draw) -> str | None:
    """One of several troubles is left out, or a fact."""
    if len(answer["issues"]) > 1 and draw.chance(0.7):
        answer["issues"].pop(draw.below(len(answer["issues"])))
        return write_record(answer)
    keys = [key for key in ("order", "name", "date", "amount") if key in answer]
    if not keys:
        return None
    del answer[draw.pick(keys)]
    return write_record(answer)


def change_value(answer: Answer, others: Others, draw: Draw) -> str | None:
    """A value of something else in the message, half of one, or another currency."""
    keys = [key for key in others if key in answer]
    if keys and draw.chance(0.7):
        key = draw.pick(keys)
        answer[key] = others[key]
    elif "amount" in answer and draw.chance(0.4):
        currencies = [currency for currency in CURRENCIES if currency != answer["amount"]["currency"]]
        answer["amount"]["currency"] = draw.pick(currencies)
    else:
        key = draw.pick([key for key in ("item", "date") if " " in answer.get(key, "")] or ["item"])
        words = answer[key].split(" ")
        answer[key] = " ".join(draw.pick((words[:-1], words[1:])))
        if not answer[key]:
            return None
    return write_record(answer)


def break_format(answer: Answer, others: Others, draw: Draw) -> str | None:
    """An absent fact as null, an amount as text, a bare trouble in place of a list, or JSON that does not end."""
    fault = draw.pick(("null", "text", "bare", "open"))
    if fault == "null":
        absent = [key for key in KEYS if key not in answer]
        return write_record(answer | {draw.pick(absent): None}) if absent else None
    if fault == "text":
        if "amount" not in answer:
            return None
        answer["amount"]["value"] = str(answer["amount"]["value"])
    elif fault == "bare":
        answer["issues"] = ",".join(answer["issues"])
    return write_record(answer).removesuffix("}" if fault == "open" else "")


_FAULTS: dict[str, Fault] = {
    "label": change_label,
    "too much": say_too_much,
    "too little": say_too_little,
    "value": change_value,
    "format": break_format,
}


def spoil(answer: Answer, slots: dict[str, str], message: str, draw: Draw) -> tuple[str, str]:
    """(kind of fault, the record with it)."""
    said = {"order": slots["other"], "name": slots["staff"], "date": slots["otherdate"]}
    others = {key: value for key, value in said.items() if value in message}
    right = write_record(answer)
    while True:
        kind = draw.weighted(tuple(FAULTS), tuple(FAULTS.values()))
        wrong = _FAULTS[kind](copy.deepcopy(answer), others, draw)
        if wrong is not None and wrong != right:
            return kind, wrong


# --- rows ---------------------------------------------------------------------------------------------------------------


def make_prompt(family: Family, message: str, answer: Answer, slots: dict[str, str], draw: Draw) -> Answer:
    """A question and its truth, as `tunesmith/tickets` has them."""
    turns = [*_ask(message), {"role": "assistant", "content": write_record(answer)}]
    return {"messages": turns, "family": family["name"]}


def make_pair(family: Family, message: str, answer: Answer, slots: dict[str, str], draw: Draw) -> Answer:
    """A question, the right record and a wrong one."""
    kind, wrong = spoil(answer, slots, message, draw)
    sides = {"chosen": write_record(answer), "rejected": wrong}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"prompt": _ask(message), **turns, "fault": kind, "family": family["name"]}


def _ask(message: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": message}]


def make_rows(families: list[Family], count: int, draw: Draw, make: Any, seen: set[str]) -> list[Answer]:
    """`count` rows of one split, no message twice; families take turns."""
    rows: list[Answer] = []
    while len(rows) < count:
        family = families[len(rows) % len(families)]
        answer, slots = draw_answer(draw, split=family["split"])
        message = write_message(family, answer, slots, draw)
        if message not in seen:
            seen.add(message)
            rows.append(make(family, message, answer, slots, draw))
    return draw.sample(rows, len(rows))


def write_alignment(out: Path, *, seed: int) -> None:
    """Write the folders `tickets-prompts` and `tickets-preferences`, each with train, validation and test rows."""
    families, seen = deal_families(), set[str]()
    makers = {"tickets-prompts": (PROMPTS, make_prompt), "tickets-preferences": (PAIRS, make_pair)}
    for number, (name, (counts, make)) in enumerate(makers.items()):
        (out / name).mkdir(parents=True, exist_ok=True)
        for at, (split, count) in enumerate(counts.items()):
            draw = Draw(1000 + 100 * seed + 10 * number + at)
            rows = make_rows(families[split], count, draw, make, seen)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / name / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the sets that a model is aligned with.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_alignment(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
