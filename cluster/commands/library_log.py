"""Log lines of the libraries under a run: kept in the run folder, so that the terminal is the run's own.

Ray, vLLM, transformers and others tell of what a user of kdray can do nothing about. Their lines go to `logs/libraries.log`.
Errors are shown as well, and so is whatever is not from one of these libraries: a plugin's lines are its user's business. Lines
that come before there is a run folder wait for it; if the command ends without one, they are shown after all.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import typer

FILE = "libraries.log"

LIBRARIES = frozenset(
    (
        *("ray", "vllm", "transformers", "deepspeed", "torch", "torchao", "accelerate", "peft", "datasets", "huggingface_hub"),
        *("absl", "urllib3", "httpx", "httpx2", "httpcore", "fsspec", "filelock", "tensorboard"),
    )
)
"""Packages whose log lines and warnings are kept; names of loggers are compared in lower case."""

_OWN = frozenset(("kdray", "actors", "cluster"))
"""Packages whose Python warnings are kept, too: a library's warning may name the line that called it."""


class LibraryLog(logging.Handler):
    """Lines that are kept. Args: folder: the logs folder of the run, None as long as there is no run."""

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._folder = folder
        self._waiting: list[str] = []
        self._writing = threading.Lock()
        self.files: list[Path] = []
        """Files that lines were written to."""

    def takes(self, record: logging.LogRecord) -> bool:
        """Keep a record if it is a library's. Returns: True if it is not to be shown."""
        if record.name.split(".")[0].lower() not in LIBRARIES:
            return False
        self.handle(record)
        return record.levelno < logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self.keep(self.format(record))
        # As every handler does: what a library gives to its logger cannot end the run.
        except Exception:
            self.handleError(record)

    def keep(self, line: str) -> None:
        with self._writing:
            self._waiting.append(line)
            self._write()

    def finish(self) -> list[str]:
        """Write what waits; returns the lines for which there is no folder."""
        with self._writing:
            self._write()
            return self._waiting

    def _write(self) -> None:
        folder = self._folder()
        if folder is None or not self._waiting:
            return
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._waiting)
        # A run does not end because what nobody needs to read could not be written; the lines are shown at the end.
        except OSError:
            return
        self._waiting = []
        if path not in self.files:
            self.files.append(path)


_open: list[LibraryLog] = []
"""The log in use, if there is one."""


class _Logger(logging.Logger):
    """Logger of a library that was imported after the log was opened."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        """See `logging.Logger`; called with what its level and its filters let pass."""
        if not (_open and _open[-1].takes(record)):
            super().callHandlers(record)


@contextlib.contextmanager
def libraries_kept(folder: Callable[[], Path | None]) -> Iterator[LibraryLog]:
    """Keep lines of libraries that are imported inside the block; at its end, say once where they are.

    Args: folder: as for `LibraryLog`.
    """
    log = LibraryLog(folder)
    logger, show = logging.getLoggerClass(), warnings.showwarning

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _package(filename) in LIBRARIES | _OWN:
            log.keep(f"{category.__name__} {filename}:{lineno}: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    logging.setLoggerClass(_Logger)
    warnings.showwarning = shown
    _open.append(log)
    try:
        yield log
    finally:
        _open.remove(log)
        warnings.showwarning = show
        logging.setLoggerClass(logger)
        for line in log.finish():
            print(line, file=sys.stderr)
        for path in log.files:
            typer.echo(f"log of Ray, vLLM and other libraries: {path}")


def _package(filename: str) -> str | None:
    """Top package of a file of an installed library, or of kdray; None for others."""
    parts = Path(filename).parts
    installed = [at for at, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    if installed:
        return parts[installed[-1] + 1].removesuffix(".py")
    here = Path(__file__).parents[2].parts
    return parts[len(here)] if parts[: len(here)] == here and len(parts) > len(here) else None
