"""Distances between internals of student and teacher: hidden states, attention maps, relations among tokens.

Every function returns a sum over response tokens, which the caller divides by the number in the whole step. A token is
represented by the position that predicts it, as in the other losses. The teacher's side has no gradient; values are reduced in
at least float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ATTENTION_FLOOR = 1e-12
"""Lower bound of attention inside the logarithm: the logarithm of a key that underflowed is undefined."""


def predicting(mask: torch.Tensor) -> torch.Tensor:
    """Mask of the positions that predict the tokens of `mask` [B, S], one position earlier. Column 0 of `mask` is False."""
    return mask.roll(-1, dims=1)


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over N tokens of the mean squared difference over channels. Args: student (projected), teacher: [N, d].

    Source: FitNets, Romero et al. 2015 (arXiv 1412.6550), with TinyBERT's linear projection (Jiao et al. 2020, 1909.10351).
    """
    student, teacher = _wide(student, teacher)
    return (student - teacher).square().mean(-1).sum()


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over N tokens of 1 - cos(student, teacher). Args: student (projected), teacher: [N, d].

    Half of PKD's ||s / |s| - t / |t| ||^2 (Sun et al. 2019, arXiv 1908.09355).
    """
    student, teacher = _wide(student, teacher)
    return (1.0 - torch.cosine_similarity(student, teacher, dim=-1)).sum()


def attention_kl(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over masked tokens of the mean over heads of sum_k a_T log(a_T / a_S), with logarithms floored.

    Args: student, teacher: [B, heads, S, S] maps, each row a distribution over keys; if the numbers of heads differ, each
    model's mean over heads is used as a single map. mask: [B, S], the response tokens.
    Source: MiniLM, Wang et al. 2020 (arXiv 2002.10957).
    """
    student, teacher = _maps(student, teacher, mask)
    gap = teacher.clamp(min=ATTENTION_FLOOR).log() - student.clamp(min=ATTENTION_FLOOR).log()
    return (teacher * gap).sum(-1).mean(-1).sum()


def attention_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over masked tokens of the mean over heads of sum_k (a_S - a_T)^2; arguments as for `attention_kl`.

    Keys are summed, not averaged, so that padding does not dilute the value. Source: TinyBERT, which compares attention before
    the softmax, where causal masks are not finite.
    """
    student, teacher = _maps(student, teacher, mask)
    return (student - teacher).square().sum(-1).mean(-1).sum()


def relation_distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Distance-wise RKD within a response: sum_i mean_{j != i} huber(psi_S(i, j) - psi_T(i, j)), with Huber's delta 1.

    psi(i, j) = ||x_i - x_j|| / m, with m the mean of ||x_i - x_j|| over all i != j.
    Args: student [n, d_s], teacher [n, d_t]: states of the n tokens of a response. A single token has no relations: 0.
    Source: Park et al. 2019 (arXiv 1904.05068), whose tuples are drawn from a mini-batch of samples.
    """
    student, teacher = _wide(student, teacher)
    count = len(student)
    if count < 2:
        return 0.0 * student.sum()

    def scaled(states: torch.Tensor) -> torch.Tensor:
        # Pairwise differences are computed directly: through inner products, the distance of close states would be lost to
        # rounding.
        distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
        mean = distances.sum() / (count * (count - 1))
        return distances / mean.clamp(min=torch.finfo(states.dtype).tiny)

    # The diagonal is 0 on both sides.
    return torch.nn.functional.smooth_l1_loss(scaled(student), scaled(teacher), reduction="sum") / (count - 1)


def relation_similarities(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Similarity matrices within a response: sum_i mean_{j != i} (cos_S(x_i, x_j) - cos_T(x_i, x_j))^2.

    Args: as for `relation_distances`. Source: similarity-preserving distillation, Tung & Mori 2019 (arXiv 1907.09682), there
    between the images of a mini-batch, with normalised rows of the Gram matrix.
    """
    student, teacher = _wide(student, teacher)
    count = len(student)
    if count < 2:
        return 0.0 * student.sum()
    unit_student, unit_teacher = (torch.nn.functional.normalize(states, dim=-1) for states in (student, teacher))
    # The diagonal is 1 on both sides.
    return (unit_student @ unit_student.T - unit_teacher @ unit_teacher.T).square().sum() / (count - 1)


def over_responses(
    relation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Sum of a relation over the responses of a micro-batch, computed within each response.

    Args: student, teacher: [B, S, d]; mask: [B, S], the response tokens of each row.
    """
    counts, at = mask.sum(1).tolist(), predicting(mask)
    rows = zip(student[at].split(counts), teacher[at].split(counts), strict=True)
    return torch.stack([relation(*row) for row in rows]).sum()


def _wide(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _maps(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both maps at the positions that predict response tokens, [N, heads, S]."""
    at = predicting(mask)
    student, teacher = _wide(student.transpose(1, 2)[at], teacher.transpose(1, 2)[at])
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return student, teacher


HIDDEN = {"mse": hidden_mse, "cosine": hidden_cosine}
ATTENTION = {"kl": attention_kl, "mse": attention_mse}
RELATION = {"distances": relation_distances, "similarities": relation_similarities}
