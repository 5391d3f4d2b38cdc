"""Axolotl's keys that decide nothing here, or that no job can say: the long tail of its schema, by reason."""

from __future__ import annotations

from tunesmith.job.importing.rules import Key, each, implied, names, refused
from tunesmith.job.importing.sources import PREFERENCES
from tunesmith.job.importing.trainer import EVALUATING, HUB, KERNELS, LOADING, MANY_GPUS, OUTPUT, RECOMPUTING

_SAID = implied("transformers knows it from the model's folder")
_INFERENCE = implied("of inference and export, not of training")
_PREFERENCE_SETTINGS = implied("of training on preferences, which `rl` switches on")

OTHERS: dict[str, Key] = {
    **each(
        "flash_attention sdp_attention xformers_attention flex_attention flex_attn_compile_kwargs sage_attention "
        "eager_attention attn_implementation flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm "
        "flash_optimum gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen fused_attn_kernel "
        "experts_implementation lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards "
        "tiled_mlp_use_original_mlp llama4_linearized_experts torch_compile torch_compile_backend "
        "torch_compile_mode torch_compile_regional torch_compile_options use_kernels tf32 full_determinism "
        "liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy "
        "liger_cross_entropy cut_cross_entropy nf4_backend bnb_config_kwargs lora_on_cpu",
        KERNELS,
    ),
    **each(
        "gradient_checkpointing gradient_checkpointing_kwargs selective_checkpointing activation_offloading "
        "layer_offloading ple_cpu_offload max_memory gpu_memory_limit low_cpu_mem_usage",
        RECOMPUTING,
    ),
    **each(
        "output_dir logging_steps logging_nan_inf_filter save_only_model save_safetensors save_first_step "
        "resume_from_checkpoint auto_resume_from_checkpoints dataset_prepared_path push_dataset_to_hub "
        "dataset_keep_in_memory num_dataset_shards_to_save dataset_shard_num dataset_shard_idx "
        "skip_prepare_dataset wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch "
        "wandb_log_model mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts "
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_trackio trackio_project_name trackio_run_name trackio_space_id "
        "use_otel_metrics otel_metrics_host otel_metrics_port profiler_steps profiler_steps_start "
        "sync_profiler_steps sync_profiler_start_step include_tokens_per_second include_tkps "
        "axolotl_config_path is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens "
        "sample_packing_eff_est tokenizer_save_jinja_files dynamic_checkpoint strict debug "
        "loss_watchdog_threshold loss_watchdog_patience capabilities env_capabilities",
        OUTPUT,
    ),
    **each("hub_model_id hub_strategy hub_revision hf_use_auth_token", HUB),
    **each(
        "dataset_processes dataset_num_proc dataloader_pin_memory dataloader_num_workers "
        "dataloader_prefetch_factor dataloader_drop_last accelerator_config remove_unused_columns gc_steps "
        "gc_collect_steps torch_empty_cache_steps device device_map world_size local_rank ddp ddp_timeout "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters auto_find_batch_size "
        "pad_to_sequence_len pad_to_multiple_of sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method eval_sample_packing "
        "fa_varlen_kwargs_in_collator multipack_real_batches batch_flattening shuffle_merged_datasets "
        "shuffle_before_merging_datasets experimental_skip_move_to_device qlora_sharded_model_loading",
        LOADING,
    ),
    **each(
        "eval_batch_size eval_sequence_len eval_on_start do_causal_lm_eval eval_causal_lm_metrics do_bench_eval "
        "bench_dataset bench_split metric_for_best_model greater_is_better eval_table_size eval_max_new_tokens",
        EVALUATING,
    ),
    **each(
        "base_model_config tokenizer_config model_type tokenizer_type processor_type processor_kwargs "
        "tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common cls_model_config is_falcon_derived_model "
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model type_of_model fix_untrained_tokens "
        "eot_tokens",
        _SAID,
    ),
    **each(
        "generate_samples num_generation_samples generation_max_new_tokens generation_temperature "
        "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample gradio_title gradio_share "
        "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature merge_lora merge_method "
        "nvfp4_merge_aware export vllm",
        _INFERENCE,
    ),
    **each(
        "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type deepcompile dp_shard_size "
        "dp_replicate_size sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func "
        "tensor_parallel_size",
        MANY_GPUS,
    ),
    **each(
        "use_ray ray_run_name ray_num_workers resources_per_worker cloud",
        implied("where it runs is not part of a job"),
    ),
    "rl": refused(PREFERENCES, fatal=True),
    "reward_model": refused(PREFERENCES, fatal=True),
    "process_reward_model": refused(PREFERENCES, fatal=True),
    "num_labels": refused("a classifier in place of a language model", fatal=True),
    "diffusion_lm": refused("a diffusion model", fatal=True),
    "pretraining_dataset": refused(
        "pretraining on a stream of text; name the text under datasets as completion", fatal=True
    ),
    **each(
        "trl ebft center_rewards_coefficient dpo_use_weighting dpo_label_smoothing dpo_ld_alpha dpo_beta "
        "dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha precompute_ref_log_probs "
        "dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights orpo_alpha simpo_gamma cpo_alpha "
        "kto_desirable_weight kto_undesirable_weight rl_beta max_prompt_len",
        _PREFERENCE_SETTINGS,
    ),
    "qat": refused("quantisation-aware training by their scheme; see method.qat"),
    "quantization": _INFERENCE,
    "plugins": Key(
        lambda value, at: refused("plugins that change training").turn(
            [one for one in names(value) if not any(word in one for word in _KERNEL_PLUGINS)], at
        ),
        note="kernels (Liger, cut cross-entropy) are the engine's choice; others are not supported",
        status="not supported",
    ),
    "special_tokens": refused(
        "other special tokens; they are the tokenizer's own here (padding is never trained, whatever its token)"
    ),
    "special_tokens.pad_token": implied("padding is never trained, whatever its token"),
    **each(
        "bos_token eos_token unk_token additional_special_tokens",
        refused("another special token than the tokenizer's own"),
        "special_tokens.",
    ),
    "added_tokens_overrides": refused("other texts for special tokens"),
    "group_by_length": refused("rows grouped by length; they come in random order here"),
    "curriculum_sampling": refused("rows in the order of the file; they are shuffled here"),
    "balance_labels": refused("trained tokens balanced over batches"),
    "label_balance_window_optim_steps": refused("", needs="balance_labels"),
    "min_sample_len": refused("short rows dropped"),
    "default_system_message": refused("a system message added to rows; write it into them"),
    "chat_template_kwargs": refused("arguments of the template"),
    "trust_remote_code": refused("code that comes with a model; none is run here"),
    "early_stopping_patience": refused("stopping early; the best checkpoint is kept with train.keep_best"),
    "neftune_noise_alpha": refused("noise on embeddings (NEFTune)"),
    "noisy_embedding_alpha": refused("noise on embeddings (NEFTune)"),
    "unfrozen_parameters": refused("training of some parameters only"),
    "rope_scaling": refused("another scaling of positions"),
    **each(
        "overrides_of_model_config overrides_of_model_kwargs model_quantization_config "
        "model_quantization_config_kwargs model_config",
        refused("changes of the model's configuration"),
    ),
    **each(
        "embedding_lr embedding_lr_scale lr_groups", refused("a learning rate of its own for some weights")
    ),
    **each(
        "lr_scheduler_kwargs lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor",
        refused("another form of the schedule"),
    ),
    **each(
        "optim_args optim_target_modules torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum",
        refused("arguments of another optimizer"),
    ),
    **each(
        "dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale "
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold "
        "qgalore_gamma_proj qgalore_queue_size",
        implied("of other optimizers, which `optimizer` names"),
    ),
    **each("loraplus_lr_ratio", refused("LoRA+: a learning rate of its own for B")),
    "loraplus_lr_embedding": refused("LoRA+", needs="loraplus_lr_ratio"),
    **each(
        "peft lora_target_parameters lora_rank_pattern lora_alpha_pattern peft_layers_to_transform "
        "peft_layers_pattern peft_layer_replication peft_init_lora_weights peft_trainable_token_indices "
        "lora_fan_in_fan_out gptq use_onebitllms",
        refused("another form of adapters"),
    ),
    **each(
        "peft_ensure_weight_tying lora_fp32_gradients peft_autocast_adapter_dtype embeddings_skip_upcast "
        "fp32_norms fp32_norm_classes",
        implied("adapters, norms and loss are computed in fp32"),
    ),
    **each(
        "relora lisa_n_layers use_pose use_eaft use_dft scaling_softmax s2_attention fp8 mean_resizing_embeddings "
        "shrink_embeddings resize_token_embeddings_to_32x reinit_weights trainer_cls quantize_moe_experts "
        "pretraining_sample_concatenation jagged_restart_steps",
        refused("another way of training"),
    ),
    **each("relora_prune_ratio relora_prune_method relora_cpu_offload", refused("ReLoRA", needs="relora")),
    **each("lisa_step_interval lisa_layers_attribute", refused("LISA", needs="lisa_n_layers")),
    **each("pose_split_on_token_ids pose_max_context_len pose_num_chunks", refused("PoSE", needs="use_pose")),
    **each("eaft_alpha eaft_k", refused("EAFT", needs="use_eaft")),
    **each("scaling_softmax_factor scaling_softmax_bias", refused("", needs="scaling_softmax")),
    **each("fp8_config fp8_enable_fsdp_float8_all_gather", refused("fp8", needs="fp8")),
    **each(
        "jagged_restart_warmup_steps jagged_restart_anneal_steps",
        refused("jagged restarts", needs="jagged_restart_steps"),
    ),
    **each(
        "mixlora_num_experts mixlora_top_k mixlora_router_aux_loss_coef mixlora_router_init_range "
        "mixlora_jitter_noise mixlora_expert_lora_r mixlora_expert_lora_alpha mixlora_expert_lora_dropout",
        implied("of the adapter mixlora, not of this one"),
    ),
    **each(
        "pretrain_multipack_buffer_size pretrain_multipack_attn max_packed_sequence_len",
        implied("of pretraining_dataset"),
    ),
    **each(
        "image_size image_resize_algorithm role_boundaries freeze_mm_modules",
        implied("of images; rows are text here"),
    ),
    "evaluation_strategy": refused("an old name of eval_strategy, which Axolotl refuses"),
}
_KERNEL_PLUGINS = ("liger", "cut_cross_entropy")
