"""Losses: one objective per file, named by its settings class in `kdray.config.losses`.

A loss is `name(student_logits, batch, settings) -> LossOutput`. A divergence is a function of both models' rows at each
position and nothing else, `name(rows, settings) -> one value per row`; the same function serves a support with its tail, the
whole vocabulary and hidden states. A loss that couples the tokens of a response, such as a policy gradient, is
`name(rows, batch, settings) -> LossOutput`, and reads a support with its tail. All but those that read whole logits are
computed in chunks of tokens inside an output head (`chunked_loss`).
"""

from __future__ import annotations

from kdray.losses.batch import LossBatch, LossOutput
from kdray.losses.chunked import chunked_divergence, chunked_loss
from kdray.losses.functional import distillation_loss
from kdray.losses.objective import LossFunction, Objective, divergence_of, loss_function
from kdray.losses.policy_gradient import Whitening, return_sums

__all__ = [
    "LossBatch",
    "LossFunction",
    "LossOutput",
    "Objective",
    "Whitening",
    "chunked_divergence",
    "chunked_loss",
    "distillation_loss",
    "divergence_of",
    "loss_function",
    "return_sums",
]
