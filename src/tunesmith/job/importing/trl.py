"""TRL: what `trl sft --config FILE` takes (SFTConfig, ModelConfig, script arguments, DatasetMixtureConfig).

Source of names and defaults: trl 1.16.0, trl/trainer/{sft_config,base_config,model_config}.py and
trl/scripts/{sft,utils}.py; LoRA targets: peft 0.21.2, peft/utils/constants.py.
"""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

from typing import Any

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
from tunesmith.job.importing.sources import PREFERENCES, is_file, mixed, shape_of_file, source
from tunesmith.job.importing.trainer import HUB, KERNELS, LOADING, OUTPUT, model, trainer_keys

PEFT_TARGETS = ["q_proj", "v_proj"]


def method(at: At) -> str:
    if not at.on("use_peft"):
        return "full"
    return "qlora" if at.on("load_in_4bit") else "lora"


def the_method(value: Any, at: At) -> Any:
    eight = at.on("load_in_8bit")
    if method(at) == "full":
        if eight or at.on("load_in_4bit"):
            raise NotSupported("a quantised base without adapters", instead="full")
        return "full"
    return Taken(method(at), "the base in int8", {"method.base": "int8"}) if eight else method(at)


def targets(value: Any, _: At) -> Any:
    """LoRA's targets; None is PEFT's table by architecture."""
    if value is None:
        return Taken(
            PEFT_TARGETS, "PEFT's choice for Llama, Mistral, Qwen and Gemma; other models have other names"
        )
    if value in ("all-linear", ["all-linear"], "all"):
        return "all-linear"
    if isinstance(value, str) and any(letter in value for letter in r".*()|\^$["):
        raise NotSupported(
            "targets by regular expression; all linear layers in their place", instead="all-linear"
        )
    return names(value)


def rows(_: Any, at: At) -> Any:
    """`data.train`, from dataset_name or the mixture in datasets."""
    items = at.items("datasets")
    if not items and not at.given("dataset_name"):
        raise NotSupported("no rows are named: neither dataset_name nor datasets is there", fatal=True)
    if not items:
        return one_source(at["dataset_name"], at["dataset_train_split"], at)
    fractions = [item.within("fraction") for item in items]
    if any(fraction != fractions[0] for fraction in fractions):
        raise NotSupported(
            "fractions for a mixture: theirs are shares of the mixture, weights here of each source"
        )
    return mixed([_mixed_source(item) for item in items])


def _mixed_source(item: At) -> str | dict[str, Any]:
    path, files = str(item.within("path") or ""), item.within("data_files")
    if path in ("json", "csv", "parquet", "text") and isinstance(files, str):
        return source(item.files.name(files))
    return one_source(path, item.within("split") or "train", item)


def one_source(name: Any, split: Any, at: At) -> str | dict[str, Any]:
    path = at.files.name(str(name))
    here = is_file(path) or at.files.find(str(name)) is not None
    return source(path, split=None if here else str(split or "train"))


def validation(_: Any, at: At) -> Any:
    """A source or a share for `data.split.validation`."""
    if at.given("test_split_size"):
        return at.number("test_split_size")
    if str(at["eval_strategy"]) in ("no", "False"):
        return Taken(0.0, "no validation there (eval_strategy: no), so every row trains")
    if at.items("datasets") or not at.given("dataset_name"):
        raise NotSupported("validation rows of a mixture; 0.1 of the rows in their place", instead=0.1)
    split = str(at["dataset_test_split"])
    if at.files.find(str(at["dataset_name"])) is not None:
        return "auto"
    return f"{at['dataset_name']}:{split}"


def max_length(value: Any, at: At) -> Any:
    if value is None:
        raise NotSupported("rows of any length; 1,000,000 tokens in its place", instead=1_000_000)
    return Taken(whole(value, at), "longer rows are cut at their end", {"data.too_long": "truncate"})


def _shape(at: At) -> str | None:
    first = at.items("datasets")
    name = first[0].within("data_files") or first[0].within("path") if first else at["dataset_name"]
    return shape_of_file(at.files.find(name)) if isinstance(name, str) else None


def loss_on_answers(value: Any, at: At) -> Implied:
    """assistant_only_loss: off, TRL trains every token of a chat (`messages`)."""
    if truth(value):
        return Implied("answers alone are trained")
    shape = _shape(at)
    if shape in ("prompt_completion", "text", "alpaca"):
        return Implied(f"the rows are {shape}, not chats")
    raise NotSupported(
        "of chats (`messages`) TRL trains every token, prompts and markers too; here answers alone are trained"
    )


def loss_on_completions(value: Any, _: At) -> Implied:
    if not truth(value):
        raise NotSupported("training on prompts; here completions alone are trained")
    return Implied("completions alone are trained")


def packing(value: Any, at: At) -> Implied:
    if not truth(value):
        return Implied("rows are packed for speed here too, which changes no result")
    raise NotSupported(
        "a batch there is so many packed sequences of max length, here so many rows; "
        "set train.batch_rows to rows per step"
    )


def template(value: Any, at: At) -> str:
    if str(value).endswith(".jinja") or at.files.find(str(value)):
        return at.files.name(str(value))
    raise NotSupported("the chat template of another model; name a Jinja file in data.template")


