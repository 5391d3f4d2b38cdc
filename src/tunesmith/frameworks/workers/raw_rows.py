"""The native track: what a framework's own preprocessing made of raw rows, told before it trains on it.

A row's number goes through the preprocessing as a column of its own, so that rows that were left out, or moved, are
known. Frameworks of which that cannot be had keep all rows in their order, or are not compared.
"""

from __future__ import annotations

import functools
import json
import os

from worker import Failure

NUMBER = "tunesmith_row"


def number_rows(path: str, *, splits_answer: bool = False, train_field: str | None = None) -> list[dict]:
    """Raw rows with their numbers.

    splits_answer: a chat becomes its prompt and its last turn, the completion.
    train_field: the key under which each message says whether it is trained.
    """
    with open(path, encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    for number, row in enumerate(rows):
        trained = row.pop("train", None)
        if splits_answer:
            messages = row.pop("messages")
            row |= {"prompt": messages[:-1], "completion": messages[-1:]}
        elif train_field:
            trained = trained or [message["role"] == "assistant" for message in row["messages"]]
            for message, is_trained in zip(row["messages"], trained, strict=True):
                message[train_field] = is_trained
        row[NUMBER] = number
    return rows


def keep_numbers() -> None:
    """From now on `datasets` carries the numbers through what a framework makes of rows, where it takes off the columns
    that it was given. What is made of a row is left alone."""
    import datasets

    plain, plain_remove = datasets.Dataset.map, datasets.Dataset.remove_columns

    @functools.wraps(plain)
    def apply(rows, function=None, *args, **kwargs):
        # Whoever says what columns come out (`filter` does) gets those.
        if NUMBER in rows.column_names and function is not None and kwargs.get("features") is None:
            removed = kwargs.get("remove_columns") or ()
            removed = [removed] if isinstance(removed, str) else removed
            if kwargs.get("batched"):
                function = _carry(function) if NUMBER in removed else function
            else:
                kwargs["remove_columns"] = [name for name in removed if name != NUMBER]
        return plain(rows, function, *args, **kwargs)

    @functools.wraps(plain_remove)
    def remove(rows, names, *args, **kwargs):
        names = [names] if isinstance(names, str) else names
        return plain_remove(rows, [name for name in names if name != NUMBER], *args, **kwargs)

    datasets.Dataset.map, datasets.Dataset.remove_columns = apply, remove


def _carry(function):
    """A function of several rows, asked for each row alone: it may make no row of one, or several."""

    @functools.wraps(function)
    def carry(batch, *args, **kwargs):
        columns = dict(batch)
        numbers = columns.pop(NUMBER)
        rows = ({name: [columns[name][at]] for name in columns} for at in range(len(numbers)))
        made = [dict(function(row, *args, **kwargs)) for row in rows]
        counts = [len(next(iter(part.values()), ())) for part in made]
        names = dict.fromkeys(name for part in made for name in part)
        return {
            **{name: [cell for part in made for cell in part.get(name, ())] for name in names},
            NUMBER: [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)],
        }

    return carry


def find_numbers(trainer, count: int) -> list[int]:
    """The number of the raw row behind each row of the trainer's data set. count: of raw rows."""
    made = trainer.train_dataset
    if NUMBER in (getattr(made, "column_names", None) or ()):
        numbers = list(made[NUMBER])
        if len(set(numbers)) < len(numbers):
            twice = next(number for at, number in enumerate(numbers) if number in numbers[:at])
            raise Failure(f"makes several rows of one (the row numbered {twice} of the raw ones)")
        return numbers
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


def drop_numbers(trainer) -> None:
    """Take the numbers off the trainer's data set: some trainers hand their collator every column."""
    made = trainer.train_dataset
    if NUMBER in (getattr(made, "column_names", None) or ()):
        trainer.train_dataset = made.select_columns([name for name in made.column_names if name != NUMBER])
