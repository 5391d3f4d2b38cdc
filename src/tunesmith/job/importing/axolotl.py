"""Axolotl: the YAML of `axolotl train`.

Source of names and defaults: axolotl 0.21.0, axolotl/utils/schemas/*.py, core/builders/base.py (warm-up, saving) and
utils/data/utils.py (long rows); what it leaves to transformers' TrainingArguments: transformers 5.20.1.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

from typing import Any

from tunesmith.job.importing.axolotl_keys import OTHERS
from tunesmith.job.importing.axolotl_rows import (
    kind_of_rows,
    message_field,
    messages_field,
    properties,
    rows,
    split,
    trained_roles,
    validation_rows,
)
from tunesmith.job.importing.rules import (
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
from tunesmith.job.importing.trainer import (
    batch,
    best,
    clip,
    model,
    optimizer,
    precision,
    schedule,
    steps_between,
    steps_limit,
    warmup,
)

_TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "llama3": "llama-3", "mistral_v1": "mistral"}


def method(at: At) -> str:
    if at["adapter"] is None:
        return "full"
    return "qlora" if at["adapter"] == "qlora" or at.on("load_in_4bit") else "lora"


def the_method(_: Any, at: At) -> Any:
    if at["adapter"] not in (None, "lora", "qlora"):
        raise NotSupported(f"the adapter {at['adapter']}; a job has lora and qlora", fatal=True)
    eight = at.on("load_in_8bit")
    if method(at) == "full" and (eight or at.on("load_in_4bit")):
        raise NotSupported("a quantised base without adapters", instead="full")
    return Taken("lora", "the base in int8", {"method.base": "int8"}) if eight else method(at)


def targets(_: Any, at: At) -> Any:
    if at.on("lora_target_linear"):
        return "all-linear"
    given = at["lora_target_modules"]
    if isinstance(given, str) and any(letter in given for letter in r".*()|\^$["):
        raise NotSupported(
            "targets by regular expression; all linear layers in their place", instead="all-linear"
        )
    if wanted := names(given or []):
        return wanted
    raise NotSupported("no targets are given; all linear layers in their place", instead="all-linear")


def template(value: Any, at: At) -> Any:
    name = str(value)
    if name == "tokenizer_default":
        return Implied("the model's own template is used")
    if name.startswith("tokenizer_default_fallback_"):
        fallback = _TEMPLATES.get(name.removeprefix("tokenizer_default_fallback_"), "NAME")
        return Implied(f"the model's own template is used; if it has none, write data.template: {fallback}")
    if name == "jinja":
        return Implied("chat_template_jinja says which")
    if ours := _TEMPLATES.get(name):
        return ours
    raise NotSupported(f"their template {name}; the model's own in its place (see tunesmith preview)")


def jinja(value: Any, at: At) -> str:
    if "\n" not in str(value) and (str(value).endswith(".jinja") or at.files.find(str(value))):
        return at.files.name(str(value))
    raise NotSupported("a template written inline: save it to a file and name it in data.template")


def share(value: Any, at: At) -> Any:
    if at.items("test_datasets"):
        return Implied("test_datasets are what validates")
    size = number(value, at)
    if size >= 1:
        raise NotSupported(f"{size:g} validation rows; a share of 0.1 in their place", instead=0.1)
    return Taken(size, "no validation there, so every row trains") if size == 0 else size


def evaluating(value: Any, at: At) -> Any:
    """eval_strategy, eval_steps and evals_per_epoch, where there are rows to validate on."""
    if not at.number("val_set_size") and not at.items("test_datasets"):
        return Taken("never", "no validation rows there")
    if at.given("evals_per_epoch"):
        return _per_epoch(at["evals_per_epoch"])
    if at.given("eval_steps") and str(at["eval_strategy"]) != "no":
        return steps_between(at.number("eval_steps"), at)
    return "epoch" if at["eval_strategy"] == "epoch" else "never"


def saving(value: Any, at: At) -> Any:
    if at.given("saves_per_epoch"):
        return _per_epoch(at["saves_per_epoch"])
    if at.given("save_steps"):
        return steps_between(at.number("save_steps"), at)
    return {"no": "never"}.get(str(at["save_strategy"]), "epoch")


def _per_epoch(times: Any) -> Any:
    return "epoch" if times == 1 else Taken("epoch", f"{times} times an epoch there; it changes no weights")


def packing(value: Any, at: At) -> Implied:
    if not truth(value):
        return Implied("rows are packed for speed here too, which changes no result")
    raise NotSupported(
        "a batch there is so many packed sequences of sequence_len tokens, here so many rows; set "
        "train.batch_rows to rows per step"
    )


def long_rows(value: Any, _: At) -> str:
    if value not in ("drop", "truncate", "raise"):
        raise NotSupported(f"long rows: {value}; they are dropped in its place", instead="drop")
    return "refuse" if value == "raise" else value


def rows_of_a_batch(_: Any, at: At) -> Any:
    if at.given("batch_size"):
        return Taken(at.number("batch_size", whole), "batch_size is the whole batch, on one GPU")
    return batch("micro_batch_size", "gradient_accumulation_steps")(_, at)


def lr(value: Any, at: At) -> float:
    return number(value, at)


def a_tracker(name: str) -> Key:
    return to("train.trackers", lambda value, _: [name] if truth(value) else Implied("off"))


_warm = warmup("warmup_steps", "warmup_ratio", "lr_scheduler", "max_steps")


def warm(_: Any, at: At) -> Any:
    if not at.given("warmup_steps") and not at.given("warmup_ratio"):
        return Taken(0.03, "of the steps, at most 100 of them")
    return _warm(_, at)


_DATA = {
    **each("datasets test_datasets", refused("data sets that are no list of mappings", fatal=True)),
    **each("path data_files revision weight", to("data.train", rows), "datasets[]."),
    "datasets[].type": to("data.train", kind_of_rows, "chat_template, completion, sharegpt; alpaca nearly"),
    "datasets[].split": to("data.train", split, "`org/name:split`"),
    "datasets[].field_messages": to("data.train", messages_field, "messages or conversations"),
    "datasets[].message_property_mappings": Key(
        properties, note="must be those of the shape", status="implied"
    ),
    "datasets[].message_field_role": Key(message_field("role"), note="must be the shape's", status="implied"),
    "datasets[].message_field_content": Key(
        message_field("content"), note="must be the shape's", status="implied"
    ),
    "datasets[].roles_to_train": Key(trained_roles, note="answers are what we train", status="implied"),
    "datasets[].train_on_eos": refused("other end tokens in the loss than the answers'", off=("turn",)),
    "datasets[].train_on_eot": refused("other end tokens in the loss than the answers'", off=("turn",)),
    "datasets[].chat_template": to("data.template", template),
    "datasets[].chat_template_jinja": to("data.template", jinja),
    "datasets[].conversation": to("data.template", template),
    "datasets[].field": refused("rename this field of the rows to `text`", off=("text",)),
    "datasets[].name": refused("a configuration of a hub data set", off=("default",)),
    "datasets[].message_field_training": refused(
        "a field that says which turns train; write weight: 0", off=("train",)
    ),
    "datasets[].ds_type": implied("told by the file"),
    "datasets[].trust_remote_code": refused("code that comes with a data set"),
    "datasets[].field_tools": refused("rename this field of the rows to `tools`", off=("tools",)),
    "datasets[].drop_system_message": refused("system messages dropped from the rows"),
    "datasets[].roles": refused("other names of roles; rename them in the rows"),
    "datasets[].preprocess_shards": implied("how rows are read"),
    **each(
        "shards shards_idx input_transform input_format field_human field_model field_thinking "
        "template_thinking_key message_field_training_detail split_thinking logprobs_field temperature "
        "field_chosen field_rejected",
        refused("a special reading of rows; convert them to messages"),
        "datasets[].",
    ),
    **each(
        "system_prompt system_format field_system field_instruction field_input field_output format "
        "no_input_format",
        refused("a row format of your own; convert the rows to messages", fatal=True),
        "datasets[].type.",
    ),
    **each("path split data_files type", to("data.split.validation", validation_rows), "test_datasets[]."),
    **each(
        "ds_type field_messages message_property_mappings message_field_role message_field_content roles "
        "chat_template name field revision trust_remote_code roles_to_train train_on_eos",
        implied("as for the training rows"),
        "test_datasets[].",
    ),
    "val_set_size": to("data.split.validation", share, default=0.0),
    "sequence_len": to("data.max_tokens", whole, default=512),
    "excess_length_strategy": to("data.too_long", long_rows, "raise: refuse", default="drop"),
    "dataset_exact_deduplication": to(
        "data.deduplicate", lambda value, _: "exact" if truth(value) else "none", default=False
    ),
    "chat_template": to("data.template", template),
    "chat_template_jinja": to("data.template", jinja),
    "train_on_inputs": refused("training on prompts; here answers alone are trained"),
    "sample_packing": Key(
        packing, note="off is what we do; on, a batch counts other things", status="not supported"
    ),
    "streaming": to("data.streaming", flag),
    "streaming_multipack_buffer_size": refused("a window of shuffling", needs="streaming"),
}

_MODEL = {
    "base_model": to("model", model("base_model", "revision_of_model"), required=True),
    "revision_of_model": to("model", model("base_model", "revision_of_model")),
    "adapter": to("method.name", the_method, "empty: full", default=None, nullable=True),
    "load_in_4bit": to("method.name", switch(the_method), "with an adapter: qlora"),
    "load_in_8bit": to("method.name", switch(the_method), "with an adapter: lora, base: int8"),
    "lora_r": to("method.rank", whole, required=True, adapter=True),
    "lora_alpha": to("method.alpha", number, required=True, adapter=True),
    "lora_dropout": to("method.dropout", number, default=0.0, adapter=True),
    "lora_target_modules": to("method.targets", targets, default=None, adapter=True, nullable=True),
    "lora_target_linear": to("method.targets", targets, "all-linear", adapter=True),
    "lora_modules_to_save": to("method.modules_to_save", names, adapter=True),
    "lora_model_dir": to("method.adapter", lambda value, at: at.files.name(str(value)), adapter=True),
    "peft_use_rslora": to("method.rslora", flag, default=False, adapter=True),
    "peft_use_dora": to("method.dora", flag, default=False, adapter=True),
    "tokens": to("method.new_tokens", names, adapter=True),
}

_TRAIN = {
    "micro_batch_size": to("train.batch_rows", rows_of_a_batch, "times the other", default=1),
    "gradient_accumulation_steps": to("train.batch_rows", rows_of_a_batch, "times the other", default=1),
    "batch_size": to("train.batch_rows", rows_of_a_batch),
    "num_epochs": to("train.epochs", number, default=1.0),
    "max_steps": to("train.steps", steps_limit),
    "learning_rate": to("train.learning_rate", lr, required=True),
    "lr_scheduler": to("train.schedule", schedule, default="cosine"),
    "warmup_steps": to("train.warmup", warm, "as a share of the steps", default=None, nullable=True),
    "warmup_ratio": to("train.warmup", warm),
    "optimizer": to("train.optimizer", optimizer, default="adamw_torch_fused"),
    "weight_decay": to("train.weight_decay", number, default=0.0),
    "adam_beta1": to("train.beta1", number, default=0.9),
    "adam_beta2": to("train.beta2", number, default=0.999),
    "adam_epsilon": to("train.epsilon", number, default=1e-8),
    "max_grad_norm": to("train.clip_norm", clip, "0 is null", default=1.0),
    "seed": to("train.seed", whole, default=42),
    "bf16": to("train.precision", precision, default="auto"),
    "fp16": to("train.precision", precision),
    "bfloat16": refused("bf16 weights without fp32 masters (see train.optimizer: adamw-bf16)"),
    "float16": refused("fp16 weights"),
    "float32": implied("train.precision says it"),
    "eval_strategy": to("train.evaluate_every", evaluating, default=None, nullable=True),
    "eval_steps": to("train.evaluate_every", evaluating),
    "evals_per_epoch": to("train.evaluate_every", evaluating),
    "save_strategy": to("train.save_every", saving, default="epoch"),
    "save_steps": to("train.save_every", saving),
    "saves_per_epoch": to("train.save_every", saving),
    "save_total_limit": to("train.keep_checkpoints", whole, default=4),
    "load_best_model_at_end": to("train.keep_best", best, default=False),
    "use_wandb": a_tracker("wandb"),
    "use_mlflow": a_tracker("mlflow"),
    "use_tensorboard": a_tracker("tensorboard"),
}

FRAMEWORK = Framework(
    name="axolotl",
    title="Axolotl",
    version="0.21.0",
    source="axolotl/utils/schemas/*.py, core/builders/base.py (over transformers 5.20.1)",
    table={**OTHERS, **_DATA, **_MODEL, **_TRAIN},
    telltale=frozenset(
        "base_model micro_batch_size sequence_len val_set_size datasets[].type num_epochs lora_target_linear "
        "sample_packing adapter lr_scheduler pad_to_sequence_len evals_per_epoch saves_per_epoch "
        "dataset_prepared_path special_tokens train_on_inputs".split()
    ),
    method=method,
    habits=[
        Habit(
            "no rows are set aside for a test; a share here lets `eval` and `compare` judge",
            "data.split.test",
            0.0,
        )
    ],
)
