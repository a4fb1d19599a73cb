"""Lease of a run: the one driver that may write to its folder and to its copy in `run.storage`.

`lease.json` in both names the driver, with an epoch and the time of its last heartbeat. A driver takes the lease before it
touches anything else, renews it in a thread, and looks at it before every write that another driver's would contradict: a line
of the ledger, metrics or events, a commit, a deletion of checkpoints. A driver that ended removes it. That of a process that is
dead on this machine is taken over at once; any other, a stopped process's too, once its heartbeat has stood still.

A folder of this machine is locked while its lease changes hands. Storages without locks or conditional writes, as object stores
are to pyarrow, are read again after a pause, so that of two drivers that start in the same second the later writer goes on.

A driver that stops between a look at its lease and the renewal that follows replaces, on waking, the lease of a successor. The
successor knows it by its lower epoch and writes its own again with its next heartbeat, for which the one that stood still waits
before it goes on. The time between a look and another write is not covered: microseconds, unless the process stops in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdray.config import Config
from kdray.errors import AwayError, LeaseLost, StorageError
from kdray.runs.folder import LEASE, not_writable
from kdray.runs.remote_copy import StoredRun
from kdray.runs.storage import Retry, Storage

STALE_AFTER_S = 60.0
"""Age of a heartbeat from which its driver counts as gone, if this machine cannot tell."""
_BEATS = 6
"""Heartbeats in that time."""
_LOOK_AGAIN_S = 0.5
"""Time after which a lease that is not there is looked for once more."""
_SETTLE_S = 1.0
_LOCK_S = 2.0
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Holder:
    """Driver that holds a lease, as written in the file."""

    owner: str
    """Random, another one at every start."""
    host: str
    machine: str
    """Boot and process namespace on the host, within which process numbers mean the same; empty if unknown."""
    pid: int
    started: int | None
    """Start of the process, clock ticks since the boot: another process may get its number."""
    epoch: int
    """Number of drivers that held the lease without a break, from 1 on."""
    heartbeat: float
    """Time of the last renewal, seconds since 1970."""

    @classmethod
    def here(cls) -> Holder:
        """This process, with no lease yet."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), 0, 0.0)

    @property
    def is_dead(self) -> bool:
        """True if the process ran on this machine and does not run any more."""
        here = self.machine and (self.host, self.machine) == (socket.gethostname(), _machine())
        return bool(here) and _start_of(self.pid) != self.started


@dataclass(frozen=True)
class Ticket:
    """Lease of a driver as its ranks know it, which look at it in other processes; picklable."""

    url: str
    """Folder with the lease that every node can read."""
    owner: str
    epoch: int

    def check(self, on_retry: Callable[[Retry], None] | None = None) -> None:
        """Check that the driver still has it. Args: on_retry: see `Storage`. Raises: LeaseLost; StorageError."""
        reason = _reason(Storage(self.url, on_retry=on_retry), self.owner, self.epoch)
        if reason is not None:
            raise LeaseLost(reason)


