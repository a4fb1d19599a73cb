"""A run under a seeded schedule of faults, on a cluster of its own: `python -m tests.soak.chaos --seed 0 --faults 30`.

Faults hit real engines, ranks, drivers and nodes while the run trains; whatever ends the command, it is started again with
--resume. The verdict comes from the files: `kdray verify`, the ledger, and the held-out numbers beside those of an undisturbed
run of the same recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from tests.support.runs import ENGINE, json_lines, of_the_run, start, write_recipe

STUCK_S = 30.0
"""Deadline of engines and ranks in these runs; the ranks of a tiny student start within it."""
QUALITY_NATS = 0.1
"""Difference of the final reverse KL that two runs of these few samples may have by chance, nats per token."""
STORE_BYTES = 100 * 2**20
"""Ray's object store on every node of these clusters."""
_NODE_CPUS = 3
"""Room for a whole run: a teacher's replica, a replica of the student's pool, a rank."""
_LESS_THAN_A_CHECKPOINT = 300_000
"""Bytes; more than the logs of a rank."""
_BETWEEN_STEPS = 2
"""Steps that the run trains between two faults."""
_PATIENCE_S = 420.0
"""Longest time in which the run must have gone on after a fault."""
_GONE_S = 60.0
"""Longest time in which every process of a run that has ended has ended too."""
STUDENT_POOL = {"sampler": "student", "pool": {"kv_cache_gib": 0.2}}
"""For section `rollout`: the student samples on replicas of its own."""


@dataclass
class Outcome:
    """What a disturbed run came to."""

    faults: list[str] = field(default_factory=list)
    """In their order."""
    starts: int = 0
    """Times the command was started."""
    codes: list[int] = field(default_factory=list)
    """How the command ended each time."""
    events: Counter[str] = field(default_factory=Counter)
    """Kinds of events that the run wrote, over all starts."""
    summary: dict[str, Any] = field(default_factory=dict)
    verified: str = ""
    """What `kdray verify` printed; it found nothing wrong."""


