"""A whole run over stub models under supervision, whose driver is killed twice: one invocation, and the files prove it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.jobs import supervision
from cluster.jobs.supervision import Supervisor
from kdray.runs.verify import verify
from tests.support.stub_run import stub_config

# The supervisor adds --resume, which this driver finds out by itself.
_DRIVER = """
import os, signal, sys
from pathlib import Path
from tests.support import stub_run

at = {0: 11, 1: 23}
starts = Path(sys.argv[1]).with_name("starts")
number = len(starts.read_text()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(".")

class Killed(stub_run.StubStudent):
    async def train_step(self, batch, *others, **named):
        if batch.step == at.get(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().train_step(batch, *others, **named)

stub_run.StubStudent = Killed
import asyncio
asyncio.run(stub_run.drive(stub_run.load_config(Path(sys.argv[1])), student_type=Killed))
"""


def test_a_driver_that_is_killed_twice_needs_one_invocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_WAIT_S", 0.01)
    config = stub_config(tmp_path / "runs")
    path = tmp_path / "config.yaml"
    path.write_text(config.dump())
    told: list[str] = []
    assert Supervisor([sys.executable, "-c", _DRIVER, str(path)], config.run_folder, told.append).supervise(False) == 0
    assert ["at step 10" in told[0], "at step 22" in told[1], len(told)] == [True, True, 2]
    proof = verify(config.run_folder)
    assert not proof.problems
    assert proof.state == "finished"
