"""The native track: what a framework's own preprocessing made of raw rows, told before it trains on it.

A row's number goes through the preprocessing as a column of its own, so that rows that were left out, or moved, are
known. Frameworks of which that cannot be had keep all rows in their order, or are not compared.
"""

from __future__ import annotations

import json
import os

from worker import Failure

NUMBER = "tunesmith_row"


def number_rows(rows: list[dict], *, splits_answer: bool) -> list[dict]:
    """Raw rows with their numbers. splits_answer: a chat becomes its prompt and its last turn, the completion."""
    if splits_answer:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    return [{**row, NUMBER: number} for number, row in enumerate(rows)]


def find_numbers(trainer, count: int) -> list[int]:
    """The number of the raw row behind each row of the trainer's data set. count: of raw rows."""
    made = trainer.train_dataset
    if NUMBER in (getattr(made, "column_names", None) or ()):
        return list(made[NUMBER])
    if len(made) != count:
        raise Failure(f"made {len(made)} rows of {count}, and does not say of which")
    return list(range(count))


def write_made(trainer, path: str) -> None:
    """Ids and labels of each row as the collator gives them, a batch of one row each, without its padding.

    Labels are transformers' own: at the place of their token. The model shifts them.
    """
    made = trainer.train_dataset
    numbers = find_numbers(trainer, len(made))
    temporary = f"{path}.part"
    with open(temporary, "w", encoding="utf-8") as handle:
        for number, row in sorted(zip(numbers, made, strict=True), key=lambda pair: pair[0]):
            # What the trainer leaves out before it collates; a collator that pads cannot take texts.
            kept = {name: value for name, value in row.items() if name in _COLLATED}
            batch = trainer.data_collator([kept])
            ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            seen = batch["attention_mask"][0].tolist() if "attention_mask" in batch else [1] * len(ids)
            places = [at for at, is_seen in enumerate(seen) if is_seen]
            line = {
                "row": number,
                "input_ids": [ids[at] for at in places],
                "labels": [labels[at] for at in places],
            }
            handle.write(json.dumps(line) + "\n")
    os.replace(temporary, path)


_COLLATED = ("input_ids", "attention_mask", "labels", "position_ids", "completion_mask", "assistant_masks")


def keep_order(trainer, order: list[list[list[int]]], *, batch_rows: int) -> list[list[list[int]]]:
    """Our order, in places of the trainer's data set. Rows that were left out are passed over, and each epoch is cut
    into steps anew; where none was, nothing changes."""
    numbers = find_numbers(trainer, sum(map(len, order[0])))
    place_of = {number: place for place, number in enumerate(numbers)}
    epochs = [[place_of[row] for step in epoch for row in step if row in place_of] for epoch in order]
    if not epochs[0]:
        raise Failure("its own preprocessing leaves no row to train on")
    return [[rows[at : at + batch_rows] for at in range(0, len(rows), batch_rows)] for rows in epochs]
