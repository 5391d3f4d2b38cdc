"""Axolotl: its own `train`, on a data set that is already tokenised, or on raw rows."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.preprocessing import can_prepare_rows
from tunesmith.frameworks.trainer import (
    OPTIMIZERS,
    SCHEDULES,
    can_trainer,
    expected_settings,
    quantization_settings,
)
from tunesmith.job.spec import FullSpec, Job

# Whatever of Axolotl's would choose rows, padding, kernels or precision by itself, or leave files.
_OWN: dict[str, Any] = {
    "skip_prepare_dataset": True,
    "shuffle_merged_datasets": False,
    "curriculum_sampling": False,
    "group_by_length": False,
    "sample_packing": False,
    "eval_sample_packing": False,
    "pad_to_sequence_len": False,
    # Rows come cut and none is dropped; longer than the model's positions it would stretch them.
    "sequence_len": 1,
    "val_set_size": 0.0,
    "load_in_8bit": False,
    "resize_token_embeddings_to_32x": False,
    "shrink_embeddings": False,
    "tf32": False,
    "gradient_checkpointing": False,
    "activation_offloading": False,
    "layer_offloading": False,
    "attn_implementation": "sdpa",
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
    "trust_remote_code": False,
    "use_eaft": False,
    "dataloader_num_workers": 0,
    "dataloader_drop_last": False,
    "remove_unused_columns": True,
    "auto_find_batch_size": False,
    "include_tkps": False,
    "save_strategy": "no",
    "save_first_step": False,
    "load_best_model_at_end": False,
    "use_wandb": False,
    "use_mlflow": False,
    "use_tensorboard": False,
    "use_comet": False,
    "use_trackio": False,
    "use_ray": False,
}


class Axolotl:
    """See `NativePort`."""

    name = "axolotl"

    def can(self, job: Job) -> Reason | None:
        """See `Port`."""
        if reason := can_trainer(job, title="Axolotl"):
            return reason
        method = job.method_spec
        if isinstance(method, FullSpec):
            return _can_train_whole(job.train.precision)
        if not method.scaling_alpha.is_integer():
            finding = f"Axolotl's lora_alpha is a whole number, not {method.scaling_alpha}"
            return Reason("alpha", finding, "Choose a whole alpha")
        return None

    def can_on(self, job: Job, *, device: str, precision: str) -> Reason | None:
        """See `HardwarePort`."""
        if device == "cpu" and precision != "fp32":
            finding = f"Axolotl has no {precision} on a CPU"
            return Reason("train.precision", finding, "Set train.precision: fp32")
        return _can_train_whole(precision) if isinstance(job.method_spec, FullSpec) else None

    def can_prepare(self, raw: RawRows) -> Reason | None:
        """See `NativePort`."""
        if reason := can_prepare_rows(raw, title="Axolotl", weighs_answers=True):
            return reason
        if raw.kind == "text" and raw.too_long == "truncate":
            finding = "Axolotl makes several rows of a text above the limit, the job cuts it"
            return Reason("data.too_long", finding, "Set data.too_long: drop, or compare by tokens")
        return None

    def translate(self, handoff: Handoff) -> Translation:
        """See `Port`."""
        raw = handoff.raw
        arguments = _OWN | _train_arguments(handoff) | _lora_arguments(handoff)
        if raw:
            arguments |= _preprocessing(raw, arguments["datasets"][0]["path"])
        settings = {
            "handoff": handoff.to_json(),
            "arguments": arguments,
            **({"train_field": _train_field(raw)} if raw else {}),
            "expected": expected_settings(handoff),
        }
        return Translation(
            files={"axolotl.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n"},
            argv=(str(WORKERS / "run_axolotl.py"), f"{handoff.scratch}/axolotl.json"),
            environ={"AXOLOTL_LOG_LEVEL": "WARNING"},
        )


def _can_train_whole(precision: str) -> Reason | None:
    if precision in ("bf16", "fp16"):
        finding = f"Axolotl keeps the weights that it trains in {precision}, ours are fp32"
        return Reason("train.precision", finding, "Set train.precision: fp32, or train adapters")
    return None


def _train_arguments(handoff: Handoff) -> dict[str, Any]:
    on_gpu = handoff.device == "cuda"
    return {
        "base_model": handoff.model,
        "datasets": [{"path": f"{handoff.scratch}/rows", "type": None}],
        "dataset_prepared_path": f"{handoff.scratch}/prepared",
        "output_dir": f"{handoff.scratch}/output",
        "micro_batch_size": handoff.micro_rows,
        "gradient_accumulation_steps": handoff.batch_rows // handoff.micro_rows,
        "num_epochs": 1,
        "max_steps": handoff.total_steps,
        **_warmup(handoff),
        "optimizer": OPTIMIZERS[handoff.optimizer],
        "learning_rate": handoff.learning_rate,
        "lr_scheduler": SCHEDULES[handoff.schedule],
        "lr_scheduler_kwargs": {},
        "weight_decay": handoff.weight_decay,
        "adam_beta1": handoff.beta1,
        "adam_beta2": handoff.beta2,
        "adam_epsilon": handoff.epsilon,
        "max_grad_norm": handoff.clip_norm,
        "seed": handoff.seed,
        "bf16": handoff.precision == "bf16",
        "fp16": handoff.precision == "fp16",
        "torch_compile": handoff.compile,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": handoff.total_steps + 1,
    }


_LONG_ROWS = {"drop": "drop", "truncate": "truncate", "refuse": "raise"}


def _preprocessing(raw: RawRows, path: str) -> dict[str, Any]:
    """What says the same as the job to Axolotl's own preprocessing."""
    chat = {}
    if raw.kind == "chat":
        chat = {
            "chat_template": "jinja",
            "chat_template_jinja": raw.template,
            # It looks for what ends a turn behind the turn's text.
            "eot_tokens": [raw.end_token or raw.stop_token],
        }
    return {
        "skip_prepare_dataset": False,
        "sequence_len": raw.max_tokens,
        "excess_length_strategy": _LONG_ROWS[raw.too_long],
        "min_sample_len": 2,
        "train_on_inputs": False,
        # In its own process: another one would be reached through a file whose name may be too long for a socket.
        "dataset_num_proc": 0,
        "dataset_exact_deduplication": False,
        **chat,
        "datasets": [{"path": path, "trust_remote_code": False, **_describe_rows(raw)}],
    }


