"""Results on their way to the host: read when they have arrived, few at once."""

from __future__ import annotations

import numpy as np
import torch

from actors.vllm_plugin.transfers import Readback, to_device

CPU = torch.device("cpu")


class Clock:
    """Events of a device that finishes nothing before it is waited for."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.recorded = 0

    def record(self) -> Clock.Mark:
        self.recorded += 1
        return Clock.Mark(self, self.recorded - 1)

    class Mark:
        def __init__(self, clock: Clock, number: int) -> None:
            self.clock, self.number = clock, number

        def synchronize(self) -> None:
            self.clock.waited.append(self.number)


def test_nothing_is_waited_for_until_it_is_read() -> None:
    clock = Clock()
    readback = Readback(CPU, slots=4, record=clock.record)
    arrivals = [readback.send((torch.full((2, 3), float(step)), torch.tensor([step]))) for step in range(4)]
    assert clock.waited == []
    floats, ints = arrivals[2].arrays()
    assert clock.waited == [2]
    assert (floats == 2).all()
    assert ints.tolist() == [2]
    arrivals[2].arrays()
    assert clock.waited == [2], "waited for once"


def test_buffers_stay_few_however_many_steps_are_kept() -> None:
    clock = Clock()
    readback = Readback(CPU, slots=2, record=clock.record)
    arrivals = [readback.send((torch.tensor([step]),)) for step in range(10)]
    assert clock.waited == list(range(8)), "the oldest gives its place to the newest"
    assert [arrival.arrays()[0].item() for arrival in arrivals] == list(range(10))


def test_what_is_sent_is_a_copy() -> None:
    tensor = torch.zeros(3)
    arrival = Readback(CPU).send((tensor,))
    tensor.fill_(1.0)
    assert arrival.arrays()[0].tolist() == [0, 0, 0]
    values = np.zeros(3)
    there = to_device(values, CPU)
    values[:] = 1
    assert there.tolist() == [0, 0, 0]
