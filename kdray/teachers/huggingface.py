"""In-process teacher: a Hugging Face model in float32 on the CPU, for tests and tiny teachers.

It samples with the same hash of seed and position, and records the same columns, as the vLLM replica's recorder, so that both
give the same rollouts under the same weights, up to rounding. It holds no student, so it samples at alpha 1. Independent of
Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from kdray.config import HFTeacherSettings
from kdray.config.signals import Signal
from kdray.errors import ConfigError, RequestRefused
from kdray.interfaces import Availability
from kdray.models.attention import attention_arguments
from kdray.models.resolve import model_name, resolve_model
from kdray.models.vocab import tokenizer_hash
from kdray.rollouts.mixture import draw
from kdray.rollouts.seeds import uniforms
from kdray.teachers.fingerprint import Fingerprint
from kdray.teachers.kind import ModelKind, TeacherContext
from kdray.types import Rollout, SampleRequest

Result = TypeVar("Result")

Columns = dict[str, Any]
"""Arrays by Rollout field name: log p, support and tail of n positions, [n] or [n, K]."""


@dataclass
class _Draft:
    """A response during sampling."""

    request: SampleRequest
    token_ids: list[int] = field(default_factory=list)
    columns: list[Columns] = field(default_factory=list)  # one entry per token, each of one position

    @property
    def sequence(self) -> np.ndarray:
        return np.concatenate([self.request.prompt_ids, np.array(self.token_ids, dtype=np.int32)])


class HFKind(ModelKind[HFTeacherSettings]):
    """A Hugging Face model in the run's process."""

    def offers(self) -> frozenset[Signal]:
        return frozenset(("text", "references", "sampled", "top_k", "requested"))

    @property
    def in_flight(self) -> int:
        return self.settings.batch_size

    def open(self, context: TeacherContext) -> HFTeacher:
        return HFTeacher(
            self.name,
            self.settings,
            context.vocab_size,
            context.stop_ids,
            context.config.rollout.teacher_top_k,
            context.model_cache,
            tokenizer_hash(context.tokenizer),
        )


