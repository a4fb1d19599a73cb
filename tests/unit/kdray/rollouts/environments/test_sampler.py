"""Rollouts of several turns: what is drawn and what is context, limits, order, random numbers, and failures by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdray.config import parse_config
from kdray.config.environments import EnvironmentSettings
from kdray.errors import ConfigError, ResponseError
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.environments import EnvironmentSampler, Reply, TurnText, check_environment, in_environment
from kdray.rollouts.seeds import uniforms
from kdray.runs.metrics import batch_metrics
from kdray.types import WRITERS, Prompt, Rollout, SampleRequest

TOKENIZER = task_tokenizer()
VOCAB = len(TOKENIZER)
EOS = int(TOKENIZER.eos_token_id)


def ids(text: str) -> list[int]:
    return [EOS if each == "$" else int(TOKENIZER.convert_tokens_to_ids(each)) for each in text]


@dataclass
class Written:
    """A sampler that draws what a script says: of each sample, the model's whole text, `$` for its end."""

    texts: dict[int, str]
    asked: list[SampleRequest] = field(default_factory=list)
    width: Callable[[int], int] = lambda call: 2
    teacher: Callable[[int], str] = lambda call: "toy"

    def __post_init__(self) -> None:
        self._done = Counter[int]()
        self._calls = Counter[int]()

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        self.asked += requests
        for request in requests:
            yield [self._draw(request)]

    def _draw(self, request: SampleRequest) -> Rollout:
        sample = request.sample_id
        tokens: list[int] = []
        while len(tokens) < request.max_new_tokens and not {EOS, *request.stop_ids} & set(tokens[-1:]):
            tokens += ids(self.texts[sample][self._done[sample]])
            self._done[sample] += 1
        call, count = self._calls[sample], len(tokens)
        self._calls[sample] += 1
        width = self.width(call)
        return Rollout(
            sample_id=sample,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(tokens, np.int32),
            mixture_logprobs=np.full(count, -1.0 - call, np.float32),
            student_logprobs=np.full(count, -2.0, np.float32),
            student_versions=np.full(count, 3 + call, np.int32),
            alpha=request.alpha,
            finish_reason=request.finish_reason(tokens, (EOS,)),
            teacher=self.teacher(call),
            teacher_logprobs=np.full(count, -3.0, np.float32),
            support_ids=np.tile(np.arange(width, dtype=np.int32), (count, 1)),
            support_logprobs=np.full((count, width), -4.0, np.float32),
            tail_logprobs=np.full(count, -5.0, np.float32),
            more={"extra": np.ones(count, np.float32)},
        )


class Upper:
    """Writes the last word of a turn that ends with `!` in capitals; asked after `?` too, it has nothing to say."""

    pauses = "!?"

    def __init__(self, settings: Any = None) -> None: ...

    def start(self, prompt: Prompt, seed: int) -> Upper:
        return self

    def reply(self, turn: str) -> Reply | None:
        words = turn.rstrip("!?").split()
        return Reply(words[-1].upper(), last=words[-1] == "stop") if turn.endswith("!") else None


class UpperSettings(EnvironmentSettings):
    implementation = f"{__name__}:Upper"


def settings(**values: Any) -> EnvironmentSettings:
    return UpperSettings(**{"type": "upper", "max_turns": 3, "max_reply_tokens": 5} | values)


PROMPTS = [Prompt(7, np.array(ids("say: "), np.int32))]


async def played(texts: str | dict[int, str], sampler: Written | None = None, limit: int = 20, **values: Any) -> list[Rollout]:
    texts = {0: texts} if isinstance(texts, str) else texts
    source = sampler or Written(texts)
    source.texts = texts
    wrapped = in_environment(source, settings(**values), TOKENIZER, VOCAB, PROMPTS)
    requests = [SampleRequest(each, 7, PROMPTS[0].token_ids, 0.3, seed=each, max_new_tokens=limit) for each in texts]
    return [rollout async for part in wrapped.sample(requests) for rollout in part]


