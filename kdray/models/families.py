"""Model families that cannot be a teacher or a student here: which, why, and what to do instead, from config.json alone.

One table, `FAMILIES`; the first row that matches a model refuses it. To refuse another family, or to support one, edit the
table: docs/models.md shows it, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from kdray.config import ModelSource, TinyModel
from kdray.data.hub import check_model_on_hub
from kdray.errors import ConfigError
from kdray.models.inspect import origin
from kdray.models.resolve import resolve_model

Role = Literal["teacher", "student", "in-process teacher"]
"""`teacher`: in vLLM replicas. `student`: in vLLM replicas and in the ranks. `in-process teacher`: by transformers alone."""

SERVED: frozenset[Role] = frozenset(("teacher", "student"))
EVERY: frozenset[Role] = frozenset(("teacher", "student", "in-process teacher"))
STUDENT: frozenset[Role] = frozenset(("student",))

_ELSEWHERE = "serve such a teacher with a vLLM server of its own, and name that as a teacher of type openai"


@dataclass(frozen=True)
class ModelFacts:
    """Content of a model's config.json, and the longest sequence that the run needs."""

    content: Mapping[str, Any]
    longest: int = 0
    """Tokens."""
    untried: Collection[str] = ()
    """Model types that the run may use although none of them was tried."""

    @property
    def text(self) -> Mapping[str, Any]:
        """The part that describes the language model."""
        nested = self.content.get("text_config")
        return nested if isinstance(nested, Mapping) else self.content

    @property
    def types(self) -> set[str]:
        """Model types of the whole and of its language model."""
        return {str(part["model_type"]) for part in (self.content, self.text) if "model_type" in part}

    @property
    def language_type(self) -> str:
        """Model type of the language model."""
        return str(self.text.get("model_type", self.content.get("model_type", "")))

    @property
    def architecture(self) -> str:
        names = self.content.get("architectures") or [""]
        return str(names[0])

    @property
    def rope(self) -> Mapping[str, Any]:
        """Scaling of the rotary embedding, under its present or its earlier name."""
        return self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    name: str
    """Short name, with an article where the sentence needs one."""
    examples: str
    """Models that users know."""
    roles: frozenset[Role]
    """Roles that the family cannot have."""
    matches: Callable[[ModelFacts], bool]
    reason: str
    remedy: str
    remedies: Mapping[Role, str] = field(default_factory=dict)
    """Remedies of single roles, in place of the general one."""


_HYBRID_TYPES = frozenset(
    {
        "bailing_hybrid",
        "bailing_moe_linear",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "glm5_next",
        "glm5_next_text",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "minimax",
        "minimax_text_01",
        "nemotron_h",
        "olmo_hybrid",
        "plamo2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "zamba",
        "zamba2",
    }
)
_RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "m")
_ENCODER_DECODER_TYPES = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "encoder-decoder",
        "fsmt",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "mvp",
        "nllb-moe",
        "pegasus",
        "plbart",
        "prophetnet",
        "speech_to_text",
        "switch_transformers",
        "t5",
        "t5gemma",
        "udop",
        "umt5",
        "whisper",
    }
)
_SENSES = ("vision_config", "audio_config", "img_processor", "audio_processor", "vision_tower", "mm_vision_tower")
_TEXT_OF_WHOLE = frozenset(("Gemma3ForConditionalGeneration",))
"""Architectures that also see, of which an engine holds the language model alone."""


def _is_hybrid(model: ModelFacts) -> bool:
    layers = model.text.get("layer_types") or model.text.get("layers_block_type")
    if isinstance(layers, list):
        # Granite 4 has one architecture for hybrids and for plain decoders, which state sizes of layers they do not have.
        return any(str(layer).lower() in _RECURRENT_LAYERS for layer in layers)
    return bool(model.types & _HYBRID_TYPES) or any(key.startswith(("mamba_", "ssm_")) for key in model.text)


def _is_encoder_decoder(model: ModelFacts) -> bool:
    return bool(model.content.get("is_encoder_decoder")) or bool(model.types & _ENCODER_DECODER_TYPES)


def _is_chunked(model: ModelFacts) -> bool:
    return bool(model.types & {"llama4", "llama4_text"}) or bool(model.text.get("attention_chunk_size"))


def _has_senses(model: ModelFacts) -> bool:
    return any(model.content.get(key) is not None for key in _SENSES)


def _is_longer_than_rope(model: ModelFacts) -> bool:
    if model.rope.get("type", model.rope.get("rope_type")) not in ("longrope", "su"):
        return False
    trained = model.rope.get("original_max_position_embeddings") or model.text.get("original_max_position_embeddings")
    return trained is not None and model.longest > int(trained)


