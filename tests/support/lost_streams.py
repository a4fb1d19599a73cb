"""A replica whose engine loses a stream: the first part of a response comes, and then nothing more, while all else goes on.

No signal to a process does that. A plugin of vLLM, which every replica below this process loads, does it to the next
stream when it is asked to by a file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.plugins import write_distribution

_VARIABLE = "KDRAY_TEST_LOSE_STREAM"
_MODULE = f'''
import asyncio
import contextlib
import os


def lose() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    if "{_VARIABLE}" not in os.environ or getattr(AsyncLLM, "loses", False):
        return
    generate = AsyncLLM.generate

    async def losing(self, *arguments, **options):
        async for output in generate(self, *arguments, **options):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.environ["{_VARIABLE}"])
                await asyncio.Event().wait()
            yield output

    AsyncLLM.generate, AsyncLLM.loses = losing, True
'''


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Have replicas of a Ray that is started inside the block lose a stream where `lose_one` asks for it."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", _VARIABLE)}
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        point = {"vllm.general_plugins": {"lose_streams": "kdray_lost_streams:lose"}}
        write_distribution(site, "kdray-lost-streams", point, {"kdray_lost_streams": _MODULE})
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [before["PYTHONPATH"]])])
        os.environ[_VARIABLE] = str(Path(folder) / "wanted")
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def lose_one(patience_s: float, tail: Callable[[], str]) -> None:
    """Have the next stream that says something lose the rest. Args: patience_s: longest wait for one; tail: of the log."""
    wanted = Path(os.environ[_VARIABLE])
    wanted.touch()
    deadline = time.monotonic() + patience_s
    while wanted.exists():
        assert time.monotonic() < deadline, f"no stream to lose: {tail()}"
        time.sleep(0.05)
