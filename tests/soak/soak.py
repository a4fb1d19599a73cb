"""Growth of every process, and of what a run keeps elsewhere: `python -m tests.soak.soak --minutes 20`.

A run on real engines with checkpoints, evaluations and weight updates. Read every few seconds: each process's anonymous memory
(what it has allocated; USS also counts the pages of a library once the last other process that maps it has ended, which would
look like growth), what Ray's object store holds, shared memory, temporary files, and the run folder without the files
that grow by design. The verdict is a slope per hour of each, with an interval (`tests.soak.slopes`). With `--folder` a soak of
any length is made in parts: the same command with `--resume` continues the run and the series. `--plant` has the same
processes leak afterwards, for `--planted-minutes`, which a verdict of its own must find. The machine should be idle: its shared
memory is everybody's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests.integration.conftest import make_workplace
from tests.soak import leaks
from tests.soak.slopes import Slope, combined, slope
from tests.support.runs import finish, json_lines, of_the_run, start, write_recipe

_PERIOD_S = 5.0
RAYS_BOUNDS = {
    "RAY_task_events_max_num_task_in_gcs": "1000",
    "RAY_ROTATION_MAX_BYTES": str(2**17),
    "RAY_ROTATION_BACKUP_COUNT": "1",
}
"""What Ray keeps of tasks (100,000 by default, 2.6 KB each) and of each process's log (six files of 512 MiB) is bounded, but it
would take days to get there: with these bounds minutes, so that growth beyond them can be seen."""
ALLOWED_MIB_PER_HOUR = 6.0
"""2 GiB in two weeks."""
_ROLES = {
    "driver": ("cluster.cli run",),
    "engine": ("VLLM::EngineCore",),
    "replica": ("ray::ServeReplica:kdray-",),
    "rank": ("ray::RayTrainWorker",),
    "orders": ("ray::Mailbox",),
    "weights": ("ray::WeightStore",),
    "registry": ("ray::TeacherRegistry",),
    "board": ("ray::ScalingBoard",),
    "Serve's controller": ("ray::ServeController",),
    "Train's controller": ("ray::TrainController",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs/gcs_server",),
}
_PLACES = ("object store", "/dev/shm", "temporary files", "run folder")
# The run of a soak has no autoscaled pool.
_EXPECTED = (*(role for role in _ROLES if role != "board"), *_PLACES)
TOO_SHORT = 3
"""Exit code if the series do not tell."""
_GROW_BY_DESIGN = ("ledger.jsonl", "metrics.jsonl", "events.jsonl", "samples", "tb")
"""In the run folder; docs/guarantees.md has what they cost a step."""


_LEAKY = ("driver", "engine", "rank", "replica")
"""Processes in which a leak of memory can be planted: those that run for as long as the run does, and longest."""


@dataclass(frozen=True)
class Planted:
    """Leaks that a run is to have after the rest of its soak."""

    kinds: Sequence[str]
    minutes: float
    mib_per_minute: float

    def by_title(self) -> dict[str, list[str]]:
        """Kinds of leak by a part of the title of the processes that have them."""
        found: dict[str, list[str]] = {}
        for kind in self.kinds:
            role, what = ("driver", kind) if kind in leaks.PLACES else (kind, "memory")
            for sign in _ROLES[role]:
                found.setdefault(sign, []).append(what)
        return found

    def places(self) -> list[str]:
        """Where they must show."""
        return [leaks.PLACES.get(kind, kind) for kind in self.kinds]


@dataclass
class Part:
    """Series of one start of the run: its processes are others after the next."""

    seconds: list[float] = field(default_factory=list)
    mib: dict[str, list[float]] = field(default_factory=dict)
    """By what was measured; None where it was not there."""
    steps: int = 0

    def add(self, seconds: float, found: dict[str, float]) -> None:
        for name in found.keys() - self.mib.keys():
            self.mib[name] = [float("nan")] * len(self.seconds)
        self.seconds.append(seconds)
        for name, values in self.mib.items():
            values.append(found.get(name, float("nan")))


def processes(marker: str) -> dict[str, float]:
    """Anonymous memory of the run's processes, MiB; the sum where a role has several."""
    found: dict[str, float] = {}
    for process in of_the_run(marker):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            title = " ".join(process.cmdline())
            role = next((role for role, signs in _ROLES.items() if any(sign in title for sign in signs)), None)
            if role is not None:
                found[role] = found.get(role, 0.0) + anonymous(process.pid)
    return found


