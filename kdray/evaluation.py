"""Held-out measurement through the same verbs as the loop: the student's own samples, drawn with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing

import numpy as np

from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.columns import at_targets
from kdray.rollouts.draw import draw_scored
from kdray.rollouts.seeds import sample_seed
from kdray.types import Prompt, Rollout, SampleRequest


async def evaluate(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    scorer: Scorer | None,
    decode: Callable[[np.ndarray], str],
    grade: Callable[[str, str], bool] | None,
    max_new_tokens: int,
    seed: int,
    version: int,
    alpha: float = 0.0,
    exact: bool = True,
    samples_per_prompt: int = 1,
) -> tuple[dict[str, float], list[Rollout]]:
    """Numbers over the held-out prompts, and the rollouts behind them in the order of the prompts.

    `reverse_kl` and `forward_kl` are nats per response token over full rows, on temperature-1 samples of the student
    (alpha 0; 1 measures the teacher itself), a mean over tokens. `exact_match` in [0, 1] is there where the task is graded,
    and `exact_match/<domain>` where prompts have several domains.

    Args: version: the student version to measure; replicas update before they sample; exact: whether KLs are measured, which
          takes replicas that hold teacher and student together; samples_per_prompt: of a sampler that tells a prompt's samples
          apart by their ids; the first of each is drawn.
    Raises: EngineError where the replicas cannot give full-row KLs.
    """
    requests = [
        SampleRequest(
            sample_id=index * samples_per_prompt,
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            alpha=alpha,
            seed=sample_seed(seed, "heldout", prompt.prompt_id),
            max_new_tokens=max_new_tokens,
            min_version=version,
        )
        for index, prompt in enumerate(prompts)
    ]
    async with aclosing(draw_scored(sampler, scorer, requests)) as stream:
        rollouts = [rollout async for part in stream for rollout in part]
    rollouts.sort(key=lambda rollout: rollout.sample_id)
    numbers = {
        "response_tokens": float(np.mean([rollout.num_targets for rollout in rollouts])),
        "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "prompts": float(len(rollouts)),
    }
    if exact:
        numbers = _kls(rollouts) | numbers
    if grade is not None:
        graded = [
            (prompt.domain, grade(decode(rollout.token_ids), prompt.answer))
            for rollout, prompt in zip(rollouts, prompts, strict=True)
            if prompt.answer is not None
        ]
        numbers["exact_match"] = float(np.mean([right for _, right in graded]))
        domains = {domain for domain, _ in graded if domain is not None}
        if len(domains) > 1:
            for domain in sorted(domains):
                numbers[f"exact_match/{domain}"] = float(np.mean([right for of, right in graded if of == domain]))
    return numbers, rollouts


def _kls(rollouts: Sequence[Rollout]) -> dict[str, float]:
    if any(rollout.reverse_kl is None or rollout.forward_kl is None for rollout in rollouts):
        raise EngineError("held-out KL needs replicas that hold teacher and student together")
    return {name: float(at_targets(rollouts, name).mean()) for name in ("reverse_kl", "forward_kl")}
