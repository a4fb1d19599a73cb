"""What a model of an engine is told of itself, through vLLM's own construction of its configuration."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import commandr

from actors.vllm_plugin import sub_models
from kdray.models.random_models import RandomModel


@pytest.mark.parametrize(("model_type", "told"), [("cohere2", 31), ("gemma3_text", 32)])
def test_a_window_is_stated_so_that_vllm_computes_what_transformers_does(
    model_type: str, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sub_models, "initialize_model", lambda vllm_config, prefix: vllm_config)
    folder = RandomModel(model_type, 64, 2, {"sliding_window": 32}, tied=True).write(tmp_path)
    model = ModelConfig(model=str(folder), hf_overrides={"kdray_logits": None}, skip_tokenizer_init=True, dtype="float32")
    config = model.hf_config
    own: Any = sub_models.build(VllmConfig(model_config=model), "t", config, config.architectures, quantised=True)
    assert own.model_config.hf_config.sliding_window == told
    assert config.sliding_window == 32, "another model of the engine may have the same config"


def test_vllm_still_makes_the_window_of_cohere_2_one_token_wider() -> None:
    """Once it does not, `_WIDER_BY` has to go: nothing but a row of the families would tell."""
    assert "config.sliding_window + 1" in inspect.getsource(commandr.CohereAttention)


def test_a_parameter_with_two_names_is_filled_under_either() -> None:
    """vLLM's experts hold the shared ones of their layer too, in some families under the first of both names."""
    model = torch.nn.Module()
    model.experts, model.shared, model.lost = torch.nn.Module(), torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2)
    model.experts.inner = model.shared
    model.config = SimpleNamespace(tie_word_embeddings=False)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["experts.inner.weight", "lost.weight", "lost.bias"]
    assert sub_models.unfilled(model, {"shared.weight", "lost.bias"}) == ["lost.weight"]
    assert sub_models.unfilled(model, {"lost.weight", "lost.bias"}) == ["experts.inner.weight"]
