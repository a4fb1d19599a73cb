"""What an engine's start hands to vLLM: its environment and its arguments, with vLLM in place of a stub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from actors.serving.engine import TeacherEngine
from actors.serving.spec import EngineSpec
from actors.weights.scratch import process_folder
from kdray.types import SampleRequest


class StubEngine:
    """The arguments that it was made of, and the environment at that moment."""

    arguments: dict[str, Any]
    environment: dict[str, str]
    errored = False

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> StubEngine:
        made = cls()
        made.arguments, made.environment = arguments, dict(os.environ)
        return made

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[None]:
        assert method in ("kdray_begin", "kdray_attach")
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


async def started(monkeypatch: pytest.MonkeyPatch, model: Path, on_cpu: bool, sockets: str = "", **fields: Any) -> StubEngine:
    """A teacher's engine, on a platform that vLLM is told of. Args: sockets: the environment's own folder of them."""
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
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "before")
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", sockets)
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


async def test_sockets_go_with_their_process_unless_the_user_says_where(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    own = str(process_folder())
    for given, expected in (("", own), ("/tmp/kdray-scratch-of-my-parent", own), (str(tmp_path), str(tmp_path))):
        engine = await started(monkeypatch, model, on_cpu=True, sockets=given)
        assert engine.environment["VLLM_RPC_BASE_PATH"] == expected


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


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, None),
        ({"scoring": "prompt_logprobs", "max_model_len": 9000}, 256),
        ({"scoring": "prompt_logprobs", "max_model_len": 200}, 200),
        (
            {"scoring": "prompt_logprobs", "max_model_len": 9000, "engine_args": {"long_prefill_token_threshold": 64}},
            64,
        ),
    ],
)
async def test_vllms_own_prompt_logprobs_are_computed_for_few_tokens_at_once(
    monkeypatch: pytest.MonkeyPatch, model: Path, fields: dict[str, Any], tokens: int | None
) -> None:
    """Rows of 4,096 tokens over 152,000 ids would take gigabytes that vLLM does not measure."""
    engine = await started(monkeypatch, model, on_cpu=False, **fields)
    assert engine.arguments.get("long_prefill_token_threshold") == tokens


@pytest.mark.parametrize(
    ("runner", "switch", "recorder", "logprobs"),
    [("v1", "0", "actors.vllm_plugin.recorder:Recorder", 32), ("v2", "1", "actors.vllm_plugin.recorder_v2:RecorderV2", 128)],
)
async def test_a_model_runner_gets_its_own_recorder(
    monkeypatch: pytest.MonkeyPatch, model: Path, runner: str, switch: str, recorder: str, logprobs: int
) -> None:
    engine = await started(monkeypatch, model, on_cpu=False, model_runner=runner)
    assert engine.environment["VLLM_USE_V2_MODEL_RUNNER"] == switch
    # Otherwise vLLM may turn them on by itself.
    assert engine.environment["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "0"
    assert engine.arguments["logits_processors"] == [recorder]
    assert engine.arguments["max_logprobs"] == logprobs


@pytest.mark.parametrize(
    ("runner", "captured", "most", "checked"),
    [
        ("v1", [], 128, []),
        ("v1", [1, 8, 256], 128, [1, 8]),
        ("v2", [], 128, [1, 5]),
        ("v2", [], 3, [1, 3]),
        ("v2", [1, 8], 128, [1, 5, 8]),
    ],
)
def test_the_newer_model_runner_is_always_compared_with_prefill(
    runner: Any, captured: list[int], most: int, checked: list[int]
) -> None:
    spec = EngineSpec("teacher", "", None, 99, (1,), 64, model_runner=runner, max_num_seqs=most)
    engine = TeacherEngine(spec)
    mode = SimpleNamespace(name="PIECEWISE" if captured else "NONE")
    compilation = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=captured)
    engine._engine = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=compilation))
    assert engine.checked_sizes == checked


def test_the_teacher_rests_under_the_first_model_runner_alone() -> None:
    """The newer one tells the batch when the teacher has run."""
    request = SampleRequest(0, 0, np.array([1], np.int32), 0.0, 1, 4)
    for runner, rests in (("v1", True), ("v2", False)):
        spec = EngineSpec("mixture", "", "", 99, (1,), 64, model_runner=runner)  # type: ignore[arg-type]
        assert TeacherEngine(spec)._student_only(request) == rests
