"""Make the bundled data set `tunesmith/tickets`: customer messages and the JSON a support desk needs.

Frames come from `ticket_families.toml` (train only) and `ticket_writers.toml`, whose families (kinds of writers) were
written together and are dealt to the splits by a hash of their names: no frame of the sealed test stands in train, and
nothing but chance chose which writers it got. What the splits share is the plain core of a trouble ("it is
cracked", in `ticket_cores.toml`). Part of the names and products of validation and test occur in no other split.
The same seed gives the same bytes on every machine and Python version: only `random.Random.random` is used, whose
sequence Python guarantees.

    python -m tunesmith.demo.make_tickets --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.demo.ticket_values import (
    CURRENCIES,
    MONTHS,
    NAMES,
    PRODUCT_KINDS,
    PRODUCT_STYLES,
    STAFF,
)

ISSUES = ("late", "damaged", "wrong", "missing", "faulty", "overcharged", "ignored")
WANTS = ("refund", "replacement", "repair", "cancel", "update")
URGENCIES = ("low", "normal", "high")
SYSTEM_PROMPT = (
    f"Ticket to JSON: order, name, item, date, issues ({'|'.join(ISSUES)}), amount, "
    f"wants ({'|'.join(WANTS)}), urgency ({'|'.join(URGENCIES)})."
)
OWN_CLAUSE_SHARE = 0.03  # of labels said by a clause of the split's own instead of a shared core
POOL_SHARE = 0.3  # of a training family's frames that come from the training pool
DEAL = "4:"  # goes into the hash that deals: another one deals another sealed test
# How many writers, names and product words belong to the sealed test and to validation alone; train has the rest.
NUM_WRITERS = {"test": 30, "validation": 12}
NUM_OWN_VALUES = {"test": 30, "validation": 20}
OWN_VALUE_SHARE = {
    "name": 0.5,
    "item": 0.2,
}  # of the test's and of validation's values that no other split holds
# Everyday words that any writer may use before a further trouble.
CONNECTIVES = (
    "also ",
    "also, ",
    "and ",
    "plus ",
    "besides, ",
    "then ",
    "and then ",
    "on top of that ",
    "moreover, ",
)


@dataclass(frozen=True)
class Mix:
    """Shares of messages that tell of one, two or three troubles, that name their own order, and that hold small talk
    or another order number."""

    issue_counts: tuple[float, float, float]
    order: float
    distractor: float


# Validation and test are as a desk would get them. Train, as one would label rows for training, has more of what is
# hard and seldom: several troubles, another order's number where the own one is absent.
MIXES = {
    "train": Mix(issue_counts=(0.34, 0.33, 0.33), order=0.65, distractor=0.5),
    "validation": Mix(issue_counts=(0.55, 0.33, 0.12), order=0.85, distractor=0.33),
    "test": Mix(issue_counts=(0.55, 0.33, 0.12), order=0.85, distractor=0.33),
}
ROWS = {"train": 2400, "validation": 240, "test": 300}

Family = dict[str, Any]
T = TypeVar("T")


class Draw:
    """Seeded choices built on `random()` alone, the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        point = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def read_wordings(name: str) -> dict[str, Any]:
    """One of the `ticket_*.toml` files beside this script."""
    return tomllib.loads(Path(__file__).with_name(f"ticket_{name}.toml").read_text(encoding="utf-8"))


def split_dated(family: Family) -> dict[str, list[str]]:
    """The family's `context` and `dated` frames; [square brackets] hold what only a dated message says."""
    dated = family.get("dated") or [re.sub(r"[\[\]]", "", frame) for frame in family["context"]]
    return {"context": [re.sub(r"\[[^]]*\]", "", frame) for frame in family["context"]], "dated": dated}


def deal(names: Sequence[str], counts: dict[str, int], *, salt: str = DEAL) -> dict[str, str]:
    """Name -> split: in the order of a hash the first go to the test, the next to validation, the rest to train."""
    shuffled = sorted(names, key=lambda name: hashlib.sha256((salt + name).encode()).hexdigest())
    splits = [split for split, count in counts.items() for _ in range(count)]
    return {name: splits[at] if at < len(splits) else "train" for at, name in enumerate(shuffled)}


@functools.cache
def choose_values(values: tuple[str, ...], split: str, *, own: bool) -> list[str]:
    """The values that `split` shares with train, or those that it alone holds."""
    dealt = deal(values, NUM_OWN_VALUES)
    return [value for value in values if dealt[value] == (split if own else "train")]


