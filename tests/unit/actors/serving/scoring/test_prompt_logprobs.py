"""Scoring by vLLM's own prompt logprobs: what is asked of vLLM, and what is read from its answer, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.serving.scoring.prompt_logprobs import MOST_IDS, Asked
from actors.serving.spec import EngineSpec
from kdray.errors import RequestRefused
from kdray.types import Rollout
from tests.support.plain_recorder import random_rows

VOCAB, PROMPT = 30, 3
V1 = EngineSpec("teacher", "", None, VOCAB, (1,), 64, scoring="prompt_logprobs", teacher_top_k=4)
V2 = replace(V1, model_runner="v2")


def rollout(tokens: int, listed: np.ndarray | None = None) -> Rollout:
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, VOCAB, PROMPT + tokens).astype(np.int32)
    blank, versions = np.zeros(tokens, np.float32), np.zeros(tokens, np.int32)
    made = Rollout(0, 0, ids[:PROMPT], ids[PROMPT:], blank, blank, versions, alpha=0.0, finish_reason="length")
    return replace(made, support_ids=listed)


class NewerEngine:
    """vLLM's answer to a request, from rows of log p, by the rules of its parameters (`SamplingParams`, 0.32)."""

    def __init__(self, rows: torch.Tensor, prompt: int) -> None:
        self.rows, self.prompt = rows, prompt

    def __call__(self, params: Any) -> Any:
        scores = None
        if (ids := params.prompt_logprob_token_ids) is not None:
            start = params.prompt_logprob_start
            assert len(ids) == self.prompt - 1 - start, "a row for each scored row of the prompt"
            assert ids.shape[1] <= 1 + MOST_IDS
            wanted = torch.from_numpy(ids).long()
            taken = self.rows[start : start + len(ids)].gather(1, wanted.clamp(min=0))
            scores = taken.masked_fill(wanted < 0, -torch.inf).numpy()
        chosen = params.allowed_token_ids[0]
        # The generated token's own comes first, and a shorter list of a batch is filled up.
        last = [chosen, *params.logprob_token_ids, 0, 0]
        values = [*self.rows[self.prompt - 1, last].tolist()[:-2], -np.inf, -np.inf]
        flat = SimpleNamespace(start_indices=[0], end_indices=[len(last)], token_ids=last, logprobs=values)
        return SimpleNamespace(prompt_token_id_logprobs=scores, outputs=[SimpleNamespace(logprobs=flat)])


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("width", [1, 5, VOCAB])
def test_log_p_at_listed_ids_is_that_of_the_rows(tokens: int, width: int) -> None:
    """From the first token of the response to the last, which vLLM generates; also where the first row begins the prompt."""
    rng = np.random.default_rng(width)
    listed = np.stack([rng.permutation(VOCAB)[:width] for _ in range(tokens)]).astype(np.int32)
    if width == 5:
        listed[:, -1] = -1
    # The id that a list is filled up with.
    listed[-1, 0] = 0
    if width == VOCAB:
        listed[-1] = np.arange(VOCAB)
    given = rollout(tokens, listed)
    asked = Asked.by(given, False, V2)
    rows = random_rows(PROMPT + tokens - 1, VOCAB, seed=1).teacher
    assert rows is not None
    params = asked.sampling_params()
    assert params.skip_reading_prefix_cache or tokens == 1
    found = asked.columns(NewerEngine(rows, PROMPT + tokens - 1)(params))
    own = rows[PROMPT - 1 :].numpy()
    place = np.arange(tokens)
    assert np.array_equal(found["teacher_logprobs"], own[place, given.token_ids])
    assert np.array_equal(found["support_ids"], listed)
    want = np.where(listed >= 0, np.take_along_axis(own, np.maximum(listed, 0), 1), -np.inf)
    assert np.array_equal(found["support_logprobs"], want)
    if width == VOCAB:
        assert found["tail_logprobs"][-1] == -np.inf
    else:
        assert np.allclose(np.exp(found["tail_logprobs"]), 1 - np.exp(want.astype(np.float64)).sum(1), atol=1e-6)


def test_a_token_alone_needs_no_ids() -> None:
    given = rollout(4)
    asked = Asked.by(given, False, V2)
    rows = random_rows(PROMPT + 3, VOCAB, seed=2).teacher
    assert rows is not None
    found = asked.columns(NewerEngine(rows, PROMPT + 3)(asked.sampling_params()))
    assert np.array_equal(found["teacher_logprobs"], rows[PROMPT - 1 :].numpy()[np.arange(4), given.token_ids])
    assert found["support_ids"].shape == (4, 0)
    assert np.allclose(found["tail_logprobs"], 0.0)


def test_the_teachers_own_top_ids_need_neither_runner() -> None:
    for spec in (V1, V2):
        params = Asked.by(rollout(4), True, spec).sampling_params()
        assert (params.prompt_logprobs, params.logprobs, params.prompt_logprob_token_ids) == (4, 4, None)


@pytest.mark.parametrize(
    ("spec", "width", "top_k", "message"),
    [
        (V1, 2, True, "set scoring=recorder, or model_runner=v2"),
        (V1, None, False, "set scoring=recorder, or model_runner=v2"),
        (V2, 2, True, "or log p at listed ones, not both; set scoring=recorder"),
        (V2, MOST_IDS + 1, False, "at 127 ids a token at most, and 128 are asked for; lower rollout.teacher_top_k"),
    ],
)
def test_what_vllm_does_not_give_is_refused(spec: EngineSpec, width: int | None, top_k: bool, message: str) -> None:
    listed = None if width is None else np.zeros((3, width), dtype=np.int32)
    with pytest.raises(RequestRefused, match=message):
        Asked.by(rollout(3, listed), top_k, spec)


def test_the_limit_is_vllms() -> None:
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

    assert MOST_IDS == MAX_LOGPROB_TOKEN_IDS - 1
