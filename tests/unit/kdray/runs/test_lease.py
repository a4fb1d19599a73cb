"""One driver a run: who may take a lease, and what a driver that lost it still writes.

Whole runs are those of `tests.support.stub_run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kdray.errors import ConfigError, LeaseLost
from kdray.runs import lease as module
from kdray.runs.checkpoints import COMMITTED, FILES, checkpoint_at, differing
from kdray.runs.folder import LEASE, RunFolder
from kdray.runs.lease import Holder, Lease, leased, read_holder
from kdray.runs.remote_copy import StoredRun
from kdray.runs.storage import Retry, Storage
from kdray.runs.verify import verify
from tests.support.stub_run import main, stub_config

SHORT_S = 0.6
LONG_S = 30.0
"""For drivers that must not be taken for dead on a busy machine."""


def holder(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / LEASE).read_text()))


def leave(run: Path, **changes: Any) -> Holder:
    """The lease of a driver that is gone, or of another machine."""
    run.mkdir(exist_ok=True)
    found = replace(Holder.here(), epoch=3, heartbeat=time.time(), **changes)
    (run / LEASE).write_text(json.dumps(asdict(found)))
    return found


def take(run: Path, stale_after_s: float = SHORT_S) -> Lease:
    return Lease([Storage.local(run)], stale_after_s).take()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r"


# --------------------------------------------------------------------------------------------------------- to take


def test_it_is_taken_renewed_and_removed_with_the_folders_that_it_made(run: Path) -> None:
    with take(run) as lease:
        first = holder(run)
        assert (first["pid"], first["epoch"], first["owner"]) == (os.getpid(), 1, lease.owner)
        time.sleep(SHORT_S)
        assert holder(run)["heartbeat"] > first["heartbeat"]
        lease.check_everywhere()
    assert not run.parent.exists()


def test_a_folder_with_files_stays(run: Path) -> None:
    with take(run):
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_driver_at_work_is_named(run: Path) -> None:
    with take(run), pytest.raises(ConfigError, match=rf"runs/r: process {os.getpid()} on .* is at work on this run"):
        take(run)
    with take(run) as after:
        after.check()


def test_of_drivers_that_start_at_once_one_goes_on(run: Path) -> None:
    taken, refused, barrier = [], [], threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            taken.append(take(run, 60.0))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].check()
    taken[0].release()


@pytest.mark.parametrize("started", [1, None])
def test_a_dead_process_of_this_machine_is_followed_at_once(run: Path, started: int | None) -> None:
    """Its number may be another process's by now, as this one's is here."""
    run.parent.mkdir()
    leave(run, started=started, owner="before")
    before = time.monotonic()
    with take(run, stale_after_s=600.0) as lease:
        assert time.monotonic() - before < 5.0
        assert (lease.epoch, holder(run)["epoch"]) == (4, 4)


def test_a_process_that_nobody_has_waited_for_is_dead(run: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = replace(Holder.here(), pid=child.pid, started=module._start_of(child.pid))
    assert not here.is_dead
    child.kill()
    deadline = time.monotonic() + 20
    while not here.is_dead:
        assert time.monotonic() < deadline
    child.communicate()
    assert here.is_dead


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"machine": "other"}, {"machine": ""}])
def test_another_machine_is_followed_once_its_heartbeat_is_old_and_stands_still(run: Path, elsewhere: dict[str, str]) -> None:
    run.parent.mkdir()
    left = leave(run, pid=1, started=0, **elsewhere)
    with pytest.raises(ConfigError, match="process 1 on .* is at work on this run"):
        take(run)
    time.sleep(SHORT_S)
    with take(run) as lease:
        assert lease.epoch == left.epoch + 1


def test_a_driver_whose_clock_is_slow_is_not_followed(run: Path) -> None:
    """Its heartbeats look old, and yet they come."""
    run.parent.mkdir()
    old = leave(run, host="other", owner="slow")
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.02):
            beats += 1
            Storage.local(run).write(LEASE, json.dumps(asdict(replace(old, heartbeat=beats))).encode())

    (run / LEASE).write_text(json.dumps(asdict(replace(old, heartbeat=0.0))))
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigError, match="on other is at work"):
            take(run, 9.0)
    finally:
        stop.set()
        beating.join()
    assert holder(run)["owner"] == "slow"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.output=.*file: the run's folder cannot be written there"):
        leased(stub_config(tmp_path / "file"), None)


# --------------------------------------------------------------------------------------------------------- to lose


@pytest.mark.parametrize("change", [lambda run: leave(run, owner="other"), lambda run: (run / LEASE).unlink()])
async def test_who_lost_it_writes_nothing_more(run: Path, change: Callable[[Path], Any]) -> None:
    (run.parent).mkdir()
    with take(run) as lease:
        folder = RunFolder(run, lease.check)
        folder.append_event("before")
        change(run)
        left = (run / LEASE).read_text() if (run / LEASE).exists() else None
        for write in (
            lambda: folder.append_event("after"),
            lambda: folder.append_metrics({"step": 1}),
            lambda: folder.write_summary({}),
            lambda: lease.ticket.check(),
        ):
            with pytest.raises(LeaseLost, match="lease is gone|has taken over the run"):
                write()
        with pytest.raises(LeaseLost):
            await lease.watch()
        await asyncio.sleep(SHORT_S / 2)
    assert ((run / LEASE).read_text() if (run / LEASE).exists() else None) == left
    assert [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()] == ["before"]


def test_a_storage_is_leased_too(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    config = stub_config(tmp_path / "here", run={"name": "stub", "output": str(tmp_path / "here"), "seed": 5})
    config = config.model_copy(update={"run": config.run.model_copy(update={"storage": (tmp_path / "shared").as_uri()})})
    elsewhere = config.model_copy(update={"run": config.run.model_copy(update={"output": tmp_path / "there"})})
    copy = tmp_path / "shared" / "stub"
    with leased(config, StoredRun.of(config), SHORT_S) as lease:
        assert holder(copy)["owner"] == lease.owner
        # From another folder, as on another machine.
        with pytest.raises(ConfigError, match="shared/stub: process .* is at work on this run"):
            leased(elsewhere, StoredRun.of(elsewhere), SHORT_S)
        assert not (tmp_path / "there").exists()
        lease.check_everywhere()
        leave(copy, owner="other")
        with pytest.raises(LeaseLost, match="shared/stub"):
            lease.check_everywhere()
    found = read_holder(Storage.local(copy))
    assert found is not None
    assert found.owner == "other"


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def forked() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.stub_run", "torch.utils.tensorboard", "transformers"])
    return context


@pytest.fixture
def going(forked: Any, tmp_path: Path) -> Iterator[tuple[Any, Path, Path]]:
    """A driver in its first steps, its recipe and its run."""
    config = stub_config(tmp_path, training={"steps": 60, "checkpoint_every": 3})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump())
    driver = forked.Process(target=main, args=(recipe, True, LONG_S))
    driver.start()
    await_steps(driver, config.run_folder, 5)
    yield driver, recipe, config.run_folder
    if driver.is_alive():
        os.kill(driver.pid, signal.SIGCONT)
        driver.kill()
        driver.join()


def await_steps(driver: Any, run: Path, steps: int) -> None:
    ledger, deadline = run / "ledger.jsonl", time.monotonic() + 120
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < steps:
        assert driver.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stop(driver: Any) -> None:
    """Have a driver stand still, and wait for that: a thread within a call to the system ends that before it stops."""
    os.kill(driver.pid, signal.SIGSTOP)
    threads, deadline = Path(f"/proc/{driver.pid}/task"), time.monotonic() + 20
    while any((each / "stat").read_text().rpartition(")")[2].split()[0] != "T" for each in threads.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def refused(recipe: Path, told: Any) -> None:
    try:
        main(recipe, True, LONG_S)
    except ConfigError as error:
        told.put(str(error))


def files(run: Path) -> dict[str, bytes]:
    """What a driver writes and what counts: neither files of trackers, which have names of their own, nor those that no marker
    of a checkpoint lists, to which a save that a driver was in the middle of may add; nor a file that has not taken its place
    yet."""
    written = [path for path in run.rglob("*") if path.is_file() and not {"tb", "checkpoints"} & set(path.parts)]
    for marker in run.glob(f"checkpoints/*/{COMMITTED}"):
        written += [marker, *(marker.parent / name for name in json.loads(marker.read_bytes())[FILES])]
    return {str(path.relative_to(run)): path.read_bytes() for path in written if not _temporary(path)}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _temporary(path: Path) -> bool:
    return path.suffix == ".partial" or path.name.startswith(".")


def ended(driver: Any) -> int:
    driver.join(120)
    return int(driver.exitcode)


def test_a_second_driver_is_refused_and_the_first_ends_as_if_alone(forked: Any, going: Any, tmp_path: Path) -> None:
    driver, recipe, run = going
    told = forked.Queue()
    second = forked.Process(target=refused, args=(recipe, told))
    second.start()
    message = told.get(timeout=120)
    assert f"process {driver.pid} on " in message
    assert ended(second) == 0
    assert ended(driver) == 0
    config = stub_config(tmp_path, "whole", training={"steps": 60, "checkpoint_every": 3})
    (tmp_path / "whole.yaml").write_text(config.dump())
    alone = forked.Process(target=main, args=(tmp_path / "whole.yaml",))
    alone.start()
    assert ended(alone) == 0
    assert (run / "ledger.jsonl").read_bytes() == (config.run_folder / "ledger.jsonl").read_bytes()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        path.name for path in sorted((config.run_folder / "checkpoints").iterdir())
    ]
    assert json.loads((run / "summary.json").read_text())["lost_samples"] == 0
    assert verify(run).problems == []
    assert not (run / LEASE).exists()


def test_a_killed_driver_is_followed_at_once(forked: Any, going: Any) -> None:
    driver, recipe, run = going
    driver.kill()
    driver.join()
    assert (run / LEASE).exists()
    # So long a time that the test would not end if the driver waited for it.
    second = forked.Process(target=main, args=(recipe, False, 600.0))
    second.start()
    assert ended(second) == 0
    assert verify(run).problems == []


def test_a_lease_is_given_back_without_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that told: who is told of retries writes an event, for which the lease is no longer there."""
    here, shared = tmp_path / "here", tmp_path / "shared"
    shared.mkdir()
    told: list[Retry] = []
    places = [Storage.local(here), Storage(shared.as_uri(), on_retry=told.append, patience_s=20.0)]
    lease = Lease(places, SHORT_S).take()
    opened = Storage._open

    def is_away(storage: Storage, key: str) -> Any:
        if storage.url == shared.as_uri():
            raise OSError("the share does not answer")
        return opened(storage, key)

    monkeypatch.setattr(Storage, "_open", is_away)
    lease.release()
    assert not told
    assert not (here / LEASE).exists()
    # In the storage it is taken over like that of a machine that is gone.
    assert (shared / LEASE).exists()


