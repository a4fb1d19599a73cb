"""The device of a rank, the kernel of its optimizer, offload, and checkpoints without enums; DeepSpeed in a group of one."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.student import backend as backend_module
from actors.student.backend import Optimization, StudentBackend, open_backend, training_device, uses_fused_optimizer
from actors.student.backends import deepspeed as deepspeed_backend
from actors.student.backends import torch as torch_backend
from actors.student.checkpoints.safe_load import plain_values
from kdray.config import TrainingSettings
from kdray.errors import TrainingError

pytestmark = pytest.mark.filterwarnings("ignore")

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
OPTIMIZATION = Optimization(0.01, (0.9, 0.95), 0.1, "constant", 0, 10)


def training(backend: dict[str, Any], **settings: Any) -> TrainingSettings:
    return TrainingSettings.model_validate({"backend": backend, "micro_batch_size": 1, **settings})


def started(given: TrainingSettings) -> StudentBackend:
    backend = open_backend(given)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 8))
    if given.precision == "bf16":
        module = module.to(torch.bfloat16)
    backend.start(module, OPTIMIZATION)
    return backend


def step(backend: StudentBackend, seed: int) -> torch.Tensor:
    """The weights after an update on random inputs, in one vector."""
    parameters = list(backend.module.parameters())
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(parameters[0].dtype)
    backend.forward_backward(lambda forward: forward(inputs).float().pow(2).mean(), last=True)
    backend.step()
    return torch.cat([each.float().flatten() for each in backend.whole(parameters, "cpu")])


# -------------------------------------------------------------------------------------------------- half precision

ALL = {
    "torch": {"type": "torch"},
    **{f"deepspeed-{stage}": {"type": "deepspeed", "zero_stage": stage} for stage in range(4)},
    **{f"offload-{stage}": {"type": "deepspeed", "zero_stage": stage, "options": OFFLOAD} for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_in_half_precision_is_the_float32_sum_of_its_micro_batches(process_group: None, name: str) -> None:
    """64 of them, all different, and clipped; DeepSpeed's own way is off by a percent, one rounding of the sum by 0.15%."""
    backend = started(training(ALL[name], precision="bf16"))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 8)).to(torch.bfloat16)
    parameters = list(module.parameters())
    copies = [each.detach().float().requires_grad_() for each in parameters]
    optimizer = torch.optim.AdamW(copies, lr=0.01, betas=OPTIMIZATION.betas, weight_decay=OPTIMIZATION.weight_decay)
    for inputs in torch.randn(2, 64, 1, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16):

        def loss(forward: Any, row: torch.Tensor) -> torch.Tensor:
            return forward(row).float().pow(2).sum() / 64

        optimizer.zero_grad()
        for number, row in enumerate(inputs):
            backend.forward_backward(lambda forward: loss(forward, row), last=number == 63)  # noqa: B023
            for copy, gradient in zip(copies, torch.autograd.grad(loss(module, row), parameters), strict=True):
                copy.grad = gradient.float() if copy.grad is None else copy.grad + gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(copies, backend.training.gradient_clipping)
        assert norm > backend.training.gradient_clipping
        assert backend.step().grad_norm == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
    found = backend.whole(list(backend.module.parameters()), "cpu")
    equal = torch.cat([(left == right).flatten() for left, right in zip(found, parameters, strict=True)])
    assert equal.float().mean() > 0.995, "but for what lies between two neighbours in bfloat16"


# ---------------------------------------------------------------------------------------------------------- devices


def test_a_rank_without_a_gpu_of_its_own_trains_on_the_cpu(monkeypatch: pytest.MonkeyPatch, process_group: None) -> None:
    """Ray hides no GPU from it, so torch sees those of other processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device(training({"type": "torch"})) == torch.device("cpu")
    assert training_device(training({"type": "torch"}, gpus_per_rank=0.5)) == torch.device("cuda")
    for kind in ("torch", "deepspeed"):
        backend = started(training({"type": kind}))
        assert backend.device.type == "cpu"
        assert {each.device.type for each in backend.module.parameters()} == {"cpu"}
        backend.close()


def test_a_rank_with_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"training\.gpus_per_rank=1, but torch .* set training\.gpus_per_rank=0"):
        open_backend(training({"type": "torch"}, gpus_per_rank=1))


def test_the_optimizer_is_fused_on_cuda() -> None:
    assert uses_fused_optimizer(torch.device("cuda", 1))
    assert not uses_fused_optimizer(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_the_backends_ask_which_kernel(monkeypatch: pytest.MonkeyPatch, process_group: None, kind: str, tmp_path: Path) -> None:
    """A checkpoint written with the other kernel goes on with this one's."""
    module = {"torch": torch_backend, "deepspeed": deepspeed_backend}[kind]
    given = training({"type": kind})
    unfused = started(given)
    first = step(unfused, 1)
    unfused.save(tmp_path, {"steps_done": 1})
    second = step(unfused, 2)
    monkeypatch.setattr(module, "uses_fused_optimizer", lambda device: device.type == "cpu")
    fused = started(given)
    assert all(group["fused"] for group in optimizer_of(fused).param_groups)
    torch.testing.assert_close(step(fused, 1), first, rtol=1e-5, atol=1e-6)
    assert fused.load(tmp_path)["steps_done"] == 1
    torch.testing.assert_close(step(fused, 2), second, rtol=1e-5, atol=1e-6)
    if kind == "torch":
        assert all(group["fused"] for group in optimizer_of(fused).param_groups)


def optimizer_of(backend: Any) -> Any:
    """AdamW itself, below what a backend wraps it in."""
    return backend._engine.basic_optimizer if hasattr(backend, "_engine") else backend._optimizer


