"""Make the bundled `tunesmith/tickets-prompts` and `tunesmith/tickets-preferences`: what to align a model with.

Prompts are tickets by other writers: what SFT learns from, and what PPO and GRPO answer themselves. Preferences are
pairs to further messages: the right record, and what a model after a short SFT took the message for
(`ticket_misreadings.jsonl`, by `misread_tickets.py`); messages that it always read right are left out. No writer of the
sealed test of `tunesmith/tickets` is among them; the others are dealt anew, so that held-out writers are in no training
rows. The same seed and misreadings give the same bytes.

    python -m tunesmith.demo.make_alignment --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.demo import make_tickets
from tunesmith.demo.make_tickets import (
    SYSTEM_PROMPT,
    Draw,
    Family,
    deal,
    draw_answer,
    load_families,
    read_wordings,
    write_message,
)

DEAL = "align 1:"  # goes into the hash that deals
# Of the writers that tickets dealt to train and validation; the rest trains.
NUM_WRITERS = {"test": 30, "validation": 8}
PROMPTS = {"train": 480, "validation": 96, "test": 240}
ASKED = {"train": 320, "validation": 96, "test": 240}  # messages that pairs are made of, if misread

Row = dict[str, Any]


@dataclass(frozen=True)
class Ticket:
    """A message and its right record, by a writer."""

    family: str
    message: str
    record: str

    @property
    def question(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.message}]

    @property
    def name(self) -> str:
        """What the file of misreadings calls it."""
        return hashlib.sha256(self.message.encode()).hexdigest()[:16]


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


def draw_tickets(counts: Mapping[str, int], seed: int, seen: set[str]) -> dict[str, list[Ticket]]:
    """Split -> so many tickets, no message twice or among `seen`; families take turns."""
    found: dict[str, list[Ticket]] = {}
    for at, (split, families) in enumerate(deal_families().items()):
        draw, tickets = Draw(seed + at), list[Ticket]()
        while len(tickets) < counts[split]:
            family = families[len(tickets) % len(families)]
            answer, slots = draw_answer(draw, split=family["split"])
            message = write_message(family, answer, slots, draw)
            if message not in seen:
                seen.add(message)
                record = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
                tickets.append(Ticket(family["name"], message, record))
        found[split] = draw.sample(tickets, len(tickets))
    return found


def draw_all(seed: int) -> tuple[dict[str, list[Ticket]], dict[str, list[Ticket]]]:
    """Tickets of the prompts, and those that preferences are made of, by split."""
    seen = set[str]()
    return draw_tickets(PROMPTS, 1000 + 100 * seed, seen), draw_tickets(ASKED, 1010 + 100 * seed, seen)


def make_prompt(ticket: Ticket) -> Row:
    """A question and its truth, as `tunesmith/tickets` has them."""
    turns = [*ticket.question, {"role": "assistant", "content": ticket.record}]
    return {"messages": turns, "family": ticket.family}


def make_pair(ticket: Ticket, misread: str) -> Row:
    """A question, the right record and a wrong one."""
    sides = {"chosen": ticket.record, "rejected": misread}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"prompt": ticket.question, **turns, "family": ticket.family}


def read_misreadings() -> dict[str, str]:
    """Ticket -> a wrong record that a model made of it."""
    lines = Path(__file__).with_name("ticket_misreadings.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["ticket"]: row["record"] for row in map(json.loads, lines)}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, in the same bytes on every system."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(lines, encoding="utf-8", newline="\n")


def write_alignment(out: Path, *, seed: int) -> None:
    """Write the folders `tickets-prompts` and `tickets-preferences`, each with train, validation and test rows.

    Misreadings are of the messages of seed 0; another seed gives prompts alone.
    """
    (prompts, asked), misread = draw_all(seed), read_misreadings()
    for split in PROMPTS:
        write_rows(out / "tickets-prompts" / f"{split}.jsonl", map(make_prompt, prompts[split]))
        pairs = [make_pair(ticket, misread[ticket.name]) for ticket in asked[split] if ticket.name in misread]
        write_rows(out / "tickets-preferences" / f"{split}.jsonl", pairs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the sets that a model is aligned with.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_alignment(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
