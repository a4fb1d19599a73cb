"""Check of an engine at its start: what it records while it samples is what it computes by prefill, at every batch size.

A captured graph belongs to one size of batch, and graphs share memory, so that one size can be wrong while the others are right
(vLLM's pull request 22282 describes two models whose graphs overwrite each other's outputs).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Protocol

import numpy as np

from actors.serving.spec import EngineSpec
from kdray.checks.teacher_signal import prefill_tolerance
from kdray.errors import EngineError
from kdray.rollouts.columns import unscored
from kdray.types import Rollout, SampleRequest

_PROMPT, _NEW_TOKENS = 8, 4

_CAUSES = {
    "v1": "Its captured graphs cannot be trusted: set engine_args.enforce_eager=true",
    "v2": "Its captured graphs or its recorder cannot be trusted: set model_runner=v1",
}
"""Model runner of vLLM -> cause of a gap, and remedy."""


class CheckedEngine(Protocol):
    """What the check asks of `actors.serving.engine.TeacherEngine`."""

    spec: EngineSpec

    @property
    def dtype(self) -> str: ...
    def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]: ...
    def score(self, rollouts: Sequence[Rollout]) -> AsyncGenerator[list[Rollout]]: ...
    async def log_probabilities(self, ids: Sequence[int]) -> np.ndarray: ...


async def check_batch_sizes(engine: CheckedEngine, sizes: Sequence[int]) -> None:
    """Compare at each of the sizes. Raises: EngineError naming the first that is beyond tolerance."""
    tolerance = prefill_tolerance(engine.dtype)
    for size in sizes:
        gap = await batch_size_gap(engine, size)
        if not gap <= tolerance:
            raise EngineError(
                f"the engine of {engine.spec.model} computes other probabilities for {size} sequences at once than by prefill: "
                f"they differ by {gap:.2g} nats a token (at most {tolerance:g} is rounding). "
                f"{_CAUSES[engine.spec.model_runner]}, and report it with `kdray doctor --deep`"
            )


async def batch_size_gap(engine: CheckedEngine, size: int) -> float:
    """The larger mean distance of log p and log q, sampled for `size` requests at once, from prefill: nats a token."""
    requests = [_request(engine.spec, size, index) for index in range(size)]
    sampled = {each.sample_id: each async for part in engine.sample(requests) for each in part}
    gaps = []
    if engine.spec.role != "student":
        blank = [unscored(each) for each in sampled.values()]
        scored = {each.sample_id: each async for part in engine.score(blank) for each in part}
        gaps.append(_gap((each.teacher_logprobs, scored[key].teacher_logprobs) for key, each in sampled.items()))
    if engine.spec.role != "teacher":
        prefilled = await asyncio.gather(*(_student(engine, each) for each in sampled.values()))
        sampler = (each.student_logprobs for each in sampled.values())
        gaps.append(_gap(zip(sampler, prefilled, strict=True)))
    # Not `max`, which may lose a nan.
    return float(np.max(gaps))


def _request(spec: EngineSpec, size: int, index: int) -> SampleRequest:
    rng = np.random.default_rng([spec.seed, size, index])
    length = max(1, min(_PROMPT, spec.max_model_len - _NEW_TOKENS))
    alpha = {"teacher": 1.0, "student": 0.0}.get(spec.role, 0.5)
    return SampleRequest(
        sample_id=index,
        prompt_id=index,
        prompt_ids=rng.integers(0, spec.vocab_size, size=length).astype(np.int32),
        alpha=alpha,
        seed=int(rng.integers(0, 2**63)),
        max_new_tokens=min(_NEW_TOKENS, spec.max_model_len - length),
    )


async def _student(engine: CheckedEngine, rollout: Rollout) -> np.ndarray:
    ids = np.concatenate([rollout.prompt_ids, rollout.token_ids]).tolist()
    return (await engine.log_probabilities(ids))[len(rollout.prompt_ids) - 1 :]


def _gap(pairs: Iterable[tuple[np.ndarray | None, np.ndarray | None]]) -> float:
    """Mean distance over all tokens; nan if one is not finite."""
    gaps = []
    for sampled, prefilled in pairs:
        assert sampled is not None
        assert prefilled is not None
        with np.errstate(invalid="ignore"):
            gaps.append(np.abs(sampled.astype(np.float64) - prefilled))
    return float(np.concatenate(gaps).mean())
