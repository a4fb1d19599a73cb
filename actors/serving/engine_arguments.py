"""Arguments and environment of a vLLM engine that holds kdray's mixture model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from actors.serving.scoring.prompt_logprobs import MOST_IDS
from actors.serving.spec import EngineSpec
from actors.weights.scratch import PREFIX, process_folder
from kdray.errors import EngineError
from kdray.models.precision import checkpoint_dtype, cpu_dtype

RECORDERS = {"v1": "actors.vllm_plugin.recorder:Recorder", "v2": "actors.vllm_plugin.recorder_v2:RecorderV2"}
"""Model runner of vLLM -> the logits processor that records its batches."""
_SWITCHES = {"v1": "0", "v2": "1"}
_SOCKETS = "VLLM_RPC_BASE_PATH"
_PROMPT_ROWS = 256
"""Most tokens of a request in a step that vLLM's own prompt logprobs are computed for."""


def set_environment(spec: EngineSpec) -> None:
    """Set the variables that vLLM reads when it is imported; call it before."""
    # vLLM would choose by the model, and each of its runners needs its own recorder.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = _SWITCHES[spec.model_runner]
    # vLLM turns these graphs on by itself, unless the variable is set; they replay a model without its Python code.
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    # The single-worker executor works on CPUs only within one process; AsyncLLM keeps its engine-core process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # vLLM leaves its sockets behind. A folder that is inherited belongs to another process.
    if Path(os.environ.get(_SOCKETS) or PREFIX).name.startswith(PREFIX):
        os.environ[_SOCKETS] = str(process_folder())
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(math.ceil(spec.start_timeout_s))


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`: kdray's own, and those of `spec.engine_args`."""
    from vllm.platforms import current_platform

    from actors.vllm_plugin.mixture_model import ARCHITECTURE

    overrides: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "kdray_role": spec.role,
        "kdray_student": spec.student,
        "kdray_student_revision": spec.student_revision,
        "kdray_vocab_size": spec.vocab_size,
        "kdray_architectures": _architectures(spec.model, spec.revision),
        "kdray_logits": spec.logits,
    }
    arguments: dict[str, Any] = {
        "model": spec.model,
        "revision": spec.revision,
        "hf_overrides": overrides,
        "additional_config": {
            "kdray": {
                "teacher_top_k": spec.teacher_top_k,
                "student_top_k": spec.student_top_k,
                "record_hidden": spec.record_hidden,
            }
        },
        "logits_processors": [RECORDERS[spec.model_runner]],
        "worker_extension_cls": "actors.vllm_plugin.worker_extension.WorkerExtension",
        "skip_tokenizer_init": True,
        # vLLM's own `auto` would round a float32 checkpoint to bfloat16 on GPUs.
        "dtype": _dtype(spec, current_platform.is_cpu()),
        "seed": spec.seed,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": max(spec.max_num_batched_tokens, spec.max_num_seqs),
        "tensor_parallel_size": spec.tensor_parallel_size,
        "enable_prefix_caching": True,
        # By priority, vLLM may preempt a request that it has scheduled in the same step, whose blocks then stay in the prefix
        # cache although nothing was written to them (0.32).
        "scheduling_policy": "fcfs",
        "trust_remote_code": False,
        # Never a pickle, which can execute code.
        "load_format": "safetensors",
        "disable_log_stats": True,
        "max_logprobs": max(20, spec.teacher_top_k, 1 + MOST_IDS if spec.model_runner == "v2" else 0),
    }
    if spec.scoring == "prompt_logprobs":
        # vLLM makes rows of the vocabulary for all of them at once, and leaves no memory for these when it sizes its cache.
        arguments["long_prefill_token_threshold"] = min(_PROMPT_ROWS, spec.max_model_len)
    if current_platform.is_cpu():
        arguments |= {
            "enforce_eager": True,
            "block_size": 32,
            # One worker runs in the engine's process; several need processes of their own.
            "distributed_executor_backend": "uni" if spec.tensor_parallel_size == 1 else "mp",
            "kv_cache_memory_bytes": int(spec.kv_cache_gib * 2**30),
        }
        if _latent_attention(spec):
            # vLLM's CPU kernel of rotary embeddings misreads slices of queries, which latent attention gives it (0.32).
            arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
            # Its kernels of latent attention are of half precision; with plain keys and values it computes the same.
            os.environ["VLLM_MLA_DISABLE"] = "1"
    else:
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
        # A full graph would replay the layers without this model's Python code, which keeps the inputs of scoring.
        arguments["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    compilation = arguments.get("compilation_config", {}) | spec.engine_args.get("compilation_config", {})
    arguments |= spec.engine_args | ({"compilation_config": compilation} if compilation else {})
    return arguments


def _dtype(spec: EngineSpec, on_cpu: bool) -> str:
    if spec.dtype != "auto":
        return spec.dtype
    return (cpu_dtype if on_cpu else checkpoint_dtype)(spec.model, spec.revision)


def _latent_attention(spec: EngineSpec) -> bool:
    """True if a model of the engine caches a latent in place of keys and values, as DeepSeek's do."""
    from transformers import AutoConfig

    held = [(spec.model, spec.revision), *([] if spec.student is None else [(spec.student, spec.student_revision)])]
    configs = (AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False) for model, revision in held)
    return any(getattr(config.get_text_config(), "kv_lora_rank", None) is not None for config in configs)


def _architectures(model: str, revision: str | None) -> list[str]:
    from transformers import AutoConfig

    architectures = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).architectures
    if not architectures:
        raise EngineError(f"{model}: config.json names no architecture")
    return list(architectures)
