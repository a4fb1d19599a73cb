"""Failure of an engine to start: its cause, whether another attempt may help, the log of its processes; and its deadline.

vLLM's engine core is a process of its own, and the exception that its parent raises only points to that process's log. The
core inherits the replica's standard output and error, which Ray writes to files, so the replica can read the cause there.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.exceptions import ActorDiedError, RayError

from kdray.errors import KdrayError

_LOOK_EVERY_S = 1.0
_ASK_S = 10.0
"""Longest wait for an actor on the driver's node, or for Serve's controller: they answer in milliseconds, or not at all."""
_GRACE_S = 15.0
"""Time beyond the limit of a start in which the engine's own error may still come: it says more."""
_LOG_BYTES = 2**20
"""Most bytes that are kept of each of the two streams: their end."""
_CAUSE_CHARACTERS = 600
_PREFIX = re.compile(
    r"^(?:\((?:EngineCore|Worker|ServeReplica)[^)]*\) ?)*"  # the process that wrote the line
    r"(?:(?:ERROR|WARNING|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] ?)?"  # vLLM's logger
)
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?::|$)")
_PLACE = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)')
_POINTS_ELSEWHERE = re.compile(r"root cause|failed to start|EngineDeadError|Engine core initialization failed", re.IGNORECASE)
"""Errors of a parent process, which only say that a child failed."""
_MAY_HEAL = re.compile(
    r"Timeout|timed out|Connection(?:\w*Error)?\b|Address already in use|EADDRINUSE|DistNetworkError|DistStoreError|ZMQError"
    # A process that is about to end still holds its memory.
    r"|Free memory on device|out of memory|OutOfMemory|Cannot allocate memory"
    r"|Temporary failure|Too Many Requests|Service Unavailable"
)
_KILLED = re.compile(r"Failed (?:core|frontend) proc\(s\): (?P<processes>\{[^}]*: -\d+[^}]*\})")


@dataclass(frozen=True)
class StartFailure:
    """Failure of one engine to start; picklable."""

    cause: str
    """Last error of the process that failed, in one line."""
    may_heal: bool
    """True if another attempt may succeed: a time-out, a port, memory or a connection, rather than a model."""
    log: str
    """End of what the replica and its engine's processes wrote."""
    place: str
    """Host on which the replica ran, and the files there that hold the whole log."""

    @classmethod
    def of(cls, error: Exception) -> StartFailure:
        """The failure behind an exception of an engine's start, from this process's own log."""
        files = own_log_files()
        log = "".join(f"--- {path}\n{_end_of(path)}\n" for path in files)
        cause = root_cause(error, log)
        place = f"{socket.gethostname()}: {', '.join(map(str, files))}" if files else socket.gethostname()
        return cls(cause, may_heal(cause), log, place)


class StartWatch:
    """Thread that ends this process while its engine starts, if that takes too long or the run that it belongs to is gone.

    A thread, since vLLM blocks the replica's event loop until its engine process is up, for ever if that hangs.
    """

    def __init__(self, owner: Any, limit_s: float, report: Callable[[StartFailure], Any], disown: Callable[[], Any]) -> None:
        """Args: owner: actor handle that ends with the run, None if there is none; limit_s: longest start; report: sends the
        failure of a start that took too long to the registry; disown: called once the owner is dead. Both may block: they get
        a few seconds."""
        self._owner = owner
        self._limit_s = limit_s
        self._report = report
        self._disown = disown
        self._over = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._watch, name="start-watch", daemon=True).start()

    def stop(self) -> None:
        """End the watch: the engine has started, or failed by itself."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            if time.monotonic() - self._began > self._limit_s + _GRACE_S:
                reason = TimeoutError(
                    f"the engine did not start within cluster.start_timeout_s={self._limit_s:g}: it hangs, or the limit is too "
                    "short for this model"
                )
                self._end(lambda: self._report(StartFailure.of(reason)))  # noqa: B023 - called in this iteration
            elif self._is_orphaned():
                self._end(self._disown)

    def _is_orphaned(self) -> bool:
        import ray

        if self._owner is None:
            return False
        try:
            ray.get(self._owner.__ray_ready__.remote(), timeout=_ASK_S)
        except ActorDiedError:
            return True
        except RayError:
            # Its node is temporarily unreachable, or it does not answer for a moment.
            return False
        return False

    def _end(self, last: Callable[[], Any]) -> None:
        if self._over.is_set():
            return
        telling = threading.Thread(target=last, daemon=True)
        telling.start()
        telling.join(_ASK_S)
        end_process()


def end_process() -> None:
    """Kill the processes that this one has started, and end it: an engine that hangs ends in no other way."""
    for child in psutil.Process().children(recursive=True):
        # A stopped process does not notice that its parent has ended.
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def own_log_files() -> list[Path]:
    """Files that this process's standard output and error go to, as Ray arranges for its workers; none for a terminal."""
    targets = [Path(os.readlink(f"/proc/self/fd/{descriptor}")) for descriptor in (1, 2)]
    return [path for path in dict.fromkeys(targets) if path.is_file()]


def root_cause(error: Exception, log: str) -> str:
    """Last error in `log` if `error` only points there, else `error` itself; one line."""
    named = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    # The message of an error of kdray's own alone tells the user what to change, unless it hands on what vLLM's client said.
    raised = _one_line(str(error) if isinstance(error, KdrayError) else named)
    if not _POINTS_ELSEWHERE.search(raised):
        return raised
    if killed := _KILLED.search(raised):
        return f"a process of the engine was killed, as when memory runs out; exit codes: {killed['processes']}"
    place = ""
    found = None
    for line in (_PREFIX.sub("", written) for written in log.splitlines()):
        if where := _PLACE.match(line):
            place = f"{where['file']}:{where['line']}"
        elif _ERROR.match(line) and not _POINTS_ELSEWHERE.search(line):
            found = _one_line(line) if ":" in line.partition(" ")[0] else f"{line.strip()} at {place}"
    return found or raised


def last_error(text: str) -> str | None:
    """Last line of a traceback's text that names an error; None if there is none."""
    lines = [line for line in text.splitlines() if _ERROR.match(line)]
    return _one_line(lines[-1]) if lines else None


def may_heal(cause: str) -> bool:
    """True if an engine that did not start for this cause may start at the next attempt."""
    return _MAY_HEAL.search(cause) is not None or cause.startswith("a process of the engine was killed")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CAUSE_CHARACTERS else f"{line[:_CAUSE_CHARACTERS]} ..."


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")
