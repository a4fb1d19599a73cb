"""Pairs of real architectures, tiny and random, that the exactness trial is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.serving.spec import EngineSpec
from kdray.models.quantization import quantize
from kdray.models.random_models import EOS, VOCAB, RandomModel
from tests.support.quantised_files import METHODS, write_quantised

TOLERANCE = 1e-4
"""Nats a token, float32 on both sides."""
HALF = 0.3
"""With an engine in bfloat16, whose rounding is about 0.01 on average and 0.1 at most."""
ROUTED = 1e-2
"""With a router: where two experts are nearly tied, rounding chooses between them."""


@dataclass(frozen=True)
class Family:
    """A pair of models to be tried."""

    name: str
    teacher: RandomModel
    student: RandomModel
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the engine's spec."""
    tolerance: float = TOLERANCE
    quantised: str | None = None
    """Method by which the teacher's weights are quantised (`kdray.models.quantization`, `tests.support.quantised_files`)."""

    def reference(self, folder: Path) -> Path | None:
        """Folder of the teacher's weights for transformers, after `spec`; None if it loads the engine's own files."""
        return folder / "rounded" if self.quantised in METHODS else None

    def spec(self, folder: Path) -> EngineSpec:
        """Write both models into a folder; returns the spec of their engine."""
        teacher = self.teacher.write(folder / "teacher")
        if self.quantised is not None:
            if self.quantised in METHODS:
                write_quantised(teacher, self.quantised, folder / "quantised", folder / "rounded")
            else:
                quantize(teacher, folder / "quantised", self.quantised, group_size=32)
            teacher = folder / "quantised"
        given: dict[str, Any] = {
            "role": "mixture",
            "model": str(teacher),
            "student": str(self.student.write(folder / "student")),
            "vocab_size": VOCAB,
            "stop_ids": (EOS,),
            "max_model_len": 200,
            "teacher": "t",
            "teacher_top_k": 16,
            "student_top_k": 8,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 8,
        }
        return EngineSpec(**given | dict(self.engine))


_LAYERS = (3, 2)
_MIXED = ("sliding_attention", "full_attention", "sliding_attention")
"""Windows on some layers only, as large models have them; by default so few layers would all have one."""


def _of(
    name: str, model_type: str, tied: bool = False, tolerance: float = TOLERANCE, kinds: tuple[str, ...] = (), **config: Any
) -> Family:
    """A pair of one architecture. Args: kinds: of attention, by layer; config: keys of both configs."""
    large, small = (config | ({"layer_types": list(kinds[:layers])} if kinds else {}) for layers in _LAYERS)
    return Family(
        name,
        RandomModel(model_type, 128, _LAYERS[0], large, rows=VOCAB + 32, tied=tied, seed=1),
        RandomModel(model_type, 64, _LAYERS[1], small, tied=tied, seed=2),
        tolerance=tolerance,
    )


def _experts(**other: Any) -> dict[str, Any]:
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1} | other


QWEN2 = RandomModel("qwen2", 64, 2, seed=2)


def _teaching(name: str, model_type: str, **config: Any) -> Family:
    """A teacher whose architecture cannot be a student."""
    return Family(f"{name} > Qwen 2", RandomModel(model_type, 128, 3, config, seed=1), QWEN2, tolerance=ROUTED)


