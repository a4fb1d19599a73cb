"""What an engine's start hands to vLLM: its environment and its arguments, with vLLM in place of a stub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig

from actors.serving.engine import TeacherEngine
from actors.serving.spec import EngineSpec


class StubEngine:
    """The arguments that it was made of, and the environment at that moment."""

    arguments: dict[str, Any]
    environment: dict[str, str]

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> StubEngine:
        made = cls()
        made.arguments, made.environment = arguments, dict(os.environ)
        return made

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[None]:
        assert method in ("kdray_end_with", "kdray_attach")
        return [None]


class Platform:
    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu

    def is_cpu(self) -> bool:
        return self.on_cpu


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


async def started(monkeypatch: pytest.MonkeyPatch, model: Path, on_cpu: bool, **fields: Any) -> StubEngine:
    """A teacher's engine, on a platform that vLLM is told of."""
    stubs = {
        "vllm": {"AsyncEngineArgs": dict},
        "vllm.platforms": {"current_platform": Platform(on_cpu)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": StubEngine},
        "actors.vllm_plugin.mixture_model": {"ARCHITECTURE": "Mixture"},
    }
    for name, contents in stubs.items():
        monkeypatch.setitem(sys.modules, name, module(name, **contents))
    for name in ("VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        # Restored at the end: the start sets them for its own process.
        monkeypatch.setenv(name, "before")
    given: dict[str, Any] = {"vocab_size": 99, "stop_ids": (1,), "max_model_len": 64} | fields
    engine = TeacherEngine(EngineSpec(role="teacher", model=str(model), student=None, **given))
    await engine.start()
    return engine._engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="float32").save_pretrained(tmp_path)
    return tmp_path


async def test_vllm_waits_for_the_engine_as_long_as_the_settings_say(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    engine = await started(monkeypatch, model, on_cpu=True, start_timeout_s=4000.5)
    assert engine.environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "4001"
    default = await started(monkeypatch, model, on_cpu=True)
    assert int(default.environment["VLLM_ENGINE_READY_TIMEOUT_S"]) >= 1800


@pytest.mark.parametrize(
    ("on_cpu", "checkpoint", "asked", "dtype"),
    [
        (True, "float32", "auto", "float32"),
        (True, "bfloat16", "auto", "float32"),
        (True, "bfloat16", "bfloat16", "bfloat16"),
        (False, "float32", "auto", "float32"),
        (False, "bfloat16", "auto", "bfloat16"),
        (False, "float32", "bfloat16", "bfloat16"),
    ],
)
async def test_vllm_never_chooses_the_dtype(
    monkeypatch: pytest.MonkeyPatch, model: Path, on_cpu: bool, checkpoint: str, asked: str, dtype: str
) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype=checkpoint).save_pretrained(model)
    assert (await started(monkeypatch, model, on_cpu, dtype=asked)).arguments["dtype"] == dtype


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({}, {"cudagraph_mode": "PIECEWISE"}),
        ({"cudagraph_capture_sizes": [1, 8]}, {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 8]}),
        ({"cudagraph_mode": "NONE"}, {"cudagraph_mode": "NONE"}),
        ({"backend": "eager"}, {"cudagraph_mode": "PIECEWISE", "backend": "eager"}),
    ],
)
async def test_other_compilation_settings_leave_the_graphs_piecewise(
    monkeypatch: pytest.MonkeyPatch, model: Path, given: dict[str, Any], passed: dict[str, Any]
) -> None:
    arguments = {"compilation_config": given} if given else {}
    engine = await started(monkeypatch, model, on_cpu=False, engine_args=arguments)
    assert engine.arguments["compilation_config"] == passed