def shown(rollout: Rollout) -> str:
    """The text, with what the environment wrote in brackets."""
    tokens = zip(rollout.token_ids, rollout.is_target, strict=True)
    pieces = [TOKENIZER.decode([i]) if drawn else f"[{TOKENIZER.decode([i])}]" for i, drawn in tokens]
    return "".join(pieces).replace("][", "").replace("<eos>", "$")


@pytest.mark.parametrize(
    ("text", "result", "reason"),
    [
        ("no call$", "no call$", "stop"),
        ("hi!go on$", "hi![HI]go on$", "stop"),
        ("a!b!c$", "a![A]b![B]c$", "stop"),
        ("a? and b!c$", "a? and b![B]c$", "stop"),
        ("a!" + "b" * 30, "a![A]" + "b" * 18, "length"),
        ("b" * 19 + "!", "b" * 19 + "!", "length"),
        ("b" * 18 + "?c", "b" * 18 + "?c", "length"),
        ("stop!", "stop![STOP]", "ended"),
        ("a!b!c!d$", "a![A]b![B]c![C]", "length"),
        ("longer!x$", "longer!", "length"),
    ],
)
async def test_turns_and_what_ends_them(text: str, result: str, reason: str) -> None:
    (rollout,) = await played(text)
    assert (shown(rollout), rollout.finish_reason) == (result, reason)
    drawn = result if "[" not in result else "".join(part.rpartition("]")[2] for part in result.split("["))
    assert rollout.num_targets == len(drawn) <= 20


async def test_columns_of_context_and_of_draws() -> None:
    source = Written({}, width=lambda call: 2 + call)
    (rollout,) = await played("hi!x?yo$", source)
    assert shown(rollout) == "hi![HI]x?yo$"
    environment = WRITERS.index("environment")
    assert rollout.writer.tolist() == [0] * 3 + [environment] * 2 + [0] * 5
    assert rollout.mixture_logprobs is not None
    assert rollout.mixture_logprobs.tolist() == [-1] * 3 + [0] * 2 + [-2] * 2 + [-3] * 3
    assert rollout.student_versions.tolist() == [3] * 5 + [4] * 2 + [5] * 3
    assert rollout.oldest_version == 3
    assert rollout.support_ids is not None
    assert rollout.support_ids[:, :3].tolist() == [[0, 1, -1]] * 3 + [[-1] * 3] * 2 + [[0, 1, 2]] * 5
    assert rollout.support_logprobs is not None
    assert np.isneginf(rollout.support_logprobs[:5, 2]).all()
    assert rollout.prompt_ids.tolist() == ids("say: ")
    batch = rollouts_to_batch([rollout], step=6)
    assert batch.num_target_tokens == 8 == rollout.num_targets
    np.testing.assert_array_equal(batch.loss_mask[0, 5:], rollout.is_target)
    found = batch_metrics([rollout], 5)
    assert (found["response_tokens"], found["turns"], found["environment_tokens"]) == (8.0, 2.0, 2.0)
    assert found["staleness_max"] == 2.0


async def test_every_draw_continues_all_before_it_with_a_seed_of_its_own() -> None:
    source = Written({})
    await played({0: "hi!x?yo$", 1: "a$"}, source)
    own = [request for request in source.asked if request.sample_id == 0]
    assert [TOKENIZER.decode(request.prompt_ids) for request in own] == ["say: ", "say: hi!HI", "say: hi!HIx?"]
    assert [request.max_new_tokens for request in own] == [20, 17, 15]
    assert own[0].seed == 0
    assert len({request.seed for request in own}) == 3
    assert {request.stop_ids for request in source.asked} == {tuple(sorted(ids("!?")))}
    again = Written({})
    await played({0: "hi!x?yo$"}, again)
    assert [request.seed for request in again.asked] == [request.seed for request in own]


