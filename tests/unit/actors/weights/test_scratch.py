"""Folders of weights in files: what a killed process left goes with the next pull, and nobody else's does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.weights import scratch

HOLD = """
import sys, time
from pathlib import Path
from actors.weights import scratch
scratch.SHARED_MEMORY = Path(sys.argv[1])
folder = scratch.spacious_folder(10)
(folder / "bucket-00000.safetensors").write_bytes(bytes(1000))
print(folder, flush=True)
if "stay" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(scratch, "_own", {})
    return tmp_path


def replica(place: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of a pull."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_after_ten_kills_in_a_pull_shared_memory_is_as_before(place: Path) -> None:
    alive, at_work = replica(place, "stay")
    killed = [replica(place, "stay") for _ in range(10)]
    try:
        assert all((folder / "bucket-00000.safetensors").is_file() for _, folder in killed), "the living keep theirs"
        for process, _ in killed:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert sum(folder.exists() for _, folder in killed) == 10
        own = scratch.spacious_folder(10)
        assert sorted(place.iterdir()) == sorted([at_work.parent, own.parent])
        assert (at_work / "bucket-00000.safetensors").is_file()
    finally:
        alive.kill()
        alive.wait()


def test_a_process_that_ends_leaves_nothing(place: Path) -> None:
    process, folder = replica(place)
    assert process.wait() == 0
    assert folder.is_relative_to(place)
    assert not any(place.iterdir())


def test_what_is_of_another_user_or_program_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders without a lock, as earlier versions and other programs make them, and those of another user."""
    (place / "kdray-scratch-other").mkdir()
    (place / "kdray-scratch-other" / "x").write_bytes(b"x")
    (place / "kdray-scratch-file").write_bytes(b"x")
    process, folder = replica(place, "stay")
    process.kill()
    process.wait()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert scratch.sweep(place) == []
    assert folder.exists()
    monkeypatch.undo()
    assert scratch.sweep(place) == [folder.parent]
    assert sorted(path.name for path in place.iterdir()) == ["kdray-scratch-file", "kdray-scratch-other"]


def test_a_pull_uses_one_folder_a_process_and_place(place: Path) -> None:
    one, other = scratch.spacious_folder(10), scratch.spacious_folder(10)
    assert one != other
    assert one.parent == other.parent
    assert scratch.spacious_folder(2**60).is_relative_to(Path(os.environ.get("TMPDIR", "/tmp")))
