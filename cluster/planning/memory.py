"""Memory of a replica and of a student rank, by component, estimated before anything is started.

Exact: weights, KV cache and optimizer states, which follow from shapes. Counted: the tensors of a loss, and the rows that an
engine draws and scores. Modelled: activations (the tensors that a Llama-like layer keeps for its backward pass, with fused
attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdray.config import LossSettings, RolloutSettings, TrainingSettings
from kdray.models.tensor_parallel import num_kv_heads
from kdray.models.weight_format import WeightFormat

GIB = 2**30
_FLOAT32 = 4
# Most rows that an engine's recorder draws or measures at once; as many response tokens are scored at once, however few run.
MEASURED_ROWS = 256
# Float32 rows of the vocabulary alive at once for each token whose loss is computed. Of a chunk: products of the head, their
# log-softmax, its gradient and what the loss makes in between; of a whole micro-batch, also copies of the logits by autograd.
_CHUNK_ROWS, _CHUNK_ROWS_HIDDEN, _WHOLE_ROWS = 4.25, 13.0, 6.0
# Of a chunk whose logits autograd goes through: for log q of the tokens alone, and for whole sorted rows.
_CHUNK_ROWS_OF_TOKENS, _CHUNK_ROWS_BY_LOGITS = 5.0, 9.25
# Rows of a chunk that take half as much in half precision: products and their gradient.
_HALF_ROWS = 1.5
# Bytes of an id of the support for each token: id and log p, and for a loss over buckets what it makes of them.
_SLOT, _SLOT_OF_BUCKETS = 12, 35
# Memory of a process before any model is loaded: libraries, CUDA context or allocator.
ENGINE_BASE_BYTES = {"GPU": 1 * GIB, "CPU": 2 * GIB}


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder that determine its memory and speed."""

    parameters: int
    layers: int
    hidden: int
    kv_channels: int
    """Key (or value) channels of a layer in a forward pass: number of key-value heads x head size."""
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    latent: int | None = None
    """Numbers that a layer caches for each token in place of keys and values (multi-head latent attention); None without it."""
    quantised: int = 0
    """Parameters whose weights are quantised."""
    quantised_bytes: float = 0.0
    """Bytes of each of those, with its share of a scale."""
    adapter: int | None = None
    """Parameters of low-rank adapters, which alone are trained; None trains all of the model's."""
    adapted: int | None = None
    """Parameters of the model that the adapters change; None changes all."""

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read the shape from a Hugging Face config; parameters are counted on a model without weights.

        Args: config: from `kdray.models.resolve.model_config`.
        """
        import torch
        from transformers import AutoModelForCausalLM

        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads = int(text.num_attention_heads)
        kv_heads = num_kv_heads(text)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        rank = getattr(text, "kv_lora_rank", None)
        if rank is not None:
            head_dim = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        form = WeightFormat.of(config)
        # Embeddings, output head and norms keep their dtype.
        linear = sum(
            p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name and "head" not in name
        )
        return cls(
            # Tied weights count as one parameter.
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            kv_channels=kv_heads * head_dim,
            intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
            vocab=int(text.vocab_size),
            heads=heads,
            kv_heads=kv_heads,
            latent=None if rank is None else int(rank) + int(text.qk_rope_head_dim),
            quantised=0 if form is None else linear,
            quantised_bytes=0.0 if form is None else form.weight_bytes,
        )

    def weight_bytes(self, element: int) -> float:
        """Weights in memory, bytes. Args: element: bytes of a weight that is not quantised."""
        return (self.parameters - self.quantised) * element + self.quantised * self.quantised_bytes

    def kv_bytes(self, element: int, tensor_parallel: int = 1) -> int:
        """KV cache of one token on each of the GPUs that share the model, bytes.

        A GPU holds at least one key-value head, and a latent, which belongs to all heads, whole.
        Args: element: bytes per number; tensor_parallel: number of those GPUs.
        """
        if self.latent is not None:
            return self.layers * self.latent * element
        held = max(1, self.kv_heads // tensor_parallel)
        return 2 * self.layers * held * (self.kv_channels // self.kv_heads) * element


@dataclass(frozen=True)
class EngineMemory:
    """Memory of each GPU of a replica (or of its process, on CPUs), bytes."""

    weights: float
    logprobs: float
    """Rows of log-probabilities, the largest transient allocation."""
    activations: float
    """Activations of one engine step's tokens."""
    base: float
    kv_per_token: float
    kv_room: float
    """Memory left for the KV cache; negative if the rest does not fit."""

    @property
    def kv_tokens(self) -> int:
        """Number of tokens whose keys and values fit."""
        return max(0, int(self.kv_room / self.kv_per_token))

    @property
    def needed(self) -> float:
        """Memory without the KV cache."""
        return self.weights + self.logprobs + self.activations + self.base


