"""LLaMA-Factory: its own `run_exp`, on a folder of rows that are already tokenised, or on raw ones."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.port import WORKERS, Reason, Translation
from tunesmith.frameworks.preprocessing import can_prepare_rows
from tunesmith.frameworks.trainer import can_trainer, expected_settings, trainer_settings, weights_dtype
from tunesmith.job.spec import Job

# What LLaMA-Factory adds to transformers' arguments: nothing of its own may choose tokens, loss, kernels or optimizer.
_OWN: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "do_eval": False,
    "do_predict": False,
    "predict_with_generate": False,
    "overwrite_output_dir": True,
    "plot_loss": False,
    "compute_accuracy": False,
    "early_stopping_steps": None,
    "include_effective_tokens_per_second": False,
    # A name is demanded; the folder of tokens is what is read, and nothing is rendered or cut.
    "dataset": "handed",
    "eval_dataset": None,
    "val_size": 0.0,
    "template": "empty",
    "packing": False,
    "neat_packing": False,
    "streaming": False,
    "train_on_prompt": False,
    "mask_history": False,
    "ignore_pad_token_for_loss": True,
    "disable_shuffling": True,
    # The model.
    "trust_remote_code": False,
    "resize_vocab": False,
    "flash_attn": "sdpa",
    "rope_scaling": None,
    "shift_attn": False,
    "mixture_of_depths": None,
    "moe_aux_loss_coef": None,
    "use_unsloth": False,
    "use_unsloth_gc": False,
    "use_kt": False,
    "enable_liger_kernel": False,
    "use_v1_kernels": False,
    "upcast_layernorm": False,
    "upcast_lmhead_output": False,
    "train_from_scratch": False,
    "disable_gradient_checkpointing": True,
    "pure_bf16": False,
    "fp8": False,
    # The loss and the optimizer.
    "use_dft_loss": False,
    "use_asft_loss": False,
    "use_eaft_loss": False,
    "use_galore": False,
    "use_apollo": False,
    "use_badam": False,
    "use_adam_mini": False,
    "use_muon": False,
    "use_llama_pro": False,
    "use_mca": False,
    "use_hyper_parallel": False,
    "use_swanlab": False,
}
_RAW_FILE = "raw.jsonl"
# A chat template for prompts and completions that are no chat.
_PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class LlamaFactory:
    """See `NativePort`."""

    name = "llamafactory"

    def can(self, job: Job) -> Reason | None:
        """See `Port`."""
        return can_trainer(job, title="LLaMA-Factory")

    def can_prepare(self, raw: RawRows) -> Reason | None:
        """See `NativePort`. Its templates are lists of texts; it reads them off a chat template that it has render a
        few turns, a system turn alone among them."""
        if reason := can_prepare_rows(raw, title="LLaMA-Factory"):
            return reason
        if raw.kind != "chat":
            return None
        cure = "Choose another data.template, or compare by tokens"
        if "{{content}}" not in (raw.system_turn or ""):
            finding = (
                "LLaMA-Factory reads a chat template off a system turn alone, which this one does not write"
            )
            return Reason("data.template", finding, cure)
        if raw.bos and not (raw.system_turn or "").startswith(raw.bos):
            finding = f"LLaMA-Factory takes the {raw.bos} that the tokenizer adds for the start of the chat template"
            return Reason("data.template", finding, cure)
        return None

    def translate(self, handoff: Handoff) -> Translation:
        """See `Port`."""
        raw = handoff.raw
        arguments = trainer_settings(handoff) | _OWN | _lora_arguments(handoff) | _base_arguments(handoff)
        # It loads a base in what the folder's config.json names, so the worker makes a folder that names this.
        folder = {
            "model_name_or_path": f"{handoff.scratch}/base",
            "tokenized_path": f"{handoff.scratch}/rows",
        }
        if raw:
            folder |= _preprocessing(raw) | {"dataset_dir": handoff.scratch, "tokenized_path": None}
        settings = {
            "handoff": handoff.to_json(),
            "arguments": arguments | folder,
            "expected": expected_settings(handoff),
            "weights": weights_dtype(handoff),
            **({"chat_template": _choose_template(raw), "raw_file": _RAW_FILE} if raw else {}),
        }
        files = {"llamafactory.json": settings}
        if raw:
            files["dataset_info.json"] = {"handed": {"file_name": _RAW_FILE, **_describe_rows(raw)}}
        return Translation(
            files={
                name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in files.items()
            },
            argv=(str(WORKERS / "run_llamafactory.py"), f"{handoff.scratch}/llamafactory.json"),
            environ={
                "LLAMAFACTORY_VERBOSITY": "WARN",
                "USE_RAY": "0",
                "USE_MCA": "0",
                "USE_MODELSCOPE_HUB": "0",
                # Reading a file leaves a copy of it.
                **({"HF_DATASETS_CACHE": f"{handoff.scratch}/cache"} if raw else {}),
            },
        )


def _preprocessing(raw: RawRows) -> dict[str, Any]:
    """What says the same as the job to LLaMA-Factory's own preprocessing."""
    return {
        # Texts are what it calls pre-training.
        "stage": "pt" if raw.kind == "text" else "sft",
        # None: read off the tokenizer's, which is the job's. `empty` is never rendered.
        "template": "empty" if raw.kind == "text" else None,
        "cutoff_len": raw.max_tokens,
        "mask_history": raw.trains == "last answer",
        "default_system": None,
        "tool_format": None,
        # A reasoning block that the template writes for an answer without one is of the answer, as in our rows.
        "enable_thinking": True,
        "preserve_thinking": True,
        "max_samples": None,
        "overwrite_cache": True,
        "preprocessing_batch_size": 1000,
        "preprocessing_num_workers": None,
    }


def _choose_template(raw: RawRows) -> str | None:
    """What the worker gives the tokenizer as its chat template. Rows without turns get one that adds what they get."""
    if raw.kind == "completion":
        return ("{{ bos_token }}" if raw.bos else "") + _PLAIN
    return raw.template


def _describe_rows(raw: RawRows) -> dict[str, Any]:
    """Their entry in its list of data sets."""
    if raw.kind == "text":
        return {"formatting": "alpaca", "columns": {"prompt": "text"}}
    if raw.kind == "completion":
        return {"formatting": "alpaca", "columns": {"prompt": "prompt", "response": "completion"}}
    tags = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    return {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", **tags},
    }


def _base_arguments(handoff: Handoff) -> dict[str, Any]:
    """Its dtypes for products and storage are that of the training: products as ours, and the same bits stored."""
    if handoff.base == "full":
        return {"quantization_bit": None}
    return {
        "quantization_method": "bnb",
        "quantization_bit": 4,
        "quantization_type": "nf4",
        "double_quantization": handoff.double_quant,
        "quantization_device_map": None,
    }


def _lora_arguments(handoff: Handoff) -> dict[str, Any]:
    lora = handoff.lora
    if lora is None:
        return {"finetuning_type": "full"}
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    # Ranks that differ between layers can only be read from an adapter, which is the one to begin with.
    patterns = lora.rank_pattern or lora.alpha_pattern
    return {
        "finetuning_type": "lora",
        "adapter_name_or_path": lora.start if patterns else None,
        "create_new_adapter": False,
        "lora_rank": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "lora_target": ",".join(lora.targets),
        "additional_target": None,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "pissa_init": False,
        "loraplus_lr_ratio": None,
    }