def anonymous(pid: int) -> float:
    """Memory that a process has allocated, MiB (0 at its end). Raises: psutil.NoSuchProcess."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10


def places(run: Path, temporary: Path) -> dict[str, float]:
    """What the run keeps outside its processes, MiB."""
    import ray
    from ray._private.internal_api import node_stats

    held = 0
    for node in ray.nodes():
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        held += stats.store_stats.object_store_bytes_used
    return {
        "object store": held / 2**20,
        "/dev/shm": size_of(Path("/dev/shm")),
        "temporary files": size_of(temporary),
        "run folder": size_of(run, _GROW_BY_DESIGN),
    }


def size_of(folder: Path, without: Sequence[str] = ()) -> float:
    """Space that the files below a folder take, MiB. Args: without: names in the folder itself that do not count."""
    total = 0
    for at, folders, files in os.walk(folder, onerror=lambda error: None):
        if Path(at) == folder:
            folders[:] = [each for each in folders if each not in without]
            files = [each for each in files if each not in without]
        for each in files:
            with contextlib.suppress(OSError):
                total += 512 * os.lstat(os.path.join(at, each)).st_blocks
    return total / 2**20


def soak(folder: Path, minutes: float, marker: str, planted: Planted | None) -> Iterator[Part]:
    """Train for so long from the first step on, and then with leaks; yields a part before it is measured."""
    if not (folder / "prompts.jsonl").exists():
        make_workplace(folder)
    recipe = write_recipe(
        folder,
        "soak",
        # More steps than there is time for: the run is asked to stop.
        training={"steps": 10**6, "batch_size": 32, "learning_rate": 1e-4, "checkpoint_every": 50},
        evaluation={"every": 100},
        cluster={"health_check_period_s": 2},
        teachers={
            "main": {
                "model": str(folder / "teacher"),
                "kv_cache_gib": 0.2,
                # On CPUs the engine's matrix library keeps code for numbers of tokens that passes have had: of few numbers,
                # the last comes up sooner.
                "max_num_seqs": 16,
                "max_num_batched_tokens": 16,
            }
        },
    )
    run = folder / "runs" / "soak"
    before = _steps(run)
    with tempfile.TemporaryFile("w+") as log:
        process = start("run", str(recipe), *(["--resume"] if (run / "config.yaml").exists() else []), log=log)
        while _steps(run) <= before:
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"the run ended with {process.returncode}: {log.read()[-4000:]}")
            time.sleep(1)
        part = Part()
        yield part
        _measure(part, process, run, minutes, marker)
        if planted is not None:
            leaks.plant(planted.by_title(), planted.mib_per_minute, run / "logs")
            part = Part()
            yield part
            _measure(part, process, run, planted.minutes, marker)
        process.send_signal(signal.SIGINT)
        finish(process, 130)


def _measure(part: Part, process: subprocess.Popen[str], run: Path, minutes: float, marker: str) -> None:
    before, began = _steps(run), time.monotonic()
    while (now := time.monotonic() - began) < 60 * minutes:
        assert process.poll() is None, f"the run ended with {process.returncode}"
        part.add(now, processes(marker) | places(run, Path(tempfile.gettempdir())))
        part.steps = _steps(run) - before
        time.sleep(_PERIOD_S)


def _steps(run: Path) -> int:
    """That the run has trained."""
    return len(json_lines(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """A Ray of the soak's own, which the run joins, so that its object store can be asked."""
    import ray

    from cluster.connect import start_local

    os.environ.update(RAYS_BOUNDS)
    start_local(num_cpus=4, log_to_driver=False, object_store_memory=200 * 2**20)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        ray.shutdown()