def _describe_rows(raw: RawRows) -> dict[str, Any]:
    if raw.kind == "text":
        return {"type": "completion", "field": "text"}
    if raw.kind == "completion":
        # A format of its user's: the prompt alone, and nothing before or after it.
        texts = {"field_instruction": "prompt", "field_output": "completion", "field_system": "system"}
        plain = {"format": "{instruction}", "no_input_format": "{instruction}", "system_format": "{system}"}
        return {"type": {**texts, "field_input": "input", "system_prompt": "", **plain}}
    return {
        "type": "chat_template",
        "chat_template": "jinja",
        "chat_template_jinja": raw.template,
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "message_field_training": _train_field(raw),
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
        "train_on_eot": "turn",
        "drop_system_message": False,
        "split_thinking": False,
    }


def _train_field(raw: RawRows) -> str | None:
    """The key of a message that says whether it is trained, where not all answers are."""
    return "train" if raw.trains in ("last answer", "some answers") else None


def _warmup(handoff: Handoff) -> dict[str, float | None]:
    """Of one step it would make two, but a share of steps whose number it does not know, rounded up, is one."""
    if handoff.warmup_steps == 1:
        return {"warmup_steps": None, "warmup_ratio": 0.5 / handoff.total_steps}
    return {"warmup_steps": handoff.warmup_steps, "warmup_ratio": None}


def _lora_arguments(handoff: Handoff) -> dict[str, Any]:
    lora, quantization = handoff.lora, quantization_settings(handoff)
    if lora is None:
        return {"adapter": None, "load_in_4bit": False}
    return {
        "adapter": "qlora" if quantization else "lora",
        "load_in_4bit": quantization is not None,
        "bnb_config_kwargs": quantization,
        "lora_r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": list(lora.targets),
        "lora_target_linear": False,
        "lora_modules_to_save": None,
        "lora_fan_in_fan_out": False,
        "lora_rank_pattern": dict(lora.rank_pattern),
        "lora_alpha_pattern": dict(lora.alpha_pattern),
        "peft_use_rslora": lora.rslora,
        "peft_use_dora": lora.dora,
        "peft_init_lora_weights": True,
        "peft_autocast_adapter_dtype": True,
        "loraplus_lr_ratio": None,
    }
