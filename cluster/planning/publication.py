"""Main memory that the student's weights take on their way to the replicas, before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cluster.planning.memory import GIB, ModelShape
from cluster.planning.placement import Node, Placed
from kdray.config import Config

CHANGES = 0.5
"""Size of the changes since a version that was sent whole, as a share of it, at most (`actors.weights.deltas`)."""
_VERSIONS = 2
"""Versions that a node's object store holds at most: the newest, and the one before it while a replica still fetches that."""


def version_bytes(student: ModelShape, precision: str) -> float:
    """Size of a published version: every weight in the dtype of training. An adapter is published merged."""
    return student.parameters * _element(precision)


def update_bytes(student: ModelShape, precision: str) -> float:
    """Size of the weights of a version that training changes; the others are sent once a phase."""
    changed = student.parameters if student.adapted is None else student.adapted
    return changed * _element(precision)


def _element(precision: str) -> float:
    return 2.0 if precision == "bf16" else 4.0


def publication_lines(config: Config, student: ModelShape, placed: Sequence[Placed], nodes: Sequence[Node]) -> Iterator[str]:
    """What publication takes, and a note for each node on which Ray would spill it to disk; nothing without publication.

    Args: placed: the roles on `nodes`; an object store's size is the resource `object_store_memory` of its node, in bytes.
    """
    replicas = _replicas(config, placed)
    stores = stored_versions(config, student, placed)
    if not stores:
        return
    version = version_bytes(student, config.training.precision)
    update = update_bytes(student, config.training.precision)
    most = max(replicas.values())
    by_changes = config.training.sync_full_every > 1
    # Both of a phase's first version and of the phase's before: every weight is sent again then.
    copies, copied = (version + update, "a copy, another to compare with") if by_changes else (version, "a copy")
    extra = " with changes" if by_changes else ""
    held = max(stores.values())
    stored = f"{_VERSIONS} versions{extra}"
    files = f"one in files for each of {most} that load"
    part = "" if student.adapted is None else f", of which every update sends {update / GIB:.2f}"
    yield (
        f"publication: a version of the student has {version / GIB:.2f} GiB{part}; main memory for it, at most: "
        f"{(copies + held) / GIB:.2f} GiB on rank 0's node ({copied}, and {stored} in Ray's object store), "
        f"{(held + most * version) / GIB:.2f} on a node of replicas ({stored}, and {files})"
    )
    short: dict[tuple[str, float], int] = Counter()
    for index, needed in stores.items():
        there = nodes[index].resources.get("object_store_memory")
        if there is not None and there < needed:
            short[nodes[index].name, there] += 1
    for (name, there), count in short.items():
        many = f" (on {count} such nodes)" if count > 1 else ""
        yield (
            f"note: the object store of node {name}{many} has {there / GIB:.2f} GiB, and {_VERSIONS} versions of the "
            f"student{extra} {held / GIB:.2f}: Ray would spill them to disk, and every publication would wait for that; "
            "start Ray there with a larger object_store_memory (and /dev/shm)"
        )


def stored_versions(config: Config, student: ModelShape, placed: Sequence[Placed]) -> dict[int, float]:
    """Bytes of versions of the student in the object store of each node that holds any, at most; without publication none."""
    replicas = _replicas(config, placed)
    if not replicas or config.training.weight_transfer != "object_store":
        return {}
    precision = config.training.precision
    changes = CHANGES * update_bytes(student, precision) if config.training.sync_full_every > 1 else 0.0
    # Rank 0 may be on any node of the ranks.
    ranks = {index for item in placed if item.bundle.role == "student" for index in item.nodes}
    return dict.fromkeys(sorted(ranks | set(replicas)), changes + _VERSIONS * version_bytes(student, precision))


def _replicas(config: Config, placed: Sequence[Placed]) -> Counter[int]:
    """Number of replicas that take the student's weights, by node."""
    found: Counter[int] = Counter()
    for item in placed:
        if _holds_student(config, item.bundle.role):
            found.update(item.nodes)
    return found


def _holds_student(config: Config, role: str) -> bool:
    """True if the replicas of a role sample from the student, and take its weights."""
    return role == "rollout pool" or (role.startswith("teacher ") and config.student_beside(role.removeprefix("teacher ")))
