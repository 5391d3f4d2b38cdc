"""TRL with PEFT: `SFTTrainer` on rows that are already tokenised, or on raw ones."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.preprocessing import can_prepare_rows
from tunesmith.frameworks.trainer import (
    can_trainer,
    lora_settings,
    quantization_settings,
    trainer_settings,
    weights_dtype,
)
from tunesmith.job.spec import Job

_TEMPLATE = "template.jinja"
# What TRL adds to transformers' arguments. Rows come tokenised and cut; nothing may pack, pad or mask them otherwise.
SFT: dict[str, Any] = {
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
    """See `NativePort`."""

    name = "trl"

    def can(self, job: Job) -> Reason | None:
        """See `Port`."""
        return can_trainer(job, title="TRL")

    def can_prepare(self, raw: RawRows) -> Reason | None:
        """See `NativePort`."""
        if reason := can_prepare_rows(raw, title="TRL"):
            return reason
        if raw.trains == "all answers" and not raw.marks_answers:
            finding = "TRL trains several answers of a row only where the chat template marks them ({% generation %})"
            return Reason("data.template", finding, "Give data.template a Jinja file that does")
        return None

    def translate(self, handoff: Handoff) -> Translation:
        """See `Port`."""
        raw = handoff.raw
        settings = {
            "handoff": handoff.to_json(),
            "sft": trainer_settings(handoff)
            | SFT
            | (preprocessing_settings(raw, handoff, splits_answer=splits_answer(raw)) if raw else {}),
            **({"splits_answer": splits_answer(raw)} if raw else {}),
            "lora": lora_settings(handoff),
            "quantization": quantization_settings(handoff),
            "weights": weights_dtype(handoff),
        }
        files = {"trl.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n"}
        if raw and raw.template is not None:
            files[_TEMPLATE] = raw.template
        return Translation(files=files, argv=(str(WORKERS / "run_trl.py"), f"{handoff.scratch}/trl.json"))


def preprocessing_settings(raw: RawRows, handoff: Handoff, *, splits_answer: bool = False) -> dict[str, Any]:
    """What says the same as the job to TRL's own preprocessing.

    splits_answer: a chat is handed over as a prompt and its completion; else the answers of a chat are what is trained.
    """
    return {
        "dataset_kwargs": None,
        "dataset_text_field": "text",
        "dataset_num_proc": None,
        "max_length": raw.max_tokens,
        "completion_only_loss": splits_answer or raw.kind == "completion",
        "assistant_only_loss": raw.kind == "chat" and not splits_answer,
        "eos_token": raw.stop_token or None,
        "chat_template_path": None if raw.template is None else f"{handoff.scratch}/{_TEMPLATE}",
    }


def splits_answer(raw: RawRows) -> bool:
    """Whether nothing marks what is trained in a chat: then the last answer is what TRL calls a completion."""
    return raw.kind == "chat" and (raw.trains == "last answer" or not raw.marks_answers)