class Lease:
    """The lease that this process holds, renewed by a thread until `release`; a context manager that does so at its end."""

    def __init__(self, places: Sequence[Storage], stale_after_s: float = STALE_AFTER_S) -> None:
        """Args: places: folders with the run's files, the run folder first; its parent folders are created."""
        self._places = places
        self._beat_s = stale_after_s / _BEATS
        # Tried again for a short time only: those that answer are renewed and given back meanwhile. Nor is that told, since who
        # is told writes events, which needs the lease.
        self._renewed = [Storage(place.url, patience_s=min(_PATIENCE_S, self._beat_s)) for place in places]
        self._stale_after_s = stale_after_s
        self._me = Holder.here()
        self._lost: str | None = None
        self._ended = threading.Event()
        self._beaten = time.time()
        self._looked: dict[str, float] = {}
        """When a renewal looked, by place, while what it wrote may have replaced a successor's lease."""
        self._renewing: list[threading.Thread] = []
        self._made: list[Path] = []
        self._taken: list[Storage] = []

    @property
    def owner(self) -> str:
        """Name of this holder in `lease.json`."""
        return self._me.owner

    @property
    def epoch(self) -> int:
        return self._me.epoch

    @property
    def ticket(self) -> Ticket:
        """What the ranks need to look at it, in the run's storage if there is one."""
        return Ticket(self._places[-1].url, self._me.owner, self._me.epoch)

    def take(self) -> Lease:
        """Take the lease everywhere, or from a driver that is gone, and begin to renew it.

        Waits for a third of `stale_after_s` before it takes over from a driver whose end it cannot see.
        Raises: AwayError naming the driver that holds it; OSError if the run folder cannot be written.
        """
        try:
            for place, renewed in zip(self._places, self._renewed, strict=True):
                self._take(place, renewed)
        except BaseException:
            self._remove()
            raise
        self._beaten = time.time()
        # One for each: a storage that answers nothing holds its own up, and a driver that is not seen at work is taken over.
        self._renewing = [threading.Thread(target=self._renew, args=(place,), daemon=True) for place in self._renewed]
        for each in self._renewing:
            each.start()
        return self

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Stop renewing it, and remove it unless another driver has it; folders that were created for it go if empty."""
        self._ended.set()
        # A renewal that is under way would write a lease that nobody holds. One that a storage holds up is not waited for.
        for each in self._renewing:
            each.join(self._beat_s)
        self._remove()

    def check(self) -> None:
        """Check that the lease is still this driver's, in the run folder; everywhere, if this process stood still meanwhile.

        A storage that answers nothing is not waited for: it holds its own renewals up, not those in the run folder.

        Raises: LeaseLost naming the driver that has it.
        """
        if self._stood_still(self._places[:1]):
            self.check_everywhere()
        else:
            self._check(self._places[:1])

    def check_everywhere(self) -> None:
        """Check it in the run's storage too, as before a commit or a deletion; after this process stood still once more when
        its renewals have gone on. Raises: LeaseLost; StorageError."""
        self._check(self._places)
        if self._stood_still(self._places):
            deadline = time.monotonic() + 3 * self._beat_s
            while self._lost is None and self._stood_still(self._places) and time.monotonic() < deadline:
                time.sleep(self._beat_s / 20)
            self._check(self._places)

    async def watch(self) -> None:
        """Look at it without end. Raises: LeaseLost."""
        while True:
            self.check()
            await asyncio.sleep(self._beat_s)

    # ------------------------------------------------------------------------------------------------------ inside

    def _stood_still(self, places: Sequence[Storage]) -> bool:
        """True from when this process is seen to have stood still, until its lease in these has been seen to be its own."""
        beaten = self._beaten
        oldest = min([beaten, *(self._looked.get(place.url, beaten) for place in places)])
        return time.time() - oldest > self._stale_after_s / 2

    def _check(self, places: Sequence[Storage]) -> None:
        for place in places:
            if self._lost is None:
                self._lost = _reason(place, self._me.owner, self._me.epoch)
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def _take(self, place: Storage, renewed: Storage) -> None:
        if place.is_local:
            self._make(Path(place.root))
        seen = read_holder(place)
        if seen is not None and not seen.is_dead:
            if abs(time.time() - seen.heartbeat) <= self._stale_after_s:
                raise _held(place, seen, self._stale_after_s)
            # Clocks of machines differ: a driver at work renews it meanwhile. Not within the lock, which it needs for that.
            time.sleep(2 * self._beat_s)
        with _locked(place):
            found = read_holder(place)
            if found is not None and found != seen and not found.is_dead:
                raise _held(place, found, self._stale_after_s)
            self._me = replace(self._me, epoch=max(self._me.epoch, found.epoch + 1 if found else 1))
            self._taken.append(renewed)
            self._write(place)
        if not place.is_local:
            time.sleep(min(_SETTLE_S, self._beat_s))
            found = read_holder(place)
            if found is not None and found.owner != self._me.owner:
                raise _held(place, found, self._stale_after_s)

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _write(self, place: Storage) -> None:
        self._me = replace(self._me, heartbeat=time.time())
        place.write(LEASE, json.dumps(asdict(self._me)).encode())

    def _renew(self, place: Storage) -> None:
        while not self._ended.wait(self._beat_s):
            looked = time.time()
            self._looked.setdefault(place.url, looked)
            # A storage that is away for a while is no reason to end; the next commit waits for it or fails.
            with contextlib.suppress(StorageError), _locked(place):
                if self._ended.is_set():
                    return
                self._lost = self._lost or _reason(place, self._me.owner, self._me.epoch)
                if self._lost is not None:
                    return
                self._write(place)
            if time.time() - looked > self._stale_after_s / 2:
                # Long enough for a successor to have been there: time for it to write its lease again.
                if self._ended.wait(self._beat_s):
                    return
                continue
            del self._looked[place.url]
            if place is self._renewed[0]:
                self._beaten = time.time()

    def _remove(self) -> None:
        for place in self._taken:
            with contextlib.suppress(StorageError), _locked(place):
                found = read_holder(place)
                if found is not None and (found.owner == self._me.owner or found.epoch < self._me.epoch):
                    place.delete(LEASE)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def leased(config: Config, stored: StoredRun | None, stale_after_s: float = STALE_AFTER_S) -> Lease:
    """Take the lease of a config's run folder, and of its copy in `run.storage`.

    Raises: AwayError naming the driver that holds it; ConfigError naming the folder that cannot be written.
    """
    places = [Storage.local(config.run_folder), *([] if stored is None else [stored.storage])]
    try:
        return Lease(places, stale_after_s).take()
    except StorageError:
        raise
    except OSError as error:
        raise not_writable(config, error) from error


def read_holder(place: Storage) -> Holder | None:
    """Read the holder of a run's lease; None if nobody has it, or the file says nothing. Raises: StorageError."""
    content = place.read(LEASE)
    try:
        return None if content is None else Holder(**json.loads(content))
    except (ValueError, TypeError):
        # Files are replaced whole, so this is another program's.
        return None


