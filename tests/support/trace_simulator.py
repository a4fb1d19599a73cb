"""A pool of replicas, a trainer that waits for it and a cluster that places replicas, simulated event by event.

The decision, the routing choice and the counters are the ones of `kdray`; what is made up is the time that things take. A
trainer admits a step's rollouts as soon as staleness allows (one step ahead), waits for the batch, trains, and goes on. Calls
wait at the caller until a replica has room for another, and a replica answers them one after the other.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from actors.serving.autoscaling import Load, ScaleWatch, ScalingRules, State, decide
from actors.serving.load_stats import Awaited, TimeShare, Workload
from actors.serving.replica_choice import ReplicaLoad, soonest

PART = 16
"""Rollouts of one call: half of an engine's slots."""
CALLS_PER_REPLICA = 8
REPORT_EVERY_S = 5.0
MAX_STALENESS = 1


@dataclass(frozen=True)
class Step:
    """One training step of a trace."""

    rollouts: int
    tokens: int
    """Of each rollout."""
    train_s: float


@dataclass(frozen=True)
class Hardware:
    """One accelerator type of a cluster."""

    tokens_per_s: float
    cold_start_s: float
    capacity: int
    """Replicas that fit."""


@dataclass
class Replica:
    kind: str
    hardware: Hardware
    placed_at: float
    work: Workload
    serving: bool = False
    draining: bool = False
    calls: deque[tuple[int, int, int]] = field(default_factory=deque)
    """(call, its number in `work`, tokens), the first one being answered."""


@dataclass
class Outcome:
    """What came of a trace."""

    seconds: float = 0.0
    waited_s: float = 0.0
    """Time that the trainer waited."""
    replica_s: float = 0.0
    """Time that replicas held their hardware, cold starts included."""
    targets: list[tuple[float, int]] = field(default_factory=list)
    """(time, target) at the start and at every change."""
    most_serving: int = 0
    reasons: set[str] = field(default_factory=set)
    events: list[str] = field(default_factory=list)

    @property
    def reversals(self) -> int:
        """Times that the target turned from growing to shrinking, or back."""
        signs = [later > earlier for (_, earlier), (_, later) in itertools.pairwise(self.targets)]
        return sum(before != after for before, after in itertools.pairwise(signs))


