"""Recomputing activations: it happens, and changes neither logits nor gradients, whatever dropout the model came with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actors.student.dropout import without_dropout


def _llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, attention_dropout=0.5, **sizes))


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5))


@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_activations_are_recomputed_and_nothing_else_changes(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(0, 20, (2, 7))
    without_dropout(model)

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        return logits.detach(), next(model.parameters()).grad.clone()

    model.eval()
    plain = logits_and_gradient()
    model.gradient_checkpointing_enable()
    model.train()
    layers = getattr(model, "model", None) or model.transformer
    calls = []
    first = (layers.layers if hasattr(layers, "layers") else layers.h)[0]
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    again = logits_and_gradient()
    assert len(calls) == 2, "the layer ran once: its activations were kept"
    for left, right in zip(plain, again, strict=True):
        torch.testing.assert_close(left, right)
