"""Ray Train's notice of lost ranks, which asks the group's mailbox whether they may be restarted."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import UserCallback

from kdray.errors import TrainingError

_ASK_S = 60.0


class LostRanks(UserCallback):
    """Callback in Ray Train's controller, before it restarts the ranks: an error here ends them for good."""

    def __init__(self, mailbox: Any) -> None:
        """Args: mailbox: actor handle of the group's Mailbox."""
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Register a loss. Raises: TrainingError if the restarts are used up; RayError if the mailbox does not answer."""
        reason = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(worker_exceptions.items()))
        # Their neighbours fail too, as their collectives break off.
        preempted = any(_is_preempted(error) for error in worker_exceptions.values())
        refused = ray.get(self._mailbox.lost.remote(reason, not preempted), timeout=_ASK_S)
        if refused is not None:
            raise TrainingError(refused)


def draining_nodes() -> set[str]:
    """Ids of the nodes that the cluster has announced to take away; blocks."""
    # What Ray Train's own watcher reads. Its public call is a barrier for all ranks in every step.
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _is_preempted(error: Exception) -> bool:
    """True for a rank whose node was taken away with notice, as spot instances are."""
    # Ray Train wraps the error of a rank that did not answer.
    cause = getattr(error, "health_check_failure", error)
    return isinstance(cause, RayActorError) and cause.preempted
