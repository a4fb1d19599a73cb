"""Faults of a run on a cluster of processes on this machine: what is hit, and how."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.support.lost_streams import lose_one
from tests.support.runs import ENGINE, of_the_run, start
from tests.support.tcp_proxy import TcpProxy

NODE_CPUS = 3
"""Room for a whole run: a teacher's replica, a replica of the student's pool, a rank."""
STORE_BYTES = 100 * 2**20
"""Ray's object store on every node of these clusters."""
_LESS_THAN_A_CHECKPOINT = 300_000
"""Bytes; more than the logs of a rank."""
_GONE_S = 60.0
"""Longest time in which every process of a run that has ended has ended too."""
_FROZEN_S = 80.0
"""Longer than Ray takes to give up a node that does not answer: five checks, one every 3 s, each of at most 10 s."""

KINDS: dict[str, int] = {
    "kill_replica": 2,
    "kill_engine": 2,
    "stop_engine": 2,
    "kill_rank": 2,
    "stop_rank": 1,
    "kill_driver": 2,
    "interrupt": 2,
    "corrupt_checkpoint": 2,
    "full_disk": 2,
    "full_disk_of_a_rank": 2,
    "remove_node": 2,
    "kill_controller": 3,
    "fill_store": 3,
    "kill_weight_store": 2,
    "kill_mailbox": 2,
    "kill_registry": 2,
    "kill_train_controller": 2,
    "second_driver": 3,
    "kill_loading": 2,
    "stop_loading": 1,
    "stop_controller": 2,
    "freeze_node": 1,
    "lose_stream": 1,
}
"""Every fault there is, and how often it is drawn compared with others: those that take minutes to get past are rarer."""
OF_STORAGE: dict[str, int] = {"cut_storage": 2, "black_hole_storage": 2}
"""Faults of a run whose storage is behind a network of this process; `WITHOUT_STORAGE` are those that it cannot have."""
OF_ACTORS: dict[str, int] = {"stop_weight_store": 1, "stop_mailbox": 1, "stop_registry": 1}
"""Faults that are drawn only if they are named: each ends the command after `cluster.stuck_after_s`."""
WITHOUT_STORAGE = frozenset({"corrupt_checkpoint"})


