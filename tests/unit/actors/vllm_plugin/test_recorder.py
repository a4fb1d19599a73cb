"""The recorder inside vLLM: a batch that changes, and the forward pass that scoring reads, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from actors.vllm_plugin import active_recorder, mixture_model
from actors.vllm_plugin.active_recorder import ActiveRecorder
from actors.vllm_plugin.batch_recorder import Chunk
from actors.vllm_plugin.mixture_model import MixtureForCausalLM
from actors.vllm_plugin.recorder import Recorder, chunks_of
from actors.vllm_plugin.row_statistics import Rows
from tests.support.plain_recorder import drawn, random_rows

VOCAB = 40


def made(rank: int, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(active_recorder, "get_tensor_model_parallel_rank", lambda: rank)
    config = SimpleNamespace(additional_config={"kdray": {"teacher_top_k": 4, "student_top_k": 2, "record_hidden": False}})
    return Recorder(config, torch.device("cpu"), False)


@pytest.fixture(autouse=True)
def _no_singletons() -> Iterator[None]:
    yield
    ActiveRecorder.active = MixtureForCausalLM.active = None


def params(key: str, seed: int, alpha: float) -> SamplingParams:
    return SamplingParams(extra_args={"kdray": {"key": key, "mode": "sample", "alpha": alpha, "seed": seed}})


def test_requests_that_come_move_and_go_draw_with_their_own_seed_alpha_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(0, monkeypatch)
    model = SimpleNamespace(rows=None, outputs=None, student_version=0)
    monkeypatch.setattr(MixtureForCausalLM, "active", model)
    given = {key: (seed, alpha) for key, seed, alpha in [("a", 3, 0.0), ("b", 2**64 - 1, 0.5), ("c", 5, 1.0), ("d", 6, 0.2)]}
    outputs: dict[str, list[int]] = {key: [] for key in given}

    def added(row: int, key: str) -> tuple[int, SamplingParams, list[int], list[int]]:
        return row, params(key, *given[key]), [1], outputs[key]

    def step(batch: list[str | None], update: BatchUpdate | None) -> None:
        found.update_state(update)
        model.rows = random_rows(len(batch), VOCAB, seed=len(found.requests) + sum(map(len, outputs.values())))
        assert model.rows.teacher is not None
        logits = model.rows.teacher.clone()
        found.apply(logits)
        for row, key in enumerate(batch):
            own = Rows(*(part[row : row + 1] for part in model.rows))
            if key is None:
                assert torch.equal(logits[row], own.teacher[0])
                continue
            seed, alpha = given[key]
            token = int(logits[row].argmax())
            assert token == drawn(own, torch.tensor([[alpha]]), [seed], [len(outputs[key])]).item()
            outputs[key].append(token)

    step(["a", "b"], BatchUpdate(2, [], [added(0, "a"), added(1, "b")], []))
    step(["a", "b"], None)
    # A request without kdray's arguments is left alone.
    other = (2, SamplingParams(), [1], [])
    step(["a", "b", None, "c"], BatchUpdate(4, [], [other, added(3, "c")], []))
    step(["b", "a", None, "c"], BatchUpdate(4, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    step(["c", "a", None], BatchUpdate(3, [0], [], [(3, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    step(["c", "d"], BatchUpdate(2, [2], [added(1, "d")], []))
    lengths = {key: len(tokens) for key, tokens in outputs.items()}
    assert lengths == {"a": 5, "b": 4, "c": 4, "d": 1}
    for slab, tokens in zip(found.batch.take(lengths.items()), outputs.values(), strict=True):
        assert slab.ints[:, 0].tolist() == tokens


def test_scoring_reads_positions_from_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two requests, in the middle of its prefill."""
    found = made(0, monkeypatch)
    outputs = torch.arange(6.0).unsqueeze(-1)
    read: list[list[float]] = []

    def log_rows(hidden: torch.Tensor) -> Rows:
        read.append(hidden.squeeze(-1).tolist())
        return random_rows(len(hidden), VOCAB, seed=0)

    model = SimpleNamespace(rows=random_rows(2, VOCAB, 1), outputs=outputs, student_version=0, log_rows=log_rows)
    monkeypatch.setattr(MixtureForCausalLM, "active", model)
    found.runner = SimpleNamespace(
        query_start_loc=SimpleNamespace(np=np.array([0, 2, 6])),
        input_batch=SimpleNamespace(num_computed_tokens_cpu=np.array([0, 3])),
    )
    sequence = np.arange(1, 10, dtype=np.int32)
    scored = SamplingParams(extra_args={"kdray": {"key": "s", "mode": "score", "start": 5, "ids": sequence.tobytes()}})
    found.update_state(BatchUpdate(2, [], [(0, SamplingParams(), [1, 2], []), (1, scored, [1, 2, 3, 4, 5, 6, 7, 8], [])], []))
    found.apply(torch.zeros(2, VOCAB))
    # Tokens 3 to 6 of the sequence are in the pass; those at 4, 5 and 6 predict 5, 6 and 7, the first three of the response.
    assert read == [[3, 4, 5]]
    (slab,) = found.batch.take([("s", 3)])
    assert slab.ints[:, 0].tolist() == [6, 7, 8]


