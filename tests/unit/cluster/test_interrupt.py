"""A run's event loop and its interrupts: in the main thread, and inside a running loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.interrupt import on_interrupt, run_coroutine


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