class Faults:
    """Faults of one run, by name, with victims drawn from a seed."""

    def __init__(
        self,
        recipe: Path,
        run: Path,
        cluster: Any,
        patience_s: float,
        driver: Callable[[], psutil.Process],
        tail: Callable[[], str],
        network: TcpProxy | None = None,
    ) -> None:
        """Args: cluster: a `ray.cluster_utils.Cluster`, joined by this process; patience_s: longest time until there is a
        victim, and until a run that should end has; driver: its process; tail: the end of the run's output; network: to the
        run's storage."""
        self._network = network
        self._recipe = recipe
        self._run = run
        self._cluster = cluster
        self._random = random.Random(0)
        self._patience_s = patience_s
        self._tail = tail
        self._driver = driver
        self._held: list[Any] = []

    def inject(self, kind: str, seed: str) -> None:
        """Inject a fault. Args: seed: the victim is drawn by it."""
        self._random.seed(seed)
        getattr(self, f"_{kind}")()

    def relieve(self) -> None:
        """End what would not end by itself: somebody else's hold of the store."""
        self._held.clear()

    # --------------------------------------------------------------------------------------- processes, killed or stopped

    def _kill_replica(self) -> None:
        self._kill(replicas)

    def _kill_engine(self) -> None:
        self._kill(engines)

    def _stop_engine(self) -> None:
        self._hit(engines).suspend()

    def _kill_rank(self) -> None:
        self._kill(ranks)

    def _lose_stream(self) -> None:
        """An engine goes on and answers everybody, but of one response nothing more comes."""
        lose_one(self._patience_s, self._tail)

    def _stop_rank(self) -> None:
        self._hit(ranks).suspend()

    def _kill_driver(self) -> None:
        victim = self._driver()
        victim.kill()
        _await_end(victim)

    def _interrupt(self) -> None:
        self._driver().send_signal(signal.SIGINT)

    def _kill_controller(self) -> None:
        self._kill(controllers)

    def _kill_weight_store(self) -> None:
        self._kill(_of("ray::WeightStore"))

    def _kill_mailbox(self) -> None:
        self._kill(_of("ray::Mailbox"))

    def _kill_registry(self) -> None:
        self._kill(_of("ray::TeacherRegistry"))

    def _stop_weight_store(self) -> None:
        self._stop_for_good("ray::WeightStore")

    def _stop_mailbox(self) -> None:
        self._stop_for_good("ray::Mailbox")

    def _stop_registry(self) -> None:
        self._stop_for_good("ray::TeacherRegistry")

    def _stop_for_good(self, title: str) -> None:
        """Nobody replaces it: the command has to end. A run that is not asking it trains on until then."""
        driver = self._driver()
        self._hit(_of(title)).suspend()
        _await_end(driver, self._patience_s)

    def _kill_train_controller(self) -> None:
        self._kill(_of("ray::TrainController"))

    def _stop_controller(self) -> None:
        """Serve's controller hangs, and then a replica dies, which nobody else replaces."""
        self._hit(controllers).suspend()
        self._kill(replicas)

    def _kill_loading(self) -> None:
        self._loading_engine().kill()

    def _stop_loading(self) -> None:
        self._loading_engine().suspend()

    def _loading_engine(self) -> psutil.Process:
        """The engine of a replica that is killed for it, a moment after it began to load."""
        before = {each.pid for each in engines()}
        self._kill(replicas)
        victim = self._hit(lambda: [each for each in engines() if each.pid not in before])
        time.sleep(self._random.uniform(0.0, 4.0))
        return victim

    def _kill(self, processes: Callable[[], list[psutil.Process]]) -> None:
        victim = self._hit(processes)
        victim.kill()
        _await_end(victim)

    def _hit(self, processes: Callable[[], list[psutil.Process]]) -> psutil.Process:
        """One of them, drawn."""
        # After a fault before, replacements may still be on their way.
        deadline = time.monotonic() + self._patience_s
        while not (found := processes()):
            assert time.monotonic() < deadline, f"nobody to hit: {self._tail()}"
            time.sleep(0.2)
        return self._random.choice(sorted(found, key=lambda each: each.pid))

    # ------------------------------------------------------------------------------------------------------- the rest

    def _second_driver(self) -> None:
        """Somebody else resumes the same run, which is running: refused, naming who has it."""
        with (self._run.parent / "second.log").open("w+") as log:
            second = start("run", str(self._recipe), "--resume", log=log)
            code = second.wait(self._patience_s)
            log.seek(0)
            said = log.read()
        # It is alone if the first has ended meanwhile, as after a fault of its own.
        assert code == 2, f"the second driver ended with {code}: {said[-2000:]}"
        assert f"process {self._driver().pid} on" in said, said[-2000:]

    def _corrupt_checkpoint(self) -> None:
        """Break the newest checkpoint and kill the driver: the resume must take the one before."""
        self._kill_driver()
        # Ranks that outlive the driver for a moment may still commit a newer one.
        await_none(ranks)
        newest = max((self._run / "checkpoints").glob("step-*/COMMITTED.json")).parent
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.suffix != ".json")
        victim = self._random.choice(files)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(content)

    def _full_disk(self) -> None:
        """Nothing more can be appended by the driver, as on a full disk or over a quota; it ends, and has room again."""
        driver = self._driver()
        driver.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        with contextlib.suppress(psutil.TimeoutExpired):
            _await_end(driver, self._patience_s)

    def _full_disk_of_a_rank(self) -> None:
        """A rank has no room for its next checkpoint (its logs are smaller); the run ends with the reason."""
        driver = self._driver()
        self._hit(ranks).rlimit(psutil.RLIMIT_FSIZE, (_LESS_THAN_A_CHECKPOINT, resource.RLIM_INFINITY))
        _await_end(driver, self._patience_s)
        assert "cannot be written: File too large" in self._tail(), self._tail()

    def _fill_store(self) -> None:
        """Somebody else fills Ray's object store on the driver's node, so that what the run puts there has to make room."""
        import ray

        self._held = [ray.put(np.full(STORE_BYTES // 2, index, np.uint8)) for index in range(4)]

    def _remove_node(self) -> None:
        """A worker node goes with all that is on it, and an equal one comes."""
        self._cluster.remove_node(self._node(), allow_graceful=False)
        self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES)

    def _freeze_node(self) -> None:
        """A worker node is cut off: nothing on it answers, until Ray has given it up; then it comes back, and is not wanted."""
        node = self._node()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        frozen = [raylet, *raylet.children(recursive=True)]
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES)
        time.sleep(_FROZEN_S)
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._cluster.remove_node(node, allow_graceful=False)

    def _cut_storage(self) -> None:
        assert self._network is not None
        self._outage(self._network.cut)

    def _black_hole_storage(self) -> None:
        """The storage takes everything and answers nothing, from the middle of the next checkpoint on."""
        network = self._network
        assert network is not None
        network.black_hole_at(b"/checkpoints/step-")
        assert network.triggered.wait(self._patience_s), f"no checkpoint: {self._tail()}"
        self._outage(lambda: None)

    def _outage(self, begin: Callable[[], None]) -> None:
        """An outage of the storage, until the run has noticed it."""
        assert self._network is not None
        before = self._retries()
        begin()
        deadline = time.monotonic() + self._patience_s
        while self._retries() == before and self._driver().is_running():
            assert time.monotonic() < deadline, f"the run does not notice that its storage is away: {self._tail()}"
            time.sleep(0.2)
        self._network.heal()

    def _retries(self) -> int:
        """Operations on the storage that the driver has tried again."""
        return (self._run / "events.jsonl").read_text().count('"kind": "storage_retry"')

    def _node(self) -> Any:
        return self._random.choice(sorted(self._cluster.worker_nodes, key=lambda each: each.raylet_socket_name))


def replicas() -> list[psutil.Process]:
    return _named("ray::ServeReplica:kdray-")


def engines() -> list[psutil.Process]:
    return _named(*ENGINE)


def ranks() -> list[psutil.Process]:
    return _named("ray::RayTrainWorker")


def controllers() -> list[psutil.Process]:
    return _named("ray::ServeController")


def driver_of(command: int) -> psutil.Process:
    """The driver below a supervisor. Args: command: the supervisor's process."""
    return next(each for each in psutil.Process(command).children() if "cluster.cli" in each.cmdline())


def await_none(*kinds: Callable[[], Sequence[psutil.Process]]) -> None:
    """Wait until none of them is left."""
    deadline = time.monotonic() + _GONE_S
    while left := [process for processes in kinds for process in processes()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def _of(title: str) -> Callable[[], list[psutil.Process]]:
    return lambda: _named(title)


def _named(*titles: str) -> list[psutil.Process]:
    """Processes of this test's run with one of these in their command line."""
    found = []
    for process in of_the_run(os.environ["KDRAY_TEST_MARKER"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                found.append(process)
    return found


def _await_end(process: psutil.Process, timeout_s: float = 60.0) -> None:
    """Wait until a process has ended, or is a zombie that its parent has not asked for yet. Raises: psutil.TimeoutExpired."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise psutil.TimeoutExpired(timeout_s, process.pid)
            time.sleep(0.1)
