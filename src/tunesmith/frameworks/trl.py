"""TRL with PEFT: `SFTTrainer` on rows that are already tokenised."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.trainer import can_trainer, lora_settings, trainer_settings
from tunesmith.job.spec import Job

# What TRL adds to transformers' arguments. Rows come tokenised and cut; nothing may pack, pad or mask them otherwise.
_SFT: dict[str, Any] = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "padding_free": False,
    "pad_to_multiple_of": None,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    # The plain loss, whose logits are never all there: TRL's default, by a name that versions before 1.16 know, too.
    "loss_type": "chunked_nll",
    "activation_offloading": False,
    "eos_token": None,
    "chat_template_path": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
}


class Trl:
    """See `Port`."""

    name = "trl"

    def can(self, job: Job) -> Reason | None:
        """See `Port`."""
        return can_trainer(job, title="TRL")

    def translate(self, handoff: Handoff) -> Translation:
        """See `Port`."""
        settings = {
            "handoff": handoff.to_json(),
            "sft": trainer_settings(handoff) | _SFT,
            "lora": lora_settings(handoff),
            "weights": "float32"
            if handoff.lora is None or handoff.precision == "fp32"
            else _DTYPES[handoff.precision],
        }
        return Translation(
            files={"trl.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n"},
            argv=(str(WORKERS / "run_trl.py"), f"{handoff.scratch}/trl.json"),
        )


_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
