"""The cause of a failed start, read from logs as vLLM's processes write them, and what the wait for replicas makes of it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.serving import deployment
from actors.serving.registry import TeacherRegistry
from actors.serving.start_failure import StartFailure, last_error, may_heal, root_cause
from kdray.errors import EngineError

POINTER = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': 1}")
CORE = "(EngineCore pid=31) "
LOGGED = CORE + "ERROR 11-28 18:30:01 [core.py:1510] "

ENGINE_LOG = f"""--- /tmp/ray/worker-1.out
{CORE}INFO 11-28 18:30:00 [core.py:99] Initializing: ValueError: of nobody
{LOGGED}EngineCore failed to start.
{LOGGED}Traceback (most recent call last):
{LOGGED}  File "/site/vllm/loader.py", line 564, in track_weights_loading
{LOGGED}    raise ValueError(
{LOGGED}ValueError: Following weights were not initialized from checkpoint: {{'teacher.norm.weight'}}
--- /tmp/ray/worker-1.err
{CORE}Traceback (most recent call last):
{CORE}  File "/site/vllm/loader.py", line 564, in track_weights_loading
{CORE}ValueError: Following weights were not initialized from checkpoint: {{'teacher.norm.weight'}}
"""

BARE = f"""{LOGGED}EngineCore failed to start.
{LOGGED}  File "/site/vllm/v1/core.py", line 10, in start
{LOGGED}  File "/site/vllm/model_executor/layers/mamba/abstract.py", line 67, in get_kv_cache_spec
{LOGGED}    assert mamba_block_size is not None
{LOGGED}AssertionError
"""

TENSOR_PARALLEL = """(Worker_TP1 pid=8) ERROR 11-28 18:30:01 [multiproc_executor.py:780] torch.OutOfMemoryError: CUDA out of \
memory.
(EngineCore pid=7) ERROR 11-28 18:30:02 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a \
background process. See stack trace for root cause.
"""


@pytest.mark.parametrize(
    ("error", "log", "cause"),
    [
        (POINTER, ENGINE_LOG, "ValueError: Following weights were not initialized from checkpoint: {'teacher.norm.weight'}"),
        (POINTER, BARE, "AssertionError at /site/vllm/model_executor/layers/mamba/abstract.py:67"),
        (POINTER, TENSOR_PARALLEL, "torch.OutOfMemoryError: CUDA out of memory."),
        # Nothing in the log: at least vLLM's own words.
        (POINTER, "", f"RuntimeError: {POINTER}"),
        (
            RuntimeError(
                "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': -9}"
            ),
            "",
            "a process of the engine was killed, as when memory runs out; exit codes: {'EngineCore_DP0': -9}",
        ),
        # Handed on by kdray's own health check, where the engine died at its first request.
        (
            EngineError("the engine of m died: EngineCore encountered an issue. See stack trace (above) for the root cause."),
            "(EngineCore pid=9) ERROR 11-29 18:11:33 [core.py:1512] RuntimeError: Unsupported CPU attention configuration\n",
            "RuntimeError: Unsupported CPU attention configuration",
        ),
        # Raised in the replica itself: the log of an engine before it says nothing about it.
        (ValueError("1 validation error for ModelConfig\n  Value error, no such dtype"), ENGINE_LOG, None),
        (KeyError(), ENGINE_LOG, "KeyError"),
    ],
)
def test_the_cause_is_the_last_error_of_the_process_that_failed(error: Exception, log: str, cause: str | None) -> None:
    assert root_cause(error, log) == (cause or "ValueError: 1 validation error for ModelConfig Value error, no such dtype")


@pytest.mark.parametrize(
    ("cause", "heals"),
    [
        ("TimeoutError: no answer within 600 s", True),
        ("torch.distributed.DistNetworkError: EADDRINUSE, port 29500", True),
        ("OSError: [Errno 98] Address already in use", True),
        ("ConnectionError: the hub does not answer", True),
        ("ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired", True),
        ("a process of the engine was killed, as when memory runs out; exit codes: {'EngineCore_DP0': -9}", True),
        ("ValueError: There is no module or parameter named 'layers.0.mlp' in MixtralModel", False),
        ("AssertionError at /site/vllm/model_executor/layers/mamba/abstract.py:67", False),
        ("ModuleNotFoundError: No module named 'torchvision'", False),
    ],
)
def test_only_what_passes_is_tried_again(cause: str, heals: bool) -> None:
    assert may_heal(cause) is heals


def test_the_log_is_read_from_where_the_process_writes_it(tmp_path: Any) -> None:
    """In a process whose output goes to files, as that of Ray's workers does."""
    code = """
import subprocess, sys
from actors.serving.start_failure import StartFailure
subprocess.run([sys.executable, "-c", "raise ValueError('of a child')"])
print("to the other stream", flush=True)
failure = StartFailure.of(RuntimeError("See root cause above"))
assert failure.cause == "ValueError: of a child", failure
assert "to the other stream" in failure.log
assert "worker.out, " in failure.place.replace(sys.argv[1], "")
assert not failure.may_heal
"""
    with (tmp_path / "worker.out").open("w") as out, (tmp_path / "worker.err").open("w") as err:
        command = [sys.executable, "-c", code, f"{tmp_path}/"]
        done = subprocess.run(command, stdout=out, stderr=err, env=os.environ, timeout=100)
    assert done.returncode == 0, (tmp_path / "worker.err").read_text()


def test_a_long_message_is_cut() -> None:
    assert len(root_cause(ValueError("x" * 5000), "")) < 620


def test_the_last_error_of_a_status_message() -> None:
    message = (
        'Retrying 0 more time(s). Error:\nTraceback:\n  File "a.py", line 1\nkdray.errors.EngineError: no\n\nTraceback: more'
    )
    assert last_error(message) == "kdray.errors.EngineError: no"
    assert last_error("a replica is slow") is None


def test_the_registry_keeps_every_cause_and_the_newest_log() -> None:
    registry = TeacherRegistry({})
    for number in range(3):
        registry.failed("main", StartFailure(f"cause {number}", True, f"log {number}", "here"))
    assert [(each.cause, each.log) for each in registry.failures("main")] == [
        ("cause 0", ""),
        ("cause 1", ""),
        ("cause 2", "log 2"),
    ]
    assert registry.failures("other") == []
    assert pickle.loads(pickle.dumps(registry.failures("main"))) == registry.failures("main")


# ------------------------------------------------------------------------------------------------ the wait for replicas


@dataclass
class State:
    status: str
    message: str = "Failed to update the deployments ['main']."


@dataclass
class StatusOf:
    """Serve's status: one state for every look at it, the last one from then on."""

    states: list[State]

    def __call__(self) -> Any:
        # Reading Serve's state takes from a deployment that is being made what it has registered with cloudpickle.
        assert deployment.DEPLOYING.locked()
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return type("Status", (), {"applications": {"app": state}})


@dataclass
class Pool:
    found: list[StartFailure] = field(default_factory=list)
    name: str = "main"
    application: str = "app"
    ended: bool = False

    def start_failures(self) -> list[StartFailure]:
        return self.found

    __hash__ = object.__hash__


def await_serving(monkeypatch: pytest.MonkeyPatch, pool: Pool, *states: State) -> None:
    monkeypatch.setattr("ray.serve.status", StatusOf(list(states)))
    monkeypatch.setattr(deployment, "_LOOK_EVERY_S", 0.0)
    deployment._await_serving([pool])  # type: ignore[list-item]


MODEL = StartFailure("ValueError: no such weight", False, "", "")
PORT = StartFailure("OSError: Address already in use", True, "", "")


def test_what_does_not_heal_ends_the_wait_while_serve_would_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"^replicas of main did not start: ValueError: no such weight$"):
        await_serving(monkeypatch, Pool([MODEL]), State("DEPLOYING"))


def test_what_may_heal_is_left_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    await_serving(monkeypatch, Pool([PORT]), State("DEPLOYING"), State("DEPLOYING"), State("RUNNING"))
    with pytest.raises(EngineError, match=r"^replicas of main did not start in 3 attempts: OSError: Address already in use$"):
        await_serving(monkeypatch, Pool([PORT] * 3), State("DEPLOYING"), State("DEPLOY_FAILED"))


def test_a_missing_package_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = StartFailure("ModuleNotFoundError: No module named 'vllm'", False, "", "")
    with pytest.raises(EngineError, match=r"no Python package `vllm`; install kdray's requirements on every node"):
        await_serving(monkeypatch, Pool([missing]), State("DEPLOYING"))


def test_without_a_report_serves_own_message_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the replica's process is killed."""
    with pytest.raises(RuntimeError, match=r"deploying app failed: Failed to update the deployments"):
        await_serving(monkeypatch, Pool(), State("DEPLOY_FAILED"))