def _reason(place: Storage, owner: str, epoch: int) -> str | None:
    """Describe who has the lease instead of `owner`; None if it is its own, or one that a predecessor took back on waking."""
    found = read_holder(place)
    if found is None:
        # A storage that has just come back may not list what it holds: that a lease is gone has to be seen twice.
        time.sleep(_LOOK_AGAIN_S)
        found = read_holder(place)
    if found is not None and (found.owner == owner or found.epoch < epoch):
        return None
    other = "the run's lease is gone" if found is None else f"process {found.pid} on {found.host} has taken over the run"
    return f"{place.url}: {other}; nothing more was written. This driver stood still, or lost sight of its files, for too long"


def _held(place: Storage, found: Holder, stale_after_s: float) -> AwayError:
    age = max(0.0, time.time() - found.heartbeat)
    return AwayError(
        f"{place.url}: process {found.pid} on {found.host} is at work on this run (seen {age:.0f} s ago); wait for its end, or "
        f"stop it there. If that machine is gone, try again {stale_after_s:.0f} s after it was last seen"
    )


@contextlib.contextmanager
def _locked(place: Storage) -> Iterator[None]:
    """Keep other drivers from changing a lease meanwhile, where the file system has locks for folders."""
    if not place.is_local:
        yield
        return
    with contextlib.ExitStack() as stack:
        # A network file system may have none; a folder may be away.
        with contextlib.suppress(OSError):
            handle = os.open(place.root, os.O_RDONLY)
            stack.callback(os.close, handle)
            deadline = time.monotonic() + _LOCK_S
            # Held for milliseconds, unless a process stopped within them.
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
        yield


def _machine() -> str:
    """Boot of this machine and namespace of its process numbers; empty where the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Start of a process of this machine, clock ticks since the boot; None if it has ended, or the system does not tell."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
