"""Folders for what a process keeps in files for a while, such as weights on their way into an engine, or sockets.

What killed processes left is removed by the next one of the same user that makes one.

A process has one folder in each place, and holds a lock on a file in it for as long as it lives: the system releases that with
the process, however it ends, and in whichever container it ran. So a folder whose lock is free belongs to nobody any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "kdray-scratch-"
OWNER = "owner"
"""File in a folder that its process has locked."""

_own: dict[tuple[int, Path], Path] = {}
"""This process's folders, by process and place."""


def spacious_folder(size: int) -> Path:
    """Create a folder in shared memory if that has room for `size` bytes twice, else in the temporary folder.

    The caller deletes it. What dead processes of this user left in either place is deleted first, which makes room.
    """
    places = [SHARED_MEMORY, Path(tempfile.gettempdir())]
    for place in places:
        sweep(place)
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    return Path(tempfile.mkdtemp(dir=_folder_in(places[0 if roomy else 1])))


def temporary_folder() -> Path:
    """Create a folder on the disk for temporary files (`TMPDIR`), which goes with the process, or is swept after it."""
    return Path(tempfile.mkdtemp(dir=process_folder()))


def process_folder() -> Path:
    """This process's own folder among temporary files, for names that have to be short, such as those of sockets."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    return _folder_in(place)


def release() -> None:
    """Delete this process's folders, with everything in them."""
    for (process, _), folder in list(_own.items()):
        _remove(process, folder)


def sweep(place: Path) -> list[Path]:
    """Delete the folders of processes of this user that are dead; return them."""
    found = []
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and folder not in _own.values() and not _is_held(folder / OWNER):
                shutil.rmtree(folder)
                found.append(folder)
    if found:
        logger.warning("removed what killed processes had left: %s", ", ".join(map(str, found)))
    return found


def _is_held(lock: Path) -> bool:
    """Return True if a process holds the lock. Raises: OSError if there is none, as in folders that another program made."""
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _folder_in(place: Path) -> Path:
    """Return this process's folder in a place, which it makes once."""
    key = os.getpid(), place
    if key not in _own or not _own[key].is_dir():
        # Under a name that no sweep looks at, until it is locked.
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=place))
        handle = os.open(made / OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        _own[key] = made.rename(place / made.name.removeprefix("."))
        atexit.register(_remove, os.getpid(), _own[key])
    return _own[key]


def _remove(process: int, folder: Path) -> None:
    # A forked child inherits the call, and not the folder.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
