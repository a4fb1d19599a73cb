"""Model sources: hub ids and local folders are used as they are; tiny Llamas and pruned models are built on first use.

A built model is an ordinary Hugging Face folder (config, safetensors, tokenizer) that every engine can load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import string
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdray.config import Calibration, ModelSource, PrunedModel, TinyModel, TinyTraining
from kdray.config.plugins import versions_of
from kdray.data.hub import check_model_on_hub
from kdray.errors import DataError
from kdray.models.attention import attention_arguments
from kdray.models.pruning import activation_importance, plan_pruning, prune
from kdray.models.saving import save_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BUILDER_FORMAT = 1
"""Part of the cache key: raise it when the builder gives a different model for the same settings."""

PRUNING_FORMAT = 1
"""The same for pruned models."""

HEAD_SIZE = 32
"""Channels of an attention head."""

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

ALPHABET = "\n" + string.printable[:95]
"""Characters that have an id of their own: printable ASCII (space included) and the line feed."""

_WARMUP_STEPS = 30
_BETAS = (0.9, 0.98)
_HASHED_BYTES = 4096
"""Bytes of each piece of a tensor that the weights' hash reads."""
OnStep = Callable[[int, int], None]
"""(training steps made, steps in all)"""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def task_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer over ALPHABET, one token per character; decoding restores the text exactly.

    Other characters become `<unk>`. No beginning-of-sequence or end-of-sequence token is added.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    # Without a decoder, word-level tokens would be joined with spaces.
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def resolve_model(source: ModelSource, cache: Path, on_step: OnStep | None = None) -> str:
    """Return a hub id or absolute folder that an engine or `from_pretrained` can load.

    A tiny or pruned model is built under `cache` on first use and reused afterwards. Its folder is named by a hash of its
    settings; for a pruned model also of the source's files and the calibration texts, so that a different source gives a
    different model.
    Args: on_step: called before every training step of a tiny model; what it raises ends the training.
    Raises: DataError if a local folder does not exist or holds no model, or texts cannot be read; ConfigError if a source
    cannot be pruned.
    """
    if isinstance(source, PrunedModel):
        origin = resolve_model(source.source, cache, on_step)
        cuts = source.model_dump(mode="json", exclude={"source", "revision"})
        read = None if source.calibration is None else list(calibration_texts(source.calibration))
        settings = json.dumps([PRUNING_FORMAT, cuts, _content(origin, source.revision), read], sort_keys=True)
        folder = Path(cache).absolute() / f"pruned-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
        return str(folder if folder.is_dir() else build_pruned_model(source, origin, folder))
    if isinstance(source, TinyModel):
        folder = Path(cache).absolute() / model_name(source)
        return str(folder if folder.is_dir() else build_tiny_model(source, folder, on_step))
    return located(source, f"model {source[:100]!r}")


def located(source: str, what: str) -> str:
    """Return the absolute path of a model's folder, or the name of one that can only be on the hub.

    Args: what: names the model in messages. Raises: DataError if it can be neither.
    """
    folder = Path(source).expanduser()
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise DataError(f"{what}: {error.strerror}; name another folder") from error
    if is_folder:
        if not (folder / "config.json").is_file():
            raise DataError(f"{what}: the folder has no config.json; name a Hugging Face model folder")
        # Other processes of the run may have a different working directory.
        return str(folder.absolute())
    if folder.exists():
        raise DataError(f"{what} is a file; name the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(source):
        raise DataError(f"{what}: no such folder; name an existing one, or a hub id such as `org/name`")
    return source


def model_name(source: str | TinyModel) -> str:
    """Name of a model wherever it is stored: its hub id, or its folder's name, which identifies a tiny model completely."""
    if isinstance(source, TinyModel):
        # A different version of an installed task counts as a different task.
        installed = sorted(versions_of(source).items())
        parts = [BUILDER_FORMAT, source.model_dump(mode="json"), *([installed] if installed else [])]
        settings = json.dumps(parts, sort_keys=True)
        return f"tiny-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    folder = Path(source).expanduser()
    return folder.absolute().name if folder.is_dir() else source


def recorded_identity(source: ModelSource) -> tuple[str, str | None] | None:
    """Name of a model in a capture, with the hash of its weights if it is a local folder.

    None for a pruned model: a capture names the folder that it was built in.
    """
    if isinstance(source, PrunedModel):
        return None
    return model_name(source), weights_hash(source) if isinstance(source, str) else None


def weights_hash(source: str) -> str | None:
    """Hash of the weights in a local folder (16 hex digits), independent of its name; None for a hub id.

    Name, shape, beginning and middle of every tensor are hashed: this takes a second even for a large model, and training
    changes these bytes in at least one tensor.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    content = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            content.update(json.dumps(header, sort_keys=True).encode())
            for name in sorted(header.keys() - {"__metadata__"}):
                start, end = header[name]["data_offsets"]
                for place in (start, (start + end) // 2):
                    file.seek(8 + size + place)
                    content.update(file.read(min(_HASHED_BYTES, end - place)))
    return content.hexdigest()


def build_tiny_model(source: TinyModel, folder: Path, on_step: OnStep | None = None) -> Path:
    """Build a tiny Llama with float32 weights and its tokenizer in `folder`, and train it if `source.train` is set.

    The folder appears complete or not at all. The same settings give the same weights on the same machine and thread count.
    Args: on_step: as for `resolve_model`.
    Raises: DataError if the folder exists, or the settings are inconsistent.
    """
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: already exists; a tiny model is built in a new folder")
    tokenizer = task_tokenizer()
    if source.vocab_rows is not None and source.vocab_rows < len(tokenizer):
        raise DataError(
            f"vocab_rows={source.vocab_rows} is less than the {len(tokenizer)} tokens of the character tokenizer; "
            "raise or remove it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        model = LlamaForCausalLM(_llama_config(source, tokenizer))
    if source.train is not None:
        _train(model, tokenizer, source, source.train, on_step)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with _whole_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return folder


def build_pruned_model(source: PrunedModel, origin: str, folder: Path) -> Path:
    """Prune `origin` (a folder or hub id, resolved from `source.source`) as `source` describes, into `folder`.

    Weights keep their dtype; tokenizer and generation config are the source's. The folder appears complete or not at all.
    Raises: ConfigError if the source cannot be pruned this way; DataError if the folder exists.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: already exists; a pruned model is built in a new folder")
    # Before the weights are read, which can take minutes.
    plan = plan_pruning(model_config(origin, source.revision), source)
    model = AutoModelForCausalLM.from_pretrained(
        origin,
        revision=source.revision,
        dtype="auto",
        trust_remote_code=False,
        use_safetensors=True,
        **attention_arguments(origin, source.revision),
    )
    tokenizer = AutoTokenizer.from_pretrained(origin, revision=source.revision, trust_remote_code=False)
    importance = None
    if source.calibration is not None:
        texts = calibration_texts(source.calibration)
        ids = (tokenizer(text, verbose=False)["input_ids"][: source.calibration.tokens] for text in texts)
        importance = activation_importance(model, (text for text in ids if text))
    weights = prune(model.state_dict(), plan, importance)
    plan.config.dtype = model.dtype
    model.config = plan.config
    with _whole_folder(folder) as staging:
        save_model(model, staging, weights)
        tokenizer.save_pretrained(staging)
    return folder


def calibration_texts(calibration: Calibration) -> Iterator[str]:
    """Yield the documents that importance is measured on. Raises: DataError if they cannot be read."""
    from kdray.data.pretraining import documents

    found = False
    for text in islice(documents(calibration.source, 0, "model.calibration.source"), calibration.documents):
        found = found or bool(text)
        yield text
    if not found:
        raise DataError("model.calibration.source: no document with a token in it")


def model_config(source: str | TinyModel, revision: str | None) -> Any:
    """Hugging Face config of a model; a tiny model need not have been built."""
    if isinstance(source, TinyModel):
        return _llama_config(source, task_tokenizer())
    from transformers import AutoConfig

    folder = resolve_model(source, Path())
    check_model_on_hub(folder, revision)
    return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)


