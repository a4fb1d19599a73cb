"""A run under a seeded schedule of faults, on a cluster of its own: `python -m tests.soak.chaos --seed 0 --faults 100`.

Faults hit real engines, ranks, drivers, actors and nodes while the run trains; whatever ends the command, it is started again
with --resume, or by its supervisor. Budgets (restarts, retries) are the settings' defaults, and every deadline is its default
divided by `--scale`. The verdict comes from the files: `kdray verify`, the ledger, and the held-out numbers beside those of
undisturbed runs of the same recipe.

With `--folder`, everything is kept there, and `--minutes` bounds a part: the same command with `--resume` goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.jobs.supervision import newest_step
from kdray.config.sections import ClusterSettings
from kdray.config.training import TrainingSettings
from tests.integration.conftest import make_workplace
from tests.soak.faults import (
    KINDS,
    NODE_CPUS,
    OF_ACTORS,
    OF_STORAGE,
    STORE_BYTES,
    WITHOUT_STORAGE,
    Faults,
    await_none,
    driver_of,
    engines,
    ranks,
    replicas,
)
from tests.support import lost_streams
from tests.support.runs import json_lines, start, write_recipe
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

SCALE = 20.0
"""Every deadline of these runs is its default divided by this: what a node does in minutes, a tiny model does in seconds."""
DEADLINES = {
    "training": (TrainingSettings, ("stuck_after_s", "stuck_loading_after_s")),
    "cluster": (
        ClusterSettings,
        (
            "wait_s",
            "start_timeout_s",
            "teardown_s",
            "stuck_after_s",
            "request_silence_s",
            "stuck_run_after_s",
            "health_check_period_s",
        ),
    ),
}
QUALITY = "reverse_kl", "forward_kl"
"""Held-out numbers of the disturbed run that have to lie in the intervals of undisturbed ones."""
_UNDISTURBED = 3
"""Undisturbed runs, of different seeds: after many steps they end further apart than one's interval over prompts is wide."""
NOT_FINISHED = 3
"""Exit code of a part after which there are others."""
STUDENT_POOL = {"sampler": "student", "pool": {"kv_cache_gib": 0.2}}
"""For section `rollout`: the student samples on replicas of its own."""
_BETWEEN_STEPS = 2
"""Steps that the run trains between two faults."""
PATIENCE_S = 420.0
"""Longest time in which the run must have gone on after a fault, with deadlines divided by `SCALE`."""
_MANY_STEPS = 10**6
ALL = KINDS | OF_STORAGE | OF_ACTORS
"""Every fault, and how often it is drawn."""


@dataclass
class Outcome:
    """What a disturbed run came to; kept beside the run."""

    faults: list[str] = field(default_factory=list)
    """In their order."""
    seconds: list[float] = field(default_factory=list)
    """Time from each until the run had trained on."""
    starts: int = 0
    """Times the command was started."""
    codes: list[int] = field(default_factory=list)
    """How the command ended each time."""
    parts: int = 0
    failures: list[str] = field(default_factory=list)
    """Faults that the run did not get past, each in an earlier part."""
    steps: int | None = None
    """Steps of the whole run, once known."""
    events: dict[str, int] = field(default_factory=dict)
    """Kinds of events that the run wrote, over all starts."""
    summary: dict[str, Any] = field(default_factory=dict)
    verified: str = ""
    """What `kdray verify` printed; it found nothing wrong."""

    @classmethod
    def read(cls, path: Path) -> Outcome:
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


