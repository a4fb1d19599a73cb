"""An engine that hangs while it loads, and a run that ends meanwhile: the replica's process ends, and says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

# A process of its own, since it is to end: the event loop is blocked, as by vLLM until its engine process is up.
_HANGING = """
import json, subprocess, sys, time
from pathlib import Path
from actors.serving import start_failure
from ray.exceptions import ActorDiedError
import ray

start_failure._LOOK_EVERY_S, start_failure._GRACE_S, start_failure._ASK_S = 0.05, 0.1, 1.0
told, owner, limit_s, hanging = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == "hangs"

class Owner:
    @property
    def __ray_ready__(self):
        return self
    def remote(self):
        return owner

def get(reference, timeout):
    if reference == "dead":
        raise ActorDiedError
    if reference == "silent":
        raise ray.exceptions.GetTimeoutError("no answer")

ray.get = get

def tell(what):
    told.write_text(json.dumps({"what": what, "child": child.pid}))
    if hanging:
        time.sleep(3600)

child = subprocess.Popen(["sleep", "3600"])
report = lambda failure: tell([failure.cause, failure.may_heal])
watch = start_failure.StartWatch(Owner(), limit_s, report, lambda: tell("orphaned"))
if owner == "started":
    watch.stop()
    child.kill()
    time.sleep(1)
    sys.exit(0)
time.sleep(3600)
"""


def runs(pid: int) -> bool:
    """Whether a process is alive; one that nobody has buried yet is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(tmp_path: Path, owner: str, limit_s: float, tells: str = "returns") -> tuple[int, Any]:
    """Exit code of the replica's process, and what it told before."""
    told = tmp_path / "told.json"
    process = subprocess.run(
        [sys.executable, "-c", _HANGING, str(told), owner, str(limit_s), tells],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in process.stderr
    return process.returncode, json.loads(told.read_text()) if told.is_file() else None


@pytest.mark.parametrize("tells", ["returns", "hangs"])
def test_an_engine_that_hangs_while_loading_ends_its_replica_with_the_reason(tmp_path: Path, tells: str) -> None:
    code, told = ended(tmp_path, "alive", 0.5, tells)
    cause, may_heal = told["what"]
    assert code == 1
    assert "the engine did not start within cluster.start_timeout_s=0.5" in cause
    assert may_heal, "another attempt may succeed"
    assert not runs(told["child"]), "the engine's own process goes on"


def test_a_run_that_ends_while_its_engines_load_takes_their_pool_with_it(tmp_path: Path) -> None:
    code, told = ended(tmp_path, "dead", 3600.0)
    assert (code, told["what"]) == (1, "orphaned")
    assert not runs(told["child"])


def test_an_owner_that_does_not_answer_is_not_dead(tmp_path: Path) -> None:
    code, told = ended(tmp_path, "silent", 1.0)
    assert (code, told["what"][0][:28]) == (1, "TimeoutError: the engine did")


def test_an_engine_that_has_started_is_not_watched_any_more(tmp_path: Path) -> None:
    assert ended(tmp_path, "started", 0.2) == (0, None)
