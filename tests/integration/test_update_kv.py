"""Keys and values that an update of the student keeps: nothing is computed again, and what is recorded is what was sampled."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.serving.engine import TeacherEngine
from cluster.diagnosis.rates import PLAN_WITHIN, planned_kv_tokens
from kdray.types import Rollout, SampleRequest
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.pools import engine_spec

TOLERANCE = 1e-4


def _requests(max_new_tokens: int) -> list[SampleRequest]:
    """Long prompts with a beginning in common, as the prefix cache finds them."""
    rng = np.random.default_rng(2)
    shared = rng.integers(2, VOCAB, 64)
    return [
        SampleRequest(
            index, index, np.append(shared, rng.integers(2, VOCAB, 8)).astype(np.int32), 0.3, 40 + index, max_new_tokens
        )
        for index in range(8)
    ]


async def _draw(engine: TeacherEngine, requests: list[SampleRequest]) -> list[Rollout]:
    return [rollout async for part in engine.sample(requests) for rollout in part]


async def _draw_over_an_update(engine: TeacherEngine, paths: list[Path], version: int) -> list[Rollout]:
    drawing = asyncio.create_task(_draw(engine, _requests(150)))
    while (await engine.stats())["held_positions"] < 80:
        assert not drawing.done()
    await engine.update_student(paths, version)
    return await drawing


async def test_kept_keys_and_values_cost_nothing_and_are_recorded_as_sampled(tiny_models: TinyModels) -> None:
    teacher = tiny_models.make("teacher", 3, 128, rows=VOCAB + 5, seed=1)
    old = tiny_models.make("student-False", 2, 64, seed=2)
    new = tiny_models.make("newer-False", 2, 64, seed=3)
    engine = TeacherEngine(engine_spec(teacher, old, update_kv="keep"))
    await engine.start()
    # Its cache is of the size that `kdray plan` counts.
    assert engine.kv_tokens == pytest.approx(planned_kv_tokens(engine.spec), rel=PLAN_WITHIN)
    try:
        paths = [new / "model.safetensors"]
        rollouts = await _draw_over_an_update(engine, paths, 1)
        stats = await engine.stats()
        assert stats["recomputed_tokens"] == stats["readmitted"] == 0
        spanning = 0
        for rollout in rollouts:
            student = tiny_models.log_rows(old, rollout.prompt_ids, rollout.token_ids)
            at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
            gap = np.abs(rollout.student_logprobs - student.gather(1, at).squeeze(1).numpy())
            changed = np.flatnonzero(gap > TOLERANCE)
            if len(changed):
                spanning += 1
                student[changed[0] :] = _rows_on_kept(tiny_models, old, new, rollout, int(changed[0]))
            _check(tiny_models, teacher, student, rollout)
            assert (rollout.student_versions == 0).all(), "as old as its keys and values"
        assert spanning > 0, "no rollout spanned the update: the test does not test what it says"

        # The same prompts after it: their cached prefixes are another version's.
        cached = stats["cached_tokens"]
        for rollout in await _draw(engine, _requests(20)):
            _check(tiny_models, teacher, tiny_models.log_rows(new, rollout.prompt_ids, rollout.token_ids), rollout)
            assert (rollout.student_versions == 1).all()
        assert (await engine.stats())["cached_tokens"] >= cached

        # The counter counts: recomputing is the same engine's other way.
        engine.spec = replace(engine.spec, update_kv="recompute")
        await _draw_over_an_update(engine, [old / "model.safetensors"], 2)
        assert (await engine.stats())["recomputed_tokens"] > 8 * 72
    finally:
        await engine.close()


def _rows_on_kept(models: TinyModels, old: Path, new: Path, rollout: Rollout, first: int) -> torch.Tensor:
    """Rows of the new student from response position `first` on, over the old one's keys and values of everything before."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.token_ids])).long().unsqueeze(0)
    start = len(rollout.prompt_ids) + first - 1
    with torch.no_grad():
        kept = models.load(old)(ids[:, :start], use_cache=True).past_key_values
        logits = models.load(new)(ids[:, start:-1], past_key_values=kept).logits[0, :, :VOCAB]
    return logits.log_softmax(-1)


def _check(models: TinyModels, teacher: Path, student: torch.Tensor, rollout: Rollout) -> None:
    at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
    p = models.log_rows(teacher, rollout.prompt_ids, rollout.token_ids).gather(1, at).squeeze(1).numpy()
    q = student.gather(1, at).squeeze(1).numpy()
    mixture = np.logaddexp(np.log(rollout.alpha) + p, np.log(1 - rollout.alpha) + q)
    for name, want in (("teacher_logprobs", p), ("student_logprobs", q), ("mixture_logprobs", mixture)):
        assert np.abs(getattr(rollout, name) - want).max() < TOLERANCE, name