def test_tokens_of_a_step_come_from_the_runner_alone() -> None:
    """Its arrays on the host, padded as vLLM pads them."""
    runner = SimpleNamespace(
        query_start_loc=SimpleNamespace(np=np.array([0, 3, 4, 9, 9, 9], dtype=np.int32)),
        input_batch=SimpleNamespace(num_computed_tokens_cpu=np.array([10, 64, 0, 5], dtype=np.int32)),
    )
    assert chunks_of(runner, [0, 2]) == {0: Chunk(0, 10, 3), 2: Chunk(4, 0, 5)}


@pytest.mark.parametrize(("rank", "held"), [(0, 1), (1, 0)])
def test_the_first_rank_keeps_the_records(rank: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(rank, monkeypatch)
    monkeypatch.setattr(MixtureForCausalLM, "active", SimpleNamespace(rows=random_rows(1, VOCAB, 1), student_version=0))
    found.update_state(BatchUpdate(1, [], [(0, params("a", 1, 0.5), [1], [])], []))
    found.apply(torch.zeros(1, VOCAB))
    assert found.batch.held_positions() == held


def test_no_attention_backend_is_asked_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata of a backend without any field: the forward pass keeps its outputs. Without metadata, it is no step."""
    model = MixtureForCausalLM.__new__(MixtureForCausalLM)
    torch.nn.Module.__init__(model)
    model.teacher, model.student = (
        lambda ids, *_, width=width: torch.ones(len(ids), width) * ids.unsqueeze(-1) for width in (3, 2)
    )
    model.outputs, model._hidden, model._max_tokens = None, torch.empty(0, 5), 4
    model.student_only_step, model.teacher_width, model.steps, model.teacher_steps = False, 3, 0, 0
    for metadata, kept in ((None, False), ({"layers.0": object()}, True)):
        context = SimpleNamespace(attn_metadata=metadata)
        monkeypatch.setattr(mixture_model, "get_forward_context", lambda context=context: context)
        outputs = model.forward(torch.arange(4), torch.arange(4))
        assert (model.outputs is not None) == kept
    assert torch.equal(model.outputs, outputs)


def test_outputs_of_one_model_survive_the_other_that_writes_into_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs share one pool of memory: what a model returned may be overwritten by the next one."""
    model = MixtureForCausalLM.__new__(MixtureForCausalLM)
    torch.nn.Module.__init__(model)
    pool = torch.zeros(4, 3)
    model.teacher, model.student = (lambda ids, *_, value=value: pool[: len(ids)].fill_(value) for value in (1.0, 2.0))
    model.outputs, model._hidden, model._max_tokens = None, torch.empty(0, 6), 8
    model.student_only_step, model.teacher_width, model.steps, model.teacher_steps = False, 3, 0, 0
    monkeypatch.setattr(mixture_model, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layers.0": object()}))
    outputs = model.forward(torch.arange(4), torch.arange(4))
    assert torch.equal(outputs, torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 4))
    address = model._hidden.data_ptr()
    model.forward(torch.arange(3), torch.arange(3))
    assert model._hidden.data_ptr() == address


def test_the_teacher_rests_in_steps_that_draw_from_the_student_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while one request, also one without kdray's arguments, needs it; and it runs while vLLM measures memory."""
    found = made(0, monkeypatch)
    model = MixtureForCausalLM.__new__(MixtureForCausalLM)
    torch.nn.Module.__init__(model)
    ran = []

    def part(name: str, width: int) -> Callable[..., torch.Tensor]:
        return lambda ids, *_: ran.append(name) or torch.ones(len(ids), width)  # type: ignore[func-returns-value]

    model.teacher, model.student = part("teacher", 3), part("student", 2)
    model.outputs, model._hidden, model._max_tokens = None, torch.empty(0, 5), 4
    model.student_only_step, model.teacher_width, model.steps, model.teacher_steps = False, 3, 0, 0
    monkeypatch.setattr(MixtureForCausalLM, "active", model)
    alone = SamplingParams(extra_args={"kdray": {"key": "a", "mode": "sample", "alpha": 0.0, "seed": 1, "student_only": True}})

    def step(update: BatchUpdate | None, metadata: object) -> list[str]:
        found.update_state(update)
        monkeypatch.setattr(mixture_model, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))
        ran.clear()
        model.forward(torch.arange(2), torch.arange(2))
        return list(ran)

    both, metadata = ["teacher", "student"], {"layers.0": object()}
    assert step(BatchUpdate(1, [], [(0, alone, [1], [])], []), metadata) == ["student"]
    assert step(None, metadata) == ["student"]
    assert step(None, None) == both, "a pass that vLLM makes to measure memory"
    assert step(BatchUpdate(2, [], [(1, params("b", 2, 0.2), [1], [])], []), metadata) == both
    assert step(BatchUpdate(1, [1], [], []), metadata) == ["student"]
    assert step(BatchUpdate(2, [], [(1, SamplingParams(), [1], [])], []), metadata) == both
    assert (model.steps, model.teacher_steps) == (5, 2)
