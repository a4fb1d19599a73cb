"""Recorder of vLLM's newer model runner, V2: the draws and records of `actors.vllm_plugin.recorder`, which has V1's interface.

V2 names requests by slots, which it gives again without a word about the last owner, orders the rows of every step anew, and
lets a request that was preempted begin again in another slot. Tokens, prompts and lengths are in its own arrays; it tells the
batch after the forward pass, so that the teacher takes part in every step. Written from the sources of vLLM 0.32 and 0.33 (the
interface is the same in both), and compared with V1's recorder on tensors; it has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from actors.vllm_plugin.active_recorder import ActiveRecorder, request_args
from actors.vllm_plugin.batch_recorder import Chunk, Request
from actors.vllm_plugin.mixture_model import MixtureForCausalLM, register

register()


class _Count:
    """Number of tokens drawn for a request; V2 has no list of them on the host."""

    def __init__(self) -> None:
        self.tokens = 0

    def __len__(self) -> int:
        return self.tokens


class RecorderV2(ActiveRecorder, LogitsProcessor):
    """Logits processor, loaded by vLLM by name: `logits_processors=["actors.vllm_plugin.recorder_v2:RecorderV2"]`."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.states = req_states
        self.slots: dict[int, tuple[Request, _Count]] = {}
        """Latest owner of each slot, which may have finished: only slots of a step's batch are read."""
        self._requests: dict[int, Request] = {}
        """Row -> request of the latest step, of those that were drawn or scored."""
        self.begin(vllm_config, req_states.device)

    def attach(self, runner: Any) -> None:
        """Take the model runner. Raises: ValueError with the reasons why the recorder cannot follow it."""
        if found := obstacles(runner, self):
            raise ValueError(f"model_runner=v2: {'; '.join(found)}; or set model_runner=v1")
        super().attach(runner)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note the new owner of a slot. Returns: True if its rows are recorded."""
        args = request_args(sampling_params)
        if args is None:
            self.slots.pop(req_idx, None)
            return False
        self.batch.admit(args["key"], int(self.states.prefill_len.np[req_idx]))
        count = _Count()
        self.slots[req_idx] = Request.of(args, count), count
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Force every sampling request's row of `logits` [rows, vocab] to its sampled token; record sampling and scoring
        requests."""
        model = MixtureForCausalLM.active
        assert model is not None
        if len(logits) != len(ctx.idx_mapping_np):
            raise ValueError(
                f"{len(logits)} rows of {len(ctx.idx_mapping_np)} requests: the recorder draws one token a request and step; "
                "vLLM must not speculate: remove speculative_config from engine_args"
            )
        self._begin_step(ctx)
        if self._requests:
            assert model.rows is not None
            self.batch.sample(logits, model.rows, model.student_version)
        if self.batch.scoring:
            assert model.outputs is not None
            chunks = chunks_of(self.runner, ctx, [row for row, _ in self.batch.scoring])
            self.batch.score(model.outputs, chunks, model.log_rows, model.student_version)
        return logits

    def _begin_step(self, ctx: LogitsContext) -> None:
        """Tell the batch recorder which requests are in which rows, and how many tokens each has."""
        slots = ctx.idx_mapping_np
        lengths = ctx.seq_lens_upper_bound_np[: len(slots)]
        drawn = lengths - self.states.prompt_len.np[slots]
        # A prefill in parts has a row in each of its steps, and vLLM takes a token from the last one only. That of a request
        # that was preempted spans the tokens drawn before, so its earlier rows must not replace their records.
        complete = lengths >= self.states.prefill_len.np[slots]
        requests = {}
        for row, slot in enumerate(slots.tolist()):
            if (owner := self.slots.get(slot)) is None:
                continue
            request, count = owner
            if request.score or complete[row]:
                count.tokens = max(0, int(drawn[row]))
                requests[row] = request
        # In most steps every request has one more token, and nothing else has changed.
        if requests != self._requests:
            self._requests = requests
            self.batch.set_batch(requests)
        else:
            self.batch.advance()


def chunks_of(runner: Any, ctx: LogitsContext, rows: Iterable[int]) -> dict[int, Chunk]:
    """Tokens that the current step processes of the requests in these rows of the batch.

    A step's tokens are those of its requests in order. Args: runner: vLLM's GPUModelRunner, of V2.
    """
    computed = runner.req_states.num_computed_tokens_np[ctx.idx_mapping_np]
    lengths = ctx.seq_lens_upper_bound_np[: len(computed)] - computed
    starts = np.cumsum(lengths) - lengths
    return {row: Chunk(int(starts[row]), int(computed[row]), int(lengths[row])) for row in rows}


def obstacles(runner: Any, recorder: LogitsProcessor) -> list[str]:
    """Reasons why the recorder cannot follow a model runner's batches, each with a remedy; read from the runner itself, since
    vLLM changes what it is asked for."""
    graphs = runner.cudagraph_manager
    found = {
        "a full CUDA graph replays the layers without the code that keeps the inputs of scoring; set "
        "engine_args.compilation_config.cudagraph_mode to PIECEWISE or NONE": graphs is not None
        and graphs.cudagraph_mode.has_full_cudagraphs(),
        "a breakable CUDA graph replays the layers without the code that keeps the inputs of scoring; unset "
        "VLLM_USE_BREAKABLE_CUDAGRAPH": graphs is not None and graphs.use_breakable_cg,
        "several tokens of a request may be in a step; remove speculative_config from engine_args": (
            runner.num_speculative_steps > 0
        ),
        "a pipeline's first stages see no rows; remove pipeline_parallel_size from engine_args": runner.use_pp,
        "each GPU sees a part of the tokens; remove prefill_context_parallel_size from engine_args": (
            runner.pcp_manager is not None
        ),
        "each GPU holds a part of the keys and values, which was not tried; remove decode_context_parallel_size from "
        "engine_args": runner.use_dcp,
        "each GPU sees a part of the rows; remove enable_batch_sharded_sampling from engine_args": (
            runner.batch_sharder is not None
        ),
        "a step is split in two; remove enable_dbo from engine_args": runner.ubatch_runner is not None,
        "vLLM did not load the recorder; remove VLLM_PLUGINS": all(
            each is not recorder for each in runner.sampler.logits_processors
        ),
    }
    return [reason for reason, holds in found.items() if holds]
