"""A run's event loop and its interrupts: in the main thread, and inside a running loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from cluster.interrupt import on_interrupt, run_coroutine


async def _until_interrupted() -> str:
    stop = asyncio.Event()
    with on_interrupt(stop.set):
        await asyncio.wait_for(stop.wait(), timeout=10)
    return threading.current_thread().name


def _interrupt_soon() -> None:
    def send() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


def test_a_signal_reaches_the_loop_in_the_main_thread() -> None:
    _interrupt_soon()
    assert run_coroutine(_until_interrupted()) == "MainThread"


def test_a_signal_reaches_a_loop_that_runs_beside_a_notebooks() -> None:
    async def cell() -> str:
        _interrupt_soon()
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
