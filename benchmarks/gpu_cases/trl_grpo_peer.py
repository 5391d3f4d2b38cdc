"""TRL's GRPOTrainer as a contender: it samples by transformers' `generate` and trains on each rollout once.

Prompts are the texts that our engine's were rendered from, in its order. `trl_peer` is the rest of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

from gpu_cases.rewards import even_tokens
from gpu_cases.trl_peer import SCRATCH, GradientCopier, Reporter, serve, session, settings

TEXTS = json.loads((Path(session.task["rows"]) / "prompts.json").read_text(encoding="utf-8"))


class Trainer(trl.GRPOTrainer):
    """GRPOTrainer that keeps each forward's loss and, at first, the prompts that it answers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.fed: list[tuple[Any, Any]] = []
        self.num_sampled = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if session.wants_rows:
            self.fed += [(ids, [0] * len(ids)) for ids in {tuple(ids) for ids in prompt_ids}]
        self.num_sampled = sum(len(ids) for ids in found[0])
        return found


class RolloutReporter(Reporter):
    def count(self, numbers: list[int]) -> dict[str, int]:
        return {
            "num_tokens": len(numbers) * session.task["samples"],
            "num_target_tokens": self.trainer.num_sampled,
        }


def make_trainer(
    model_folder: str, adapter_folder: str, *, steps: list[list[int]], callback: Any, clip_norm: float
) -> Trainer:
    task = session.task
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=getattr(torch, settings.get("weights", task["dtype"])),
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    answers = task["batch_rows"] * task["samples"]
    micro = min(settings["micro_rows"], answers)
    chosen = {**settings["config"]}
    if task["dtype"] == "float32":
        chosen["bf16"] = False
    config = trl.GRPOConfig(
        output_dir=SCRATCH,
        max_steps=len(steps),
        num_generations=task["samples"],
        max_completion_length=task["new_tokens"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=answers // micro,
        steps_per_generation=answers // micro,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        shuffle_dataset=False,
        use_vllm=False,
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=clip_norm,
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        seed=0,
        **chosen,
    )
    return Trainer(
        model=peft.PeftModel.from_pretrained(model, adapter_folder, is_trainable=True),
        reward_funcs=even_tokens,
        args=config,
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [TEXTS[number] for step in steps for number in step]}
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(model_folder),
        callbacks=[callback],
    )


if __name__ == "__main__":
    serve(make_trainer, RolloutReporter(), GradientCopier())
