"""Checks of a run's models: which setting is refused, for which role, before anything else is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from kdray.checks.models import CPU_HEAD_SIZES, check_heads, check_models
from kdray.config import Config, parse_config
from kdray.errors import ConfigError

TINY = {"type": "tiny", "width": 64}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
HYBRID = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
NINE_HEADS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 288,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 576,
    "vocab_size": 192,
}
"""SmolLM's proportions."""


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Function that writes a config.json and returns its folder."""

    def write(name: str, content: dict[str, Any]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def config(student: Any, teacher: dict[str, Any], **sections: Any) -> Config:
    return parse_config({"run": {"name": "r"}, "student": {"model": student}, "teachers": {"main": teacher}} | sections)


def test_a_type_without_a_row_needs_a_setting(folder: Any, tmp_path: Path) -> None:
    """Of student and teacher alike: exit code 2, and a run that has the setting says so at its start (`unsafe_notes`)."""
    untried = folder("untried", {"architectures": ["CodeGenForCausalLM"], "model_type": "codegen"})
    for tree in ((untried, {"model": TINY}), (TINY, {"model": untried})):
        with pytest.raises(ConfigError, match=r"it is of a type that was not tried \(codegen\), .* add its model_type to run"):
            check_models(config(*tree))
        check_models(config(*tree, run={"name": "r", "untried_models": ["codegen"]}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config(untried, {"model": TINY}).dump())
    result = CliRunner().invoke(app, ["validate", str(recipe)])
    assert result.exit_code == 2
    assert "run.untried_models" in result.output


def test_each_model_is_checked_for_its_own_role(folder: Any) -> None:
    gpt_oss, hybrid = folder("oss", GPT_OSS), folder("next", HYBRID)
    check_models(config(TINY, {"model": gpt_oss}))
    check_models(config(TINY, {"type": "hf", "model": hybrid}))
    with pytest.raises(ConfigError, match=r"^student\.model=.*/oss: it is gpt-oss .* cannot be a student here: .* use it as a"):
        check_models(config(gpt_oss, {"model": gpt_oss}))
    with pytest.raises(ConfigError, match=r"^teachers\.main\.model=.*/next: it is a hybrid .* as a teacher of type openai$"):
        check_models(config(TINY, {"model": hybrid}))
    with pytest.raises(ConfigError, match=r"^student\.model=.*/next: it is a hybrid .* of the same vocabulary$"):
        check_models(config({"type": "pruned", "source": hybrid}, {"model": gpt_oss}))


def test_a_longrope_model_is_measured_against_the_runs_longest_sequence(folder: Any) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    phi = folder("phi", {"model_type": "phi3", "rope_scaling": scaling, "original_max_position_embeddings": 512})
    limits: dict[str, Any] = {"data": {"max_prompt_tokens": 128}, "rollout": {"max_new_tokens": 384}}
    check_models(config(TINY, {"model": phi}, **limits))
    limits["rollout"]["max_new_tokens"] = 385
    with pytest.raises(
        ConfigError, match=r"teachers\.main\.model=.*/phi: .* lower data\.max_prompt_tokens or rollout\.max_new"
    ):
        check_models(config(TINY, {"model": phi}, **limits))


def test_attention_heads_without_a_kernel_on_cpus_are_refused_there_alone(folder: Any) -> None:
    # The proportions of a 15-million-parameter Llama that is often used to try things on.
    six = folder("six", NINE_HEADS | {"num_attention_heads": 6, "num_key_value_heads": 6})
    for student, teacher, name in ((six, TINY, "student.model"), (TINY, six, "teachers.main.model")):
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(name)}=.*/six: its attention heads are 48 wide, .* 32, 64, 80, .* GPUs"
        ):
            check_heads(config(student, {"model": teacher}))
    check_heads(config(six, {"model": TINY, "num_gpus": 1}))
    check_heads(config(TINY, {"type": "hf", "model": six}))


def test_the_widths_of_heads_are_those_of_the_installed_engine() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_tensor_parallelism_must_divide_both_models_of_a_replica(folder: Any) -> None:
    nine = folder("nine", NINE_HEADS)
    wide = {"type": "tiny", "width": 192, "vocab_rows": 192}
    check_models(config(nine, {"model": wide, "tensor_parallel_size": 3}))
    with pytest.raises(
        ConfigError,
        match=r"^teachers\.main\.tensor_parallel_size=2: student\.model=.*/nine has 9 attention heads and 3 key-value heads, "
        r"which 2 ranks cannot share evenly; sizes that divide both of its models: 1, 3$",
    ):
        check_models(config(nine, {"model": wide, "tensor_parallel_size": 2}))
    with pytest.raises(ConfigError, match=r"=4: teachers\.main\.model=tiny, 2 layers of 192 has 6 attention heads"):
        check_models(config(TINY, {"model": wide, "tensor_parallel_size": 4}))


def test_a_pool_of_students_is_split_by_the_student_alone(folder: Any) -> None:
    nine = folder("nine", NINE_HEADS)
    teacher = {"type": "hf", "model": TINY}
    check_models(config(nine, teacher, rollout={"sampler": "student", "alpha": 0.0, "pool": {"tensor_parallel_size": 3}}))
    with pytest.raises(
        ConfigError, match=r"^rollout\.pool\.tensor_parallel_size=2: student\.model=.* sizes that divide its model: 1, 3$"
    ):
        check_models(config(nine, teacher, rollout={"sampler": "student", "alpha": 0.0, "pool": {"tensor_parallel_size": 2}}))


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HYBRID, "it is a hybrid (qwen3_next)"),
        ({"model_type": "qwen3_vl", "vision_config": {}, "text_config": {}}, "it is a model that also sees or hears"),
        ({"model_type": "of_next_year"}, "it is of an unknown type (of_next_year)"),
        ({"model_type": "vit"}, "it is no language model (vit)"),
    ],
)
def test_every_command_refuses_in_one_sentence(
    folder: Any, tmp_path: Path, command: str, content: dict[str, Any], message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "run": {"name": "r", "output": str(tmp_path / "runs")},
                "student": {"model": TINY},
                "teachers": {"main": {"model": folder("model", content)}},
            }
        )
    )
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{cpus: 8, memory_gib: 64}]")
    done = CliRunner().invoke(app, [command, str(recipe), *(["--cluster", str(nodes)] if command == "plan" else [])])
    assert done.exit_code == 2
    # A run tells what it does before it gets there.
    *_, line = done.output.splitlines()
    assert line.startswith("kdray: teachers.main.model=")
    assert message in line
    assert len(line) < 600
    assert not (tmp_path / "runs").exists()
