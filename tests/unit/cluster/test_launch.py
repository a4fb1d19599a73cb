"""Checks of a run that come before everything else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import launch
from cluster.connect import check_local_cpus
from cluster.launch import run
from cluster.parts import Pools
from cluster.planning.placement import bundles
from kdray.config import Config, parse_config
from kdray.errors import CapacityError, ConfigError, Interrupted, TrainingError
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.storage import Storage
from kdray.runs.watchdog import Watchdog


def test_a_name_that_is_taken_is_refused_before_models_are_read(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no-model")
    config = parse_config(
        {
            "run": {"name": "taken", "output": str(tmp_path)},
            "student": {"model": nowhere},
            "teachers": {"t": {"model": nowhere}},
        }
    )
    RunFolder.create(config).append_metrics({"step": 1})
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        run(config)


def tiny(tmp_path: Path, **sections: Any) -> Config:
    model = {"model": {"type": "tiny"}}
    run = {"name": "small", "output": str(tmp_path)}
    return parse_config({"run": run, "student": model, "teachers": {"t": model}} | sections)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.connect.start_local", refuse)


@pytest.mark.usefixtures("no_ray")
def test_too_few_cpus_are_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, cluster={"local_cpus": 1})
    with pytest.raises(CapacityError, match=r"the run needs 2 CPU .*cluster.local_cpus lets small models share cores"):
        run(config)
    assert not config.run_folder.exists()
    monkeypatch.setattr("cluster.connect.get_num_cpus", lambda: 1)
    with pytest.raises(CapacityError, match="needs 2 CPU"):
        check_local_cpus(tiny(tmp_path), bundles(tiny(tmp_path)))
    check_local_cpus(tiny(tmp_path, cluster={"local_cpus": 2}), bundles(tiny(tmp_path)))
    # Of other resources Ray will tell.
    more = tiny(tmp_path, cluster={"local_cpus": 2, "roles": {"training": {"gpus_per_rank": 1}}})
    check_local_cpus(more, bundles(more))
    # The cluster's CPUs are not this machine's.
    check_local_cpus(tiny(tmp_path, cluster={"address": "head:6379"}), bundles(tiny(tmp_path)))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"storage": "file:///nowhere/at/all"}, r"run\.storage=file:///nowhere/at/all"),
        (
            {"output": "{tmp}/file/runs"},
            r"run\.output=.*/file/runs: the run's folder cannot be written there: .*/file is a file",
        ),
    ],
)
def test_places_that_cannot_be_written_are_told_before_models_are_read(
    section: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("models were read")

    monkeypatch.setattr("cluster.launch.check", refuse)
    (tmp_path / "file").touch()
    named = {name: value.format(tmp=tmp_path) for name, value in section.items()}
    with pytest.raises(ConfigError, match=words):
        run(tiny(tmp_path, run={"name": "small", "output": str(tmp_path), **named}))


@pytest.mark.usefixtures("no_ray")
def test_a_resume_that_cannot_be_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run to resume"):
        run(tiny(tmp_path), resume=True)
    RunFolder.create(tiny(tmp_path))
    with pytest.raises(ConfigError, match="the run to resume had other settings: rollout.alpha: 0.2 there, 0.5 now. Give it"):
        run(tiny(tmp_path, rollout={"alpha": 0.5}), resume=True)


@pytest.mark.usefixtures("no_ray")
def test_a_run_that_has_ended_is_not_run_again(tmp_path: Path) -> None:
    """Its summary is what a resume returns, while its student is there and nothing is to be done."""
    config = tiny(tmp_path)
    folder = RunFolder.create(config)
    folder.append_event("start")
    folder.append_event("finished", steps=3)
    folder.write_summary({"steps": 3})
    phases: list[str | None] = []
    with pytest.raises(AssertionError, match="Ray was started"):
        run(config, resume=True)
    commit(Storage.local(folder.path), "student", {}, [])
    assert run(config, resume=True, on_phase=phases.append) == {"steps": 3}
    assert phases == ["reading its results: the run has ended already"]
    with pytest.raises(AssertionError, match="Ray was started"):
        run(tiny(tmp_path, training={"steps": 2000, "schedule": "constant"}), resume=True)
    folder.append_event("start")
    with pytest.raises(AssertionError, match="Ray was started"):
        run(config, resume=True)


@pytest.mark.parametrize(
    ("error", "code"), [(None, 1), (TrainingError("lost"), 1), (Interrupted("asked to"), 130), (ConfigError("no room"), 2)]
)
def test_whatever_ends_a_run_its_process_has_a_deadline_to_end(
    error: Exception | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Told(Watchdog):
        def must_end(self, what: str, within_s: float | None = None, exit_code: int = 1) -> None:
            told.append((what, exit_code))

        def ended(self) -> None:
            told.append("ended")

    @contextlib.contextmanager
    def connected(config: Config) -> Iterator[None]:
        told.append("connects")
        try:
            yield
        finally:
            told.append("disconnects")

    @contextlib.contextmanager
    def reserved(*_: object) -> Iterator[Any]:
        yield type("Room", (), {"release": None})

    def run_coroutine(work: Coroutine[Any, Any, Any]) -> Any:
        work.close()
        told.append("runs")
        if error is not None:
            raise error
        return {"": {}}

    for name, fake in {"Watchdog": Told, "connected": connected, "reserved": reserved, "run_coroutine": run_coroutine}.items():
        monkeypatch.setattr(launch, name, fake)
    monkeypatch.setattr(launch, "check_local_cpus", lambda *_: None)
    monkeypatch.setattr(launch, "driver_node", lambda: None)
    monkeypatch.setattr(launch, "check_head", lambda *_: None)
    monkeypatch.setattr(launch, "write_report", lambda folder: told.append("report"))
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        run(tiny(tmp_path))
    assert told[:4] == [("the connection to Ray and Ray Serve", 1), "connects", "ended", "runs"]
    # Ended by force after a success, too: it has not returned its result.
    last, *between = told[4:-2]
    assert last == (launch._LAST_WORDS, code)
    assert between == (["ended", "report"] if error is None else [last])
    assert told[-2:] == [("the shutdown of Ray", code), "disconnects"]


@pytest.mark.parametrize("command", [launch.evaluate, launch.check_teachers])
def test_other_commands_have_it_too(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Told(Watchdog):
        def must_end(self, what: str, within_s: float | None = None, exit_code: int = 1) -> None:
            told.append((what, exit_code))

    @contextlib.contextmanager
    def connected(config: Config) -> Iterator[None]:
        yield
        told.append("disconnects")

    monkeypatch.setattr(launch, "Watchdog", Told)
    monkeypatch.setattr(launch, "connected", connected)
    monkeypatch.setattr(launch, "driver_node", lambda: None)
    monkeypatch.setattr(launch, "check_head", lambda *_: None)
    monkeypatch.setattr(launch, "_await_room", lambda *_: None)
    monkeypatch.setattr(launch, "run_coroutine", lambda work: work.close())
    monkeypatch.setattr(launch, "_evaluate", lambda *_: None)
    monkeypatch.setattr(launch, "_check_teachers", lambda *_: None)
    command(tiny(tmp_path))
    # Its numbers are shown after that: without them it has failed.
    assert told == [("the connection to Ray and Ray Serve", 1), ("the shutdown of Ray", 1), "disconnects"]


@pytest.mark.parametrize("command", ["eval", "doctor"])
async def test_a_command_whose_pools_say_nothing_any_more_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """As where the only node with GPUs is lost in the middle of an evaluation: replicas are then waited for."""
    pool: Any = SimpleNamespace(name="t", answered_at=0.0, waits_for=lambda: ["pool t (0 replicas serve): 3 rollouts"])

    @contextlib.asynccontextmanager
    async def pools(*_: object) -> AsyncIterator[Pools]:
        yield Pools(sampler=pool, scorer=None, all=[pool], others=[])

    async def silence(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(launch, "open_pools", pools)
    monkeypatch.setattr(launch, "on_driver_node", lambda kind: SimpleNamespace(remote=lambda known: None))
    monkeypatch.setattr(launch, "held_out", lambda context, pools: SimpleNamespace(measure=lambda version: silence()))
    monkeypatch.setattr(launch, "check_signals", silence)
    monkeypatch.setattr(Pools, "named", property(lambda self: self.all))
    work = launch._evaluate if command == "eval" else launch._check_teachers
    context: Any = SimpleNamespace(config=tiny(tmp_path))
    waits = r"waits for pool t \(0 replicas serve\): 3 rollouts.*; again"
    with Watchdog(0.2, 60.0, tmp_path, remedy="again") as watchdog, pytest.raises(TrainingError, match=waits):
        await asyncio.wait_for(watchdog.over(work(context, watchdog)), 20)
