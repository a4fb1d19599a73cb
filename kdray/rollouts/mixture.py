"""The MiniLLM mixture of two next-token distributions, and exact sampling from it.

m(y_t) = alpha p(y_t) + (1 - alpha) q(y_t), given the prefix, per token.
Source: MiniLLM, Gu et al. 2024 (arXiv 2306.08543), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

# Probabilities that are summed at once before a draw looks at single ones: about the square root of a large vocabulary.
_BLOCK = 256


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


def draw_mixed(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], uniforms: torch.Tensor) -> torch.Tensor:
    """Sample token ids [n] from a sum of distributions by inverting its CDF at the given uniforms [n]: what `draw` does, with
    one reading of each distribution and no copy of it, without waiting for the device.

    The float64 CDF over blocks of the vocabulary chooses a block, and that of its tokens chooses the token. A token of
    probability zero is never drawn. Args: parts: (share [n, 1], probabilities [n, vocab]).
    """
    vocab = parts[0][1].shape[-1]
    blocks = _total([share.double() * _block_sums(mass) for share, mass in parts]).cumsum(-1)
    target = uniforms.unsqueeze(-1) * blocks[:, -1:]
    # Bounded for the sake of rows of NaN, which compare with nothing.
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[-1] - 1)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    fraction = (target - before) / (blocks.gather(-1, block) - before)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    beyond = ids >= vocab
    ids = ids.clamp_(max=vocab - 1)
    within = _total([share.double() * mass.gather(-1, ids) for share, mass in parts])
    cdf = within.masked_fill_(beyond, 0.0).cumsum(-1)
    total = cdf[:, -1:]
    # Below the total, so that rounding never leads beyond the last token of positive probability.
    place = torch.searchsorted(cdf, torch.minimum(fraction * total, total * (1.0 - 2.0**-53)), right=True)
    return (block * _BLOCK + place).clamp_(max=vocab - 1).squeeze(-1)


def _total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, terms)


def _block_sums(mass: torch.Tensor) -> torch.Tensor:
    """Sums over consecutive blocks of `mass` [n, vocab], the last one shorter or empty, [n, vocab // block + 1]."""
    whole = mass.shape[-1] // _BLOCK * _BLOCK
    sums = mass[:, :whole].reshape(len(mass), -1, _BLOCK).sum(-1) if whole else mass[:, :0]
    return torch.cat([sums, mass[:, whole:].sum(-1, keepdim=True)], dim=-1)


def hashes(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hash of each (seed, position) pair, [n] int64, on the tensors' device: that of `kdray.rollouts.seeds.uniforms`.

    Args: seeds: [n] int64 with the bits of the unsigned seeds; positions: [n] int64 >= 0.
    """
    # Products wrap around as unsigned ones do. Shifts of int64 repeat the sign, which the masks remove.
    z = seeds + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def uniforms_of(hashed: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) from `hashes`, float64 [n], the same bits as those of `kdray.rollouts.seeds.uniforms`."""
    return (hashed >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >> 63 else value