async def test_a_rollout_of_two_teachers_is_scored_by_none() -> None:
    (rollout,) = await played("a!b$", Written({}, teacher=lambda call: f"teacher{call}"))
    assert rollout.teacher == ""
    assert rollout.teacher_logprobs is None
    assert rollout.support_ids is None
    assert rollout.mixture_logprobs is not None


async def test_rollouts_come_once_in_the_order_they_end() -> None:
    found = await played({each: "a!" * (each % 3) + "b$" for each in range(12)})
    assert sorted(rollout.sample_id for rollout in found) == list(range(12))
    turns = [rollout.sample_id % 3 for rollout in found]
    assert turns == sorted(turns)


async def test_the_draws_after_a_reply_have_the_models_distribution() -> None:
    """With one seed for all draws, what follows a reply would depend on the random number that led to the call."""
    rows = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).double()
    rows[ids("!")[0]] = 3.0
    chance = rows.softmax(-1).numpy()

    class Table:
        async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
            for request in requests:
                u = uniforms(np.full(request.max_new_tokens, request.seed, np.uint64), np.arange(request.max_new_tokens))
                tokens = np.searchsorted(chance.cumsum(), u).astype(np.int32)
                stops = np.flatnonzero(np.isin(tokens, [EOS, *request.stop_ids]))
                tokens = tokens[: stops[0] + 1] if len(stops) else tokens
                blank = np.zeros(len(tokens), np.float32)
                reason = request.finish_reason(tokens, (EOS,))
                versions = np.zeros(len(tokens), np.int32)
                sample, prompt = request.sample_id, request.prompt_id
                yield [Rollout(sample, prompt, request.prompt_ids, tokens, blank, blank, versions, 0.0, reason)]

    class Always:
        pauses = "!"

        def start(self, prompt: Prompt, seed: int) -> Always:
            return self

        def reply(self, turn: str) -> Reply:
            return Reply("x")

    text = TurnText.of(TOKENIZER, VOCAB, "!", "test")
    sampler = EnvironmentSampler(Table(), Always(), settings(), text, {7: PROMPTS[0]})
    requests = [SampleRequest(each, 7, PROMPTS[0].token_ids, 0.0, seed=each, max_new_tokens=6) for each in range(4000)]
    after = []
    async for part in sampler.sample(requests):
        for rollout in part:
            places = np.flatnonzero(~rollout.is_target) + 1
            after += rollout.token_ids[places[places < len(rollout.token_ids)]].tolist()
    counts = np.bincount(after, minlength=VOCAB)
    expected = chance * len(after)
    assert len(after) > 1500
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected + 1)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" !", r"rollout\.environment\.type=upper on prompt 7, sample 0: IndexError: list index out of range"),
        ("\x7f!", r"sample 0: its reply '\\x7f' has characters that the student's tokenizer does not know"),
    ],
)
async def test_a_failing_environment_is_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if text[0] == "\x7f":
        monkeypatch.setattr(Upper, "reply", lambda self, turn: Reply("\x7f"))
        text = "a!"
    with pytest.raises(ResponseError, match=message):
        await played(text)


@pytest.mark.parametrize(
    ("pauses", "message"),
    [("", "it has to name ASCII"), ("=é", "it has to name ASCII"), ("=\x01", "no token of the student's")],
)
def test_characters_that_no_token_holds_are_refused(pauses: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Upper, "pauses", pauses)
    with pytest.raises(ConfigError, match=rf"rollout\.environment\.type=upper: .*{message}"):
        check_environment(settings(), TOKENIZER, VOCAB, PROMPTS)


def test_tokens_of_several_characters_pause_where_one_of_them_does() -> None:
    class Pieces:
        all_special_ids = (0,)
        texts = ("<=>", "a", "==", " =5", ">>", "b")

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
            return [self.texts[row[0]] for row in rows]

    assert TurnText.of(Pieces(), 6, "=", "x").pause_ids == (2, 3)
    assert TurnText.of(Pieces(), 3, "=", "x").pause_ids == (2,)


