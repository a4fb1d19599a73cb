"""Construction of one model of the engine with a configuration of its own, and the names of its weights.

vLLM derives one configuration for the whole engine from the engine's own checkpoint: text config, sliding window, quantisation.
The second model of an engine shares none of these, so each model gets a copy that states its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model

_NOT_TEXT = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio")
"""Modules of multimodal checkpoints that a text model does not have."""
_WIDER_BY = {"cohere2": 1}
"""Tokens by which vLLM's code of a type makes the window wider than its config states, and than transformers' is (0.32)."""


def text_model(config: Any, architectures: list[str]) -> tuple[Any, list[str]]:
    """Config and architectures of a checkpoint's text model: its own, or those of the language model of a multimodal one."""
    text = config.get_text_config()
    if text is config or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return config, architectures
    return text, [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]


def build(
    vllm_config: VllmConfig, tag: str, config: Any, architectures: list[str], *, quantised: bool, prefix: str = ""
) -> Any:
    """A model with the engine's limits and a configuration of its own.

    Args: tag: name under which its compiled code is cached, different for each model of an engine; config: its Hugging Face
    config; quantised: true for the model that the engine's quantisation belongs to; prefix: of its modules' names, which must
    differ between models of an engine, and be empty for a quantised one: lists of excluded layers contain whole names.
    """
    text, architectures = text_model(config, architectures)
    base = copy.copy(vllm_config)
    base.model_config = copy.copy(vllm_config.model_config)
    # Found there by vLLM when it derives sizes by layer, such as Gemma 4's; it would still be that of the other model.
    base.model_config.hf_text_config = text.get_text_config()
    own = base.with_hf_config(text, architectures=architectures)
    own.model_config.hf_text_config = own.model_config.hf_config.get_text_config()
    own.model_config.model_arch_config = own.model_config.get_model_arch_config()
    if (more := _WIDER_BY.get(text.model_type, 0)) and text.sliding_window:
        own.model_config.hf_text_config.sliding_window = text.sliding_window - more
    # vLLM's `LogitsProcessor` reads it when it is made.
    own.model_config.hf_config.head_dtype = vllm_config.model_config.hf_config.kdray_logits
    # `replace` derives the quantisation again from the model config.
    if not quantised:
        own.model_config.quantization = None
        own.quant_config = None
    own.cache_config = copy.copy(own.cache_config)
    own.cache_config.sliding_window = _uniform_window(own.model_config.hf_text_config)
    with set_model_tag(tag):
        return initialize_model(vllm_config=own, prefix=prefix)


def _uniform_window(text: Any) -> int | None:
    """Sliding window of all layers, the default of a layer that states none; None if layers differ or there is none."""
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and any(kind != "sliding_attention" for kind in kinds):
        return None
    if getattr(text, "use_sliding_window", True) is False:
        return None
    return getattr(text, "sliding_window", None)


def unfilled(model: torch.nn.Module, filled: set[str]) -> list[str]:
    """Parameters that a load left as they were made, without a tied output head, in order.

    One that the model has under several names, as shared experts are, is filled under any of them.
    """
    found = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in filled}
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    return sorted(name for name, each in model.named_parameters() if id(each) not in found and name not in tied)


def text_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors under the names that its text model has by itself, without those of other modalities."""
    for name, tensor in weights:
        parts = name.split(".")
        if any(part in _NOT_TEXT for part in parts):
            continue
        if parts[0] == "language_model":
            parts = parts[1:]
        elif parts[:2] == ["model", "language_model"]:
            parts = ["model", *parts[2:]]
        yield ".".join(parts), tensor
