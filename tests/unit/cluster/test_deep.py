"""Deep diagnosis: which trials a machine runs, what becomes of one that crashes, and the file that is written."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.diagnosis import broadcast, deep, rates
from cluster.diagnosis.broadcast import Broadcast
from cluster.diagnosis.doctor import Check
from cluster.diagnosis.float8 import write_float8
from cluster.diagnosis.footprint import Footprint
from cluster.planning import memory
from kdray.config import vllm_build
from kdray.models.random_models import RandomModel
from kdray.models.weight_format import WeightFormat

CPU = torch.device("cpu")


def test_a_machine_runs_what_it_has_gpus_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    without = deep.possible(0)
    assert {trial.gpus for trial in without.values()} == {0}
    assert set(deep.possible(1)) - set(without) == {"Llama, FP8 teacher"}
    assert deep.possible(2) == deep.TRIALS
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "cpu")
    assert set(deep.TRIALS) - set(deep.possible(0)) == {"Llama, FP8 teacher", "weights into an engine by NCCL"}


def test_a_broadcast_arrives_at_every_process(tmp_path: Path) -> None:
    found = asyncio.run(Broadcast(mib=1, tensors=2).run(tmp_path))
    assert (found["ok"], found["devices"], found["wrong"]) == (True, 2, 0)
    assert found["GB/s"] > 1e-3


def test_a_broadcast_that_changes_values_is_not_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawned(part: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        Path(arguments[-1]).write_text('{"GB/s": 1.0, "wrong": 1}')

    monkeypatch.setattr(broadcast.torch.multiprocessing, "spawn", spawned)
    assert not asyncio.run(Broadcast().run(tmp_path))["ok"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_takes_what_is_planned(precision: str, tmp_path: Path) -> None:
    found = asyncio.run(Footprint(precision, width=128, layers=4, vocab=1024, rows=4, prompt=32, response=96).run(tmp_path))
    assert found["ok"], found
    assert found["MiB found"] > 10


def test_a_plan_that_forgets_something_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "activation_bytes", lambda *of: 0)
    found = asyncio.run(Footprint("fp32", width=128, layers=4, vocab=1024, rows=4, prompt=32, response=96).run(tmp_path))
    assert not found["ok"], found


def test_an_fp8_teacher_is_what_its_readers_take_it_for(tmp_path: Path) -> None:
    """By kdray's own reading of its format, and by transformers' of its values."""
    plain = RandomModel("llama", 64, 1, seed=1).write(tmp_path / "plain")
    write_float8(plain, tmp_path / "float8")
    form = WeightFormat.of(AutoConfig.from_pretrained(tmp_path / "float8"))
    assert form is not None
    assert (form.bits, form.is_float, form.rounds_activations) == (8, True, True)
    exact, read = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (plain, tmp_path / "float8"))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        apart = (exact(ids).logits.log_softmax(-1) - read(ids).logits.log_softmax(-1)).abs().mean()
    assert 1e-3 < apart < 0.3
    # The forward pass has put them back as plain numbers.
    weights = dict(read.named_parameters())
    for name, weight in exact.named_parameters():
        rounds = name.endswith("proj.weight")
        assert torch.equal(weight, weights[name].float()) != rounds
        # Three bits of mantissa, and subnormal numbers near zero.
        assert ((weight - weights[name]).abs() <= weight.abs() / 16 + weight.abs().max() / 2**17).all()


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


@pytest.mark.parametrize(("share", "ok"), [(1.0, True), (0.81, True), (1.19, True), (0.79, False), (1.21, False)])
def test_an_engine_whose_cache_is_not_that_of_the_plan_is_not_ok(
    share: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        kv_tokens = 1000 * share

        def __init__(self, spec: Any) -> None:
            pass

        async def start(self) -> None:
            pass

        async def close(self) -> None:
            pass

        async def sample(self, requests: Any) -> AsyncIterator[list[Any]]:
            yield []

    monkeypatch.setattr("actors.serving.engine.TeacherEngine", Engine)
    monkeypatch.setattr(rates, "planned_kv_tokens", lambda spec: 1000)
    monkeypatch.setattr(rates, "device_rates", dict)
    monkeypatch.setattr(RandomModel, "write", lambda model, folder: folder)
    found = asyncio.run(rates.Throughput(sizes=(1,)).run(tmp_path))
    assert (found["ok"], found["KV cache, tokens / planned"]) == (ok, share)


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
