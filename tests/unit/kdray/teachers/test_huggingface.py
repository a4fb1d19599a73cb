"""The in-process teacher against a tiny random Llama run plainly: one sequence a pass, NumPy for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from kdray.config import HFTeacherSettings, TinyModel
from kdray.errors import ConfigError, DataError, RequestRefused
from kdray.rollouts import columns
from kdray.rollouts.mixture import draw
from kdray.rollouts.seeds import sample_seed, uniforms
from kdray.teachers.huggingface import HFTeacher
from kdray.types import Rollout, SampleRequest

ROWS, VOCAB, EOS, TOP_K, POSITIONS = 13, 11, 3, 4, 24


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=ROWS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.6,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@asynccontextmanager
async def opened(source: Any, vocab_size: int = VOCAB, batch_size: int = 3, **changes: Any) -> AsyncIterator[HFTeacher]:
    source = str(source) if isinstance(source, Path) else source
    settings = HFTeacherSettings(type="hf", model=source, batch_size=batch_size)
    teacher = HFTeacher("near", settings, vocab_size, (EOS,), **({"teacher_top_k": TOP_K} | changes))
    try:
        yield teacher
    finally:
        await teacher.close()


def requests(count: int, max_new_tokens: int = 6) -> list[SampleRequest]:
    """Prompts of 1 to 5 tokens."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, VOCAB, size=1 + index % 5).astype(np.int32) for index in range(count)]
    return [
        SampleRequest(index, 100 + index, prompt, 1.0, sample_seed(7, "train", index), max_new_tokens, min_version=5)
        for index, prompt in enumerate(prompts)
    ]


async def read(stream: AsyncGenerator[list[Rollout]]) -> list[Rollout]:
    async with aclosing(stream):
        return sorted([rollout async for part in stream for rollout in part], key=lambda rollout: rollout.sample_id)


