"""Logits processor that samples from the mixture and records both models' statistics of every token.

vLLM passes every step's rows to `apply`. For a sampling request the recorder forms m = alpha p + (1 - alpha) q with the
request's own alpha, samples the token from a hash of (seed, position), forces the engine to choose it, and records log m, log
p, log q, the teacher's logprobs on a support (teacher top-k and student top-k), its tail mass, and both exact KLs. For a
scoring request it evaluates the rows of the sequence's own tokens as their prefill chunks pass, also at the ids that the
request lists.

`actors.vllm_plugin.batch_recorder` does all of this; here it is connected to vLLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.vllm_plugin.batch_recorder import NEWEST, BatchRecorder, Request, chunks_of
from actors.vllm_plugin.mixture_model import MixtureForCausalLM, register
from actors.vllm_plugin.row_statistics import RowStatistics

register()


class Recorder(LogitsProcessor):
    """Logits processor, loaded by vLLM by name: `logits_processors=["actors.vllm_plugin.recorder:Recorder"]`."""

    active: Recorder | None = None
    """The only recorder of this process; the worker extension returns its records."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        limits = vllm_config.additional_config["kdray"]
        statistics = RowStatistics(limits["teacher_top_k"], limits["student_top_k"], limits["record_hidden"])
        self.requests: dict[int, Request] = {}
        self.batch = BatchRecorder(statistics, torch.device(device), keeps_records=get_tensor_model_parallel_rank() == 0)
        self.runner: Any = None
        """vLLM's model runner, set by the worker extension: it has on the host which tokens a step processes."""
        Recorder.active = self

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
        args: dict[str, Any] | None = (params.extra_args or {}).get("kdray")
        if args is None:
            return None
        self.batch.admit(args["key"], len(prompt_ids or ()) + len(output_ids))
        return Request(
            key=args["key"],
            score=args["mode"] == "score",
            alpha=args.get("alpha", 0.0),
            seed=args.get("seed", 0),
            prompt_ids=prompt_ids or [],
            output_ids=output_ids,
            start=args.get("start", 0),
            last_id=args.get("last_id", 0),
            asked=np.frombuffer(args["asked"], dtype=np.int32).reshape(-1, args["width"]) if "asked" in args else None,
            top_k=args.get("top_k", True),
            kv_version=args.get("kv_version", NEWEST),
            student_only=args.get("student_only", False),
        )

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
