"""File storage at a filesystem URL: a bucket of an object store, or a folder that every node can access.

Files are written atomically: object stores write an object completely or not at all, and in a folder a file is written to a
temporary file and renamed. Not every storage can rename folders, so a group of files is complete once its marker, written
last, exists (`kdray.runs.checkpoints`).

Operations on a temporarily unavailable storage are retried with growing pauses; `on_retry` is called for every retry.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import ArrowInvalid
from pyarrow import fs as arrow
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

from kdray.config.storage import CREDENTIALS, below
from kdray.errors import AwayError, ConfigError, StorageError

T = TypeVar("T")

PATIENCE_S = 120.0
"""Time for which an operation is retried before the storage counts as unavailable."""
_PATIENCE_AT_START_S = 15.0
_LONGEST_PAUSE_S = 15.0
_SILENCE_S = 10.0
"""Longest time without a byte of an answer, after which a request to S3 is sent again."""
_CONNECT_S = 5.0
_ATTEMPTS = 2
"""Attempts of a request by the S3 client itself, whose own ten add up to more than a minute and a half where nothing answers: a
retry is then told, and patience looked at, once in that time."""
_CHUNK = 4 * 2**20
_THREADS = 8
_REFUSALS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "MISSING_AUTHENTICATION_TOKEN",
    "UNRECOGNIZED_CLIENT",
    "HTTP status 403",
    "HTTP status 401",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "Permission denied",
)
"""Parts of the libraries' messages for missing, wrong or insufficient credentials, where a retry does not help."""
_NO_BUCKET = ("NO_SUCH_BUCKET", "Bucket '")


@dataclass(frozen=True)
class FileDigest:
    """Size and hash of a file's content."""

    size: int
    """Size in bytes."""
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True)
class Retry:
    """Operation that is about to be retried."""

    what: str
    attempt: int
    """Number of failed attempts so far."""
    reason: str


