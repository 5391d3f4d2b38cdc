"""TRL with PEFT: `SFTTrainer` on rows that are already tokenised, or on raw ones."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.trainer import (
    can_trainer,
    lora_settings,
    quantization_settings,
    trainer_settings,
    weights_dtype,
)
from tunesmith.job.spec import Job

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
        if raw.kind == "several kinds":
            return Reason("data.train", "TRL wants all rows of one shape", "Compare one source at a time")
        if raw.extras:
            finding = f"the rows have {raw.extras}, which TRL's data sets fill up with empty fields"
            return Reason("data.train", finding, "Take these rows out, or compare by tokens")
        if raw.trains == "some answers":
            finding = "TRL has no weight for a single answer"
            return Reason("data.train", finding, "Leave weights of answers out, or compare by tokens")
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
            | (_preprocessing(raw, f"{handoff.scratch}/{_TEMPLATE}") if raw else {}),
            **({"splits_answer": splits_answer(raw)} if raw else {}),
            "lora": lora_settings(handoff),
            "quantization": quantization_settings(handoff),
            "weights": weights_dtype(handoff),
        }
        files = {"trl.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n"}
        if raw and raw.template is not None:
            files[_TEMPLATE] = raw.template
        return Translation(files=files, argv=(str(WORKERS / "run_trl.py"), f"{handoff.scratch}/trl.json"))


def _preprocessing(raw: RawRows, template: str) -> dict[str, Any]:
    """What says the same as the job to TRL's own preprocessing. Where the template marks answers, TRL masks by that;
    else the last answer is what TRL calls a completion."""
    return {
        "dataset_kwargs": None,
        "dataset_text_field": "text",
        "dataset_num_proc": None,
        "max_length": raw.max_tokens,
        "completion_only_loss": splits_answer(raw) or raw.kind == "completion",
        "assistant_only_loss": raw.kind == "chat" and not splits_answer(raw),
        "eos_token": raw.stop_token or None,
        "chat_template_path": None if raw.template is None else template,
    }


def splits_answer(raw: RawRows) -> bool:
    """Whether a chat is handed over as a prompt and its completion, because nothing marks what is trained in it."""
    return raw.kind == "chat" and (raw.trains == "last answer" or not raw.marks_answers)


_TEMPLATE = "template.jinja"
