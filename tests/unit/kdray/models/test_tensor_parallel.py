"""Sizes of tensor parallelism, against the rules that vLLM's layers assert."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from kdray.models.tensor_parallel import common_sizes, indivisible, num_kv_heads

QWEN2_HALF = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        # Fewer key-value heads than ranks are replicated: 16 and 32 are sizes of a model with 8.
        (LLAMA_8B, [1, 2, 4, 8, 16, 32]),
        # 14 heads: not by 4; 7 divides the heads, but not the 2 key-value heads.
        (QWEN2_HALF, [1, 2]),
        # 12 heads, 3072 wide, 50304 rows after padding; 3, 6 and 12 divide all three.
        (GPT2Config(), [1, 2, 3, 4, 6, 12]),
        (OPTConfig(num_attention_heads=12, ffn_dim=1024, vocab_size=50272), [1, 2, 4]),
        # Experts are split too.
        (Qwen3MoeConfig(num_key_value_heads=4, moe_intermediate_size=24, vocab_size=151936), [1, 2, 4, 8]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_sizes_of_single_models(config: PreTrainedConfig, sizes: list[int]) -> None:
    assert common_sizes([config]) == sizes


def test_a_pair_has_the_sizes_of_both() -> None:
    assert common_sizes([LLAMA_8B, QWEN2_HALF]) == [1, 2]


@pytest.mark.parametrize(
    ("size", "rest"),
    [
        (2, []),
        (4, ["14 attention heads"]),
        (
            3,
            ["14 attention heads", "2 key-value heads", "feed-forward blocks of width 4864", "151936 vocabulary rows (padded)"],
        ),
    ],
)
def test_every_dimension_that_does_not_divide_is_named(size: int, rest: list[str]) -> None:
    assert indivisible(QWEN2_HALF, size) == rest


def test_the_vocabulary_is_padded_before_it_is_split() -> None:
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, intermediate_size=64, vocab_size=99)
    assert indivisible(config, 8) == []


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (LLAMA_8B, 8),
        (GPT2Config(), 12),
        (FalconConfig(num_attention_heads=71, multi_query=True, new_decoder_architecture=False), 1),
        (FalconConfig(hidden_size=8192, num_attention_heads=128, num_kv_heads=8, new_decoder_architecture=True), 8),
        (DeepseekV3Config(), 128),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_key_value_heads(config: Any, heads: int) -> None:
    assert num_kv_heads(config) == heads


def test_a_model_that_also_sees_is_split_by_its_language_model() -> None:
    text = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128}
    assert indivisible(Gemma3Config(text_config=text), 4) == ["6 attention heads"]
