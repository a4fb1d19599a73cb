"""A world small enough to enumerate: every sequence, its probability, and the exact gradient of the divergence.

Sequences over five ids end with id 0 or after three tokens: 85 of them. A loss over all 85 as one batch of rows gives
every row's own gradient in one backward pass, because a loss is a sum over rows; weighted by the probabilities of the
sampler these give the mean and the covariance of an estimator, with no sampling error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from kdray.config import LossSettings
from kdray.losses import LossBatch, Whitening, loss_function
from kdray.losses.policy_gradient import recorded_returns
from kdray.rollouts.batching import rollouts_to_batch
from kdray.types import Rollout

VOCAB, LENGTH, EOS, PARAMETERS = 5, 3, 0, 12


class ToyWorld:
    """Teacher with free rows; student whose rows of logits are linear in the same 12 parameters.

    So a mistake at one prefix shows everywhere.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sequences = [
            list(tokens)
            for length in range(1, LENGTH + 1)
            for tokens in itertools.product(range(VOCAB), repeat=length)
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LENGTH)
        ]
        prefixes = sorted({tuple(tokens[:t]) for tokens in self.sequences for t in range(len(tokens))})
        at = {prefix: row for row, prefix in enumerate(prefixes)}
        self.features = torch.tensor(rng.normal(size=(len(prefixes), VOCAB, PARAMETERS)) * 0.5)
        self.theta = torch.tensor(rng.normal(size=PARAMETERS))
        self.teacher = torch.tensor(rng.normal(size=(len(prefixes), VOCAB))).log_softmax(-1)
        self.drift = torch.tensor(rng.normal(size=PARAMETERS)) * 0.4
        """A direction in which the sampler's weights may lag behind."""
        # [85, 1 + LENGTH]: column 0 is a prompt of one token. Positions after the end point at prefix 0: masked.
        count, width = len(self.sequences), LENGTH + 1
        self.tokens = torch.zeros(count, width, dtype=torch.long)
        self.mask = torch.zeros(count, width, dtype=torch.bool)
        self.prefix = torch.zeros(count, width, dtype=torch.long)
        for row, tokens in enumerate(self.sequences):
            for t, token in enumerate(tokens):
                self.tokens[row, t + 1] = token
                self.mask[row, t + 1] = True
                self.prefix[row, t + 1] = at[tuple(tokens[:t])]

    def student(self, theta: torch.Tensor) -> torch.Tensor:
        """Log-probability rows of all prefixes, [prefixes, VOCAB]."""
        return (self.features @ theta).log_softmax(-1)

    def mixture(self, theta: torch.Tensor, alpha: float) -> torch.Tensor:
        """Rows of alpha teacher + (1 - alpha) student."""
        student = self.student(theta)
        return torch.logaddexp(self.teacher + math.log(alpha), student + math.log1p(-alpha)) if alpha else student

    def token_logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token of each sequence under `rows`, [85, 1 + LENGTH]; 0 outside the mask."""
        found = rows[self.prefix].gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        return found.masked_fill(~self.mask, 0.0)

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """Probability of each sequence, [85]."""
        return self.token_logprobs(rows).sum(-1).exp()

    def divergence(self, theta: torch.Tensor) -> torch.Tensor:
        """KL(student || teacher) over whole sequences, nats."""
        student = self.token_logprobs(self.student(theta)).sum(-1)
        return (student.exp() * (student - self.token_logprobs(self.teacher).sum(-1))).sum()

    def exact_gradient(self) -> torch.Tensor:
        """d KL(student || teacher) / d theta, [PARAMETERS]."""
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(self.divergence(theta), theta)[0]

    def finite_difference_gradient(self, step: float = 1e-5) -> torch.Tensor:
        """The same by central differences, which know nothing of autograd."""
        slopes = []
        for unit in torch.eye(PARAMETERS, dtype=torch.float64) * step:
            slopes.append((self.divergence(self.theta + unit) - self.divergence(self.theta - unit)) / (2 * step))
        return torch.stack(slopes)

    def batch(self, alpha: float, sampler: torch.Tensor | None = None, support: int = VOCAB) -> LossBatch:
        """All sequences as rows, with what a sampler records whose student has the parameters `sampler` (theta)."""
        sampler = self.theta if sampler is None else sampler
        order = self.teacher.argsort(-1, descending=True)[:, :support]
        inside = torch.zeros_like(self.teacher, dtype=torch.bool).scatter_(-1, order, True)
        return LossBatch(
            token_ids=self.tokens,
            mask=self.mask,
            vocab_size=VOCAB,
            mixture_logprobs=self.token_logprobs(self.mixture(sampler, alpha)),
            student_logprobs=self.token_logprobs(self.student(sampler)),
            teacher_logprobs=self.token_logprobs(self.teacher),
            support_ids=order[self.prefix],
            support_logprobs=self.teacher.gather(-1, order)[self.prefix],
            tail_logprobs=self.teacher.masked_fill(inside, -torch.inf).logsumexp(-1)[self.prefix],
        )

    def rollouts(self, alpha: float) -> list[Rollout]:
        """Every sequence as an unscored rollout, prompted by id 0, with the sample ids of the rows of `batch`."""
        student, mixture = (
            self.token_logprobs(rows).numpy() for rows in (self.student(self.theta), self.mixture(self.theta, alpha))
        )
        made = []
        for row, tokens in enumerate(self.sequences):
            part = slice(1, 1 + len(tokens))
            made.append(
                Rollout(
                    sample_id=row,
                    prompt_id=0,
                    prompt_ids=np.zeros(1, np.int32),
                    token_ids=np.array(tokens, np.int32),
                    mixture_logprobs=mixture[row, part].astype(np.float32),
                    student_logprobs=student[row, part].astype(np.float32),
                    student_versions=np.zeros(len(tokens), np.int32),
                    alpha=alpha,
                    finish_reason="stop" if tokens[-1] == EOS else "length",
                )
            )
        return made

    def rows_before(self, rows: torch.Tensor, token_ids: Sequence[int]) -> np.ndarray:
        """Those of `rows` [prefixes, VOCAB] that predict the tokens of a sequence, [T, VOCAB]."""
        row = self.sequences.index(list(token_ids))
        return rows[self.prefix[row, 1 : 1 + len(token_ids)]].numpy()

    def expected_of_records(self, settings: LossSettings, rollouts: Sequence[Rollout], alpha: float) -> torch.Tensor:
        """Mean of the loss's gradient over all sequences, in the order of `rollouts`, with the columns that these recorded."""
        batch = LossBatch.from_train_batch(rollouts_to_batch(rollouts, step=1), VOCAB)
        assert torch.equal(batch.token_ids, self.tokens)
        return self.probabilities(self.mixture(self.theta, alpha)) @ self.gradients(settings, batch)

    def whitening(self, settings: LossSettings, alpha: float, sampler: torch.Tensor | None = None) -> Whitening | None:
        """Statistics of a step of infinitely many samples; None unless the settings whiten."""
        if not getattr(settings, "whitening", False):
            return None
        returns = recorded_returns(self.batch(alpha, sampler), settings, torch.float64)
        chance = self.probabilities(self.mixture(self.theta if sampler is None else sampler, alpha))
        weights = chance.unsqueeze(-1).expand_as(self.mask)[self.mask]
        return Whitening.from_sums([float((weights * returns**power).sum()) for power in range(3)])

    def gradients(
        self, settings: LossSettings, batch: LossBatch, whitening: Whitening | None = None, theta: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gradient in theta of each row's loss, [rows, PARAMETERS], for a batch whose rows are all sequences."""
        logits = (self.features @ (self.theta if theta is None else theta))[self.prefix].requires_grad_()
        total = loss_function(settings, whitening)(logits, batch, settings).total
        (by_logit,) = torch.autograd.grad(total, logits)
        return torch.einsum("bsv,bsvd->bd", by_logit, self.features[self.prefix])

    def moments(
        self,
        settings: LossSettings,
        alpha: float,
        sampler: torch.Tensor | None = None,
        change: Callable[[LossBatch], LossBatch] = lambda batch: batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [PARAMETERS] and covariance of one sample's gradient, the sample drawn from the mixture.

        Args: sampler: parameters of the student that samples (theta); change: what is done to the records before the
              loss sees them, such as `unweighted` and `without_baseline`.
        """
        batch = change(self.batch(alpha, sampler))
        chance = self.probabilities(self.mixture(self.theta if sampler is None else sampler, alpha))
        rows = self.gradients(settings, batch, self.whitening(settings, alpha, sampler))
        mean = chance @ rows
        centred = rows - mean
        return mean, centred.T @ (chance.unsqueeze(-1) * centred)

    def expected_gradient(self, settings: LossSettings, alpha: float, sampler: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of the loss's gradient over sequences drawn from the mixture, [PARAMETERS]."""
        return self.moments(settings, alpha, sampler)[0]


def unweighted(batch: LossBatch) -> LossBatch:
    """The batch as if the student alone had sampled: the mixing weight is 1."""
    return replace(batch, mixture_logprobs=batch.student_logprobs)


def without_baseline(batch: LossBatch) -> LossBatch:
    """The batch with a support of nothing, whose KL is 0 everywhere."""
    return replace(
        batch,
        support_ids=torch.full((*batch.mask.shape, 1), -1),
        support_logprobs=torch.full((*batch.mask.shape, 1), -torch.inf, dtype=torch.float64),
        tail_logprobs=torch.zeros(batch.mask.shape, dtype=torch.float64),
    )