def engine_memory(
    models: list[ModelShape],
    element: int,
    tensor_parallel: int,
    max_num_seqs: int,
    step_tokens: int,
    budget: float,
    kv_cache: float | None = None,
    device: str = "GPU",
) -> EngineMemory:
    """Memory of a replica that holds all of `models`.

    Args: element: bytes of a weight; step_tokens: `max_num_batched_tokens`; budget: bytes that the engine may use on each
          GPU; kv_cache: its size if set explicitly (CPUs), else the rest of the budget.
    """
    vocab = max(model.vocab for model in models)
    widest = max(2 * model.hidden + 3 * model.intermediate / tensor_parallel for model in models)
    weights = sum(model.weight_bytes(element) for model in models) / tensor_parallel
    logprobs = engine_rows(len(models), max_num_seqs) * vocab * _FLOAT32
    activations = step_tokens * widest * element
    base = ENGINE_BASE_BYTES[device]
    room = budget - weights - logprobs - activations - base if kv_cache is None else kv_cache
    return EngineMemory(
        weights=weights,
        logprobs=logprobs,
        activations=activations,
        base=base,
        kv_per_token=sum(model.kv_bytes(element, tensor_parallel) for model in models),
        kv_room=room,
    )


def engine_rows(models: int, max_num_seqs: int, measured: int = MEASURED_ROWS) -> float:
    """Float32 rows of the vocabulary alive at once in an engine of 1 or 2 models. Args: measured: `MEASURED_ROWS`.

    A step makes a row of each model for every sequence while those of the step before are there, and logits, of which vLLM has
    a copy. Beside these it measures: rows that it scores, their logits, probabilities, and what the statistics make of them.
    """
    made = (2 * models + 1.5) * max_num_seqs
    scored = (models + 1) * max_num_seqs + (2.5 * models + 1) * measured
    return max(made, scored)


