"""vLLM engine arguments that a config may set: an allow list, and for the others the reason why they are not on it.

Allowed are arguments of scheduling, memory, loading and parallel execution that were read in vLLM's source to name no code and
no file, and to leave the models' distributions and the recorder's rows as they are. Everything else is set only through
`unsafe_engine_args`, and there too those are refused that kdray sets itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from kdray.config.allowed import check_allowed
from kdray.config.base import NonNegative, Positive

_ONE_ENGINE = "a replica is one engine on one node; use `replicas`, and `tensor_parallel_size` for its GPUs"
OWN_SERVER = (
    "a teacher that needs more GPUs than one node has can be served by a vLLM server of your own, and named as a teacher of "
    "type openai with `logprobs` and `token_ids` (docs/teachers.md, A teacher on several nodes)"
)
_RECORDER = "the recorder needs it"
_CODE = "it names code, and a config runs none"
_ROWS = "the recorder would not see every row of a step; remove it"

ALLOWED: dict[str, Any] = {
    # Scheduling: the recorder knows each row's request and position, in whatever order and parts they are computed.
    "enable_chunked_prefill": bool,
    "long_prefill_token_threshold": NonNegative,
    "long_prefill_token_threshold_adaptive": bool,
    "max_num_active_seqs": Positive,
    "scheduler_reserve_full_isl": bool,
    "async_scheduling": bool,
    # Size and layout of the KV cache, in the models' own dtype.
    "enable_prefix_caching": bool,
    "block_size": Positive,
    "num_gpu_blocks_override": Positive,
    "watermark": Annotated[float, Field(ge=0, lt=1)],
    "disable_hybrid_kv_cache_manager": bool,
    # Execution: the same layers, in eager mode or in graphs of the parts between attention layers.
    "enforce_eager": bool,
    "cudagraph_capture_sizes": list[Positive],
    "max_cudagraph_capture_size": NonNegative,
    "compilation_config": {
        "cudagraph_mode": str,
        "cudagraph_capture_sizes": list[Positive],
        "max_cudagraph_capture_size": NonNegative,
        "cudagraph_num_of_warmups": NonNegative,
    },
    "attention_config": {"backend": Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"]},
    # Processes of one engine, and how they communicate.
    "distributed_executor_backend": Literal["mp", "uni"],
    "disable_custom_all_reduce": bool,
    "enable_expert_parallel": bool,
    "distributed_timeout_seconds": Positive,
    "cpu_distributed_timeout_seconds": Positive,
    # How safetensors are read.
    "safetensors_load_strategy": Literal["lazy", "eager", "prefetch"],
    "safetensors_prefetch_num_threads": Positive,
    "safetensors_prefetch_block_size": Positive,
    "use_tqdm_on_load": bool,
}
"""Argument -> type of its value; or of its keys, if the value is a mapping."""

SET_BY_KDRAY: dict[str, str] = {
    "model": "use the teacher's `model`",
    "model_weights": "use the teacher's `model`",
    "hf_config_path": "use the teacher's `model`",
    "revision": "use the teacher's `revision`",
    "tokenizer": "the engine sees ids only",
    "skip_tokenizer_init": "the engine sees ids only",
    "hf_overrides": "the mixture model needs it",
    "additional_config": _RECORDER,
    "logits_processors": _RECORDER,
    "worker_extension_cls": "the worker extension needs it",
    "dtype": "use `dtype`",
    "seed": "use `run.seed`",
    "max_model_len": "it follows from data.max_prompt_tokens and rollout.max_new_tokens",
    "max_num_seqs": "use `max_num_seqs`",
    "max_num_batched_tokens": "use `max_num_batched_tokens`",
    "max_logprobs": "use rollout.teacher_top_k",
    "tensor_parallel_size": "use `tensor_parallel_size`",
    "gpu_memory_utilization": "use `gpu_memory_utilization`",
    "kv_cache_memory_bytes": "use `kv_cache_gib` on CPUs, `gpu_memory_utilization` on GPUs",
    "weight_transfer_config": "use training.weight_transfer",
    "trust_remote_code": "kdray runs no code from model folders",
    "code_revision": "kdray runs no code from model folders",
    "load_format": "kdray loads safetensors alone",
    "hf_token": "a key stands in no file; set HF_TOKEN in the environment",
    "scheduling_policy": "by priority, vLLM may cache keys and values that were never computed",
    "disable_log_stats": "kdray reads its own statistics of an engine",
}
"""Argument -> what to do instead: those that kdray sets itself, or that no config may hold; refused in `unsafe_engine_args`
too."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "worker_cls",
            "scheduler_cls",
            "model_class_overrides",
            "io_processor_plugin",
            "reasoning_parser_plugin",
            "kv_transfer_config",
            "ec_transfer_config",
        ),
        _CODE,
    ),
    # Other distributions than the models'.
    **dict.fromkeys(
        ("quantization", "quantization_config"),
        "it would round the student's weights too, at the start and at every update; name a quantised `model`",
    ),
    "kv_cache_dtype": "rounded keys and values give other probabilities than those that the student is trained with; remove it",
    "disable_sliding_window": "the model would attend to other tokens than it was trained with; shorten the sequences instead",
    "watermark_config": "a watermark changes the probabilities of tokens; remove it",
    "logprobs_mode": "scores are read as log-probabilities, before any processing; remove it",
    "runner": "the engine generates, and returns no embeddings; remove it",
    "convert": "the engine generates, and returns no embeddings; remove it",
    "pooler_config": "the engine generates, and returns no embeddings; remove it",
    "diffusion_config": "the recorder reads one next-token distribution a step; remove it",
    **dict.fromkeys(
        ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        "vLLM does not speculate beside a logits processor that draws; remove it",
    ),
    # Rows that the recorder would miss.
    "enable_dbo": _ROWS,
    "ubatch_size": _ROWS,
    "enable_batch_sharded_sampling": _ROWS,
    "prefill_context_parallel_size": _ROWS,
    "decode_context_parallel_size": "each GPU would hold a part of the keys and values, which was not tried; remove it",
    "kv_sharing_fast_prefill": "layers would skip the prompt's rows, which scoring reads; remove it",
    # More than one engine, or other devices than Ray's.
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "enable_elastic_ep",
        ),
        _ONE_ENGINE,
    ),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), f"{_ONE_ENGINE}; {OWN_SERVER}"),
    **dict.fromkeys(
        ("enable_sleep_mode", "sleep_mode_offload_cudagraph", "sleep_preserve_parameter_names"),
        "replicas sample while the ranks train, and never sleep; on one GPU give both a share of it (`num_gpus`, "
        "`gpu_memory_utilization`, training.gpus_per_rank), as configs/gsm8k_one_gpu.yaml does",
    ),
    "device_ids": "Ray chooses a replica's GPUs; use `num_gpus`",
    "pipeline_parallel_size": (
        "teacher and student are one model here, which has no stages; remove it, and raise `tensor_parallel_size` instead; "
        f"{OWN_SERVER}"
    ),
    "disable_cascade_attn": "vLLM has no cascade attention any more; remove it",
    "attention_backend": "use `attention_config: {backend: ...}`",
    **dict.fromkeys(
        (
            "download_dir",
            "allowed_local_media_path",
            "allowed_media_domains",
            "log_config_file",
            "logging_config",
            "profiler_config",
            "otlp_traces_endpoint",
            "collect_detailed_traces",
            "kv_events_config",
            "mm_encoder_fp8_scale_path",
            "mm_encoder_fp8_scale_save_path",
            "mm_encoder_fp8_scale_save_margin",
            "default_mm_loras",
            "ignore_patterns",
            "model_loader_extra_config",
            "pt_load_map_location",
            "generation_config",
            "override_generation_config",
            "tokenizer_revision",
            "tokenizer_mode",
            "config_format",
            "ray_workers_use_nsight",
        ),
        "it names a file, a folder or an address, which a config must not choose",
    ),
    **dict.fromkeys(
        (
            "ec_manager_config",
            "structured_outputs_config",
        ),
        _CODE,
    ),
    **dict.fromkeys(
        (
            "enable_prompt_embeds",
            "reasoning_config",
            "reasoning_parser",
            "language_model_only",
            "limit_mm_per_prompt",
            "enable_mm_embeds",
            "interleave_mm_strings",
            "media_io_kwargs",
            "mm_processor_kwargs",
            "mm_processor_cache_gb",
            "mm_processor_cache_type",
            "mm_hasher_algorithm",
            "mm_shm_cache_max_object_size_mb",
            "mm_encoder_only",
            "mm_encoder_tp_mode",
            "mm_encoder_attn_backend",
            "mm_encoder_attn_dtype",
            "renderer_num_workers",
            "skip_mm_profiling",
            "video_pruning_rate",
            "video_pruning_method",
            "mm_tensor_ipc",
            "mm_processor_device",
            "mm_ipc_gpu_memory_gb",
            "mm_device_do_normalize",
            "enable_mm_processor_stats",
            "disable_chunked_mm_input",
            "enable_shm_tensor_arena",
        ),
        "the engine reads ids of text alone; remove it",
    ),
    **dict.fromkeys(
        (
            "enable_lora",
            "max_loras",
            "max_lora_rank",
            "fully_sharded_loras",
            "max_cpu_loras",
            "lora_dtype",
            "lora_target_modules",
            "enable_tower_connector_lora",
            "specialize_active_lora",
            "enable_mixed_moe_lora_format",
            "enable_moe_shared_loras",
            "max_lora_cls_labels",
        ),
        "replicas get the student's adapter merged (training.lora); remove it",
    ),
    **dict.fromkeys(
        (
            "moe_backend",
            "linear_backend",
            "sparse_indexer_topk_backend",
            "kernel_config",
            "ir_op_priority",
            "enable_flashinfer_autotune",
            "gdn_prefill_backend",
            "kda_prefill_backend",
            "kda_decode_backend",
            "kv_cache_dtype_skip_layers",
            "mamba_config",
            "mamba_cache_dtype",
            "mamba_ssm_cache_dtype",
            "mamba_backend",
            "mamba_ssu_algorithm",
            "enable_mamba_cache_stochastic_rounding",
            "mamba_cache_philox_rounds",
            "use_replayssm",
            "replayssm_buffer_len",
            "allow_deprecated_quantization",
            "engram_config",
            "swa_bounded_replay",
        ),
        "its kernels may compute in another precision, or leave out keys",
    ),
    **dict.fromkeys(
        (
            "mamba_block_size",
            "mamba_cache_mode",
            "enable_mamba_shared_prefix_checkpoint",
            "prefix_match_unit",
            "prefix_caching_hash_algo",
            "prefix_cache_retention_interval",
            "offload_backend",
            "cpu_offload_gb",
            "cpu_offload_params",
            "offload_group_size",
            "offload_num_in_group",
            "offload_prefetch_step",
            "offload_params",
            "kv_offloading_size",
            "kv_offloading_backend",
            "enable_cumem_allocator",
            "enable_nccl_comm_suspend",
            "enable_eplb",
            "eplb_config",
            "expert_placement_strategy",
            "enable_ep_weight_filter",
            "enable_hc_sp",
            "return_sampling_mask",
            "aux_output_config",
            "model_impl",
            "enable_return_routed_experts",
            "use_fp64_gumbel",
            "enable_trace_replay",
            "tokens_only",
            "stream_interval",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "max_num_scheduled_tokens",
            "prefill_schedule_interval",
            "optimization_level",
            "performance_mode",
            "max_parallel_loading_workers",
            "enable_fault_tolerance",
            "fault_tolerance_config",
        ),
        "it changes which rows, requests or weights an engine holds, and was not shown to leave the records right",
    ),
    **dict.fromkeys(
        (
            "dcp_comm_backend",
            "dcp_q_replicate",
            "dcp_kv_cache_interleave_size",
            "cp_kv_cache_interleave_size",
            "elastic_ep_max_dp_size",
            "all2all_backend",
            "dbo_decode_token_threshold",
            "dbo_prefill_token_threshold",
            "dp_sync_interval",
            "disable_nccl_for_dp_synchronization",
            "_api_process_count",
            "_api_process_rank",
            "numa_bind",
            "numa_bind_nodes",
            "numa_bind_cpus",
        ),
        _ONE_ENGINE,
    ),
    **dict.fromkeys(
        (
            "served_model_name",
            "aggregate_engine_logging",
            "show_hidden_metrics_for_version",
            "per_request_spec_decode_metrics",
            "kv_cache_metrics",
            "kv_cache_metrics_sample",
            "custom_histogram_buckets",
            "cudagraph_metrics",
            "enable_layerwise_nvtx_tracing",
            "enable_mfu_metrics",
            "enable_logging_iteration_details",
            "jit_monitor_mode",
            "jit_monitor_verbose",
            "log_level",
            "enable_log_requests",
            "shutdown_timeout",
            "fail_on_environ_validation",
        ),
        "it is for vLLM's own server, logs and metrics, which a replica does not have; remove it",
    ),
}
"""Argument -> why it is not on the list; set through `unsafe_engine_args` alone."""

