"""A replica compares every version that it loads with the trainer: one more attempt, then a report and a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.serving import replica as module
from actors.serving.replica import TeacherReplica
from actors.weights.store import WeightStore
from kdray.checks.parity import TrainedLogprobs, Verdict
from kdray.errors import EngineError
from tests.support.local_actors import Handle, reference
from tests.support.pools import engine_spec

IDS = tuple(range(10))
TRAINED = np.full(9, -1.0, dtype=np.float32)


class Engine:
    """Loads what it is given; answers with the log q of its turn."""

    dtype = "float32"

    def __init__(self, answers: list[np.ndarray]) -> None:
        self.answers = answers
        self.student_version = self.teacher_version = -1
        self.loads = 0
        self.asked: list[str] = []

    async def update_student(self, paths: list[Path], version: int) -> None:
        self.loads += 1
        self.student_version = version

    async def set_initial_version(self, version: int) -> None:
        self.student_version = version

    async def update_teacher(self, paths: list[Path], version: int) -> None:
        assert version > self.teacher_version
        self.loads += 1
        self.teacher_version = version

    async def log_probabilities(self, ids: tuple[int, ...], which: str = "student") -> np.ndarray:
        assert ids == IDS
        self.asked.append(which)
        return self.answers.pop(0)


async def loaded(
    answers: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, *, teacher: bool = False
) -> tuple[Engine, WeightStore, Exception | None]:
    """Load version 4 into a replica. Args: answers: of its engine; teacher: as its teacher's weights."""
    monkeypatch.setattr(module, "_RUN_ENDS_S", 0.0)
    store, engine = WeightStore(), Engine(answers)
    await store.commit(
        4, [[reference(np.zeros(3, dtype=np.uint8))], [reference(np.ones(2, dtype=np.uint8))]], TrainedLogprobs(TRAINED, 1.0)
    )
    replica = TeacherReplica.__new__(TeacherReplica)
    replica._spec = engine_spec(Path("teacher"), Path("student"), parity_ids=IDS)
    replica._engine = engine  # type: ignore[assignment]
    try:
        if teacher:
            replica._teacher_weights = Handle(store)
            await replica._renew_teacher()
        else:
            await replica._load_student(Handle(store), 4)
    except EngineError as error:
        return engine, store, error
    finally:
        # The destructor of a served replica would close its engine.
        monkeypatch.setattr(TeacherReplica, "__del__", lambda self: None)
    return engine, store, None


async def test_an_equal_version_is_loaded_once_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store, error = await loaded([TRAINED + np.float32(2e-6)], monkeypatch)
    assert (engine.loads, engine.student_version, error) == (1, 4, None)
    verdict = await store.verdict(4)
    assert verdict.accepted
    assert await store.largest_gap() == verdict.gap
    assert await store.largest_gap() is None


async def test_a_version_that_arrived_broken_is_loaded_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store, error = await loaded([TRAINED + 1, TRAINED], monkeypatch)
    assert (engine.loads, engine.student_version, error) == (2, 4, None)
    assert (await store.verdict(4)).accepted


async def test_a_version_refused_twice_is_reported_and_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store, error = await loaded([TRAINED + 1, TRAINED + 1], monkeypatch)
    assert engine.loads == 2
    assert "version 4 of student was refused twice" in str(error)
    verdict = await store.refused()
    assert (verdict.version, verdict.gap) == (4, 1.0)


@pytest.mark.parametrize(("answers", "loads", "refused"), [([0.0], 1, False), ([1.0, 0.0], 2, False), ([1.0, 1.0], 2, True)])
async def test_a_teacher_that_changes_is_compared_with_the_ranks_that_trained_it(
    answers: list[float], loads: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store, error = await loaded([TRAINED + np.float32(gap) for gap in answers], monkeypatch, teacher=True)
    assert (engine.loads, engine.teacher_version, set(engine.asked)) == (loads, 4, {"teacher"})
    assert (error is not None) == refused
    if refused:
        assert "version 4 of teacher t was refused twice" in str(error)
        assert (await store.refused()).gap == 1.0
    # It says nothing of replicas that sample from the student, which the start of a phase waits for.
    assert store._verdict is None


async def test_a_teacher_is_not_compared_where_its_log_p_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStore, "trained", lambda self, version: _none())
    engine, _, error = await loaded([], monkeypatch, teacher=True)
    assert (engine.loads, engine.asked, error) == (1, [], None)


async def test_a_version_without_the_trainers_numbers_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStore, "trained", lambda self, version: _none())
    engine, store, error = await loaded([], monkeypatch)
    assert (engine.loads, error) == (1, None)
    assert await store.largest_gap() is None


async def _none() -> None:
    return None


async def test_the_store_keeps_what_is_asked_for_and_no_history() -> None:
    store = WeightStore()
    for version, gap in enumerate([1e-6, 3e-6, 2e-6]):
        await store.report(Verdict(version, gap, 1e-3))
    await store.report(Verdict(1, 0.5, 1e-3))
    assert (await store.verdict(2)).gap == 2e-6
    assert (await store.refused()).version == 1
    assert await store.largest_gap() == 0.5
    assert await store.largest_gap() is None
