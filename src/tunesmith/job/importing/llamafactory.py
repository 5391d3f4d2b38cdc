"""LLaMA-Factory: the YAML (or JSON) of `llamafactory-cli train`, with the data sets that its dataset_info.json names.

Source of names and defaults: llamafactory 0.9.5, llamafactory/hparams/{model,data,finetuning,training}_args.py,
data/parser.py (dataset_info.json) and data/processor/processor_utils.py (how rows are cut), over transformers 5.6.0.
"""

# pyright: standard
# Untyped values of YAML and JSON pass through here; strict would only ask for casts.

from __future__ import annotations

from typing import Any

from tunesmith.job.importing.llamafactory_rows import rows
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
    to,
    truth,
    whole,
)
from tunesmith.job.importing.sources import PREFERENCES
from tunesmith.job.importing.trainer import (
    EVALUATING,
    HUB,
    KERNELS,
    LOADING,
    MANY_GPUS,
    OUTPUT,
    RECOMPUTING,
    model,
    optimizer,
    trainer_keys,
)

_TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama-3",
    "alpaca": "alpaca",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
    "mistral": "mistral",
}


def method(at: At) -> str:
    if at["finetuning_type"] == "full":
        return "full"
    return "qlora" if str(at["quantization_bit"]) == "4" else "lora"


def the_method(_: Any, at: At) -> Any:
    kind, bits = str(at["finetuning_type"]), at["quantization_bit"]
    if kind not in ("lora", "full"):
        raise NotSupported(f"the method {kind}; a job has full, lora and qlora", fatal=True)
    if bits is not None and kind == "full":
        raise NotSupported("a quantised base without adapters", instead="full")
    if str(bits) == "8":
        return Taken("lora", "the base in int8", {"method.base": "int8"})
    if bits is not None and str(bits) != "4":
        raise NotSupported(f"a base in {bits} bits; 4 in their place", instead="qlora")
    return method(at)


def stage(value: Any, _: At) -> Implied:
    if value == "sft":
        return Implied("supervised fine-tuning is what a job does")
    if value == "pt":
        return Implied("rows of `text` are trained whole; a batch counts rows, not packed sequences")
    raise NotSupported(PREFERENCES, fatal=True)


def do_train(value: Any, _: At) -> Implied:
    if not truth(value):
        raise NotSupported("it does not train", fatal=True)
    return Implied("a job trains")


def targets(value: Any, _: At) -> Any:
    wanted = names(value)
    return "all-linear" if wanted == ["all"] else wanted


def adapter(value: Any, at: At) -> Any:
    folders = names(value)
    if len(folders) > 1 or at.on("create_new_adapter"):
        raise NotSupported(
            "an adapter merged before training: export it merged, and name that model", fatal=True
        )
    return at.files.name(folders[0])


def alpha(value: Any, at: At) -> Any:
    if value:
        return number(value, at)
    return Taken(2.0 * at.number("lora_rank", whole), "twice the rank")


def template(value: Any, at: At) -> Any:
    if ours := _TEMPLATES.get(str(value)):
        return Taken(ours, "theirs also writes a default system message, if it has one")
    raise NotSupported(
        f"their template {value}; the model's own in its place (of the same family it mostly renders the same: "
        "see tunesmith preview)"
    )


def share(value: Any, at: At) -> Any:
    """val_size: below 1 a share, above it a number of rows."""
    if at.given("eval_dataset"):
        return Implied("eval_dataset is what validates")
    size = number(value, at)
    if size >= 1:
        raise NotSupported(f"{size:g} validation rows; a share of 0.1 in their place", instead=0.1)
    return Taken(size, "no validation there, so every row trains") if size == 0 else size


def length(value: Any, at: At) -> Taken:
    return Taken(
        whole(value, at),
        "longer rows: theirs cuts prompt and answer in proportion, here the end is cut",
        {"data.too_long": "truncate"},
    )


def packing(value: Any, at: At) -> Implied:
    if not truth(value):
        return Implied("rows are packed for speed here too, which changes no result")
    mixing = "" if at.on("neat_packing") else ", which attend to each other"
    raise NotSupported(
        f"a batch there is so many packed sequences of cutoff_len tokens{mixing}; here so many rows: set "
        "train.batch_rows to rows per step"
    )


def muon(value: Any, at: At) -> Any:
    if not truth(value):
        return Implied("off")
    if method(at) != "full":
        raise NotSupported("muon for adapters; adamw in its place", instead="adamw")
    return "muon"


