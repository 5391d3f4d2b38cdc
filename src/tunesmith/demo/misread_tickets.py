"""Write `ticket_misreadings.jsonl`: what a model after a short SFT wrongly takes the messages of the preferences for.

Of a few answers drawn at temperature 1, the wrong one that has most of the record right: what is then rejected is what
models really say. Another machine may draw other answers, so the file is kept, and `make_alignment.py` reads it.

    tunesmith train sft.yaml --out RUN       # the arm `sft` of align.yaml, with another seed
    python -m tunesmith.demo.misread_tickets --adapter RUN/adapter --out FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.core.bundled import BUNDLED
from tunesmith.core.types import Message
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.demo.make_alignment import Ticket, draw_all, write_rows
from tunesmith.eval.metrics import exact_match, json_fields
from tunesmith.infer.generate import generate
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.adapter_files import load_adapter
from tunesmith.models.load import load_model

ANSWERS = 3  # drawn for each message


def misread(adapter: Path, tickets: Sequence[Ticket]) -> dict[str, str]:
    """Ticket -> the best of its wrong records; without those that were never read wrongly."""
    folder = BUNDLED["tunesmith/tiny"]
    model = load_model(folder, dtype=torch.bfloat16)
    renderer = Renderer(load_tokenizer(folder))
    load_adapter(model, adapter)
    prompts = [
        renderer.render_prompt([Message(turn["role"], turn["content"]) for turn in ticket.question])  # type: ignore[arg-type]
        for ticket in tickets
    ]
    drawn = [(number, sample) for number in range(len(tickets)) for sample in range(ANSWERS)]
    found = generate(
        model,
        [prompts[number] for number, _ in drawn],
        max_new_tokens=160,
        stop_ids=renderer.stop_ids,
        sampling=SamplingSpec(temperature=1.0, seed=0),
        keys=[f"{tickets[number].name}/{sample}" for number, sample in drawn],
    )
    best: dict[str, tuple[float, str]] = {}
    for (number, _), one in zip(drawn, found, strict=True):
        ticket, said = tickets[number], renderer.tokenizer.decode(one.ids)
        if one.finished and said.strip() and not exact_match(said, ticket.record):
            best[ticket.name] = max(
                best.get(ticket.name, (-1.0, "")), (json_fields(said, ticket.record), said)
            )
    return {name: said for name, (_, said) in best.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Collect wrong records of the messages of the preferences.")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter of a short SFT")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    tickets = [ticket for split in draw_all(seed=0)[1].values() for ticket in split]
    found = misread(arguments.adapter, tickets)
    write_rows(arguments.out, ({"ticket": name, "record": said} for name, said in found.items()))


if __name__ == "__main__":
    main()
