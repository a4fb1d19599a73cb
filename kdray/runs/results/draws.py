"""Numbers of every held-out response, their file in the run folder, and the metrics as ratios of sums over prompts.

Prompts are the independent units of an evaluation: several responses to one prompt say less than responses to several prompts.
So every metric is kept as two sums by prompt, from which its value and its interval follow (`kdray.runs.results.bootstrap`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdray.errors import DataError

DRAW_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("repeats", pa.bool_(), nullable=False),
        pa.field("exact_match", pa.bool_()),
        pa.field("reverse_kl", pa.float64()),
        pa.field("forward_kl", pa.float64()),
        pa.field("top_overlap", pa.float64()),
        pa.field("rouge_l", pa.float64()),
        pa.field("step_match", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Draw:
    """Numbers of one response to a held-out prompt. Sums over a response are over its targets."""

    prompt_id: int
    draw: int
    """Number of the response among its prompt's, from 0."""
    domain: str | None
    tokens: int
    truncated: bool
    repeats: bool
    """The response ends in a loop (`kdray.evaluation.ends_in_a_loop`)."""
    exact_match: bool | None
    """The grader accepts the response; None if it cannot grade the prompt."""
    reverse_kl: float | None
    """Sum of KL(student || teacher) over the response, nats; None if it was not recorded. As the two below."""
    forward_kl: float | None
    """Sum of KL(teacher || student) over the response, nats."""
    top_overlap: float | None
    """Sum over the response of the share of the student's top ids that are also among the teacher's."""
    rouge_l: float | None = None
    """`kdray.data.rouge`; None if it was not asked for, or the prompt has no reference answer."""
    step_match: float | None = None
    """Share of the response's steps that are right; None if the grader knows no steps."""


@dataclass(frozen=True)
class Ratio:
    """Metric as the quotient of two sums over prompts: nats over tokens, right responses over graded ones."""

    prompt_ids: np.ndarray  # [n] int64
    sums: np.ndarray  # [n] float64
    counts: np.ndarray  # [n] float64; 0 for a prompt that says nothing about the metric

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    @property
    def num_prompts(self) -> int:
        """Number of prompts that say something about the metric."""
        return int(np.count_nonzero(self.counts))

    def at(self, prompt_ids: np.ndarray) -> Ratio:
        """The ratio over some of its prompts, in the order given."""
        order = np.argsort(self.prompt_ids)
        found = order[np.searchsorted(self.prompt_ids, prompt_ids, sorter=order)]
        return Ratio(prompt_ids, self.sums[found], self.counts[found])


def ratios(draws: Sequence[Draw], pass_at: Sequence[int] = ()) -> dict[str, Ratio]:
    """Metrics of an evaluation by name, each over all of its prompts; a metric without any value is absent.

    `exact_match`, `step_match`, `pass_at_<k>` and `rouge_l` are means over prompts, the divergences and `top_overlap` over
    tokens, the others over responses. Args: pass_at: values of k.
    """
    prompt_ids, place = np.unique([draw.prompt_id for draw in draws], return_inverse=True)

    def by_prompt(values: Sequence[float]) -> np.ndarray:
        return np.bincount(place, np.asarray(values, dtype=np.float64), minlength=len(prompt_ids))

    def over(value: Callable[[Draw], float | None], count: Callable[[Draw], float] = lambda draw: 1.0) -> Ratio:
        found = [(value(draw), count(draw)) for draw in draws]
        known = [(0.0, 0.0) if sum_ is None else (float(sum_), of) for sum_, of in found]
        return Ratio(prompt_ids, by_prompt([sum_ for sum_, _ in known]), by_prompt([of for _, of in known]))

    def of_prompts(ratio: Ratio) -> Ratio:
        """Give every prompt the same weight, however many of its responses count."""
        graded = ratio.counts > 0
        return Ratio(prompt_ids, np.divide(ratio.sums, ratio.counts, where=graded, out=np.zeros(len(graded))), graded * 1.0)

    right = over(lambda draw: draw.exact_match)
    found = {"exact_match": of_prompts(right)}
    domains = sorted({draw.domain for draw in draws if draw.domain is not None and draw.exact_match is not None})
    if len(domains) > 1:
        for domain in domains:
            found[f"exact_match/{domain}"] = of_prompts(over(partial(_match_in, domain)))
    found |= {f"pass_at_{k}": _pass_at(right, k) for k in pass_at}
    found["step_match"] = of_prompts(over(lambda draw: draw.step_match))
    found["rouge_l"] = of_prompts(over(lambda draw: draw.rouge_l))
    found |= {
        "reverse_kl": over(lambda draw: draw.reverse_kl, lambda draw: draw.tokens),
        "forward_kl": over(lambda draw: draw.forward_kl, lambda draw: draw.tokens),
        "response_tokens": over(lambda draw: draw.tokens),
        "truncated": over(lambda draw: draw.truncated),
        "repetition": over(lambda draw: draw.repeats),
        "top_overlap": over(lambda draw: draw.top_overlap, lambda draw: draw.tokens),
    }
    return {name: ratio for name, ratio in found.items() if ratio.counts.any()}


def _match_in(domain: str, draw: Draw) -> bool | None:
    return draw.exact_match if draw.domain == domain else None


def _pass_at(right: Ratio, k: int) -> Ratio:
    """Probability that at least one of k responses is right, by prompt: 1 - C(n - c, k) / C(n, k) for c right ones of n.

    Prompts with fewer than k graded responses are left out. Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    enough = right.counts >= k
    values = [
        1.0 - comb(int(n) - int(c), k) / comb(int(n), k) if fits else 0.0
        for c, n, fits in zip(right.sums, right.counts, enough, strict=True)
    ]
    return Ratio(right.prompt_ids, np.array(values), enough * 1.0)


def write_draws(path: Path, draws: Sequence[Draw], guard: Callable[[], None] = lambda: None) -> None:
    """Write the numbers of an evaluation to a Parquet file, replacing one that is there.

    Args: guard: called just before the file takes its place; what it raises leaves the one that is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist([asdict(draw) for draw in draws], schema=DRAW_SCHEMA), temporary)
    guard()
    os.replace(temporary, path)


def read_draws(path: Path) -> list[Draw]:
    """Read what `write_draws` wrote. Raises: DataError if the file cannot be read."""
    try:
        return [Draw(**row) for row in pq.read_table(path).to_pylist()]
    except (OSError, ValueError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path}: not numbers of an evaluation: {error}; remove it") from error
