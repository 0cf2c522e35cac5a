"""What every field of Megatron's own description of a model means for a conversion: one list, applied on every path.

Megatron-LM stores its command line (`args`), Megatron-Bridge a `model` section; both use the names below. A field is
  a fact        FACTS: it must equal config.json (names and shapes do not show a rope base or an eps)
  a switch      SWITCHES: the values that leave the model as our families compute it; any other value is refused
  without say   WITHOUT_SAY: training, data, layout, number formats, and the settings of a feature that a switch above
                keeps off; any value passes
or unknown: of a version of Megatron that is newer than this list, or of a fork. Those are named in the receipt.

Converted by stated arithmetic: `use_rope_scaling` with its factor is the llama3 scaling with Megatron-Core's
constants; heads without `kv_channels` have hidden_size / num_attention_heads; until Megatron-Core 0.17 a NullTokenizer
has one row more than `vocab_size`, its EOD; a gamma that is stored minus 1 (GAMMA_LESS_ONE) gets its 1 back in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_cpt.architecture.facts import Architecture, YarnRopeScaling

# Architecture's field -> its name in Megatron-Bridge's `model` section, its name among Megatron-LM's args
FACTS: dict[str, tuple[str, str]] = {
    "num_layers": ("num_layers", "num_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "ffn_hidden_size": ("ffn_hidden_size", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "head_dim": ("kv_channels", "kv_channels"),
    "rms_norm_eps": ("layernorm_epsilon", "norm_epsilon"),
    "rope_theta": ("rotary_base", "rotary_base"),
    "qkv_bias": ("add_qkv_bias", "add_qkv_bias"),
    "qk_norm": ("qk_layernorm", "qk_layernorm"),
}
# Read together with others to give a fact: see megatron_config.
_OF_FACTS_TEXT = """
    num_query_groups group_query_attention share_embeddings_and_output_weights
    untie_embeddings_and_output_weights use_rope_scaling rope_scaling rope_scaling_factor scale_factor
    low_freq_factor high_freq_factor old_context_len rope_scaling_low_freq_factor rope_scaling_high_freq_factor
    rope_scaling_original_max_position_embeddings vocab_size padded_vocab_size max_position_embeddings
    seq_length tokenizer_type tokenizer_model
"""
OF_FACTS = frozenset(_OF_FACTS_TEXT.split())


def _is_silu(value: Any, arch: Architecture) -> bool:
    """`torch.nn.functional.silu`, as text or as Megatron-Bridge's `{_target_: ...}`."""
    name = value.get("_target_") if isinstance(value, dict) else value
    return value is None or str(name).rpartition(".")[2] in ("silu", "swish")


def _is_default_scale(value: Any, arch: Architecture) -> bool:
    return value is None or (_is_number(value) and math.isclose(value, arch.head_dim**-0.5, rel_tol=1e-6))


def _is_window_of(value: Any, arch: Architecture) -> bool:
    """Tokens to the left and to the right of a query that it attends to; negative for all of them."""
    if value is None:
        return arch.sliding_window is None
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))) or value[1] > 0:
        return False
    if value[0] < 0:
        return arch.sliding_window is None
    return bool(arch.sliding_window is not None and value[0] == arch.sliding_window - 1)


