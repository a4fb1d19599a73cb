"""Supervised phases: training on reference answers step by step, with checkpoints from which a resume goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property

from cluster.checkpointing import CheckpointedStudent
from kdray.data.dataset import Prompt, PromptStream
from kdray.data.references import reference_of
from kdray.errors import Interrupted
from kdray.rollouts.batching import examples_to_batch
from kdray.runs.context import Checked
from kdray.runs.reporter import RunReporter
from kdray.types import StepReport, TrainBatch

_TITLES = {"sft": "the supervised phase", "finetune": "fine-tuning", "control": "the control"}


@dataclass(frozen=True)
class Answers:
    """Reference answers of a run's prompts, in the run's order."""

    checked: Checked

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return [prompt for prompt in self.checked.dataset.train if prompt.has_reference]

    def steps_for(self, tokens: float, size: int) -> int:
        """Number of steps, one at least, in which `size` answers each have as many target tokens on average."""
        tokenizer = self.checked.tokenizer
        mean = sum(reference_of(tokenizer, prompt).num_targets for prompt in self._prompts) / len(self._prompts)
        return max(1, math.ceil(tokens / (mean * size)))

    def batches(self, first: int, size: int) -> Callable[[int], TrainBatch]:
        """Batches of `size` answers by step, from 0 on. Args: first: the answer that step 0 begins with."""
        stream = PromptStream(self._prompts, self.checked.config.run.seed)

        def batch(step: int) -> TrainBatch:
            chosen = [stream.at(first + step * size + offset) for offset in range(size)]
            tokenizer = self.checked.tokenizer
            return examples_to_batch([(prompt.prompt_id, reference_of(tokenizer, prompt)) for prompt in chosen], step + 1)

        return batch


@dataclass(frozen=True)
class Steps:
    """Steps of a supervised phase that the ranks have started."""

    name: str
    count: int
    batch: Callable[[int], TrainBatch]
    """Batch of a step, from 0 on."""
    save: Callable[[int], Awaitable[None]]
    """Writes a checkpoint after so many steps."""
    every: int
    """Steps between checkpoints; 0 writes one only when the run is stopped."""
    on_step: Callable[[StepReport], None] = lambda report: None

    async def run(self, student: CheckpointedStudent, reporter: RunReporter, stop: asyncio.Event, done: int) -> None:
        """Train from step `done` on. Raises: Interrupted, after a checkpoint, once `stop` is set."""
        reporter.phase(self.name, self.count)
        for step in range(done, self.count):
            if stop.is_set():
                if step == done:
                    raise Interrupted("stopped before there was anything new to save; --resume goes on")
                await self.save(step)
                raise Interrupted(
                    f"stopped at step {step} of {_TITLES[self.name]} after writing a checkpoint; continue with --resume"
                )
            report = await student.train_step(self.batch(step))
            self.on_step(report)
            reporter.phase_step(report)
            reached = step + 1
            # The last one, too: what follows may take long.
            due = self.every and (reached % self.every == 0 or reached == self.count)
            if due or await student.should_save_early():
                await self.save(reached)
