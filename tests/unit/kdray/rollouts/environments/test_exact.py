"""A world of turns that can be enumerated: what the losses make of it is the gradient of the divergence over whole rollouts."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch

from kdray.config import ForwardKLLoss, LossSettings, MiniLLMLoss, PerDecisionLoss, ReverseKLLoss, VOPDLoss
from kdray.config.environments import EnvironmentSettings
from kdray.losses import LossBatch, loss_function
from kdray.rollouts.batching import rollouts_to_batch
from kdray.rollouts.environments import EnvironmentSampler, Reply, TurnText
from kdray.types import Prompt, Rollout, SampleRequest

torch.set_num_threads(1)

VOCAB, DRAWN, EOS, CALL, PARAMETERS = 5, 3, 0, 1, 9
REPLIES = {(2,): 0.3, (3, 4): 0.7}
"""What the environment writes after CALL, with which probability."""
EXACT = PerDecisionLoss(type="per_decision")
PUBLISHED = MiniLLMLoss(length_norm=False)


@dataclass(frozen=True)
class Path:
    """A rollout that can happen: its tokens, which of them were drawn, and the environment's share of its probability."""

    tokens: tuple[int, ...] = ()
    drawn: tuple[bool, ...] = ()
    chance: float = 1.0

    def then(self, tokens: Sequence[int], drawn: bool, chance: float = 1.0) -> Path:
        return Path((*self.tokens, *tokens), (*self.drawn, *[drawn] * len(tokens)), self.chance * chance)

    def replies(self) -> list[tuple[int, ...]]:
        parts = itertools.groupby(zip(self.tokens, self.drawn, strict=True), key=lambda pair: pair[1])
        return [tuple(token for token, _ in part) for drawn, part in parts if not drawn]


def paths(path: Path = Path()) -> Iterator[Path]:
    for token in range(VOCAB):
        longer = path.then([token], drawn=True)
        full = sum(longer.drawn) == DRAWN
        answered = [longer.then(reply, False, chance) for reply, chance in REPLIES.items()] if token == CALL else [longer]
        for each in answered:
            if token == EOS or full:
                yield each
            else:
                yield from paths(each)


class World:
    """Teacher and student as free rows at every prefix; the student's are linear in the same parameters."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.paths = list(paths())
        prefixes = sorted({path.tokens[:t] for path in self.paths for t in range(len(path.tokens))})
        self.at = {prefix: row for row, prefix in enumerate(prefixes)}
        self.features = torch.tensor(rng.normal(size=(len(prefixes), VOCAB, PARAMETERS)) * 0.6)
        self.theta = torch.tensor(rng.normal(size=PARAMETERS))
        self.teacher = torch.tensor(rng.normal(size=(len(prefixes), VOCAB))).log_softmax(-1)

    def student(self, theta: torch.Tensor) -> torch.Tensor:
        return (self.features @ theta).log_softmax(-1)

    def mixture(self, alpha: float) -> torch.Tensor:
        return (alpha * self.teacher.exp() + (1 - alpha) * self.student(self.theta).exp()).log()

    def chances(self, rows: torch.Tensor) -> torch.Tensor:
        """Probability of each path, the environment's part included."""
        return torch.stack([self.log_chance(rows, path).exp() * path.chance for path in self.paths])

    def log_chance(self, rows: torch.Tensor, path: Path) -> torch.Tensor:
        places = [(self.at[path.tokens[:t]], token) for t, token in enumerate(path.tokens) if path.drawn[t]]
        return torch.stack([rows[row, token] for row, token in places]).sum()

    @cached_property
    def exact_gradient(self) -> torch.Tensor:
        """Of KL(student || teacher) over whole rollouts, by central differences."""

        def divergence(theta: torch.Tensor) -> torch.Tensor:
            rows = self.student(theta)
            gaps = [self.log_chance(rows, path) - self.log_chance(self.teacher, path) for path in self.paths]
            return self.chances(rows) @ torch.stack(gaps)

        steps = torch.eye(PARAMETERS, dtype=torch.float64) * 1e-5
        return torch.stack([(divergence(self.theta + step) - divergence(self.theta - step)) / 2e-5 for step in steps])

    def part(self, path: Path, request: SampleRequest, alpha: float) -> Rollout:
        """The next draw of a path: up to the next token at which it stops."""
        start = len(request.prompt_ids) - 1
        assert tuple(request.prompt_ids[1:].tolist()) == path.tokens[:start], "the next draw continues another text"
        tokens: list[int] = []
        while len(tokens) < request.max_new_tokens and not {EOS, *request.stop_ids} & set(tokens[-1:]):
            assert path.drawn[start + len(tokens)]
            tokens.append(path.tokens[start + len(tokens)])
        rows = [self.at[path.tokens[: start + t]] for t in range(len(tokens))]

        def at_tokens(values: torch.Tensor) -> np.ndarray:
            return values[rows, tokens].numpy().astype(np.float32)

        ids = np.tile(np.arange(VOCAB, dtype=np.int32), (len(tokens), 1))
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(tokens, np.int32),
            mixture_logprobs=at_tokens(self.mixture(alpha)),
            student_logprobs=at_tokens(self.student(self.theta)),
            student_versions=np.zeros(len(tokens), np.int32),
            alpha=alpha,
            finish_reason=request.finish_reason(tokens, (EOS,)),
            teacher="toy",
            teacher_logprobs=at_tokens(self.teacher),
            support_ids=ids,
            support_logprobs=self.teacher[rows].numpy().astype(np.float32),
            tail_logprobs=np.full(len(tokens), -np.inf, np.float32),
        )

    async def rollouts(self, alpha: float) -> list[Rollout]:
        """Every path, through the sampler of environments."""
        world = self

        class Script:
            async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
                for request in requests:
                    yield [world.part(world.paths[request.sample_id], request, alpha)]

        class Answers:
            pauses = "1"

            def start(self, prompt: Prompt, seed: int) -> Any:
                replies = iter(world.paths[prompt.prompt_id].replies())

                class Episode:
                    def reply(self, turn: str) -> Reply:
                        return Reply("".join(map(str, next(replies))))

                return Episode()

        settings = EnvironmentSettings(type="script", max_turns=DRAWN + 1)
        prompts = {index: Prompt(index, np.zeros(1, np.int32)) for index in range(len(self.paths))}
        sampler = EnvironmentSampler(Script(), Answers(), settings, TurnText(Digits(), VOCAB, (CALL,)), prompts)
        requests = [SampleRequest(i, i, prompt.token_ids, alpha, 0, DRAWN) for i, prompt in prompts.items()]
        found = [rollout async for part in sampler.sample(requests) for rollout in part]
        return sorted(found, key=lambda rollout: rollout.sample_id)

    def expected_gradient(self, loss: LossSettings, rollouts: Sequence[Rollout], alpha: float) -> torch.Tensor:
        batch = LossBatch.from_train_batch(rollouts_to_batch(rollouts, step=1), VOCAB)
        # [rows, positions]; positions beyond a row's end point anywhere.
        prefix = torch.zeros(batch.token_ids.shape, dtype=torch.long)
        for row, path in enumerate(self.paths):
            for t in range(len(path.tokens)):
                prefix[row, t + 1] = self.at[path.tokens[:t]]
        logits = (self.features @ self.theta)[prefix].requires_grad_()
        (by_logit,) = torch.autograd.grad(loss_function(loss)(logits, batch, loss).total, logits)
        rows = torch.einsum("bsv,bsvd->bd", by_logit, self.features[prefix])
        return self.chances(self.mixture(alpha)) @ rows