def test_an_environment_that_cannot_start_is_refused_at_once() -> None:
    game = parse({"environment": "subtraction_game"}).rollout.environment
    assert game is not None
    with pytest.raises(ConfigError, match="subtraction_game cannot start from prompt 7: ValueError: .*names no pile"):
        check_environment(game, TOKENIZER, VOCAB, PROMPTS)
    line = check_environment(settings(), TOKENIZER, VOCAB, PROMPTS)
    assert "asked after each of the 2 tokens with '!' or '?'; at most 3 turns, with up to 5 tokens after each" in line


# ------------------------------------------------------------------------------------------------------------ config


def parse(rollout: dict[str, Any], **sections: Any) -> Any:
    tree = {"run": {"name": "x"}, "student": {"model": {"type": "tiny"}}, "teachers": {"main": {"model": {"type": "tiny"}}}}
    return parse_config(tree | {"rollout": rollout} | sections)


def test_the_longest_row_includes_what_the_environment_writes() -> None:
    config = parse({"environment": {"type": "calculator", "max_turns": 3, "max_reply_tokens": 10}, "max_new_tokens": 24})
    assert config.rollout.max_response_tokens == 54
    assert config.max_model_len == 256 + 54
    with pytest.raises(ConfigError, match=r"micro_batch_tokens=300 .*max_turns x max_reply_tokens = 310; raise it to 310"):
        parse(config.rollout.model_dump(mode="json"), training={"micro_batch_tokens": 300})
    assert parse({"environment": "calculator"}).dump() == parse({"environment": {"type": "calculator"}}).dump()


@pytest.mark.parametrize(
    ("rollout", "sections", "message"),
    [
        ({"program": {"type": "direct"}, "alpha": 1.0}, {"loss": {"type": "sequence"}}, "a program keeps its final answer"),
        ({"sampler": "student"}, {"loss": {"type": "uld"}}, "reach from the environment's into the student's"),
        (
            {"alpha": 1.0},
            {"teachers": {"main": {"type": "capture", "path": "x"}}, "loss": {"type": "forward_kl"}},
            r"teachers\.main\.type=capture .*recorded answers were given without an environment",
        ),
        (
            {"alpha": 1.0},
            {"teachers": {"main": {"type": "openai", "base_url": "http://x/v1", "model": "m"}}, "loss": {"type": "sequence"}},
            r"teachers\.main\.type=openai .*in one piece.*rollout\.sampler=student",
        ),
    ],
)
def test_what_cannot_have_an_environment_is_refused_by_name(
    rollout: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(rollout | {"environment": "calculator"}, **sections)


def test_an_unknown_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.environment\.type='calculater': .*did you mean `calculator`\?"):
        parse({"environment": "calculater"})


def test_a_capture_has_no_turns() -> None:
    from cluster.capture_run import check_capturable

    with pytest.raises(ConfigError, match=r"rollout\.environment\.type=calculator: a capture holds answers of one turn"):
        check_capturable(parse({"environment": "calculator", "alpha": 1.0}, loss={"type": "forward_kl"}))


def test_finished_keeps_what_the_environment_ended(tmp_path: Path) -> None:
    from kdray.config import FilterSettings
    from kdray.rollouts.filters import Filters

    blank = np.zeros(1, np.float32)
    rollout = Rollout(
        0, 7, PROMPTS[0].token_ids, np.array(ids("a"), np.int32), blank, blank, np.zeros(1, np.int32), 0.0, "stop"
    )
    filters = Filters(FilterSettings(), TOKENIZER.decode, None, {7: PROMPTS[0]})
    rollouts = [replace(rollout, sample_id=i, finish_reason=reason) for i, reason in enumerate(("stop", "ended", "length"))]
    assert filters(rollouts) == {2: "finished"}
