"""A run that does not advance although nothing failed: it says who waits for whom, and ends."""

from __future__ import annotations

import asyncio
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
