"""Training mode computes what evaluation mode does, for every kind of noise that families of models add in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.student.dropout import set_recomputation, without_dropout

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
RATE = 0.3

NOISY: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": RATE},
    "starcoder2": {"attention_dropout": RATE, "residual_dropout": RATE, "embedding_dropout": RATE},
    "seed_oss": {"attention_dropout": RATE, "residual_dropout": RATE, "num_key_value_heads": 1, "head_dim": 16},
    "opt": {"dropout": RATE, "attention_dropout": RATE, "layerdrop": 0.6, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"router_jitter_noise": RATE, "attention_dropout": RATE, "num_key_value_heads": 1, "num_local_experts": 4},
    # Its experts are drawn in training mode, whatever the rates.
    "phimoe": {"router_jitter_noise": 0.01, "input_jitter_noise": RATE, "num_key_value_heads": 1, "num_local_experts": 4},
    "gpt2": {"resid_pdrop": RATE, "embd_pdrop": RATE, "attn_pdrop": RATE},
    "gpt_neox": {"hidden_dropout": RATE, "attention_dropout": RATE},
    "phi": {"resid_pdrop": RATE, "embd_pdrop": RATE, "attention_dropout": RATE},
    "phi3": {"resid_pdrop": RATE, "embd_pdrop": RATE, "attention_dropout": RATE, "pad_token_id": 0},
    "falcon": {"hidden_dropout": RATE, "attention_dropout": RATE},
    "bloom": {"hidden_dropout": RATE, "attention_dropout": RATE},
    "gpt_bigcode": {"resid_pdrop": RATE, "embd_pdrop": RATE, "attn_pdrop": RATE},
    "stablelm": {"hidden_dropout": RATE, "attention_dropout": RATE, "num_key_value_heads": 2},
}
ROUTED = ("phimoe",)
"""Families that do more in training mode than a rate says."""


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | NOISY[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def logits(model: Any) -> torch.Tensor:
    """Of a batch long enough for any noise to show."""
    ids = torch.arange(2 * 24).reshape(2, 24) % 40
    torch.manual_seed(1)
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", NOISY)
def test_the_family_is_noisy_in_training_mode(family: str) -> None:
    """Else the next tests show nothing."""
    model = model_of(family)
    assert (logits(model.train()) - logits(model.eval())).abs().max() > 1e-4


@pytest.mark.parametrize("family", NOISY)
def test_training_mode_computes_what_evaluation_mode_does(family: str) -> None:
    model = model_of(family)
    before = logits(model.eval())
    without_dropout(model)
    torch.testing.assert_close(logits(model.eval()), before, msg="the model itself has changed")
    if family not in ROUTED:
        torch.testing.assert_close(logits(model.train()), before)
    model.gradient_checkpointing_enable()
    set_recomputation(model, True)
    again = logits(model)
    torch.testing.assert_close(again, before)
    again.sum().backward()


@pytest.mark.parametrize("family", NOISY)
def test_layers_recompute_if_asked(family: str) -> None:
    model = model_of(family)
    without_dropout(model)
    model.gradient_checkpointing_enable()
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        calls.clear()
        set_recomputation(model, enabled)
        logits(model).sum().backward()
        assert len(calls) == (2 if enabled else 1)


@pytest.mark.parametrize("family", ["starcoder2", "falcon"])
def test_the_exported_config_keeps_its_rates(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    without_dropout(model)
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in NOISY[family]} == NOISY[family]
