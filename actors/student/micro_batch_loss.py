"""Loss of a micro-batch from the student's forward pass: in chunks inside its output head, or from logits."""

from __future__ import annotations

import logging
from typing import Any

import torch

from actors.student.backend import Forward
from actors.student.features import feature_inputs, with_features
from actors.student.output_head import AfterHead, UnknownHeadError, logits_dtype, loss_in_head
from kdray.config import TrainingSettings
from kdray.losses import LossBatch, LossOutput, Objective, chunked_loss
from kdray.losses.features import predicting
from kdray.types import TrainBatch

_log = logging.getLogger(__name__)


class MicroBatchLoss:
    """Losses of a phase's student on one rank.

    With chunks the memory does not depend on tokens x vocabulary. Logits are used for what fits into a chunk, which is then
    faster, for a loss that reads whole logits, and for a student whose output head cannot be run by itself.
    """

    def __init__(self, module: Any, training: TrainingSettings, vocab_size: int, device: torch.device) -> None:
        """Args: module: the student, as its backend runs it; vocab_size: token ids that teacher and student share."""
        self.module = module
        self.vocab_size = vocab_size
        self.device = device
        self.after_head: AfterHead | None = None
        self.refused: UnknownHeadError | None = None
        """Why there are no chunks."""
        try:
            self.after_head = AfterHead(module, device)
            self.chunk_tokens = training.chunk_tokens(self.after_head.vocab)
        except UnknownHeadError as error:
            self.refused = error

    @property
    def chunks(self) -> tuple[AfterHead, int]:
        """What follows the output head, and the tokens of a chunk. Raises: UnknownHeadError if there are no chunks."""
        if self.after_head is None:
            assert self.refused is not None
            raise self.refused
        return self.after_head, self.chunk_tokens

    def log(self) -> None:
        """Say if memory will grow with tokens x vocabulary."""
        if self.refused is not None:
            _log.warning("%s. The loss takes memory for the logits of a whole micro-batch, not of a chunk", self.refused)

    def __call__(self, forward: Forward, part: TrainBatch, objective: Objective, features: bool = False) -> LossOutput:
        """The loss of a micro-batch. Args: features: add the terms of `training.features`, if there are any."""
        batch = LossBatch.from_train_batch(part, self.vocab_size, self.device)
        ids, attention = model_inputs(part, self.device)
        inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        if features:
            inputs |= feature_inputs(self.module, batch.mask)
        after_head = self.after_head
        if after_head is None or objective.reads == "logits" or ids.numel() <= self.chunk_tokens:
            output = forward(**inputs)
            loss = objective.of_logits(_aligned(output), batch)
        else:
            found: list[LossOutput] = []

            def in_head(head: Any, hidden: torch.Tensor) -> torch.Tensor:
                states = hidden[predicting(batch.mask)]
                dtype = logits_dtype(head, states)
                found.append(
                    chunked_loss(states, head.weight, head.bias, batch, objective, self.chunk_tokens, after_head, dtype)
                )
                return found[0].total

            total, output = loss_in_head(forward, self.module, after_head, inputs, in_head)
            loss = LossOutput(total, found[0].sums)
        return with_features(loss, output, self.module) if features else loss


def model_inputs(part: TrainBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of a micro-batch, both [rows, seq] long; a padding row keeps one position."""
    ids = torch.from_numpy(part.token_ids).to(device, torch.long)
    lengths = torch.from_numpy(part.lengths).to(device)
    return ids, (torch.arange(ids.shape[1], device=device) < lengths.clamp(min=1).unsqueeze(1)).long()


def _aligned(output: Any) -> torch.Tensor:
    """Logits [rows, seq, vocab] aligned with the token that they predict; column 0 predicts nothing."""
    logits: torch.Tensor = output.logits
    return logits.roll(1, dims=1)
