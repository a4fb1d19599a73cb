"""Sample requests of a run, and their rollouts, sampled and scored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kdray.config import Config
from kdray.data.dataset import PromptStream
from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.merge import Merged
from kdray.rollouts.seeds import sample_seed, unit
from kdray.types import Rollout, SampleRequest, Writer


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the config that the training loop needs."""

    seed: int
    steps: int
    batch_size: int
    alpha: float
    max_new_tokens: int
    samples_per_prompt: int
    max_staleness: int
    checkpoint_every: int
    evaluate_every: int
    teacher_share: float = 0.0
    data_share: float = 0.0
    updates_per_step: int = 1
    inner_epochs: int = 1
    max_skipped: int = 3

    @classmethod
    def of(cls, config: Config) -> LoopSettings:
        return cls(
            seed=config.run.seed,
            steps=config.training.steps,
            batch_size=config.training.batch_size,
            alpha=config.rollout.alpha,
            max_new_tokens=config.rollout.max_new_tokens,
            samples_per_prompt=config.rollout.samples_per_prompt,
            max_staleness=config.rollout.max_staleness,
            checkpoint_every=config.training.checkpoint_every,
            evaluate_every=config.evaluation.every,
            teacher_share=config.rollout.teacher_share,
            data_share=config.rollout.data_share,
            updates_per_step=config.training.updates_per_step,
            inner_epochs=config.training.inner_epochs,
            max_skipped=config.training.max_skipped,
        )


def sample_request(
    settings: LoopSettings,
    prompts: PromptStream,
    sample_id: int,
    min_version: int = 0,
    values: Mapping[str, float] | None = None,
) -> SampleRequest:
    """Build the request of sample `sample_id`, identical in every run with the same settings and prompts.

    Args: values: scheduled settings of the step that trains it, by their full names.
    """
    alpha, teacher_share, data_share = (
        (values or {}).get(f"rollout.{name}", getattr(settings, name)) for name in ("alpha", "teacher_share", "data_share")
    )
    # A single draw selects the writer, so that a schedule moves as few samples as possible from one writer to another.
    chance = unit(settings.seed, "writer", sample_id)
    writer: Writer = "mixture"
    if chance < data_share:
        alpha, writer = 0.0, "data"
    elif chance < data_share + (1.0 - data_share) * teacher_share:
        alpha = 1.0
    prompt = prompts.at(sample_id // settings.samples_per_prompt)
    return SampleRequest(
        sample_id=sample_id,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        alpha=alpha,
        seed=sample_seed(settings.seed, "train", sample_id),
        max_new_tokens=settings.max_new_tokens,
        min_version=min_version,
        writer=writer,
    )


async def draw_scored(
    sampler: Sampler,
    scorer: Scorer | None,
    requests: Sequence[SampleRequest],
    on_sampled: Callable[[list[int]], Awaitable[None]] | None = None,
) -> AsyncGenerator[list[Rollout]]:
    """Stream the rollout of every request with the teacher's columns, which either the sampler or the scorer produced."""
    if scorer is None:
        async with aclosing(sampler.sample(requests)) as stream:
            async for rollouts in stream:
                yield rollouts
        return
    remaining = len(requests)
    async with Merged[str, list[Rollout]]() as merged:
        merged.add("sampled", sampler.sample(requests))
        async for made, rollouts in merged:
            if made == "sampled":
                if on_sampled is not None:
                    await on_sampled([rollout.sample_id for rollout in rollouts])
                merged.add("scored", scorer.score(rollouts))
            else:
                remaining -= len(rollouts)
                yield rollouts
    if remaining:
        raise EngineError(f"the scorer ended with {remaining} rollouts missing")
