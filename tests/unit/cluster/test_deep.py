"""Deep diagnosis: which trials a machine runs, what becomes of one that crashes, and the file that is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.diagnosis import deep
from cluster.diagnosis.doctor import Check
from kdray.config import vllm_build


def test_a_machine_runs_what_it_has_gpus_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    assert {trial.gpus for trial in deep.possible(1).values()} == {0}
    assert deep.possible(2) == deep.TRIALS
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    assert deep.possible(0) == deep.TRIALS


def test_results_and_crashes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter(
        [
            'print(\'RESULT {"ok": true, "teacher": 2e-06}\')',
            "import sys; sys.exit('the engine died')",
            'print(\'RESULT {"ok": false, "teacher": 3.0}\')',
        ]
    )
    run = subprocess.run

    def instead(command: list[str], **how: Any) -> Any:
        assert command[1:3] == ["-m", "cluster.diagnosis.deep"]
        return run([sys.executable, "-c", next(outcomes)], **how)

    monkeypatch.setattr(deep.subprocess, "run", instead)
    names = list(deep.TRIALS)[:3]
    monkeypatch.setattr(deep, "possible", lambda gpus: {name: deep.TRIALS[name] for name in names})
    said: list[str] = []
    assert not deep.examine([Check("python", True, "3.11")], tmp_path / "doctor.json", said.append)
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["checks"][0]["found"] == "3.11"
    assert [content["trials"][name]["ok"] for name in names] == [True, False, False]
    assert "the engine died" in content["trials"][names[1]]["error"]
    assert [line.split()[0] for line in said] == ["ok", "FAILED", "FAILED", "results:"]
