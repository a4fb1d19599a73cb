"""Leaks that a soak has to find, planted in the processes of a run that has been going on: `plant` asks for them by a file.

Processes grow for a while after their start by themselves, which would hide a leak, or pass for one. So every Python process
that is started inside `installed` watches the file, and leaks from when its own title is named there. Each leak is one that the
product could have: memory that a list keeps, objects that are never released, files in shared memory and in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VARIABLE = "KDRAY_TEST_LEAKS"
_EVERY_S = 2.0
_KEPT: list[Any] = []


def _memory(size: int, folder: Path) -> None:
    _KEPT.append(os.urandom(size))


def _store(size: int, folder: Path) -> None:
    import numpy as np
    import ray

    if ray.is_initialized():
        # Small objects are kept in their owner's memory, and never reach the store.
        _KEPT.append(ray.put(np.zeros(max(size, 2**18), np.uint8)))


def _shm(size: int, folder: Path) -> None:
    file = tempfile.NamedTemporaryFile(prefix=prefix(), dir="/dev/shm")  # noqa: SIM115 - it leaks
    file.write(os.urandom(size))
    file.flush()
    _KEPT.append(file)


def _folder(size: int, folder: Path) -> None:
    (folder / f"leak-{time.monotonic_ns()}").write_bytes(os.urandom(size))


def prefix() -> str:
    """Of the planted files of a soak."""
    return f"kdray-leak-{os.environ['KDRAY_TEST_MARKER']}-"


_LEAKS: dict[str, Callable[[int, Path], None]] = {"memory": _memory, "store": _store, "shm": _shm, "folder": _folder}
PLACES = {"store": "object store", "shm": "/dev/shm", "folder": "run folder"}
"""Leaks of the driver that are not of its memory, and what a soak calls the place where they show."""


@contextmanager
def installed() -> Iterator[None]:
    """Have every Python process that is started inside the block leak where `plant` asks for it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text("from tests.soak import leaks\n\nleaks.watch()\n")
        path = [folder, str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", _VARIABLE)}
        os.environ |= {"PYTHONPATH": os.pathsep.join(path), _VARIABLE: str(Path(folder) / "wanted.json")}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def plant(wanted: Mapping[str, Sequence[str]], mib_per_minute: float, folder: Path) -> None:
    """Begin the leaks. Args: wanted: kinds of leak by a part of the title of the processes that are to have them; folder: that
    files of the run are left in."""
    size = int(mib_per_minute * 2**20 * _EVERY_S / 60)
    asked = Path(os.environ[_VARIABLE])
    unfinished = asked.with_suffix(".new")
    unfinished.write_text(json.dumps({"wanted": wanted, "size": size, "folder": str(folder)}))
    unfinished.rename(asked)


def watch() -> None:
    """Leak, from a thread of this process, from when it is asked for; in its forks likewise."""
    if _VARIABLE not in os.environ:
        return
    threading.Thread(target=_leak, name="leak", daemon=True).start()
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=_leak, name="leak", daemon=True).start())


def _leak() -> None:
    while True:
        time.sleep(_EVERY_S)
        with contextlib.suppress(FileNotFoundError):
            asked = json.loads(Path(os.environ[_VARIABLE]).read_text())
            # Processes take their titles some time after their start.
            title = Path("/proc/self/cmdline").read_text().replace("\0", " ")
            for kind in [kind for sign, kinds in asked["wanted"].items() if sign in title for kind in kinds]:
                try:
                    _LEAKS[kind](asked["size"], Path(asked["folder"]))
                except Exception as error:  # a plant that fails must not pass for a leak that was not found
                    print(f"planted leak of {kind}: {error!r}", file=sys.stderr)
