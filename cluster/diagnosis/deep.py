"""Deep diagnosis: tiny models of real architectures through this machine's engines and trainer, and its rates, as one file
for a report.

Each trial runs in a process of its own (`python -m cluster.diagnosis.deep NAME`), so that one that crashes is a result too.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from actors.serving.spec import EngineSpec
from cluster.diagnosis.broadcast import Broadcast
from cluster.diagnosis.doctor import Check
from cluster.diagnosis.float8 import write_float8
from cluster.diagnosis.footprint import Footprint
from cluster.diagnosis.rates import Throughput
from cluster.diagnosis.transfer import EngineTransfer
from kdray.config import vllm_build
from kdray.models.random_models import EOS, VOCAB, RandomModel

_MARK = "RESULT "
_TIMEOUT_S = 1800.0


class Trial(Protocol):
    """One measurement of this machine."""

    @property
    def gpus(self) -> int:
        """GPUs that it needs, where vLLM computes on GPUs."""

    @property
    def only_on_gpus(self) -> bool:
        """True if vLLM's build for CPUs has no such thing."""

    async def run(self, folder: Path) -> dict[str, Any]:
        """Run it. Args: folder: an empty one. Returns: `ok`, and numbers by name."""


@dataclass(frozen=True)
class Pair:
    """Trial of exactness: a pair of models, an engine, and the largest gap that is rounding."""

    teacher: RandomModel
    student: RandomModel
    tolerance: float
    """Nats a token."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the engine's spec."""
    gpus: int = 0
    """GPUs that it needs."""
    float8: bool = False
    """The teacher's weights are quantised to FP8."""

    @property
    def only_on_gpus(self) -> bool:
        return self.float8

    def spec(self, folder: Path) -> EngineSpec:
        """Write both models into `folder`; returns the spec of their engine."""
        return EngineSpec(
            role="mixture",
            model=str(self.teacher.write(folder / "teacher")),
            student=str(self.student.write(folder / "student")),
            vocab_size=VOCAB,
            stop_ids=(EOS,),
            max_model_len=200,
            teacher="t",
            kv_cache_gib=0.1,
            max_num_seqs=8,
            gpu_memory_utilization=0.3,
            **self.engine,
        )

    async def run(self, folder: Path) -> dict[str, Any]:
        """Run the trial. Returns: `ok`, and the gaps in nats."""
        from cluster.diagnosis.exactness import try_pair

        spec = self.spec(folder)
        if self.float8:
            write_float8(Path(spec.model), folder / "float8")
            spec = replace(spec, model=str(folder / "float8"))
        gaps = await try_pair(spec, folder)
        return {"ok": not gaps.over(self.tolerance) and gaps.moved > self.tolerance, **asdict(gaps)}


def _pair(model_type: str, tolerance: float, engine: Mapping[str, Any] | None = None, gpus: int = 0, **config: Any) -> Pair:
    tied = model_type == "gemma2"
    teacher = RandomModel(model_type, 128, 3, config, tied=tied, seed=1)
    return Pair(teacher, RandomModel(model_type, 64, 2, config, tied=tied, seed=2), tolerance, engine or {}, gpus)


_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_FLOAT32: dict[str, Any] = {"dtype": "float32"}

TRIALS: dict[str, Trial] = {
    "Llama, float32": _pair("llama", 1e-3, _FLOAT32),
    "Gemma 2, float32": _pair("gemma2", 1e-3, _FLOAT32, sliding_window=32, attn_logit_softcapping=2.0),
    "Qwen 3 MoE, float32": _pair("qwen3_moe", 1e-2, _FLOAT32, **_EXPERTS),
    "Llama, bfloat16": _pair("llama", 0.3, {"dtype": "bfloat16"}),
    "Llama, float32, tensor parallel 2": _pair("llama", 1e-3, _FLOAT32 | {"tensor_parallel_size": 2}, 2),
    # Transformers rounds weights and activations too, by other kernels. The bound is a guess: no GPU has measured it.
    "Llama, FP8 teacher": replace(_pair("llama", 1.0, {"dtype": "bfloat16"}, 1), float8=True),
    "memory of a step against the plan, float32": Footprint("fp32"),
    "memory of a step against the plan, bfloat16": Footprint("bf16"),
    "broadcast between devices": Broadcast(),
    "weights into an engine by NCCL": EngineTransfer(),
    "rates": Throughput(),
}


def possible(gpus: int) -> dict[str, Trial]:
    """Trials that this machine can run. Args: gpus: that it has; a build of vLLM for CPUs needs none."""
    if vllm_build.vllm_device() == "cpu":
        return {name: trial for name, trial in TRIALS.items() if not trial.only_on_gpus}
    return {name: trial for name, trial in TRIALS.items() if trial.gpus <= gpus}


def examine(checks: Sequence[Check], out: Path, say: Callable[[str], None]) -> bool:
    """Run the trials that this machine can, and write `out`: time, checks of the machine, and results. Returns: all are ok.

    Args: say: called with a line for each trial.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, result in _results(possible(torch.cuda.device_count())):
        results[name] = result
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in result.items() if key not in ("ok", "error"))
        say(f"{'ok' if result['ok'] else 'FAILED':7}{name}: {numbers or result.get('error', '')}")
    content = {"time": datetime.now(UTC).isoformat(), "checks": [asdict(check) for check in checks], "trials": results}
    out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    say(f"results: {out}")
    return all(result["ok"] for result in results.values())


def _results(trials: Mapping[str, Trial]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run trials, one after the other. Yields: name; `ok`, and the numbers of the trial or its error."""
    for name in trials:
        command = [sys.executable, "-m", "cluster.diagnosis.deep", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            yield name, {"ok": False, "error": f"not done after {_TIMEOUT_S:g} s"}
            continue
        found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if found:
            yield name, json.loads(found[-1].removeprefix(_MARK))
        else:
            yield name, {"ok": False, "error": done.stderr[-4000:]}


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run a trial in this process."""
    with TemporaryDirectory() as scratch:
        return asyncio.run(trial.run(Path(scratch)))


if __name__ == "__main__":
    print(_MARK + json.dumps(run_trial(TRIALS[sys.argv[1]])))
