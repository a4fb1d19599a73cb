"""Rows of the vocabulary that an engine takes while it draws and scores: what `kdray plan` counts, against a meter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from actors.serving import engine_arguments
from actors.vllm_plugin import batch_recorder
from actors.vllm_plugin.batch_recorder import BatchRecorder, Chunk, Request
from actors.vllm_plugin.mixture_model import MixtureForCausalLM
from actors.vllm_plugin.row_statistics import RowStatistics
from cluster.diagnosis.meter import Storages
from cluster.planning.memory import GIB, MEASURED_ROWS, ModelShape, engine_memory, engine_rows

torch.set_num_threads(1)
WIDTH, VOCAB = 16, 3_000


class Head:
    """A model of which only the head is there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = torch.randn(VOCAB, WIDTH).to(dtype)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


def peak_rows(heads: list[Head | None], sequences: int, scored: int, dtype: torch.dtype) -> float:
    """Float32 rows that live at once in two steps that draw for `sequences` requests and score as many tokens of one more."""
    teacher, student = heads
    model = SimpleNamespace(teacher=teacher, student=student, teacher_width=0 if teacher is None else WIDTH)
    model.vocab_size = model.declared_size = VOCAB
    model.student_only_step, model.rows = False, None
    model.log_rows = lambda hidden: MixtureForCausalLM.log_rows(model, hidden)  # type: ignore[arg-type]
    alpha = 0.3 if teacher and student else float(teacher is not None)
    requests = {row: Request(str(row), False, [], alpha, seed=row) for row in range(sequences)}
    if scored:
        text = np.arange(1 + scored, dtype=np.int32)
        requests[sequences] = Request("scored", True, [], 0.0, 0, sequence=text, start=1)
    recorder = BatchRecorder(RowStatistics(8, 4, record_hidden=False), torch.device("cpu"), keeps_records=True)
    for request in requests.values():
        recorder.admit(request.key)
    recorder.set_batch(requests)
    hidden = torch.randn(sequences + 1 + scored, WIDTH * sum(head is not None for head in heads)).to(dtype)
    with Storages().known([hidden, *(head.weight for head in heads if head is not None)]) as meter:
        for _ in range(2):
            logits = MixtureForCausalLM.compute_logits(model, hidden[: len(requests)])  # type: ignore[arg-type]
            recorder.sample(logits, model.rows, 0)
            recorder.score(hidden, {sequences: Chunk(0, 0, 1 + scored)} if scored else {}, model.log_rows, 0)
            recorder.take([(request.key, 1) for request in requests.values()])
            for request in requests.values():
                recorder.admit(request.key)
            del logits
    return meter.peak / (4 * VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kinds", ["teacher and student", "teacher", "student"])
@pytest.mark.parametrize("sequences", [2, 8, 64])
def test_an_engine_takes_the_rows_that_a_meter_finds(
    sequences: int, kinds: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few sequences beside many scored tokens, and the other way around; in chunks of 16 rows."""
    monkeypatch.setattr(batch_recorder, "CHUNK_ROWS", 16)
    heads = [Head(dtype) if kind in kinds else None for kind in ("teacher", "student")]
    found = peak_rows(heads, sequences, 48, dtype)
    counted = engine_rows(sum(head is not None for head in heads), sequences, measured=16)
    assert 0.8 < counted / found < 1.2
    assert peak_rows(heads, sequences, 0, dtype) < 1.2 * counted


def test_the_rows_measured_at_once_are_those_of_the_recorder_and_of_prompt_logprobs() -> None:
    assert MEASURED_ROWS == batch_recorder.CHUNK_ROWS == engine_arguments._PROMPT_ROWS


def test_a_replica_that_runs_few_sequences_has_memory_for_scoring() -> None:
    """An 8B pair with 128k ids: 1,536 rows that are scored take 0.7 GiB, by which the KV cache is smaller."""
    shape = ModelShape.of(LlamaConfig(vocab_size=128_256, hidden_size=64, num_hidden_layers=1, num_attention_heads=8))
    found = engine_memory([shape, shape], 2, 1, 4, 4096, 20 * GIB)
    assert found.logprobs == pytest.approx((3 * 4 + 6 * 256) * 128_256 * 4)
    assert found.needed + found.kv_room == pytest.approx(20 * GIB)