def _windows_differ(model: ModelFacts) -> bool:
    if model.language_type in WINDOWS_BY_LAYER:
        return False
    kinds = model.text.get("layer_types")
    if isinstance(kinds, list):
        return "sliding_attention" in kinds and len(set(kinds)) > 1
    # Of Qwen 2 and its kin, whose older files state the layers by number: the first full ones, or every other of the first.
    if not (model.text.get("use_sliding_window") and model.text.get("sliding_window")):
        return False
    first, layers = int(model.text.get("max_window_layers", 28)), int(model.text.get("num_hidden_layers") or 0)
    return 0 < first < (layers if model.language_type != "qwen2_moe" else math.inf)


def _is_untried(model: ModelFacts) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = model.language_type
    return kind in CONFIG_MAPPING_NAMES and kind not in TRIED and kind not in model.untried


def _is_unknown(model: ModelFacts) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # A type that needs code of its own is refused where its config is loaded, in words about that.
    return not model.types & set(CONFIG_MAPPING_NAMES) and "auto_map" not in model.content


def _is_no_language_model(model: ModelFacts) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(model.content.get("model_type", ""))
    return kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


TRIED: frozenset[str] = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "exaone4",
        "exaone_moe",
        "falcon",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Types of language models that have a row in the table of docs/models.md, which tests compare with this list."""
WINDOWS_BY_LAYER: frozenset[str] = frozenset(
    {"cohere2", "exaone4", "exaone_moe", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "ministral", "olmo3"}
)
"""Types of which a row has windows on some layers alone; vLLM's code of others may have one for all."""

FAMILIES: tuple[Family, ...] = (
    Family(
        "an encoder-decoder",
        "T5, BART, Whisper",
        EVERY,
        _is_encoder_decoder,
        "a rollout is one sequence of prompt and response, and this model reads the prompt apart",
        "use a decoder-only model",
    ),
    Family(
        "a hybrid",
        "Qwen3-Next, Qwen3.5, Falcon-H1, Granite-4-H, LFM2, Nemotron-H, Jamba, Mamba",
        SERVED,
        _is_hybrid,
        "some of its layers keep a recurrent state, for which the engine of teacher and student reserves no memory",
        "use a model with attention in every layer, of the same vocabulary",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "a model with chunked attention",
        "Llama 4",
        SERVED,
        _is_chunked,
        "vLLM cannot group its chunked layers with another model's in one key-value cache",
        "use a Llama 3 model",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "a model that also sees or hears",
        "Mistral 3 (Mistral-Small-3.x), Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Llama 3.2 Vision, Gemma 3n, Gemma 4 as published, "
        "InternVL, LLaVA, Phi-4-multimodal",
        EVERY,
        lambda model: _has_senses(model) and model.architecture not in _TEXT_OF_WHOLE,
        "its language model is not built without the rest",
        "save the language model in a folder of its own, or use a text model of the family",
    ),
    Family(
        "a model that also sees",
        "Gemma 3 4B, 12B and 27B as published",
        STUDENT,
        _has_senses,
        "training, export and updates would be of the whole model, and the replicas hold its language model alone",
        "save the language model in a folder of its own (Gemma3ForCausalLM), and name that",
    ),
    Family(
        "gpt-oss",
        "gpt-oss-20b, gpt-oss-120b",
        STUDENT,
        lambda model: "gpt_oss" in model.types,
        "vLLM's loader of its experts and attention sinks does not take weights again, so replicas would sample from old ones",
        "use it as a teacher, and a dense student of the same vocabulary",
    ),
    Family(
        "Apertus",
        "Apertus-8B, Apertus-70B",
        STUDENT,
        lambda model: "apertus" in model.types,
        "vLLM rounds the trained constants of its activation (xIELU) to bfloat16, so replicas would sample from another model "
        "than the ranks train",
        "use it as a teacher, and another student",
    ),
    Family(
        "a mixture of experts whose modules have fixed names",
        "dots.llm1, HunYuan-A13B, FlexOlmo",
        STUDENT,
        lambda model: bool(model.types & {"dots1", "flex_olmo", "hunyuan_v1_moe"}),
        "vLLM's code gives its layers the same names wherever they are, so that they cannot be told from the teacher's",
        "use it as a teacher, and another student",
    ),
    Family(
        "EXAONE MoE",
        "K-EXAONE",
        STUDENT,
        lambda model: "exaone_moe" in model.types,
        "vLLM's loader of its experts does not take weights again",
        "use it as a teacher, and another student",
    ),
    Family(
        "ERNIE 4.5 with experts",
        "ERNIE-4.5-21B-A3B",
        SERVED,
        lambda model: "ernie4_5_moe" in model.types,
        "vLLM's CPU build leaves out its router's correction, and sends tokens to other experts than transformers; on GPUs it "
        "was not run",
        "use a dense ERNIE 4.5, or another model",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "BLOOM",
        "BLOOM, BLOOMZ",
        SERVED,
        lambda model: "bloom" in model.types,
        "vLLM computes its activation (GELU) exactly, and transformers by the approximation that it was trained with",
        "use another model",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "MPT",
        "MPT-7B, MPT-30B",
        SERVED,
        lambda model: "mpt" in model.types,
        "vLLM has dropped it (0.28)",
        "use another model",
    ),
    Family(
        "a longrope model beyond the length that it was first trained on",
        "Phi-3.5, Phi-4-mini with sequences of more than 4096 tokens",
        SERVED,
        _is_longer_than_rope,
        "vLLM then scales every sequence by the long factors, and transformers only sequences that are longer",
        "lower data.max_prompt_tokens or rollout.max_new_tokens, so that together they stay within "
        "original_max_position_embeddings of config.json",
    ),
    Family(
        "of an unknown type",
        "models newer than the installed transformers",
        EVERY,
        _is_unknown,
        "the installed transformers {transformers} has no model of this type",
        "install kdray with a transformers that has it, or use another model",
    ),
    Family(
        "no language model",
        "encoders, image models",
        EVERY,
        _is_no_language_model,
        "transformers {transformers} has no decoder of this type that predicts the next token",
        "use a decoder-only language model",
    ),
    Family(
        "a model with a window on some of its layers alone",
        "Qwen2.5 with use_sliding_window and max_window_layers below its number of layers",
        SERVED,
        _windows_differ,
        "vLLM's code of its type has one window for all layers",
        "set use_sliding_window to false in its config.json where sequences stay within sliding_window, or use another model",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "a model with sparse attention",
        "DeepSeek V3.2, GLM-5",
        SERVED,
        lambda model: bool(model.types & {"deepseek_v32", "glm_moe_dsa"}) or model.text.get("index_topk") is not None,
        "vLLM's kernels of its indexer, which chooses the tokens to attend to, are for GPUs alone, and nobody has compared "
        "them with transformers here",
        "use a model with attention to every token",
        {"teacher": _ELSEWHERE},
    ),
    Family(
        "of a type that was not tried",
        "decoders without a row in the table of docs/models.md",
        SERVED,
        _is_untried,
        "nobody has compared what vLLM computes for it with transformers here, and a difference may show nowhere",
        "use a model of a type in docs/models.md, or add its model_type to run.untried_models at your own risk: a student is "
        "still compared with the replicas at the start and after every update, a teacher with nothing",
    ),
)
"""Refused families, most specific first."""