class Chaos:
    """One disturbed run."""

    def __init__(self, recipe: Path, cluster: Any, seed: int, wanted: list[str]) -> None:
        """Args: cluster: a `ray.cluster_utils.Cluster`, joined by this process; wanted: the faults, in order."""
        tree = yaml.safe_load(recipe.read_text())
        self._recipe = recipe
        self._run = Path(tree["run"]["output"]) / tree["run"]["name"]
        self._cluster = cluster
        self._random = random.Random(seed)
        self._wanted = wanted
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this object
        self.outcome = Outcome()
        self._held: list[Any] = []
        self._faults: dict[str, Callable[[], None]] = {
            "kill_replica": lambda: self._signal(_replicas, signal.SIGKILL),
            "kill_engine": lambda: self._signal(_engines, signal.SIGKILL),
            "stop_engine": lambda: self._signal(_engines, signal.SIGSTOP),
            "kill_rank": lambda: self._signal(_ranks, signal.SIGKILL),
            "stop_rank": lambda: self._signal(_ranks, signal.SIGSTOP),
            "kill_driver": self._kill_driver,
            "interrupt": self._interrupt,
            "corrupt_checkpoint": self._corrupt_checkpoint,
            "full_disk": self._full_disk,
            "full_disk_of_a_rank": self._full_disk_of_a_rank,
            "remove_node": self._remove_node,
            "kill_controller": lambda: self._signal(_controllers, signal.SIGKILL),
            "fill_store": self._fill_store,
        }
        assert list(self._faults) == self.kinds()

    @classmethod
    def kinds(cls) -> list[str]:
        """Every fault there is."""
        return [
            "kill_replica",
            "kill_engine",
            "stop_engine",
            "kill_rank",
            "stop_rank",
            "kill_driver",
            "interrupt",
            "corrupt_checkpoint",
            "full_disk",
            "full_disk_of_a_rank",
            "remove_node",
            "kill_controller",
            "fill_store",
        ]

    def run(self) -> Outcome:
        """Until the run has ended well. Raises: AssertionError where it does not go on, or the files do not add up."""
        self._start()
        for fault in self._wanted:
            self._train_on()
            began = time.monotonic()
            self._faults[fault]()
            self.outcome.faults.append(fault)
            print(f"{len(self.outcome.faults):3d} {fault} at step {self._steps()}", flush=True)
            self._train_on()
            self._held.clear()
            print(f"    trained on after {time.monotonic() - began:.0f} s", flush=True)
        self._finish()
        self.outcome.events = Counter(event["kind"] for event in json_lines(self._run / "events.jsonl"))
        self.outcome.summary = json.loads((self._run / "summary.json").read_text())
        self.outcome.verified = self._verify()
        return self.outcome

    def _start(self) -> None:
        resume = ["--resume"] if self.outcome.starts else []
        self._process = start("run", str(self._recipe), *resume, log=self._log)
        self.outcome.starts += 1

    def _steps(self) -> int:
        """Steps trained so far; lines of a metrics file may be taken back by a resume."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return max((line["step"] for line in json_lines(self._run / "metrics.jsonl")), default=0)
        return 0

    def _train_on(self) -> None:
        """Wait until the run has trained a few steps from here, starting the command again where it ended."""
        deadline = time.monotonic() + _PATIENCE_S
        began, reached = self._steps(), 0
        while reached < began + _BETWEEN_STEPS:
            self._start_again_if_ended()
            assert time.monotonic() < deadline, f"stands still at step {reached}: {self._tail()}"
            time.sleep(0.5)
            now = self._steps()
            # A resume trains the steps after its checkpoint again: what counts is to have gone on from there.
            began = min(began, now)
            reached = now

    def _start_again_if_ended(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self.outcome.codes.append(code)
            assert code in (1, 130, -signal.SIGKILL), f"the command ended with {code}: {self._tail()}"
            self._start()

    def _finish(self) -> None:
        deadline = time.monotonic() + 2 * _PATIENCE_S
        assert self._process is not None
        while self._process.poll() != 0:
            self._start_again_if_ended()
            assert time.monotonic() < deadline, f"does not end: {self._tail()}"
            time.sleep(0.5)
        self.outcome.codes.append(0)
        deadline = time.monotonic() + _GONE_S
        while left := [*_replicas(), *_engines(), *_ranks()]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.5)

    def _verify(self) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "verify", str(self._run)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _tail(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-4000:]

    # --------------------------------------------------------------------------------------------------- faults

    def _signal(self, processes: Callable[[], list[psutil.Process]], number: int) -> None:
        victim = self._hit(processes)
        victim.send_signal(number)
        if number == signal.SIGKILL:
            victim.wait(60)

    def _hit(self, processes: Callable[[], list[psutil.Process]]) -> psutil.Process:
        """One of them, drawn."""
        # After a fault before, replacements may still be on their way.
        deadline = time.monotonic() + _PATIENCE_S
        while not processes():
            assert time.monotonic() < deadline, f"nobody to hit: {self._tail()}"
            time.sleep(0.5)
        return self._random.choice(sorted(processes(), key=lambda each: each.pid))

    def _kill_driver(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _interrupt(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def _corrupt_checkpoint(self) -> None:
        """Break the newest checkpoint and kill the driver: the resume must take the one before."""
        self._kill_driver()
        # Ranks that outlive the driver for a moment may still commit a newer one.
        deadline = time.monotonic() + _GONE_S
        while left := _ranks():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)
        newest = max((self._run / "checkpoints").glob("step-*/COMMITTED.json")).parent
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.suffix != ".json")
        victim = self._random.choice(files)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(content)

    def _full_disk(self) -> None:
        """Nothing more can be appended by the driver, as on a full disk or over a quota; it ends, and has room again."""
        assert self._process is not None
        driver = psutil.Process(self._process.pid)
        driver.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)

    def _full_disk_of_a_rank(self) -> None:
        """A rank has no room for its next checkpoint (its logs are smaller); the run ends with the reason."""
        self._hit(_ranks).rlimit(psutil.RLIMIT_FSIZE, (_LESS_THAN_A_CHECKPOINT, resource.RLIM_INFINITY))
        assert self._process is not None
        self._process.wait(_PATIENCE_S)
        assert "cannot be written: File too large" in self._tail(), self._tail()

    def _fill_store(self) -> None:
        """Somebody else fills Ray's object store on the driver's node, so that what the run puts there has to make room."""
        import ray

        self._held = [ray.put(np.full(STORE_BYTES // 2, index, np.uint8)) for index in range(4)]

    def _remove_node(self) -> None:
        """A worker node goes with all that is on it, and an equal one comes."""
        node = self._random.choice(sorted(self._cluster.worker_nodes, key=lambda each: each.raylet_socket_name))
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(num_cpus=_NODE_CPUS, object_store_memory=STORE_BYTES)


def _named(*titles: str) -> list[psutil.Process]:
    """Processes of this test's run with one of these in their command line."""
    found = []
    for process in of_the_run(os.environ["KDRAY_TEST_MARKER"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                found.append(process)
    return found


def _replicas() -> list[psutil.Process]:
    return _named("ray::ServeReplica:kdray-")


def _engines() -> list[psutil.Process]:
    return _named(*ENGINE)


def _ranks() -> list[psutil.Process]:
    return _named("ray::RayTrainWorker")


def _controllers() -> list[psutil.Process]:
    return _named("ray::ServeController")


@contextlib.contextmanager
def cluster_of(workers: int) -> Iterator[Any]:
    """A head without room for the run, and so many worker nodes that each can hold all of it."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(workers):
            nodes.add_node(num_cpus=_NODE_CPUS, object_store_memory=STORE_BYTES)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def recipe_of(workplace: Path, name: str, address: str, steps: int, student_pool: bool = False) -> Path:
    return write_recipe(
        workplace,
        name,
        training={
            "steps": steps,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "checkpoint_every": 3,
            "keep_checkpoints": 3,
            "max_restarts": 1000,
            "stuck_after_s": STUCK_S,
            "sft": {"steps": 20, "batch_size": 32, "learning_rate": 3e-3},
        },
        rollout={"max_new_tokens": 8, "retries": 12, **(STUDENT_POOL if student_pool else {})},
        cluster={"address": address, "health_check_period_s": 2, "stuck_after_s": STUCK_S, "wait_s": 300},
    )


def schedule(seed: int, faults: int, kinds: list[str]) -> list[str]:
    """So many faults, every kind about as often, in an order of the seed."""
    wanted = (kinds * (faults // len(kinds) + 1))[:faults]
    random.Random(seed).shuffle(wanted)
    return wanted


def steps_for(faults: int) -> int:
    """Steps that leave room for every fault."""
    return 6 + 3 * _BETWEEN_STEPS * faults


def main() -> None:
    from .conftest import make_workplace

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--student-pool", action="store_true", help="the student samples on replicas of its own")
    parser.add_argument("--kinds", nargs="*", default=Chaos.kinds(), choices=Chaos.kinds(), help="faults to draw from; all")
    given = parser.parse_args()
    os.environ["KDRAY_TEST_MARKER"] = f"chaos-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder, cluster_of(2) as cluster:
        workplace = make_workplace(Path(folder))
        where = cluster.address, steps_for(given.faults), given.student_pool
        calm = Chaos(recipe_of(workplace, "calm", *where), cluster, given.seed, []).run()
        wanted = schedule(given.seed, given.faults, given.kinds)
        outcome = Chaos(recipe_of(workplace, "disturbed", *where), cluster, given.seed, wanted).run()
    print(outcome.verified)
    print("faults:", dict(Counter(outcome.faults)), "starts:", outcome.starts, "exit codes:", dict(Counter(outcome.codes)))
    print("events:", dict(outcome.events))
    for name in ("before", "after"):
        print(f"{name}: undisturbed {calm.summary[name]}, disturbed {outcome.summary[name]}")
    calm_kl, disturbed_kl = (each.summary["after"]["reverse_kl"] for each in (calm, outcome))
    assert abs(disturbed_kl - calm_kl) <= QUALITY_NATS, f"after: reverse KL {disturbed_kl:.3f}, undisturbed {calm_kl:.3f}"


if __name__ == "__main__":
    main()
