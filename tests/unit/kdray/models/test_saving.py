"""Saving keeps the generation config of a model, also one that transformers loads and refuses to save."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdray.config import PrunedModel, TinyModel
from kdray.models.quantization import quantize
from kdray.models.random_models import byte_tokenizer
from kdray.models.resolve import build_pruned_model, build_tiny_model
from kdray.models.saving import TokenizerSource, save_model

CONTRADICTORY = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 2], "pad_token_id": 0}
"""As some chat models have it: settings of sampling, and nothing that switches it on."""
CHAT = CONTRADICTORY | {"do_sample": True, "repetition_penalty": 1.05}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny_model(TinyModel(type="tiny", layers=2, width=32), tmp_path / "source")


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    del content["transformers_version"]
    return {name: value for name, value in content.items() if not name.startswith("_")}


@pytest.mark.parametrize("settings", [CONTRADICTORY, CHAT], ids=["without do_sample", "with do_sample"])
def test_the_generation_config_is_the_sources(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    (source / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "saved", state)
    assert written(tmp_path / "saved") == settings
    assert model.generation_config.temperature == 0.9, "the model in memory keeps its own"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(dict(again.state_dict()), state)
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [1, 2]


def test_transformers_still_refuses_to_save_it(source: Path, tmp_path: Path) -> None:
    """Once it does not, `save_model` is no longer needed."""
    (source / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")


def test_pruned_and_quantised_models_keep_it_too(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    pruned = PrunedModel.model_validate({"type": "pruned", "source": str(source), "intermediate_size": 32})
    build_pruned_model(pruned, str(source), tmp_path / "pruned")
    quantize(source, tmp_path / "quantised", "int8")
    for name in ("pruned", "quantised"):
        assert written(tmp_path / name) == CONTRADICTORY
        AutoTokenizer.from_pretrained(tmp_path / name)


def test_a_tokenizer_is_written_with_the_template_that_the_student_was_trained_with(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "own")
    TokenizerSource(str(tmp_path / "own")).save(tmp_path / "same")
    TokenizerSource(str(tmp_path / "own"), chat_template="{{ messages }}").save(tmp_path / "other")
    found = {name: AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("own", "same", "other")}
    assert found == {"own": byte_tokenizer().chat_template, "same": byte_tokenizer().chat_template, "other": "{{ messages }}"}


def test_weights_are_readable_by_whoever_may_read_the_config(source: Path, tmp_path: Path) -> None:
    """safetensors writes files that the owner alone may read."""
    before = os.umask(0o027)
    try:
        save_model(AutoModelForCausalLM.from_pretrained(source), tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == 0o640
