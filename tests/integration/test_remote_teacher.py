"""vLLM's own OpenAI server as a remote teacher: its text and its logprobs are those of Hugging Face, its refusals are clear."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import yaml

from kdray.config import OpenAITeacherSettings, TinyModel, TinyTraining
from kdray.data.tasks import task
from kdray.errors import ConfigError, RequestRefused
from kdray.models.resolve import build_tiny_model, task_tokenizer
from kdray.teachers.openai import RemoteTeacher
from kdray.types import Rollout, SampleRequest
from tests.support.runs import check_ledger, json_lines
from tests.support.tcp_proxy import tcp_proxy

KEY = "right-key-5f0c"
VARIABLE = "KDRAY_TEST_ENDPOINT_KEY"
TOKENIZER = task_tokenizer()
EOS = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER)
POSITIONS = 96
LIMIT = 24
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
START_S = 400.0
SILENCE_S = 5.0
"""Time without an answer after which a request is sent again, where an endpoint swallows all."""


@dataclass
class Endpoint:
    folder: Path
    base_url: str
    model: Any

    def settings(self, **changes: Any) -> OpenAITeacherSettings:
        given: dict[str, Any] = {
            "type": "openai",
            "base_url": self.base_url,
            "model": "tiny",
            "api_key_env": VARIABLE,
            "chat": False,
            "temperature": 0.0,
            "retries": 1,
        }
        return OpenAITeacherSettings(**(given | changes))

    @asynccontextmanager
    async def teacher(self, tokenizer: Any = TOKENIZER, **changes: Any) -> AsyncIterator[RemoteTeacher]:
        teacher = RemoteTeacher("far", self.settings(**changes), tokenizer, _text_of, VOCAB, (EOS,))
        try:
            yield teacher
        finally:
            await teacher.close()

    def greedy(self, prompt_ids: np.ndarray, limit: int = LIMIT) -> list[int]:
        """What Hugging Face writes greedily, the end-of-sequence token included."""
        ids = torch.from_numpy(prompt_ids).long().unsqueeze(0)
        with torch.no_grad():
            written = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
        return written[0, len(prompt_ids) :].tolist()

    def log_rows(self, prompt_ids: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Hugging Face's log-softmax rows at the response, [T, vocab]."""
        ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids])).long().unsqueeze(0)
        with torch.no_grad():
            return self.model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1).numpy()


def _text_of(request: SampleRequest) -> str:
    return TOKENIZER.decode(request.prompt_ids.tolist())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1.0)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("endpoint")
    source = TinyModel(
        type="tiny", layers=1, max_positions=POSITIONS, train=TinyTraining(tasks=["last_letters"], difficulty=2, steps=120)
    )
    folder = build_tiny_model(source, root / "model")
    (root / "template.jinja").write_text(TEMPLATE)
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "tiny", "--api-key", KEY, "--dtype", "float32"]
    command += ["--max-model-len", str(POSITIONS), "--max-num-seqs", "16", "--enforce-eager", "--block-size", "32"]
    command += ["--distributed-executor-backend", "uni", "--chat-template", str(root / "template.jinja")]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = root / "server.log"
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        # A group of its own: its engine would outlive it.
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait(server, port, log)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            yield Endpoint(folder, f"http://127.0.0.1:{port}/v1", model)
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def requests(count: int = 6, limit: int = LIMIT, first_seed: int = 2**63) -> list[SampleRequest]:
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        ids = TOKENIZER(task("last_letters").generate(rng, 2).prompt)["input_ids"]
        made.append(SampleRequest(index, 10 + index, np.array(ids, np.int32), 1.0, first_seed + index, limit, min_version=3))
    return made


async def collect(stream: Any) -> dict[int, Any]:
    async with aclosing(stream):
        return {rollout.sample_id: rollout async for part in stream for rollout in part}


def assert_scored_as_hugging_face(endpoint: Endpoint, rollouts: Sequence[Any], k: int) -> None:
    for rollout in rollouts:
        rows = endpoint.log_rows(rollout.prompt_ids, rollout.token_ids)
        assert rollout.teacher == "far"
        at = np.take_along_axis(rows, rollout.token_ids[:, None].astype(np.int64), 1)[:, 0]
        np.testing.assert_allclose(rollout.teacher_logprobs, at, atol=1e-3)
        assert rollout.support_ids.shape == (len(rollout.token_ids), k + 1)
        for t, row in enumerate(rows):
            order = np.argsort(-row)
            # Ids of equal logprob may change places.
            np.testing.assert_allclose(rollout.support_logprobs[t, :k], row[order[:k]], atol=1e-3)
            used = rollout.support_ids[t] >= 0
            ids = rollout.support_ids[t][used]
            assert len(set(ids.tolist())) == len(ids)
            assert int(rollout.token_ids[t]) in ids
            assert (rollout.support_logprobs[t][~used] == -np.inf).all()
            np.testing.assert_allclose(rollout.support_logprobs[t][used], row[ids], atol=1e-3)
            outside = np.delete(np.exp(row.astype(np.float64)), ids).sum()
            assert np.exp(rollout.tail_logprobs[t]) == pytest.approx(outside, abs=1e-5)