class Digits:
    """A tokenizer whose ids are digits."""

    unk_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(map(str, token_ids))


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


@pytest.fixture(scope="module", params=[0, 1])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


async def test_the_world_has_turns_and_is_a_distribution(world: World) -> None:
    assert max(len(path.replies()) for path in world.paths) == DRAWN
    for rows in (world.teacher, world.student(world.theta), world.mixture(0.3)):
        assert float(world.chances(rows).sum()) == pytest.approx(1.0, abs=1e-12)
    for path, rollout in zip(world.paths, await world.rollouts(0.3), strict=True):
        assert tuple(rollout.token_ids.tolist()) == path.tokens
        assert tuple(rollout.is_target.tolist()) == path.drawn
        assert rollout.prompt_ids.tolist() == [0]
        assert rollout.finish_reason == ("stop" if path.tokens[-1] == EOS else "length")


@pytest.mark.parametrize(
    ("loss", "alpha"),
    [
        (EXACT, 0.0),
        (EXACT, 0.4),
        (PUBLISHED, 0.0),
        (MiniLLMLoss(length_norm=False, single_step=False), 0.0),
        (VOPDLoss(type="vopd", gamma=1.0), 0.0),
    ],
    ids=lambda value: getattr(value, "type", str(value)),
)
async def test_losses_over_responses_are_unbiased(world: World, loss: LossSettings, alpha: float) -> None:
    """The environment's tokens are part of what happens, and of no weight, return or gradient."""
    rollouts = await world.rollouts(alpha)
    exact = world.exact_gradient
    assert error(world.expected_gradient(loss, rollouts, alpha), exact) < 1e-5
    # As if the model had drawn them: the test would notice.
    drawn = [replace(rollout, writer=np.zeros_like(rollout.writer)) for rollout in rollouts]
    assert error(world.expected_gradient(loss, drawn, alpha), exact) > 0.05


@pytest.mark.parametrize("loss", [ReverseKLLoss(type="reverse_kl"), ForwardKLLoss(type="forward_kl")])
async def test_divergences_are_those_of_the_drawn_positions(world: World, loss: LossSettings) -> None:
    """By state: the chance of coming to a prefix at which the model draws, times the gradient there."""
    theta = world.theta.clone().requires_grad_()
    p, q = world.teacher, world.student(theta)
    ahead, behind = (q, p) if loss.type == "reverse_kl" else (p, q)
    divergences = (ahead.exp() * (ahead - behind)).sum(-1)
    visits = torch.zeros(len(world.at), dtype=torch.float64)
    for path, chance in zip(world.paths, world.chances(world.mixture(0.4)), strict=True):
        for t, drawn in enumerate(path.drawn):
            visits[world.at[path.tokens[:t]]] += chance * drawn
    (expected,) = torch.autograd.grad((visits * divergences).sum(), theta)
    assert error(world.expected_gradient(loss, await world.rollouts(0.4), 0.4), expected) < 1e-5