class Chaos:
    """One disturbed run."""

    def __init__(
        self,
        recipe: Path,
        cluster: Any,
        seed: int,
        wanted: Sequence[str],
        supervise: bool = False,
        end_early: bool = False,
        network: TcpProxy | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Args: cluster: a `ray.cluster_utils.Cluster`, joined by this process; wanted: the faults, in order; supervise: the
        command is started once, and its supervisor resumes it; end_early: the run ends soon after its last fault; network:
        to the run's storage, if it has one; patience_s: longest time in which the run must have gone on after a fault."""
        self._patience_s = patience_s
        self._recipe = recipe
        self._tree: dict[str, Any] = yaml.safe_load(recipe.read_text())
        self._run = Path(self._tree["run"]["output"]) / self._tree["run"]["name"]
        self._path = self._run.with_name(f"{self._run.name}.outcome.json")
        self._seed = seed
        self._wanted = wanted
        self._supervise = supervise
        self._end_early = end_early
        self._process: subprocess.Popen[str] | None = None
        self._run.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._run.with_name(f"{self._run.name}.log").open("a+")
        self._faults = Faults(recipe, self._run, cluster, patience_s, self._driver, self._tail, network)
        self.outcome = Outcome.read(self._path)

    def run(self, until: float | None = None) -> bool:
        """Until the run has ended well, or the time is up. Returns: True if it has ended.

        Args: until: by `time.monotonic`; None is no limit. A part ends before a fault that may take longer.
        Raises: AssertionError where the run does not go on, or the files do not add up.
        """
        if self.outcome.summary:
            return True
        try:
            self._start()
            while len(self.outcome.faults) < len(self._wanted):
                self._train_on()
                if until is not None and time.monotonic() + self._expected_s() > until:
                    self._pause()
                    return False
                self._next_fault()
            if not self._finish(until):
                return False
        except AssertionError as error:
            self.outcome.failures.append(f"after {len(self.outcome.faults)} faults: {str(error)[:2000]}")
            raise
        finally:
            self._write()
            if self._process is not None and self._process.poll() is None:
                # A fault that was not got past, or an interruption: the cluster goes with this process.
                self._process.kill()
        self.outcome.events = dict(Counter(event["kind"] for event in json_lines(self._run / "events.jsonl")))
        self.outcome.summary = json.loads((self._run / "summary.json").read_text())
        self.outcome.verified = self._verify()
        self._write()
        return True

    def _next_fault(self) -> None:
        index = len(self.outcome.faults)
        kind = self._wanted[index]
        print(f"{index + 1:3d} {kind} at step {self._steps()}", flush=True)
        began = time.monotonic()
        self._faults.inject(kind, f"{self._seed}-{index}")
        self._train_on()
        self._faults.relieve()
        self.outcome.faults.append(kind)
        self.outcome.seconds.append(round(time.monotonic() - began, 1))
        print(f"    trained on after {self.outcome.seconds[-1]:.0f} s", flush=True)
        self._write()

    def _expected_s(self) -> float:
        """Time that the next fault may take, from those of its kind before."""
        kind = self._wanted[len(self.outcome.faults)]
        seen = [each for fault, each in zip(self.outcome.faults, self.outcome.seconds, strict=True) if fault == kind]
        return 1.3 * max(seen) if seen else 120.0 * (2 if ALL[kind] == 1 else 1)

    def _start(self) -> None:
        flags = ["--resume"] if self.outcome.starts else []
        if self._supervise:
            flags.append("--supervise")
        self._process = start("run", str(self._recipe), *flags, log=self._log)
        self.outcome.starts += 1

    def _driver(self) -> psutil.Process:
        """Process of the driver; waits for the supervisor's next one."""
        assert self._process is not None
        if not self._supervise:
            return psutil.Process(self._process.pid)
        deadline = time.monotonic() + self._patience_s
        while True:
            with contextlib.suppress(StopIteration, psutil.NoSuchProcess):
                return driver_of(self._process.pid)
            assert time.monotonic() < deadline, f"no driver: {self._tail()}"
            time.sleep(0.5)

    def _steps(self) -> int:
        """Steps trained so far; lines of a metrics file may be taken back by a resume."""
        return newest_step(self._run)

    def _train_on(self) -> None:
        """Wait until the run has trained a few steps from here, starting the command again where it ended."""
        deadline = time.monotonic() + self._patience_s
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
            assert not self._supervise, f"the supervisor ended with {code}: {self._tail()}"
            assert code in (1, 130, -signal.SIGKILL), f"the command ended with {code}: {self._tail()}"
            self._start()

    def _pause(self) -> None:
        """End the run after a checkpoint, for another part to continue it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(self._patience_s)
        self.outcome.codes.append(code)
        assert code == 130, f"an interrupted run ended with {code}: {self._tail()}"

    def _finish(self, until: float | None) -> bool:
        """Train the rest. Returns: False if the time is up."""
        deadline = time.monotonic() + 2 * self._patience_s
        if self._end_early and self.outcome.steps is None:
            self._pause()
            self.outcome.steps = self._steps() + _BETWEEN_STEPS
            self._tree["training"]["steps"] = self.outcome.steps
            self._recipe.write_text(yaml.safe_dump(self._tree))
            self._start()
        assert self._process is not None
        while self._process.poll() != 0:
            if until is not None and time.monotonic() > until:
                self._pause()
                return False
            self._start_again_if_ended()
            assert time.monotonic() < deadline, f"does not end: {self._tail()}"
            time.sleep(0.5)
        self.outcome.codes.append(0)
        await_none(replicas, engines, ranks)
        return True

    def _verify(self) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "verify", str(self._run)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _tail(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-4000:]

    def _write(self) -> None:
        self._path.write_text(json.dumps(asdict(self.outcome), indent=1))


@contextlib.contextmanager
def cluster_of(workers: int) -> Iterator[Any]:
    """A head without room for the run, and so many worker nodes that each can hold all of it."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    with lost_streams.installed():
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(workers):
                nodes.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES)
            nodes.wait_for_nodes()
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@contextlib.contextmanager
def network_of() -> Iterator[tuple[TcpProxy, str]]:
    """A network of this process to an object store of this process, and the store's URL there; begun before any Ray."""
    # Not installed where the run has no storage.
    from tests.support.s3_server import S3Server, s3_server

    with s3_server() as server, tcp_proxy(server.port) as network:
        yield network, S3Server(network.port).url()