@dataclass(frozen=True)
class RankMemory:
    """Memory of one student rank, bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logprobs: float
    teacher: float
    """Parts of a teacher held by the rank: its output head, or all of it."""
    base: float
    sent: float = 0.0
    """Copies of the weights for sending to replicas; only on rank 0."""

    @property
    def total(self) -> float:
        model = self.weights + self.gradients + self.optimizer + self.activations + self.logprobs
        return model + self.teacher + self.base + self.sent


@dataclass(frozen=True)
class Lengths:
    """Maximum numbers of tokens, from the config."""

    prompt: int
    response: int


@dataclass(frozen=True)
class LossTensors:
    """Number and size of the tensors that a loss makes."""

    rows: float = _CHUNK_ROWS
    """Rows of the vocabulary for each token of a chunk."""
    chunks: bool = True
    """False if the loss reads the logits of a whole micro-batch."""
    slots: float = 0.0
    """Bytes for each token that do not depend on the vocabulary."""

    @classmethod
    def of(cls, loss: LossSettings, rollout: RolloutSettings) -> LossTensors:
        """Return the memory that a loss needs, a row of rollouts at a time."""
        support = rollout.teacher_top_k + rollout.student_top_k
        if rollout.teacher_signal == "hidden":
            return cls(_CHUNK_ROWS_HIDDEN, slots=_SLOT * support)
        if loss.divergence or loss.reads == "buckets":
            rows = _CHUNK_ROWS
        else:
            rows = _CHUNK_ROWS_BY_LOGITS if "top_k" in loss.signals else _CHUNK_ROWS_OF_TOKENS
        return cls(rows, loss.in_chunks, support * (_SLOT_OF_BUCKETS if loss.reads == "buckets" else _SLOT))


def rank_memory(
    model: ModelShape,
    training: TrainingSettings,
    lengths: Lengths,
    teacher_bytes: float = 0.0,
    loss: LossTensors = LossTensors(),
) -> RankMemory:
    """Memory of one rank with AdamW; the backend states the bytes per parameter.

    Args: lengths: of the longest prompt and response; teacher_bytes: parts of a teacher held by the rank.
    """
    element = 2 if training.precision == "bf16" else 4
    each = training.backend.parameter_bytes(training.precision, training.ranks)
    in_main_memory = training.backend.offloads_optimizer and training.gpus_per_rank > 0
    # Weights sent by rank 0 exist twice more: the version being sent, and the next one.
    copies = 0 if training.weight_transfer == "object_store" else 2
    tokens = training.micro_batch_tokens or training.micro_batch_size * (lengths.prompt + lengths.response)
    # Packed rows may be of short prompts and long responses.
    targets = training.micro_batch_tokens or training.micro_batch_size * lengths.response
    trained = model.parameters if model.adapter is None else model.adapter
    return RankMemory(
        weights=(model.parameters + (model.adapter or 0)) * each.weights,
        gradients=trained * each.gradients,
        optimizer=0.0 if in_main_memory else trained * each.optimizer,
        activations=activation_bytes(model, tokens, element, training.gradient_checkpointing),
        logprobs=loss_bytes(model, training, targets, tokens, loss),
        teacher=teacher_bytes,
        base=ENGINE_BASE_BYTES["GPU" if training.gpus_per_rank > 0 else "CPU"],
        sent=copies * model.parameters * element,
    )


def loss_bytes(model: ModelShape, training: TrainingSettings, targets: int, tokens: int, loss: LossTensors) -> float:
    """Bytes of the new tensors at once while a micro-batch's loss and its gradients in hidden states and head are made.

    Args: targets: tokens of the responses; tokens: with prompts.
    """
    element = 2 if training.precision == "bf16" else _FLOAT32
    chunk = training.chunk_tokens(model.vocab)
    if not loss.chunks or tokens <= chunk:
        return _WHOLE_ROWS * targets * model.vocab * _FLOAT32
    of_logits = _FLOAT32 if training.logits == "float32" else element
    rows = loss.rows - _HALF_ROWS * (1 - of_logits / _FLOAT32)
    head = model.vocab * model.hidden
    # The head's gradient is added up in float32; then it exists in the head's own precision, and once more multiplied by the
    # gradient that arrives in the backward pass.
    of_head = max(
        _FLOAT32 * head + rows * min(chunk, targets) * model.vocab * _FLOAT32,
        (_FLOAT32 + element % _FLOAT32) * head,
        2 * element * head,
    )
    # States of the targets, their gradient, the same multiplied, and its place among all tokens.
    states = (3 * targets + tokens) * model.hidden * element
    return of_head + states + targets * loss.slots


def activation_bytes(model: ModelShape, tokens: int, element: int, gradient_checkpointing: bool) -> float:
    """Bytes of the tensors kept for the backward pass.

    A layer keeps its input, both normalised inputs (and their float32 versions inside the normalisation), queries, keys, values
    (rotated), the attention's output, the residual, and the gate's four products of the intermediate width. With checkpointing,
    every layer keeps its input and one layer also the rest.
    """
    kept = 6 * model.hidden + 2 * model.kv_channels + 4 * model.intermediate
    layer = tokens * (element * kept + 2 * _FLOAT32 * model.hidden)
    if gradient_checkpointing:
        return model.layers * tokens * model.hidden * element + layer
    return model.layers * layer
