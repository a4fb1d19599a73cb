"""The data's answers among what models draw: who writes which sample, and the teacher's columns for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdray.data.dataset import PromptStream
from kdray.errors import DataError
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.draw import LoopSettings, sample_request
from kdray.rollouts.reference_answers import WithReferences
from kdray.types import Prompt, Reference, Rollout, SampleRequest
from tests.support.fakes import EOS, FakeScorer, Rig, make_prompts


class Digits:
    """A tokenizer of digits: each is its own id."""

    eos_token_id = EOS

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}


def answered(prompts: list[Prompt]) -> list[Prompt]:
    return [Prompt(prompt.prompt_id, prompt.token_ids, answer="012"[: 1 + prompt.prompt_id % 3]) for prompt in prompts]


def settings(**shares: float) -> LoopSettings:
    fixed = {"steps": 4, "batch_size": 64, "max_new_tokens": 6, "samples_per_prompt": 1, "max_staleness": 1}
    return LoopSettings(seed=5, alpha=0.2, checkpoint_every=0, evaluate_every=0, **fixed, **shares)


def test_who_writes_a_sample_follows_its_id_and_the_shares() -> None:
    prompts = PromptStream(make_prompts(), seed=0)

    def asked(values: dict[str, float], **shares: float) -> list[SampleRequest]:
        return [sample_request(settings(**shares), prompts, i, 0, values) for i in range(4000)]

    requests = asked({}, data_share=0.3, teacher_share=0.5)
    alphas, writers = (np.array([getattr(request, name) for request in requests]) for name in ("alpha", "writer"))
    assert (writers == "data").mean() == pytest.approx(0.3, abs=0.025)
    assert (writers == "teacher").mean() == pytest.approx(0.35, abs=0.025)
    assert (writers == "mixture").mean() == pytest.approx(0.35, abs=0.025)
    # Teacher's share of each draw, a plain number where there is none.
    assert {name: set(alphas[writers == name]) for name in set(writers)} == {"data": {0}, "teacher": {1}, "mixture": {0.2}}
    # A schedule moves only as many samples as it must.
    more = asked({"rollout.data_share": 0.4}, data_share=0.3, teacher_share=0.5)
    assert {request.writer for request, before in zip(more, writers, strict=True) if before == "data"} == {"data"}
    assert {(request.alpha, request.writer) for request in asked({"rollout.alpha": 0.7})} == {(0.7, "mixture")}
    assert {request.writer for request in asked({"rollout.alpha": 0.0})} == {"student"}
    assert {request.writer for request in asked({}, data_share=1.0)} == {"data"}


@pytest.mark.parametrize("scored_later", [False, True])
async def test_references_and_draws_come_once_with_the_teachers_columns(tmp_path: Path, scored_later: bool) -> None:
    rig = Rig(tmp_path)
    prompts = answered(make_prompts())
    rig.sampler.scored = not scored_later
    scorer = FakeScorer(rig.world, rig.history)
    route = WithReferences(rig.sampler, None if scored_later else scorer, prompts, Digits(), limit=6)
    requests = [
        SampleRequest(i, 10 + i % 7, prompts[i % 7].token_ids, 0.3, i, 6, writer="data" if i % 2 else "mixture")
        for i in range(12)
    ]
    found: dict[int, Rollout] = {}
    async for part in route.sample(requests):
        for rollout in part:
            assert rollout.sample_id not in found
            found[rollout.sample_id] = rollout
    assert set(found) == set(range(12))
    for i, rollout in found.items():
        assert rollout.writers == (("data",) if i % 2 else ("mixture",))
        assert rollout.alpha == (0.0 if i % 2 else 0.3)
        assert (rollout.teacher_logprobs is None) == scored_later
        if i % 2:
            assert rollout.token_ids.tolist() == [*range(1 + (10 + i % 7) % 3), EOS]
            assert rollout.student_logprobs is None
            assert rollout.mixture_logprobs is None
    if not scored_later:
        rollout = found[1]
        before = [int(rollout.prompt_ids[-1]), *rollout.token_ids[:-1]]
        wanted = [float(rig.world.teacher(int(b))[int(t)]) for b, t in zip(before, rollout.token_ids, strict=True)]
        assert rollout.teacher_logprobs == pytest.approx(wanted)


async def test_a_whole_run_on_data_alone_asks_no_sampler(tmp_path: Path) -> None:
    rig = Rig(tmp_path, data_share=1.0)
    asked = rig.sampler

    async def never(requests: object) -> object:
        raise AssertionError(f"asked for {requests}")
        yield

    rig.sampler = WithReferences(asked, FakeScorer(rig.world, rig.history), answered(make_prompts()), Digits(), 6)
    asked.sample = never
    rig.student._check = lambda batch, step: None  # its check wants every column
    await rig.run()
    size = rig.settings.batch_size
    assert [sample for sample, *_ in rig.student.trained] == list(range(rig.settings.steps * size))
    assert rig.ledger.check(rig.settings.steps, size) == (0, 0)


def test_a_longer_answer_is_refused_with_the_number_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rollout\.max_new_tokens=3, but the reference answer of prompt 11 has 4 tokens"):
        WithReferences(Rig(tmp_path).sampler, None, answered(make_prompts()), Digits(), limit=3)


async def test_earlier_turns_are_targets_and_what_lies_between_is_context(tmp_path: Path) -> None:
    """A conversation of two turns: the row begins at the first, and its prompt is shorter than the request's."""
    rig = Rig(tmp_path)
    ids = [np.array(part, np.int32) for part in ([0, 1], [2, 1, 0, 2, EOS])]
    reference = Reference(*ids, np.array([True, False, False, True, True]))
    prompt = Prompt(10, np.array([0, 1, 2, 1, 0], np.int32), answer="2", reference=reference)
    route = WithReferences(rig.sampler, FakeScorer(rig.world, rig.history), [prompt], Digits(), limit=2)
    request = SampleRequest(0, 10, prompt.token_ids, 0.3, 0, 6, writer="data")
    ((rollout,),) = [part async for part in route.sample([request])]
    assert rollout.prompt_ids.tolist() == [0, 1]
    assert rollout.token_ids.tolist() == [2, 1, 0, 2, EOS]
    assert rollout.writers == ("data", "environment")
    assert rollout.is_target.tolist() == [True, False, False, True, True]
    assert rollout.teacher_logprobs is not None
    batch = rollouts_to_batch([rollout], step=1)
    assert batch.loss_mask.tolist() == [[False, False, True, False, False, True, True]]
    with pytest.raises(DataError, match="max_new_tokens=1, but the reference answer of prompt 10 has 2 tokens"):
        WithReferences(rig.sampler, None, [prompt], Digits(), limit=1)