def load_families(dealt: dict[str, str] | None = None) -> list[Family]:
    """All families, in file order, each joined with its split, its split's clauses and pool, and the shared cores.

    dealt: name -> split of the writers that train does not have to itself; default: as the tickets are dealt.
    """
    cores, only_train, writers = (read_wordings(name) for name in ("cores", "families", "writers"))
    shared = {"cores": cores["issue"] | cores["want"] | cores["urgency"]}
    clauses = writers["clauses"] | {"train": only_train["clauses"]}
    dealt = dealt or deal([family["name"] for family in writers["family"]], NUM_WRITERS)
    joined = []
    for family in only_train["family"] + writers["family"]:
        split = dealt.get(family["name"], "train")
        flowing = family.get("style") not in ("lines", "bullets")
        own = {"split": split, "clauses": clauses[split], "layout": family["layout"].split()}
        own["pool"] = only_train["pool"] if split == "train" and flowing else {}
        joined.append(family | split_dated(family) | own | shared)
    return joined


def pick_frame(family: Family, part: str, draw: Draw) -> str:
    """A frame of the family itself, or (training families, now and then) of the training pool."""
    own = family[part]
    pool = family["pool"].get(part, ()) if any(own) else ()
    if not pool or not draw.chance(POOL_SHARE):
        return draw.pick(own)
    frame = draw.pick(pool)
    return frame.lower() if family.get("style") == "lower" else frame


def pick_joiner(family: Family, draw: Draw) -> str:
    """What leads to a further trouble: the family's own phrase, an everyday connective, or nothing at all."""
    return draw.pick(draw.weighted((family["joiner"], CONNECTIVES, ("",)), (0.4, 0.35, 0.25)))


def draw_clause(family: Family, label: str, draw: Draw, frame: str = "") -> str:
    """One way to say a label: mostly a shared core in a frame of the family, seldom a clause of the split."""
    own = draw.chance(OWN_CLAUSE_SHARE)
    clause = draw.pick(family["clauses" if own else "cores"][label])
    if family.get("style") == "lower":
        clause = clause.lower()
    return pick_frame(family, frame, draw).replace("{}", clause) if frame and not own else clause


def draw_order_id(draw: Draw) -> str:
    """An order number in one of four shapes, such as 48213, A-48213, 5512-084 or QX7731."""
    digits = "".join(str(draw.below(10)) for _ in range(7))
    letters = "".join(draw.pick("ABCDEFGHKLMNPQRSTUVWXYZ") for _ in range(2))
    shapes = (
        "1" + digits[:4],
        f"{letters[0]}-{digits[:5]}",
        f"{digits[:4]}-{digits[4:7]}",
        letters + digits[:4],
    )
    return draw.pick(shapes)


def draw_date(draw: Draw) -> str:
    """A date as people write it; the answer repeats it as written."""
    day, month = 1 + draw.below(28), draw.below(12)
    return draw.pick((f"{day} {MONTHS[month]}", f"{MONTHS[month]} {day}", f"{day:02d}/{month + 1:02d}"))


def draw_amount(draw: Draw) -> tuple[str, dict[str, Any]]:
    """(the amount as written, the amount as the answer's nested object)."""
    currency = draw.pick(tuple(CURRENCIES))
    whole = 3 + draw.below(240)
    # Cents never end in 0, so that the JSON number has exactly the digits that the customer wrote.
    value = whole if draw.chance(0.4) else float(f"{whole}.{draw.below(10)}{1 + draw.below(9)}")
    return draw.pick(CURRENCIES[currency]).format(value), {"value": value, "currency": currency}


def misspell(text: str, draw: Draw, *, rate: float) -> str:
    """Swap, drop or double a letter in some longer words; words with slots or capitals inside stay as they are."""

    def spoil(match: re.Match[str]) -> str:
        word = match.group()
        if not draw.chance(rate):
            return word
        at = 1 + draw.below(len(word) - 2)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return draw.pick((swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]))

    return re.sub(r"(?<![{\w])[a-z]{5,}(?![}\w])", spoil, text)


