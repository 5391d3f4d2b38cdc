"""Unsloth: its model and adapters under TRL's `SFTTrainer`, which it rewrites, on rows that are tokenised, or raw."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.preprocessing import can_prepare_rows
from tunesmith.frameworks.trainer import (
    can_trainer,
    expected_settings,
    lora_settings,
    trainer_settings,
    weights_dtype,
)
from tunesmith.frameworks.trl import SFT, preprocessing_settings
from tunesmith.job.spec import Job, LoraSpec

# Its users render chats to texts, by the template that they give the tokenizer; then `train_on_responses_only` masks.
_SAYS_ITSELF: dict[str, Any] = {"chat_template_path": None, "assistant_only_loss": False}


class Unsloth:
    """See `NativePort`."""

    name = "unsloth"

    def can(self, job: Job) -> Reason | None:
        """See `Port`."""
        if reason := can_trainer(job, title="Unsloth"):
            return reason
        method = job.method_spec
        if isinstance(method, LoraSpec) and method.storage == "nf4" and not method.double_quant:
            finding = "Unsloth also quantises the scales of nf4 blocks, whatever it is told"
            return Reason("double_quant", finding, "Leave method.double_quant out")
        return None

    def can_on(self, job: Job, *, device: str, precision: str) -> Reason | None:
        """See `HardwarePort`."""
        if device == "cuda" and precision == "fp32":
            finding = "Unsloth computes in 16 bits on a GPU, whatever it is told"
            return Reason("train.precision", finding, "Set train.precision: bf16")
        return None

    def can_prepare(self, raw: RawRows) -> Reason | None:
        """See `NativePort`."""
        return can_prepare_rows(raw, title="Unsloth")

    def translate(self, handoff: Handoff) -> Translation:
        """See `Port`."""
        raw = handoff.raw
        # TRL's chunked loss would stand in the way of Unsloth's own.
        arguments = trainer_settings(handoff) | SFT | {"loss_type": "nll"}
        if raw:
            arguments |= preprocessing_settings(raw, handoff) | _SAYS_ITSELF
        settings = {
            "handoff": handoff.to_json(),
            "model": {
                "model_name": handoff.model,
                "dtype": weights_dtype(handoff),
                "load_in_4bit": handoff.base == "nf4",
                "load_in_8bit": False,
                "load_in_16bit": False,
                "full_finetuning": handoff.lora is None,
                "use_gradient_checkpointing": False,
                "fast_inference": False,
                # Never another, already quantised copy of the base.
                "use_exact_model_name": True,
                "trust_remote_code": False,
                "attn_implementation": "sdpa",
                "random_state": handoff.seed,
            },
            "lora": _lora_arguments(handoff),
            "sft": arguments,
            **(_masking(raw) if raw else {}),
            "expected": expected_settings(handoff),
        }
        return Translation(
            files={"unsloth.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n"},
            argv=(str(WORKERS / "run_unsloth.py"), f"{handoff.scratch}/unsloth.json"),
            environ={
                "UNSLOTH_COMPILE_LOCATION": f"{handoff.scratch}/compiled",
                # Rows laid end to end are not taken apart by parity records; all frameworks pad.
                "UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1",
                "UNSLOTH_CPU_COMPILE": "0",
                "UNSLOTH_CPU_FROZEN_BF16": "0",
            },
        )


def _masking(raw: RawRows) -> dict[str, Any]:
    """The chat template, and arguments for `train_on_responses_only`; None for rows that are no chat."""
    masking = {
        # None: read off the template.
        "instruction_part": None,
        "response_part": None,
        "force_match": True,
        "num_proc": 1,
        "last_response_only": raw.trains == "last answer",
        "mask_out_tokens": None,
    }
    return {"chat_template": raw.template, "masking": masking if raw.kind == "chat" else None}


def _lora_arguments(handoff: Handoff) -> dict[str, Any] | None:
    """Arguments for `FastLanguageModel.get_peft_model`; those of PEFT alone only where they say something."""
    settings = lora_settings(handoff)
    if settings is None:
        return None
    known = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "bias",
        "modules_to_save",
        "init_lora_weights",
    )
    more = {name: settings[name] for name in ("rank_pattern", "alpha_pattern", "use_dora") if settings[name]}
    own = {"use_gradient_checkpointing": False, "random_state": handoff.seed}
    return {name: settings[name] for name in known} | more | own
