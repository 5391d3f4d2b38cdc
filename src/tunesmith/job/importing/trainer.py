"""Keys of transformers' TrainingArguments, which TRL, LLaMA-Factory and Unsloth share (Axolotl's own names use the same
rules). Source of names and defaults: transformers 5.6.0 to 5.23.0, src/transformers/training_args.py.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

from typing import Any

from tunesmith.job.importing.rules import (
    At,
    Implied,
    Key,
    NotSupported,
    Taken,
    Turn,
    each,
    implied,
    names,
    number,
    refused,
    to,
    truth,
    whole,
)

STAND_IN_WARMUP = 0.03


class StepsUnknown(NotSupported):
    """Warm-up in steps, of a run whose length the configuration alone does not tell; the rows may."""

    def __init__(self, steps: float, reason: str, *, instead: float) -> None:
        super().__init__(reason, instead=instead)
        self.steps = steps


_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla"), "adamw"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw-8bit"),
}


def optimizer(value: Any, at: At) -> Any:
    name = str(value).lower().removeprefix("optimizernames.")
    if ours := _OPTIMIZERS.get(name):
        return (
            Taken(ours, "paging moves states to the CPU; it changes no result") if "paged" in name else ours
        )
    raise NotSupported(f"the optimizer {value}; adamw in its place", instead="adamw")


def schedule(value: Any, _: At) -> Any:
    name = str(value).lower().removeprefix("schedulertype.")
    if name in ("linear", "cosine", "constant"):
        return name
    if name == "constant_with_warmup":
        return "constant"
    stand_in = "cosine" if "cosine" in name else "linear"
    raise NotSupported(f"the schedule {value}; {stand_in} in its place", instead=stand_in)


def batch(rows: str, accumulated: str) -> Turn:
    """rows, accumulated: the keys whose product is a batch."""

    def turn(_: Any, at: At) -> Taken:
        product = at.number(rows, whole) * (at.number(accumulated, whole) or 1)
        return Taken(product, f"{at[rows]} rows x {at[accumulated] or 1} accumulated, on one GPU")

    return turn


def warmup(steps: str, share: str, scheduler: str, max_steps: str) -> Turn:
    """The arguments: the keys that hold them. Ours is a share of the steps."""

    def turn(_: Any, at: At) -> Any:
        if str(at[scheduler]) == "constant":
            return Taken(0.0, "`constant` has no warm-up; constant_with_warmup has")
        if at[steps] is None and at[share] is None:
            return 0.0
        # Their steps win where both are given, unless they are 0; below 1 they are a share already.
        count = at.number(steps) or 0
        if count == 0:
            return at.number(share) or 0.0
        if count < 1:
            return count
        total = at.number(max_steps) or 0
        if total > 0:
            return Taken(
                min(round(count / total, 6), 0.999),
                f"{count:g} of {total:g} steps; a share of the steps here",
            )
        raise StepsUnknown(
            count,
            f"{count:g} warm-up steps: a job gives them as a share of the steps, whose number follows from the data; "
            f"{STAND_IN_WARMUP} in its place, set train.warmup to {count:g} / steps",
            instead=STAND_IN_WARMUP,
        )

    return turn


def steps_limit(value: Any, at: At) -> Any:
    count = whole(value, at)
    return count if count > 0 else Implied("no limit; epochs decide")


def clip(value: Any, at: At) -> float | None:
    return number(value, at) or None


def every(strategy: str, steps: str, fallback: str = "") -> Turn:
    """When to evaluate or save. The arguments are their keys; `fallback` gives the steps if `steps` does not."""

    def turn(_: Any, at: At) -> Any:
        when = str(at[strategy]).lower().removeprefix("intervalstrategy.")
        if when in ("no", "false", "none"):
            return "never"
        if when in ("epoch", "best"):
            return "epoch"
        return steps_between(at.number(steps) or (at.number(fallback) if fallback else 0) or 0, at)

    return turn


def steps_between(value: Any, at: At) -> Any:
    """Steps from 1 on; below, theirs is a share of the run."""
    count = number(value, at)
    if count >= 1:
        return int(count)
    return Taken("epoch", "a share of the run there; it changes no weights") if count else "never"


def precision(value: Any, at: At) -> Any:
    """From `bf16` and `fp16`; their `auto` is ours."""
    if at["fp16"] is not None and at.on("fp16"):
        return "fp16"
    if str(at["bf16"]).lower() in ("auto", "full", "none"):
        return "bf16" if str(at["bf16"]).lower() == "full" else "auto"
    if at.on("bf16"):
        return "bf16"
    return "fp32"


def trackers(value: Any, at: At) -> Any:
    wanted = [name for name in names(value) if name not in ("none", "null")]
    known = [name for name in wanted if name in ("tensorboard", "wandb", "mlflow")]
    rest = [name for name in wanted if name not in known]
    return Taken(known, f"no tracker {', '.join(rest)} here; it changes no result" if rest else "")


def best(value: Any, at: At) -> Any:
    metric = at["metric_for_best_model"]
    if truth(value) and metric not in (None, "loss", "eval_loss"):
        raise NotSupported(f"the best checkpoint by {metric}; by validation loss in its place", instead=True)
    return truth(value)


def revision(value: Any, _: At) -> Any:
    return Implied("the default branch") if value == "main" else str(value)


def model(name: str, revision_key: str = "") -> Turn:
    """The model, with its revision where one is named."""

    def turn(_: Any, at: At) -> Any:
        value = at.files.name(str(at[name]))
        pinned = at[revision_key] if revision_key else None
        return {"name": value, "revision": str(pinned)} if pinned and pinned != "main" else value

    return turn


_LOGGING = """logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter logging_dir
include_num_input_tokens_seen log_level log_level_replica disable_tqdm run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id include_tokens_per_second skip_memory_metrics debug"""
_HUB = "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
_LOADING = """dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name
torch_empty_cache_steps use_cache dataset_num_proc ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_static_graph ddp_backend ddp_timeout local_rank average_tokens_across_devices auto_find_batch_size
accelerator_config"""
_RECOMPUTING = """gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
activation_checkpointing_kwargs activation_offloading"""
_KERNELS = """torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config tf32
bf16_full_eval fp16_full_eval full_determinism attn_implementation"""
_EVALUATING = """per_device_eval_batch_size eval_accumulation_steps eval_delay prediction_loss_only eval_on_start
eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics do_eval do_predict
greater_is_better metric_for_best_model eval_packing"""
_SAVING = """save_only_model save_on_each_node save_safetensors enable_jit_checkpoint output_dir overwrite_output_dir
resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint use_cpu"""

OUTPUT = implied("changes no result: where output, logs and checkpoints go is --out")
HUB = implied("changes no result: nothing is uploaded")
LOADING = implied("changes no result: how rows reach the device")
RECOMPUTING = implied("the memory planner decides what is kept and what is computed again")
KERNELS = implied("changes no result: kernels are the engine's choice")
EVALUATING = implied("changes no weights: how validation is batched")
MANY_GPUS = refused("training over several GPUs; a batch is counted for one", off=(1, "1"))


def trainer_keys(**defaults: Any) -> dict[str, Key]:
    """The table of TrainingArguments. defaults: what the framework changes about them."""
    default = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "seed": 42,
        "save_steps": 500,
        "logging_steps": 500,
    } | defaults
    warm = warmup("warmup_steps", "warmup_ratio", "lr_scheduler_type", "max_steps")
    rows = batch("per_device_train_batch_size", "gradient_accumulation_steps")
    evaluating = every("eval_strategy", "eval_steps", "logging_steps")
    product = "times the other: rows per optimizer step"
    return {
        **each(_LOGGING + " " + _SAVING, OUTPUT),
        **each(_HUB, HUB),
        **each(_LOADING, LOADING),
        **each(_RECOMPUTING, RECOMPUTING),
        **each(_KERNELS, KERNELS),
        **each(_EVALUATING, EVALUATING),
        "do_train": implied("a job trains"),
        **each("deepspeed fsdp fsdp_config parallelism_config", MANY_GPUS),
        "per_device_train_batch_size": to(
            "train.batch_rows", rows, product, default=default["per_device_train_batch_size"]
        ),
        "gradient_accumulation_steps": to(
            "train.batch_rows", rows, product, default=default["gradient_accumulation_steps"]
        ),
        "num_train_epochs": to("train.epochs", number, default=default["num_train_epochs"]),
        "max_steps": to("train.steps", steps_limit, "-1 or 0: no limit"),
        "learning_rate": to("train.learning_rate", number, default=default["learning_rate"]),
        "lr_scheduler_type": to("train.schedule", schedule, default=default["lr_scheduler_type"]),
        "warmup_steps": to("train.warmup", warm, "as a share of the steps", default=default["warmup_steps"]),
        "warmup_ratio": to("train.warmup", warm),
        "optim": to("train.optimizer", optimizer, default=default["optim"]),
        "weight_decay": to("train.weight_decay", number, default=default["weight_decay"]),
        "adam_beta1": to("train.beta1", number, default=0.9),
        "adam_beta2": to("train.beta2", number, default=0.999),
        "adam_epsilon": to("train.epsilon", number, default=1e-8),
        "max_grad_norm": to("train.clip_norm", clip, "0 is null", default=default["max_grad_norm"]),
        "bf16": to("train.precision", precision, default=default["bf16"]),
        "fp16": to("train.precision", precision),
        "seed": to("train.seed", whole, default=default["seed"]),
        "eval_strategy": to("train.evaluate_every", evaluating, default="no"),
        "eval_steps": to("train.evaluate_every", evaluating),
        "save_strategy": to("train.save_every", every("save_strategy", "save_steps"), default="steps"),
        "save_steps": to(
            "train.save_every", every("save_strategy", "save_steps"), default=default["save_steps"]
        ),
        "save_total_limit": to("train.keep_checkpoints", whole),
        "load_best_model_at_end": to("train.keep_best", best, default=False),
        "report_to": to("train.trackers", trackers),
        "logging_steps": Key(
            OUTPUT.turn, note=OUTPUT.note, status="implied", default=default["logging_steps"]
        ),
        "lr_scheduler_kwargs": refused("arguments of the schedule"),
        "optim_args": refused("arguments of the optimizer"),
        "optim_target_modules": refused("an optimizer for some modules only"),
        "label_smoothing_factor": refused("label smoothing"),
        "neftune_noise_alpha": refused("noise on embeddings (NEFTune)"),
        "data_seed": refused("a seed of the row order apart from train.seed"),
        "dataloader_drop_last": refused("the last, smaller batch of an epoch is trained here"),
        "group_by_length": refused("rows grouped by length; they come in random order here"),
        "train_sampling_strategy": refused("another order of rows than random", off=("random",)),
        "trust_remote_code": refused("code that comes with a model; none is run here"),
        "router_aux_loss_coef": refused("an auxiliary loss for routers"),
    }