class HFTeacher:
    """A Teacher (`kdray.interfaces`). Call `close` at the end; without `check`, the first request loads the model."""

    def __init__(
        self,
        name: str,
        settings: HFTeacherSettings,
        vocab_size: int,
        stop_ids: Sequence[int],
        teacher_top_k: int,
        cache: Path = Path("runs", ".models"),
        tokenizer: str = "",
    ) -> None:
        """Args: vocab_size: ids that teacher and student share, rows beyond are cut before the softmax; stop_ids:
        end-of-sequence ids; cache: folder of tiny models, `<run.output>/.models`; tokenizer: hash of the student's, for the
        fingerprint.
        """
        self.name = name
        self.retried = 0
        """Always 0: no request leaves the process."""
        self.availability = Availability()
        """Always available: a failure here fails the request."""
        self._settings = settings
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._width = min(teacher_top_k, vocab_size)
        self._cache = cache
        self._tokenizer = tokenizer
        self._model: Any = None
        # A single thread, so that passes run one at a time whatever the number of callers, and a cancelled one ends before the
        # next.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"teacher-{name}")

    async def check(self) -> None:
        """Load the model. Raises: ConfigError if it cannot be loaded or has fewer rows than `vocab_size`; DataError if its
        folder holds no model.
        """
        if self._model is None:
            await self._in_worker(self._loaded)

    async def fingerprint(self, canary: Sequence[int]) -> Fingerprint:
        """See `LocalTeacher`."""
        ids = np.array(canary, dtype=np.int32)
        versions = np.zeros(len(ids) - 1, dtype=np.int32)
        sequence = Rollout(-1, -1, ids[:1], ids[1:], None, None, versions, alpha=0.0, finish_reason="length")
        ((scored,),) = [part async for part in self.score([sequence])]
        assert scored.teacher_logprobs is not None
        return Fingerprint(
            model=model_name(resolve_model(self._settings.model, self._cache)),
            revision=self._settings.revision,
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            dtype="float32",
            canary=tuple(canary),
            scores=tuple(scored.teacher_logprobs.tolist()),
        )

    async def close(self) -> None:
        """Stop the thread after the current pass, and free the model."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._model = None

    # ------------------------------------------------------------------------------------------- sample and score

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`: only the teacher samples, log m is log p, and the rollouts come scored.

        Raises: RequestRefused for an alpha other than 1, an empty prompt, or more tokens than the model holds.
        """
        await self.check()
        for request in requests:
            if request.alpha != 1.0:
                raise RequestRefused(
                    f"teachers.{self.name} holds no student: it samples at alpha 1, not {request.alpha:g}; set "
                    "rollout.alpha=1, or let the student sample (rollout.sampler=student)"
                )
            self._check_length(request.sample_id, len(request.prompt_ids), request.max_new_tokens)
        waiting = deque(_Draft(request) for request in requests)
        running: list[_Draft] = []
        while waiting or running:
            while waiting and len(running) < self._settings.batch_size:
                running.append(waiting.popleft())
            await self._in_worker(self._draw, running)
            ended = [draft for draft in running if self._has_ended(draft)]
            running = [draft for draft in running if not self._has_ended(draft)]
            if ended:
                yield [self._rollout(draft) for draft in ended]

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. The exact KLs, which need a student, are left unchanged.

        Raises: RequestRefused for an empty prompt, or more tokens than the model holds.
        """
        await self.check()
        for rollout in rollouts:
            self._check_length(rollout.sample_id, len(rollout.prompt_ids), len(rollout.token_ids))
        for start in range(0, len(rollouts), self._settings.batch_size):
            batch = rollouts[start : start + self._settings.batch_size]
            yield await self._in_worker(self._scored, batch, top_k)

    def _check_length(self, sample_id: int, prompt_tokens: int, response_tokens: int) -> None:
        if not prompt_tokens:
            raise RequestRefused(f"sample {sample_id}: an empty prompt gives the first token no logprob")
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and prompt_tokens + response_tokens > longest:
            raise RequestRefused(
                f"sample {sample_id}: prompt and response may take {prompt_tokens + response_tokens} tokens, but "
                f"teachers.{self.name}.model holds {longest}; lower data.max_prompt_tokens or rollout.max_new_tokens"
            )

    def _has_ended(self, draft: _Draft) -> bool:
        request = draft.request
        ends = draft.token_ids[-1] in self._stop_ids or draft.token_ids[-1] in request.stop_ids
        return ends or len(draft.token_ids) >= request.max_new_tokens

    def _rollout(self, draft: _Draft) -> Rollout:
        request = draft.request
        columns = {name: np.concatenate([part[name] for part in draft.columns]) for name in draft.columns[0]}
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(draft.token_ids, dtype=np.int32),
            mixture_logprobs=columns["teacher_logprobs"],
            student_logprobs=None,
            student_versions=np.full(len(draft.token_ids), request.min_version, dtype=np.int32),
            alpha=request.alpha,
            finish_reason=request.finish_reason(draft.token_ids, self._stop_ids),
            teacher=self.name,
            **columns,
        )

    # ------------------------------------------------------------------------------------------- on the worker thread

    async def _in_worker(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    def _loaded(self) -> Any:
        from transformers import AutoModelForCausalLM

        if self._model is None:
            source = resolve_model(self._settings.model, self._cache)
            where = f"teachers.{self.name}.model={source}"
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    source,
                    revision=self._settings.revision,
                    dtype=torch.float32,
                    trust_remote_code=False,
                    use_safetensors=True,
                    **attention_arguments(source, self._settings.revision),
                ).eval()
            except (OSError, ValueError) as error:
                raise ConfigError(f"{where}: cannot be loaded: {error}; name a causal language model") from error
            rows = model.config.get_text_config().vocab_size
            if rows < self._vocab_size:
                raise ConfigError(
                    f"{where} has {rows} vocabulary rows, but teacher and student share {self._vocab_size} ids; use a teacher "
                    "and a student of one family"
                )
            self._model = model
        return self._model

    @torch.inference_mode()
    def _draw(self, drafts: list[_Draft]) -> None:
        """Sample one more token for each draft."""
        # The whole sequences are recomputed for every token: a cache of right-padded prompts would leave gaps that models with
        # sliding windows or recurrent states count as tokens.
        rows = torch.cat(self._rows([draft.sequence for draft in drafts], [1] * len(drafts)))  # [n, vocab]
        seeds = np.array([draft.request.seed for draft in drafts], dtype=np.uint64)
        positions = np.array([len(draft.token_ids) for draft in drafts])
        tokens = draw(rows, torch.from_numpy(uniforms(seeds, positions)))
        columns = self._columns(rows, tokens, None, top_k=True)
        for index, draft in enumerate(drafts):
            draft.token_ids.append(int(tokens[index]))
            draft.columns.append({name: column[index : index + 1] for name, column in columns.items()})

    @torch.inference_mode()
    def _scored(self, rollouts: Sequence[Rollout], top_k: bool) -> list[Rollout]:
        # The row at position t - 1 predicts token t, so the last token is not an input.
        sequences = [np.concatenate([rollout.prompt_ids, rollout.token_ids[:-1]]) for rollout in rollouts]
        answers = []
        for rollout, rows in zip(rollouts, self._rows(sequences, [len(each.token_ids) for each in rollouts]), strict=True):
            tokens = torch.tensor(rollout.token_ids, dtype=torch.long)
            asked = None if rollout.support_ids is None else torch.tensor(rollout.support_ids, dtype=torch.long)
            answers.append(replace(rollout, teacher=self.name, **self._columns(rows, tokens, asked, top_k)))
        return answers

    def _rows(self, sequences: list[np.ndarray], counts: list[int]) -> list[torch.Tensor]:
        """Log-softmax rows [count, vocab] at the last `count` positions of every sequence, from one pass."""
        width = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
        logits = self._loaded()(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [rows, width, model's vocab]
        return [
            row[len(sequence) - count : len(sequence), : self._vocab_size].float().log_softmax(-1)
            for row, sequence, count in zip(logits, sequences, counts, strict=True)
        ]

    def _columns(self, rows: torch.Tensor, tokens: torch.Tensor, asked: torch.Tensor | None, top_k: bool) -> Columns:
        """Columns of rows [n, vocab] at tokens [n]. Args: asked: [n, M] ids to put first in the support; -1 is unused."""
        support = torch.empty((len(rows), 0), dtype=torch.long) if asked is None else asked
        if top_k:
            own = rows.topk(self._width, dim=-1).indices
            stands = (own.unsqueeze(-1) == support.unsqueeze(-2)).any(-1)
            support = torch.cat([support, own.masked_fill(stands, -1)], dim=-1)
        # Unused slots read and write an extra id without mass.
        padded = torch.nn.functional.pad(rows, (0, 1), value=-torch.inf)
        index = support.where(support >= 0, rows.shape[-1])
        return {
            "teacher_logprobs": rows.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).numpy(),
            "support_ids": support.to(torch.int32).numpy(),
            "support_logprobs": padded.gather(-1, index).numpy(),
            "tail_logprobs": padded.scatter(-1, index, -torch.inf).logsumexp(-1).numpy(),
        }