def verdict(parts: Sequence[Part], allowed: float = ALLOWED_MIB_PER_HOUR) -> tuple[dict[str, Slope], list[str], list[str]]:
    """Slope of everything measured, from all parts; what grows, and what they are too short to tell about."""
    found: dict[str, Slope] = {}
    growing = []
    for name in dict.fromkeys(name for part in parts for name in part.mib):
        each = [slope(part.seconds, part.mib[name]) for part in parts if name in part.mib]
        known = [one for one in each if one is not None]
        if known:
            found[name] = combined(known)
            # A part that grows is a leak whatever the others did: one without any noise would outweigh it.
            if any(one.grows(allowed) for one in (found[name], *known)):
                growing.append(name)
    open_ = [name for name, each in found.items() if name not in growing and not each.is_flat(allowed)]
    return found, growing, open_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of this part, from its first step on")
    parser.add_argument("--folder", type=Path, help="where run and series are kept; a temporary one otherwise")
    parser.add_argument("--resume", action="store_true", help="go on with the run and the series in --folder")
    parser.add_argument("--plant", nargs="+", choices=[*_LEAKY, *leaks.PLACES], help="leaks afterwards, which must be found")
    parser.add_argument("--planted-minutes", type=float, default=15.0, help="that the run goes on with them for")
    parser.add_argument("--mib-per-minute", type=float, default=1.0, help="of each planted leak")
    given = parser.parse_args()
    planted = Planted(given.plant, given.planted_minutes, given.mib_per_minute) if given.plant else None
    marker = os.environ["KDRAY_TEST_MARKER"] = f"soak-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        folder = (given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not given.resume and any(folder.iterdir()):
            parser.error(f"--folder {folder} holds an earlier soak; go on with --resume, or name another")
        # A folder of its own for what the run and its Ray leave there.
        tempfile.tempdir = os.environ["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp"))
        series = folder / "series.json"
        parts = [Part(**each) for each in json.loads(series.read_text())] if series.exists() else []
        if planted is not None:
            stack.enter_context(leaks.installed())
        stack.enter_context(_ray())
        measured: list[Part] = []
        try:
            measured.extend(soak(folder, given.minutes, marker, planted))
        finally:  # what was measured before a run died is the evidence of why
            # One whose run did not come to its first step has nothing to say.
            series.write_text(json.dumps([asdict(part) for part in [*parts, *measured[:1]] if part.seconds]))
            if measured[1:]:
                (folder / "planted.json").write_text(json.dumps(asdict(measured[1])))
            for each in Path("/dev/shm").glob(f"{leaks.prefix()}*"):
                each.unlink()
    code = report([*parts, measured[0]])
    not_found = 0 if planted is None else report_planted(planted, measured[1])
    sys.exit(not_found or code)


def report(parts: Sequence[Part]) -> int:
    """Print slopes and verdict; returns the exit code."""
    found, growing, open_ = verdict(parts)
    _print(parts, found, growing, open_)
    unseen = [name for name in _EXPECTED if name not in found]
    if unseen:
        print(f"not measured, or too seldom: {', '.join(unseen)}")
    return 1 if growing or unseen else TOO_SHORT if open_ else 0


def report_planted(planted: Planted, part: Part) -> int:
    """Print what grew while the leaks were there, and whether each was found; returns the exit code."""
    found, growing, open_ = verdict([part])
    _print([part], found, growing, open_)
    for place in planted.places():
        print(f"the planted leak in {place} was {'found' if place in growing else 'NOT FOUND'}")
    return 0 if set(planted.places()) <= set(growing) else 1


def _print(parts: Sequence[Part], found: Mapping[str, Slope], growing: Sequence[str], open_: Sequence[str]) -> None:
    hours = sum(part.seconds[-1] for part in parts) / 3600
    steps = sum(part.steps for part in parts)
    print(f"{steps} steps in {hours:.2f} h, {len(parts)} parts; allowed are {ALLOWED_MIB_PER_HOUR:g} MiB/h")
    print(f"{'':20s} {'MiB':>9s} {'MiB/h':>9s}   interval of 95%")
    for name, each in sorted(found.items()):
        mark = "  GROWS" if name in growing else "  cannot be told yet" if name in open_ else ""
        print(f"{name:20s} {each.level:9.1f} {each.per_hour:+9.2f}   {each.low:+.2f} to {each.high:+.2f}{mark}")


if __name__ == "__main__":
    main()
