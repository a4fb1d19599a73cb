"""Tiny random models of real architectures, with a tokenizer, for exactness trials without any download.

A config states what differs from the family's defaults. Weights are drawn so that distributions are peaked and norms and biases
are not trivial: no parameter can be left out without a visible change of log p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 480
EOS = 0
_TEXT = (
    "A distillation run samples from a mixture of teacher and student; the student learns from every token. "
    "12 apples and 7 pears make 19 pieces of fruit. def add(a, b): return a + b  # numbers, words and code "
)


@dataclass(frozen=True)
class RandomModel:
    """Architecture and size of a random model."""

    model_type: str
    """As in transformers' configs."""
    size: int = 64
    """Width; heads have 32 channels, except where the config says otherwise."""
    layers: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the config."""
    rows: int = VOCAB
    """Rows of the embedding, at least `VOCAB`: those beyond are padding."""
    tied: bool = False
    seed: int = 0
    vision: Mapping[str, Any] | None = None
    """Config of the vision tower of a model that also sees, whose language model the other fields describe."""

    dtype: str = "float32"
    """Of the files."""
    file_size: str = "50GB"
    """Largest size of a file, as transformers reads it; a model of several has an index of them."""

    def write(self, folder: Path) -> Path:
        """Write a Hugging Face folder: safetensors, config, tokenizer. Returns: the folder."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(self.seed)
        keys = self.keys()
        if self.vision is not None:
            keys = {"text_config": keys, "vision_config": dict(self.vision), "mm_tokens_per_image": 4}
        config = AutoConfig.for_model(self.model_type, **keys)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _draw(name, parameter)
            for name, buffer in model.named_buffers():
                # Persistent ones are part of the checkpoint, such as the correction of a router's scores.
                if name in model.state_dict() and buffer.is_floating_point() and not buffer.any():
                    buffer.uniform_(0.0, 0.5)
        model.to(getattr(torch, self.dtype)).save_pretrained(folder, max_shard_size=self.file_size)
        byte_tokenizer().save_pretrained(folder)
        return folder

    def keys(self) -> dict[str, Any]:
        """Keys of the language model's config."""
        heads = max(1, self.size // 32)
        common = {
            "vocab_size": self.rows,
            "hidden_size": self.size,
            "intermediate_size": 2 * self.size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            # Latent attention has as many of both.
            "num_key_value_heads": heads if "kv_lora_rank" in self.config else max(1, heads // 2),
            "head_dim": 32,
            "max_position_embeddings": 512,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
        }
        # None leaves a key out: the family has none of that name, or derives it.
        return {key: value for key, value in (common | dict(self.config)).items() if value is not None}


def _draw(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.dim() < 2:
        # Norms and biases are moved from their initial 1 or 0.
        parameter.add_(torch.randn_like(parameter) * 0.2)
        return
    scale = 1.5 if "embed" in name or "wte" in name or "lm_head" in name else 1.0
    parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5)


def byte_tokenizer() -> Any:
    """A byte-level BPE of `VOCAB` ids with ChatML, trained on a few sentences in milliseconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_tokens([f"<|extra_{number}|>" for number in range(VOCAB - tokenizer.get_vocab_size())])
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0], chat_template=template
    )
