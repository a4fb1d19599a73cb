"""One engine in two processes, on CPUs: exact, equal on both ranks, recorded by one, and dead when one of them is."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.serving.engine import TeacherEngine
from kdray.errors import EngineError
from kdray.types import Rollout, SampleRequest
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.pools import engine_spec

TOLERANCE = 2e-5


def _requests(count: int, max_new_tokens: int = 12) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            index,
            index,
            rng.integers(2, VOCAB, 10 + index).astype(np.int32),
            (0.0, 0.4, 1.0)[index % 3],
            7 + index,
            max_new_tokens,
        )
        for index in range(count)
    ]


async def _draw(engine: TeacherEngine, requests: list[SampleRequest]) -> list[Rollout]:
    return [rollout async for part in engine.sample(requests) for rollout in part]


def _check(models: TinyModels, teacher: Path, student: Path, rollout: Rollout, drawn: bool = True) -> None:
    rows = [models.log_rows(folder, rollout.prompt_ids, rollout.token_ids) for folder in (teacher, student)]
    at = torch.from_numpy(rollout.token_ids).long().unsqueeze(1)
    p, q = (each.gather(1, at).squeeze(1).numpy() for each in rows)
    found = {"teacher_logprobs": p, "reverse_kl": (rows[1].exp() * (rows[1] - rows[0])).sum(1).numpy()}
    if drawn:
        found["student_logprobs"] = q
        with np.errstate(divide="ignore"):
            found["mixture_logprobs"] = np.logaddexp(np.log(rollout.alpha) + p, np.log(1 - rollout.alpha) + q)
    for name, want in found.items():
        assert np.abs(getattr(rollout, name) - want).max() < TOLERANCE, name


async def test_two_ranks_are_exact_and_agree_and_die_together(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks spin while they wait for one another: further threads would take the cores that they wait for.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Few layers and short answers: each layer has the ranks wait for one another twice a token.
    teacher = tiny_models.make("shallow teacher", 1, 128, rows=VOCAB + 5, seed=1)
    student = tiny_models.make("shallow student", 1, 64, seed=2)
    newer = tiny_models.make("shallow newer", 1, 64, seed=3)
    engine = TeacherEngine(engine_spec(teacher, student, tensor_parallel_size=2, max_num_seqs=16, stuck_after_s=60.0))
    await engine.start()
    try:
        rollouts = await _draw(engine, _requests(6))
        for rollout in rollouts:
            _check(tiny_models, teacher, student, rollout)
        blank = [
            replace(rollout, teacher_logprobs=None, support_ids=None, support_logprobs=None, reverse_kl=None)
            for rollout in rollouts
        ]
        scored = [rollout async for part in engine.score(blank) for rollout in part]
        assert len(scored) == len(rollouts)
        for rollout in scored:
            _check(tiny_models, teacher, student, rollout, drawn=False)
        await engine.update_student([newer / "model.safetensors"], 1)
        for rollout in await _draw(engine, _requests(6)):
            _check(tiny_models, teacher, newer, rollout)

        # The first answer comes while the second request still draws.
        short, long = (replace(request, max_new_tokens=tokens) for request, tokens in zip(_requests(2), (1, 200), strict=True))
        stream = engine.sample([short, long])
        await anext(stream)
        first, second = await engine._engine.collective_rpc("kdray_stats")
        assert first["held_positions"] > 0
        assert second["held"] == second["held_positions"] == 0, "only the first rank records"
        await stream.aclose()
        first, second = await engine._engine.collective_rpc("kdray_stats")
        assert first["draws"] == second["draws"] != 0
        assert first["held"] == 0
        await engine.check_progress()

        processes = [each for each in psutil.Process().children(recursive=True) if each.name().startswith("VLLM")]
        workers = [each for each in processes if "Worker" in each.name()]
        assert len(processes) == 3, "the engine and two workers"
        assert len(workers) == 2
        drawing = asyncio.create_task(_draw(engine, _requests(16, max_new_tokens=200)))
        # Neither before the first of them is drawn, nor after the last.
        while not drawing.done() and not (await engine._engine.collective_rpc("kdray_stats"))[0]["held_positions"]:
            pass
        os.kill(workers[1].pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await asyncio.wait_for(drawing, 60)
        with pytest.raises(EngineError):
            await asyncio.wait_for(engine.check_health(), 60)
    finally:
        await engine.close()
    _, left = psutil.wait_procs(processes, timeout=30)
    assert not left, "no process outlives its engine"
