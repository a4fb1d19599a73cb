"""The student's ranks: real Ray Train and DeepSpeed, the same curve however the work is split."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.student.backends.deepspeed import DeepSpeedBackend
from actors.student.features import without_wrapper
from actors.weights.store import pull
from cluster.connect import start_local
from kdray.config import MiniLLMLoss, ReverseKLLoss, TrainingSettings
from kdray.errors import TrainingError
from kdray.losses import LossBatch, loss_function
from kdray.rollouts.batching import shard, take_rows
from kdray.runs.checkpoints import newest_checkpoint
from kdray.runs.storage import Storage
from kdray.types import TrainBatch
from tests.integration.conftest import VOCAB, TinyModels
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.student_group import STEPS, batches_of, curve_of, open_group, phase_of, training_of


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def local_ray(server: S3Server) -> Iterator[None]:
    # After the server: its environment is what ranks inherit.
    start_local(num_cpus=4, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> tuple[Path, Path]:
    teacher = tiny_models.make("group-teacher", 2, 64, seed=21)
    return teacher, tiny_models.make("group-student", 2, 64, seed=22)


@pytest.fixture(scope="module")
def batches(tiny_models: TinyModels, models: tuple[Path, Path]) -> list[TrainBatch]:
    return batches_of(tiny_models, *models)


@pytest.fixture(scope="module")
async def reference(models: tuple[Path, Path], batches: list[TrainBatch], tmp_path_factory: pytest.TempPathFactory):
    """One rank, whole batch at once, ZeRO 0."""
    return await curve_of(training_of(micro_batch_size=16), models[1], batches, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    ("stage", "chunk"),
    [
        (0, None),
        pytest.param(1, None, marks=pytest.mark.full),
        pytest.param(2, None, marks=pytest.mark.full),
        pytest.param(3, None, marks=pytest.mark.full),
        (3, 5),
    ],
)
async def test_two_ranks_give_the_curve_of_one(stage, chunk, models, batches, reference, tmp_path) -> None:
    """Every ZeRO stage, two ranks, micro-batches of 4: loss and gradient norm within 2e-4 of one rank's whole batch.

    With chunks the ranks have different numbers of them, and gather the head's weight once.
    """
    curve = await curve_of(training_of(ranks=2, zero_stage=stage, loss_chunk_tokens=chunk), models[1], batches, tmp_path)
    np.testing.assert_allclose(curve, reference, rtol=2e-4)
    losses = [loss for loss, _ in curve]
    assert len({round(loss, 4) for loss in losses}) == STEPS, "the student did not move: the test does not test what it says"


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 0, marks=pytest.mark.full), (2, 3)])
async def test_hidden_states_give_the_curve_of_full_rows(ranks, stage, models, batches, tiny_models, tmp_path) -> None:
    """Reverse KL inside the output head, under ZeRO 3 too, against the same loss in a plain torch loop on full rows."""
    teacher, student = models
    loss = ReverseKLLoss(type="reverse_kl")
    given = [replace(batch, columns=_with_hidden(batch, tiny_models, teacher)) for batch in batches]
    training = training_of(ranks=ranks, zero_stage=stage)
    async with open_group(training, tmp_path) as (group, _):
        await group.start_phase(replace(phase_of(student), loss=loss, teacher=(str(teacher), None)))
        reports = [await group.train_step(batch) for batch in given]

    def full_rows(model: Any, batch: TrainBatch) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = tiny_models.load(teacher)(torch.from_numpy(batch.token_ids).long()).logits.roll(1, dims=1)
        tensors = replace(LossBatch.from_train_batch(batch, VOCAB), teacher_logits=teacher_logits)
        return loss_function(loss)(_logits(model, batch), tensors, loss).total / batch.num_target_tokens

    want = _plain_loop(student, [[batch] for batch in batches], full_rows, training)
    # The states travel in half precision.
    np.testing.assert_allclose([(report.loss, report.grad_norm) for report in reports], want, rtol=2e-3)
    assert reports[0].metrics["reverse_kl_support"] == pytest.approx(reports[0].loss, rel=1e-5)


async def test_inner_epochs_mini_batches_and_text_are_the_plain_loop(models, batches, tiny_models, tmp_path) -> None:
    """Two epochs over two mini-batches with pretraining text in each update: the loop that one would write by hand."""
    teacher, student = models
    text_settings = {"source": {"type": "task"}, "batch_size": 8, "window_tokens": 32, "weight": 0.5, "teacher_share": 0.5}
    training = training_of(mini_batch_size=8, inner_epochs=2, pretraining=text_settings)
    assert training.updates_per_step == 4
    # Rollouts of a step stand for windows: their prompts' first tokens are as good a text as any.
    texts = [take_rows(batch, np.arange(8)) for batch in reversed(batches)]
    texts = [replace(text, num_target_tokens=int(text.loss_mask.sum())) for text in texts]
    async with open_group(training, tmp_path) as (group, _):
        await group.start_phase(phase_of(student))
        reports = [await group.train_step(batch, text) for batch, text in zip(batches, texts, strict=True)]

    updates = []
    for batch, text in zip(batches, texts, strict=True):
        rows, windows = shard(batch, 0, 1), shard(text, 0, 1)
        step = []
        for epoch in range(2):
            order = np.random.default_rng([0, batch.step, epoch]).permutation(16)
            step += [(take_rows(rows, np.sort(order[n::2])), take_rows(windows, np.arange(n, 8, 2))) for n in range(2)]
        updates.append(step)

    def both(model: Any, given: tuple[TrainBatch, TrainBatch]) -> torch.Tensor:
        rows, windows = (LossBatch.from_train_batch(part, VOCAB) for part in given)
        main = loss_function(MiniLLMLoss())(_logits(model, given[0]), rows, MiniLLMLoss()).total
        at = windows.mask.nonzero(as_tuple=True)
        q = _logits(model, given[1]).log_softmax(-1)[at]
        cross_entropy = -q.gather(-1, windows.token_ids[at].unsqueeze(-1)).mean()
        p = tiny_models.load(teacher)(torch.from_numpy(given[1].token_ids).long()).logits.roll(1, dims=1).log_softmax(-1)[at]
        ids = p.topk(8).indices
        tails = [(1 - row.exp().gather(-1, ids).sum(-1, keepdim=True)).log() for row in (p, q)]
        p8, q8 = (torch.cat([row.gather(-1, ids), tail], -1) for row, tail in zip((p, q), tails, strict=True))
        divergence = (p8.exp() * (p8 - q8)).sum(-1).mean()
        return main / rows.mask.sum() + 0.5 * (0.5 * cross_entropy + 0.5 * divergence)

    want = _plain_loop(student, updates, both, training)
    np.testing.assert_allclose([report.loss for report in reports], [loss for loss, _ in want], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose([report.grad_norm for report in reports], [norm for _, norm in want], rtol=1e-3)
    # Beyond the first update the weights have moved under the same rollouts, and the ratio says so.
    assert abs(reports[0].metrics["staleness_ratio"] - 1.0) > 1e-4
    assert reports[0].metrics["teacher/t/staleness_0/staleness_clipped"] == reports[0].metrics["staleness_clipped"]
    assert {"pretraining_loss", "pretraining_kl"} <= set(reports[0].metrics)


def _with_hidden(batch: TrainBatch, tiny_models: TinyModels, teacher: Path) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = tiny_models.load(teacher)(torch.from_numpy(batch.token_ids).long(), output_hidden_states=True)
    return {**batch.columns, "teacher_hidden": output.hidden_states[-1].roll(1, dims=1).numpy().astype(np.float16)}


def _logits(model: Any, batch: TrainBatch) -> torch.Tensor:
    """Right padding of a causal model needs no mask."""
    return model(torch.from_numpy(batch.token_ids).long()).logits.roll(1, dims=1)


def _plain_loop(
    student: Path, steps: list[Any], loss_of: Callable[[Any, Any], torch.Tensor], training: TrainingSettings
) -> list[tuple[float, float]]:
    """(mean loss, largest gradient norm) of every step, each a list of updates, by torch alone; schedule as in `_phase`."""
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=training.betas, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    curve = []
    for updates in steps:
        losses, norms = [], []
        for update in updates:
            loss = loss_of(model, update)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)))
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        curve.append((float(np.mean(losses)), max(norms)))
    return curve


@pytest.mark.full
async def test_bf16_and_gradient_checkpointing_stay_near_and_resume(models, batches, reference, tmp_path) -> None:
    """What an optimizer of bf16 writes is read again, as tensors and plain values alone."""
    training = training_of(precision="bf16", gradient_checkpointing=True, zero_stage=1)
    async with open_group(training, tmp_path) as (ranks, _):
        await ranks.start_phase(phase_of(models[1]))
        losses = [(await ranks.train_step(batch)).loss for batch in batches[:2]]
        await ranks.save_checkpoint(2)
        losses += [(await ranks.train_step(batch)).loss for batch in batches[2:]]
        await ranks.start_phase(phase_of(models[1]), tmp_path / "checkpoints" / "step-000002")
        again = [(await ranks.train_step(batch)).loss for batch in batches[2:]]
    np.testing.assert_allclose(losses, [loss for loss, _ in reference], atol=0.08)
    assert again == losses[2:]


async def test_published_weights_are_the_trained_ones_and_a_bad_loss_moves_nothing(models, batches, tmp_path) -> None:
    """ZeRO 3, buckets smaller than a layer: what replicas pull equals the export; NaN stops before the optimizer."""
    training = training_of(ranks=2, zero_stage=3, sync_bucket_mib=0.03)
    async with open_group(training, tmp_path) as (ranks, store):
        await ranks.start_phase(phase_of(models[1]))
        for batch in batches[:2]:
            await ranks.train_step(batch)
        bad = batches[2]
        columns = dict(bad.columns)
        columns["teacher_logprobs"] = columns["teacher_logprobs"].copy()
        row = 3
        columns["teacher_logprobs"][row][bad.loss_mask[row]] = np.nan
        poisoned = TrainBatch(**{**{name: getattr(bad, name) for name in bad.__slots__}, "columns": columns})
        with pytest.raises(TrainingError, match=rf"step 3: .*not finite for sample .*{bad.sample_ids[row]}"):
            await ranks.train_step(poisoned)
        await ranks.publish(2)
        version, folder, paths = await pull(store, 2)
        await ranks.export(tmp_path / "student")
        assert version == 2
        assert len(paths) > 3
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        pulled = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
        before = AutoModelForCausalLM.from_pretrained(models[1]).state_dict()
        assert set(pulled) == set(exported)
        assert all(torch.equal(pulled[name], exported[name]) for name in pulled)
        assert any(not torch.equal(before[name], exported[name]) for name in pulled)
        assert all(torch.isfinite(tensor).all() for tensor in pulled.values())
        assert folder.is_dir()


@pytest.mark.full
@pytest.mark.parametrize("stored", [False, True])
async def test_an_open_checkpoint_is_committed_beside_a_step_and_is_where_lost_ranks_go_on(
    stored, models, batches, reference, tmp_path, server
) -> None:
    """Opened after step 2, committed after step 3: it holds step 2, and ranks that are lost then train step 3 again."""
    training = training_of(ranks=2, zero_stage=1, max_restarts=1)
    async with open_group(training, tmp_path, server.url(f"{BUCKET}/opened") if stored else None) as (ranks, _):
        await ranks.start_phase(phase_of(models[1]))
        curve = [await ranks.train_step(batch) for batch in batches[:2]]
        await ranks.open_checkpoint(2, {"note": "of step 2"})
        committing = asyncio.ensure_future(ranks.commit_checkpoint())
        curve.append(await ranks.train_step(batches[2]))
        saved = await committing
        assert saved.bytes > 0
        assert saved.write_s > 0
        assert saved.store_s > 0
        _kill_one_rank()
        await asyncio.sleep(1)
        curve.append(await ranks.train_step(batches[3]))
        assert await ranks.restarts() == 1
    np.testing.assert_allclose([(report.loss, report.grad_norm) for report in curve], reference, rtol=2e-4)
    storage = Storage(server.url(f"{BUCKET}/opened")) if stored else Storage.local(tmp_path)
    found, bad = newest_checkpoint([storage])
    assert found is not None
    assert (found.step, found.marker["note"], bad) == (2, "of step 2", [])


@pytest.mark.full
@pytest.mark.parametrize(("stage", "stored"), [(1, False), (3, True)])
async def test_a_lost_rank_resumes_from_the_commit_and_replays(
    stage, stored, models, batches, reference, tmp_path, server
) -> None:
    """SIGKILL one of two ranks after the commit of step 2: the group restarts there, replays step 3, same curve.

    With a storage, each rank fetches from there what it needs of the phase's model and of the checkpoint.
    """
    training = training_of(ranks=2, zero_stage=stage, max_restarts=1)
    base, checkpoints = tmp_path / "checkpoints" / "sft", tmp_path / "checkpoints"
    async with open_group(training, tmp_path, server.url(f"{BUCKET}/run") if stored else None) as (ranks, _):
        await ranks.start_phase(phase_of(models[1]))
        await ranks.export(base)
        await ranks.start_phase(phase_of(base))
        curve = [await ranks.train_step(batch) for batch in batches[:2]]
        await ranks.save_checkpoint(2)
        curve.append(await ranks.train_step(batches[2]))
        _kill_one_rank()
        await asyncio.sleep(1)
        curve.append(await ranks.train_step(batches[3]))
        assert await ranks.restarts() == 1
    np.testing.assert_allclose([(report.loss, report.grad_norm) for report in curve], reference, rtol=2e-4)
    kept = (
        {name.split("/")[2] for name in server.held("run/checkpoints/")} if stored else {p.name for p in checkpoints.iterdir()}
    )
    assert kept == {"sft", "step-000002"}
    assert not (stored and checkpoints.exists())


@pytest.mark.full
async def test_ranks_lost_once_a_checkpoint_go_on_and_a_failure_that_repeats_ends_them(models, batches, tmp_path) -> None:
    """More losses than `max_restarts`, each after a checkpoint; then two of them without one."""
    told: list[tuple[str, dict[str, Any]]] = []
    async with open_group(training_of(ranks=2, max_restarts=1), tmp_path) as (ranks, _):
        ranks.on_event = lambda kind, **fields: told.append((kind, fields))
        await ranks.start_phase(phase_of(models[1]))
        for step in range(1, 4):
            await ranks.train_step(batches[0])
            await ranks.save_checkpoint(step)
            _kill_one_rank()
            await asyncio.sleep(1)
        await ranks.train_step(batches[1])
        assert await ranks.restarts() == 3
        _kill_one_rank()
        with pytest.raises(TrainingError, match=r"lost 2 times without a checkpoint .*\(training\.max_restarts=1\)"):
            await ranks.train_step(batches[2])
    assert [kind for kind, _ in told] == [*["ranks_lost", "restarts_refilled"] * 2, "ranks_lost", "ranks_lost"]


def _kill_one_rank() -> None:
    """End one training worker of this test's own Ray, found by the class of its actor."""
    import os
    import signal

    from ray._private.state import actors

    ranks = [actor for actor in actors().values() if "RayTrainWorker" in actor["ActorClassName"] and actor["State"] == "ALIVE"]
    assert len(ranks) == 2
    os.kill(ranks[1]["Pid"], signal.SIGKILL)


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 0, marks=pytest.mark.full), (2, 3)])
async def test_the_average_of_a_students_versions_is_the_one_computed_by_hand(ranks, stage, models, batches, tmp_path) -> None:
    """A mean teacher: started as the student, moved by a share at every renewal, kept by a checkpoint, published as it is."""
    phase, published, wanted = phase_of(models[1]), [], []
    async with open_group(training_of(ranks=ranks, zero_stage=stage), tmp_path / "one") as (group, weights):
        await group.start_phase(phase)
        average = None
        for version, batch in enumerate(batches[:3]):
            await group.renew(version, decay=0.75)
            await group.publish(version)
            student = await _tensors(weights, version)
            average = student if average is None else {k: 0.75 * average[k] + 0.25 * student[k] for k in student}
            wanted.append(average)
            published.append(await _tensors(group.average, version))
            await group.train_step(batch)
        await group.save_checkpoint(3)
    for got, want in zip(published, wanted, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (published[2][name] - published[0][name]).abs().max() > 1e-4, "the student did not move"
    async with open_group(training_of(ranks=ranks, zero_stage=stage), tmp_path / "two") as (group, _):
        await group.start_phase(phase, tmp_path / "one" / "checkpoints" / "step-000003")
        await group.renew(0, decay=1.0)
        resumed = await _tensors(group.average, 0)
    assert all(torch.equal(resumed[name], published[2][name]) for name in resumed)


async def _tensors(store: Any, version: int) -> dict[str, torch.Tensor]:
    """A version's weights, as soon as they have arrived in a store: they are put while the ranks go on."""
    found, folder, paths = await pull(store, version)
    assert found == version
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    shutil.rmtree(folder)
    return tensors


FEATURES = {
    "hidden": {"weight": 1.0, "layers": "uniform", "distance": "mse"},
    "attention": {"weight": 1.0, "layers": "uniform", "distance": "kl"},
    "relation": {"weight": 1.0, "distance": "similarities"},
}
HIDDEN_WEIGHTS = 1.0, 1.0, 0.25, 0.0
"""Of the hidden states' term in each step: a schedule's values."""


def _plain_features(teacher: Any, student: Any, batch: TrainBatch, hidden_weight: float) -> torch.Tensor:
    """The three terms written out for equal widths and depths, a row at a time; sums over response tokens."""
    ids = torch.from_numpy(batch.token_ids).long()
    total = torch.zeros(())
    for row, length in enumerate(batch.lengths.tolist()):
        at = torch.from_numpy(np.nonzero(batch.loss_mask[row])[0] - 1)
        given = {"input_ids": ids[row : row + 1, :length], "output_hidden_states": True, "output_attentions": True}
        q = student.student(**given)
        with torch.no_grad():
            p = teacher(**given)
        for layer, projection in enumerate(student.projections):
            gap = q.hidden_states[layer][0, at] @ projection.weight.T - p.hidden_states[layer][0, at]
            total = total + hidden_weight * gap.square().mean(-1).sum() / len(student.projections)
        for a, b in zip(q.attentions, p.attentions, strict=True):
            # Each row up to its own position: what lies behind is masked.
            for s in at.tolist():
                rows = [each[0, :, s, : s + 1].clamp(min=1e-12) for each in (a, b)]
                total = total + (rows[1] * (rows[1] / rows[0]).log()).sum(-1).mean() / len(q.attentions)
        if len(at) > 1:
            grams = [torch.nn.functional.normalize(each.hidden_states[-1][0, at], dim=-1) for each in (q, p)]
            total = total + (grams[0] @ grams[0].T - grams[1] @ grams[1].T).square().sum() / (len(at) - 1)
    return total


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(1, 0), (2, 3), pytest.param(2, 1, marks=pytest.mark.full), pytest.param(2, 2, marks=pytest.mark.full)],
)
async def test_features_train_their_maps_and_resume_and_stay_out_of_the_export(
    ranks, stage, models, batches, tiny_models, tmp_path
) -> None:
    """Every ZeRO stage, with text, against a plain torch loop; a resume repeats steps 3 and 4; the export is the student."""
    teacher, student = models
    text_settings = {"source": {"type": "task"}, "batch_size": 8, "window_tokens": 32, "weight": 0.5}
    settings = {"features": FEATURES, "pretraining": text_settings, "loss_chunk_tokens": 8 if ranks == 2 else None}
    training = training_of(ranks=ranks, zero_stage=stage, **settings)
    texts = [take_rows(batch, np.arange(8)) for batch in reversed(batches)]
    given = [
        (batch, replace(text, num_target_tokens=int(text.loss_mask.sum())), {"training.features.hidden.weight": weight})
        for batch, text, weight in zip(batches, texts, HIDDEN_WEIGHTS, strict=True)
    ]
    phase = replace(phase_of(student), loss=ReverseKLLoss(type="reverse_kl"), feature_teacher=(str(teacher), None))
    async with open_group(training, tmp_path) as (group, store):
        await group.start_phase(phase)
        reports = [await group.train_step(*each) for each in given[:2]]
        await group.save_checkpoint(2)
        reports += [await group.train_step(*each) for each in given[2:]]
        await group.publish(STEPS)
        _, _, paths = await pull(store, STEPS)
        await group.export(tmp_path / "student")
        await group.save_checkpoint(STEPS)
        await group.start_phase(phase, tmp_path / "checkpoints" / "step-000002")
        again = [await group.train_step(*each) for each in given[2:]]
    curve = [(report.loss, report.grad_norm) for report in reports]

    from safetensors.torch import load_file

    exported = load_file(tmp_path / "student" / "model.safetensors")
    pulled = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert set(exported) == set(pulled) == set(tiny_models.load(student).state_dict())
    assert all(torch.equal(exported[name], pulled[name]) for name in exported)
    held = DeepSpeedBackend.trained_weights(tmp_path / "checkpoints" / f"step-{STEPS:06d}")
    assert len(without_wrapper(held)) < len(held), "the projections are trained, too"
    assert all(torch.equal(exported[name], without_wrapper(held)[name]) for name in exported)
    np.testing.assert_allclose([(report.loss, report.grad_norm) for report in again], curve[2:], rtol=1e-6)

    want, trained = _plain_features_loop(teacher, student, given, training)
    np.testing.assert_allclose(curve, want, rtol=5e-4)
    for name, parameter in trained.student.named_parameters():
        torch.testing.assert_close(exported[name], parameter.detach(), rtol=1e-2, atol=2e-4, msg=name)
    assert reports[-1].metrics["feature_hidden"] < reports[0].metrics["feature_hidden"]
    assert {"feature_attention", "feature_relation"} <= set(reports[0].metrics)