def test_a_lease_that_a_storage_misses_once_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.0)
    place = Storage.local(tmp_path)
    with Lease([place]).take() as lease:
        read, answers = module.read_holder, [None]
        monkeypatch.setattr(module, "read_holder", lambda asked: answers.pop() if answers else read(asked))
        lease.ticket.check()
        assert not answers
        answers += [None, None]
        with pytest.raises(LeaseLost, match="the run's lease is gone"):
            lease.ticket.check()


@pytest.mark.parametrize("stops_in", ["run folder", "storage"])
def test_a_driver_that_stops_within_its_renewal_takes_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_in: str
) -> None:
    """The lease was looked at, and is written when a successor has it."""
    stale_s = 3.0
    here, storage = tmp_path / "run", tmp_path / "storage"
    places = [Storage.local(here), Storage.local(storage)]
    stopped_at = here if stops_in == "run folder" else storage
    write, stopped, goes_on = Storage.write, threading.Event(), threading.Event()

    def held(place: Storage, key: str, content: Any) -> Any:
        if place in first._renewed and place.root == str(stopped_at) and not stopped.is_set():
            stopped.set()
            goes_on.wait()
        return write(place, key, content)

    first = Lease(places, stale_s).take()
    monkeypatch.setattr(Storage, "write", held)
    assert stopped.wait(20)
    time.sleep(stale_s)
    with Lease([Storage.local(stopped_at)], stale_s).take() as second:
        goes_on.set()
        deadline = time.monotonic() + 20
        while holder(stopped_at)["owner"] != first.owner:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        # What it now sees in the file is its own lease.
        with pytest.raises(LeaseLost, match=f"{stopped_at}: process .* has taken over"):
            first.check_everywhere()
        second.check_everywhere()
        second.ticket.check()
    assert not (stopped_at / LEASE).exists()
    first.release()


