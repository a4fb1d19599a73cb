"""The MiniLLM mixture of two next-token distributions, and exact sampling from it.

m(y_t) = alpha p(y_t) + (1 - alpha) q(y_t), given the prefix, per token.
Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), equation 4.
"""

from __future__ import annotations

import torch


def log_mixture(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """log(alpha p + (1 - alpha) q), elementwise.

    Args: teacher_logprobs, student_logprobs: [..., vocab] log-softmax rows.
          alpha: [..., 1] in [0, 1]; at 0 and 1 the other model drops out, even where its logprob is -inf.
    """
    # log(0) = -inf is what removes a model at alpha 0 or 1; logaddexp handles it without a NaN.
    return torch.logaddexp(alpha.log() + teacher_logprobs, (1.0 - alpha).log() + student_logprobs)


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor, max_rows: int = 64) -> torch.Tensor:
    """Sample token ids [n] from rows of logprobs [n, vocab] by inverting the CDF at the given uniforms [n].

    The cumulative sum runs in float64, in blocks of `max_rows` rows that bound its memory; it is normalised by its own last
    entry, so that rounding never leaves a uniform above the total mass. A token of probability zero is never drawn.
    """
    out = torch.empty(logprobs.shape[0], dtype=torch.long, device=logprobs.device)
    for start in range(0, logprobs.shape[0], max_rows):
        rows = slice(start, start + max_rows)
        cdf = logprobs[rows].double().exp().cumsum_(-1)
        target = uniforms[rows].to(cdf).unsqueeze(-1) * cdf[:, -1:]
        # right=True: first index whose cdf exceeds the target; a zero-probability token repeats its left neighbour's cdf.
        out[rows] = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return out.clamp_(max=logprobs.shape[-1] - 1)
