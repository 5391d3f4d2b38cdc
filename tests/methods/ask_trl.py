"""Losses of TRL's own trainers on rows that are handed over; run by TRL's Python.

python ask_trl.py QUESTION.json   prints {name of the loss: value} as its last line
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


def pad(rows: list[dict], prefix: str = "") -> dict[str, torch.Tensor]:
    longest = max(len(row["ids"]) for row in rows)
    missing = [longest - len(row["ids"]) for row in rows]
    names = {"input_ids": "ids", "completion_mask": "mask"}
    found = {
        prefix + name: torch.tensor([row[key] + [0] * n for row, n in zip(rows, missing, strict=True)])
        for name, key in names.items()
    }
    mask = [[1] * (longest - n) + [0] * n for n in missing]
    return found | {prefix + "attention_mask": torch.tensor(mask)}


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(question["reference"])
    common = {"output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": [], "beta": 0.3}

    def load(name: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(question[name], dtype=torch.float32).eval()

    pairs = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    labelled = Dataset.from_list(
        [{"prompt": "a", "completion": " b", "label": label} for label in (True, False)]
    )
    rows, found = question["rows"], {}
    for name, settings in question["dpo"].items():
        arguments = DPOConfig(**common, **settings)
        trainer = DPOTrainer(
            load("policy"), load("reference"), arguments, train_dataset=pairs, processing_class=tokenizer
        )
        trainer.model.eval()
        with torch.no_grad():
            found[name] = trainer.compute_loss(trainer.model, pad(rows[0::2] + rows[1::2])).item()
    arguments = KTOConfig(**common, **question["kto"])
    trainer = KTOTrainer(
        load("policy"), load("reference"), arguments, train_dataset=labelled, processing_class=tokenizer
    )
    trainer.model.eval()
    batch = pad(rows) | pad(question["others"], "KL_") | {"label": torch.tensor(question["labels"])}
    with torch.no_grad():
        found["kto"] = trainer.compute_loss(trainer.model, batch).item()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