async def test_its_text_is_what_hugging_face_writes_greedily(endpoint: Endpoint) -> None:
    asked = requests()
    for chat in (False, True):
        async with endpoint.teacher(chat=chat) as teacher:
            await teacher.check()
            before = teacher.prompt_tokens, teacher.completion_tokens, teacher.requests
            answers = await collect(teacher.sample(asked))
            tokens = sum(len(answer.token_ids) for answer in answers.values())
            assert teacher.prompt_tokens - before[0] == sum(len(request.prompt_ids) for request in asked)
            assert teacher.completion_tokens - before[1] == tokens
            assert (teacher.requests - before[2], teacher.retried) == (len(asked), 0)
        for request in asked:
            answer = answers[request.sample_id]
            assert answer.token_ids.tolist() == endpoint.greedy(request.prompt_ids)
            assert answer.finish_reason == ("stop" if answer.token_ids[-1] == EOS else "length")
            assert (answer.student_versions == 3).all()
            assert (answer.mixture_logprobs, answer.teacher_logprobs) == (None, None)
        assert any(answer.finish_reason == "stop" for answer in answers.values())


async def test_a_short_limit_cuts_the_text(endpoint: Endpoint) -> None:
    async with endpoint.teacher() as teacher:
        (answer,) = (await collect(teacher.sample(requests(1, limit=2)))).values()
    assert answer.finish_reason == "length"
    assert answer.token_ids.tolist() == endpoint.greedy(answer.prompt_ids, 2)


async def test_ids_come_with_the_logprobs_of_hugging_face(endpoint: Endpoint) -> None:
    async with endpoint.teacher(token_ids=True, logprobs=5) as teacher:
        await teacher.check()
        answers = await collect(teacher.sample(requests()))
    for answer in answers.values():
        assert answer.token_ids.tolist() == endpoint.greedy(answer.prompt_ids)
    assert_scored_as_hugging_face(endpoint, list(answers.values()), 5)