def kinds_for(storage: bool) -> list[str]:
    """Faults that a run can have. Args: storage: it has one, whose network is this process's."""
    without, added = (WITHOUT_STORAGE, OF_STORAGE) if storage else (frozenset(), {})
    return [*(kind for kind in KINDS if kind not in without), *added]


def deadlines(section: str, scale: float = SCALE) -> dict[str, float]:
    """The deadlines of a section, divided by `scale`."""
    settings, names = DEADLINES[section]
    return {name: settings.model_fields[name].default / scale for name in names}


def recipe_of(
    workplace: Path,
    name: str,
    address: str,
    steps: int,
    student_pool: bool = False,
    storage: str | None = None,
    scale: float = SCALE,
    seed: int = 0,
) -> Path:
    """Recipe of a run. Args: storage: URL of its storage; scale: its deadlines are their defaults divided by this; seed: the
    run's, of its prompts' order and its draws."""
    return write_recipe(
        workplace,
        name,
        run={"storage": storage, "seed": seed},
        training={
            "steps": steps,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "checkpoint_every": 3,
            "sft": {"steps": 20, "batch_size": 32, "learning_rate": 3e-3},
            **deadlines("training", scale),
        },
        rollout={"max_new_tokens": 8, **(STUDENT_POOL if student_pool else {})},
        cluster={"address": address, **deadlines("cluster", scale)},
    )


def schedule(seed: int, faults: int, kinds: Sequence[str]) -> list[str]:
    """So many faults in an order of the seed: every kind, if there are as many, and then as often as `KINDS` says."""
    wanted = list(kinds)[:faults]
    while len(wanted) < faults:
        # The one that is furthest behind its share.
        wanted.append(min(kinds, key=lambda kind: (wanted.count(kind) + 1) / ALL[kind]))
    random.Random(seed).shuffle(wanted)
    return wanted


def steps_for(faults: int) -> int:
    """Steps that leave room for so many faults of the kinds that are over in seconds."""
    return 6 + 3 * _BETWEEN_STEPS * faults


_SAME_SEED = 2.0
"""Factor between held-out KLs of runs of one seed on replicas, where the version that draws a sample depends on time."""


