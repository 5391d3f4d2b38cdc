"""What frameworks over `transformers.Trainer` share: what they cannot express, and how a handoff is said to them."""

from __future__ import annotations

from typing import Any

from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.port import Reason
from tunesmith.job.spec import FullSpec, Job, LoraSpec

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# Fused where it is safe and fast: the kernel that our own AdamW calls. In 8 bits bitsandbytes', whose levels ours has.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_8bit"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Of `trainer_settings`: what would change a weight on one device. Order and rows are the worker's.
_DECIDING = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "seed", "bf16", "fp16", "tf32",
    "gradient_checkpointing", "torch_compile", "use_liger_kernel", "auto_find_batch_size", "dataloader_drop_last",
)  # fmt: skip


def can_trainer(job: Job, *, title: str) -> Reason | None:
    """The first thing in `job` that `Trainer` and PEFT cannot do as our engine does it, or that no adapter says yet."""
    if (objective := job.objective_spec.name) != "sft":
        finding = f"{title} is only handed rows whose answers are learned, not {objective}'s"
        return Reason("objective", finding, "Set objective: sft, or take the framework out")
    return _can_method(job.method_spec, job, title) or _can_train(job, title)


def _can_train(job: Job, title: str) -> Reason | None:
    train = job.train
    if job.data.streaming:
        return Reason(
            "data.streaming", f"{title} is handed rows in files", "Read train without data.streaming"
        )
    if train.optimizer not in OPTIMIZERS:
        cure = "Set train.optimizer: adamw"
        return Reason("train.optimizer", f"{title} has no {train.optimizer} that computes as ours does", cure)
    if train.optimizer == "adamw-8bit" and isinstance(job.method_spec, FullSpec):
        finding = f"{title} keeps the states of embeddings in fp32, ours are in 8 bits"
        return Reason("train.optimizer", finding, "Train adapters, or set train.optimizer: adamw")
    if train.optimizer_in_backward:
        cure = "Leave train.optimizer_in_backward out"
        return Reason("train.optimizer_in_backward", f"{title} keeps gradients until the step's end", cure)
    if train.memory_limit != "auto":
        return Reason("train.memory_limit", f"{title} cannot be held to one", "Leave train.memory_limit out")
    if train.trackers:
        cure = "Remove train.trackers; the steps are in the arm's steps.jsonl"
        return Reason("train.trackers", f"{title}'s steps are not sent to {train.trackers[0]}", cure)
    return None


def _can_method(method: FullSpec | LoraSpec, job: Job, title: str) -> Reason | None:
    if method.qat_spec:
        return Reason(
            "qat", f"{title} does not train with rounded weights as ours does", "Leave qat out of the arm"
        )
    if isinstance(method, FullSpec):
        return None
    if method.storage == "int8":
        finding = f"{title}'s int8 layers round what they multiply, too; ours round the weights alone"
        return Reason("base", finding, "Use base: nf4 or full")
    if method.storage == "fp8" or method.compute == "fp8":
        key = "base" if method.storage == "fp8" else "compute"
        return Reason(key, f"{title} multiplies no frozen weights in fp8 as ours does", f"Leave {key} out")
    if method.new_tokens:
        return Reason("new_tokens", f"{title} is handed no new tokens yet", "Remove method.new_tokens")
    if method.modules_to_save:
        cure = "Remove modules_to_save"
        return Reason(
            "modules_to_save", f"{title} is handed no module to train whole beside adapters yet", cure
        )
    if method.dora and job.train.weight_decay:
        finding = f"{title} also decays DoRA's magnitudes"
        return Reason("dora", finding, "Set train.weight_decay: 0, or leave dora out")
    return None


def quantization_settings(handoff: Handoff) -> dict[str, Any] | None:
    """Arguments for `transformers.BitsAndBytesConfig`: bitsandbytes then stores the bytes that we do. None leaves the
    base as it is. That blocks have 64 values is no argument: the worker looks."""
    if handoff.base == "full":
        return None
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": handoff.double_quant,
        "bnb_4bit_compute_dtype": DTYPES[handoff.precision],
        "bnb_4bit_quant_storage": "uint8",
        # The head, by the two names that it has.
        "llm_int8_skip_modules": ["lm_head", "embed_out"],
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def lora_settings(handoff: Handoff) -> dict[str, Any] | None:
    """Arguments for `peft.LoraConfig`."""
    lora = handoff.lora
    return lora and {
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def trainer_settings(handoff: Handoff) -> dict[str, Any]:
    """Arguments for `transformers.TrainingArguments`: everything that changes what is computed, or leaves files.

    Logging, validation and saving are the worker's own, the same for all frameworks.
    """
    return {
        "output_dir": f"{handoff.scratch}/output",
        "max_steps": handoff.total_steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": handoff.micro_rows,
        "gradient_accumulation_steps": handoff.batch_rows // handoff.micro_rows,
        "average_tokens_across_devices": True,
        "learning_rate": handoff.learning_rate,
        "lr_scheduler_type": SCHEDULES[handoff.schedule],
        "lr_scheduler_kwargs": None,
        "warmup_steps": handoff.warmup_steps,
        "optim": OPTIMIZERS[handoff.optimizer],
        "optim_args": None,
        "weight_decay": handoff.weight_decay,
        "adam_beta1": handoff.beta1,
        "adam_beta2": handoff.beta2,
        "adam_epsilon": handoff.epsilon,
        "max_grad_norm": handoff.clip_norm,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "seed": handoff.seed,
        "data_seed": handoff.seed,
        "full_determinism": False,
        "use_cpu": handoff.device == "cpu",
        "bf16": handoff.precision == "bf16",
        "fp16": handoff.precision == "fp16",
        "tf32": None,
        "gradient_checkpointing": False,
        "torch_compile": handoff.compile,
        "use_liger_kernel": False,
        "auto_find_batch_size": False,
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": handoff.device == "cuda",
        "remove_unused_columns": True,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }


def weights_dtype(handoff: Handoff) -> str:
    """What the base is loaded in: what is trained is fp32, a frozen base is in the training precision."""
    return "float32" if handoff.lora is None else DTYPES[handoff.precision]


def expected_settings(handoff: Handoff) -> dict[str, Any]:
    """What the worker of a framework that makes its own arguments must find in them, or refuse to train."""
    arguments = trainer_settings(handoff)
    return {"arguments": {name: arguments[name] for name in _DECIDING}, "lora": lora_settings(handoff)}
