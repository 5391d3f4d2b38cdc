"""Unsloth, in the two forms that exist: the file of `unsloth train --config` (sections data, training, lora, logging),
and, as YAML, the argument names that its notebooks pass to FastLanguageModel.from_pretrained, get_peft_model and
SFTConfig, flat in one mapping (with TRL's `dataset_name`).

Source of names and defaults: unsloth 2026.10.9, unsloth_cli/config.py, studio/backend/core/training/trainer.py (what
the command line fixes); unsloth/models/{loader,llama}.py and the SFTConfig defaults that unsloth/models/rl.py replaces.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.job.importing import trl
from tunesmith.job.importing.rules import (
    UNSET,
    At,
    Framework,
    Habit,
    Implied,
    Key,
    NotSupported,
    Taken,
    each,
    flag,
    implied,
    names,
    number,
    refused,
    switch,
    to,
    truth,
    whole,
)
from tunesmith.job.importing.sources import is_file, mixed, shape_of_file, source
from tunesmith.job.importing.trainer import (
    HUB,
    KERNELS,
    LOADING,
    OUTPUT,
    RECOMPUTING,
    batch,
    optimizer,
    steps_limit,
    trackers,
    trainer_keys,
    warmup,
)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_HABITS = [
    Habit("equal rows are all trained", "data.deduplicate", "none"),
    Habit(
        "no rows are set aside for a test; a share here lets `eval` and `compare` judge",
        "data.split.test",
        0.0,
    ),
]


def the_model(value: Any, at: At) -> Any:
    name = at.files.name(str(value))
    bare = name.removesuffix("-unsloth-bnb-4bit").removesuffix("-bnb-4bit")
    if bare != name and at.files.find(str(value)) is None:
        raise NotSupported(
            f"a checkpoint quantised beforehand: weights are quantised as they load here; {bare} in its place",
            instead=bare,
        )
    return name


def length(value: Any, at: At) -> Taken:
    return Taken(whole(value, at), "longer rows are cut at their end", {"data.too_long": "truncate"})


def targets(value: Any, at: At) -> Any:
    if isinstance(value, str) and not value.strip():
        return ALL_LINEAR
    return trl.targets(value if isinstance(value, list) or value == "all-linear" else names(value), at)


# --- unsloth train --config -------------------------------------------------------------------------------------------


def cli_method(at: At) -> str:
    if str(at["training.training_type"]).strip().lower() == "full":
        return "full"
    return "qlora" if at.on("training.load_in_4bit") else "lora"


def cli_rows(_: Any, at: At) -> Any:
    shape = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chatml": "messages", "raw": "text"}.get(
        str(at["data.format_type"]).lower()
    )
    if files := at["data.local_dataset"]:
        return mixed([source(at.files.name(name), format=shape) for name in names(files)])
    return source(at.files.name(str(at["data.dataset"])), split="train", format=shape)


def cli_loss(value: Any, at: At) -> Implied:
    if truth(value):
        return Implied("answers alone are trained")
    first = names(at["data.local_dataset"] or [])
    if str(at["data.format_type"]).lower() == "raw" or (
        first and shape_of_file(at.files.find(first[0])) == "text"
    ):
        return Implied("raw text is trained whole")
    raise NotSupported("training on prompts too; here answers alone are trained")


_rows = batch("training.batch_size", "training.gradient_accumulation_steps")
_warm = warmup("training.warmup_steps", "", "", "training.max_steps")

CLI = Framework(
    name="unsloth",
    title="Unsloth",
    version="2026.10.9",
    source="unsloth_cli/config.py, studio/backend/core/training/trainer.py",
    table={
        "model": to("model", the_model, required=True),
        "data.dataset": to("data.train", cli_rows),
        "data.local_dataset": to("data.train", cli_rows),
        "data.format_type": to("data.train", cli_rows, "the sources' format"),
        "training.training_type": to("method.name", lambda _, at: cli_method(at), default="lora"),
        "training.load_in_4bit": to(
            "method.name", lambda _, at: cli_method(at), "with lora: qlora", default=True
        ),
        "training.max_seq_length": to("data.max_tokens", length, "and data.too_long: truncate", default=2048),
        "training.num_epochs": to("train.epochs", number, default=3),
        "training.learning_rate": to("train.learning_rate", number, default=2e-4),
        "training.batch_size": to("train.batch_rows", _rows, "times the other", default=2),
        "training.gradient_accumulation_steps": to("train.batch_rows", _rows, "times the other", default=4),
        "training.warmup_steps": to("train.warmup", _warm, "as a share of the steps", default=5),
        "training.max_steps": to("train.steps", steps_limit, "0: no limit"),
        "training.save_steps": to(
            "train.save_every", lambda value, at: whole(value, at) or "never", default=0
        ),
        "training.weight_decay": to("train.weight_decay", number, default=0.01),
        "training.random_seed": to("train.seed", whole, default=3407),
        "training.packing": Key(
            trl.packing, note="off is what we do; on, a batch counts other things", status="not supported"
        ),
        "training.train_on_completions": Key(
            cli_loss, note="true is what we do; false, every token trains", default=False
        ),
        "training.gradient_checkpointing": RECOMPUTING,
        "training.output_dir": OUTPUT,
        "lora.lora_r": to("method.rank", whole, default=64, adapter=True),
        "lora.lora_alpha": to("method.alpha", number, default=16, adapter=True),
        "lora.lora_dropout": to("method.dropout", number, default=0.0, adapter=True),
        "lora.target_modules": to("method.targets", targets, default=",".join(ALL_LINEAR), adapter=True),
        "lora.use_rslora": to("method.rslora", flag, default=False, adapter=True),
        "lora.use_dora": to("method.dora", flag, default=False, adapter=True),
        "lora.use_loftq": refused("LoftQ's initial adapters"),
        **each("vision_all_linear finetune_vision_layers", implied("text models only"), "lora."),
        **each(
            "finetune_language_layers finetune_attention_modules finetune_mlp_modules",
            implied("which layers of a vision model train; text models follow target_modules"),
            "lora.",
        ),
        "logging.enable_wandb": to(
            "train.trackers", lambda value, _: ["wandb"] if truth(value) else Implied("off")
        ),
        "logging.enable_tensorboard": to(
            "train.trackers", lambda value, _: ["tensorboard"] if truth(value) else Implied("off")
        ),
        **each("wandb_project tensorboard_dir", OUTPUT, "logging."),
        **each("wandb_token hf_token", implied("secrets come from the environment"), "logging."),
    },
    telltale=frozenset(
        "training.training_type training.max_seq_length training.load_in_4bit training.num_epochs "
        "training.learning_rate training.batch_size lora.lora_r data.dataset data.local_dataset".split()
    ),
    method=cli_method,
    habits=[
        Habit("the optimizer is adamw_8bit", "train.optimizer", "adamw-8bit"),
        Habit("the schedule is linear", "train.schedule", "linear"),
        Habit("gradients are clipped at 1", "train.clip_norm", 1.0),
        Habit("bf16 where the GPU has it", "train.precision", "auto"),
        Habit("no validation, so every row trains", "data.split.validation", 0.0),
        Habit("no validation", "train.evaluate_every", "never"),
        Habit("ends with the last weights", "train.keep_best", False),
        *_HABITS,
    ],
)


# --- argument names, flat ---------------------------------------------------------------------------------------------


def method(at: At) -> str:
    if at.on("full_finetuning"):
        return "full"
    sixteen = at.on("load_in_16bit") or at.on("load_in_8bit") or at.on("load_in_fp8")
    return "lora" if sixteen or not at.on("load_in_4bit") else "qlora"


def the_method(value: Any, at: At) -> Any:
    if method(at) == "lora" and at.on("load_in_8bit"):
        return Taken("lora", "the base in int8", {"method.base": "int8"})
    if method(at) == "lora" and at.on("load_in_fp8"):
        return Taken("lora", "the base in fp8", {"method.base": "fp8"})
    return method(at)


def flat_length(_: Any, at: At) -> Taken:
    """SFTConfig's max_length cuts rows; without it the model's max_seq_length does."""
    return length(at["max_length"] if at.given("max_length") else at["max_seq_length"], at)


def flat_loss(value: Any, at: At) -> Implied:
    """train_on_responses_only of the notebooks, which format rows into one text and train all of it without."""
    if truth(value) or at.on("assistant_only_loss"):
        return Implied("answers alone are trained")
    if shape_of_file(at.files.find(str(at["dataset_name"]))) in ("text", "prompt_completion"):
        return Implied("the rows are text, or completions of prompts, not chats")
    raise NotSupported("training on prompts too; here answers alone are trained")


def seed(_: Any, at: At) -> Any:
    """`seed` is the trainer's and `random_state` the adapters'; ours is one for both."""
    if at.given("seed") and at.given("random_state") and at["seed"] != at["random_state"]:
        return Taken(at.number("seed", whole), "one seed here for adapters (random_state) and rows (seed)")
    return at.number("random_state" if at.given("random_state") and not at.given("seed") else "seed", whole)


FLAT = Framework(
    name="unsloth",
    title="Unsloth",
    version="2026.10.9",
    source="unsloth/models/loader.py, llama.py, rl.py (over TRL's SFTConfig)",
    table={
        **trainer_keys(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-5,
            weight_decay=0.001,
            warmup_steps=0.1,
            optim="adamw_8bit",
            seed=3407,
            logging_steps=1,
            bf16="auto",
        ),
        **{name: key for name, key in trl.SFT.items() if name != "max_length"},
        "assistant_only_loss": replace(trl.SFT["assistant_only_loss"], default=UNSET),
        "model_name": to("model", the_model, required=True),
        "revision": refused("a revision of the model; add `revision` to model"),
        "max_seq_length": to("data.max_tokens", flat_length, "and data.too_long: truncate", default=2048),
        "max_length": to("data.max_tokens", flat_length),
        "load_in_4bit": to("method.name", the_method, "qlora", default=True),
        "load_in_8bit": to("method.name", switch(the_method), "lora, base: int8"),
        "load_in_16bit": to("method.name", switch(the_method), "lora"),
        "load_in_fp8": to("method.name", switch(the_method), "lora, base: fp8"),
        "full_finetuning": to("method.name", switch(the_method), "full"),
        "r": to("method.rank", whole, default=16, adapter=True),
        "lora_alpha": to("method.alpha", number, default=16, adapter=True),
        "lora_dropout": to("method.dropout", number, default=0.0, adapter=True),
        "target_modules": to("method.targets", targets, default=ALL_LINEAR, adapter=True),
        "modules_to_save": to("method.modules_to_save", names, adapter=True),
        "use_rslora": to("method.rslora", flag, default=False, adapter=True),
        "use_dora": to("method.dora", flag, adapter=True),
        "random_state": to("train.seed", seed, "one seed for adapters and rows"),
        "seed": to("train.seed", seed, default=3407),
        "dtype": implied("train.precision is what products are computed in"),
        **each(
            "device_map device_map_planner_kwargs token fix_tokenizer use_exact_model_name offload_embedding "
            "temporary_location offload_layers checkpoint_skip_layers text_only ensure_weight_tying "
            "float32_mixed_precision",
            LOADING,
        ),
        **each("use_gradient_checkpointing unsloth_tiled_mlp", RECOMPUTING),
        **each(
            "fast_inference gpu_memory_utilization float8_kv_cache max_lora_rank disable_log_stats",
            implied("inference only"),
        ),
        "bias": refused("trained biases", off=("none",)),
        "loftq_config": refused("LoftQ's initial adapters"),
        "init_lora_weights": refused("other initial adapters", off=(True, "true")),
        "layers_to_transform": refused("adapters on some layers only"),
        "layers_pattern": refused("adapters on some layers only"),
        "finetune_last_n_layers": refused("adapters on some layers only"),
        "target_parameters": refused("adapters on bare parameters"),
        "rope_scaling": refused("another scaling of positions"),
        "resize_model_vocab": refused("another size of the vocabulary"),
        "qat_scheme": refused("quantisation-aware training by their scheme; see method.qat"),
        "embedding_learning_rate": refused("a learning rate of its own for embeddings"),
        "dataset_name": to("data.train", lambda _, at: flat_rows(at), required=True),
        "dataset_train_split": to("data.train", lambda _, at: flat_rows(at), default="train"),
        "dataset_test_split": to("data.split.validation", trl.validation, default="test"),
        "train_on_responses_only": Key(
            flat_loss, note="true is what we do; false, every token trains", default=False
        ),
        "instruction_part": implied("the template tells where answers begin"),
        "response_part": implied("the template tells where answers begin"),
        "hub_model_id": HUB,
        "attn_implementation": KERNELS,
        "report_to": to("train.trackers", trackers),
        "optim": to("train.optimizer", optimizer, default="adamw_8bit"),
    },
    telltale=frozenset(
        "model_name r random_state use_gradient_checkpointing target_modules max_seq_length full_finetuning "
        "load_in_16bit fast_inference loftq_config finetune_last_n_layers".split()
    ),
    method=method,
    habits=_HABITS,
)


def flat_rows(at: At) -> Any:
    name = str(at["dataset_name"])
    here = is_file(name) or at.files.find(name) is not None
    return source(at.files.name(name), split=None if here else str(at["dataset_train_split"]))
