"""What holds for every student backend: the numbers of a plain torch loop, exact resumes, whole publications, safe refusals.

In this process, without Ray; DeepSpeed in a process group of one. Several ranks are in tests/integration/test_student_group.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler

from actors.student.backend import Update
from actors.student.backends.torch import TorchBackend
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import MiniLLMLoss, ReverseKLLoss, TrainingSettings
from kdray.config.registry import all_plugins
from kdray.errors import TrainingError
from kdray.losses import LossBatch, LossOutput, Objective, loss_function
from kdray.losses.policy_gradient import Whitening, return_sums
from kdray.rollouts.batching import examples_to_batch, micro_batches, rollouts_to_batch, shard, take_rows
from kdray.types import Reference, Rollout, StepReport, TrainBatch
from tests.support.flat_backend import install

VOCAB, ROWS, STEPS = 29, 8, 6
LOSS = ReverseKLLoss(type="reverse_kl")
BACKENDS: dict[str, dict[str, Any]] = {
    **{f"deepspeed-{stage}": {"type": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "deepspeed-offload-2": {
        "type": "deepspeed",
        "zero_stage": 2,
        "options": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    },
    "torch": {"type": "torch"},
    "flat": {"type": "flat", "pieces": 3},
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path_factory.mktemp("site")))


@pytest.fixture(params=[pytest.param(each, marks=pytest.mark.full if each[-1] in "123" else ()) for each in BACKENDS])
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    request.getfixturevalue("installed" if request.param == "flat" else "process_group")
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, width, tied, seed in (("student", 32, False, 1), ("tied", 32, True, 2), ("teacher", 48, False, 3)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCAB,
            tie_word_embeddings=tied,
            initializer_range=0.3,
            attention_dropout=0.5,
            bos_token_id=None,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


def batch_of(step: int) -> TrainBatch:
    """Rollouts of unequal length, with the columns that divergences and MiniLLM read."""
    rng = np.random.default_rng(step)
    rollouts = []
    for index in range(ROWS):
        prompt, count = rng.integers(2, VOCAB, rng.integers(1, 6)), int(rng.integers(1, 9))
        rows = torch.from_numpy(rng.normal(size=(count, VOCAB)) * 2).log_softmax(-1)
        top = rows.topk(6)
        tokens = rng.integers(1, VOCAB, count)
        rollouts.append(
            Rollout(
                sample_id=100 * step + index,
                prompt_id=index,
                prompt_ids=prompt.astype(np.int32),
                token_ids=tokens.astype(np.int32),
                mixture_logprobs=rng.uniform(-4, -1, count).astype(np.float32),
                student_logprobs=rng.uniform(-4, -1, count).astype(np.float32),
                student_versions=np.zeros(count, np.int32),
                alpha=0.2,
                finish_reason="length",
                teacher="t",
                teacher_logprobs=rows[np.arange(count), tokens].float().numpy(),
                support_ids=top.indices.numpy().astype(np.int32),
                support_logprobs=top.values.float().numpy(),
                tail_logprobs=(1 - top.values.exp().sum(-1)).log().float().numpy(),
            )
        )
    return shard(rollouts_to_batch(rollouts, step), 0, 1)


BATCHES = [batch_of(step + 1) for step in range(STEPS)]


def training_of(backend: dict[str, Any], **settings: Any) -> TrainingSettings:
    sizes = {"batch_size": ROWS, "micro_batch_size": 4, "sft": {"batch_size": ROWS}}
    clipped = {"gradient_clipping": 0.5, "weight_decay": 0.1}
    return TrainingSettings.model_validate({"backend": backend, "sync_bucket_mib": 0.01, **sizes, **clipped, **settings})


def phase_of(model: Path, **fields: Any) -> Phase:
    phase = Phase("distill", str(model), None, LOSS, 2e-3, STEPS, warmup_steps=2, schedule="cosine")
    return replace(phase, **fields)


def started(training: TrainingSettings, phase: Phase) -> StudentTrainer:
    trainer = StudentTrainer(training, VOCAB, seed=5)
    trainer.start_phase(phase)
    return trainer


def weights_of(trainer: StudentTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor for bucket in trainer.weight_buckets() for name, tensor in bucket.items()}


def told(report: StepReport) -> tuple[Any, ...]:
    """All of a report but its time."""
    return report.step, report.loss, report.grad_norm, report.learning_rate, report.num_target_tokens, report.metrics


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------------------------------------------ the numbers


def plain_loop(
    model: Path, updates: list[TrainBatch], loss_of: Callable[[Any, TrainBatch], torch.Tensor], training: TrainingSettings
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """(loss, gradient norm, learning rate) of every update by torch alone, and the weights at the end."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    decay = training.weight_decay
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=training.betas, weight_decay=decay)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    curve = []
    for batch in updates:
        optimizer.zero_grad()
        loss = loss_of(student, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), training.gradient_clipping)
        curve.append((loss.item(), float(norm), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return curve, dict(student.named_parameters())


def logits_of(model: Any, batch: TrainBatch) -> torch.Tensor:
    """Right padding of a causal model needs no mask."""
    return model(torch.from_numpy(batch.token_ids).long()).logits.roll(1, dims=1)


def divergence(model: Any, batch: TrainBatch) -> torch.Tensor:
    tensors = LossBatch.from_train_batch(batch, VOCAB)
    return loss_function(LOSS)(logits_of(model, batch), tensors, LOSS).total / batch.num_target_tokens


@pytest.mark.parametrize(("model", "chunk"), [("student", None), ("student", 5), ("tied", 5)])
def test_losses_norms_and_weights_are_those_of_a_plain_loop(
    backend: dict[str, Any], models: dict[str, Path], model: str, chunk: int | None
) -> None:
    """Two micro-batches an update against whole batches; the norms are those before clipping, which happens in every update."""
    training = training_of(backend, loss_chunk_tokens=chunk)
    trainer = started(training, phase_of(models[model]))
    assert not trainer.backend.module.training
    reports = [trainer.train_step(batch) for batch in BATCHES]
    want, weights = plain_loop(models[model], BATCHES, divergence, training)
    found = [(report.loss, report.grad_norm, report.learning_rate) for report in reports]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert min(norm for _, norm, _ in want) > training.gradient_clipping
    assert len({rate for _, _, rate in want}) == STEPS - 1
    published = weights_of(trainer)
    assert published.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(published[name], weight.detach(), rtol=1e-5, atol=1e-5, msg=name)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert trainer.steps_done == STEPS


@pytest.mark.parametrize("size", [1, 8])
def test_a_split_in_micro_batches_does_not_change_the_gradient(
    backend: dict[str, Any], models: dict[str, Path], size: int
) -> None:
    parts = [started(training_of(backend, micro_batch_size=each), phase_of(models["student"])) for each in (4, size)]
    (usual, other) = (trainer.train_step(BATCHES[0]) for trainer in parts)
    assert other.loss == pytest.approx(usual.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(usual.grad_norm, rel=1e-5)
    for report in (usual, other):
        del report.metrics["padding"]
    assert other.metrics == pytest.approx(usual.metrics, rel=1e-5)


def test_packing_by_tokens_does_not_change_the_gradient(backend: dict[str, Any], models: dict[str, Path]) -> None:
    """With fewer positions of padding than rows of any length side by side."""
    sizes: list[dict[str, Any]] = [{"micro_batch_size": 8}, {"micro_batch_tokens": 24}]
    parts = [started(training_of(backend, **each), phase_of(models["student"])) for each in sizes]
    (usual, packed) = (trainer.train_step(BATCHES[0]) for trainer in parts)
    assert packed.loss == pytest.approx(usual.loss, rel=1e-6)
    assert packed.grad_norm == pytest.approx(usual.grad_norm, rel=1e-5)
    assert packed.metrics.pop("padding") < usual.metrics.pop("padding") - 0.02
    assert packed.metrics == pytest.approx(usual.metrics, rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_mini_batches_epochs_text_and_whitening_are_the_loop_that_one_would_write(
    backend: dict[str, Any], models: dict[str, Path], chunk: int | None
) -> None:
    """Four updates a step, each with its own statistics of tokens and text; the returns are whitened over the whole step."""
    settings = MiniLLMLoss(whitening=True)
    text_settings = {"source": {"type": "task"}, "batch_size": ROWS, "window_tokens": 16, "weight": 0.5}
    sizes = {"mini_batch_size": 4, "inner_epochs": 2, "micro_batch_size": 2, "loss_chunk_tokens": chunk}
    training = training_of(backend, pretraining=text_settings, **sizes)
    texts = [replace(batch, num_target_tokens=int(batch.loss_mask.sum())) for batch in reversed(BATCHES[:2])]
    trainer = started(training, phase_of(models["student"], loss=settings))
    reports = [trainer.train_step(batch, text) for batch, text in zip(BATCHES, texts, strict=False)]

    updates = []
    for batch, text in zip(BATCHES, texts, strict=False):
        sums = return_sums(batch, settings)
        assert sums is not None
        whitening = Whitening.from_sums(sums.tolist())
        for epoch in range(2):
            order = np.random.default_rng([5, batch.step, epoch]).permutation(ROWS)
            for number in range(2):
                rows, windows = np.sort(order[number::2]), np.arange(number, ROWS, 2)
                updates.append((take_rows(batch, rows), take_rows(text, windows), whitening))

    def both(model: Any, update: Any) -> torch.Tensor:
        rollouts, words, whitening = update
        tensors = LossBatch.from_train_batch(rollouts, VOCAB)
        main = loss_function(settings, whitening)(logits_of(model, rollouts), tensors, settings).total / tensors.mask.sum()
        mask = torch.from_numpy(words.loss_mask)
        given = torch.from_numpy(words.token_ids).long()[mask]
        return main + 0.5 * torch.nn.functional.cross_entropy(logits_of(model, words)[mask], given)

    want, _ = plain_loop(models["student"], updates, both, training)
    for number, report in enumerate(reports):
        of_step = want[4 * number : 4 * number + 4]
        assert report.loss == pytest.approx(np.mean([loss for loss, _, _ in of_step]), rel=1e-4)
        assert report.grad_norm == pytest.approx(max(norm for _, norm, _ in of_step), rel=1e-4)
        assert report.learning_rate == of_step[-1][2]


def test_a_constant_divides_the_loss_of_distillation_alone(models: dict[str, Path]) -> None:
    """Mini-batches of unequal numbers of tokens are then sums with one divisor, and so is every step."""
    sizes = {"mini_batch_size": 4, "micro_batch_size": 2, "gradient_clipping": 1e6}
    trainer = started(training_of({"type": "torch"}, loss_tokens=50, **sizes), phase_of(models["student"]))
    order = np.random.default_rng([5, BATCHES[0].step, 0]).permutation(ROWS)
    parts = [take_rows(BATCHES[0], np.sort(order[number::2])) for number in range(2)]
    assert len({int(part.loss_mask.sum()) for part in parts}) == 2

    def in_50(model: Any, batch: TrainBatch) -> torch.Tensor:
        return loss_function(LOSS)(logits_of(model, batch), LossBatch.from_train_batch(batch, VOCAB), LOSS).total / 50

    want, _ = plain_loop(models["student"], parts, in_50, trainer.training)
    report = trainer.train_step(BATCHES[0])
    assert report.loss == pytest.approx(np.mean([loss for loss, _, _ in want]), rel=1e-5)
    assert report.grad_norm == pytest.approx(max(norm for _, norm, _ in want), rel=1e-5)
    supervised = [
        started(training_of({"type": "torch"}, loss_tokens=constant), phase_of(models["student"], loss=None)).train_step(
            BATCHES[0]
        )
        for constant in (None, 50)
    ]
    assert supervised[0].loss == supervised[1].loss


class _OneOfTwo(TorchBackend):
    """A rank of two, whose gradients the other's would be averaged with."""

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        self.world_size = 2
        self.gradient: dict[str, torch.Tensor] = {}

    def step(self) -> Update:
        self.gradient = {name: each.grad.clone() for name, each in self.module.named_parameters() if each.grad is not None}
        return super().step()


def test_the_mean_over_ranks_of_their_gradients_is_the_gradient_of_the_step(models: dict[str, Path]) -> None:
    """The loss of a rank has the factor of their number, since backends average; that of pretraining text, too."""
    text_settings = {"source": {"type": "task"}, "batch_size": ROWS, "window_tokens": 16, "weight": 0.5}
    training = training_of({"type": "torch"}, gradient_clipping=1e6, pretraining=text_settings)
    text = replace(BATCHES[1], num_target_tokens=int(BATCHES[1].loss_mask.sum()))
    whole = StudentTrainer(training, VOCAB, seed=5)
    whole.start_phase(phase_of(models["student"]))
    together = whole.train_step(BATCHES[0], text)
    losses, gradients = [], []
    for rank in range(2):
        backend = _OneOfTwo(training)
        trainer = StudentTrainer(training, VOCAB, seed=5, backend=backend)
        trainer.start_phase(phase_of(models["student"]))
        losses.append(trainer.train_step(shard(BATCHES[0], rank, 2), shard(text, rank, 2)).loss)
        gradients.append(backend.gradient)
    mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]}
    norm = torch.stack([each.norm() for each in mean.values()]).norm().item()
    assert norm == pytest.approx(together.grad_norm, rel=1e-5)
    assert sum(losses) == pytest.approx(together.loss, rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 7])
def test_supervised_rows_are_plain_cross_entropy(backend: dict[str, Any], models: dict[str, Path], chunk: int | None) -> None:
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(2, VOCAB, size).astype(np.int32) for size in (3, n + 3)] for n in range(ROWS)]
    # Turns of a conversation: the loss mask has gaps.
    batch = examples_to_batch([(n, Reference(*row, np.arange(n + 3) != 1)) for n, row in enumerate(drawn)], 1)
    trainer = started(training_of(backend, loss_chunk_tokens=chunk), phase_of(models["student"], loss=None))
    report = trainer.train_step(shard(batch, 0, 1))
    model = AutoModelForCausalLM.from_pretrained(models["student"]).eval()
    mask = torch.from_numpy(batch.loss_mask)
    words = torch.from_numpy(batch.token_ids).long()[mask]
    want = torch.nn.functional.cross_entropy(logits_of(model, batch)[mask], words)
    assert report.loss == pytest.approx(want.item(), rel=1e-5)


