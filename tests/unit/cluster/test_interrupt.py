"""A run's event loop and its interrupts: in the main thread, and inside a running loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.interrupt import Grace, on_interrupt, run_coroutine


@pytest.fixture(autouse=True)
def _a_terminal() -> Iterator[None]:
    """Tests that were started under nohup ignore its end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


async def _until_interrupted() -> str:
    stop = asyncio.Event()
    with on_interrupt(stop.set):
        await asyncio.wait_for(stop.wait(), timeout=10)
    return threading.current_thread().name


def _interrupt_soon(number: signal.Signals = signal.SIGINT) -> None:
    def send() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_a_process_that_does_not_end_within_its_grace_is_ended_by_itself() -> None:
    """Whatever hangs: here the main thread, and the disk that the reason is written to."""
    program = (
        "import time; from cluster.interrupt import Grace\n"
        "def tell(reason): print(reason, flush=True); time.sleep(60)\n"
        "assert Grace(2.0, tell).begin(1.0) is None; time.sleep(60)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (130, "cluster.grace_s=2 is over\n")
    assert 1.8 < time.monotonic() - began < 40


def test_what_does_not_fit_into_the_grace_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    grace = Grace(30.0, print)
    assert grace.begin(20.0) is None
    reason = grace.begin(60.0)
    assert reason == "the rest of the step and a checkpoint take about 60 s, which do not fit into cluster.grace_s=30"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_loop_in_the_main_thread(number: signal.Signals) -> None:
    _interrupt_soon(number)
    assert run_coroutine(_until_interrupted()) == "MainThread"


def test_the_end_of_the_terminal_stays_ignored_under_nohup() -> None:
    async def work() -> bool:
        stop = asyncio.Event()
        with on_interrupt(stop.set):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.1)
        return stop.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not run_coroutine(work())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_a_loop_that_runs_beside_a_notebooks(number: signal.Signals) -> None:
    async def cell() -> str:
        _interrupt_soon(number)
        return run_coroutine(_until_interrupted())

    assert asyncio.run(cell()).startswith("kdray")


def test_errors_rise_out_of_either() -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def cell() -> None:
        run_coroutine(fail())

    for run in (lambda: run_coroutine(fail()), lambda: asyncio.run(cell())):
        with pytest.raises(ValueError, match="no"):
            run()
