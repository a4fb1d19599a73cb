"""vLLM engine around the mixture model: token ids in, arrays out. Independent of Ray.

One class for the three kinds of replica: `mixture` (teacher and student, samples and scores in one pass), `teacher` (scores, or
samples alone at alpha 1), `student` (samples alone at alpha 0). All calls belong to one asyncio loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from actors.serving.engine_arguments import engine_arguments, set_environment
from actors.serving.scoring import prompt_logprobs
from actors.serving.scoring.gathered import GatheredScoring
from actors.serving.spec import EngineSpec
from actors.vllm_plugin.record_reader import RecordReader
from actors.vllm_plugin.record_table import Record
from kdray.errors import EngineError, RequestRefused
from kdray.models.resolve import model_name
from kdray.rollouts.columns import scored_columns, with_columns
from kdray.rollouts.race import Stopped, all_of, first_of, once
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import Rollout, SampleRequest

Result = TypeVar("Result")

_SCORED = frozenset(column.name for column in scored_columns())


class EngineRequest(NamedTuple):
    """A request to vLLM's engine."""

    key: str
    ids: list[int]
    params: Any
    """vLLM's SamplingParams."""


class TeacherEngine:
    """A vLLM engine. Call `start` before anything else, and `close` at the end."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.student_version = 0
        self.teacher_version = -1
        """Newest version of a changing teacher's weights; -1 for the weights loaded at start."""
        self._engine: Any = None
        self._update = asyncio.Lock()
        self._broken: str | None = None
        self._counter = 0
        self._cached_tokens = 0
        self.records = RecordReader(self._call)
        self._gathered = GatheredScoring(self._scored, spec.max_num_batched_tokens)

    async def start(self) -> None:
        """Load the models and start the engine process; seconds to minutes. Propagates vLLM's exceptions."""
        set_environment(self.spec)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(self.spec)))
        await self._reply(self._engine.collective_rpc("kdray_begin", args=(os.getpid(),)))
        await self._reply(self._engine.collective_rpc("kdray_attach"))

    async def close(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def check_health(self) -> None:
        """Check the engine. Raises: EngineError if it died or a weight update left it in an undefined state."""
        if self._broken:
            raise EngineError(self._broken)
        try:
            await self._engine.check_health()
        except Exception as error:
            raise EngineError(f"the engine of {self.spec.model} died: {error}") from error

    async def check_progress(self) -> None:
        """Return once the engine's workers respond, which they do between two steps.

        Raises: EngineError if they do not within `stuck_after_s`, or if tensor-parallel ranks drew different tokens. A hung
        engine process looks alive otherwise.
        """
        try:
            await asyncio.wait_for(self._worker_stats(), self.spec.stuck_after_s)
        except TimeoutError as error:
            raise EngineError(f"the engine has not answered for {self.spec.stuck_after_s:g} s") from error

    # ------------------------------------------------------------------------------------------- sample and score

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """Sample every request; each item holds the rollouts that finished together.

        The rollouts carry the teacher's columns if the engine holds a teacher. At alpha 0 a teacher beside the student does not
        take part in the draw, and scores it afterwards.
        Raises: EngineError for an alpha that this engine's role cannot sample with, or a request that does not fit.
        """
        for request in requests:
            self._check(request)
        stream = self._drawn(requests)
        if unscored := {each.sample_id: each.min_version for each in requests if self._student_only(each)}:
            stream = self._gathered.complete(stream, len(requests), unscored)
        async with aclosing(stream) as rollouts:
            async for part in rollouts:
                yield part

    def _student_only(self, request: SampleRequest) -> bool:
        """True if an engine with both models draws from the student alone, and scores afterwards."""
        # The newer runner tells the batch after the forward pass, in which the teacher has then taken part.
        rests = self.spec.role == "mixture" and self.spec.scoring == "recorder" and self.spec.model_runner == "v1"
        return rests and request.alpha == 0.0

    async def _drawn(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine_requests = []
        # Kept KV counts as that of the version under which its request began; its later parts may be newer.
        kept = {"kv_version": self.student_version} if self.spec.update_kv == "keep" else {}
        for request in requests:
            key = self._key(request.sample_id)
            draw = {"key": key, "mode": "sample", "alpha": request.alpha, "seed": request.seed}
            draw["student_only"] = self._student_only(request)
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_new_tokens,
                stop_token_ids=[*self.spec.stop_ids, *request.stop_ids],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"kdray": draw | kept},
            )
            engine_requests.append(EngineRequest(key, request.prompt_ids.tolist(), params))
        async with aclosing(self._finish(engine_requests)) as finished:
            async for ended in finished:
                yield [self._sampled(requests[index], *answer) for index, *answer in ended]

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """Fill in the teacher's columns of sequences sampled elsewhere, by prefill; streams like `sample`.

        The new support holds the rollout's `support_ids`, if any, in their order, and then the models' own top ids unless
        `top_k` is False. If the engine also holds the student, both exact KLs are filled in, under the version that it holds.
        """
        if self.spec.role == "student":
            raise RequestRefused("a student-only replica cannot score")
        plainly = self.spec.scoring == "prompt_logprobs"
        async with aclosing((self._scored_plainly if plainly else self._scored)(rollouts, top_k)) as scored:
            async for part in scored:
                yield [rollout for _, rollout in part]

    async def _scored(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[tuple[int, Rollout]]]:
        """Stream (index, rollout with the teacher's columns)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine_requests = []
        block_size = self._engine.vllm_config.cache_config.block_size
        for rollout in rollouts:
            key = self._key(rollout.sample_id)
            sequence = np.concatenate([rollout.prompt_ids, rollout.token_ids])
            start = len(rollout.prompt_ids)
            extra = {"key": key, "mode": "score", "start": start, "ids": _as_bytes(sequence), "top_k": top_k}
            if rollout.support_ids is not None and rollout.support_ids.shape[1]:
                extra |= {"asked": _as_bytes(rollout.support_ids), "width": rollout.support_ids.shape[1]}
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                detokenize=False,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                # Rows served from the prefix cache are not computed, and the last one of the prompt is needed.
                skip_reading_prefix_cache=start % block_size == 0,
                extra_args={"kdray": extra},
            )
            engine_requests.append(EngineRequest(key, sequence[:-1].tolist(), params))
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        async with aclosing(self._finish(engine_requests, lengths)) as finished:
            async for ended in finished:
                yield [
                    (index, with_columns(rollouts[index], _scores(record), teacher=self.spec.teacher))
                    for index, _, record in ended
                ]

    async def _scored_plainly(self, rollouts: Sequence[Rollout], top_k: bool) -> AsyncGenerator[list[tuple[int, Rollout]]]:
        asked = [prompt_logprobs.Asked.by(rollout, top_k, self.spec) for rollout in rollouts]
        engine_requests = [
            EngineRequest(self._key(rollout.sample_id), each.sequence[:-1].tolist(), each.sampling_params())
            for rollout, each in zip(rollouts, asked, strict=True)
        ]
        async with aclosing(self._outputs(engine_requests)) as outputs:
            async for ended in outputs:
                yield [
                    (index, with_columns(rollouts[index], asked[index].columns(output), teacher=self.spec.teacher))
                    for index, output in ended
                ]

    async def fingerprint(self) -> Fingerprint:
        """Identity of this engine's teacher, and its scores of the canary."""
        ids = np.asarray(self.spec.canary, dtype=np.int32)
        blank = np.zeros(len(ids) - 1, dtype=np.float32)
        versions = np.zeros(len(ids) - 1, dtype=np.int32)
        canary = Rollout(-1, -1, ids[:1], ids[1:], blank, blank, versions, alpha=0.0, finish_reason="length")
        ((scored,),) = [part async for part in self.score([canary])]
        assert scored.teacher_logprobs is not None
        if not np.isfinite(scored.teacher_logprobs).all():
            raise EngineError(
                f"teacher {self.spec.teacher}: log p of a test sequence is not finite; its weights or its dtype are broken: "
                f"try teachers.{self.spec.teacher}.dtype=float32"
            )
        return Fingerprint(
            # Folders may move; the canary identifies their contents.
            model=model_name(self.spec.model),
            revision=self.spec.revision,
            tokenizer=self.spec.tokenizer,
            vocab_size=self.spec.vocab_size,
            dtype=self.dtype,
            canary=self.spec.canary,
            scores=tuple(scored.teacher_logprobs.tolist()),
        )

    async def _finish(
        self, engine_requests: Sequence[EngineRequest], lengths: Sequence[int] | None = None
    ) -> AsyncGenerator[list[tuple[int, Any, Record]]]:
        """Run engine_requests and stream (index, output, record) of those that finished since the last item."""
        complete = False
        try:
            async with aclosing(self._outputs(engine_requests)) as outputs:
                async for batch in outputs:
                    wanted = [
                        (engine_requests[index].key, len(output.outputs[0].token_ids) if lengths is None else lengths[index])
                        for index, output in batch
                    ]
                    records = await self.records.read(wanted)
                    yield [(index, output, record) for (index, output), record in zip(batch, records, strict=True)]
            complete = True
        finally:
            if not complete and self._engine is not None:
                # The reader was closed or a request failed: the worker discards the remaining records.
                await self.records.drop([engine_request.key for engine_request in engine_requests])

    async def _outputs(self, engine_requests: Sequence[EngineRequest]) -> AsyncGenerator[list[tuple[int, Any]]]:
        """Run engine_requests and stream (index, output) of those that finished since the last item."""
        ended: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        async def follow(index: int) -> None:
            key, ids, params = engine_requests[index]
            final = None
            # Cached prefixes are those of requests that began under the same student; an update that drops them needs no name.
            prompt: dict[str, Any] = {"prompt_token_ids": ids}
            salt = [f"student version {self.student_version}"] if self.spec.update_kv == "keep" else []
            if _kdray_args(params).get("student_only"):
                # The teacher has written no keys and values for these tokens.
                salt.append("student only")
            if salt:
                prompt["cache_salt"] = ", ".join(salt)
            try:
                async for output in self._engine.generate(prompt, params, key):
                    final = output
                if final is not None and _lacks_rows(final, params):
                    again = params.clone()
                    again.skip_reading_prefix_cache = True
                    async for output in self._engine.generate(prompt, again, key):
                        final = output
            except Exception:
                await self.check_health()
                raise
            ended.put_nowait((index, final))

        tasks = [asyncio.create_task(follow(index)) for index in range(len(engine_requests))]
        # Kept for the whole stream: a failure while the reader is busy must not be missed.
        all_ended = asyncio.ensure_future(all_of(tasks))
        taken = 0
        try:
            while taken < len(engine_requests):
                batch = [await first_of(ended.get(), all_ended)]
                while not ended.empty():
                    batch.append(ended.get_nowait())
                taken += len(batch)
                self._cached_tokens += sum(output.num_cached_tokens or 0 for _, output in batch)
                yield batch
        finally:
            # Aborted if the reader was closed or a request failed.
            for task in (all_ended, *tasks):
                task.cancel()
            await asyncio.gather(all_ended, *tasks, return_exceptions=True)

    def _check(self, request: SampleRequest) -> None:
        if request.writer == "data":
            raise RequestRefused(f"sample {request.sample_id} is to be the data's own answer, which no replica holds")
        only = {"teacher": 1.0, "student": 0.0}.get(self.spec.role)
        if only is not None and request.alpha != only:
            raise RequestRefused(f"a {self.spec.role}-only replica samples at alpha {only:g}, not {request.alpha:g}")
        length = len(request.prompt_ids) + request.max_new_tokens
        if length > self.spec.max_model_len:
            raise RequestRefused(
                f"sample {request.sample_id}: prompt and response may take {length} tokens, "
                f"but the engine holds {self.spec.max_model_len}"
            )

    def _key(self, sample_id: int) -> str:
        # The same sample may be requested twice at once (a retry overtaking a lost stream); each is a separate request.
        self._counter += 1
        return f"{sample_id}-{self._counter}"

    def _sampled(self, request: SampleRequest, output: Any, record: Record) -> Rollout:
        tokens = np.asarray(output.outputs[0].token_ids, dtype=np.int32)
        if not np.array_equal(tokens, record["token_ids"]):
            raise EngineError(f"sample {request.sample_id}: the engine returned other tokens than the recorder drew")
        rollout = Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=tokens,
            mixture_logprobs=None,
            student_logprobs=None,
            student_versions=record["student_versions"],
            alpha=request.alpha,
            finish_reason=request.finish_reason(tokens, self.spec.stop_ids),
            teacher="" if self.spec.role == "student" else self.spec.teacher,
        )
        if self._student_only(request):
            record = {name: values for name, values in record.items() if name not in _SCORED}
        return with_columns(rollout, {**record, "token_ids": tokens})

    async def stats(self) -> dict[str, int]:
        """Counters since the start: forward passes (`steps`) and those that ran the teacher (`teacher_steps`), prompt tokens
        served from the prefix cache, requests preempted, records held."""
        return {"cached_tokens": self._cached_tokens, **(await self._worker_stats())}

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Answers of all workers to a call, in the order of their ranks. Raises: EngineError if the engine is dead."""
        try:
            return await self._reply(self._engine.collective_rpc(method, args=args))
        except Exception:
            await self.check_health()
            raise

    async def _reply(self, call: Awaitable[Result]) -> Result:
        """Result of a call, which vLLM leaves waiting for ever if its engine process dies. Raises: EngineError if it does."""
        try:
            return await first_of(call, once(lambda: self._engine.errored, every_s=1.0))
        except Stopped:
            raise EngineError(f"the engine of {self.spec.model} died") from None

    async def _worker_stats(self) -> dict[str, int]:
        """Counters of the first tensor-parallel rank. Raises: EngineError if the ranks drew different tokens."""
        first, *others = await self._call("kdray_stats")
        for rank, other in enumerate(others, start=1):
            if other["draws"] != first["draws"]:
                self._broken = (
                    f"tensor-parallel ranks 0 and {rank} of {self.spec.model} drew different tokens, so that nothing they "
                    f"computed since can be used; check that all {len(others) + 1} devices are of the same kind"
                )
                raise EngineError(self._broken)
        return first

    # --------------------------------------------------------------------------------------------------- weights

    async def update_student(self, paths: Sequence[Path], version: int) -> None:
        """Replace the student's weights by those in safetensors files; requests in flight continue under the new ones.

        Raises: EngineError if any step fails; the engine is unhealthy from then on.
        """
        if self.spec.role == "teacher":
            raise EngineError("a teacher-only replica holds no student")
        async with self._update:
            if version > self.student_version:
                await self._reload("student", version, "kdray_reload", ("student", [str(path) for path in paths], version))
                self.student_version = version

    async def update_teacher(self, paths: Sequence[Path], version: int) -> None:
        """Replace the weights of a teacher that changes during a run: an average of the student, or another student."""
        if self.spec.role == "student":
            raise EngineError("a student-only replica holds no teacher")
        async with self._update:
            if version > self.teacher_version:
                await self._reload("teacher", version, "kdray_reload", ("teacher", [str(path) for path in paths], version))
                self.teacher_version = version

    @property
    def num_workers(self) -> int:
        """Number of processes that hold a shard of the weights."""
        return self._engine.vllm_config.parallel_config.world_size

    async def connect_student(self, info: dict[str, Any]) -> None:
        """Make the workers join rank 0's communicator. Args: info: vLLM's init info of `spec.weight_transfer`."""
        await self._reply(self._engine.collective_rpc("kdray_connect", args=(self.spec.weight_transfer, info)))

    async def receive_student(self, info: dict[str, Any], version: int) -> None:
        """Same as `update_student`, from the communicator. Args: info: vLLM's update info."""
        async with self._update:
            await self._reload("student", version, "kdray_receive", (info, version))
            self.student_version = version

    async def _reload(self, which: Literal["student", "teacher"], version: int, method: str, args: tuple[Any, ...]) -> None:
        """Load new weights between two forward passes, by a method of the worker. The caller holds the lock.

        Without the pause a forward pass would see half-loaded weights. Without dropping cached and running KV, new weights
        attend to keys and values of the old ones, which `update_kv` allows for the student; a teacher's distribution does not
        change.
        """
        keeps_kv = which == "student" and self.spec.update_kv == "keep"
        try:
            await self._reply(self._engine.pause_generation(mode="keep", clear_cache=False))
            await self._reply(self._engine.collective_rpc(method, args=args))
            if not keeps_kv and not await self._reply(self._engine.reset_prefix_cache(reset_running_requests=True)):
                raise EngineError("vLLM did not drop its KV cache")
            await self._reply(self._engine.resume_generation())
        except asyncio.CancelledError:
            self._broken = f"update to {which} version {version} was given up"
            raise
        except Exception as error:
            self._broken = f"update to {which} version {version} failed: {error}"
            raise EngineError(self._broken) from error

    async def log_probabilities(self, ids: Sequence[int], which: Literal["student", "teacher"] = "student") -> np.ndarray:
        """log q, or log p, of every id but the first under the present weights, by prefill: float32 [len(ids) - 1]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        key = self._key(-1)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
            extra_args={"kdray": {"key": key, "mode": "score", "start": 1, "ids": _as_bytes(np.asarray(ids))}},
        )
        engine_request = EngineRequest(key, [int(token_id) for token_id in ids[:-1]], params)
        async with aclosing(self._finish([engine_request], [len(ids) - 1])) as finished:
            ((_, _, record),) = [answer async for part in finished for answer in part]
        return record[f"{which}_logprobs"]

    @property
    def dtype(self) -> str:
        """The engine's dtype, such as `float32`."""
        return str(self._engine.vllm_config.model_config.dtype).removeprefix("torch.")

    @property
    def kv_tokens(self) -> int:
        """Number of tokens whose keys and values the engine's cache holds."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    @property
    def graph_sizes(self) -> list[int]:
        """Batch sizes for which the engine captured graphs, as far as it samples that many; none if it captures none."""
        compilation = self._engine.vllm_config.compilation_config
        if compilation.cudagraph_mode.name == "NONE":
            return []
        return sorted(size for size in compilation.cudagraph_capture_sizes or () if size <= self.spec.max_num_seqs)

    @property
    def checked_sizes(self) -> list[int]:
        """Batch sizes at which the start compares what is recorded while sampling with prefill: those of captured graphs, and
        under vLLM's newer model runner always some, since its recorder is not yet tested on its device."""
        sizes = set(self.graph_sizes)
        if self.spec.model_runner == "v2":
            sizes |= {min(size, self.spec.max_num_seqs) for size in (1, 5)}
        return sorted(sizes)

    async def set_initial_version(self, version: int) -> None:
        """Set the version of the weights loaded at start."""
        await self._reply(self._engine.collective_rpc("kdray_set_version", args=(version,)))
        self.student_version = version


def _kdray_args(params: Any) -> Mapping[str, Any]:
    """Return the recorder's arguments of a request. Args: params: vLLM's SamplingParams."""
    return (getattr(params, "extra_args", None) or {}).get("kdray", {})


def _as_bytes(ids: np.ndarray) -> bytes:
    """Ids for the recorder: bytes pass vLLM's encoding unchanged, and a list of so many numbers would be slow."""
    return ids.astype(np.int32).tobytes()


def _lacks_rows(output: Any, params: Any) -> bool:
    """True if a scoring request found some of its response in the prefix cache, whose rows are then not computed."""
    start = _kdray_args(params).get("start")
    # The row of the token before the response predicts its first token.
    return start is not None and (output.num_cached_tokens or 0) > start - 1


def _scores(record: Record) -> Record:
    """The teacher's columns of a record; the sampling columns of given tokens stay unchanged."""
    return {name: values for name, values in record.items() if name in _SCORED}