def the_optimizer(value: Any, at: At) -> Any:
    return Implied("use_muon decides") if at.on("use_muon") else optimizer(value, at)


def streaming_window(value: Any, at: At) -> Any:
    return whole(value, at) if at.on("streaming") else Implied("without effect: streaming is off")


_MODEL = {
    "model_name_or_path": to("model", model("model_name_or_path", "model_revision"), required=True),
    "model_revision": to(
        "model", model("model_name_or_path", "model_revision"), "`main` is the default branch"
    ),
    "adapter_name_or_path": to("method.adapter", adapter, adapter=True),
    "create_new_adapter": implied("says how adapter_name_or_path is used"),
    "add_tokens": to("method.new_tokens", names, adapter=True),
    "add_special_tokens": to("method.new_tokens", names, adapter=True),
    "resize_vocab": implied("the vocabulary grows with method.new_tokens"),
    "new_special_tokens_config": refused("initial embeddings from descriptions"),
    "init_special_tokens": refused("initial embeddings from descriptions", off=("noise_init",)),
    "rope_scaling": refused("another scaling of positions"),
    "shift_attn": refused("shifted sparse attention"),
    "mixture_of_depths": refused("mixture of depths"),
    "moe_aux_loss_coef": refused("an auxiliary loss for routers"),
    "train_from_scratch": refused("training from random weights", fatal=True),
    "quantization_bit": to("method.name", the_method, "4: qlora; 8: lora, base: int8"),
    "quantization_method": refused("another quantiser than bitsandbytes", off=("bnb", "bitsandbytes")),
    "quantization_type": refused("another 4-bit type than nf4", off=("nf4",)),
    "double_quantization": to(
        "method.double_quant",
        lambda value, at: truth(value) if method(at) == "qlora" else Implied("the base is not in 4 bits"),
        default=True,
        adapter=True,
    ),
    "split_special_tokens": refused("special tokens read as text"),
    "flash_attn": KERNELS,
    **each("use_unsloth enable_liger_kernel use_v1_kernels use_kv_cache", KERNELS),
    **each("use_unsloth_gc disable_gradient_checkpointing use_reentrant_gc", RECOMPUTING),
    **each(
        "upcast_layernorm upcast_lmhead_output compute_dtype",
        implied("norms and loss are computed in fp32"),
    ),
    **each(
        "adapter_folder cache_dir use_fast_tokenizer low_cpu_mem_usage offload_folder print_param_status "
        "quantization_device_map device_map model_max_length block_diag_attn hf_hub_token ms_hub_token "
        "om_hub_token",
        LOADING,
    ),
    **each(
        "infer_backend infer_dtype export_dir export_size export_device export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager "
        "vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config "
        "sglang_lora_backend do_sample temperature top_p top_k num_beams max_length max_new_tokens "
        "repetition_penalty length_penalty skip_special_tokens",
        implied("of inference and export, not of training"),
    ),
    **each(
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir "
        "freeze_vision_tower freeze_multi_modal_projector",
        implied("of images, video and sound; rows are text here"),
    ),
    **each(
        "use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size",
        refused("KTransformers"),
    ),
}

_DATA = {
    "template": to("data.template", template),
    "dataset": to("data.train", rows("dataset"), "by its entry in dataset_info.json", required=True),
    "eval_dataset": to("data.split.validation", rows("eval_dataset")),
    "dataset_dir": implied("the folder of dataset_info.json, which was read"),
    "val_size": to("data.split.validation", share, default=0.0),
    "cutoff_len": to("data.max_tokens", length, "and data.too_long: truncate", default=2048),
    "train_on_prompt": refused("training on prompts; here answers alone are trained"),
    "mask_history": refused("training on the last answer alone; here every answer is trained"),
    "streaming": to("data.streaming", flag),
    "buffer_size": to("data.shuffle_window", streaming_window),
    "mix_strategy": refused("interleaved data sets; they are joined and shuffled here", off=("concat",)),
    "interleave_probs": refused("interleaved data sets; see `weight` of a source"),
    "max_samples": refused("the first rows alone; every row trains here"),
    "packing": Key(
        packing, note="off is what we do; on, a batch counts other things", status="not supported"
    ),
    "neat_packing": refused("see packing"),
    "ignore_pad_token_for_loss": refused("padding in the loss", off=(True, "true")),
    "tool_format": refused("another writing of tools; the template's own is used"),
    "default_system": refused("a system message added to rows; write it into them"),
    "enable_thinking": refused("a template without thinking", off=(True,)),
    "preserve_thinking": refused("thinking kept in earlier turns"),
    "tokenized_path": implied("rows are tokenised here"),
    "eval_on_each_dataset": implied("one validation loss"),
    **each(
        "overwrite_cache preprocessing_batch_size preprocessing_num_workers data_shared_file_system", LOADING
    ),
    "eval_num_beams": EVALUATING,
}