def _plain_features_loop(
    teacher: Path, student: Path, given: list[tuple[TrainBatch, TrainBatch, dict[str, float]]], training: TrainingSettings
) -> tuple[list[tuple[float, float]], Any]:
    """(loss, gradient norm) of every step by torch alone, and what was trained: the student and its maps."""
    from transformers import AutoModelForCausalLM, get_scheduler

    both = torch.nn.Module()
    both.student = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager").eval()
    both.projections = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(3))
    for projection in both.projections:
        torch.nn.init.eye_(projection.weight)
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager").eval()
    groups = [{"params": list(both.student.parameters())}, {"params": list(both.projections.parameters()), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=training.betas, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    loss, curve = ReverseKLLoss(type="reverse_kl"), []
    for batch, text, scheduled in given:
        main = loss_function(loss)(_logits(both.student, batch), LossBatch.from_train_batch(batch, VOCAB), loss).total
        mask = torch.from_numpy(text.loss_mask)
        words = torch.from_numpy(text.token_ids).long()[mask]
        cross_entropy = torch.nn.functional.cross_entropy(_logits(both.student, text)[mask], words)
        features = _plain_features(frozen, both, batch, *scheduled.values())
        total = (main + features) / batch.num_target_tokens + 0.5 * cross_entropy
        optimizer.zero_grad()
        total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(both.parameters(), training.gradient_clipping))
        optimizer.step()
        scheduler.step()
        curve.append((total.item(), norm))
    return curve, both
