"""Held-out evaluation through the same interfaces as the loop: the student's own samples, drawn with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from kdray.data.graders import Grading
from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.columns import at_targets
from kdray.rollouts.draw import draw_scored
from kdray.rollouts.seeds import sample_seed
from kdray.types import Prompt, Rollout, SampleRequest


@dataclass(frozen=True)
class HeldOut:
    """A measurement on held-out prompts.

    `reverse_kl` and `forward_kl` are in nats per response token, over the whole vocabulary, on temperature-1 samples of the
    student, averaged over tokens. `exact_match` in [0, 1], the share that `grade` accepts, is present if prompts can be graded,
    and `exact_match/<domain>` if they have several domains.
    """

    prompts: Sequence[Prompt]
    sampler: Sampler
    scorer: Scorer | None
    """Scores rollouts that the sampler left unscored; None if rollouts come back scored."""
    decode: Callable[[np.ndarray], str]
    grade: Grading | None
    """Decides whether a response is right; None if nothing grades the prompts."""
    max_new_tokens: int
    seed: int
    """Seed of the run: the same seed draws the same samples under the same weights."""
    alpha: float = 0.0
    """0 measures the student, 1 the teacher itself."""
    exact: bool = True
    """Measure KLs, which needs replicas that hold both teacher and student."""
    samples_per_prompt: int = 1
    """Samples per prompt of a sampler that identifies them by their ids; only the first of each prompt is drawn."""

    async def measure(self, version: int) -> tuple[dict[str, float], list[Rollout]]:
        """Evaluate a student version: return the numbers, and the rollouts behind them in the order of the prompts.

        Raises: EngineError if the replicas cannot give full-vocabulary KLs; ResponseError if the grader failed.
        """
        # Replicas update to `min_version` before they sample.
        requests = [
            SampleRequest(
                sample_id=index * self.samples_per_prompt,
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                alpha=self.alpha,
                seed=sample_seed(self.seed, "heldout", prompt.prompt_id),
                max_new_tokens=self.max_new_tokens,
                min_version=version,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        async with aclosing(draw_scored(self.sampler, self.scorer, requests)) as stream:
            rollouts = [rollout async for part in stream for rollout in part]
        rollouts.sort(key=lambda rollout: rollout.sample_id)
        numbers = {
            "response_tokens": float(np.mean([rollout.num_targets for rollout in rollouts])),
            "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
            "prompts": float(len(rollouts)),
        }
        if self.exact:
            numbers = _kls(rollouts) | numbers
        return numbers | self._grades(rollouts), rollouts

    def _grades(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        graded = [
            (prompt.domain, self.grade(prompt, self.decode(rollout.token_ids)))
            for rollout, prompt in zip(rollouts, self.prompts, strict=True)
            if self.grade is not None and self.grade.can_grade(prompt)
        ]
        if not graded:
            return {}
        numbers = {"exact_match": float(np.mean([right for _, right in graded]))}
        domains = {domain for domain, _ in graded if domain is not None}
        if len(domains) > 1:
            for domain in sorted(domains):
                numbers[f"exact_match/{domain}"] = float(np.mean([right for of, right in graded if of == domain]))
        return numbers


def _kls(rollouts: Sequence[Rollout]) -> dict[str, float]:
    if any(rollout.reverse_kl is None or rollout.forward_kl is None for rollout in rollouts):
        raise EngineError("held-out KL needs replicas that hold teacher and student together")
    return {name: float(at_targets(rollouts, name).mean()) for name in ("reverse_kl", "forward_kl")}