_TUNING = {
    "do_train": Key(do_train, note="false: nothing to make a job of", status="implied"),
    "stage": Key(stage, note="sft (and pt, rows of text); others are not supported", status="implied"),
    "finetuning_type": to("method.name", the_method, default="lora"),
    "lora_rank": to("method.rank", whole, default=8, adapter=True),
    "lora_alpha": to("method.alpha", alpha, default=None, adapter=True, nullable=True),
    "lora_dropout": to("method.dropout", number, default=0.0, adapter=True),
    "lora_target": to("method.targets", targets, default="all", adapter=True),
    "additional_target": to("method.modules_to_save", names, adapter=True),
    "use_rslora": to("method.rslora", flag, default=False, adapter=True),
    "use_dora": to("method.dora", flag, default=False, adapter=True),
    "loraplus_lr_ratio": refused("LoRA+: a learning rate of its own for B"),
    "loraplus_lr_embedding": refused("LoRA+", needs="loraplus_lr_ratio"),
    "pissa_init": refused("PiSSA's initial adapters"),
    **each("pissa_iter pissa_convert", refused("PiSSA", needs="pissa_init")),
    "pure_bf16": refused("bf16 weights without fp32 masters (see train.optimizer: adamw-bf16)"),
    "use_muon": to("train.optimizer", muon),
    "optim": to("train.optimizer", the_optimizer, default="adamw_torch_fused"),
    **each(
        "use_galore use_apollo use_badam use_adam_mini use_llama_pro use_mca use_hyper_parallel use_dft_loss "
        "use_asft_loss use_eaft_loss fp8 freeze_language_model",
        refused("another way of training"),
    ),
    **{
        f"{feature}_{name}": refused(feature, needs=f"use_{feature}")
        for feature, listed in {
            "galore": "target rank update_interval scale proj_type layerwise",
            "apollo": "target rank update_interval scale proj proj_type scale_type layerwise scale_front",
            "badam": "mode start_block switch_mode switch_interval update_ratio mask_mode verbose",
        }.items()
        for name in listed.split()
    },
    "asft_alpha": refused("ASFT", needs="use_asft_loss"),
    "eaft_alpha": refused("EAFT", needs="use_eaft_loss"),
    "hyper_parallel_args": refused("HyperParallel", needs="use_hyper_parallel"),
    **each("fp8_backend fp8_enable_fsdp_float8_all_gather", refused("fp8", needs="fp8")),
    **each(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules oft_rank oft_block_size "
        "oft_target module_dropout",
        implied("of finetuning_type freeze or oft, not of this one"),
    ),
    **each(
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight "
        "kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
        "ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model "
        "reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha",
        implied("of stages that learn from preferences, not of this one"),
    ),
    "disable_shuffling": refused("rows in the order of the file; they are shuffled here"),
    "early_stopping_steps": refused("stopping early; the best checkpoint is kept with train.keep_best"),
    **each("compute_accuracy plot_loss include_effective_tokens_per_second", OUTPUT),
    **each(
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret enable_torch_profiler "
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
        OUTPUT,
    ),
    "ray_num_workers": MANY_GPUS,
    **each("ray_init_kwargs master_addr master_port", LOADING),
    **each(
        "sortish_sampler predict_with_generate generation_max_length generation_num_beams generation_config",
        EVALUATING,
    ),
    "hub_model_id": HUB,
}

FRAMEWORK = Framework(
    name="llamafactory",
    title="LLaMA-Factory",
    version="0.9.5",
    source="llamafactory/hparams/*_args.py (over transformers 5.6.0's TrainingArguments)",
    # Without bf16 or fp16 it takes bf16 where the hardware has it.
    table={**trainer_keys(bf16="auto"), **_MODEL, **_DATA, **_TUNING},
    telltale=frozenset(
        "stage finetuning_type dataset dataset_dir cutoff_len lora_rank lora_target template val_size "
        "quantization_bit overwrite_cache preprocessing_num_workers plot_loss flash_attn pref_beta "
        "adapter_name_or_path additional_target".split()
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
