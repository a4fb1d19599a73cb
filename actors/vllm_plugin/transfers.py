"""Copies between host and device for which no forward pass waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

_SLOTS = 8


class Event(Protocol):
    """Point in a device's queue of work."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device, ordered before the work that the caller queues next."""
    tensor = torch.from_numpy(values)
    # Only a copy from page-locked memory is asynchronous.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True, copy=True)


class Arrival:
    """Arrays of one step on their way to the host."""

    def __init__(self, staged: Sequence[torch.Tensor], done: Event | None) -> None:
        self._staged = staged
        self._done = done
        self._arrays: tuple[np.ndarray, ...] | None = None

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays, in ordinary memory; waits for the copy if it is still under way."""
        if self._arrays is None:
            if self._done is not None:
                self._done.synchronize()
            # Copied, so that records that wait for their requests to finish hold no page-locked memory.
            self._arrays = tuple(tensor.numpy().copy() for tensor in self._staged)
            self._staged = ()
        return self._arrays


class Readback:
    """Ring of page-locked buffers through which the results of the latest steps reach the host.

    A step takes the place of the one that was sent `slots` steps before, whose copy has long ended: the buffers stay few,
    however long the requests run.
    """

    def __init__(self, device: torch.device, slots: int = _SLOTS, record: Callable[[], Event] | None = None) -> None:
        """Args: record: notes the current point in the device's queue of work; None for the device's own events."""
        self._pinned = device.type == "cuda"
        self._record = record or (_record if self._pinned else None)
        self._under_way: deque[Arrival] = deque(maxlen=slots)

    def send(self, tensors: Sequence[torch.Tensor]) -> Arrival:
        """Begin to copy the tensors to the host. The caller does not write to them afterwards."""
        if len(self._under_way) == self._under_way.maxlen:
            self._under_way[0].arrays()
        staged = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        arrival = Arrival(staged, None if self._record is None else self._record())
        self._under_way.append(arrival)
        return arrival


def _record() -> Event:
    event = torch.cuda.Event()
    event.record()
    return event