def draw_answer(draw: Draw, *, split: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(the answer object without absent keys, the slot values for the sentences)."""
    has_own = split in NUM_OWN_VALUES
    names = choose_values(NAMES, split, own=has_own and draw.chance(OWN_VALUE_SHARE["name"]))
    is_own_item = has_own and draw.chance(OWN_VALUE_SHARE["item"])
    styles = choose_values(PRODUCT_STYLES, split, own=is_own_item)
    kinds = choose_values(PRODUCT_KINDS, split, own=is_own_item)
    written, amount = draw_amount(draw)
    order, other = draw_order_id(draw), draw_order_id(draw)
    style = draw.pick(styles)
    product = f"{style} {draw.pick(kinds)}" if draw.chance(0.75) else draw.pick(kinds)
    slots = {
        "order": order, "other": other, "name": draw.pick(names), "staff": draw.pick(STAFF), "product": product,
        "date": draw_date(draw), "otherdate": draw_date(draw), "amount": written,
    }  # fmt: skip
    answer: dict[str, Any] = {}
    if draw.chance(MIXES[split].order):
        answer["order"] = order
    if draw.chance(0.75):
        answer["name"] = slots["name"]
    answer["item"] = product
    if draw.chance(0.5):
        answer["date"] = slots["date"]
    answer["issues"] = draw.sample(ISSUES, draw.weighted((1, 2, 3), MIXES[split].issue_counts))
    if draw.chance(0.45):
        answer["amount"] = amount
    answer["wants"] = draw.pick(WANTS)
    answer["urgency"] = draw.weighted(URGENCIES, (0.25, 0.45, 0.30))
    return answer, slots


def list_part(part: str, family: Family, answer: dict[str, Any], draw: Draw) -> list[str]:
    """The clauses that one element of a family's layout contributes to a message with this answer."""
    if part == "issues":
        first, *others = answer["issues"]
        rest = [pick_joiner(family, draw) + draw_clause(family, issue, draw) for issue in others]
        return [draw_clause(family, first, draw, "say"), *rest]
    if part == "opening":
        if "opening_anonymous" not in family:
            greets = family.get("style") in ("lines", "bullets") or draw.chance(0.7)
            return [pick_frame(family, "opening", draw)] if greets else []
        return [draw.pick(family["opening" if "name" in answer else "opening_anonymous"])]
    if part == "context":
        return [pick_frame(family, "dated" if "date" in answer else "context", draw)]
    if part == "want":
        return [draw_clause(family, answer["wants"], draw, "ask")]
    if part == "urgency":
        return [] if answer["urgency"] == "normal" else [draw_clause(family, answer["urgency"], draw)]
    if part == "closing":
        return [pick_frame(family, "closing", draw)] if draw.chance(0.35) else []
    absent = {"order": "order", "amount": "amount", "sign": "name"}.get(part)
    if absent is not None and absent not in answer:
        return []
    return [pick_frame(family, part, draw)]


def join_clauses(clauses: list[str], style: str) -> str:
    """One message out of its clauses, in the family's way of writing."""
    kept = [clause for clause in clauses if clause]
    if style == "lower":
        return (
            ", ".join(clause.rstrip(",") for clause in kept)
            .replace(":,", ":")
            .replace("?,", "?")
            .replace("!,", "!")
        )
    if style == "lines":
        return "\n".join(
            clause if ":" in clause.split(" ")[0] else clause[0].upper() + clause[1:] for clause in kept
        )
    if style == "bullets":
        return "\n".join([kept[0]] + [f"- {clause}" for clause in kept[1:]])
    sentences = [clause[0].upper() + clause[1:] for clause in kept]
    return " ".join(clause if clause[-1] in ".,!?:)" else clause + "." for clause in sentences)


def write_message(family: Family, answer: dict[str, Any], slots: dict[str, str], draw: Draw) -> str:
    """The customer's message that says what `answer` holds, with small talk and misspellings."""
    clauses: list[str] = []
    for part in family["layout"]:
        if part == "noise_fixed" and draw.chance(0.5):
            continue
        clauses += list_part(part, family, answer, draw)
    if draw.chance(MIXES[family["split"]].distractor):  # a distractor: small talk, or another order number
        clauses.insert(1 + draw.below(len(clauses) - 1), pick_frame(family, "noise", draw))
    if draw.chance(0.55):
        clauses = [misspell(clause, draw, rate=0.08) for clause in clauses]
    return join_clauses(clauses, family.get("style", "plain")).format(**slots)


def make_split(split: str, families: list[Family], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of one split, no two with the same message; families take turns."""
    draw = Draw(seed)
    own = [family for family in families if family["split"] == split]
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        family = own[len(rows) % len(own)]
        answer, slots = draw_answer(draw, split=split)
        message = write_message(family, answer, slots, draw)
        if message in seen:
            continue
        seen.add(message)
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False, separators=(",", ":"))},
        ]
        rows.append({"messages": messages, "family": family["name"]})
    return draw.sample(rows, len(rows))


def build_schema() -> dict[str, Any]:
    """The JSON Schema of the answer. Absent facts are absent keys, never null."""
    text = {"type": "string", "minLength": 1}
    amount = {
        "type": "object",
        "properties": {"value": {"type": "number"}, "currency": {"enum": sorted(CURRENCIES)}},
        "required": ["value", "currency"],
        "additionalProperties": False,
    }
    issues = {"type": "array", "items": {"enum": list(ISSUES)}, "minItems": 1, "uniqueItems": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Support ticket",
        "type": "object",
        "properties": {
            "order": text, "name": text, "item": text, "date": text, "issues": issues, "amount": amount,
            "wants": {"enum": list(WANTS)}, "urgency": {"enum": list(URGENCIES)},
        },
        "required": ["item", "issues", "wants", "urgency"],
        "additionalProperties": False,
    }  # fmt: skip


def write_tickets(out: Path, *, seed: int) -> None:
    """Write train, validation and test rows and the answer's schema into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    families = load_families()
    for at, (split, count) in enumerate(ROWS.items()):
        rows = make_split(split, families, count, seed * 10 + at)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    schema = json.dumps(build_schema(), indent=2) + "\n"
    (out / "schema.json").write_text(schema, encoding="utf-8", newline="\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the tickets data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tickets(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