def test_small_updates_are_not_lost_in_half_precision(backend: dict[str, Any], models: dict[str, Path]) -> None:
    """Each is less than half the distance of most weights' neighbours in bfloat16; together they show."""
    training = training_of(backend, precision="bf16", gradient_checkpointing=True, weight_decay=0.0)
    trainer = started(training, phase_of(models["student"], learning_rate=2e-4, warmup_steps=0, schedule="constant"))
    layers = trainer.backend.module.model.layers
    assert all(layer.training for layer in layers), "transformers recomputes activations in training mode alone"
    before = weights_of(trainer)
    for _ in range(8):
        trainer.train_step(BATCHES[0])
    after = weights_of(trainer)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    moved = [(before[name] != after[name]).float().mean().item() for name in before if "proj" in name]
    assert min(moved) > 0.5


def test_many_micro_batches_have_the_gradient_of_one_in_half_precision(
    backend: dict[str, Any], models: dict[str, Path]
) -> None:
    """128 equal ones, each with 1/128 of the loss: bfloat16 sums stop growing long before the last."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (2, 1, 6)))

    def updated(count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        training = training_of(backend, precision="bf16", gradient_clipping=1e6)
        phase = phase_of(models["student"], learning_rate=0.05, warmup_steps=0, schedule="constant")
        trainer = started(training, phase)
        norms = []
        for row in ids:
            for number in range(count):
                trainer.backend.forward_backward(
                    lambda forward: forward(input_ids=row, use_cache=False).logits.float().pow(2).sum() / count,  # noqa: B023
                    last=number == count - 1,
                )
            norms.append(trainer.backend.step().grad_norm)
        return norms, weights_of(trainer)

    (norms, weights), (many_norms, many_weights) = updated(1), updated(128)
    assert many_norms == pytest.approx(norms, rel=1e-5)
    # AdamW's second update depends on each element of both gradients.
    assert_same(many_weights, weights)


def test_half_precision_takes_the_steps_of_float32_copies(backend: dict[str, Any], models: dict[str, Path]) -> None:
    """No backend makes a step before the first one, and none decays weights in between."""
    settings = {"precision": "bf16", "gradient_clipping": 1e6, "weight_decay": 0.5}
    phase = phase_of(models["student"], learning_rate=0.01, warmup_steps=0, schedule="constant")
    trainer = started(training_of(backend, **settings), phase)
    student: Any = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.bfloat16).eval()
    names, parameters = zip(*student.named_parameters(), strict=True)
    copies = [each.detach().float().requires_grad_() for each in parameters]
    betas = trainer.training.betas
    optimizer = torch.optim.AdamW(copies, lr=0.01, betas=betas, weight_decay=0.5)
    for row in torch.from_numpy(np.random.default_rng(1).integers(2, VOCAB, (3, 1, 6))):

        def loss(forward: Any) -> torch.Tensor:
            return forward(input_ids=row, use_cache=False).logits.float().pow(2).sum()  # noqa: B023

        gradients = torch.autograd.grad(loss(student), parameters)
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
        trainer.backend.forward_backward(loss, last=True)
        trainer.backend.step()
    found = weights_of(trainer)
    # Stage 3 rounds products differently, which turns steps of elements whose gradient is almost 0.
    gaps = [(found[name] - weight.detach()).float().abs().mean() for name, weight in zip(names, parameters, strict=True)]
    assert max(gaps) < 0.3 * 0.01


# ------------------------------------------------------------------------------------------------------ checkpoints

FEATURES = {"hidden": {"distance": "mse", "layers": "uniform"}, "attention": {"layers": "uniform"}, "relation": {}}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "features", "tied"])
def test_a_checkpoint_continues_the_curve_exactly(
    backend: dict[str, Any], models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """Another trainer that reads it goes on with the same bits: of the student, of the maps beside it, of its average."""
    settings: dict[str, Any] = {"bf16": {"precision": "bf16"}, "features": {"features": FEATURES}}.get(kind, {})
    training, phase = training_of(backend, **settings), phase_of(models["tied" if kind == "tied" else "student"])
    if kind == "features":
        phase = replace(phase, feature_teacher=(str(models["teacher"]), None))
    trainer = started(training, phase)
    for folder, batch in (("first", BATCHES[0]), ("second", BATCHES[1])):
        trainer.train_step(batch)
        list(trainer.averaged_buckets(0.75))
        (tmp_path / folder).mkdir()
        trainer.save(tmp_path / folder)
    expected = [told(trainer.train_step(batch)) for batch in BATCHES[2:]]
    weights, average = weights_of(trainer), list(trainer.averaged_buckets(1.0))

    again = started(training, phase)
    again.load(tmp_path / "second")
    assert again.steps_done == again.backend.updates == 2
    assert [told(again.train_step(batch)) for batch in BATCHES[2:]] == expected
    assert_same(weights_of(again), weights)
    for left, right in zip(again.averaged_buckets(1.0), average, strict=True):
        assert_same(left, right)
    # One trainer may go back, too.
    trainer.start_phase(phase)
    trainer.load(tmp_path / "first")
    assert trainer.steps_done == trainer.backend.updates == 1
    assert told(trainer.train_step(BATCHES[1]))[1:4] != expected[0][1:4]
    assert [told(trainer.train_step(batch)) for batch in BATCHES[2:]] == expected
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len({path.name for path in files}) < len(files), "the second save wrote files of the same names"


def test_a_checkpoint_continues_with_the_learning_rate_and_clipping_of_the_start(
    backend: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    """A resumed run may change them, and the checkpoint holds the old ones."""
    training, phase = training_of(backend), phase_of(models["student"])
    trainer = started(training, phase)
    trainer.train_step(BATCHES[0])
    trainer.train_step(BATCHES[1])
    trainer.save(tmp_path)
    before = weights_of(trainer)

    def moved(training: TrainingSettings, phase: Phase) -> tuple[float, dict[str, torch.Tensor]]:
        again = started(training, phase)
        again.load(tmp_path)
        assert_same(weights_of(again), before)
        rates = [again.train_step(batch).learning_rate for batch in BATCHES[2:4]]
        again.start_phase(phase)
        again.load(tmp_path)
        again.train_step(BATCHES[2])
        return rates[1], {name: tensor - before[name] for name, tensor in weights_of(again).items()}

    rate, way = moved(training, phase)
    half_rate, half_way = moved(training, replace(phase, learning_rate=phase.learning_rate / 2))
    assert half_rate == pytest.approx(rate / 2)
    for name, tensor in half_way.items():
        # Steps are near 1e-3; weights near 1 are rounded to 1.2e-7.
        torch.testing.assert_close(tensor, way[name] / 2, rtol=1e-3, atol=1e-6)
    clipped_rate, clipped = moved(training_of(backend, gradient_clipping=1e-6), phase)
    assert clipped_rate == rate
    assert max(float((tensor - way[name]).abs().max()) for name, tensor in clipped.items()) > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("pair", [("deepspeed-2", "deepspeed-offload-2"), ("deepspeed-offload-2", "deepspeed-2")])
def test_a_checkpoint_continues_with_and_without_offload(
    process_group: None, models: dict[str, Path], pair: tuple[str, str], tmp_path: Path
) -> None:
    phase = phase_of(models["student"])
    trainer, again = (started(training_of(BACKENDS[each]), phase) for each in pair)
    trainer.train_step(BATCHES[0])
    trainer.save(tmp_path)
    again.load(tmp_path)
    for batch in BATCHES[1:4]:
        expected, found = trainer.train_step(batch), again.train_step(batch)
        assert (found.loss, found.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-4)
        assert found.learning_rate == expected.learning_rate


def test_a_checkpoint_before_the_first_step_is_the_start(
    backend: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    training, phase = training_of(backend), phase_of(models["student"])
    trainer = started(training, phase)
    trainer.save(tmp_path)
    expected = told(trainer.train_step(BATCHES[0]))
    again = started(training, phase)
    again.load(tmp_path)
    assert told(again.train_step(BATCHES[0])) == expected


def test_a_folder_without_a_checkpoint_is_refused(backend: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    trainer = started(training_of(backend), phase_of(models["student"]))
    (tmp_path / "weights.safetensors").write_bytes(b"none")
    with pytest.raises(TrainingError, match=str(tmp_path)):
        trainer.load(tmp_path)


# ---------------------------------------------------------------------------------------------------- publication


def test_copies_in_reused_memory_are_the_weights_of_their_moment(backend: dict[str, Any], models: dict[str, Path]) -> None:
    """Each publication writes over the copies of the one before, and over no others."""
    trainer = started(training_of(backend), phase_of(models["student"], warmup_steps=0))
    plain = weights_of(trainer)
    first = {name: tensor for bucket in trainer.weight_buckets(reuse=True) for name, tensor in bucket.items()}
    assert_same(first, plain)
    kept = {name: tensor.clone() for name, tensor in plain.items()}
    trainer.train_step(BATCHES[0])
    assert_same(first, kept)
    second = {name: tensor for bucket in trainer.weight_buckets(reuse=True) for name, tensor in bucket.items()}
    assert_same(second, weights_of(trainer))
    assert_same(plain, kept)
    assert all(not torch.equal(tensor, kept[name]) for name, tensor in second.items())
    if backend["type"] != "flat":
        assert all(tensor.data_ptr() == first[name].data_ptr() for name, tensor in second.items())


@pytest.mark.parametrize("name", ["student", "tied"])
def test_published_buckets_are_the_export_and_leave_the_student_alone(
    backend: dict[str, Any], models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    training = training_of(backend)
    trainer = started(training, phase_of(models[name], warmup_steps=0))
    trainer.train_step(BATCHES[0])
    buckets = list(trainer.weight_buckets())
    limit = training.sync_bucket_mib * 2**20
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in bucket.values()) for bucket in buckets]
    assert len(buckets) > 3
    assert all(size <= limit or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    published = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
    trainer.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(published, exported)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(published, {name: tensor.detach() for name, tensor in loaded.named_parameters()})
    original = AutoModelForCausalLM.from_pretrained(models[name])
    assert all(not torch.equal(tensor, published[key]) for key, tensor in original.named_parameters())
    # They are copies.
    before = [tensor.clone() for tensor in published.values()]
    trainer.train_step(BATCHES[1])
    assert all(torch.equal(*pair) for pair in zip(before, published.values(), strict=True))
    assert any(not torch.equal(tensor, published[name]) for name, tensor in weights_of(trainer).items())


# -------------------------------------------------------------------------------------------------------- refusals


def poisoned(batch: TrainBatch, row: int) -> TrainBatch:
    columns = dict(batch.columns)
    columns["support_logprobs"] = columns["support_logprobs"].copy()
    columns["support_logprobs"][row][batch.loss_mask[row]] = np.nan
    return replace(batch, columns=columns)


def test_a_loss_that_is_not_finite_names_its_samples_and_moves_nothing(
    backend: dict[str, Any], models: dict[str, Path]
) -> None:
    trainer = started(training_of(backend, micro_batch_size=1), phase_of(models["student"]))
    trainer.train_step(BATCHES[0])
    before = weights_of(trainer)
    bad = poisoned(BATCHES[1], 3)
    with pytest.raises(TrainingError) as raised:
        trainer.train_step(bad)
    message = str(raised.value)
    assert f"step 2: the loss of the batch cannot be used: it is not finite for sample {bad.sample_ids[3]}. " in message
    assert "The optimizer was not moved" in message
    assert_same(weights_of(trainer), before)
    assert trainer.steps_done == trainer.backend.updates == 1


def test_no_part_of_an_update_is_made_where_one_part_of_the_loss_is_not_finite(
    backend: dict[str, Any], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is finite here, and would move the weights."""

    def plus_nothing(logits: torch.Tensor, batch: LossBatch) -> LossOutput:
        output = loss_function(LOSS)(logits, batch, LOSS)
        return replace(output, total=output.total + (0.0 if calls.append(0) or len(calls) == 1 else torch.nan))

    calls: list[int] = []
    trainer = started(training_of(backend), phase_of(models["student"], warmup_steps=0))
    before = weights_of(trainer)
    monkeypatch.setattr(Objective, "of", lambda *_: Objective("logits", plus_nothing))
    samples = ", ".join(str(sample) for sample in BATCHES[0].sample_ids[4:])
    with pytest.raises(TrainingError, match=f"it is not finite for sample {samples}. The optimizer was not moved"):
        trainer.train_step(BATCHES[0])
    assert_same(weights_of(trainer), before)


