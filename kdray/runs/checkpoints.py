"""Checkpoint markers, which store what a resume needs beside the weights and prove that a checkpoint is complete.

Because step s trains samples [s * batch_size, (s + 1) * batch_size) and every draw is seeded by its sample id, the number of
completed steps determines the position in prompts, samples and random numbers, so that every sample is trained once.

The files of a checkpoint are in a subfolder of the driver that wrote them, which its marker names: a driver that stood still
and wakes beside its successor may write the files of the same step, but not into the successor's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdray.errors import DataError
from kdray.runs.folder import unguarded
from kdray.runs.storage import FileDigest, Storage, is_inside

COMMITTED = "COMMITTED.json"


PHASE_STEP = "phase_step"
"""Key in a marker: steps done of the phase that the checkpoint is in the middle of; missing in distillation and fine-tuning,
whose steps number their checkpoints."""

_STAGES = ("sft", "step", "control")
"""Names of checkpoints before their number, in the order of a run: the supervised phase, distillation with fine-tuning, the
control."""

FILES = "files"
"""Key in a marker: size, sha256 and rank of every file of the checkpoint, by its path there."""


FOLDER = "folder"
"""Key in a marker: subfolder of the checkpoint that holds its files; missing where there is none."""

_OWNER_CHARACTERS = 12
_LISTED = {"size": int, "sha256": str, "rank": int}


@dataclass(frozen=True)
class Committed:
    """Checkpoint with a marker."""

    storage: Storage
    key: str
    """Folder in the storage, as in `checkpoints/step-000010`."""
    marker: dict[str, Any]

    @property
    def progress(self) -> dict[str, Any]:
        """State stored beside the weights."""
        return {name: value for name, value in self.marker.items() if name not in (FILES, FOLDER)}

    @property
    def step(self) -> int:
        return int(self.marker["step"])


@dataclass(frozen=True)
class NotWhole:
    """Committed checkpoint whose content differs from what was written."""

    storage: Storage
    key: str
    reason: str
    """The file and its fault."""


def folder_of(owner: str | None) -> str:
    """Name the subfolder for what a driver writes. Args: owner: of the run's lease; None, without one, is no subfolder."""
    return "" if owner is None else f"by-{owner[:_OWNER_CHARACTERS]}"


def within(*names: str) -> str:
    """Join folders and names to a path; the subfolder that a checkpoint does not have is empty."""
    return "/".join(name for name in names if name)


def begin(storage: Storage, key: str, folder: str = "", known: bool = False) -> bool:
    """Prepare a checkpoint for its files; remains of an interrupted save of the same driver are deleted.

    Args: folder: subfolder of the driver that writes; known: this driver's student is what the checkpoint holds.
    Returns: False if it was committed by this driver, or is known, so that nothing is to be written. One that another driver
    has committed is written again, since its student may be another one: it stays whole until `commit`.
    """
    try:
        marker = read_marker(storage, key)
    except DataError:
        # Of no use to anyone, and replaced by `commit`.
        marker = None
    if marker is not None and (known or marker.get(FOLDER, "") == folder):
        return False
    storage.delete(within(key, folder))
    return True


def commit(
    storage: Storage,
    key: str,
    progress: Mapping[str, Any],
    parts: Sequence[Mapping[str, FileDigest]],
    folder: str = "",
    guard: Callable[[], None] = unguarded,
) -> None:
    """Write the marker that makes files below `key` a checkpoint.

    Args: parts: files that each rank wrote, by their path in `folder`; guard: called just before the marker takes its place;
    raises if another driver has taken over the run.
    """
    written = ((rank, name, digest) for rank, part in enumerate(parts) for name, digest in part.items())
    files = {within(folder, name): {**asdict(digest), "rank": rank} for rank, name, digest in written}
    place = {FOLDER: folder} if folder else {}
    storage.write(f"{key}/{COMMITTED}", json.dumps({**progress, **place, FILES: files}).encode(), guard)


def clear(storage: Storage, key: str, folder: str) -> None:
    """Delete what others left in a checkpoint that was committed with a subfolder."""
    names = {name.removeprefix(f"{key}/").partition("/")[0] for name in storage.list(key)}
    for name in names - {folder, COMMITTED}:
        storage.delete(f"{key}/{name}")


def read_marker(storage: Storage, key: str) -> dict[str, Any] | None:
    """Read the marker of a folder; None if it was not committed. Raises: DataError if the file is not a marker."""
    content = storage.read(f"{key}/{COMMITTED}")
    if content is None:
        return None
    try:
        marker = json.loads(content)
    except ValueError as error:
        raise DataError(f"{COMMITTED} is not valid JSON: {error}") from error
    if not isinstance(marker, dict) or not isinstance(marker.get(FILES), dict):
        raise DataError(f"{COMMITTED} lists no files: it was damaged, or written by an earlier version")
    folder = marker.get(FOLDER, "")
    if not isinstance(folder, str) or (folder and not is_inside(folder)):
        raise DataError(f"{COMMITTED} names {folder!r}, which is no folder of a checkpoint")
    for name, file in marker[FILES].items():
        listed = isinstance(file, dict) and all(isinstance(file.get(key), kind) for key, kind in _LISTED.items())
        if not listed or not is_inside(name):
            raise DataError(f"{COMMITTED} lists {name!r} as no file of a checkpoint is listed")
    return marker


