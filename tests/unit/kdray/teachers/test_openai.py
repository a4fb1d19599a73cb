"""A remote teacher against a tiny HTTP server on the loopback: repeats, pauses, refusals, and what becomes of a text."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kdray.checks.teacher_signal import check_loss
from kdray.checks.unsafe_notes import unsafe_notes
from kdray.config import (
    MiniLLMLoss,
    OpenAITeacherSettings,
    ProgramSettings,
    ReverseKLLoss,
    SequenceLoss,
    parse_config,
)
from kdray.data.dataset import asked_text, question_encoder, response_encoder
from kdray.errors import ConfigError, DataError, EndpointAway, EngineError, RequestRefused, TrainingError, Unavailable
from kdray.losses import LossBatch, loss_function
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.arrow import rollouts_to_table, table_to_rollouts
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.race import once
from kdray.runs.metrics import batch_metrics
from kdray.teachers.dialect import support
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.teachers.openai import RemoteTeacher
from kdray.teachers.programs.sampler import ProgramSampler, Rows, TextCodec
from kdray.teachers.rate_limit import RateLimiter
from kdray.types import Rollout, SampleRequest
from tests.support.tcp_proxy import faults, tcp_proxy
from tests.support.toy_world import ToyWorld

TOKENIZER = task_tokenizer()
EOS = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER)
KEY = "secret-key-7d1f"
VARIABLE = "KDRAY_TEST_KEY"

# ------------------------------------------------------------------------------------------------------- rate limit


@hypothesis_settings(max_examples=100)
@given(
    arrivals=st.lists(st.floats(0, 300), min_size=1, max_size=30),
    per_minute=st.none() | st.floats(0.5, 600),
    pause=st.tuples(st.floats(0, 300), st.floats(0, 100)),
)
def test_starts_keep_their_distance_and_the_pause_and_waste_nothing(
    arrivals: list[float], per_minute: float | None, pause: tuple[float, float]
) -> None:
    limiter = RateLimiter(per_minute)
    gap = 60.0 / per_minute if per_minute else 0.0
    begin, end = pause[0], pause[0] + pause[1]
    paused, last, free = False, -np.inf, 0.0
    for arrival in sorted(arrivals):
        now = max(arrival, free)
        while True:
            if not paused and now >= begin:
                limiter.pause(pause[1], begin)
                paused = True
            delay = limiter.delay(now)
            if delay <= 1e-9:
                break
            # Whoever waits learns of a pause that begins meanwhile.
            now = min(now + delay, begin) if not paused and now < begin else now + delay
        wanted = max(arrival, last + gap)
        if begin <= wanted < end:
            wanted = end
        assert now == pytest.approx(wanted, abs=1e-6)
        limiter.start(now)
        last = free = now


def test_who_gives_up_takes_no_place() -> None:
    limiter = RateLimiter(60.0)
    limiter.start(10.0)
    assert limiter.delay(10.25) == 0.75
    assert limiter.delay(10.25) == 0.75
    assert limiter.delay(11.0) == 0.0


# --------------------------------------------------------------------------------------------- a server on the loopback


@dataclass
class Seen:
    at: float
    path: str
    authorization: str
    body: dict[str, Any]


@dataclass
class Server:
    """Answers request number n (from 0) with `reply(n, body)`: status, headers, and a JSON value or bytes."""

    reply: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    most_at_once: int = 0
    at_once: int = 0


@contextmanager
def serving(reply: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]) -> Iterator[Server]:
    server, lock = Server(reply), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(server.seen)
                server.seen.append(Seen(time.monotonic(), self.path, self.headers["authorization"], body))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            status, headers, content = server.reply(number, body)
            with lock:
                server.at_once -= 1
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in (
                    {"content-type": "application/json", "content-length": str(len(content))} | headers
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                # The client gave up, as a test asked it to.
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def written(text: str | None, finish_reason: str = "stop", **more: Any) -> tuple[int, dict[str, str], Any]:
    """An answer that fits chat and plain completions."""
    choice = {"index": 0, "finish_reason": finish_reason, "text": text, "message": {"role": "assistant", "content": text}}
    return 200, {}, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice | more]}


def settings_for(port: int, **changes: Any) -> OpenAITeacherSettings:
    given: dict[str, Any] = {
        "type": "openai",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "model": "m",
        "api_key_env": VARIABLE,
        "retries": 2,
    }
    return OpenAITeacherSettings(**(given | changes))


@asynccontextmanager
async def teacher_at(port: int, **changes: Any) -> AsyncIterator[RemoteTeacher]:
    teacher = RemoteTeacher("far", settings_for(port, **changes), TOKENIZER, lambda request: "what?", VOCAB, (EOS,))
    try:
        yield teacher
    finally:
        await teacher.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")


def request(sample_id: int = 0, limit: int = 16, **changes: Any) -> SampleRequest:
    return SampleRequest(
        sample_id, 7, np.array([4, 5], np.int32), **({"alpha": 1.0, "seed": 2**64 - 1} | changes), max_new_tokens=limit
    )


async def collect(stream: Any) -> list[Any]:
    async with aclosing(stream):
        return [rollout async for part in stream for rollout in part]


async def one(reply: Any, limit: int = 16, **changes: Any) -> Any:
    with serving(lambda number, body: reply) as server:
        async with teacher_at(server.port, **changes) as teacher:
            (rollout,) = await collect(teacher.sample([request(limit=limit)]))
    return rollout


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


# ------------------------------------------------------------------------------------------------ calls of programs


async def _asked(chat: bool) -> list[Any]:
    """What the endpoint reads when a program asks it about the one prompt, under a tokenizer with a chat template."""
    tokenizer = task_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tiny = {"model": {"type": "tiny"}}
    config = parse_config({"run": {"name": "x"}, "student": tiny, "teachers": {"t": tiny}})
    prompt = replace(question_encoder(config, tokenizer)("q"), prompt_id=7)
    program = TypeAdapter(ProgramSettings).validate_python(
        {"type": "rephrase_respond", "rephrase": "re {question}", "respond": "{rephrased}?"}
    )
    codec = TextCodec(question_encoder(config, tokenizer), response_encoder(tokenizer), lambda ids: tokenizer.decode(ids, True))
    with serving(lambda number, body: written("qq" if number < 2 else "yes")) as server:
        far = RemoteTeacher(
            "far", settings_for(server.port, chat=chat), tokenizer, asked_text(config, tokenizer, [prompt], chat), VOCAB, (EOS,)
        )
        try:
            (own,) = await collect(far.sample([request()]))
            (rollout,) = await collect(
                ProgramSampler(program, far, "far", [prompt], codec, Rows(1, "", 99, 0)).sample([request()])
            )
        finally:
            await far.close()
    assert own.token_ids.tolist() == [*ids("qq"), EOS]
    assert rollout.token_ids.tolist() == [*ids("yes"), EOS]
    return [seen.body["messages"][0]["content"] if chat else seen.body["prompt"] for seen in server.seen]


async def test_a_program_asks_an_endpoint_its_own_questions() -> None:
    assert await _asked(chat=True) == ["q", "re q", "qq?"]
    assert await _asked(chat=False) == ["<q>", "<re q>", "<qq?>"], "plain completions continue the student's template"


# --------------------------------------------------------------------------------------------------- text to rollouts


async def test_a_chat_request_says_what_was_configured() -> None:
    with serving(lambda number, body: written("ab")) as server:
        async with teacher_at(server.port, system_prompt="be brief", temperature=0.5, top_p=0.9) as teacher:
            (rollout,) = await collect(teacher.sample([request(limit=9, min_version=4)]))
    (seen,) = server.seen
    assert (seen.path, seen.authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}],
        "max_tokens": 9,
        "seed": 2**31 - 1,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert rollout.token_ids.tolist() == [*ids("ab"), EOS]
    assert rollout.token_ids.dtype == np.int32
    assert (rollout.finish_reason, rollout.teacher, rollout.alpha, rollout.prompt_id) == ("stop", "far", 1.0, 7)
    assert rollout.student_versions.tolist() == [4, 4, 4]
    assert rollout.oldest_version == 4
    assert rollout.mixture_logprobs is rollout.student_logprobs is rollout.teacher_logprobs is None


@pytest.mark.parametrize(
    ("text", "reason", "limit", "expected", "finish"),
    [
        ("abc", "stop", 4, [*ids("abc"), EOS], "stop"),
        ("abc", "stop", 3, ids("abc"), "length"),
        ("abcdef", "stop", 4, ids("abcd"), "length"),
        ("abc", "length", 16, ids("abc"), "length"),
        ("abc", "content_filter", 16, ids("abc"), "length"),
        ("", "stop", 16, [EOS], "stop"),
        (None, "stop", 16, [], "length"),
        ("a<eos>b", "stop", 16, [*ids("a"), *(ids(c)[0] for c in "<eos>"), *ids("b"), EOS], "stop"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
async def test_text_becomes_the_students_tokens(
    text: str | None, reason: str, limit: int, expected: list[int], finish: str, chat: bool
) -> None:
    rollout = await one(written(text, reason), limit, chat=chat)
    assert (rollout.token_ids.tolist(), rollout.finish_reason) == (expected, finish)


# ------------------------------------------------------------------------------------------- dialects of the interface

THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "carry the one"}]}


def said(content: Any, **more: Any) -> tuple[int, dict[str, str], Any]:
    """An answer whose message has this content."""
    return written("", message={"role": "assistant", "content": content} | more)


@pytest.mark.parametrize(
    ("answer", "dropped", "kept"),
    [
        (
            said([THOUGHT, {"type": "text", "text": "4"}, {"type": "text", "text": "2"}]),
            "42",
            "<think>\ncarry the one\n</think>\n\n42",
        ),
        (said("42", reasoning_content="carry the one"), "42", "<think>\ncarry the one\n</think>\n\n42"),
        (said("42"), "42", "42"),
    ],
)
async def test_an_answer_in_parts_is_its_text_and_thoughts_are_kept_on_request(answer: Any, dropped: str, kept: str) -> None:
    for thinking, text in ((False, dropped), (True, kept)):
        rollout = await one(answer, limit=99, thinking=thinking)
        assert rollout.token_ids.tolist() == [*ids(text), EOS]


async def test_a_thought_alone_is_no_answer_and_other_parts_are_named() -> None:
    rollout = await one(said([THOUGHT]))
    assert (rollout.token_ids.tolist(), rollout.finish_reason) == ([], "length")
    with pytest.raises(EngineError, match=r"teachers\.far: .* a part of type 'image_url', which is no text; name a model"):
        await one(said([{"type": "image_url", "image_url": {"url": "x"}}]))
    with pytest.raises(EngineError, match="a part of type 'text' without text"):
        await one(said([{"type": "text", "text": None}]))


def picky(*refused: tuple[str, Any]) -> Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]:
    """An endpoint that refuses parameters, one at a time. Args: refused: name, and the body of the refusal."""

    def reply(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return next(((400 if "error" in why else 422, {}, why) for name, why in refused if name in body), written("a"))

    return reply


RENAMED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
FORBIDDEN = {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]}
FIXED = {"error": {"message": "Unsupported value: 'temperature' does not support 1.0 with this model."}}


async def test_what_an_endpoint_refuses_by_name_is_sent_otherwise_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    refusals = picky(("max_tokens", {"error": {"message": RENAMED}}), ("seed", FORBIDDEN), ("temperature", FIXED))
    with serving(refusals) as server:
        async with teacher_at(server.port, max_concurrency=3) as teacher:
            await teacher.check()
            first = len(server.seen)
            rollouts = await collect(teacher.sample([request(number, limit=9) for number in range(3)]))
    assert first == 4, "one request for each thing to learn, and the one that is answered"
    assert len(server.seen) - first == 3, "nothing is asked twice again"
    assert [rollout.token_ids.tolist() for rollout in rollouts] == [[*ids("a"), EOS]] * 3
    assert server.seen[-1].body == {
        "model": "m",
        "messages": [{"role": "user", "content": "what?"}],
        "max_completion_tokens": 9,
        "top_p": 1.0,
    }
    assert [line.split("from now on ")[1] for line in caplog.messages] == [
        "`max_tokens` is sent as `max_completion_tokens`",
        "`seed` is left out; its responses cannot be drawn again",
        "`temperature` is left out",
    ]


async def test_requests_that_are_refused_together_learn_together() -> None:
    with serving(picky(("seed", FORBIDDEN))) as server:
        async with teacher_at(server.port, max_concurrency=4) as teacher:
            rollouts = await collect(teacher.sample([request(number) for number in range(4)]))
    assert len(rollouts) == 4
    assert len(server.seen) <= 8


async def test_a_temperature_that_means_something_is_never_left_out() -> None:
    with serving(picky(("temperature", FIXED))) as server:
        async with teacher_at(server.port, temperature=0.5) as teacher:
            with pytest.raises(RequestRefused, match=r"\(400\): .*temperature.* look at chat"):
                await collect(teacher.sample([request()]))
    assert len(server.seen) == 1


async def test_without_a_key_none_of_the_environment_is_sent() -> None:
    with serving(lambda number, body: written("a")) as server:
        async with teacher_at(server.port, api_key_env=None) as teacher:
            await collect(teacher.sample([request()]))
    assert server.seen[0].authorization == "Bearer none"


async def test_usage_is_counted_where_the_endpoint_says_it() -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        status, headers, answer = written("a")
        return (
            status,
            headers,
            answer | ({"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}} if number else {}),
        )

    with serving(reply) as server:
        async with teacher_at(server.port) as teacher:
            await collect(teacher.sample([request(index) for index in range(3)]))
            assert (teacher.prompt_tokens, teacher.completion_tokens) == (10, 4)
            assert (teacher.requests, teacher.retried) == (3, 0)


# ------------------------------------------------------------------------------------------ repeats, pauses, concurrency


async def test_a_failure_is_asked_again() -> None:
    with serving(lambda number, body: (500, {}, {"error": "busy"}) if number == 0 else written("a")) as server:
        async with teacher_at(server.port) as teacher:
            (rollout,) = await collect(teacher.sample([request()]))
            assert (teacher.requests, teacher.retried) == (2, 1)
    assert rollout.token_ids.tolist() == [*ids("a"), EOS]
    assert len(server.seen) == 2


async def test_a_pause_that_is_asked_for_holds_for_all_and_repeats_keep_the_pace() -> None:
    with serving(lambda number, body: (429, {"retry-after": "0.6"}, {}) if number == 0 else written("a")) as server:
        async with teacher_at(server.port, requests_per_minute=600) as teacher:
            began = time.monotonic()
            rollouts = await collect(teacher.sample([request(index) for index in range(4)]))
            took = time.monotonic() - began
            assert (teacher.requests, teacher.retried) == (5, 1)
    assert sorted(rollout.sample_id for rollout in rollouts) == [0, 1, 2, 3]
    # Without the pause the second would have come a tenth of a second after the first.
    assert server.seen[1].at - server.seen[0].at > 0.58
    # Lower bounds alone, which a busy machine keeps: the pause, and three tenths between the four requests behind it.
    assert took > 0.88


async def test_no_more_than_so_many_run_at_once_and_each_comes_once() -> None:
    def slow(number: int, body: dict[str, Any]) -> Any:
        time.sleep(0.05)
        return written("a")

    with serving(slow) as server:
        async with teacher_at(server.port, max_concurrency=3) as teacher:
            rollouts = await collect(teacher.sample([request(index) for index in range(10)]))
    assert sorted(rollout.sample_id for rollout in rollouts) == list(range(10))
    assert server.most_at_once == 3


async def test_a_reader_that_leaves_stops_what_runs() -> None:
    release = threading.Event()

    def reply(number: int, body: dict[str, Any]) -> Any:
        if number:
            release.wait(10)
        return written("a")

    with serving(reply) as server:
        async with teacher_at(server.port, max_concurrency=2) as teacher:
            began = time.monotonic()
            async with aclosing(teacher.sample([request(index) for index in range(20)])) as stream:
                async for part in stream:
                    assert len(part) == 1
                    break
            assert time.monotonic() - began < 5
            release.set()
            assert len(server.seen) <= 3, "requests were sent for nobody"


# ------------------------------------------------------------------------------------------------------- refusals


def whole(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_told_once_and_never_shown(status: int) -> None:
    quoted = {"error": {"message": f"Incorrect API key {KEY}, that is {KEY[:8]}***", "code": "invalid_api_key"}}
    with serving(lambda number, body: (status, {}, quoted)) as server:
        async with teacher_at(server.port) as teacher:
            with pytest.raises(
                RequestRefused, match=rf"far\.api_key_env={VARIABLE}: .* \({status}\); set {VARIABLE}"
            ) as caught:
                await collect(teacher.sample([request()]))
            with pytest.raises(ConfigError, match=VARIABLE) as at_start:
                await teacher.check()
    assert len(server.seen) == 2
    assert KEY[:8] not in whole(caught.value) + whole(at_start.value)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, RequestRefused, r"teachers\.far: .* refuses the request \(400\): .*too long <key>"),
        (422, RequestRefused, r"\(422\)"),
        (404, RequestRefused, r"teachers\.far\.model=m: .*/v1 has no such model or page \(404\)"),
        (429, EngineError, r"teachers\.far\.retries=1: .* limits the rate"),
        (503, EngineError, r"teachers\.far\.retries=1: .* failed every attempt \(503\)"),
    ],
)
async def test_every_refusal_names_setting_value_and_remedy(status: int, error: type[Exception], message: str) -> None:
    with serving(lambda number, body: (status, {}, {"error": {"message": f"too long {KEY}"}})) as server:
        async with teacher_at(server.port, retries=1) as teacher:
            with pytest.raises(error, match=message) as caught:
                await collect(teacher.sample([request()]))
    assert len(server.seen) == (1 if error is RequestRefused else 2)
    assert isinstance(caught.value, RequestRefused) == (error is RequestRefused)
    # What a later attempt may answer is no failure of the run, which its supervisor starts again.
    assert isinstance(caught.value, Unavailable) == (error is not RequestRefused)
    assert KEY not in whole(caught.value)


@pytest.mark.parametrize(
    ("headers", "content"),
    [({}, b"not json"), ({"content-type": "text/html"}, b"<html>sign in</html>"), ({}, {}), ({}, []), ({}, {"choices": []})],
)
async def test_an_answer_of_something_else_is_refused(headers: dict[str, str], content: Any) -> None:
    with pytest.raises(EngineError, match=r"far\.base_url: .* does not answer as OpenAI's interface does"):
        await one((200, headers, content))


async def test_silence_and_closed_doors_are_told_apart() -> None:
    release = threading.Event()

    def silent(number: int, body: dict[str, Any]) -> Any:
        release.wait(10)
        return written("a")

    with serving(silent) as server:
        async with teacher_at(server.port, timeout_s=0.2, retries=0) as teacher:
            with pytest.raises(EndpointAway, match=r"far\.timeout_s=0\.2: .* did not answer in 1 attempts"):
                await collect(teacher.sample([request()]))
        release.set()
    async with teacher_at(server.port, retries=0) as teacher:
        with pytest.raises(ConfigError, match=r"far\.base_url: .* cannot be reached"):
            await teacher.check()
        with pytest.raises(EndpointAway, match=r"far\.base_url: .* cannot be reached"):
            await collect(teacher.sample([request()]))


@pytest.mark.parametrize("fault", ["cut", "black_hole", "no_answers"])
async def test_a_partition_in_the_middle_of_a_call_is_told_once_and_nothing_is_lost_or_doubled(fault: str) -> None:
    """However many requests are in it; what arrives at the endpoint twice is answered once."""
    told: list[tuple[str, dict[str, Any]]] = []
    with serving(lambda number, body: written("a")) as server, tcp_proxy(server.port) as network:
        async with teacher_at(network.port, timeout_s=1.0, retries=8) as teacher:
            teacher.on_event = lambda kind, **fields: told.append((kind, fields))
            assert len(await collect(teacher.sample([request()]))) == 1
            await asyncio.to_thread(faults(network)[fault])
            asking = asyncio.ensure_future(collect(teacher.sample([request(sample_id=index) for index in range(5)])))
            await asyncio.wait_for(once(lambda: teacher.retried >= 5, 0.01), 20)
            assert not asking.done()
            await asyncio.to_thread(network.heal)
            answers = await asyncio.wait_for(asking, 20)
    assert sorted(answer.sample_id for answer in answers) == [0, 1, 2, 3, 4]
    assert [kind for kind, _ in told] == ["endpoint_lost", "endpoint_back"]
    lost, back = (fields for _, fields in told)
    assert (lost["teacher"], back["teacher"]) == ("far", "far")
    assert lost["reason"].startswith(("ConnectError", "ReadError", "RemoteProtocolError") if fault == "cut" else "ReadTimeout")
    assert back["failed_attempts"] >= 5


async def test_an_endpoint_that_breaks_is_told_and_one_that_limits_the_rate_is_not() -> None:
    told: list[Any] = []
    statuses = iter([200, 429, 200, 503, 502, 200])

    def answer(number: int, body: dict[str, Any]) -> Any:
        status = next(statuses)
        return written("a") if status == 200 else (status, {"retry-after": "0.01"}, {"error": {"message": "no"}})

    with serving(answer) as server:
        async with teacher_at(server.port) as teacher:
            teacher.on_event = lambda kind, **fields: told.append((kind, fields.get("reason")))
            for index in range(3):
                await collect(teacher.sample([request(sample_id=index)]))
    assert told == [("endpoint_lost", "status 503"), ("endpoint_back", None)]


@pytest.mark.parametrize("value", ["", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"teachers\.far\.api_key_env={VARIABLE}: ") as caught:
        RemoteTeacher("far", settings_for(1), TOKENIZER, lambda request: "", VOCAB, (EOS,))
    assert not value.strip() or value not in str(caught.value)


async def test_what_it_cannot_do_is_refused_before_it_is_sent() -> None:
    empty = Rollout(0, 0, np.array([4], np.int32), *(np.empty(0, np.float32),) * 3, np.empty(0, np.int32), 0.0, "length")
    async with teacher_at(1) as teacher:
        with pytest.raises(RequestRefused, match=r"at alpha 1, not 0\.2; set rollout\.alpha=1"):
            await collect(teacher.sample([request(alpha=0.2)]))
        with pytest.raises(RequestRefused, match=r"far\.logprobs=0"):
            await collect(teacher.score([empty]))
    async with teacher_at(1, chat=False, token_ids=True, logprobs=3) as teacher:
        with pytest.raises(RequestRefused, match="ensemble"):
            await collect(teacher.score([empty], top_k=False))
        with pytest.raises(RequestRefused, match="ensemble"):
            await collect(teacher.score([replace(empty, support_ids=np.empty((0, 2), np.int32))]))
        parts = [part async for part in teacher.score([replace(empty, sample_id=index) for index in range(4)])]
        assert [len(part) for part in parts] == [4], "what ended together is one item"
        assert teacher.requests == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "host/v1"}, "not an address; write it as https://host/v1"),
        ({"base_url": "https://u:pw@host/v1"}, "more than an address; give a key by `api_key_env`"),
        ({"base_url": "https://host/v1?key=pw"}, "more than an address"),
        ({"logprobs": 3, "chat": False}, "logprobs=3 with token_ids=false"),
        ({"token_ids": True}, "token_ids=true with chat=true"),
        ({"system_prompt": "hi", "chat": False}, "system_prompt with chat=false"),
        ({"logprobs": 21, "chat": False, "token_ids": True}, "less than or equal to 20"),
        ({"api_key_env": "sk-123"}, "api_key_env"),
        ({"api_key_env": "DATABASE_URL"}, "api_key_env=DATABASE_URL: a key's variable has TOKEN, KEY"),
        ({"api_key_env": "AWS_SECRET_ACCESS_KEY"}, "a credential of another service to 127.0.0.1"),
        ({"api_key_env": "HF_TOKEN", "base_url": "https://huggingface.co.evil.example/v1"}, "a credential of another service"),
        ({"api_key_env": "hf_token", "base_url": "https://nothuggingface.co/v1"}, "a credential of another service"),
        ({"api_key_env": "RAY_AUTH_TOKEN", "base_url": "https://ray.example/v1"}, "a credential of another service"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_for(1, **changes)
    told = "; ".join(item["msg"] + str(item["loc"]) for item in caught.value.errors())
    assert message in told
    assert "pw" not in told


def test_a_service_s_own_key_may_be_sent_to_it() -> None:
    settings_for(1, api_key_env="HF_TOKEN", base_url="https://router.huggingface.co/v1")
    settings_for(1, api_key_env="GITHUB_TOKEN", base_url="https://models.github.ai/inference")
    settings_for(1, api_key_env="GEMINI_API_KEY", base_url="https://generativelanguage.googleapis.com/v1beta/openai")


@pytest.mark.parametrize(
    ("base_url", "given", "refused", "note"),
    [
        ("http://10.1.2.3:8000/v1", {}, True, ""),
        ("http://10.1.2.3:8000/v1", {"unsafe_http": True}, False, "by plain http the key and all prompts can be read"),
        ("http://10.1.2.3:8000/v1", {"api_key_env": None}, False, "by plain http all prompts can be read"),
        ("http://127.0.0.1:8000/v1", {}, False, None),
        ("https://far.example/v1", {}, False, None),
    ],
)
def test_a_key_goes_over_plain_http_only_to_this_machine(
    base_url: str, given: dict[str, Any], refused: bool, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "k")
    config = parse_config(
        {
            "run": {"name": "x"},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"far": {"type": "openai", "model": "m", "api_key_env": VARIABLE, "base_url": base_url} | given},
            "rollout": {"alpha": 1.0},
            "loss": {"type": "sequence"},
        }
    )
    kind = kind_of(config, "far")
    assert list(unsafe_notes(config)) == (
        ["teachers.far.unsafe_http: its key may be read on the way"] if "unsafe_http" in given else []
    )
    if refused:
        with pytest.raises(ConfigError, match=r"far\.base_url=http://10.* plain http the key .*tunnel.*unsafe_http=true"):
            kind.check(None, 0)
        return
    found = kind.check(None, 0)
    assert (found.note is None) if note is None else (note in str(found.note))
    assert (f"the key in {VARIABLE}" in found.line) == (given.get("api_key_env", VARIABLE) is not None)


# ------------------------------------------------------------------------------------------------------- logprobs


def named(tokens: list[int], rows: np.ndarray, k: int) -> dict[str, Any]:
    """vLLM's legacy logprobs of tokens under rows [T, vocab]: the top k, and the token itself."""
    tops = []
    for token, row in zip(tokens, rows, strict=True):
        top = {token, *np.argsort(-row)[:k].tolist()}
        tops.append({f"token_id:{token_id}": max(float(row[token_id]), -9999.0) for token_id in top})
    at = [max(float(row[token]), -9999.0) for token, row in zip(tokens, rows, strict=True)]
    return {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": at, "top_logprobs": tops, "text_offset": []}


def log_rows(length: int, vocab: int, seed: int = 0) -> np.ndarray:
    logits = 2.0 * np.random.default_rng(seed).normal(size=(length, vocab))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


async def test_scores_are_read_at_the_response_alone() -> None:
    sequence, k = [4, 5, 60, 7, EOS], 3
    rows = log_rows(5, VOCAB)
    logprobs = named(sequence, rows, k)
    # Nothing predicts the first token.
    logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
    rollout = Rollout(
        3, 7, np.array(sequence[:2], np.int32), np.array(sequence[2:], np.int32), None, None, np.zeros(3, np.int32), 1.0, "stop"
    )
    with serving(lambda number, body: written("", "length", logprobs=logprobs)) as server:
        async with teacher_at(server.port, chat=False, token_ids=True, logprobs=k) as teacher:
            (scored,) = await collect(teacher.score([rollout]))
    body = server.seen[0].body
    assert (server.seen[0].path, body["prompt"], body["max_tokens"], body["echo"], body["logprobs"]) == (
        "/v1/completions",
        sequence,
        0,
        True,
        k,
    )
    assert body["return_tokens_as_token_ids"] is True
    assert (scored.teacher, scored.sample_id) == ("far", 3)
    for t, (token, row) in enumerate(zip(sequence[2:], rows[2:], strict=True)):
        order = np.argsort(-row)[:k].tolist()
        expected = order if token in order else [*order, token]
        assert scored.support_ids[t].tolist() == [*expected, -1][: k + 1]
        np.testing.assert_allclose(scored.support_logprobs[t][: len(expected)], row[expected], rtol=1e-6)
        assert scored.support_logprobs[t][len(expected) :].tolist() == [-np.inf] * (k + 1 - len(expected))
        assert scored.teacher_logprobs[t] == pytest.approx(row[token], rel=1e-6)
        assert scored.tail_logprobs[t] == pytest.approx(np.log(np.exp(np.delete(row, expected)).sum()), abs=1e-5)


async def test_ids_that_were_drawn_come_scored_and_cut() -> None:
    tokens, k = [9, 8, EOS], 2
    rows = log_rows(3, VOCAB, seed=1)
    reply = written("", "stop", token_ids=tokens, logprobs=named(tokens, rows, k))
    rollout = await one(reply, chat=False, token_ids=True, logprobs=k)
    assert (rollout.token_ids.tolist(), rollout.finish_reason) == (tokens, "stop")
    np.testing.assert_allclose(rollout.teacher_logprobs, rows[np.arange(3), tokens], rtol=1e-6)
    rollout = await one(reply, limit=2, chat=False, token_ids=True, logprobs=k)
    assert (rollout.token_ids.tolist(), rollout.finish_reason) == (tokens[:2], "length")
    assert rollout.support_ids.shape == (2, k + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, r"names no ids; set token_ids=false"),
        ({"token_ids": [9, VOCAB]}, rf"gave id {VOCAB}, and the student has {VOCAB}"),
        ({"logprobs": None}, r"gives no logprobs named by token id"),
        (
            {"logprobs": {"tokens": ["a", "b"], "token_logprobs": [0.0, 0.0], "top_logprobs": [{}, {}]}},
            r"no logprobs named by token id",
        ),
        ({"logprobs": named([9, 7], log_rows(2, VOCAB), 2)}, r"logprobs of other tokens"),
    ],
)
async def test_ids_and_logprobs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"token_ids": [9, 8], "logprobs": named([9, 8], log_rows(2, VOCAB), 2)}
    with pytest.raises(EngineError, match=message):
        await one(written("", "stop", **(given | changes)), chat=False, token_ids=True, logprobs=2)


