"""Attention implementation that transformers loads a model with: the one that computes what the engine computes."""

from __future__ import annotations

from pathlib import Path

from kdray.config import Attention
from kdray.errors import ConfigError


def attention_arguments(
    model: str | Path, revision: str | None = None, chosen: Attention = "auto", *, maps: bool = False
) -> dict[str, str]:
    """Arguments for `from_pretrained`. With `auto`, transformers chooses unless the model needs another implementation.

    Args: model: folder or hub id; maps: true if attention maps are read, which only the eager implementation returns.
    Raises: ConfigError if the chosen implementation leaves out a part of the model.
    """
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).get_text_config()
    # PyTorch's fused attention has no soft-capping: transformers drops it without a word.
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if chosen == "auto":
        return {"attn_implementation": "eager"} if maps or capped else {}
    if maps and chosen != "eager":
        raise ConfigError(f"training.attention={chosen}: it returns no attention maps, which a term compares; set eager")
    if capped and chosen == "sdpa":
        raise ConfigError(
            f"training.attention=sdpa: it leaves out the soft-capping of attention logits of {model} ({text.model_type}); set "
            "eager, flash_attention_2 or flex_attention"
        )
    return {"attn_implementation": chosen}