# ---------------------------------------------------------------------------------------------------------- offload


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_makes_the_same_steps(process_group: None, stage: int, precision: str, tmp_path: Path) -> None:
    plain = started(training({"type": "torch"}, precision=precision))
    want = [step(plain, seed) for seed in range(3)]
    given = training({"type": "deepspeed", "zero_stage": stage, "options": OFFLOAD}, precision=precision)
    offloaded = started(given)
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    torch.testing.assert_close(step(offloaded, 0), want[0], rtol=tolerance, atol=tolerance / 10)
    offloaded.save(tmp_path, {"steps_done": 1})
    found = [step(offloaded, seed) for seed in (1, 2)]
    for left, right in zip(found, want[1:], strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance / 10)
    assert optimizer_of(offloaded).param_groups[0]["fused"]
    again = started(given)
    again.load(tmp_path)
    assert all(torch.equal(step(again, seed), weights) for seed, weights in zip((1, 2), found, strict=True))


def config_of(monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, backend: dict[str, Any], **settings: Any) -> Any:
    monkeypatch.setattr(deepspeed_backend, "training_device", lambda _: torch.device(device))
    monkeypatch.setattr(deepspeed_backend.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_backend.dist, "get_world_size", lambda: ranks)
    opened: Any = open_backend(training({"type": "deepspeed", **backend}, **settings))
    return opened._config()


@pytest.mark.parametrize(
    ("device", "ranks", "stage", "overlaps"),
    [("cuda", 2, 2, True), ("cuda", 1, 2, None), ("cpu", 2, 2, None), ("cuda", 2, 1, None), ("cuda", 2, 3, None)],
)
def test_reductions_overlap_the_backward_pass_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, stage: int, overlaps: bool | None
) -> None:
    assert config_of(monkeypatch, device, ranks, {"zero_stage": stage})["zero_optimization"].get("overlap_comm") is overlaps
    options = {"zero_optimization": {"overlap_comm": False}}
    chosen = config_of(monkeypatch, device, ranks, {"zero_stage": stage, "options": options})
    assert chosen["zero_optimization"] == {"stage": stage, "overlap_comm": False}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_told_to_accumulate_in_float32(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    half = config_of(monkeypatch, "cpu", 1, {"zero_stage": stage}, precision="bf16")
    assert half.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)
    assert "data_types" not in config_of(monkeypatch, "cpu", 1, {"zero_stage": stage})
    asked = {"data_types": {"grad_accum_dtype": "bf16"}}
    chosen = config_of(monkeypatch, "cpu", 1, {"zero_stage": stage, "options": asked}, precision="bf16")
    assert chosen["data_types"] == asked["data_types"]


# ------------------------------------------------------------------------------------------------------ checkpoints


def reduce_by_getattr(member: Any, protocol: int) -> Any:
    """Python's own from 3.11.0 to 3.11.3."""
    return getattr, (type(member), member.name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_holds_no_enum_that_weights_only_loading_refuses(
    monkeypatch: pytest.MonkeyPatch, process_group: None, stage: int, precision: str, tmp_path: Path
) -> None:
    given = training({"type": "deepspeed", "zero_stage": stage}, precision=precision)
    first = started(given)
    step(first, 0)
    with monkeypatch.context() as patch:
        patch.setattr(enum.Enum, "__reduce_ex__", reduce_by_getattr)
        first.save(tmp_path, {"steps_done": 1})
    want = step(first, 1)
    again = started(given)
    assert again.load(tmp_path)["steps_done"] == 1
    assert torch.equal(step(again, 1), want)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_with_enums_is_still_read(process_group: None, stage: int, tmp_path: Path) -> None:
    """Earlier versions wrote them, on Pythons that pickle them by value."""
    given = training({"type": "deepspeed", "zero_stage": stage})
    first = started(given)
    step(first, 0)
    del first._engine.checkpoint_engine.save  # type: ignore[attr-defined]
    first.save(tmp_path, {"steps_done": 1})
    assert any(b"ZeroStageEnum" in path.read_bytes() for path in tmp_path.rglob("*optim_states.pt"))
    want = step(first, 1)
    again = started(given)
    again.load(tmp_path)
    assert torch.equal(step(again, 1), want)


def test_a_checkpoint_of_bfloat16_accumulation_goes_on_in_float32(process_group: None, tmp_path: Path) -> None:
    """Stage 1 has another optimizer for it, which reads the former one's files."""
    options = {"data_types": {"grad_accum_dtype": "bf16"}}
    former = started(training({"type": "deepspeed", "zero_stage": 1, "options": options}, precision="bf16"))
    step(former, 0)
    former.save(tmp_path, {"steps_done": 1})
    again = started(training({"type": "deepspeed", "zero_stage": 1}, precision="bf16"))
    again.load(tmp_path)
    assert torch.equal(step(again, 1), step(former, 1))


class Colour(enum.IntEnum):
    RED = 3


class Tagged(dict[str, Any]):
    tag = "none"


def test_enums_become_their_values_and_the_rest_is_shared() -> None:
    weights, tagged = {"a": [1, (2, "x")]}, Tagged(colour=Colour.RED)
    tagged.tag = "kept"
    found = plain_values({"weights": weights, "deep": [(1, Colour.RED)], "tagged": tagged})
    assert found["weights"] is weights
    assert found["deep"] == [(1, 3)]
    assert type(found["deep"][0][1]) is type(found["tagged"]["colour"]) is int
    assert found["tagged"].tag == "kept"
    assert tagged["colour"] is Colour.RED


def test_the_device_is_decided_in_one_place() -> None:
    assert torch_backend.training_device is deepspeed_backend.training_device is backend_module.training_device
