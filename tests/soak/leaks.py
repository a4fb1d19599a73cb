"""A run with a leak that a soak has to find: `python -m tests.soak.leaks driver 1.0 run RECIPE`, with MiB a minute.

Each is one that the product could have: references that a list keeps, files in shared memory, objects that are never released,
files in the run folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

_EVERY_S = 2.0
_KEPT: list[Any] = []


def _driver(size: int, recipe: Path) -> None:
    _KEPT.append(os.urandom(size))


def _store(size: int, recipe: Path) -> None:
    import numpy as np
    import ray

    if ray.is_initialized():
        # Small objects are kept in their owner's memory, and never reach the store.
        _KEPT.append(ray.put(np.zeros(max(size, 2**18), np.uint8)))


def _shm(size: int, recipe: Path) -> None:
    _KEPT.append(_file_in("/dev/shm", size))


def _folder(size: int, recipe: Path) -> None:
    run = yaml.safe_load(recipe.read_text())["run"]
    folder = Path(run["output"]) / run["name"] / "logs"
    if folder.is_dir():
        (folder / f"leak-{time.monotonic_ns()}").write_bytes(os.urandom(size))


def _file_in(folder: str, size: int) -> Any:
    file = tempfile.NamedTemporaryFile(prefix=prefix(), dir=folder)  # noqa: SIM115 - it leaks
    file.write(os.urandom(size))
    file.flush()
    return file


def prefix() -> str:
    """Of the planted files of a soak."""
    return f"kdray-leak-{os.environ['KDRAY_TEST_MARKER']}-"


LEAKS: dict[str, Callable[[int, Path], None]] = {"driver": _driver, "shm": _shm, "store": _store, "folder": _folder}


@contextmanager
def leaking(kind: str, mib_per_minute: float, recipe: Path) -> Iterator[None]:
    """Leak steadily while the block runs, from a thread of this process."""
    over = threading.Event()
    size = int(mib_per_minute * 2**20 * _EVERY_S / 60)

    def leak() -> None:
        while not over.wait(_EVERY_S):
            LEAKS[kind](size, recipe)

    threading.Thread(target=leak, name="leak", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def main() -> None:
    from cluster.cli import app

    kind, rate, *arguments = sys.argv[1:]
    with leaking(kind, float(rate), Path(arguments[1])):
        app(arguments)


if __name__ == "__main__":
    main()