def differing(files: Mapping[str, Any], found: Mapping[str, FileDigest | int | None]) -> str | None:
    """Describe the first file that differs from what was written; None if none does.

    Args: files: entries of a marker; found: the actual files, as digests or as sizes only.
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
    """Find the intact checkpoint that is furthest in the run, and the newer damaged ones; None if nothing was committed.

    Every file of it is read and verified. A folder without a marker is an interrupted save and is skipped. Of two checkpoints
    with the same steps, that of the first storage is used.
    Raises: DataError if there are checkpoints and none is intact; StorageError.
    """
    candidates = []
    bad = []
    for order, storage in enumerate(storages):
        sizes = storage.list("checkpoints")
        for key in (name.removesuffix(f"/{COMMITTED}") for name in sizes if _is_marker(name)):
            try:
                marker = read_marker(storage, key)
                if marker is not None:
                    candidates.append((*_place(key, marker), -order, Committed(storage, key, marker), sizes))
            except (DataError, KeyError) as error:
                bad.append(NotWhole(storage, key, str(error) if isinstance(error, DataError) else f"{COMMITTED} names no step"))
    for *_, found, sizes in sorted(candidates, key=lambda item: item[:-2], reverse=True):
        reason = _not_whole(found, sizes)
        if reason is None:
            return found, bad
        bad.append(NotWhole(found.storage, found.key, reason))
    if bad:
        listed = "; ".join(f"{each.storage.url}/{each.key}: {each.reason}" for each in bad)
        raise DataError(f"no checkpoint of the run is whole: {listed}; restore one from a copy, or choose another run.name")
    return None, bad


def checkpoint_at(storages: Sequence[Storage], step: int) -> Committed:
    """Find the checkpoint of a step, in the first storage that has one; its files are not read.

    Raises: DataError that lists the steps with a checkpoint; StorageError.
    """
    steps: set[int] = set()
    supervised: set[str] = set()
    for storage in storages:
        for key in (name.removesuffix(f"/{COMMITTED}") for name in storage.list("checkpoints") if _is_marker(name)):
            if _stage_of(key) != "step":
                supervised.add(key.removeprefix("checkpoints/"))
                continue
            if _steps_of(key) != step:
                steps.add(_steps_of(key))
                continue
            marker = read_marker(storage, key)
            if marker is not None:
                return Committed(storage, key, marker)
    there = f"there are those of {', '.join(map(str, sorted(steps)))}" if steps else "the run has none"
    if supervised and not steps:
        there += f" but of a supervised phase ({', '.join(sorted(supervised))}), which only --resume goes on from"
    looked = " or ".join(f"{storage.url}/checkpoints" for storage in storages)
    raise DataError(f"--step {step}: no such checkpoint in {looked}; {there}")


def _is_marker(key: str) -> bool:
    """Return True for the marker of a checkpoint, as opposed to another folder there."""
    parts = key.split("/")
    return len(parts) == 3 and _stage_of(key) is not None and parts[2] == COMMITTED


def _stage_of(key: str) -> str | None:
    """Name before the number of a checkpoint, in its key or that of a file of it; None for other folders."""
    name, dash, number = key.split("/")[1].rpartition("-") if "/" in key else ("", "", "")
    return name if dash and name in _STAGES and number.isdigit() else None


def _place(key: str, marker: Mapping[str, Any]) -> tuple[int, int, int]:
    """Place of a checkpoint in its run: later ones have greater places."""
    stage = _stage_of(key)
    assert stage is not None
    return _STAGES.index(stage), int(marker["step"]), int(marker.get(PHASE_STEP, 0))


def _not_whole(found: Committed, sizes: Mapping[str, int]) -> str | None:
    files = found.marker[FILES]
    names = {name: f"{found.key}/{name}" for name in files}
    # Sizes come with the listing, so missing and truncated files are found without reading any.
    reason = differing(files, {name: sizes.get(key) for name, key in names.items()})
    if reason is not None:
        return reason
    digests = found.storage.digests(names.values())
    return differing(files, {name: digests[key] for name, key in names.items()})


def discard(bad: NotWhole) -> None:
    """Delete the marker of a damaged checkpoint; the next save prunes the rest."""
    bad.storage.delete(f"{bad.key}/{COMMITTED}")


def prune_checkpoints(storage: Storage, keep: int, guard: Callable[[], None] = unguarded) -> None:
    """Delete all but the `keep` last committed checkpoints of each stage, and the remains of interrupted saves.

    Those of the supervised phase go once there are later ones.
    Args: guard: called just before each deletion; raises if another driver has taken over the run.
    """
    files = storage.list("checkpoints")
    folders = {key for key in ("/".join(name.split("/")[:2]) for name in files) if _stage_of(key) is not None}
    committed = {stage: sorted(_of_stage(folders, stage, files), key=_steps_of) for stage in _STAGES}
    if not any(committed.values()):
        return
    kept = {key for stage, keys in committed.items() for key in keys[-keep:] if stage != "sft" or not committed["step"]}
    _delete(storage, folders - kept, files, guard)


def drop_checkpoints(storage: Storage, stage: str, guard: Callable[[], None] = unguarded) -> None:
    """Delete the checkpoints of a stage that has ended. Args: guard: as for `prune_checkpoints`."""
    files = storage.list("checkpoints")
    _delete(storage, {"/".join(name.split("/")[:2]) for name in files if _stage_of(name) == stage}, files, guard)


def _of_stage(folders: Collection[str], stage: str, files: Collection[str]) -> list[str]:
    """Committed checkpoints of a stage, among the folders."""
    return [key for key in folders if _stage_of(key) == stage and f"{key}/{COMMITTED}" in files]


def _delete(storage: Storage, folders: Collection[str], files: Collection[str], guard: Callable[[], None]) -> None:
    for key in sorted(folders, key=_steps_of):
        # The marker first, so that a half-deleted checkpoint is not mistaken for a complete one.
        if f"{key}/{COMMITTED}" in files:
            guard()
            storage.delete(f"{key}/{COMMITTED}")
    for key in folders:
        guard()
        storage.delete(key)


def _steps_of(key: str) -> int:
    number = key.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
