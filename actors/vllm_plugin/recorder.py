"""Logits processor that samples from the mixture and records both models' statistics of every token.

vLLM passes every step's rows to `apply`. For a sampling request the recorder forms m = alpha p + (1 - alpha) q with the
request's own alpha, samples the token from a hash of (seed, position), forces the engine to choose it, and records log m, log
p, log q, the teacher's logprobs on a support (teacher top-k and student top-k), its tail mass, and both exact KLs. For a
scoring request it evaluates the rows of the sequence's own tokens as their prefill chunks pass, also at the ids that the
request lists.

`actors.vllm_plugin.batch_recorder` does all of this; here it is connected to vLLM's first model runner, V1, and in
`actors.vllm_plugin.recorder_v2` to the newer one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.vllm_plugin.active_recorder import ActiveRecorder, request_args
from actors.vllm_plugin.batch_recorder import Chunk, Request
from actors.vllm_plugin.mixture_model import MixtureForCausalLM, register

register()


class Recorder(ActiveRecorder, LogitsProcessor):
    """Logits processor, loaded by vLLM by name: `logits_processors=["actors.vllm_plugin.recorder:Recorder"]`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, Request] = {}
        self.begin(vllm_config, device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch before each step; all that the step needs of the requests goes to the device here."""
        if process_dict_updates(self.requests, batch_update, self._admit):
            self.batch.set_batch(self.requests)
        else:
            self.batch.advance()
        if batch_update is not None:
            model = MixtureForCausalLM.active
            assert model is not None
            model.student_only_step = 0 < batch_update.batch_size == self.batch.student_only_rows

    def _admit(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Request | None:
        args = request_args(params)
        if args is None:
            return None
        self.batch.admit(args["key"], len(prompt_ids or ()) + len(output_ids))
        return Request.of(args, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Force every sampling request's row of `logits` [rows, vocab] to its sampled token; record sampling and scoring
        requests."""
        model = MixtureForCausalLM.active
        assert model is not None
        if self.requests:
            assert model.rows is not None
            self.batch.sample(logits, model.rows, model.student_version)
        if self.batch.scoring:
            assert model.outputs is not None
            chunks = chunks_of(self.runner, [row for row, _ in self.batch.scoring])
            self.batch.score(model.outputs, chunks, model.log_rows, model.student_version)
        return logits


def chunks_of(runner: Any, rows: Iterable[int]) -> dict[int, Chunk]:
    """Tokens that the current step processes of the requests in these rows of the batch.

    They come from the runner's own arrays on the host, since not every attention backend has them in its metadata.
    Args: runner: vLLM's GPUModelRunner.
    """
    starts, computed = runner.query_start_loc.np, runner.input_batch.num_computed_tokens_cpu
    return {row: Chunk(int(starts[row]), int(computed[row]), int(starts[row + 1] - starts[row])) for row in rows}
