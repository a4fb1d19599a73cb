"""Facts about a model that are read without its weights: tokenizer, vocabulary rows, positions, depth, description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdray.config import Config, ModelSource, PrunedModel, TinyModel
from kdray.data.hub import check_model_on_hub
from kdray.errors import ConfigError, DataError
from kdray.models.pruning import plan_pruning
from kdray.models.resolve import calibration_texts, located, model_config, resolve_model, task_tokenizer
from kdray.models.safetensors_check import check_weights


def origin(source: ModelSource, revision: str | None) -> tuple[str | TinyModel, str | None]:
    """Model and revision that provide tokenizer and generation config: the source of a pruned model, else the model."""
    if not isinstance(source, PrunedModel):
        return source, revision
    if revision is not None:
        raise ConfigError(f"revision={revision}: a pruned model is built here; set model.revision, that of its source")
    return source.source, source.revision


def check_source(setting: str, source: ModelSource, revision: str | None) -> None:
    """Check that a model is a folder here, or on the hub. Nothing is looked for where it is built from its settings.

    Args: setting: that names the model. Raises: ConfigError or DataError with setting, value and remedy.
    """
    if isinstance(source, PrunedModel):
        check_source(f"{setting}.source", source.source, source.revision)
    elif isinstance(source, str):
        check_model_on_hub(located(source, f"{setting}={source:.100}"), revision, setting)


def load_tokenizer(source: ModelSource, revision: str | None) -> Any:
    """Load the tokenizer of a model source. Raises: ConfigError if it cannot be loaded."""
    source, revision = origin(source, revision)
    if isinstance(source, TinyModel):
        return task_tokenizer()
    from transformers import AutoTokenizer

    source = resolve_model(source, Path())
    check_model_on_hub(source, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    # The libraries raise arbitrary errors on malformed files, and have no base class for them.
    except Exception as error:
        raise _unloadable(f"model {source}: no tokenizer could be loaded", error) from error


def student_tokenizer(config: Config) -> Any:
    """Load the student's tokenizer, with the chat template of `data.chat_template_file` if there is one.

    Raises: ConfigError if it cannot be loaded; DataError if the file cannot be read.
    """
    tokenizer = load_tokenizer(config.student.model, config.student.revision)
    template = chat_template_text(config)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def chat_template_text(config: Config) -> str | None:
    """Content of `data.chat_template_file`; None if it is not set. Raises: DataError if it cannot be read."""
    path = config.data.chat_template_file
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template_file={path}: cannot be read: {error}; name a text file with a template") from error
    if not text.strip():
        raise DataError(f"data.chat_template_file={path}: is empty; write a template into it, or remove the setting")
    return text


def _unloadable(what: str, error: Exception) -> ConfigError:
    if "trust_remote_code" in str(error):
        # The library's own message advises trust_remote_code=True, which kdray never sets.
        return ConfigError(
            f"{what}: it needs its own code, which is never run here (trust_remote_code stays off); use a model "
            "whose architecture and tokenizer transformers has"
        )
    return ConfigError(f"{what}: {str(error).strip() or repr(error)}; restore the folder, or name another model")


def shape(source: ModelSource, revision: str | None) -> tuple[int, int | None]:
    """(vocabulary rows, maximum positions or None); for a pruned model, also check that its source can be cut that way."""
    if isinstance(source, PrunedModel):
        found = shape(*origin(source, revision))
        plan_pruning(model_config(source.source, source.revision), source)
        if source.calibration is not None:
            for _ in calibration_texts(source.calibration):
                pass
        return found
    if isinstance(source, TinyModel):
        tokens = len(task_tokenizer())
        if source.vocab_rows is not None and source.vocab_rows < tokens:
            raise ConfigError(f"vocab_rows={source.vocab_rows}: the task tokenizer has {tokens} tokens; use at least that")
        return source.vocab_rows or tokens, source.max_positions
    from transformers import AutoConfig

    source = resolve_model(source, Path())
    check_model_on_hub(source, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False).get_text_config()
    # See load_tokenizer.
    except Exception as error:
        raise _unloadable(f"model {source}: no config could be loaded", error) from error
    if getattr(config, "vocab_size", None) is None:
        raise ConfigError(f"model {source}: a {config.model_type} is no language model (its config has no vocab_size)")
    if Path(source).is_dir():
        check_weights(Path(source))
    return int(config.vocab_size), getattr(config, "max_position_embeddings", None)


def architecture(source: ModelSource, revision: str | None) -> Any:
    """Hugging Face config of a model; a tiny or pruned one need not have been built."""
    if isinstance(source, PrunedModel):
        return plan_pruning(model_config(source.source, source.revision), source).config
    return model_config(source, revision)


def depth(source: ModelSource, revision: str | None) -> int:
    """Number of layers of a model whose `shape` could be read."""
    return int(architecture(source, revision).get_text_config().num_hidden_layers)


def loaded_from(source: ModelSource) -> str | None:
    """Folder or hub id of a model, or of the model that it is cut from; None if it is built from its settings alone."""
    named = source.source if isinstance(source, PrunedModel) else source
    return named if isinstance(named, str) else None


def describe(source: ModelSource) -> str:
    """A model in a few words, for the user."""
    if isinstance(source, str):
        return source
    if isinstance(source, PrunedModel):
        before = model_config(source.source, source.revision)
        plan = plan_pruning(before, source)
        return (
            f"cut from {describe(source.source)}: layers {', '.join(map(str, plan.layers))} of {before.num_hidden_layers}, "
            f"{plan.neurons} of {before.intermediate_size} neurons, {plan.groups} of {plan.source_groups} key-value heads"
        )
    trained = f", trained {source.train.steps} steps on {', '.join(source.train.tasks)}" if source.train else ""
    return f"tiny, {source.layers} layers of {source.width}{trained}"


def decoder(tokenizer: Any) -> Callable[[np.ndarray], str]:
    def decode(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    return decode
