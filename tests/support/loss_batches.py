"""Batches with every column that a loss reads, at any size of vocabulary."""

from __future__ import annotations

import torch

from kdray.config.losses import LOSSES, LossSettings
from kdray.config.registry import name_of
from kdray.losses import LossBatch


def built_in_losses() -> list[LossSettings]:
    """Every loss of kdray, with its defaults."""
    own = [kind for kind in LOSSES.known() if kind.__module__ == "kdray.config.losses"]
    return [kind.model_validate({"type": name_of(kind)}) for kind in own]


def loss_batch(
    rows: int, length: int, vocab: int, width: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LossBatch:
    """Rows with prompts of unequal length, gaps between targets, unused slots of the support, and `nan` where none is read."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    place = torch.arange(length)
    mask = (place > torch.arange(rows).unsqueeze(1) % 3) & (place % 5 != 4)
    ids = torch.stack([torch.randperm(vocab, generator=random)[:width] for _ in range(rows * length)]).reshape(rows, length, -1)
    tokens = torch.randint(vocab, (rows, length), generator=random)
    support = draw(rows, length, width).log_softmax(-1) - 0.3
    unused = torch.rand(rows, length, width, generator=random) < 0.2
    # A support that covers all ids of a vocabulary of its size has no tail.
    unused[:, :1] = False
    tail = (1.0 - support.exp().masked_fill(unused, 0.0).sum(-1)).log()
    columns = {
        "mixture_logprobs": -draw(rows, length).exp(),
        "student_logprobs": -draw(rows, length).exp(),
        "teacher_logprobs": -draw(rows, length).exp(),
        "support_logprobs": support.masked_fill(unused, -torch.inf),
        "tail_logprobs": tail,
        "weights": draw(rows, length).exp(),
        "advantages": draw(rows, length),
    }
    for column in columns.values():
        column[~mask] = torch.nan
    return LossBatch(
        token_ids=tokens,
        mask=mask,
        vocab_size=vocab,
        support_ids=ids.masked_fill(unused, -1),
        group=(place % 2).expand(rows, length).contiguous(),
        groups=("teacher/t/staleness_0", "teacher/t/staleness_1"),
        more={"advantages": columns.pop("advantages").to(dtype)},
        **{name: column.to(dtype) for name, column in columns.items()},
    )