def check_family(
    setting: str, role: Role, source: ModelSource, revision: str | None, longest: int, untried: Collection[str] = ()
) -> None:
    """Check that a model's family can have a role. Reads config.json alone.

    Args: setting: that names the model; longest: tokens of the longest sequence; untried: model types that the run may use
    although none of them was tried.
    Raises: ConfigError with the family, the reason and the remedy.
    """
    named, revision = origin(source, revision)
    if isinstance(named, TinyModel):
        return
    model = ModelFacts(read_config(resolve_model(named, Path()), revision), longest, untried)
    found = refusal(model, role)
    if found is not None:
        raise ConfigError(f"{setting}={named}: {found}")


def refusal(model: ModelFacts, role: Role) -> str | None:
    """Sentence that refuses a model for a role; None if no row of the table does."""
    for family in FAMILIES:
        if role in family.roles and family.matches(model):
            types = "/".join(sorted(model.types)) or "a config without model_type"
            article = "an" if role.startswith("in") else "a"
            reason = family.reason.format(transformers=version("transformers"))
            return (
                f"it is {family.name} ({types}), which cannot be {article} {role} here: {reason}; "
                f"{family.remedies.get(role, family.remedy)}"
            )
    return None


def read_config(model: str, revision: str | None) -> dict[str, Any]:
    """Content of config.json, whether or not transformers knows the architecture. Raises: ConfigError if it cannot be read.

    Args: model: folder or hub id.
    """
    from transformers import PreTrainedConfig

    check_model_on_hub(model, revision)
    try:
        content: Any = PreTrainedConfig.get_config_dict(model, revision=revision)[0]
    # The library raises errors of many types for what it cannot find or read; they all mean this.
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"model {model}: no config could be loaded: {first}; restore the folder, or name another model"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"model {model}: config.json holds no settings by name; restore the folder, or name another model")
    return content
