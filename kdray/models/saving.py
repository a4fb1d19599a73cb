"""Saving of Hugging Face models: weights, config and generation config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def save_model(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a Hugging Face model to `folder`, with safetensors weights.

    The generation config is written as the model came with it. Transformers loads one that sets a temperature without
    `do_sample`, as chat models have, but refuses to save it; to correct it would change how the user's model generates.
    Args: model: of transformers; state: whole weights by parameter name, None for the model's own.
    """
    generation = model.generation_config
    try:
        if generation is not None:
            # One that passes transformers' check, and is overwritten below.
            model.generation_config = type(generation)()
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    finally:
        model.generation_config = generation
    # safetensors lets the owner alone read its files, whatever the umask; the model's config is an ordinary file.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)
    if generation is not None:
        from transformers.utils import GENERATION_CONFIG_NAME

        generation.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])


@dataclass(frozen=True)
class TokenizerSource:
    """Tokenizer that a student is exported with."""

    model: str
    """Folder or hub id."""
    revision: str | None = None
    """Commit or tag on the hub."""
    chat_template: str | None = None
    """Chat template in place of its own."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a model's folder."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        tokenizer.save_pretrained(folder)
