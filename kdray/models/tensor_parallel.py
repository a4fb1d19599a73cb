"""Sizes into which vLLM can split a model by tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it splits it."""
_LARGEST = 64
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "ffn_dim",
)


def indivisible(config: Any, size: int) -> list[str]:
    """Dimensions of a model, with their names, that `size` ranks cannot share as vLLM requires; empty if they can.

    Query heads, the widths of feed-forward blocks and the padded vocabulary are split evenly. Key-value heads are too, or each
    is held by the same number of ranks if there are fewer heads than ranks.

    Args: config: Hugging Face config.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    found = [f"{heads} attention heads"] if heads % size else []
    kv_heads = num_kv_heads(text)
    if max(kv_heads, size) % min(kv_heads, size):
        found.append(f"{kv_heads} key-value heads")
    widths = {int(width) for name in _WIDTHS for width in _numbers(getattr(text, name, None))}
    found += [f"feed-forward blocks of width {width}" for width in sorted(widths) if width % size]
    rows = -(-int(text.vocab_size) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return found + ([f"{rows} vocabulary rows (padded)"] if rows % size else [])


def common_sizes(configs: Sequence[Any]) -> list[int]:
    """Tensor-parallel sizes that all these models can be split into."""
    return [size for size in range(1, _LARGEST + 1) if not any(indivisible(config, size) for config in configs)]


def num_kv_heads(text: Any) -> int:
    """Key-value heads of a text config; as many as there are query heads if it names none."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    named = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return int(named or text.num_attention_heads)


def _numbers(value: Any) -> list[int]:
    """Positive numbers of a setting that may hold one for all layers, or one for each."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int) and each > 0]
