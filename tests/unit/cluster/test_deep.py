"""Deep diagnosis: which trials a machine runs, what becomes of one that crashes, and the file that is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.diagnosis import deep, rates
from cluster.diagnosis.doctor import Check
from kdray.config import vllm_build

CPU = torch.device("cpu")


def test_a_machine_runs_what_it_has_gpus_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    assert {trial.gpus for trial in deep.possible(1).values()} == {0}
    assert deep.possible(2) == deep.TRIALS
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    assert deep.possible(0) == deep.TRIALS


def test_the_rates_of_the_device_are_plausible() -> None:
    found = rates.device_rates()
    assert 1e-3 < found["TFLOP/s"] < 100
    assert 0.1 < found["GB/s"] < 10_000
    assert not any("peak" in name for name in found), "a CPU has no data sheet here"


def test_rates_of_a_known_gpu_stand_beside_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rates.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(rates.torch, "device", lambda name: CPU)
    monkeypatch.setattr(rates, "_seconds", lambda work, device: 2 * 8192**3 / 494.5e12)
    found = rates.device_rates()
    assert found["TFLOP/s, share of peak"] == pytest.approx(0.5)
    assert found["GB/s, share of peak"] == pytest.approx(found["GB/s"] / 4800)


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