def test_a_gradient_that_is_not_finite_is_refused(
    backend: dict[str, Any], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = started(training_of(backend), phase_of(models["student"]))
    before = weights_of(trainer)
    monkeypatch.setattr(Objective, "of", lambda *_: Objective("logits", rooted))
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite .*samples \[10\d") as raised:
        trainer.train_step(BATCHES[0])
    assert "the optimizer was not moved" in str(raised.value)
    assert_same(weights_of(trainer), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_can_be_left_out_without_a_trace(
    backend: dict[str, Any], models: dict[str, Path], what: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the weights and the optimizer, nor in the next gradient, nor in the learning rate."""
    training = training_of(backend, on_not_finite="skip", precision=precision)
    phase = phase_of(models["student"], warmup_steps=0)
    first, second = started(training, phase), started(training, phase)
    with monkeypatch.context() as patch:
        assert told(first.train_step(BATCHES[0])) == told(second.train_step(BATCHES[0]))
        if what == "gradient":
            patch.setattr(Objective, "of", lambda *_: Objective("logits", rooted))
        report = first.train_step(poisoned(BATCHES[1], 3) if what == "loss" else BATCHES[1])
    assert f"step 2: the {what}" in report.left_out
    (shard,) = report.shards
    assert (report.num_target_tokens, shard.sample_ids, shard.num_target_tokens, shard.updates) == (0, (), 0, 1)
    assert first.steps_done == 2
    assert [told(first.train_step(batch)) for batch in BATCHES[2:4]] == [told(second.train_step(b)) for b in BATCHES[2:4]]
    assert first.backend.updates == second.backend.updates == 3
    assert_same(weights_of(first), weights_of(second))


def test_a_supervised_batch_is_not_left_out(models: dict[str, Path]) -> None:
    trainer = started(training_of({"type": "torch"}, on_not_finite="skip"), phase_of(models["student"], loss=None))
    for parameter in trainer.backend.module.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train_step(BATCHES[0])


def rooted(logits: torch.Tensor, batch: LossBatch) -> LossOutput:
    """The loss is 0, and its root has no slope there."""
    return LossOutput(total=(0.0 * logits[batch.mask].sum()).sqrt())


def test_training_goes_on_from_a_checkpoint_after_a_refusal(
    backend: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    phase = phase_of(models["student"])
    trainer = started(training_of(backend), phase)
    trainer.train_step(BATCHES[0])
    trainer.save(tmp_path)
    expected = told(trainer.train_step(BATCHES[1]))
    trainer.start_phase(phase)
    trainer.load(tmp_path)
    with pytest.raises(TrainingError):
        trainer.train_step(poisoned(BATCHES[2], 0))
    trainer.start_phase(phase)
    trainer.load(tmp_path)
    assert told(trainer.train_step(BATCHES[1])) == expected
    trainer.close()
    trainer.close()


# ------------------------------------------------------------------------------------------- plain torch in particular


def test_plain_torch_goes_on_after_a_refusal_as_if_the_batch_had_never_been(models: dict[str, Path]) -> None:
    """A notebook may drop a batch: neither a whole update that was refused nor half of one is left in the next."""
    training, phase = training_of({"type": "torch"}), phase_of(models["student"])
    first, second = started(training, phase), started(training, phase)
    reports = [told(first.train_step(batch)) for batch in BATCHES[:2]]
    assert told(second.train_step(BATCHES[0])) == reports[0]
    with pytest.raises(TrainingError, match="not finite"):
        second.train_step(poisoned(BATCHES[2], 5))
    parts = list(micro_batches(BATCHES[3], 4))
    second.backend.forward_backward(lambda forward: divergence(forward, parts[0]), last=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        second.backend.forward_backward(_interrupted, last=True)
    assert told(second.train_step(BATCHES[1])) == reports[1]


def _interrupted(forward: Any) -> torch.Tensor:
    raise RuntimeError("interrupted")


def test_a_checkpoint_of_another_backend_is_refused_by_name(
    process_group: None, models: dict[str, Path], tmp_path: Path
) -> None:
    phase = phase_of(models["student"])
    for wrote, reads, message in (
        ("deepspeed-0", "torch", "no checkpoint that training.backend.type=torch wrote"),
        ("torch", "deepspeed-0", "no checkpoint that training.backend.type=deepspeed wrote"),
    ):
        (tmp_path / wrote).mkdir()
        started(training_of(BACKENDS[wrote]), phase).save(tmp_path / wrote)
        with pytest.raises(TrainingError, match=message):
            started(training_of(BACKENDS[reads]), phase).load(tmp_path / wrote)


IN_A_PLAIN_PROCESS = """
import json, sys
from pathlib import Path
# As where they are not installed: whoever imports one fails.
sys.modules.update(dict.fromkeys(("ray", "deepspeed", "vllm")))
from tests.unit.actors.student.test_backend_contract import BATCHES, phase_of, started, training_of
trainer = started(training_of({"type": "torch"}), phase_of(Path(sys.argv[1])))
losses = [trainer.train_step(batch).loss for batch in BATCHES]
trainer.export(Path(sys.argv[2]))
print(json.dumps(losses))
"""


def test_plain_torch_needs_neither_ray_nor_deepspeed(models: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_PLAIN_PROCESS, str(models["student"]), str(tmp_path / "out")]
    root = Path(__file__).parents[4]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    want, _ = plain_loop(models["student"], BATCHES, divergence, training_of({"type": "torch"}))
    assert losses == pytest.approx([loss for loss, _, _ in want], rel=1e-5)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_backend_of_another_distribution_is_known_while_it_is_installed(installed: None) -> None:
    assert ("kdray.student_backends", "flat", "1.2") in {(each.group, each.name, each.version) for each in all_plugins()}
    training = training_of({"type": "flat", "pieces": 2})
    assert training_of(training.model_dump(mode="json")["backend"]) == training
    with pytest.raises(ValueError, match="training.ranks=2 with training.backend.type=flat: it trains on 1 at most"):
        training_of({"type": "flat"}, ranks=2)


def test_a_backend_that_is_not_installed_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"type='flat': no installed student backend has this name; there are deepspeed, torch"
    ):
        training_of({"type": "flat"})
