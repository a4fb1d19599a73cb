"""Actors pinned to the driver's node: they hold the run's shared state, and end with the run."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kdray.errors import TrainingError

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 1.0


def on_driver_node(actor: type[Any], **options: Any) -> Any:
    """Ray actor class pinned to the driver's node, so that it survives the loss of any other node.

    Its calls are not listed in Ray's state API: there are dozens per step, and Ray's GCS kept a record of each, 40 KB per step,
    up to its limit of 100,000 records.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, enable_task_events=False, **options)


class ActorWatch:
    """Watch over the actors of a run: none of them is replaced, since what they hold is lost with them.

    Callers of a lost one meet an error of Ray's sooner or later, or wait; the watch names it at once. A resume starts new ones.
    """

    def __init__(self, silence_s: float) -> None:
        """Args: silence_s: longest time without an answer; they answer in milliseconds, or stand still."""
        self._silence_s = silence_s
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._reason = ""
        self._lost = asyncio.Event()

    def add(self, name: str, actor: Any) -> None:
        """Watch an actor from now on. Args: name: in words; each only once."""
        self._asking[name] = asyncio.create_task(self._ask(name, actor))

    def remove(self, name: str) -> None:
        """Watch an actor no longer: it is about to be ended."""
        if (asking := self._asking.pop(name, None)) is not None:
            asking.cancel()

    async def watch(self) -> None:
        """Wait without end. Raises: TrainingError naming an actor that is dead, or does not answer any more."""
        await self._lost.wait()
        raise TrainingError(f"{self._reason}. What it held cannot be replaced; continue from the last checkpoint with --resume")

    def close(self) -> None:
        """Watch nothing any more."""
        for name in list(self._asking):
            self.remove(name)

    async def _ask(self, name: str, actor: Any) -> None:
        # Its start has no limit here: a busy node takes long for a process.
        limit_s, missed, failing_s = None, 0, 0.0
        while True:
            asked_at = time.monotonic()
            try:
                await asyncio.wait_for(_value(actor.__ray_ready__.remote()), limit_s)
                limit_s, missed, failing_s = self._silence_s / 2, 0, 0.0
            except ActorDiedError:
                return self._lose(f"{name} is gone: its process was killed, as when the driver's node runs out of memory")
            except TimeoutError:
                # Twice: this process itself may have stood still, and see its limit before the answer.
                missed += 1
                if missed == 2:
                    return self._lose(f"{name} has not answered for cluster.stuck_after_s={self._silence_s:g} s")
            except Exception as error:
                # As when Ray cannot reach it for a moment. One call counts half at most: this process may have stood still.
                if not failing_s:
                    logger.warning("%s could not be asked whether it answers, and is asked again: %r", name, error)
                failing_s += _ASK_EVERY_S + min(time.monotonic() - asked_at, self._silence_s / 2)
                if failing_s > self._silence_s:
                    return self._lose(
                        f"{name} could not be reached for cluster.stuck_after_s={self._silence_s:g} s: {repr(error)[:500]}"
                    )
            await asyncio.sleep(_ASK_EVERY_S)

    def _lose(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._lost.set()


async def _value(reference: Any) -> Any:
    return await reference
