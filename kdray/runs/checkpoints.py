"""What a resume needs beside the weights, and the proof that every sample was trained once.

Because step s trains samples [s * batch_size, (s + 1) * batch_size) and every draw is seeded by its sample id, the number of
steps done is the whole position: of prompts, of samples, of randomness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdray.errors import DataError
from kdray.runs.storage import FileDigest, Storage, is_inside

COMMITTED = "COMMITTED.json"


FILES = "files"
"""In a marker: size, sha256 and rank of every file of the checkpoint, by its path there."""


_LISTED = {"size": int, "sha256": str, "rank": int}


@dataclass(frozen=True)
class Committed:
    """A checkpoint whose marker was written."""

    storage: Storage
    key: str
    """Its folder in the storage, as in `checkpoints/step-000010`."""
    marker: dict[str, Any]

    @property
    def progress(self) -> dict[str, Any]:
        """What was to be remembered beside the weights."""
        return {name: value for name, value in self.marker.items() if name != FILES}

    @property
    def step(self) -> int:
        return int(self.marker["step"])


@dataclass(frozen=True)
class NotWhole:
    """A checkpoint that was committed, and is no longer what was written."""

    storage: Storage
    key: str
    reason: str
    """Which file, and what is wrong with it."""


def commit(storage: Storage, key: str, progress: Mapping[str, Any], parts: Sequence[Mapping[str, FileDigest]]) -> None:
    """Write the marker that makes the files below `key` a checkpoint. Args: parts: what each rank wrote there."""
    files = {name: {**asdict(digest), "rank": rank} for rank, part in enumerate(parts) for name, digest in part.items()}
    storage.write(f"{key}/{COMMITTED}", json.dumps({**progress, FILES: files}).encode())


def read_marker(storage: Storage, key: str) -> dict[str, Any] | None:
    """The marker of a folder; None where it was not committed. Raises: DataError where it is none."""
    content = storage.read(f"{key}/{COMMITTED}")
    if content is None:
        return None
    try:
        marker = json.loads(content)
    except ValueError as error:
        raise DataError(f"{COMMITTED} is not valid JSON: {error}") from error
    if not isinstance(marker, dict) or not isinstance(marker.get(FILES), dict):
        raise DataError(f"{COMMITTED} lists no files: it was damaged, or written by an earlier version")
    for name, file in marker[FILES].items():
        listed = isinstance(file, dict) and all(isinstance(file.get(key), kind) for key, kind in _LISTED.items())
        if not listed or not is_inside(name):
            raise DataError(f"{COMMITTED} lists {name!r} as no file of a checkpoint is listed")
    return marker


def differing(files: Mapping[str, Any], found: Mapping[str, FileDigest | int | None]) -> str | None:
    """The first file that is not what was written, and how; None where all are.

    Args: files: what a marker lists; found: what is there, as digests or as sizes alone.
    """
    for name, written in files.items():
        here = found.get(name)
        size = here.size if isinstance(here, FileDigest) else here
        if size is None:
            return f"{name} is missing"
        if size != written["size"]:
            return f"{name} has {size:,} bytes, {written['size']:,} were written"
        if isinstance(here, FileDigest) and here.sha256 != written["sha256"]:
            return f"{name} does not hold what was written (sha256 {here.sha256[:12]}…, not {written['sha256'][:12]}…)"
    return None


def newest_checkpoint(storages: Sequence[Storage]) -> tuple[Committed | None, list[NotWhole]]:
    """The whole checkpoint with the most steps, and the newer ones that are not whole; None where nothing was committed.

    Every file of it was read: its content is what was written. A folder without a marker was interrupted while it was written,
    and is passed over. Of two with the same steps, the first storage's counts.
    Raises: DataError where there are checkpoints and none is whole; StorageError.
    """
    candidates = []
    bad = []
    for order, storage in enumerate(storages):
        sizes = storage.list("checkpoints")
        for key in (name.removesuffix(f"/{COMMITTED}") for name in sizes if _is_marker(name)):
            try:
                marker = read_marker(storage, key)
                if marker is not None:
                    candidates.append((int(marker["step"]), -order, Committed(storage, key, marker), sizes))
            except (DataError, KeyError) as error:
                bad.append(NotWhole(storage, key, str(error) if isinstance(error, DataError) else f"{COMMITTED} names no step"))
    for _, _, found, sizes in sorted(candidates, key=lambda item: item[:2], reverse=True):
        reason = _not_whole(found, sizes)
        if reason is None:
            return found, bad
        bad.append(NotWhole(found.storage, found.key, reason))
    if bad:
        listed = "; ".join(f"{each.storage.url}/{each.key}: {each.reason}" for each in bad)
        raise DataError(f"no checkpoint of the run is whole: {listed}; restore one from a copy, or choose another run.name")
    return None, bad


def _is_marker(key: str) -> bool:
    """Whether it is the marker of a checkpoint of a step, and not of another folder there."""
    parts = key.split("/")
    return len(parts) == 3 and parts[1].startswith("step-") and parts[2] == COMMITTED


def _not_whole(found: Committed, sizes: Mapping[str, int]) -> str | None:
    files = found.marker[FILES]
    names = {name: f"{found.key}/{name}" for name in files}
    # Sizes come with the listing: a file that is missing or cut off is found without reading any.
    reason = differing(files, {name: sizes.get(key) for name, key in names.items()})
    if reason is not None:
        return reason
    digests = found.storage.digests(names.values())
    return differing(files, {name: digests[key] for name, key in names.items()})


def discard(bad: NotWhole) -> None:
    """Take the marker of a checkpoint that is not whole away: the next one that is written prunes the rest."""
    bad.storage.delete(f"{bad.key}/{COMMITTED}")


def prune_checkpoints(storage: Storage, keep: int) -> None:
    """Delete all but the `keep` committed checkpoints with the most steps, and what an interrupted save left."""
    files = storage.list("checkpoints")
    steps = {key for key in ("/".join(name.split("/")[:2]) for name in files) if _is_step(key)}
    committed = sorted((key for key in steps if f"{key}/{COMMITTED}" in files), key=_steps_of)
    if not committed:
        return
    for key in committed[:-keep]:
        # First, so that one that is half deleted is not taken for a checkpoint.
        storage.delete(f"{key}/{COMMITTED}")
    for key in steps - set(committed[-keep:]):
        storage.delete(key)


def _is_step(key: str) -> bool:
    return key.startswith("checkpoints/step-") and _steps_of(key) >= 0


def _steps_of(key: str) -> int:
    number = key.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
