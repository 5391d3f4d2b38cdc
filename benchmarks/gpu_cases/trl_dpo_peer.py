"""TRL's DPOTrainer as a contender, on pairs that are already token ids, in the order of our engine.

The adapter it goes on from is also its reference, as it is ours. `trl_peer` is the rest of it.
"""

from __future__ import annotations

from typing import Any

import datasets
import peft
import torch
import transformers
import trl

from gpu_cases.trl_peer import SCRATCH, GradientCopier, Reporter, rows, serve, session, settings


class Trainer(trl.DPOTrainer):
    """DPOTrainer that takes pairs in the given order and keeps each forward's loss and, at first, its rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.fed: list[tuple[Any, Any]] = []

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if session.wants_rows:
            self.fed += read_inputs(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def read_inputs(inputs: dict[str, torch.Tensor]) -> list[tuple[Any, Any]]:
    """(ids, kept) of every row in a padded batch."""
    ids, kept = inputs["input_ids"].cpu(), inputs["completion_mask"].cpu()
    sizes = inputs["attention_mask"].sum(1).tolist()
    return [(i[:n].numpy(), k[:n].numpy()) for i, k, n in zip(ids, kept, sizes, strict=True)]


def make_trainer(
    model_folder: str, adapter_folder: str, *, steps: list[list[int]], callback: Any, clip_norm: float
) -> Trainer:
    task = session.task
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=getattr(torch, settings.get("weights", task["dtype"])),
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    micro = min(settings["micro_rows"], task["batch_rows"])
    chosen = {**settings["config"]}
    if task["dtype"] == "float32":
        chosen["bf16"] = False
    config = trl.DPOConfig(
        output_dir=SCRATCH,
        beta=task["beta"],
        max_steps=len(steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=task["batch_rows"] // micro,
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=clip_norm,
        weight_decay=0.0,
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        seed=0,
        **chosen,
    )
    return Trainer(
        model=peft.PeftModel.from_pretrained(model, adapter_folder, is_trainable=True),
        args=config,
        train_dataset=make_dataset([number for step in steps for number in step]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model_folder),
        callbacks=[callback],
    )


def make_dataset(numbers: list[int]) -> Any:
    pairs: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for chosen, rejected in zip(numbers[::2], numbers[1::2], strict=True):
        (ids, kept), (other, _) = rows[chosen], rows[rejected]
        start = int(kept.argmax())
        parts = (ids[:start], ids[start:], other[start:])
        for name, part in zip(pairs, parts, strict=True):
            pairs[name].append(part.tolist())
    return datasets.Dataset.from_dict(pairs)


if __name__ == "__main__":
    serve(make_trainer, Reporter(), GradientCopier())
