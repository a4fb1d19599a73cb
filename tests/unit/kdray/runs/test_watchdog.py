"""A run that does not advance although nothing failed: it says who waits for whom, and ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdray.errors import TrainingError
from kdray.runs.watchdog import STACKS, Watchdog

WAITS = ["pool main (1 replicas serve): 3 rollouts in 1 calls, the longest without a word for 9 s"]


async def waits_for_ever() -> None:
    await asyncio.Event().wait()


async def test_a_run_that_does_not_advance_ends_and_says_what_it_waits_for(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    with Watchdog(0.2, 60.0, tmp_path / "logs") as watchdog:
        watchdog.waits_for = lambda: WAITS
        watchdog.on_event = lambda kind, **fields: events.append((kind, fields))
        hanging = asyncio.create_task(waits_for_ever(), name="train")
        with pytest.raises(TrainingError, match=r"no step and no answer for \d+ s \(cluster.stuck_run_after_s=0.2\)") as raised:
            await asyncio.wait_for(watchdog.watch(), 20)
    hanging.cancel()
    ((kind, found),) = events
    assert (kind, found["waits_for"]) == ("run_stuck", WAITS)
    assert WAITS[0] in str(raised.value)
    text = await asyncio.to_thread((tmp_path / "logs" / STACKS).read_text)
    assert WAITS[0] in text
    assert "waits_for_ever" in text, "the stack of a task"
    assert "in _run" in text or "Thread" in text, "the stacks of threads"


async def test_a_command_that_hears_nothing_any_more_ends_after_its_work_has(tmp_path: Path) -> None:
    ended = []

    async def work(watchdog: Watchdog) -> None:
        for _ in range(12):
            await asyncio.sleep(0.1)
            watchdog.heard()
        try:
            await waits_for_ever()
        finally:
            await asyncio.sleep(0)
            ended.append(time.monotonic() - began)

    began = time.monotonic()
    with Watchdog(0.5, 60.0, tmp_path, remedy="the same command begins anew") as watchdog:
        with pytest.raises(TrainingError, match="the same command begins anew"):
            await asyncio.wait_for(watchdog.over(work(watchdog)), 20)
        assert await watchdog.over(asyncio.sleep(0, "done")) == "done"
    (ended_s,) = ended
    assert ended_s > 1.2 + 0.5


async def test_a_run_that_advances_is_left_alone_for_as_long_as_it_does(tmp_path: Path) -> None:
    advanced = time.monotonic()
    with Watchdog(0.5, 60.0, tmp_path) as watchdog:
        watchdog.advanced_at = lambda: advanced
        watching = asyncio.create_task(watchdog.watch())
        for _ in range(12):
            await asyncio.sleep(0.1)
            advanced = time.monotonic()
        assert not watching.done()
        with pytest.raises(TrainingError):
            await asyncio.wait_for(watching, 20)
    assert time.monotonic() - advanced > 0.5


async def test_the_wait_before_a_run_does_not_count(tmp_path: Path) -> None:
    with Watchdog(0.3, 60.0, tmp_path) as watchdog:
        await asyncio.sleep(0.6)
        watching = asyncio.create_task(watchdog.watch())
        await asyncio.sleep(0.1)
        assert not watching.done()
        with pytest.raises(TrainingError):
            await asyncio.wait_for(watching, 20)


_HANGS = """
import asyncio, sys, time
from pathlib import Path
from kdray.runs.watchdog import Watchdog

async def run():
    with Watchdog(0.2, 0.5, Path(sys.argv[1])) as watchdog:
        watching = asyncio.create_task(watchdog.watch())
        try:
            if sys.argv[2] == "loop":
                await asyncio.sleep(0)
                time.sleep(3600)
            await watching
        finally:
            if sys.argv[2] == "teardown":
                await asyncio.Event().wait()

asyncio.run(run())
"""


@pytest.mark.parametrize("hangs", ["loop", "teardown", "nothing"])
def test_a_process_that_cannot_be_shut_down_ends_with_1_all_the_same(tmp_path: Path, hangs: str) -> None:
    done = subprocess.run([sys.executable, "-c", _HANGS, str(tmp_path), hangs], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert ("could not be shut down" in done.stderr) == (hangs != "nothing")
    assert (tmp_path / STACKS).is_file()


@pytest.mark.parametrize("hangs", ["loop", "nothing"])
def test_a_file_system_that_hangs_does_not_keep_the_process(tmp_path: Path, hangs: str) -> None:
    # Nobody reads it: to open it waits for ever.
    os.mkfifo(tmp_path / STACKS)
    done = subprocess.run([sys.executable, "-c", _HANGS, str(tmp_path), hangs], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be shut down" in done.stderr


_FULL_TERMINAL = """
import os, sys, time
from pathlib import Path
from kdray.runs.watchdog import Watchdog

os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 1000)
except BlockingIOError:
    os.set_blocking(2, True)
with Watchdog(3600.0, 0.5, Path(sys.argv[1])) as watchdog:
    watchdog.must_end("the teardown")
    time.sleep(3600)
"""


def test_a_terminal_that_takes_nothing_does_not_keep_the_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _FULL_TERMINAL, str(tmp_path)], stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 1


_ENDS = """
import asyncio, sys, threading, time
from pathlib import Path
from kdray.runs.watchdog import Watchdog

def sleeps(seconds):
    time.sleep(seconds)

async def run():
    watching = asyncio.create_task(watchdog.watch())
    call = asyncio.create_task(asyncio.to_thread(sleeps, float(sys.argv[2])))
    await asyncio.sleep(0.1)
    watchdog.waits_for = lambda: ["pool main"]
    watchdog.must_end("the teardown", exit_code=130)

with Watchdog(3600.0, 1.0, Path(sys.argv[1])) as watchdog:
    asyncio.run(run())
    if len(sys.argv) > 3:
        watchdog.ended()
        time.sleep(2)
"""


def test_an_end_that_hangs_says_what_it_waits_for_and_keeps_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _ENDS, str(tmp_path), "3600"], timeout=60, capture_output=True, text=True)
    assert done.returncode == 130
    assert "the teardown lasted longer than 1 s" in done.stderr
    assert "pool main" in done.stderr
    # The executor's thread, for which asyncio waits, and the main one, which waits for it.
    assert "sleeps (" in done.stderr
    assert "thread MainThread, in " in done.stderr
    assert "the teardown lasted longer" in (tmp_path / STACKS).read_text()


@pytest.mark.parametrize("more", [[], ["goes on"]])
def test_an_end_in_time_is_left_alone(tmp_path: Path, more: list[str]) -> None:
    command = [sys.executable, "-c", _ENDS, str(tmp_path), "0.2", *more]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


_CONNECTS = """
import sys, time
from pathlib import Path
from kdray.runs.watchdog import Watchdog

with Watchdog(3600.0, 3600.0, Path(sys.argv[1]) / "run" / "logs") as watchdog:
    watchdog.must_end("the connection", 0.2)
    time.sleep(3600)
"""


def test_what_hangs_before_a_run_ends_without_a_folder_of_the_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _CONNECTS, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the connection lasted longer than 0 s" in done.stderr
    assert not list(tmp_path.iterdir())