class Simulation:
    """A trace under rules of autoscaling (with equal bounds the pool is fixed).

    Args: route: which replica takes a call, of those that have room: `soonest`, or `round_robin`.
    """

    def __init__(self, steps: Sequence[Step], hardware: Mapping[str, Hardware], rules: ScalingRules, route: str = "soonest"):
        self.outcome = Outcome()
        self._steps = steps
        self._hardware = hardware
        self._rules = rules
        self._route = route
        self._turn = 0
        self._now = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._replicas: list[Replica] = []
        self._target = max(1, rules.min_replicas)
        self._state = State()
        self._watch = ScaleWatch(rules.placement_timeout_s)
        self._reports: dict[int, dict[str, float]] = {}
        self._waits = TimeShare(0.0)
        self._awaited = Awaited(lambda waits: self._waits.switch(waits, self._now))
        self._waiting_calls: deque[tuple[int, int, int]] = deque()
        self._calls_left = [-(-step.rollouts // PART) for step in steps]
        self._waiting_for = -1
        self._admitted = 0
        self._trained = 0
        self._training = False
        self._next_call = 0
        self._step_of_call: dict[int, int] = {}

    def run(self) -> Outcome:
        self.outcome.targets.append((0.0, self._target))
        self._place()
        for replica in self._replicas:
            replica.serving = True
        self._admit()
        self._maybe_train()
        self._tick()
        self._report()
        while self._trained < len(self._steps):
            self._now, _, happen = heapq.heappop(self._queue)
            happen()
        for replica in self._replicas:
            self.outcome.replica_s += self._now - replica.placed_at
        self.outcome.seconds = self._now
        self.outcome.waited_s = self._awaited.take_s(self._now)
        return self.outcome

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self._now + seconds, next(self._order), happen))

    # -------------------------------------------------------------------------------------------------------- trainer

    def _admit(self) -> None:
        while self._admitted < len(self._steps) and self._admitted <= self._trained + MAX_STALENESS:
            step = self._steps[self._admitted]
            calls = []
            for first in range(0, step.rollouts, PART):
                rollouts = min(PART, step.rollouts - first)
                calls.append((self._next_call, rollouts, rollouts * step.tokens))
                self._step_of_call[self._next_call] = self._admitted
                self._next_call += 1
            self._admitted += 1
            self._waiting_calls.extend(calls)
            self._awaited.asked([call for call, _, _ in calls], self._now)
        self._send()

    def _maybe_train(self) -> None:
        if self._training:
            return
        if self._calls_left[self._trained]:
            if self._waiting_for != self._trained:
                self._waiting_for = self._trained
                missing = [call for call, step in self._step_of_call.items() if step == self._trained]
                self._awaited.misses(missing, self._now)
            return
        self._awaited.misses([], self._now)
        self._training = True
        self._after(self._steps[self._trained].train_s, self._published)

    def _published(self) -> None:
        self._training = False
        self._trained += 1
        if self._trained < len(self._steps):
            self._admit()
            self._maybe_train()

    # ----------------------------------------------------------------------------------------------------------- pool

    def _send(self) -> None:
        """Hand calls to replicas that have room, in the order in which they came."""
        while self._waiting_calls:
            free = [r for r in self._replicas if r.serving and not r.draining and len(r.calls) < CALLS_PER_REPLICA]
            if not free:
                return
            if self._route == "soonest":
                replica = free[soonest([ReplicaLoad(len(r.calls), r.work.tokens_per_s(self._now)) for r in free])[0]]
            else:
                self._turn += 1
                replica = free[self._turn % len(free)]
            call, rollouts, tokens = self._waiting_calls.popleft()
            replica.calls.append((call, replica.work.begin(rollouts, self._now), tokens))
            if len(replica.calls) == 1:
                self._answer(replica)

    def _answer(self, replica: Replica) -> None:
        _, _, tokens = replica.calls[0]
        self._after(tokens / replica.hardware.tokens_per_s, partial(self._answered, replica))

    def _answered(self, replica: Replica) -> None:
        call, number, tokens = replica.calls.popleft()
        replica.work.done(number, PART, tokens, self._now)
        replica.work.end(number, self._now)
        self._awaited.answered([call], self._now)
        self._calls_left[self._step_of_call.pop(call)] -= 1
        if replica.calls:
            self._answer(replica)
        elif replica.draining:
            self._remove(replica)
        self._send()
        self._maybe_train()

    # ------------------------------------------------------------------------------------------- cluster and autoscaler

    def _place(self) -> None:
        """Place what is asked for where there is room; the rest stays asked for. Too many: the least loaded go, drained."""
        alive = [replica for replica in self._replicas if not replica.draining]
        for kind, hardware in self._hardware.items():
            used = sum(replica.kind == kind for replica in self._replicas)
            while len(alive) < self._target and used < hardware.capacity:
                replica = Replica(kind, hardware, self._now, Workload(2 * PART, self._now))
                self._replicas.append(replica)
                alive.append(replica)
                used += 1
                self._after(hardware.cold_start_s, partial(self._serve, replica))
        alive.sort(key=lambda replica: (replica.serving, len(replica.calls)))
        for replica in alive[: max(0, len(alive) - self._target)]:
            if replica.calls:
                replica.draining = True
            else:
                self._remove(replica)

    def _serve(self, replica: Replica) -> None:
        if replica in self._replicas:
            replica.serving = True
            self._send()

    def _remove(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        self._reports.pop(id(replica), None)
        self.outcome.replica_s += self._now - replica.placed_at
        self._place()

    def _report(self) -> None:
        waiting = self._waits.seconds(self._now)
        for replica in self._replicas:
            if replica.serving:
                self._reports[id(replica)] = {"waiting_s": waiting, **replica.work.stats(self._now)}
        self._after(REPORT_EVERY_S, self._report)

    def _tick(self) -> None:
        serving = [replica for replica in self._replicas if replica.serving and not replica.draining]
        reports = [self._reports[id(replica)] for replica in serving if id(replica) in self._reports]
        complete = bool(serving) and len(reports) == len(serving)
        load = Load(
            running=len(serving),
            target=self._target,
            waiting_s=max((report["waiting_s"] for report in reports), default=0.0),
            queue_age_s=max((report["queue_age_s"] for report in reports), default=0.0),
            ongoing=sum(report["ongoing"] for report in reports) + len(self._waiting_calls),
            idle_s=min(report["idle_s"] for report in reports) if complete and not self._waiting_calls else 0.0,
            busy=sum(report["busy"] for report in reports) if complete else float(len(serving)),
        )
        target, self._state, reason = decide(load, self._rules, self._state, self._now)
        self.outcome.reasons.add(reason)
        self.outcome.most_serving = max(self.outcome.most_serving, len(serving))
        self.outcome.events += [kind for kind, _ in self._watch.see(len(serving), target, reason, self._now)]
        if target != self._target:
            self.outcome.targets.append((self._now, target))
            self._target = target
            self._place()
        self._after(1.0, self._tick)
