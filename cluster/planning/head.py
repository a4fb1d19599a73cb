"""Memory and disk of the driver's node, which holds the rollouts and batches of a run, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.planning.memory import GIB, ModelShape
from cluster.planning.placement import Node
from kdray.config import Config
from kdray.errors import CapacityError
from kdray.models.inspect import architecture
from kdray.rollouts.columns import Column, batch_columns, rollout_columns
from kdray.teachers.kind import kind_of

HEAD = "node:__internal_head__"
"""Ray's resource of the node that drivers run on."""
_BATCHES = 2
"""Batches in the object store at most: the one that is trained, and the one before it on its way to the disk."""


@dataclass(frozen=True)
class HeadNeeds:
    """Bytes that a run takes on the driver's node, at its longest prompts and responses."""

    rollouts: float
    """A step's rollouts."""
    steps: int
    """Steps whose rollouts may be in the buffer."""
    batch: float
    """A step's batch, padded to its longest row."""

    @property
    def memory(self) -> float:
        """Main memory, without the processes themselves: the buffer, and a batch while it is put together and divided."""
        return self.steps * self.rollouts + 2 * self.batch

    @property
    def store(self) -> float:
        """Ray's object store: batches, and a step's rollouts on their way from the replicas."""
        return _BATCHES * self.batch + self.rollouts


def head_needs(config: Config, hidden: int) -> HeadNeeds:
    """Compute what a run takes on the driver's node. Args: hidden: width of the teacher's hidden states; 0 if none come."""
    rollout, prompt = config.rollout, config.data.max_prompt_tokens
    width = {"token": 1, "support": rollout.teacher_top_k + rollout.student_top_k, "hidden": hidden}

    def token(columns: Iterable[Column]) -> int:
        return sum(np.dtype(column.dtype).itemsize * width[column.width] for column in columns)

    response, batch = rollout.max_response_tokens, config.training.batch_size
    # Ids of the prompt; ids and mask of a row.
    each = response * token(rollout_columns()) + 4 * prompt
    padded = (prompt + response) * (token(batch_columns()) + 5)
    return HeadNeeds(float(batch * each), rollout.max_staleness + 1, float(batch * padded))


def hidden_width(config: Config) -> int:
    """Width of the hidden states that the teacher returns; 0 if it returns none."""
    if config.rollout.teacher_signal != "hidden":
        return 0
    (name,) = config.teachers
    model = kind_of(config, name).model
    return 0 if model is None else ModelShape.of(architecture(*model)).hidden


def head_of(nodes: Sequence[Node]) -> Node | None:
    """Find the driver's node; None if that is not known."""
    named = [node for node in nodes if node.resources.get(HEAD)]
    return named[0] if named else nodes[0] if len(nodes) == 1 else None


def head_lines(config: Config, nodes: Sequence[Node], used: float, published: Mapping[int, float]) -> Iterator[str]:
    """Describe what the run takes on the driver's node. Raises: CapacityError as `check_head` does.

    Args: used: as for `check_head`; published: bytes of the student's versions in the object store of each node that has any.
    """
    needs = head_needs(config, hidden_width(config))
    training = config.training
    held = int(training.replay_gib * GIB // needs.batch)
    cadence = f"every {training.checkpoint_every} steps" if training.checkpoint_every else "only at the end"
    early = not training.checkpoint_every or held < training.checkpoint_every
    yield (
        f"driver's node: at most {needs.memory / GIB:.2f} GiB of main memory beside its processes, {needs.store / GIB:.2f} of "
        f"Ray's object store, and on disk {needs.batch / GIB:.2f} a step since the last checkpoint"
    )
    if early:
        yield (
            f"note: training.replay_gib={training.replay_gib:g} holds {held} steps of the longest responses, and checkpoints "
            f"are written {cadence}: where responses are that long, one is written after {max(1, held)} steps"
        )
    if head_of(nodes) is None:
        yield "note: which node the driver is on is not known, and its memory was not checked; describe it with head: true"
    head = head_of(nodes)
    check_head([config], nodes, used, 0.0 if head is None else published.get(nodes.index(head), 0.0))


def check_head(configs: Sequence[Config], nodes: Sequence[Node], used: float = 0.0, published: float = 0.0) -> None:
    """Check that the driver's node holds what runs take there together.

    Args: configs: of the runs; used: bytes of main memory that other parts take there; published: of the student's versions in
          its object store, where ranks or replicas are on it too.
    Raises: CapacityError naming what is short, and the settings that it follows from.
    """
    head = head_of(nodes)
    if head is None:
        return
    needs = [head_needs(config, hidden_width(config)) for config in configs]
    for what, key, needed, remedy in (
        (
            "of Ray's object store",
            "object_store_memory",
            published + sum(each.store for each in needs),
            "start Ray there with a larger object_store_memory (and /dev/shm), or lower",
        ),
        ("of memory", "memory", used + sum(each.memory for each in needs), "use a larger node, or lower"),
    ):
        there = head.resources.get(key)
        if there is not None and needed > there:
            config, rollout = configs[0], configs[0].rollout
            of_it = (
                f" ({published / GIB:.2f} for versions of the student)" if published and key == "object_store_memory" else ""
            )
            raise CapacityError(
                f"the driver's node {head.name}: this run needs {needed / GIB:.2f} GiB {what}{of_it}, and it has "
                f"{there / GIB:.2f}; "
                f"{remedy} training.batch_size={config.training.batch_size}, rollout.max_staleness={rollout.max_staleness}, "
                f"rollout.max_new_tokens={rollout.max_new_tokens}, data.max_prompt_tokens={config.data.max_prompt_tokens} or "
                f"rollout.teacher_top_k={rollout.teacher_top_k}"
            )
