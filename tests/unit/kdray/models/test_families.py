"""Refused families: each row on config.json files as hubs have them, and its neighbours that are not refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest

from kdray.config import TinyModel
from kdray.errors import ConfigError
from kdray.models.families import (
    FAMILIES,
    TRIED,
    WINDOWS_BY_LAYER,
    ModelFacts,
    Role,
    check_family,
    read_config,
    refusal,
)
from tests.support.families import FAMILIES as ROWS

DOCS = Path(__file__).parents[4] / "docs" / "models.md"
ROLES: tuple[Role, ...] = get_args(Role)

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


def named(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    return SHAPE | {"architectures": [architecture], "model_type": model_type} | keys


REFUSED: dict[str, list[dict[str, Any]]] = {
    "an encoder-decoder": [
        named("T5ForConditionalGeneration", "t5"),
        named("BartForConditionalGeneration", "bart", is_encoder_decoder=True),
        named("NewForConditionalGeneration", "of_next_year", is_encoder_decoder=True),
    ],
    "a hybrid": [
        # Qwen3-Next's file says nothing of single layers.
        named("Qwen3NextForCausalLM", "qwen3_next", full_attention_interval=4),
        named("Qwen3_5ForCausalLM", "qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "vision_config": VISION,
            "text_config": SHAPE | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
        },
        named("FalconH1ForCausalLM", "falcon_h1", mamba_d_ssm=64),
        named("GraniteMoeHybridForCausalLM", "granitemoehybrid", layer_types=["mamba", "attention"]),
        named("Lfm2ForCausalLM", "lfm2", layer_types=["conv", "full_attention"]),
        named("NemotronHForCausalLM", "nemotron_h", hybrid_override_pattern="M-M*"),
        named("JambaForCausalLM", "jamba", attn_layer_period=8),
        # Unknown to every library here, but its layers say it.
        named("NextForCausalLM", "of_next_year", layer_types=["full_attention", "linear_attention"]),
        named("NextForCausalLM", "of_next_year", mamba_d_state=16),
    ],
    "a model with chunked attention": [
        named("Llama4ForCausalLM", "llama4_text", attention_chunk_size=8192),
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "vision_config": VISION,
            "text_config": SHAPE | {"model_type": "llama4_text"},
        },
    ],
    "a model that also sees or hears": [
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "vision_config": VISION,
            "text_config": SHAPE | {"model_type": "mistral"},
        },
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "vision_config": VISION,
            "text_config": SHAPE | {"model_type": "qwen3_vl_text"},
        },
        named("Qwen2VLForConditionalGeneration", "qwen2_vl", vision_config=VISION),
        named("Phi4MMForCausalLM", "phi4mm", img_processor={"name": "x"}, auto_map={"AutoConfig": "a.B"}),
    ],
    "a model that also sees": [
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "vision_config": VISION,
            "text_config": SHAPE | {"model_type": "gemma3_text"},
        }
    ],
    "gpt-oss": [named("GptOssForCausalLM", "gpt_oss")],
    "Apertus": [named("ApertusForCausalLM", "apertus")],
    "a mixture of experts whose modules have fixed names": [
        named("Dots1ForCausalLM", "dots1"),
        named("FlexOlmoForCausalLM", "flex_olmo"),
        named("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
    ],
    "EXAONE MoE": [named("ExaoneMoeForCausalLM", "exaone_moe")],
    "ERNIE 4.5 with experts": [named("Ernie4_5_MoeForCausalLM", "ernie4_5_moe")],
    "BLOOM": [named("BloomForCausalLM", "bloom")],
    "MPT": [named("MptForCausalLM", "mpt")],
    "a longrope model beyond the length that it was first trained on": [
        named("Phi3ForCausalLM", "phi3", rope_scaling=LONGROPE, original_max_position_embeddings=4096),
        named("Phi3ForCausalLM", "phi3", rope_scaling=LONGROPE | {"type": "su"}, original_max_position_embeddings=4096),
        named(
            "Phi3ForCausalLM",
            "phi3",
            rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 4096, "rope_theta": 1e4},
        ),
    ],
    "of an unknown type": [named("NextForCausalLM", "of_next_year"), {"architectures": ["LlamaForCausalLM"]}],
    "no language model": [named("CLIPModel", "clip"), named("ViTForImageClassification", "vit")],
    "a model with a window on some of its layers alone": [
        named("Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        named("Qwen2ForCausalLM", "qwen2", sliding_window=64, layer_types=["full_attention", "sliding_attention"]),
        # vLLM would take the second's layers all for full ones, without an error.
        named("Qwen2MoeForCausalLM", "qwen2_moe", use_sliding_window=True, sliding_window=64, max_window_layers=2),
        named("Qwen3ForCausalLM", "qwen3", sliding_window=64, layer_types=["full_attention", "sliding_attention"]),
    ],
    "a model with sparse attention": [
        named("DeepseekV32ForCausalLM", "deepseek_v32", index_topk=2048),
        named("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        named("DeepseekV3ForCausalLM", "deepseek_v3", index_topk=2048),
    ],
    "of a type that was not tried": [
        named("DbrxForCausalLM", "dbrx"),
        named("CodeGenForCausalLM", "codegen"),
    ],
}
"""Name of a row -> files that it refuses."""

ACCEPTED: dict[str, dict[str, Any]] = {
    "Llama": named("LlamaForCausalLM", "llama"),
    "Gemma 3": named("Gemma3ForCausalLM", "gemma3_text", layer_types=["sliding_attention", "full_attention"]),
    "Granite 4, dense": named(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", layer_types=["attention"] * 2, mamba_d_state=128, mamba_n_heads=4
    ),
    "Phi-3": named("Phi3ForCausalLM", "phi3", rope_scaling=None, original_max_position_embeddings=4096),
    "yarn": named("Qwen2ForCausalLM", "qwen2", rope_scaling={"type": "yarn", "original_max_position_embeddings": 4096}),
    "Mixtral": named("MixtralForCausalLM", "mixtral"),
    "Qwen 2, a window that is not used": named(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=64, max_window_layers=1
    ),
    "Qwen 2, a window on all layers": named(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0
    ),
    "Qwen 2, a window beyond the last layer": named(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2
    ),
    "its own code": named("XForCausalLM", "of_next_year", auto_map={"AutoConfig": "a.B"}),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, contents in REFUSED.items() for content in contents])
def test_a_row_refuses_its_models_by_name_for_its_roles_alone(name: str, content: Mapping[str, Any]) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    for role in ROLES:
        found = refusal(ModelFacts(content, longest=4097), role)
        if role not in family.roles:
            assert found is None or name not in found
            continue
        assert found is not None
        assert found.startswith(f"it is {name} (")
        assert f" {role} here: {family.reason.format(transformers=version('transformers'))}; " in found
        assert found.endswith(family.remedies.get(role, family.remedy))


def test_every_row_has_an_example() -> None:
    assert [family.name for family in FAMILIES] == list(REFUSED)


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("role", ROLES)
def test_what_works_is_not_refused(name: str, role: Role) -> None:
    assert refusal(ModelFacts(ACCEPTED[name], longest=100_000), role) is None


def test_the_list_of_tried_types_is_that_of_the_rows() -> None:
    """A type is tried if a row of the table has a language model of it; a row beyond tolerance fails where it is run."""
    models = [model for row in ROWS for model in (row.teacher, row.student)]
    assert {model.model_type for model in models if model.vision is None} == TRIED
    assert all(f"{model.model_type}_text" in TRIED for model in models if model.vision is not None)


def test_a_type_may_have_windows_by_layer_if_its_row_has() -> None:
    from transformers import AutoConfig

    found = set()
    for model in (model for row in ROWS for model in (row.teacher, row.student) if model.vision is None):
        kinds = getattr(AutoConfig.for_model(model.model_type, **model.keys()), "layer_types", None) or []
        if "sliding_attention" in kinds and len(set(kinds)) > 1:
            found.add(model.model_type)
    assert found == WINDOWS_BY_LAYER


@pytest.mark.parametrize("role", ROLES)
def test_a_type_that_was_not_tried_may_be_used_where_the_run_says_so(role: Role) -> None:
    (content, *_) = REFUSED["of a type that was not tried"]
    refused = refusal(ModelFacts(content), role)
    assert (refused is None) == (role == "in-process teacher"), "transformers computes it, which is what others are compared to"
    assert refused is None or "add its model_type to run.untried_models at your own risk" in refused
    assert refusal(ModelFacts(content, untried=["dbrx"]), role) is None
    assert refusal(ModelFacts(REFUSED["a hybrid"][0], untried=["qwen3_next"]), "student") is not None, "it is known to fail"


@pytest.mark.parametrize(("longest", "refused"), [(4096, False), (4097, True)])
def test_a_longrope_model_is_refused_beyond_its_first_length_alone(longest: int, refused: bool) -> None:
    for content in REFUSED["a longrope model beyond the length that it was first trained on"]:
        assert (refusal(ModelFacts(content, longest), "teacher") is not None) is refused


def test_gpt_oss_may_teach() -> None:
    (content,) = REFUSED["gpt-oss"]
    assert refusal(ModelFacts(content), "teacher") is None


def test_gemma_3_as_published_may_teach() -> None:
    (content,) = REFUSED["a model that also sees"]
    assert refusal(ModelFacts(content), "teacher") is None


def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REFUSED["a hybrid"][0]))
    with pytest.raises(ConfigError, match=rf"^student\.model={tmp_path}: it is a hybrid \(qwen3_next\), .*; use a model with"):
        check_family("student.model", "student", str(tmp_path), None, 100)
    check_family("student.model", "student", TinyModel(type="tiny"), None, 100)


@pytest.mark.parametrize("content", ["{", "[]", "", '{"text_config": 3}'])
def test_a_damaged_config_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        check_family("student.model", "student", str(tmp_path), None, 100)
    assert "\n" not in str(caught.value)


def test_facts_are_read_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_next_year", "x": 1}))
    assert read_config(str(tmp_path), None)["x"] == 1


# ---------------------------------------------------------------------------------------------------------- documentation


def rows() -> list[str]:
    """The table as docs/models.md shows it."""
    lines = ["| refused | for example | as | because | instead |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        as_what = "any" if set(family.roles) == set(ROLES) else ", ".join(role for role in ROLES if role in family.roles)
        remedies = [family.remedy, *(f"as {role}: {text}" for role, text in family.remedies.items())]
        reason = family.reason.format(transformers="(as installed)")
        lines.append(f"| {family.name} | {family.examples} | {as_what} | {reason} | {'; '.join(remedies)} |")
    return lines


def test_the_page_shows_the_table() -> None:
    shown = re.search(r"<!-- refused families -->\n(.*?)\n<!-- end -->", DOCS.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == rows(), "docs/models.md and kdray.models.families.FAMILIES differ:\n" + "\n".join(rows())