def test_a_lease_that_a_predecessor_took_back_goes_with_its_holder(run: Path) -> None:
    with take(run, LONG_S) as lease:
        (run / LEASE).write_text(json.dumps(asdict(replace(Holder.here(), epoch=lease.epoch - 1, heartbeat=time.time()))))
        lease.check_everywhere()
    assert not (run / LEASE).exists()


def test_nothing_is_renewed_after_the_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = take(run)
    write, began, goes_on = Storage.write, threading.Event(), threading.Event()

    def slow(place: Storage, key: str, content: Any) -> Any:
        began.set()
        goes_on.wait(20)
        return write(place, key, content)

    # As in an object store, which has no locks.
    monkeypatch.setattr(module, "_locked", lambda place: contextlib.nullcontext())
    monkeypatch.setattr(Storage, "write", slow)
    monkeypatch.setattr(lease, "_beat_s", 20.0)
    assert began.wait(20)
    threading.Timer(0.3, goes_on.set).start()
    lease.release()
    assert not run.exists()


_STANDS_AT = "step-000006"


def stands_in_a_save(recipe: Path) -> None:
    """A driver whose disk stands still between two files of a checkpoint, until the test lets it go on. Its bytes are its own,
    as they are where rollouts are stale."""
    write = Storage.write

    def slow(storage: Storage, key: str, content: bytes, *guard: Any) -> Any:
        if not key.endswith("updates.json"):
            return write(storage, key, content, *guard)
        released = recipe.with_name("go on")
        while _STANDS_AT in key and not released.exists():
            time.sleep(0.01)
        return write(storage, key, content + b" ")

    Storage.write = slow  # type: ignore[method-assign]
    main(recipe, True, LONG_S)