def hub_commit(name: str, revision: str | None) -> str | None:
    """Commit of a model of the hub whose config this machine has loaded; None if its cache does not have it.

    Transformers' configs no longer tell it (5.19). Args: revision: commit or tag; None is the default branch.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _content(origin: str, revision: str | None) -> str:
    """Identity of a model's content: a hash of a folder's files, or the hub id with its commit."""
    folder = Path(origin)
    if not folder.is_dir():
        model_config(origin, revision)
        return f"{origin}@{hub_commit(origin, revision)}"
    hashes = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(hashes)


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to that is renamed to `folder` at the end of the block, or deleted if the block fails."""
    # Built next to its final place, on the same file system, so that the rename is atomic.
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.rename(folder)
    except OSError:
        # Another process may have built the same model meanwhile; its result is equivalent.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _llama_config(source: TinyModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import LlamaConfig

    heads = source.width // HEAD_SIZE
    return LlamaConfig(
        vocab_size=source.vocab_rows or len(tokenizer),
        hidden_size=source.width,
        intermediate_size=2 * source.width,
        num_hidden_layers=source.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=source.max_positions,
        tie_word_embeddings=source.tie_embeddings,
        # A narrow model needs a larger initial scale than the 0.02 of large ones.
        initializer_range=source.width**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    source: TinyModel,
    train: TinyTraining,
    on_step: OnStep | None,
) -> None:
    """Train in place on fresh supervised examples in every step; only the answer and <eos> count in the loss."""
    import numpy as np
    import torch

    from kdray.data.tasks import lesson, shares

    rng = np.random.default_rng([source.seed, train.difficulty])
    tasks = [lesson(name) for name in train.tasks]
    if train.weights is None:
        chosen = [tasks[index % len(tasks)] for index in range(train.batch_size)]
    else:
        counts = shares(train.batch_size, [train.weights.get(name, 0.0) for name in train.tasks])
        chosen = [task for task, count in zip(tasks, counts, strict=True) for _ in range(count)]
    warmup = min(_WARMUP_STEPS, train.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, betas=_BETAS, weight_decay=0.0)

    def share_of_peak(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, train.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    model.train()
    for step in range(train.steps):
        if on_step is not None:
            on_step(step, train.steps)
        examples = [task.generate(rng, train.difficulty) for task in chosen]
        prompts = tokenizer([example.prompt for example in examples])["input_ids"]
        answers = tokenizer([example.answer for example in examples])["input_ids"]
        rows = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        if longest > source.max_positions:
            raise DataError(
                f"max_positions={source.max_positions} is less than the {longest} tokens of an example of "
                f"{', '.join(train.tasks)} at difficulty {train.difficulty}; raise it or lower the difficulty"
            )
        token_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)  # [batch, seq]
        targets = torch.full((len(rows), longest), -100)  # [batch, seq]; -100 is ignored by the loss
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            token_ids[index, : len(row)] = torch.tensor(row)
            targets[index, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
        # Padding is on the right of a causal model: real tokens never attend to it, so no attention mask is needed.
        hidden = model.model(token_ids, use_cache=False).last_hidden_state[:, :-1]  # [batch, seq - 1, width]
        counted = targets[:, 1:] >= 0
        logits = model.lm_head(hidden[counted])  # [answer tokens, vocab]
        loss = torch.nn.functional.cross_entropy(logits, targets[:, 1:][counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
