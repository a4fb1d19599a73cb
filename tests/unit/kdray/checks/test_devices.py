"""Engines that reserve no GPU where vLLM computes on them alone, and the precision of sampling beside that of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdray.checks.devices import check_gpus, check_model_runners, precision_notes, quantisation_notes
from kdray.config import Config, parse_config, vllm_build
from kdray.errors import ConfigError

TINY = {"type": "tiny", "layers": 1, "width": 32}


def config(**sections: Any) -> Config:
    return parse_config(
        {"run": {"name": "x"}, "student": {"model": TINY | {"seed": 1}}, "teachers": {"t": {"model": TINY}}, **sections}
    )


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teachers": {"t": {"model": TINY, "num_gpus": 0}}},
            r"teachers\.t\.num_gpus=0 with tensor_parallel_size=1: .* set teachers\.t\.num_gpus=1, or a share of a GPU",
        ),
        (
            {"teachers": {"t": {"model": TINY, "num_gpus": 0, "tensor_parallel_size": 8}}},
            r"teachers\.t\.num_gpus=0 with tensor_parallel_size=8: .* set teachers\.t\.num_gpus=8, remove it, or install",
        ),
        ({"rollout": {"sampler": "student", "pool": {"num_gpus": 0}}}, r"rollout\.pool\.num_gpus=0"),
    ],
)
def test_an_engine_without_a_gpu_is_refused_where_it_would_take_another_ones(
    on_gpus: None, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    refused = config(**sections)
    with pytest.raises(ConfigError, match=message):
        check_gpus(refused)
    for device in ("cpu", None):
        monkeypatch.setattr(vllm_build, "vllm_device", lambda: device)  # noqa: B023
        check_gpus(refused)


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"teachers": {"t": {"model": TINY, "model_runner": "v2"}}}, r"teachers\.t"),
        ({"rollout": {"sampler": "student", "pool": {"model_runner": "v2"}}}, r"rollout\.pool"),
    ],
)
def test_the_newer_model_runner_is_refused_on_cpus(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], setting: str
) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    asked = config(**sections)
    check_model_runners(asked)
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    with pytest.raises(ConfigError, match=rf"{setting}\.model_runner=v2: .*needs a GPU .* set {setting}\.model_runner=v1"):
        check_model_runners(asked)
    check_model_runners(config())


def test_a_recipe_for_any_machine_passes_on_gpus(on_gpus: None) -> None:
    check_gpus(config())
    check_gpus(config(teachers={"t": {"model": TINY, "num_gpus": 0.5}}))
    # No student-only replicas run.
    check_gpus(config(rollout={"pool": {"num_gpus": 0}}))


@pytest.mark.parametrize(
    ("sections", "notes"),
    [
        ({}, []),
        (
            {"training": {"precision": "bf16"}},
            [
                "teachers.t samples the student's rollouts in float32, and training.precision=bf16 computes in bfloat16: "
                "their probabilities differ by rounding; set teachers.t.dtype=bfloat16, or training.precision=fp32 to have one "
                "precision"
            ],
        ),
        ({"training": {"precision": "bf16"}, "teachers": {"t": {"model": TINY, "dtype": "bfloat16"}}}, []),
        ({"training": {"precision": "bf16"}, "rollout": {"alpha": 1.0}, "loss": {"type": "forward_kl"}}, []),
        (
            {"rollout": {"sampler": "student", "pool": {"dtype": "float16"}}},
            [
                "rollout.pool samples the student's rollouts in float16, and training.precision=fp32 computes in "
                "float32: their probabilities differ by rounding; set rollout.pool.dtype=float32 to have one precision"
            ],
        ),
        ({"rollout": {"sampler": "student"}, "teachers": {"t": {"model": TINY, "dtype": "float16"}}}, []),
    ],
)
def test_two_precisions_of_the_student_are_told(sections: dict[str, Any], notes: list[str]) -> None:
    assert list(precision_notes(config(**sections))) == notes


def test_on_gpus_the_checkpoints_own_precision_counts(on_gpus: None, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(dtype="bfloat16").save_pretrained(tmp_path)
    teachers = {"t": {"model": str(tmp_path)}}
    (note,) = precision_notes(config(teachers=teachers))
    assert note.startswith("teachers.t samples the student's rollouts in bfloat16, and training.precision=fp32")
    assert not list(precision_notes(config(teachers=teachers, training={"precision": "bf16"})))


def compressed(kind: str, bits: int, activations: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": weights if activations else None}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("settings", "on_cpus"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, True),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, True),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, False),
        (compressed("int", 4, False), True),
        (compressed("int", 8, True), True),
        (compressed("int", 8, False), False),
        (compressed("float", 8, True), False),
    ],
)
def test_a_quantised_teacher_without_kernels_is_refused_on_cpus_alone(
    settings: dict[str, Any], on_cpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(quantization_config=settings).save_pretrained(tmp_path)
    teachers = {"t": {"model": str(tmp_path)}}
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    (note,) = quantisation_notes(config(teachers=teachers))
    assert note.startswith("teachers.t.model has quantised weights")
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    if on_cpus:
        assert list(quantisation_notes(config(teachers=teachers))) == [note]
    else:
        with pytest.raises(ConfigError, match=r"teachers\.t\.model has quantised weights .* the CPU build of vLLM cannot"):
            list(quantisation_notes(config(teachers=teachers)))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "quark"},
        {"quant_method": "torchao"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 128},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "mxfp4"},
        compressed("float", 4, False),
    ],
    ids=lambda settings: settings["quant_method"],
)
@pytest.mark.parametrize("device", ["cpu", "gpu", None])
def test_a_format_that_was_not_tried_is_refused_everywhere(
    settings: dict[str, Any], device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(quantization_config=settings).save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: device)
    with pytest.raises(ConfigError, match=r"teachers\.t\.model has quantised weights \(\S+, \d bits.* do not load: they load"):
        list(quantisation_notes(config(teachers={"t": {"model": str(tmp_path)}})))


def test_gpt_oss_in_its_own_format_is_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GptOssConfig

    GptOssConfig(quantization_config={"quant_method": "mxfp4"}).save_pretrained(tmp_path)
    settings = config(teachers={"t": {"model": str(tmp_path)}})
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    (note,) = quantisation_notes(settings)
    assert "(mxfp4, 4 bits)" in note
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    with pytest.raises(ConfigError, match=r"the CPU build of vLLM cannot compute with"):
        list(quantisation_notes(settings))