def test_a_driver_that_stood_still_in_a_save_writes_into_no_checkpoint_of_its_successor(forked: Any, tmp_path: Path) -> None:
    """Both write the files of step 6, the first one its last after the second has committed."""
    config = stub_config(tmp_path, training={"steps": 12, "keep_checkpoints": 9})
    recipe, run = tmp_path / "recipe.yaml", config.run_folder
    recipe.write_text(config.dump())
    first = forked.Process(target=stands_in_a_save, args=(recipe,))
    first.start()
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints" / _STANDS_AT).rglob("student.npy")):
        assert first.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    stop(first)
    time.sleep(2 * SHORT_S)
    second = forked.Process(target=main, args=(recipe, True, SHORT_S))
    second.start()
    assert ended(second) == 0
    left = files(run)
    os.kill(first.pid, signal.SIGCONT)
    recipe.with_name("go on").touch()
    assert ended(first) == 1
    assert changed(left, files(run)) == []
    late = [path for path in run.rglob("updates.json") if path.read_bytes().endswith(b" ") and _STANDS_AT in path.parts]
    assert len(late) == 1, "the first one wrote nothing late: the test does not test what it says"
    storage = Storage.local(run)
    for step in (0, 3, 6, 9, 12):
        found = checkpoint_at([storage], step)
        written = found.marker[FILES]
        assert differing(written, {name: storage.digest(f"{found.key}/{name}") for name in written}) is None


def test_a_driver_that_stood_still_writes_nothing_more(forked: Any, going: Any) -> None:
    driver, recipe, run = going
    stop(driver)
    # The first one's own lease is longer: what it does on waking, it does because it looks, not because of its clock.
    time.sleep(2 * SHORT_S)
    second = forked.Process(target=main, args=(recipe, True, SHORT_S))
    second.start()
    before = holder(run)["owner"]
    deadline = time.monotonic() + 120
    while (run / LEASE).exists() and holder(run)["owner"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    stop(second)
    now = holder(run)
    assert now["epoch"] == 2
    left = files(run)
    os.kill(driver.pid, signal.SIGCONT)
    assert ended(driver) == 1
    assert changed(left, files(run)) == []
    os.kill(second.pid, signal.SIGCONT)
    assert ended(second) == 0
    assert verify(run).problems == []