_DERIVED: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None}
"""Of families that have other names for them, or none."""
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_GRANITE4: dict[str, Any] = {
    "num_local_experts": 0,
    "shared_intermediate_size": 128,
    "position_embedding_type": "rope",
    "attention_multiplier": 0.1,
}
_GEMMA4: dict[str, Any] = {"sliding_window": 32, "global_head_dim": 64}
_GEMMA3: dict[str, Any] = {"sliding_window": 32, "query_pre_attn_scalar": 32}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: tuple[Family, ...] = (
    _of("Qwen 2 / 2.5", "qwen2", tied=True),
    _of("Qwen 2, a window on all layers", "qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=0),
    _of("Qwen 3", "qwen3"),
    Family("Qwen 3 MoE > Qwen 3", RandomModel("qwen3_moe", 128, 3, _experts(), seed=1), RandomModel("qwen3", seed=2)),
    _of("Qwen 3 MoE", "qwen3_moe", tolerance=ROUTED, **_experts()),
    _of("Qwen 2 MoE", "qwen2_moe", tolerance=ROUTED, **_experts(shared_expert_intermediate_size=64)),
    _of("Llama 2", "llama", num_key_value_heads=2),
    _of(
        "Llama 3",
        "llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    Family(
        "Llama, several files and an index",
        RandomModel("llama", 128, 3, seed=1, file_size="300KB"),
        RandomModel("llama", 64, 2, seed=2, file_size="100KB"),
    ),
    Family(
        "Llama, files in bfloat16",
        RandomModel("llama", 128, 3, seed=1, dtype="bfloat16"),
        RandomModel("llama", 64, 2, seed=2, dtype="bfloat16"),
    ),
    Family("Qwen 2 > Llama", RandomModel("qwen2", 128, 3, rows=VOCAB + 32, seed=1), RandomModel("llama", seed=2)),
    _of("Mistral, equal windows", "mistral", sliding_window=32),
    Family(
        "Mistral, window only of the teacher",
        RandomModel("mistral", 128, 3, {"sliding_window": 32}, seed=1),
        RandomModel("mistral", 64, 2, {"sliding_window": None}, seed=2),
    ),
    Family(
        "Mistral, window only of the student",
        RandomModel("mistral", 128, 3, {"sliding_window": None}, seed=1),
        RandomModel("mistral", 64, 2, {"sliding_window": 32}, seed=2),
    ),
    _of("Mixtral", "mixtral", tolerance=ROUTED, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    _of("Ministral", "ministral", kinds=_MIXED, sliding_window=32),
    _of("Gemma", "gemma", tied=True),
    _of("Gemma 2", "gemma2", tied=True, sliding_window=32, attn_logit_softcapping=2.0, query_pre_attn_scalar=32),
    _of("Gemma 3", "gemma3_text", tied=True, kinds=_MIXED, **_GEMMA3),
    _of("Phi 1 / 2", "phi", num_key_value_heads=None),
    _of("Phi 3", "phi3", sliding_window=None),
    _of(
        "Phi 3.5 / Phi-4-mini (longrope), within their first length",
        "phi3",
        tied=True,
        sliding_window=None,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0 + 0.05 * place for place in range(12)], "long_factor": [2.0 + place for place in range(12)],
        },
    ),
    _of("OLMo", "olmo"),
    _of("OLMo 2", "olmo2"),
    _of("OLMo 3", "olmo3", kinds=_MIXED, sliding_window=32),
    _of("OLMoE", "olmoe", tolerance=ROUTED, num_experts=8, num_experts_per_tok=2),
    _of("Granite", "granite", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.1),
    _of("Granite MoE", "granitemoe", tolerance=ROUTED, num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.1),
    _of("GLM 4 (9B)", "glm"),
    _of("GLM 4 (0414)", "glm4"),
    _of("GLM 4 MoE", "glm4_moe", tolerance=ROUTED, **_experts(n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1)),
    _of("Cohere", "cohere", tied=True, logit_scale=0.5),
    _of("Cohere 2", "cohere2", tied=True, kinds=_MIXED, logit_scale=0.5, sliding_window=32),
    _of("GPT-NeoX", "gpt_neox", num_key_value_heads=None, head_dim=None),
    _of("GPT-2", "gpt2", tied=True),
    _of("SmolLM 3", "smollm3"),
    _teaching("gpt-oss", "gpt_oss", num_local_experts=8, num_experts_per_tok=2, sliding_window=32),
    _of("DeepSeek V2", "deepseek_v2", tolerance=ROUTED, topk_method="group_limited_greedy", **_LATENT),
    _of("DeepSeek V3", "deepseek_v3", tolerance=ROUTED, topk_method="noaux_tc", scoring_func="sigmoid", **_LATENT),
    _of("OPT", "opt", ffn_dim=128, word_embed_proj_dim=None, num_key_value_heads=None, head_dim=None),
    _of("StableLM", "stablelm"),
    _of("StarCoder 2", "starcoder2", sliding_window=None),
    _of("Seed-OSS", "seed_oss"),
    _of("HunYuan", "hunyuan_v1_dense"),
    _of("Arcee", "arcee"),
    _of("Exaone 4", "exaone4", kinds=_MIXED, sliding_window=32),
    _of("Ernie 4.5", "ernie4_5"),
    _of("Nemotron", "nemotron"),
    _of("Falcon", "falcon", tied=True, **_DERIVED),
    _of("Falcon 40B", "falcon", tied=True, new_decoder_architecture=True, num_kv_heads=1, **_DERIVED),
    _of("Falcon RW", "falcon", tied=True, alibi=True, multi_query=False, parallel_attn=False, bias=True, **_DERIVED),
    _of("GPT-J", "gptj", rotary_dim=16, **_DERIVED),
    _of("GPT-BigCode", "gpt_bigcode", tied=True, **_DERIVED),
    _teaching(
        "dots.llm1", "dots1", sliding_window=None, **_experts(n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1)
    ),
    _teaching("Exaone MoE", "exaone_moe", layer_types=list(_MIXED), sliding_window=32, **_experts(num_shared_experts=1)),
    _of("Granite 4, dense", "granitemoehybrid", kinds=("attention",) * 3, **_GRANITE4),
    _of("Ministral 3", "ministral3"),
    _teaching("HunYuan MoE", "hunyuan_v1_moe", num_experts=8, moe_topk=2),
    _of("GLM 4.7 Flash", "glm4_moe_lite", tolerance=ROUTED, **_LATENT),
    _teaching("FlexOlmo", "flex_olmo", num_experts=8, num_experts_per_tok=2),
    _of("Gemma 4", "gemma4_text", tied=True, hidden_size_per_layer_input=0, **_GEMMA4),
    _of(
        "Gemma 4, experts", "gemma4_text", tied=True, tolerance=ROUTED, hidden_size_per_layer_input=0, enable_moe_block=True,
        num_experts=8, top_k_experts=2, moe_intermediate_size=64, **_GEMMA4,
    ),
    _of(
        "Gemma 4, embeddings by layer", "gemma4_text", tied=True, hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB + 32, **_GEMMA4,
    ),
    _teaching("Apertus", "apertus"),
    Family(
        "Gemma 3 that also sees > Gemma 3",
        RandomModel("gemma3", 128, 3, _GEMMA3 | {"layer_types": list(_MIXED)}, tied=True, seed=1, vision=_VISION),
        RandomModel("gemma3_text", 64, 2, _GEMMA3 | {"layer_types": list(_MIXED[:2])}, tied=True, seed=2),
    ),
    # vLLM's CPU build computes int4 in bfloat16 alone.
    Family("Qwen 2, int4 teacher", RandomModel("qwen2", 128, 3, seed=1), QWEN2, {"dtype": "bfloat16"}, HALF, "int4"),
    *(
        Family(f"Qwen 2, {method} teacher", RandomModel("qwen2", 128, 3, seed=1), QWEN2, {"dtype": "bfloat16"}, HALF, method)
        for method in METHODS
    ),
)  # fmt: skip


def family(name: str) -> Family:
    (found,) = (each for each in FAMILIES if each.name == name)
    return found


def students_own(pair: Family, **config: Any) -> Family:
    """The pair with other keys of the student's config."""
    return replace(pair, student=replace(pair.student, config=dict(pair.student.config) | config))