def _is_rope_of(value: Any, arch: Architecture) -> bool:
    """YaRN is a kind of its own to Megatron-Core."""
    return bool(value == ("yarn" if isinstance(arch.rope_scaling, YarnRopeScaling) else "rope"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_OFF = (None, False, 0)
# Field -> values that change nothing, or a test of the value.
SWITCHES: dict[str, tuple[Any, ...] | Callable[[Any, Architecture], bool]] = {
    # norms
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": (*_OFF, True),
    "layernorm_zero_centered_gamma": (*_OFF, True),
    "apply_residual_connection_post_layernorm": _OFF,
    "use_post_norm": _OFF,
    "post_attention_layernorm": _OFF,
    "post_mlp_layernorm": _OFF,
    # linear layers and the MLP
    "add_bias_linear": (False,),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "activation_func": _is_silu,
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (*_OFF, 0.0),
    "openai_gelu": _OFF,
    "onnx_safe": _OFF,
    "squared_relu": _OFF,
    "quick_geglu": _OFF,
    # positions
    "position_embedding_type": _is_rope_of,
    "rotary_percent": (1.0, None),
    "rotary_interleaved": _OFF,
    "rotary_seq_len_interpolation_factor": (None, 1),
    "seq_len_interpolation_factor": (None, 1),
    "rope_type": (None, "rope"),
    "mrope_section": (None,),
    "no_rope_freq": _OFF,
    "rope_local_base_freq": (None,),
    # attention
    "softmax_type": (None, "vanilla"),
    "softmax_scale": _is_default_scale,
    "qk_l2_norm": _OFF,
    "window_size": _is_window_of,
    "window_attn_skip_freq": _OFF,
    "interleaved_attn_pattern": (None,),
    "attention_output_gate": _OFF,
    "attn_logit_softcapping": (*_OFF, 0.0),
    "final_logit_softcapping": (*_OFF, 0.0),
    "multi_latent_attention": _OFF,
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None, 0),
    "linear_attention_type": (None,),
    # embeddings and residuals
    "use_mup": _OFF,
    "mup_width_mult": (None, 1),
    "mup_embedding_mult": (None, 1),
    "mup_output_mult": (None, 1),
    "scale_embedding": _OFF,
    "enable_hyper_connections": _OFF,
    "num_residual_streams": (*_OFF, 1),
    # other kinds of model
    "num_experts": (None, 0),
    "num_moe_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "decoder_num_layers": (None,),
    "is_hybrid_model": _OFF,
    "hybrid_override_pattern": (None, ""),
    "hybrid_layer_pattern": (None, ""),
    "hybrid_attention_ratio": (*_OFF, 0.0),
    "hybrid_mlp_ratio": (*_OFF, 0.0),
    "heterogeneous_block_specs": _OFF,
    "heterogeneous_layers_config_path": (None, ""),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "spec": (None,),
    "use_legacy_models": _OFF,
    "enable_gpt_oss": _OFF,
}

GAMMA_LESS_ONE = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")  # of Megatron-LM's args; of Megatron-Core

# Of Megatron-LM core_v0.16.1 to core_v0.19.2 and TransformerConfig of the same versions, by the start of the name ...
_PREFIXES_TEXT = """
    _cpu activation_offload adam_ app_tag_ async_ batch_p2p bert_ biencoder_ check_ ckpt_ consumed_
    cpu_offloading cuda_graph data_ dataloader_ ddp_ decoupled_ dino_ dist_ckpt distributed_ dsa_
    error_injection eval_ exit_ exp_avg expert_gtp_ export_ fim_ fine_grained_ finetune flight_recorder_ fp4 fp8
    fsdp_ ft_ global_batch grad_ grpo_ gtp_ ict_ img_ inference_ inprocess_ iter kitchen_ langrl_ linear_ lion_
    log_ logits_ lr_ mamba_ manual_gc mask_ megatron_fsdp_ micro_batch microbatch_ min_loss min_lr moe_ mtp_
    muon_ nccl_ non_persistent_ null_tokenizer_ num_workers offload one_logger optimizer_ overlap_ phase_
    profile pytorch_profiler_ rampup_ recompute_ replication rerun_ retriever_ rl_ save_ straggler_ swin_ te_
    tensorboard_ test_ tiktoken_ tokenizer_ tp_comm_ train_ valid_ vision_ wandb_ yarn_
"""
_PREFIXES = tuple(_PREFIXES_TEXT.split())
# ... and by name.
_WITHOUT_SAY_TEXT = """
    _target_ account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store add_position_embedding adlr_autoresume
    adlr_autoresume_interval align_grad_reduce align_param_gather allow_ambiguous_pad_tokens
    apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm attention_backend attention_dropout
    attention_softmax_in_fp32 auto_detect_ckpt_format autocast_dtype barrier_with_L1_time batch_invariant_mode
    batch_size beta_fast beta_slow bf16 bias_activation_fusion bias_dropout_fusion bias_gelu_fusion
    bias_swiglu_fusion block_data_path cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template
    checkpoint_activations classes_fraction clip_grad clone_scatter_output_in_embedding config_logger_dir
    context_parallel_size cp_comm_type create_all_gather_group create_attention_mask_in_dataloader
    cross_entropy_fusion_impl cross_entropy_loss_fusion curr_iteration deallocate_pipeline_outputs
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    decoder_seq_length decrease_batch_size_if_needed defer_embedding_wgrad_compute
    delay_offload_until_cuda_graph delay_wgrad_compute delta_offload_bytes_across_pp_ranks
    deprecated_use_mcore_models deterministic_mode disable_bf16_reduced_precision_matmul disable_chunked_prefill
    disable_jit_fuser disable_msc_deprecated disable_parameter_transpose_cache disable_straggler_on_startup
    disable_symmetric_registration distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations
    do_test do_train do_valid dump_param_to_param_group_map embedding_init_method embedding_init_method_std
    embedding_path empty_unused_memory_level enable_autocast enable_chunked_prefill enable_cuda_graph
    enable_experimental enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc
    enable_one_logger encoder_num_layers encoder_seq_length end_weight_decay eod_mask_loss
    ep_overlap_early_attn_memory_release evidence_data_path experimental_attention_variant_loss_scale_func
    expert_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size
    external_cuda_graph fake_process_group filter_warnings finalize_model_grads_func
    fine_grained_activation_offloading first_last_layers_bf16 flash_attention_version flash_decode fp16
    fp16_lm_cross_entropy fp32_residual_connection freeze_all_layers fsdp_double_buffer fsdp_manual_registration
    full_validation fully_parallel_load fully_parallel_save fused_residual_rmsnorm fused_single_qkv_rope
    gpu_sniff_test_interval gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult
    hetereogenous_dist_checkpoint hidden_dropout hierarchical_context_parallel_sizes
    high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel hysteresis
    indexer_batch_size indexer_log_interval init_method init_method_std init_method_xavier_uniform
    init_model_with_meta_device initial_loss_scale keep_fp8_transpose_cache kitchen_attention_backend
    kv_lora_rank lazy_mpu_init legacy_tokenizer load load_main_params_from_ckpt load_optim load_rng local_rank
    logging_level loss_scale loss_scale_window lr main_grads_dtype main_params_dtype
    make_vocab_size_divisible_by masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom
    memory_efficient_layer_norm memory_keys memory_snapshot_path merge_file metadata_path
    mid_level_dataset_surplus min_offloaded_tensor_size mla_down_proj_fusion mlp_chunks_for_prefill
    mlp_chunks_for_training mmap_bin_files mock_data model_parallel_size model_type modelopt_enabled
    modules_to_filter most_recent_k mscale mscale_all_dim mtp_loss_scaling_factor mtp_standalone
    multiple_validation_sets mup_attn_scale_power mup_base_head_dim mup_base_hidden_size no_load_optim
    no_load_rng no_persist_layer_norm no_save_optim no_save_rng no_sync_func no_weight_decay_cond_type
    num_channels num_classes num_dataset_builder_threads num_distributed_optimizer_instances
    num_floating_point_operations_so_far num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints num_speculative_tokens
    num_virtual_stages_per_pipeline_rank nvtx_ranges object_storage_cache_path offset_sampling_seed_by_dp_rank
    optimizer original_max_position_embeddings outer_dp_sharding_strategy output_bert_embeddings
    output_layer_init_method override_ckpt_iteration override_opt_param_scheduler pad_vocab_size parallel_output
    param_sync_func params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path
    perform_initialization perform_rl_step persist_layer_norm pin_cpu_grads pin_cpu_params pipeline_dtype
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_size
    pretrained_checkpoint q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim qk_pos_emb_head_dim
    quant_recipe query_in_block_prob rank record_memory_history record_shapes refit_method
    relative_attention_max_distance relative_attention_num_buckets reset_attention_mask reset_position_ids
    result_rejected_tracker_filename return_log_probs reuse_grad_buf_for_mxfp8_param_ag rotary_scaling_factor
    run_workload_inspector_server runtime_time_unit sample_rate save scatter_embedding_sequence_parallel
    scatter_gather_tensors_in_pipeline seed sequence_parallel set_level_for_all_loggers sft
    sft_tokenizer_prompt_format sgd_momentum sharp_enabled_group short_seq_prob should_pad_vocab
    skip_prompt_log_probs skip_train skipped_train_samples special_tokens split start_eval_at_iter
    start_weight_decay step_batch_size_schedule stream_ckpt_dequant strict_fsdp_dtensor_load
    suggested_communication_unit_size symmetric_ar_type tensor_model_parallel_size
    tensor_parallel_num_weight_shards throughput_window_size timers timing_log_level timing_log_option
    titles_data_path torch_fsdp2_reshard_after_forward tp_only_amax_red transformer transformer_impl
    transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args
    use_checkpoint_opt_param_scheduler use_cpu_initialization use_dist_ckpt use_dist_ckpt_deprecated
    use_distributed_optimizer use_flash_attn use_flashinfer_fused_rope use_fused_weighted_squared_relu
    use_gloo_process_groups use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    use_inference_optimized_layers use_kitchen use_kitchen_attention use_layer_wise_param_layout
    use_legacy_static_engine use_mamba_mem_eff_path use_megatron_fsdp use_mp_args_from_checkpoint_args
    use_nsys_profiler use_one_sent_docs use_persistent_ckpt_worker use_precision_aware_optimizer
    use_pytorch_profiler use_ring_exchange_p2p use_rotary_position_embeddings use_sharp use_te_activation_func
    use_te_rng_tracker use_tokenizer_model_from_checkpoint_args use_torch_fsdp2
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser v_head_dim
    validation_set_names variable_seq_lengths verify_integrity virtual_pipeline_model_parallel_size
    vocab_extra_ids vocab_file warmup wd_incr_steps weight_decay weight_decay_incr_style wgrad_deferral_limit
    world_size wsd_decay_steps yaml_cfg
"""
WITHOUT_SAY = frozenset(_WITHOUT_SAY_TEXT.split())


def changes_the_model(name: str, value: Any, arch: Architecture) -> bool:
    """Whether a switch has a value that our families do not compute. False for fields that are no switch."""
    rule = SWITCHES.get(name)
    if rule is None:
        return False
    if callable(rule):
        return not rule(value, arch)
    return value not in rule


def is_known(name: str) -> bool:
    """Whether the list says what a field means."""
    facts = {key for names in FACTS.values() for key in names}
    return name in SWITCHES or name in facts | OF_FACTS | WITHOUT_SAY or name.startswith(_PREFIXES)
