"""The attention implementation that a model is loaded with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdray.errors import ConfigError
from kdray.models.attention import attention_arguments
from kdray.models.random_models import RandomModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: RandomModel(kind, layers=1, tied=True).write(root / kind) for kind in ("gemma2", "qwen3")}


def test_soft_capping_is_not_left_out(folders: dict[str, Path]) -> None:
    assert attention_arguments(folders["gemma2"]) == {"attn_implementation": "eager"}
    assert attention_arguments(folders["qwen3"]) == {}
    with pytest.raises(ConfigError, match=r"training.attention=sdpa: it leaves out the soft-capping .* set eager"):
        attention_arguments(folders["gemma2"], None, "sdpa")
    assert attention_arguments(folders["gemma2"], None, "flash_attention_2") == {"attn_implementation": "flash_attention_2"}


def test_maps_need_the_eager_implementation(folders: dict[str, Path]) -> None:
    assert attention_arguments(folders["qwen3"], maps=True) == {"attn_implementation": "eager"}
    with pytest.raises(ConfigError, match="training.attention=sdpa: it returns no attention maps"):
        attention_arguments(folders["qwen3"], None, "sdpa", maps=True)
