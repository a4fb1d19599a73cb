"""Shapes of published models, as their `config.json` on the hub states them, since no test asks the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model's `config.json`, as far as its size depends on it, and its published number of parameters."""

    model_type: str
    parameters: str
    """Of the language model alone, in billions, rounded."""
    config: dict[str, Any]


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
    }


_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}

# compressed-tensors, with one scale a tensor for weights and activations; the output head stays as it is.
_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
        }
    },
}

PUBLISHED = {
    "Qwen/Qwen3-32B": Published("qwen3", "32.8", _shape(5120, 25600, 64, 64, 8, 128, 151936) | _UNTIED),
    "Qwen/Qwen3-8B": Published("qwen3", "8.2", _shape(4096, 12288, 36, 32, 8, 128, 151936) | _UNTIED),
    "Qwen/Qwen3-4B-Instruct-2507": Published("qwen3", "4.0", _shape(2560, 9728, 36, 32, 8, 128, 151936) | _TIED),
    "Qwen/Qwen3-1.7B": Published("qwen3", "1.7", _shape(2048, 6144, 28, 16, 8, 128, 151936) | _TIED),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Published(
        "qwen3_moe",
        "30.5",
        _shape(2048, 6144, 48, 32, 4, 128, 151936)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | _UNTIED,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Published("qwen2", "7.6", _shape(3584, 18944, 28, 28, 4, 128, 152064) | _UNTIED),
    "Qwen/Qwen2.5-0.5B-Instruct": Published("qwen2", "0.5", _shape(896, 4864, 24, 14, 2, 64, 151936) | _TIED),
    "RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8": Published(
        "llama", "70.6", _shape(8192, 28672, 80, 64, 8, 128, 128256) | {"quantization_config": _FP8} | _UNTIED
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Published("llama", "8.0", _shape(4096, 14336, 32, 32, 8, 128, 128256) | _UNTIED),
    "google/gemma-3-12b-it": Published(
        "gemma3", "11.8", {"text_config": _shape(3840, 15360, 48, 16, 8, 256, 262208) | {"sliding_window": 1024}}
    ),
    "google/gemma-3-1b-it": Published(
        "gemma3_text", "1.0", _shape(1152, 6912, 26, 4, 1, 256, 262144) | {"sliding_window": 512} | _TIED
    ),
    "mistralai/Mistral-Large-Instruct-2407": Published(
        "mistral", "122.6", _shape(12288, 28672, 88, 96, 8, 128, 32768) | {"sliding_window": None} | _UNTIED
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(
        "mistral", "7.2", _shape(4096, 14336, 32, 32, 8, 128, 32768) | {"sliding_window": None} | _UNTIED
    ),
    "openai/gpt-oss-20b": Published(
        "gpt_oss",
        "20.9",
        _shape(2880, 2880, 24, 64, 8, 64, 201088)
        | {
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
        }
        | _UNTIED,
    ),
}


def save_config(name: str, folder: Path) -> Path:
    """Write the `config.json` of a published model into a folder of its own, and return the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    published = PUBLISHED[name]
    config = AutoConfig.for_model(published.model_type, **published.config, max_position_embeddings=32768, dtype="bfloat16")
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    target = folder / name.replace("/", "--")
    config.save_pretrained(target)
    return target