def distribution(model: LlamaForCausalLM, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Plain rows [T, VOCAB] in float64, renormalised over the shared ids."""
    with torch.no_grad():
        logits = model(torch.tensor(np.concatenate([prompt, tokens]))[None].long()).logits[0]
    rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens), :VOCAB].double().numpy()
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def close(found: Any, expected: Any) -> None:
    """Equal up to the rounding of float32 passes."""
    np.testing.assert_allclose(found, expected, atol=2e-5)


def check_columns(rollout: Rollout, rows: np.ndarray, asked: np.ndarray | None = None, width: int = TOP_K) -> None:
    """Every column against whole rows."""
    count = len(rollout.token_ids)
    assert rollout.teacher == "near"
    close(rollout.teacher_logprobs, rows[np.arange(count), rollout.token_ids])
    ids, logprobs, tail = rollout.support_ids, rollout.support_logprobs, rollout.tail_logprobs
    assert ids is not None
    assert logprobs is not None
    assert tail is not None
    assert ids.dtype == np.int32
    assert logprobs.dtype == tail.dtype == np.float32
    first = 0 if asked is None else asked.shape[1]
    assert ids.shape == logprobs.shape == (count, first + width)
    for step in range(count):
        best = np.argsort(-rows[step])[:width]
        given = [] if asked is None else asked[step].tolist()
        assert ids[step].tolist() == [*given, *(-1 if token in given else token for token in best)]
        used = ids[step] >= 0
        close(logprobs[step][used], rows[step][ids[step][used]])
        assert np.isneginf(logprobs[step][~used]).all()
        outside = np.setdiff1d(np.arange(VOCAB), ids[step])
        mass = np.exp(rows[step][outside]).sum()
        assert np.exp(tail[step]) == pytest.approx(mass, rel=1e-4, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- sample


async def test_sampled_rollouts_carry_the_teachers_law_and_end_where_they_should(model: LlamaForCausalLM, folder: Path) -> None:
    asked = requests(12)
    async with opened(folder) as teacher:
        rollouts = await read(teacher.sample(asked))
    assert [rollout.sample_id for rollout in rollouts] == list(range(12))
    for request, rollout in zip(asked, rollouts, strict=True):
        assert rollout.prompt_id == request.prompt_id
        np.testing.assert_array_equal(rollout.prompt_ids, request.prompt_ids)
        ended = np.flatnonzero(rollout.token_ids == EOS)
        assert len(rollout.token_ids) == (ended[0] + 1 if len(ended) else request.max_new_tokens)
        assert rollout.finish_reason == ("stop" if len(ended) else "length")
        assert rollout.student_versions.tolist() == [5] * len(rollout.token_ids)
        assert rollout.alpha == 1.0
        assert rollout.student_logprobs is rollout.reverse_kl is rollout.forward_kl is None
        np.testing.assert_array_equal(rollout.mixture_logprobs, rollout.teacher_logprobs)
        check_columns(rollout, distribution(model, rollout.prompt_ids, rollout.token_ids))
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


async def test_a_draw_ends_at_the_requests_own_ids(folder: Path) -> None:
    whole = {rollout.sample_id: rollout for rollout in await sampled(folder, requests(12))}
    stops = {sample: (int(rollout.token_ids[1]),) for sample, rollout in whole.items() if len(rollout.token_ids) > 2}
    asked = [replace(request, stop_ids=stops.get(request.sample_id, ())) for request in requests(12)]
    paused = [rollout for rollout in await sampled(folder, asked) if rollout.sample_id in stops]
    assert len(paused) > 6
    for rollout in paused:
        assert rollout.finish_reason == "pause"
        (stop,) = stops[rollout.sample_id]
        end = whole[rollout.sample_id].token_ids.tolist().index(stop) + 1
        np.testing.assert_array_equal(rollout.token_ids, whole[rollout.sample_id].token_ids[:end])


async def sampled(folder: Path, asked: list[SampleRequest]) -> list[Rollout]:
    async with opened(folder) as teacher:
        return await read(teacher.sample(asked))


async def test_tokens_are_the_inverse_cdf_at_the_hash_of_seed_and_position(model: LlamaForCausalLM, folder: Path) -> None:
    async with opened(folder) as teacher:
        rollouts = await read(teacher.sample(requests(12)))
    for rollout in rollouts:
        count = len(rollout.token_ids)
        seeds = np.full(count, sample_seed(7, "train", rollout.sample_id), dtype=np.uint64)
        where = torch.from_numpy(uniforms(seeds, np.arange(count)))
        expected = draw(torch.from_numpy(distribution(model, rollout.prompt_ids, rollout.token_ids)), where)
        assert rollout.token_ids.tolist() == expected.tolist()


async def test_drawn_tokens_follow_the_law(model: LlamaForCausalLM, folder: Path) -> None:
    prompt, count = np.array([4, 5], np.int32), 3000
    asked = [SampleRequest(index, 0, prompt, 1.0, sample_seed(1, "law", index), 1) for index in range(count)]
    async with opened(folder, batch_size=500) as teacher:
        drawn = [int(rollout.token_ids[0]) for rollout in await read(teacher.sample(asked))]
    expected = np.exp(distribution(model, prompt, np.array([0]))[0])
    assert chisquare(np.bincount(drawn, minlength=VOCAB), count * expected / expected.sum()).pvalue > 1e-3


async def test_batch_mates_and_their_padding_change_nothing_and_places_are_taken_again(folder: Path) -> None:
    asked = requests(9)
    async with opened(folder, batch_size=1) as teacher:
        alone = await read(teacher.sample(asked))
    async with opened(folder, batch_size=4) as teacher:
        stream = teacher.sample(asked)
        parts = [part async for part in stream]
        together = sorted((rollout for part in parts for rollout in part), key=lambda rollout: rollout.sample_id)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        close(one.teacher_logprobs, other.teacher_logprobs)
    # What ends early comes early: a rollout of one token does not wait for those of six beside it.
    lengths = [len(rollout.token_ids) for part in parts for rollout in part]
    assert lengths[0] == min(len(rollout.token_ids) for rollout in together[:4])


async def test_calls_side_by_side_each_get_their_own(folder: Path) -> None:
    asked = requests(8)
    async with opened(folder) as teacher:
        whole = await read(teacher.sample(asked))
        first, second, scored = await asyncio.gather(
            read(teacher.sample(asked[:4])),
            read(teacher.sample(asked[4:])),
            read(teacher.score([columns.unscored(rollout) for rollout in whole])),
        )
    for one, other, again in zip(whole, [*first, *second], scored, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        close(one.teacher_logprobs, again.teacher_logprobs)


# -------------------------------------------------------------------------------------------------------- score


def unscored(count: int = 5) -> list[Rollout]:
    """Responses of 0 to 4 tokens, of no model's, after prompts of other lengths."""
    rng = np.random.default_rng(2)
    found = []
    for index in range(count):
        tokens = rng.integers(0, VOCAB, size=index).astype(np.int32)
        blank, prompt = np.zeros(index, np.float32), rng.integers(0, VOCAB, size=5 - index % 4).astype(np.int32)
        found.append(Rollout(index, index, prompt, tokens, blank, blank, np.zeros(index, np.int32), 0.2, "length"))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
async def test_scored_columns_are_those_of_a_plain_pass(model: LlamaForCausalLM, folder: Path, batch_size: int) -> None:
    async with opened(folder, batch_size=batch_size) as teacher:
        rollouts = await read(teacher.score(unscored()))
    for given, rollout in zip(unscored(), rollouts, strict=True):
        np.testing.assert_array_equal(rollout.token_ids, given.token_ids)
        assert rollout.alpha == 0.2
        check_columns(rollout, distribution(model, rollout.prompt_ids, rollout.token_ids))


async def test_requested_ids_come_first_and_then_its_own_unless_told_not_to(model: LlamaForCausalLM, folder: Path) -> None:
    rng = np.random.default_rng(3)
    asked = [rng.permuted(np.tile(np.arange(VOCAB), (index, 1)), axis=1)[:, :3].astype(np.int32) for index in range(5)]
    for each in asked:
        each[:, 1:2][::2] = -1
    given = [replace(rollout, support_ids=ids) for rollout, ids in zip(unscored(), asked, strict=True)]
    async with opened(folder) as teacher:
        with_own = await read(teacher.score(given))
        without = await read(teacher.score(given, top_k=False))
    for ids, one, other in zip(asked, with_own, without, strict=True):
        rows = distribution(model, one.prompt_ids, one.token_ids)
        check_columns(one, rows, ids)
        check_columns(other, rows, ids, width=0)


async def test_a_support_of_all_ids_leaves_no_tail(folder: Path) -> None:
    async with opened(folder, teacher_top_k=50) as teacher:
        rollouts = await read(teacher.score(unscored()))
    for rollout in rollouts:
        assert rollout.support_ids is not None
        assert rollout.support_ids.shape[1] == VOCAB
        assert np.isneginf(rollout.tail_logprobs).all()  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- refusals


async def test_what_it_cannot_do_is_refused(folder: Path) -> None:
    (request,) = requests(1)
    async with opened(folder) as teacher:
        with pytest.raises(RequestRefused, match=r"samples at alpha 1, not 0\.2; set rollout\.alpha=1"):
            await read(teacher.sample([replace(request, alpha=0.2)]))
        with pytest.raises(RequestRefused, match=rf"may take {POSITIONS + 1} tokens, but .* holds {POSITIONS}"):
            await read(teacher.sample([replace(request, max_new_tokens=POSITIONS)]))
        with pytest.raises(RequestRefused, match="empty prompt"):
            await read(teacher.sample([replace(request, prompt_ids=np.empty(0, np.int32))]))
        with pytest.raises(RequestRefused, match="empty prompt"):
            await read(teacher.score([replace(unscored()[4], prompt_ids=np.empty(0, np.int32))]))
        assert await read(teacher.sample([])) == await read(teacher.score([])) == []
        # A refusal breaks nothing.
        assert len(await read(teacher.sample([request]))) == 1


async def test_a_model_that_does_not_fit_is_found_by_check(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, vocab_size=ROWS + 1) as teacher:
        with pytest.raises(ConfigError, match=rf"teachers\.near\.model=.* has {ROWS} vocabulary rows, .* share {ROWS + 1} ids"):
            await teacher.check()
    async with opened(str(tmp_path / "nowhere")) as teacher:
        with pytest.raises(DataError, match="no such folder"):
            await teacher.check()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    async with opened(tmp_path) as teacher:
        with pytest.raises(ConfigError, match=r"teachers\.near\.model=.*cannot be loaded"):
            await teacher.check()


def test_a_tiny_model_is_built_where_it_is_told(tmp_path: Path) -> None:
    async def sample() -> list[Rollout]:
        async with opened(TinyModel(type="tiny", layers=1, width=32), vocab_size=50, cache=tmp_path) as teacher:
            return await read(teacher.sample(requests(1)))

    (rollout,) = asyncio.run(sample())
    assert len(rollout.token_ids) in range(1, 7)
    assert len(list(tmp_path.glob("tiny-*"))) == 1


def test_settings_know_their_type_and_refuse_others() -> None:
    assert HFTeacherSettings(type="hf", model="some/model").batch_size == 16
    with pytest.raises(ValidationError):
        HFTeacherSettings(type="hf", model="some/model", batch_size=0)
    with pytest.raises(ValidationError):
        HFTeacherSettings(type="vllm", model="some/model")  # type: ignore[arg-type]