def outside(calm: Sequence[Mapping[str, Any]], disturbed: Mapping[str, Any]) -> list[str]:
    """Held-out numbers of a disturbed run that lie outside the interval of the undisturbed run in the middle, widened by what
    runs of one seed differ by. Args: summaries."""
    found = []
    for name in QUALITY:
        middle = sorted(calm, key=lambda each: each["after"][name])[len(calm) // 2]
        low, high = middle["intervals"]["after"][name]
        low, high, value = low / _SAME_SEED, high * _SAME_SEED, disturbed["after"][name]
        if not low <= value <= high:
            values = ", ".join(f"{each['after'][name]:.4g}" for each in calm)
            found.append(f"after: {name} is {value:.4g}, and {values} undisturbed ({low:.4g} to {high:.4g} allowed)")
    return found


def report(seed: int, calm: Sequence[Outcome], outcome: Outcome) -> None:
    print(outcome.verified)
    print(f"seed {seed}; faults:", dict(Counter(outcome.faults)))
    print("parts:", outcome.parts, "starts:", outcome.starts, "exit codes:", dict(Counter(outcome.codes)))
    for kind in sorted(set(outcome.faults)):
        seen = [each for fault, each in zip(outcome.faults, outcome.seconds, strict=True) if fault == kind]
        print(f"    {kind}: trained on after {min(seen):.0f} to {max(seen):.0f} s")
    print("events:", dict(outcome.events))
    for name in ("before", "after"):
        print(f"{name}: disturbed {outcome.summary[name]}")
        for each in calm:
            print(f"    undisturbed: {each.summary[name]}")
    for each in calm:
        print("intervals, undisturbed:", {name: each.summary["intervals"]["after"][name] for name in QUALITY})
    for failure in outcome.failures:
        print("FAILED in an earlier part,", failure)


def _part(folder: Path, given: argparse.Namespace) -> int:
    """Go on with both runs, for as long as there is time; returns the exit code."""
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    if not (folder / "prompts.jsonl").exists():
        make_workplace(folder)
    with contextlib.ExitStack() as opened:
        network, storage = opened.enter_context(network_of()) if given.storage else (None, None)
        cluster = opened.enter_context(cluster_of(2))
        disturbed = Outcome.read(folder / "runs" / "disturbed.outcome.json")
        steps = disturbed.steps or _MANY_STEPS
        recipe = recipe_of(folder, "disturbed", cluster.address, steps, given.student_pool, storage, given.scale)
        wanted = schedule(given.seed, given.faults, given.kinds)
        patience_s = PATIENCE_S * max(1.0, SCALE / given.scale)
        chaos = Chaos(recipe, cluster, given.seed, wanted, given.supervise, True, network, patience_s)
        chaos.outcome.parts += 1
        if not chaos.run(until):
            print(f"{len(chaos.outcome.faults)} of {given.faults} faults; go on with --resume")
            return NOT_FINISHED
        assert chaos.outcome.steps is not None
        calm = []
        for seed in range(_UNDISTURBED):
            name, steps = f"calm-{seed}", chaos.outcome.steps
            # Nothing has to be noticed soon here, and a busy machine must not be taken for a hang.
            recipe = recipe_of(folder, name, cluster.address, steps, given.student_pool, scale=1.0, seed=seed)
            undisturbed = Chaos(recipe, cluster, given.seed, [], patience_s=PATIENCE_S * SCALE)
            calm.append(undisturbed.outcome)
            if not undisturbed.run(until):
                print(f"undisturbed run {seed} is not at its end; go on with --resume")
                return NOT_FINISHED
    report(given.seed, calm, chaos.outcome)
    if given.out is not None:
        kept = {"seed": given.seed, "scale": given.scale, "disturbed": chaos.outcome, "undisturbed": calm}
        text = json.dumps(kept, default=asdict, indent=1, ensure_ascii=False)
        given.out.write_text(text.replace(f"{folder}/", "") + "\n", encoding="utf-8")
    differs = outside([each.summary for each in calm], chaos.outcome.summary)
    assert not differs, differs
    assert not chaos.outcome.failures, f"{len(chaos.outcome.failures)} faults that the run did not get past"
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--student-pool", action="store_true", help="the student samples on replicas of its own")
    parser.add_argument("--supervise", action="store_true", help="one command a part, whose supervisor resumes the run")
    parser.add_argument("--storage", action="store_true", help="checkpoints go to an S3 server, whose network has faults, too")
    parser.add_argument("--kinds", nargs="*", choices=list(ALL), help="faults to draw from; all that the run can have")
    parser.add_argument("--folder", type=Path, help="where both runs and the state are kept; a temporary one otherwise")
    parser.add_argument(
        "--scale", type=float, default=SCALE, help=f"deadlines are their defaults divided by this, {SCALE:g}; 1 takes hours"
    )
    parser.add_argument("--out", type=Path, help="JSON file for what both sides came to")
    parser.add_argument("--minutes", type=float, help=f"longest part; it ends with {NOT_FINISHED} if there is more to do")
    parser.add_argument("--resume", action="store_true", help="go on with the parts in --folder, with the same seed and faults")
    given = parser.parse_args()
    given.kinds = given.kinds or kinds_for(given.storage)
    if impossible := set(given.kinds) - {*kinds_for(given.storage), *OF_ACTORS}:
        parser.error(f"--kinds {' '.join(sorted(impossible))}: not {'with' if given.storage else 'without'} --storage")
    if given.storage and given.minutes:
        parser.error("--storage with --minutes: the server is this process's, and what it holds ends with the part")
    os.environ["KDRAY_TEST_MARKER"] = f"chaos-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not given.resume and any(folder.iterdir()):
            parser.error(f"--folder {folder} holds an earlier run; go on with --resume, or name another")
        code = _part(folder.absolute(), given)
    sys.exit(code)


if __name__ == "__main__":
    main()
