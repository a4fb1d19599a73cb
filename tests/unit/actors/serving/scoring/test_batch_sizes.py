"""An engine that is wrong at one batch size alone is found, and the size is named."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from actors.serving.scoring.batch_sizes import batch_size_gap, check_batch_sizes
from actors.serving.spec import EngineSpec
from kdray.checks.teacher_signal import prefill_tolerance
from kdray.errors import EngineError
from kdray.types import Rollout, SampleRequest

VOCAB = 7
SIZES = [1, 2, 4, 8]


def log_p(ids: Sequence[int], model: float) -> np.ndarray:
    """A model in which a token's log-probability depends on it and its place: [len(ids)]."""
    return -1.0 - model * np.asarray(ids, dtype=np.float64) / (1.0 + np.arange(len(ids)))


class Engine:
    """Samples token `seed % vocabulary`; wrong by `error` in one column at one batch size."""

    def __init__(
        self,
        role: Literal["mixture", "teacher", "student"] = "mixture",
        wrong: str = "",
        error: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        self.spec = EngineSpec(role, "some/model", "s" if role == "mixture" else None, VOCAB, (0,), 64)
        self.dtype, self.wrong, self.error = dtype, wrong, error
        self.drawn: list[int] = []
        self.alphas: set[float] = set()

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.drawn.append(len(requests))
        for request in requests:
            self.alphas.add(request.alpha)
            tokens = np.full(request.max_new_tokens, request.seed % VOCAB, dtype=np.int32)
            ids, start = [*request.prompt_ids, *tokens], len(request.prompt_ids)
            off = {name: self.error if len(requests) == 4 and name == self.wrong else 0.0 for name in ("teacher", "student")}
            yield [
                Rollout(
                    sample_id=request.sample_id,
                    prompt_id=request.prompt_id,
                    prompt_ids=request.prompt_ids,
                    token_ids=tokens,
                    mixture_logprobs=None,
                    student_logprobs=None if self.spec.role == "teacher" else log_p(ids, 0.1)[start:] + off["student"],
                    student_versions=np.zeros(len(tokens), dtype=np.int32),
                    alpha=request.alpha,
                    finish_reason="length",
                    teacher_logprobs=None if self.spec.role == "student" else log_p(ids, 0.2)[start:] + off["teacher"],
                )
            ]

    async def score(self, rollouts: Sequence[Rollout]) -> AsyncGenerator[list[Rollout]]:
        for rollout in reversed(rollouts):
            assert rollout.teacher_logprobs is None, "an engine could give back what it was given"
            ids = [*rollout.prompt_ids, *rollout.token_ids]
            yield [replace(rollout, teacher_logprobs=log_p(ids, 0.2)[len(rollout.prompt_ids) :])]

    async def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        return log_p(ids, 0.1)[1:]


@pytest.mark.parametrize(("role", "alpha"), [("mixture", 0.5), ("teacher", 1.0), ("student", 0.0)])
async def test_a_right_engine_samples_at_every_size(role: Literal["mixture", "teacher", "student"], alpha: float) -> None:
    engine = Engine(role)
    await check_batch_sizes(engine, SIZES)
    assert engine.drawn == SIZES
    assert engine.alphas == {alpha}


@pytest.mark.parametrize(
    ("role", "wrong"), [("mixture", "teacher"), ("mixture", "student"), ("teacher", "teacher"), ("student", "student")]
)
@pytest.mark.parametrize("error", [0.5, np.nan])
async def test_a_wrong_size_is_named(role: Literal["mixture", "teacher", "student"], wrong: str, error: float) -> None:
    engine = Engine(role, wrong, error)
    with pytest.raises(EngineError, match=r"some/model computes other probabilities for 4 sequences at once .*enforce_eager"):
        await check_batch_sizes(engine, SIZES)
    assert engine.drawn == [1, 2, 4]


async def test_rounding_is_that_of_the_dtype() -> None:
    between = (prefill_tolerance("float32") + prefill_tolerance("bfloat16")) / 2
    await check_batch_sizes(Engine(wrong="student", error=between, dtype="bfloat16"), SIZES)
    with pytest.raises(EngineError, match="4 sequences"):
        await check_batch_sizes(Engine(wrong="student", error=between), SIZES)


async def test_the_gap_is_the_larger_of_both_models() -> None:
    assert await batch_size_gap(Engine(wrong="teacher", error=0.125), 4) == pytest.approx(0.125)
    assert await batch_size_gap(Engine(wrong="teacher", error=0.125), 2) == 0.0