def test_ids_that_the_student_lacks_are_tail_and_minus_infinity_is_exact() -> None:
    # Ids 0 to 2 are the student's; the endpoint's head has a fourth row.
    columns = support([-0.5, -9999.0], [{0: -0.5, 3: np.log(1 - np.exp(-0.5))}, {1: 0.0, 2: -9999.0}], 3, 3)
    assert columns["support_ids"].tolist() == [[0, -1, -1], [1, 2, -1]]
    assert columns["support_logprobs"].tolist() == [[-0.5, -np.inf, -np.inf], [0.0, -np.inf, -np.inf]]
    assert columns["teacher_logprobs"].tolist() == [-0.5, -np.inf]
    assert np.exp(columns["tail_logprobs"][0]) == pytest.approx(1 - np.exp(-0.5))
    # Id 0 is outside the second support: its mass is below what can be told from 1, and not minus infinity.
    assert columns["tail_logprobs"][1] == pytest.approx(np.log(1e-7), rel=1e-4)
    third = np.log(1 / 3)
    assert support([third], [dict.fromkeys(range(3), third)], 4, 3)["tail_logprobs"].tolist() == [-np.inf]


async def test_vopds_baseline_on_an_endpoints_support_does_not_depend_on_the_token() -> None:
    """Its expected gradient is that of the KL at the sampled prefixes, of which whole rows give it exactly."""
    world, k = ToyWorld(3), 2

    def reply(number: int, body: dict[str, Any]) -> Any:
        sequence = body["prompt"]
        rows = np.concatenate([np.zeros((1, 5)), world.rows_before(world.teacher, sequence[1:])])
        logprobs = named(sequence, rows, k)
        logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        return written("", "length", logprobs=logprobs)

    with serving(reply) as server:
        far = settings_for(server.port, chat=False, token_ids=True, logprobs=k).model_dump(exclude_unset=True)
        config = parse_config(
            {
                "run": {"name": "x"},
                "student": {"model": {"type": "tiny"}},
                "teachers": {"far": {"type": "openai"} | far},
                "rollout": {"sampler": "student"},
                "loss": {"type": "vopd"},
            }
        )
        context = TeacherContext(config, TOKENIZER, SimpleNamespace(train=[], heldout=[]), 5, (EOS,))
        teacher = kind_of(config, "far").open(context)
        scored = await collect(teacher.score(world.rollouts(0.0)))
        await teacher.close()
    scored.sort(key=lambda rollout: rollout.sample_id)
    found = world.expected_of_records(config.loss, scored, 0.0)
    exact = world.expected_gradient(ReverseKLLoss(type="reverse_kl"), 0.0)
    assert (found - exact).norm() / exact.norm() < 1e-5
    assert {rollout.support_ids.shape[1] for rollout in scored} == {k}


