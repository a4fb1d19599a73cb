"""vLLM's adjustments for single architectures, through vLLM's own construction of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from actors.vllm_plugin.config_hooks import check_beside
from actors.vllm_plugin.mixture_model import ARCHITECTURE, register
from kdray.models.random_models import RandomModel

GPT_OSS = RandomModel("gpt_oss", 64, 1, {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32})


def of_engine(folder: Path, architecture: str, **config: Any) -> ModelConfig:
    """vLLM's config of an engine's checkpoint, as kdray gives it to vLLM."""
    overrides = {"architectures": [ARCHITECTURE], "kdray_architectures": [architecture], "kdray_role": "teacher"}
    return ModelConfig(model=str(folder), hf_overrides=overrides | config, skip_tokenizer_init=True, dtype="bfloat16")


def test_gpt_oss_is_told_from_other_models_in_its_format(tmp_path: Path) -> None:
    """By its own class of layers, which vLLM's adjustment names; with the general one its experts are not those of the file."""
    register()
    folder = GPT_OSS.write(tmp_path)
    found = of_engine(folder, "GptOssForCausalLM", quantization_config={"quant_method": "mxfp4"})
    assert found.quantization == "gpt_oss_mxfp4"
    assert VllmConfig(model_config=found).structured_outputs_config.reasoning_parser == "openai_gptoss", "of the engine"
    assert of_engine(RandomModel("llama", 64, 1).write(tmp_path / "plain"), "LlamaForCausalLM").quantization is None


def test_the_entry_calls_those_of_the_model_in_the_checkpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    called: list[str] = []

    class Hook:
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            called.append("model")

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            called.append("engine")

    class Config:
        def __init__(self, *architectures: str) -> None:
            self.kdray_architectures = architectures
            self.hf_config = self.model_config = self

    monkeypatch.setitem(MODELS_CONFIG_MAP, "OneForCausalLM", Hook)
    entry = MODELS_CONFIG_MAP[ARCHITECTURE]
    for architecture, calls in (("OneForCausalLM", ["model", "engine"]), ("OtherForCausalLM", [])):
        called.clear()
        entry.verify_and_update_model_config(Config(architecture))
        entry.verify_and_update_config(Config(architecture))
        assert called == calls


def test_a_student_that_needs_other_settings_is_refused_beside_its_teacher() -> None:
    check_beside(["LlamaForCausalLM"], ["GptOssForCausalLM"])
    check_beside(["Gemma4ForCausalLM"], ["Gemma4ForConditionalGeneration"])
    with pytest.raises(ValueError, match=r"a student of Gemma4ForCausalLM needs .* its teacher of LlamaForCausalLM; hold"):
        check_beside(["Gemma4ForCausalLM"], ["LlamaForCausalLM"])