async def test_scores_of_any_sequence_are_those_of_hugging_face(endpoint: Endpoint) -> None:
    rng = np.random.default_rng(0)
    rollouts = []
    # The last one fills the model's length to the end.
    for index, (prompt, response) in enumerate([(4, 9), (1, 1), (7, 0), (POSITIONS // 2, POSITIONS // 2 - 1)]):
        ids = rng.integers(3, VOCAB, size=prompt + response).astype(np.int32)
        zeros = np.zeros(response, np.float32)
        versions = np.zeros(response, np.int32)
        rollouts.append(Rollout(index, index, ids[:prompt], ids[prompt:], zeros, zeros, versions, 0.0, "length"))
    async with endpoint.teacher(token_ids=True, logprobs=20) as teacher:
        scored = await collect(teacher.score(rollouts))
        assert sorted(scored) == [0, 1, 2, 3]
        assert_scored_as_hugging_face(endpoint, list(scored.values()), 20)
        assert scored[2].support_logprobs.shape == (0, 21)
        with pytest.raises(RequestRefused, match=r"\(400\).*length of prompt and response"):
            await collect(teacher.score([replace(rollouts[3], token_ids=np.repeat(rollouts[3].token_ids, 2))]))


async def test_a_seed_draws_the_same_again(endpoint: Endpoint) -> None:
    async with endpoint.teacher(temperature=1.0) as teacher:
        first, again = await collect(teacher.sample(requests())), await collect(teacher.sample(requests()))
        other = await collect(teacher.sample(requests(first_seed=77)))
    assert all(first[i].token_ids.tolist() == again[i].token_ids.tolist() for i in first)
    assert any(first[i].token_ids.tolist() != other[i].token_ids.tolist() for i in first)


async def test_a_wrong_key_is_refused_without_showing_it(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "wrong-key-91aa")
    async with endpoint.teacher() as teacher:
        with pytest.raises(
            ConfigError, match=rf"teachers\.far\.api_key_env={VARIABLE}: .* refuses the key \(401\)"
        ) as at_start:
            await teacher.check()
        with pytest.raises(RequestRefused, match=r"refuses the key") as later:
            await collect(teacher.sample(requests(1)))
    for caught in (at_start, later):
        assert "wrong-key" not in str(caught.value)
        assert caught.value.__cause__ is None


async def test_a_wrong_model_is_refused(endpoint: Endpoint) -> None:
    async with endpoint.teacher(model="huge") as teacher:
        with pytest.raises(ConfigError, match=r"teachers\.far\.model=huge: .*/v1 has no such model"):
            await teacher.check()
        assert teacher.requests == 1


class _Shifted:
    """A tokenizer of another family."""

    def __call__(self, text: str, **arguments: Any) -> dict[str, list[int]]:
        return {"input_ids": [token_id + 1 for token_id in TOKENIZER(text, **arguments)["input_ids"]]}


async def test_another_tokenizer_is_noticed_at_start(endpoint: Endpoint) -> None:
    async with endpoint.teacher(_Shifted(), token_ids=True) as teacher:
        with pytest.raises(ConfigError, match=r"token_ids=true: .* reads a test text as ids"):
            await teacher.check()


async def test_a_reader_that_leaves_stops_what_runs(endpoint: Endpoint) -> None:
    async with endpoint.teacher(temperature=1.0, max_concurrency=2) as teacher:
        async with aclosing(teacher.sample(requests(40))) as stream:
            async for part in stream:
                assert part
                break
        sent = teacher.requests
        assert sent < 40
        assert len(await collect(teacher.sample(requests(2)))) == 2
        assert teacher.requests == sent + 2


def _run(
    endpoint: Endpoint, folder: Path, teacher: dict[str, Any], **sections: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`kdray run` against the endpoint: summary and metrics."""
    tree = {
        "run": {"name": "far", "output": str(folder)},
        "data": {"prompts": {"type": "task", "difficulty": 2, "size": 512}, "heldout_size": 32, "max_prompt_tokens": 64},
        "student": {"model": {"type": "tiny", "layers": 1, "width": 64, "max_positions": POSITIONS}},
        "teachers": {"far": endpoint.settings(temperature=1.0, **teacher).model_dump(mode="json")},
        "training": {"steps": 20, "batch_size": 32, "learning_rate": 3e-3},
    } | sections
    path = folder / "far.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "cluster.cli", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert KEY not in done.stdout + done.stderr
    texts = [file.read_bytes() for file in (folder / "far").rglob("*") if file.is_file()]
    assert all(KEY.encode() not in text for text in texts), "the key is written nowhere"
    lines = (folder / "far" / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "far" / "summary.json").read_text()), [json.loads(line) for line in lines]


@pytest.mark.full
def test_an_endpoint_that_swallows_all_within_a_step_is_noticed_and_nothing_is_lost_or_doubled(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    """The run waits for it, goes on once it answers, and has trained every sample once."""
    steps = 20
    run = tmp_path / "far"

    def kinds() -> list[str]:
        return [event["kind"] for event in json_lines(run / "events.jsonl")]

    with tcp_proxy(urlsplit(endpoint.base_url).port or 0) as network, ThreadPoolExecutor(1) as pool:
        base_url = f"http://127.0.0.1:{network.port}/v1"
        settings = {"base_url": base_url, "timeout_s": SILENCE_S, "retries": 8}
        rollout = {"alpha": 1.0, "max_new_tokens": 8}
        running = pool.submit(_run, endpoint, tmp_path, settings, rollout=rollout, loss={"type": "sequence"})
        until(lambda: (run / "metrics.jsonl").exists() and len(json_lines(run / "metrics.jsonl")) >= 5, running, START_S)
        network.black_hole()
        until(lambda: "endpoint_lost" in kinds(), running, 10 * SILENCE_S)
        trained = len(json_lines(run / "metrics.jsonl"))
        time.sleep(SILENCE_S)
        assert len(json_lines(run / "metrics.jsonl")) == trained < steps, "it trains on what nobody wrote"
        network.heal()
        summary, metrics = running.result(400)
    assert network.held > 0
    assert kinds().count("endpoint_lost") == kinds().count("endpoint_back") == 1
    check_ledger(run, steps)
    assert summary["lost_samples"] == summary["duplicated_samples"] == 0
    assert summary["retried_samples"] > 0
    assert len(metrics) == steps


def until(condition: Callable[[], bool], running: Future[Any], limit_s: float) -> None:
    """Wait for something during a run."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert not running.done(), running.result()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.full
def test_a_run_learns_from_text_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    """Sequence-level distillation: the endpoint writes, four steps ahead; the student is graded by student-only replicas."""
    rollout = {"alpha": 1.0, "max_new_tokens": 8, "max_staleness": 4}
    summary, metrics = _run(endpoint, tmp_path, {}, rollout=rollout, loss={"type": "sequence"})
    assert summary["lost_samples"] == summary["duplicated_samples"] == 0
    assert len(metrics) == 20
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert {"exact_match", "response_tokens"} <= set(summary["after"])
    assert "reverse_kl" not in summary["after"], "no replica holds this teacher beside the student"


@pytest.mark.full
def test_a_run_learns_from_the_endpoints_logprobs_at_its_own_samples(endpoint: Endpoint, tmp_path: Path) -> None:
    """On-policy, as `configs/teacher_server.yaml` says: student-only replicas sample, the endpoint scores by its top 20."""
    recipe = yaml.safe_load((Path(__file__).parents[2] / "configs" / "teacher_server.yaml").read_text())
    own = ("type", "base_url", "model", "api_key_env")
    teacher = {name: value for name, value in recipe["teachers"]["large"].items() if name not in own}
    rollout = recipe["rollout"] | {"max_new_tokens": 8}
    summary, metrics = _run(endpoint, tmp_path, teacher, rollout=rollout, loss=recipe["loss"])
    assert summary["lost_samples"] == summary["duplicated_samples"] == 0
    assert metrics[-1]["reverse_kl_support"] < 0.7 * metrics[0]["reverse_kl_support"]
    assert sum(line["wait_teacher_s"] for line in metrics) > 0
