"""The recorder of vLLM's newer model runner beside that of the first, on one schedule: the same tokens and records, bit for
bit. Without an engine: the newer runner needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator

from actors.serving.engine_arguments import RECORDERS
from actors.vllm_plugin import active_recorder
from actors.vllm_plugin.active_recorder import ActiveRecorder
from actors.vllm_plugin.mixture_model import MixtureForCausalLM
from actors.vllm_plugin.recorder import Recorder
from actors.vllm_plugin.recorder_v2 import RecorderV2
from actors.vllm_plugin.worker_extension import WorkerExtension
from tests.support.plain_recorder import drawn
from tests.support.vllm_batches import FirstRunner, Model, NewerRunner, Schedule, Sequence, Step

VOCAB = 40
CONFIG: Any = SimpleNamespace(additional_config={"kdray": {"teacher_top_k": 4, "student_top_k": 2, "record_hidden": True}})
SLOTS = 5


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(active_recorder, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(MixtureForCausalLM, "active", None)
    yield
    ActiveRecorder.active = None


def sampling(key: str, rng: np.random.Generator) -> Sequence:
    args = {
        "key": key,
        "mode": "sample",
        "alpha": float(rng.choice([0.0, 0.3, 1.0])),
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "kv_version": int(rng.integers(0, 4)),
    }
    return Sequence(key, SamplingParams(extra_args={"kdray": args}), [1] * int(rng.integers(1, 15)), int(rng.integers(1, 9)))


def long(key: str, rng: np.random.Generator) -> Sequence:
    return replace(sampling(key, rng), new_tokens=20)


def scoring(key: str, rng: np.random.Generator) -> Sequence:
    ids = rng.integers(0, VOCAB, int(rng.integers(4, 20))).astype(np.int32)
    start = int(rng.integers(1, len(ids)))
    args: dict[str, Any] = {"key": key, "mode": "score", "start": start, "ids": ids.tobytes(), "top_k": bool(rng.integers(2))}
    if rng.integers(2) or not args["top_k"]:
        asked = np.stack([rng.permutation(VOCAB)[:3] for _ in range(len(ids) - start)]).astype(np.int32)
        args |= {"asked": asked.tobytes(), "width": 3}
    return Sequence(key, SamplingParams(extra_args={"kdray": args}), ids[:-1].tolist(), 1)


def other(key: str, rng: np.random.Generator) -> Sequence:
    """A request that kdray's engine did not send."""
    return Sequence(key, SamplingParams(), [1] * int(rng.integers(1, 9)), 3)