CUDA_GRAPHS = ("NONE", "PIECEWISE")
"""Modes of CUDA graphs that run the mixture model's own code in every step."""


def check_engine_args(arguments: Mapping[str, Any], unsafe: Mapping[str, Any]) -> None:
    """Args: arguments, unsafe: the settings `engine_args` and `unsafe_engine_args`.

    Raises: ValueError naming an argument that is not free to set, and why.
    """
    check_allowed("engine_args", arguments, ALLOWED, _why_not)
    for name in unsafe:
        if name in SET_BY_KDRAY:
            raise ValueError(f"unsafe_engine_args.{name}: not free to set; {SET_BY_KDRAY[name]}")
        if name in arguments:
            raise ValueError(f"unsafe_engine_args.{name}: also in engine_args; keep one of them")
    _check_graphs("engine_args", arguments)
    _check_graphs("unsafe_engine_args", unsafe)


def _why_not(name: str) -> str:
    if name in SET_BY_KDRAY:
        return SET_BY_KDRAY[name]
    reason = REFUSED.get(name, "it is not among the arguments known to run no code and to leave the records right")
    return f"{reason} (at your own risk: unsafe_engine_args)"


def _check_graphs(setting: str, arguments: Mapping[str, Any]) -> None:
    if "compilation_config" not in arguments:
        return
    compilation = arguments["compilation_config"]
    if not isinstance(compilation, Mapping):
        raise ValueError(
            f"{setting}.compilation_config={compilation!r:.50}: expected settings, such as {{cudagraph_mode: PIECEWISE}}"
        )
    mode = str(compilation.get("cudagraph_mode", "PIECEWISE")).rpartition(".")[2].upper()
    if mode not in CUDA_GRAPHS:
        raise ValueError(
            f"{setting}.compilation_config.cudagraph_mode={mode:.50}: a full graph replays the layers without the code that "
            f"keeps the inputs of scoring; use {' or '.join(CUDA_GRAPHS)}"
        )
