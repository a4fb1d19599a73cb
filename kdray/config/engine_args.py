"""vLLM engine arguments that a config may not set, each with the reason; the others are passed through.

Refused are those that kdray sets itself, those that run code, and those under which vLLM would compute something other than the
models' distributions or would not hand the recorder every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ONE_ENGINE = "a replica is one engine on one node; use `replicas`, and `tensor_parallel_size` for its GPUs"
_RECORDER = "the recorder needs it"
_CODE = "it names code, and a config runs none"
_ROWS = "the recorder would not see every row of a step; remove it"

REFUSED: dict[str, str] = {
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
    "decode_context_parallel_size": _ROWS,
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
            "nnodes",
            "node_rank",
            "master_addr",
            "master_port",
        ),
        _ONE_ENGINE,
    ),
    "device_ids": "Ray chooses a replica's GPUs; use `num_gpus`",
}
"""Argument -> what to do instead, or why not."""

CUDA_GRAPHS = ("NONE", "PIECEWISE")
"""Modes of CUDA graphs that run the mixture model's own code in every step."""


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """Raises: ValueError naming an argument that is not free to set, and why."""
    for name in arguments:
        if name in REFUSED:
            raise ValueError(f"engine_args.{name}: not free to set; {REFUSED[name]}")
    if "." in str(arguments.get("distributed_executor_backend", "")):
        raise ValueError("engine_args.distributed_executor_backend: it names code, and a config runs none; use mp, ray or uni")
    if "compilation_config" not in arguments:
        return
    compilation = arguments["compilation_config"]
    if not isinstance(compilation, Mapping):
        raise ValueError(
            f"engine_args.compilation_config={compilation!r:.50}: expected settings, such as {{cudagraph_mode: PIECEWISE}}"
        )
    mode = str(compilation.get("cudagraph_mode", "PIECEWISE")).rpartition(".")[2].upper()
    if mode not in CUDA_GRAPHS:
        raise ValueError(
            f"engine_args.compilation_config.cudagraph_mode={mode:.50}: a full graph replays the layers without the code that "
            f"keeps the inputs of scoring; use {' or '.join(CUDA_GRAPHS)}"
        )