class Both:
    """The two recorders on one schedule."""

    def __init__(self, kinds: list[Any], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sequences = {f"{index}": kind(f"{index}", rng) for index, kind in enumerate(kinds)}
        self.schedule = Schedule(list(self.sequences.values()), running=SLOTS - 1, tokens=9, seed=seed)
        self.first = Recorder(CONFIG, torch.device("cpu"), False)
        self.first_runner, self.first_model = FirstRunner(self.sequences), Model(self.sequences, VOCAB)
        self.first.attach(self.first_runner)
        self.newer_runner, self.newer_model = NewerRunner(self.sequences, SLOTS), Model(self.sequences, VOCAB)
        self.newer = RecorderV2(CONFIG, self.newer_runner.states)
        # Of a runner, the recorder reads no more than this.
        self.newer.runner = self.newer_runner

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for number, step in enumerate(self.schedule):
            for model in (self.first_model, self.newer_model):
                model.student_version = number // 3
            monkeypatch.setattr(MixtureForCausalLM, "active", self.first_model)
            self.first.update_state(self.first_runner.begin(step))
            first = self._by_key(self.first, self.first_runner.order, self.first_model, step, None)
            monkeypatch.setattr(MixtureForCausalLM, "active", self.newer_model)
            context = self.newer_runner.begin(step, self.newer)
            newer = self._by_key(self.newer, self.newer_runner.order, self.newer_model, step, context)
            for key in step.scheduled:
                each = self.sequences[key]
                if key in step.complete:
                    assert torch.equal(first[key][0], newer[key][0]), "the same logits, with the same token forced"
                    each.output.append(int(newer[key][0].argmax()))
                else:
                    assert torch.equal(newer[key][0], newer[key][1]), "no token is taken from a prefill in parts"

    def _by_key(
        self, recorder: Any, order: list[str], model: Model, step: Step, context: Any
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        logits = model.run(order, step, self.sequences)
        before = logits.clone()
        given = recorder.apply(logits) if context is None else recorder.apply(logits, context)
        return {key: (given[row], before[row]) for row, key in enumerate(order)}

    def wanted(self) -> list[tuple[str, int]]:
        found = []
        for key, each in self.sequences.items():
            args = (each.params.extra_args or {}).get("kdray")
            if args is not None:
                scored = len(each.prompt) + 1 - args.get("start", 0)
                found.append((key, scored if args["mode"] == "score" else len(each.output)))
        return found


@pytest.mark.parametrize("seed", range(6))
def test_both_recorders_draw_and_record_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, slots given again, prefills in parts, preempted requests, scoring beside sampling, and requests
    of another origin."""
    both = Both([sampling, scoring, sampling, other, sampling, scoring, scoring, sampling, other, sampling] * 2, seed)
    both.run(monkeypatch)
    assert both.schedule.preempted > 2
    assert both.schedule.parts > 2
    first, newer = both.first.batch, both.newer.batch
    assert (newer.readmitted, newer.recomputed_tokens) == (first.readmitted, first.recomputed_tokens)
    assert newer.readmitted > 0
    assert newer.held_positions() <= first.held_positions(), "the first runner's surplus rows are recorded too"
    for old, new in zip(first.take(both.wanted()), newer.take(both.wanted()), strict=True):
        for one, another in zip(old, new, strict=True):
            assert one.shape == another.shape
            assert np.array_equal(one, another, equal_nan=True)
    assert not newer.cells


def test_tokens_are_those_of_the_plain_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the same as another recorder's: by hand, from each request's own rows, alpha, seed and position."""
    both = Both([sampling] * 8, seed=11)
    both.run(monkeypatch)
    assert both.schedule.preempted
    for key, each in both.sequences.items():
        args = each.params.extra_args["kdray"]
        first = both.newer_model._first[key] + len(each.prompt) - 1
        places = torch.arange(first, first + len(each.output), dtype=torch.float64).unsqueeze(-1)
        rows = both.newer_model.log_rows(places)
        alpha = torch.full((len(each.output), 1), args["alpha"])
        count = len(each.output)
        assert drawn(rows, alpha, [args["seed"]] * count, list(range(count))).tolist() == each.output
    (slab,) = both.newer.batch.take([("0", len(both.sequences["0"].output))])
    assert slab.ints[:, 0].tolist() == both.sequences["0"].output


def test_a_prefill_after_preemption_leaves_the_records_before_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts end at positions that were drawn before, under older weights, whose tokens the engine keeps."""
    args = {"key": "a", "mode": "sample", "alpha": 0.5, "seed": 1}
    each = Sequence("a", SamplingParams(extra_args={"kdray": args}), [1, 1], 6)
    runner = NewerRunner({"a": each}, 2)
    recorder, model = RecorderV2(CONFIG, runner.states), Model({"a": each}, VOCAB)
    monkeypatch.setattr(MixtureForCausalLM, "active", model)

    def step(count: int, *, added: bool = False, removed: bool = False) -> None:
        complete = each.computed + count == each.length
        this = Step({"a": count}, ["a"] * added, ["a"] * removed, frozenset(["a"] * complete))
        context = runner.begin(this, recorder)
        logits = recorder.apply(model.run(["a"], this, {"a": each}), context)
        each.computed += count
        if complete:
            each.output.append(int(logits[0].argmax()))

    step(2, added=True)
    step(1)
    step(1)
    model.student_version, each.computed = 7, 0
    for count in (1, 2, 1, 1):
        step(count, added=each.computed == 0, removed=each.computed == 0)
    (slab,) = recorder.batch.take([("a", 4)])
    assert slab.ints[:, 0].tolist() == each.output
    assert slab.ints[:, 1].tolist() == [0, 0, 0, 7]


def test_another_rank_draws_the_same_and_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checksums = []
    for rank in (0, 1):
        monkeypatch.setattr(active_recorder, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        both = Both([sampling, scoring] * 4, seed=3)
        both.run(monkeypatch)
        checksums.append(both.newer.batch.checksum())
        assert bool(both.newer.batch.cells) == (rank == 0)
    assert checksums[0] == checksums[1] != 0


def test_a_batch_that_stays_the_same_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step brings no more to the device than how many tokens each request has."""
    both = Both([long] * 3, seed=4)
    both.schedule.tokens = 99
    calls: list[int] = []
    original = both.newer.batch.set_batch
    monkeypatch.setattr(both.newer.batch, "set_batch", lambda requests: calls.append(len(requests)) or original(requests))
    both.run(monkeypatch)
    steps = both.newer_model.runs
    # When a request comes, ends or is preempted; and where a prefill changes the order of the rows.
    assert len(calls) <= 2 + 3 * both.schedule.preempted < steps


def test_several_rows_of_a_request_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both([sampling], seed=0)
    monkeypatch.setattr(MixtureForCausalLM, "active", both.newer_model)
    context = both.newer_runner.begin(next(iter(both.schedule)), both.newer)
    with pytest.raises(ValueError, match="2 rows of 1 requests.* remove speculative_config"):
        both.newer.apply(torch.zeros(2, VOCAB), context)


# ----------------------------------------------------------------------------------------------------------- at start


def whole_runner(recorder: object, **changed: Any) -> Any:
    """A V2 runner as vLLM makes it for kdray's settings."""
    graphs = SimpleNamespace(has_full_cudagraphs=lambda: False)
    fields = {
        "req_states": SimpleNamespace(),
        "cudagraph_manager": SimpleNamespace(cudagraph_mode=graphs, use_breakable_cg=False),
        "num_speculative_steps": 0,
        "use_pp": False,
        "pcp_manager": None,
        "use_dcp": False,
        "batch_sharder": None,
        "ubatch_runner": None,
        "sampler": SimpleNamespace(logits_processors=[object(), recorder]),
    }
    return SimpleNamespace(**fields | changed)


FULL = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True), use_breakable_cg=False)
BREAKABLE = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False), use_breakable_cg=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cudagraph_manager": FULL}, "a full CUDA graph .*cudagraph_mode to PIECEWISE or NONE"),
        ({"cudagraph_manager": BREAKABLE}, "unset VLLM_USE_BREAKABLE_CUDAGRAPH"),
        ({"num_speculative_steps": 3}, "remove speculative_config from engine_args"),
        ({"use_pp": True}, "remove pipeline_parallel_size from engine_args"),
        ({"pcp_manager": object()}, "remove prefill_context_parallel_size"),
        ({"use_dcp": True}, "remove decode_context_parallel_size"),
        ({"batch_sharder": object()}, "remove enable_batch_sharded_sampling"),
        ({"ubatch_runner": object()}, "remove enable_dbo"),
        ({"sampler": SimpleNamespace(logits_processors=[])}, "vLLM did not load the recorder"),
    ],
)
def test_a_runner_that_the_recorder_cannot_follow_is_refused_at_start(changed: dict[str, Any], message: str) -> None:
    recorder = RecorderV2(CONFIG, NewerRunner({}, 1).states)
    worker: Any = WorkerExtension()
    worker.model_runner = whole_runner(recorder, **changed)
    with pytest.raises(ValueError, match=f"model_runner=v2: .*{message}.* or set model_runner=v1"):
        worker.kdray_attach()
    assert recorder.runner is None
    worker.model_runner = whole_runner(recorder)
    worker.kdray_attach()
    assert recorder.runner is worker.model_runner
    assert worker.kdray_drop(["nothing"]) is None


def test_vllm_takes_the_recorder_as_one_of_its_newer_interface() -> None:
    """vLLM's own loader, by the name in its arguments; it refuses the first runner's recorder."""
    build_custom_logits_processors_params_validator([RECORDERS["v2"]])(SamplingParams())
    assert issubclass(RecorderV2, LogitsProcessor)
    with pytest.raises(ValueError, match="is not a subclass of"):
        build_custom_logits_processors_params_validator([RECORDERS["v1"]])


def test_the_runner_has_the_fields_that_the_recorder_reads() -> None:
    """In vLLM's sources, since an instance needs a GPU."""
    folder = Path(vllm.__file__).parent / "v1/worker/gpu"
    runner = (folder / "model_runner.py").read_text()
    for name in vars(whole_runner(None)):
        assert f"self.{name}" in runner, name
    assert "self.num_computed_tokens_np = " in (folder / "states.py").read_text()
    graphs = (folder / "cudagraph_utils.py").read_text()
    assert "self.use_breakable_cg = " in graphs
    assert "self.cudagraph_mode = " in graphs