# -------------------------------------------------------------------------------- what the rest makes of its rollouts


def text_rollout(sample_id: int, tokens: list[int]) -> Rollout:
    versions = np.zeros(len(tokens), np.int32)
    return Rollout(sample_id, 0, np.array([4], np.int32), np.array(tokens, np.int32), None, None, versions, 1.0, "stop", "far")


def mixed_rollout(sample_id: int, tokens: list[int]) -> Rollout:
    half = np.full(len(tokens), np.log(0.5), np.float32)
    return replace(text_rollout(sample_id, tokens), mixture_logprobs=half, student_logprobs=2 * half, teacher="near")


def test_records_keep_unknown_densities_unknown() -> None:
    for rollout in table_to_rollouts(rollouts_to_table([text_rollout(0, [5, EOS]), mixed_rollout(1, [5])])):
        assert (rollout.mixture_logprobs is None) == (rollout.student_logprobs is None) == (rollout.sample_id == 0)


def test_a_text_loss_trains_written_rollouts_alone_and_beside_others() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 4, VOCAB))
    rollouts = [text_rollout(0, [5, 6, EOS]), mixed_rollout(1, [7, EOS])]
    tensors = LossBatch.from_train_batch(rollouts_to_batch(rollouts, step=1), VOCAB)
    total = loss_function(SequenceLoss(type="sequence"))(torch.tensor(logits), tensors, None).total.item()
    rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = [(0, 1, 5), (0, 2, 6), (0, 3, EOS), (1, 1, 7), (1, 2, EOS)]
    assert total == pytest.approx(-sum(rows[place] for place in at), rel=1e-12)
    with pytest.raises(TrainingError, match="no column"):
        loss_function(MiniLLMLoss())(torch.tensor(logits), tensors, MiniLLMLoss())
    scored = replace(mixed_rollout(2, [5]), teacher_logprobs=np.zeros(1, np.float32))
    with pytest.raises(DataError, match="teacher_logprobs"):
        rollouts_to_batch([mixed_rollout(1, [7]), scored], step=1)


def test_weights_leave_out_what_has_none() -> None:
    both = batch_metrics([text_rollout(0, [5, 6, EOS]), mixed_rollout(1, [7, EOS])], 2)
    assert both["importance_weight_mean"] == pytest.approx(0.5)
    assert both["teacher/near/staleness_2/importance_weight_ess"] == pytest.approx(1.0)
    assert (both["staleness_mean"], both["response_tokens"]) == (2.0, 2.5)
    alone = batch_metrics([text_rollout(0, [5, EOS])], 0)
    assert set(alone) == {"staleness_mean", "staleness_max", "response_tokens", "truncated"}


def test_the_signal_check_has_nothing_to_ask_of_text() -> None:
    assert check_loss([text_rollout(0, [5, EOS])], SequenceLoss(type="sequence"), 1.0, VOCAB) == {}