class Storage:
    """Folder `url`/`names...`; keys are paths below it. The constructor does not access it.

    Every method raises StorageError with the key and the reason: immediately for permanent errors, otherwise after
    `patience_s`.
    """

    def __init__(
        self,
        url: str,
        *names: str,
        patience_s: float = PATIENCE_S,
        on_retry: Callable[[Retry], None] | None = None,
    ) -> None:
        """Args: url: checked by `kdray.config.storage.check_storage_url`; it must exist, unlike the folders below it;
        on_retry: called from several threads."""
        self.url = below(url, *names) if names else url
        self.patience_s = patience_s
        self.on_retry = on_retry
        self._base_url = url
        self._names = names

    @classmethod
    def local(cls, folder: Path) -> Storage:
        """Open a folder of this machine as a storage."""
        return cls(folder.absolute().as_uri())

    @cached_property
    def _place(self) -> tuple[arrow.FileSystem, str]:
        """File system, and the URL's path in it."""
        url = self._base_url
        if url.startswith("s3:"):
            return _s3(url)
        if url.startswith("gs:"):
            # The library's default is to retry for 15 minutes.
            url += ("&" if "?" in url else "?") + "retry_limit_seconds=6"
        return arrow.FileSystem.from_uri(url)

    @property
    def filesystem(self) -> arrow.FileSystem:
        return self._place[0]

    @property
    def root(self) -> str:
        """Path of the storage's folder in its file system."""
        return "/".join([self._place[1].rstrip("/"), *self._names])

    @property
    def is_local(self) -> bool:
        """True for a folder, whose files can be read and moved in place."""
        return self._base_url.startswith("file:")

    def path(self, key: str) -> Path:
        """Return the path of a file in a local storage."""
        assert self.is_local
        return Path(self._at(key))

    def check(self) -> None:
        """Create the folder if missing, write a file and remove it. Raises: ConfigError naming setting and remedy."""
        setting = f"run.storage={self._base_url}"
        patience, self.patience_s = self.patience_s, min(self.patience_s, _PATIENCE_AT_START_S)
        probe = f".check-{uuid.uuid4().hex}"
        try:
            if self.is_local:
                base = Path(self._place[1])
                if not base.is_dir():
                    raise ConfigError(f"{setting}: there is no folder {base}; mount the share, or make the folder")
                Path(self.root).mkdir(parents=True, exist_ok=True)
            else:
                bucket = self._patiently("find it", lambda: self._place)[1].partition("/")[0]
                found = self._patiently("look for the bucket", lambda: self.filesystem.get_file_info(bucket))
                if found.type == arrow.FileType.NotFound:
                    raise ConfigError(f"{setting}: there is no bucket {bucket!r}; make it, or correct the name")
            self.write(probe, b"kdray")
            self.delete(probe)
        except ArrowInvalid as error:
            raise ConfigError(f"{setting}: {error}; correct the URL") from error
        except (StorageError, OSError) as error:
            if any(sign in str(error) for sign in _NO_BUCKET):
                raise ConfigError(f"{setting}: there is no such bucket; make it, or correct the name") from error
            if isinstance(error, PermissionError) or any(sign in str(error) for sign in _REFUSALS):
                remedy = "make it writable for this user" if self.is_local else CREDENTIALS
                raise ConfigError(f"{setting}: may not be written: {error}; {remedy}") from error
            raise AwayError(f"{setting}: cannot be written: {error}; correct the URL, or start its server") from error
        finally:
            self.patience_s = patience

    # ------------------------------------------------------------------------------------------------------ files

    def write(self, key: str, content: bytes, guard: Callable[[], None] = lambda: None) -> FileDigest:
        """Write a file. Args: guard: called just before it takes its place; what it raises leaves the one that is there."""
        return self._patiently(f"write {key}", lambda: self._write(key, [content], guard))

    def put(self, path: Path, key: str, move: bool = False) -> FileDigest:
        """Upload a local file. Args: move: the local file is no longer needed, so it is renamed where possible."""
        if move and self.is_local:
            return self._patiently(f"write {key}", lambda: self._move(path, key))
        return self._patiently(f"write {key}", lambda: self._write(key, _chunks_of(path)))

    def put_part(self, path: Path, begin: int, end: int, key: str) -> FileDigest:
        """Upload the bytes of a local file from `begin` to before `end`, as a file of its own."""
        return self._patiently(f"write {key}", lambda: self._write(key, part_chunks(path, begin, end)))

    def read(self, key: str) -> bytes | None:
        """Read a file's content; None if it does not exist."""

        def attempt() -> bytes | None:
            try:
                with self._open(key) as source:
                    return source.read()
            except FileNotFoundError:
                return None

        return self._patiently(f"read {key}", attempt)

    def digest(self, key: str) -> FileDigest:
        """Compute the digest of a file in the storage."""

        def attempt() -> FileDigest:
            with self._open(key) as source:
                return _digest(_chunks(source), lambda chunk: None)

        return self._patiently(f"read {key}", attempt)

    def get(self, key: str, path: Path) -> FileDigest:
        """Download a file; its local folder is created if missing."""

        def attempt() -> FileDigest:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open(key) as source:
                return _write_beside(path, _chunks(source))

        return self._patiently(f"read {key}", attempt)

    def list(self, key: str = "") -> dict[str, int]:
        """List the size in bytes of every file below `key`, by its key; empty if there is none."""

        def attempt() -> dict[str, int]:
            selector = arrow.FileSelector(self._at(key), recursive=True, allow_not_found=True)
            prefix = len(self.root) + 1
            return {
                found.path[prefix:]: found.size
                for found in self.filesystem.get_file_info(selector)
                if found.type == arrow.FileType.File
            }

        found = self._patiently(f"list {key or self.url}", attempt)
        for name in found:
            # An object may have any name; downloads must stay within their target folder.
            if not is_inside(name):
                raise StorageError(f"{self.url}: holds {name!r}, which leads out of a folder; remove it")
        return found

    def delete(self, key: str) -> None:
        """Remove a file, or a folder with all its content; no effect if it does not exist."""

        def attempt() -> None:
            where = self._at(key)
            kind = self.filesystem.get_file_info(where).type
            if kind == arrow.FileType.File:
                self.filesystem.delete_file(where)
            elif kind == arrow.FileType.Directory:
                self.filesystem.delete_dir(where)

        self._patiently(f"delete {key}", attempt)

    # ------------------------------------------------------------------------------------------------------ trees

    def put_files(self, files: Mapping[str, Path], move: bool = False) -> dict[str, FileDigest]:
        """Upload several files in parallel, as `put` does; return digests by key."""
        return _several(lambda item: self.put(item[1], item[0], move), files.items(), files)

    def several(self, work: Callable[[str], T], keys: Iterable[str]) -> dict[str, T]:
        """Call `work` for several keys in parallel; return its results by key."""
        wanted = list(keys)
        return _several(work, wanted, wanted)

    def put_tree(self, folder: Path, key: str, move: bool = False) -> dict[str, FileDigest]:
        """Upload all files of a folder below `key`; return their digests by path in the folder."""
        found = self.put_files({f"{key}/{name}": folder / name for name in files_below(folder)}, move)
        return {name.removeprefix(f"{key}/"): digest for name, digest in found.items()}

    def get_files(self, files: Mapping[str, Path]) -> dict[str, FileDigest]:
        """Download several files in parallel, as `get` does; return digests by key."""
        return _several(lambda item: self.get(*item), files.items(), files)

    def get_tree(self, key: str, folder: Path, marker: str | None = None) -> None:
        """Download all files below `key` into a folder; files with other names there are kept.

        Args: marker: file whose presence means that the others are complete: an old one is removed first, the new one is
              downloaded last.
        """
        files = {each: folder / each.removeprefix(f"{key}/") for each in self.list(key)}
        if marker is not None:
            (folder / marker).unlink(missing_ok=True)
        self.get_files({each: path for each, path in files.items() if each != f"{key}/{marker}"})
        self.get_files({each: path for each, path in files.items() if each == f"{key}/{marker}"})

    def digests(self, keys: Iterable[str]) -> dict[str, FileDigest]:
        """Compute digests of several files in parallel."""
        wanted = list(keys)
        return _several(self.digest, wanted, wanted)

    # ------------------------------------------------------------------------------------------------------ inside

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def _open(self, key: str) -> BinaryIO:
        return self.filesystem.open_input_stream(self._at(key))

    def _write(self, key: str, chunks: Iterable[bytes], guard: Callable[[], None] = lambda: None) -> FileDigest:
        if self.is_local:
            return _write_beside(self._prepared(key), chunks, guard)
        guard()
        with self.filesystem.open_output_stream(self._at(key)) as target:
            return _digest(chunks, target.write)

    def _move(self, path: Path, key: str) -> FileDigest:
        target = self._prepared(key)
        if path.stat().st_dev != target.parent.stat().st_dev:
            return _write_beside(target, _chunks_of(path))
        with path.open("rb") as source:
            digest = _digest(_chunks(source), lambda chunk: None)
            # A marker written later must not survive a machine crash without this content.
            os.fsync(source.fileno())
        os.replace(path, target)
        return digest

    def _prepared(self, key: str) -> Path:
        """Return the path of a file in a local storage, creating its folder."""
        if not Path(self.root).is_dir():
            # The root was created at the start; an unmounted share must not be written to at its empty mount point.
            raise OSError(f"the folder {self.root} is away")
        target = Path(self._at(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _patiently(self, what: str, attempt: Callable[[], T]) -> T:
        """Return the result of `attempt`, retried while its errors are transient."""

        def tell(state: RetryCallState) -> None:
            if self.on_retry is not None:
                assert state.outcome is not None
                self.on_retry(Retry(what, state.attempt_number, str(state.outcome.exception())))

        trying = Retrying(
            # Read on every attempt, since a caller that can no longer wait lowers `patience_s`.
            stop=lambda state: (state.seconds_since_start or 0.0) >= self.patience_s,
            wait=wait_exponential_jitter(initial=0.5, max=_LONGEST_PAUSE_S),
            retry=retry_if_exception(_may_pass),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return trying(attempt)
        except OSError as error:
            tried = int(trying.statistics.get("attempt_number", 1))
            times = f" ({tried} attempts in {trying.statistics.get('delay_since_first_attempt', 0):.0f} s)" if tried > 1 else ""
            raise StorageError(f"{self.url}: could not {what}{times}: {error}") from error


def _s3(url: str) -> tuple[arrow.FileSystem, str]:
    """File system of an S3 URL, which cannot say how long to wait for an answer, and the path in it. Raises: OSError."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if "region" not in options and "endpoint_override" not in options:
        options["region"] = arrow.resolve_s3_region(parts.netloc)
    strategy = arrow.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    system = arrow.S3FileSystem(request_timeout=_SILENCE_S, connect_timeout=_CONNECT_S, retry_strategy=strategy, **options)
    return system, unquote(f"{parts.netloc}{parts.path}")


def files_below(folder: Path) -> list[str]:
    """List the files of a folder and its subfolders, as paths relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_inside(name: str) -> bool:
    """Return True if a relative path stays below the folder that it is resolved in."""
    return bool(name) and not any(part in ("", ".", "..") for part in name.split("/")) and "\0" not in name


def _may_pass(error: BaseException) -> bool:
    """Return True if an error may be transient."""
    if not isinstance(error, OSError) or isinstance(
        error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError | StorageError
    ):
        return False
    return not any(sign in str(error) for sign in (*_REFUSALS, *_NO_BUCKET))


def _several(work: Callable[[Any], T], items: Iterable[Any], names: Iterable[str]) -> dict[str, T]:
    with ThreadPoolExecutor(_THREADS, "storage") as pool:
        return dict(zip(names, pool.map(work, items), strict=True))


def _chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        yield from _chunks(source)


def part_chunks(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a file from `begin` to before `end`, or to its end if that comes first."""
    with path.open("rb") as source:
        source.seek(begin)
        while (left := end - source.tell()) > 0 and (chunk := source.read(min(_CHUNK, left))):
            yield chunk


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def _digest(chunks: Iterable[bytes], use: Callable[[bytes], Any]) -> FileDigest:
    size, sha256 = 0, hashlib.sha256()
    for chunk in chunks:
        use(chunk)
        size += len(chunk)
        sha256.update(chunk)
    return FileDigest(size, sha256.hexdigest())


def _write_beside(path: Path, chunks: Iterable[bytes], guard: Callable[[], None] = lambda: None) -> FileDigest:
    """Write a local file atomically. Args: guard: as for `Storage.write`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as target:
            digest = _digest(chunks, target.write)
            target.flush()
            os.fsync(target.fileno())
        guard()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest
