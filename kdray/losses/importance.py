"""Importance weights of a sampled token, with teacher mixing and weight staleness as separate factors.

A token sampled from m_old = alpha p + (1 - alpha) q_old is trained under q_theta. The ratio q_theta / m_old factors into the
mixing weight q_old / m_old and the staleness ratio q_theta / q_old. The first is bounded by 1 / (1 - alpha) and never clipped;
the second is unbounded, and is truncated at a cap or masked above it.
Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), equation 5 and algorithm 1.
"""

from __future__ import annotations

from typing import Literal

import torch


def mixing_weight(student_logprobs: torch.Tensor, mixture_logprobs: torch.Tensor) -> torch.Tensor:
    """q_old / m_old at the sampled tokens, in (0, 1 / (1 - alpha)]; its expectation under m_old is 1."""
    return (student_logprobs - mixture_logprobs).exp()


def staleness_ratio(
    current_logprobs: torch.Tensor,
    student_logprobs: torch.Tensor,
    cap: float,
    handling: Literal["truncate", "mask"] = "truncate",
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_theta / q_old at the sampled tokens, bounded by `cap`, and a bool mask of those above it; shaped as the inputs.

    Above the cap the ratio becomes the cap (`truncate`: a smaller update) or 0 (`mask`: no update from a token whose ratio
    cannot be trusted). Ratios below 1 are left unchanged: they reduce a token's weight by themselves.
    Args: current_logprobs: log q_theta, under the weights being trained; student_logprobs: log q_old, recorded by the
          sampler. With equal weights the ratio is 1 up to numerical differences between two kernels.
    """
    ratio = (current_logprobs - student_logprobs).exp()
    above = ratio > cap
    return ratio.masked_fill(above, cap if handling == "truncate" else 0.0), above


def effective_sample_size(weight_sum: float, weight_sq_sum: float, num_weights: int) -> float:
    """(sum w)^2 / (n sum w^2), in (0, 1]: effective sample size of n weighted samples, as a share of n.

    The sums are additive, so that ranks and micro-batches give the same number. Source: Kish 1965.
    Raises: ValueError without a positive weight.
    """
    if num_weights <= 0 or weight_sum <= 0.0:
        raise ValueError(
            f"effective sample size of {num_weights} weights that sum to {weight_sum:g}; it needs a positive weight"
        )
    # With equal weights, rounding may push the quotient above 1 by an ulp.
    return min(weight_sum**2 / (num_weights * weight_sq_sum), 1.0)
