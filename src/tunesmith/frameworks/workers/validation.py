"""Validation loss as our own engine measures it: nats per target token over all rows, whatever shares a batch."""

from __future__ import annotations

import torch
from capture import IGNORED

MAX_TOKENS = 4096


@torch.no_grad()
def measure_loss(trainer, rows: list[dict]) -> float:
    """Loss of the model as it is, by its own logits, in evaluation mode, where nothing is drawn."""
    model, device = trainer.model, trainer.args.device
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    model.eval()
    total, count = 0.0, 0
    while rows:
        # From the longest down: each forward pass has at most so many tokens, whose logits are all made.
        longest = len(rows[0]["input_ids"])
        part, rows = rows[: max(1, MAX_TOKENS // longest)], rows[max(1, MAX_TOKENS // longest) :]
        ids, seen, labels = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
        labels += IGNORED
        for number, row in enumerate(part):
            size = len(row["input_ids"])
            ids[number, :size] = torch.tensor(row["input_ids"])
            labels[number, :size] = torch.tensor(row["labels"])
            seen[number, :size] = 1
        with trainer.accelerator.autocast():
            logits = model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits
        targets = labels[:, 1:].to(device)
        kept = targets != IGNORED
        picked = logits[:, :-1][kept].float()
        total += float(torch.nn.functional.cross_entropy(picked, targets[kept], reduction="sum"))
        count += int(kept.sum())
    model.train()
    return total / max(1, count)
