"""A worker ends with its engine's owner, whoever its parent is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.vllm_plugin.lifetime import _lives

ROOT = Path(__file__).parents[4]
WORKER = """
import sys, time
from actors.vllm_plugin.lifetime import end_with
end_with(int(sys.argv[1]))
print("watches", flush=True)
time.sleep(120)
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_worker_ends_with_the_owner_of_its_engine(owner: subprocess.Popen[bytes], reaped: bool) -> None:
    """Though its own parent lives on, and whether or not anybody has noticed the owner's end."""
    with subprocess.Popen([sys.executable, "-c", WORKER, str(owner.pid)], cwd=ROOT, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"watches\n"
        assert worker.poll() is None
        owner.kill()
        if reaped:
            owner.wait()
        assert worker.wait(timeout=60) == 1


def test_an_owner_that_ends_between_two_questions_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        seen = psutil.Process(process.pid)
        assert _lives(seen)
        process.kill()
    monkeypatch.setattr(seen, "is_running", lambda: True)
    assert not _lives(seen)


def test_a_worker_ends_with_its_parent() -> None:
    """The parent here is a process between the owner, which is this one, and the worker."""
    code = f"import os\nif os.fork() == 0:\n    exec({WORKER!r})\nelse:\n    input()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(os.getpid())], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"watches\n"
        parent.kill()
        parent.wait()
        # The worker holds the other end of the pipe as long as it lives.
        assert parent.stdout.read() == b""
