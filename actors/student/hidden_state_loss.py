"""Divergence from both models' hidden states, computed inside the student's output head (`actors.student.output_head`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from actors.student.backend import Forward
from actors.student.features import feature_inputs, with_features
from actors.student.micro_batch_loss import model_inputs
from actors.student.output_head import AfterHead, logits_dtype, loss_in_head
from kdray.config import LossSettings
from kdray.errors import ConfigError, TrainingError
from kdray.losses import LossBatch, LossOutput, chunked_divergence, divergence_of
from kdray.losses.chunked import DEFAULT_CHUNK_ROWS
from kdray.losses.features import predicting
from kdray.losses.rollout_gap import rollout_gap
from kdray.losses.support import Buckets, at_tokens
from kdray.types import TrainBatch

HEAD_TOLERANCE = 0.25
"""Maximum mean of `teacher_head_error`, nats: half precision and other kernels shift a logprob by hundredths, a different head
by whole nats."""


@dataclass(frozen=True)
class OutputHead:
    """Matrix that maps a model's last hidden state to logits."""

    weight: torch.Tensor  # [vocab, d]
    bias: torch.Tensor | None = None  # [vocab]

    def to(self, device: torch.device, dtype: torch.dtype) -> OutputHead:
        return OutputHead(self.weight.to(device, dtype), None if self.bias is None else self.bias.to(device, dtype))


def load_output_head(model: str, revision: str | None = None) -> OutputHead:
    """Read only the head from a model's safetensors files; the rest of the model is not loaded.

    Raises: ConfigError if the model scales or caps its logits after the head, or the files lack it.
    """
    import transformers
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.utils import cached_file

    config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config.get_text_config(), name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"rollout.teacher_signal=hidden: {model} has {name}, which changes logits after the output head; "
                "use rollout.teacher_signal=support"
            )
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    names = [name for name, parameter in empty.named_parameters(remove_duplicate=False) if parameter is head.weight]
    # A tied matrix may be stored under any one of its names.
    empty.tie_weights()
    names += [name for name, parameter in empty.named_parameters(remove_duplicate=False) if parameter is head.weight]
    # Files may have other names than the model in memory (GPT-NeoX: embed_out).
    names += [stored for name in names for stored in revert_weight_conversion(empty, {name: head.weight})]
    biases = [name for name, parameter in empty.named_parameters(remove_duplicate=False) if parameter is head.bias]
    index = cached_file(model, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(model, "model.safetensors", revision=revision)
        with safe_open(single, framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        with open(index, encoding="utf-8") as lines:
            files = json.load(lines)["weight_map"]

    def tensor(wanted: list[str]) -> torch.Tensor | None:
        for name in wanted:
            if name in files:
                with safe_open(cached_file(model, files[name], revision=revision), framework="pt") as file:
                    return file.get_tensor(name)
        return None

    weight = tensor(names)
    if weight is None:
        raise ConfigError(f"rollout.teacher_signal=hidden: {model} has no weight named {' or '.join(dict.fromkeys(names))}")
    return OutputHead(weight, tensor(biases))


def hidden_state_loss(
    forward: Forward,
    module: Any,
    part: TrainBatch,
    settings: LossSettings | None,
    teacher_head: OutputHead,
    vocab_size: int,
    after_head: AfterHead | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_ROWS,
) -> LossOutput:
    """Sum of the divergence selected by `settings` over the masked tokens of a micro-batch, over the whole vocabulary.

    Args: forward: runs the student through its backend; module: the student, on the teacher's head's device; part: with the
    column `teacher_hidden`; after_head: of the student; None finds it.
    The sum `teacher_head_error` measures the difference between the head's log p at the recorded tokens and the teacher's
    recorded one.
    Raises: TrainingError if the batch has no hidden states, or the student's output head cannot be run by itself.
    """
    assert settings is not None
    if "teacher_hidden" not in part.columns:
        raise TrainingError("the batch has no column teacher_hidden; set rollout.teacher_signal=hidden for the run")
    device = teacher_head.weight.device
    student_head = AfterHead(module, device) if after_head is None else after_head
    mask = torch.from_numpy(part.loss_mask).to(device)
    tokens = torch.from_numpy(part.token_ids).to(device, torch.long)[mask]
    teacher_hidden = torch.from_numpy(part.columns["teacher_hidden"]).to(device)[mask].to(teacher_head.weight.dtype)
    recorded = torch.from_numpy(part.columns["teacher_logprobs"]).to(device)[mask]
    divergence = divergence_of(settings)
    targets = LossBatch.from_train_batch(part, vocab_size, device).packed()
    sums = {"reverse_kl_support": torch.zeros((), device=device), "teacher_head_error": torch.zeros((), device=device)}
    seen = 0

    def measured(rows: Buckets) -> torch.Tensor:
        nonlocal seen
        count = len(rows.teacher)
        with torch.no_grad():
            sums["reverse_kl_support"] += rows.reverse_kl()
            made = at_tokens(rows.teacher, tokens[seen : seen + count])
            sums["teacher_head_error"] += (made - recorded[seen : seen + count]).abs().sum()
            for name, value in rollout_gap(rows.token_logprobs, targets.tokens(slice(seen, seen + count))).items():
                sums[name] = sums.get(name, 0) + value
        seen += count
        return divergence(rows)

    def loss(head: Any, hidden: torch.Tensor) -> torch.Tensor:
        return chunked_divergence(
            hidden[predicting(mask)],
            head.weight,
            teacher_hidden,
            teacher_head.weight,
            measured,
            vocab_size,
            chunk_tokens,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            token_ids=tokens,
            after_head=student_head,
            logits_dtype=logits_dtype(head, hidden),
        )

    ids, attention = model_inputs(part, device)
    inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False, **feature_inputs(module, mask)}
    total, output = loss_in_head(forward, module, student_head, inputs, loss)
    return with_features(LossOutput(total=total, sums=sums), output, module)