LORA = {
    "lora_r": to("method.rank", whole, default=16, adapter=True),
    "lora_alpha": to("method.alpha", number, default=32, adapter=True),
    "lora_dropout": to("method.dropout", number, default=0.05, adapter=True),
    "lora_target_modules": to("method.targets", targets, default=None, adapter=True, nullable=True),
    "lora_modules_to_save": to("method.modules_to_save", names, adapter=True),
    "use_rslora": to("method.rslora", flag, default=False, adapter=True),
    "use_dora": to("method.dora", flag, default=False, adapter=True),
    "lora_target_parameters": refused("adapters on bare parameters"),
    "lora_task_type": implied("a causal language model"),
}

SFT = {
    "max_length": to(
        "data.max_tokens", max_length, "and data.too_long: truncate", default=1024, nullable=True
    ),
    "completion_only_loss": Key(loss_on_completions, note="true is what we do", status="implied"),
    "assistant_only_loss": Key(
        loss_on_answers, note="true is what we do; false is not supported for chats", default=False
    ),
    "packing": Key(
        packing, note="off is what we do; on, a batch counts other things", status="not supported"
    ),
    "packing_strategy": refused("how rows are packed", needs="packing"),
    "padding_free": implied("padding is never computed"),
    "pad_to_multiple_of": implied("padding changes no result"),
    "truncation_mode": refused("rows cut at their start", off=("keep_start",)),
    "chat_template_path": to("data.template", template),
    "dataset_text_field": refused("rename this field of the rows to `text`", off=("text",)),
    "dataset_kwargs": refused("arguments of the row reader"),
    "shuffle_dataset": implied("rows are shuffled each epoch"),
    "eos_token": refused("another end-of-sequence token; it is the tokenizer's own here"),
    "pad_token": implied("padding is never trained, whatever its token"),
    "loss_type": refused("another loss than the likelihood of tokens", off=("nll", "chunked_nll")),
    "use_liger_kernel": KERNELS,
    "model_init_kwargs": refused("arguments of the model's class"),
}

_SCRIPT = {
    "datasets": refused("data sets that are no list of mappings", fatal=True),
    "model_name_or_path": to("model", model("model_name_or_path", "model_revision"), required=True),
    "model_revision": to(
        "model", model("model_name_or_path", "model_revision"), "`main` is the default branch"
    ),
    "dtype": implied(
        "weights that train are kept in fp32, a frozen base in train.precision, which is what products are computed in"
    ),
    "torch_dtype": implied("as dtype"),
    "use_peft": to("method.name", the_method, default=False),
    "load_in_4bit": to("method.name", switch(the_method), "with use_peft: qlora"),
    "load_in_8bit": to("method.name", switch(the_method), "with use_peft: lora, base: int8"),
    "bnb_4bit_quant_type": refused("another 4-bit type than nf4", off=("nf4",)),
    "bnb_4bit_quant_storage": implied("how 4-bit weights are stored changes no result"),
    "use_bnb_nested_quant": to(
        "method.double_quant",
        lambda value, at: truth(value) if method(at) == "qlora" else Implied("the base is not in 4 bits"),
        default=False,
        adapter=True,
    ),
    "dataset_name": to("data.train", rows),
    "dataset_config": refused("a configuration of a hub data set", off=("default",)),
    "dataset_train_split": to("data.train", rows, "`org/name:split`", default="train"),
    "dataset_test_split": to("data.split.validation", validation, default="test"),
    "dataset_streaming": to("data.streaming", flag),
    "streaming": to("data.streaming", flag),
    "test_split_size": to("data.split.validation", validation),
    "ignore_bias_buffers": implied("changes no result"),
    **each("path split data_files", to("data.train", rows), "datasets[]."),
    "datasets[].fraction": refused("a share of the mixture"),
    **each("name data_dir columns", refused("a part of a data set", off=("default",)), "datasets[]."),
    "env": implied("environment variables are not set from a job"),
    "config": OUTPUT,
    "hub_model_id": HUB,
    "dataset_num_proc": LOADING,
    # Of its other trainers; each means that the file is not for `trl sft`.
    **each(
        "beta precompute_ref_log_probs ref_model_mixup_alpha sync_ref_model reward_funcs num_generations "
        "max_completion_length reward_model_path desirable_weight undesirable_weight teacher_model_name_or_path",
        refused(PREFERENCES, fatal=True),
    ),
}

FRAMEWORK = Framework(
    name="trl",
    title="TRL",
    version="1.16.0",
    source="trl/trainer/sft_config.py, model_config.py, trl/scripts/utils.py",
    table={
        **trainer_keys(learning_rate=2e-5, logging_steps=10, bf16=True),
        **LORA,
        **SFT,
        **_SCRIPT,
    },
    telltale=frozenset(
        "dataset_name dataset_config dataset_train_split dataset_test_split use_peft lora_r lora_target_modules "
        "max_length packing_strategy assistant_only_loss completion_only_loss dataset_text_field "
        "lora_modules_to_save chat_template_path dtype torch_dtype use_bnb_nested_quant test_split_size "
        "datasets[].fraction datasets[].columns dataset_num_proc attn_implementation".split()
    ),
    method=method,
    habits=[
        Habit("equal rows are all trained", "data.deduplicate", "none"),
        Habit(
            "no rows are set aside for a test; a share here lets `eval` and `compare` judge",
            "data.split.test",
            0.0,
        ),
    ],
)
