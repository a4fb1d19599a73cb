"""Training of the student on one rank, with any backend: updates, losses, non-finite checks, reports, publication, checkpoints.

Needs no Ray and, with a single-process backend, no process group: `StudentTrainer(training, vocab_size, seed)` trains in a
notebook as it does on a rank. One instance per rank; every public method is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actors.student import lora
from actors.student.backend import Forward, Optimization, StudentBackend, open_backend
from actors.student.dropout import set_recomputation, without_dropout
from actors.student.features import StudentWithFeatures, load_feature_teacher, place_teacher, unwrapped, weigh_features
from actors.student.file_tensors import Fixed, export_gap, fixed_weights, in_files, persistent_buffers, whole_buckets
from actors.student.hidden_state_loss import HEAD_TOLERANCE, OutputHead, hidden_state_loss, load_output_head
from actors.student.micro_batch_loss import MicroBatchLoss
from actors.student.output_head import use_float32_head
from actors.student.refusal import NotFinite, refuse_gradient, refuse_loss
from actors.weights.copies import CopyBuffers
from kdray.checks.parity import TrainedLogprobs
from kdray.config import LossSettings, TrainingSettings
from kdray.errors import TrainingError
from kdray.losses import LossOutput, Objective
from kdray.losses.policy_gradient import Whitening, return_sums
from kdray.models.attention import attention_arguments
from kdray.models.saving import TokenizerSource, save_model
from kdray.rollouts.batching import micro_batches, packed_micro_batches, take_rows
from kdray.rollouts.schedules import of_section
from kdray.rollouts.training_digest import ShardRecord
from kdray.runs.metrics import reduce_sums
from kdray.types import StepReport, TrainBatch

_AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Phase:
    """Phase of training with its own optimizer: supervised warm-up, distillation, control."""

    name: str
    model: str
    """Folder or hub id of the phase's initial weights."""
    revision: str | None
    """Commit or tag, if `model` is a hub id."""
    loss: LossSettings | None
    """Loss to minimise; None is supervised cross entropy."""
    learning_rate: float
    steps: int
    """Length of the learning-rate schedule, in optimizer updates."""
    warmup_steps: int = 0
    schedule: str = "constant"
    teacher: tuple[str, str | None] | None = None
    """Folder or hub id, and revision, of the teacher whose output head turns hidden states into rows; None if the batches come
    with a support."""
    base: tuple[str, str | None] | None = None
    """Folder or hub id, and revision, of the weights that the adapter in `model` changes; None if they are `model`'s own."""
    feature_teacher: tuple[str, str | None] | None = None
    """Folder or hub id, and revision, of the teacher that `training.features` compares with; None if the phase does not."""


class _Update(NamedTuple):
    """Results of one optimizer update, reduced over ranks."""

    loss: float
    sums: dict[str, float]
    text_sums: dict[str, float]
    text_tokens: int
    grad_norm: float
    learning_rate: float


class StudentTrainer:
    """A rank's share of training the student. Call `start_phase` before anything else."""

    def __init__(self, training: TrainingSettings, vocab_size: int, seed: int, backend: StudentBackend | None = None) -> None:
        """Args: vocab_size: token ids that teacher and student share; backend: None opens the one of `training.backend`."""
        self.training = training
        self.vocab_size = vocab_size
        self.seed = seed
        self.backend = open_backend(training) if backend is None else backend
        self.rank = self.backend.rank
        self.world_size = self.backend.world_size
        self.phases_started = 0
        self.steps_done = 0
        self.has_trained = False
        """True once a step was made since the phase was started, or continued from a checkpoint."""
        self.phase: Phase | None = None
        self._loss: LossSettings | None = None
        self._average: dict[str, torch.Tensor] = {}
        self._facts: dict[str, Any] | None = None
        self._copies = CopyBuffers()
        self._teacher_head: OutputHead | None = None
        self._micro_batch_loss: MicroBatchLoss | None = None
        self._record = ShardRecord()

    def start_phase(self, phase: Phase) -> None:
        """Load the phase's weights and start a fresh optimizer and schedule."""
        training = self.training
        self.backend.close()
        self._facts, self._copies = None, CopyBuffers()
        module = self._load(phase)
        optimization = Optimization(
            phase.learning_rate, training.betas, training.weight_decay, phase.schedule, phase.warmup_steps, phase.steps
        )
        self.backend.start(module, optimization)
        set_recomputation(self.backend.module, training.gradient_checkpointing)
        place_teacher(module, self.device)
        self._teacher_head = None
        self._micro_batch_loss = MicroBatchLoss(self.backend.module, training, self.vocab_size, self.device)
        if self.rank == 0:
            self._micro_batch_loss.log()
        if phase.teacher is not None:
            self._teacher_head = load_output_head(*phase.teacher).to(self.device, self._dtype)
        if phase.loss is not None:
            # Supervised phases keep it: their checkpoints include distillation's averaged teacher.
            self._average = {}
        self.phase = phase
        self.phases_started += 1
        self.steps_done = 0
        self.has_trained = False

    def _load(self, phase: Phase) -> torch.nn.Module:
        """The phase's student, in a wrapper if there is a white-box teacher."""
        from transformers import AutoModelForCausalLM

        features = self.training.features if phase.feature_teacher is not None else None
        maps = features is not None and features.attention is not None
        source, revision, adapter = phase.model, phase.revision, None
        if self.training.lora is not None and phase.base is not None and (Path(phase.model) / lora.ADAPTER).is_dir():
            # An earlier phase's student: its own files are merged and rounded.
            (source, revision), adapter = phase.base, Path(phase.model) / lora.ADAPTER
        with self.backend.loading():
            torch.manual_seed(self.seed)
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=self._dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **attention_arguments(source, revision, self.training.attention, maps=maps),
            )
        if lacking := sorted(info["missing_keys"]):
            # Transformers only warns, and goes on with random weights.
            raise TrainingError(f"{source}: its files lack {', '.join(lacking[:4])} ({len(lacking)} tensors in all)")
        model.config.use_cache = False
        if self._dtype != torch.float32 and self.training.logits == "float32":
            use_float32_head(model)
        if self.training.lora is not None:
            lora.add_adapter(model, self.training.lora, (source, revision), adapter, self.seed)
        if self.training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Dropout would make the trained distribution differ from the one that the replicas sample from.
        without_dropout(model)
        if features is None or phase.feature_teacher is None:
            return model
        teacher = load_feature_teacher(*phase.feature_teacher, features, model.dtype)
        return StudentWithFeatures(model, teacher, features, self.seed)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.training.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def train_step(
        self, batch: TrainBatch, text: TrainBatch | None = None, scheduled: Mapping[str, float] | None = None
    ) -> StepReport:
        """Run one step on this rank's shard; every rank gets the same report.

        A step is one optimizer update, or several if the phase distils and the settings use mini-batches or inner epochs.
        Within an update every token's loss has the same weight, however the batch is split into micro-batches and ranks: sums
        are divided by the target tokens of all ranks, or by `training.loss_tokens`. Pretraining text adds its own mean to each.
        Args: text: this rank's windows of the step; scheduled: settings that differ in this step, by full name; those of
        sampling are not read.
        Raises: TrainingError on all ranks if any rank's loss or gradient is not finite, unless the settings leave the batch
        out; the optimizer has then not made that update.
        """
        assert self.phase is not None
        started = time.perf_counter()
        self._loss = self.phase.loss
        if self._loss is not None:
            self._loss = self._loss.model_copy(update=of_section("loss", scheduled or {}))
        weigh_features(self.backend.module, scheduled or {})
        self._record = ShardRecord()
        updates = list(self._updates(batch, text))
        objective = Objective.of(self._loss, self._whitening(batch))
        try:
            done = [self._update(part, text_part, objective, number) for number, (part, text_part) in enumerate(updates)]
        except NotFinite as error:
            if self.phase.loss is None or not self.training.skips_not_finite:
                raise
            return self._leave_out(batch.step, str(error), started)
        sums = {name: sum(update.sums[name] for update in done) for name in done[0].sums}
        passes = len(done) // self._parts
        metrics = reduce_sums(sums, batch.num_target_tokens * passes)
        text_sums = {name: sum(update.text_sums[name] for update in done) for name in done[0].text_sums}
        metrics |= reduce_sums(text_sums, sum(update.text_tokens for update in done))
        tokens, positions = self.backend.reduce([float(self._record.tokens), float(self._record.positions)])
        metrics["padding"] = 1.0 - tokens / positions
        self.steps_done += 1
        self.has_trained = True
        shards = tuple(self.gather(self._record.shard(self.backend.updates)))
        return StepReport(
            step=batch.step,
            loss=sum(update.loss for update in done) / len(done),
            num_target_tokens=sum(shard.num_target_tokens for shard in shards) // passes,
            grad_norm=max(update.grad_norm for update in done),
            learning_rate=done[-1].learning_rate,
            seconds=time.perf_counter() - started,
            metrics=metrics,
            shards=shards,
        )

    def _leave_out(self, step: int, reason: str, started: float) -> StepReport:
        """Go on without a batch, whose one update was refused on all ranks; numbers that it would have are NaN."""
        self.backend.abandon()
        self.steps_done += 1
        shards = tuple(self.gather(self._record.shard(self.backend.updates)))
        return StepReport(step, np.nan, 0, np.nan, np.nan, time.perf_counter() - started, shards=shards, left_out=reason)

    @property
    def _parts(self) -> int:
        """Number of mini-batches per step in this phase; supervised phases have one."""
        return self.training.mini_batches if self.phase is not None and self.phase.loss is not None else 1

    def _updates(self, batch: TrainBatch, text: TrainBatch | None) -> Iterator[tuple[TrainBatch, TrainBatch | None]]:
        """Rows of each optimizer update of the step: mini-batches in a new order every inner epoch."""
        distils = self.phase is not None and self.phase.loss is not None
        epochs = self.training.inner_epochs if distils else 1
        rows, count = np.arange(len(batch.lengths)), self._parts
        windows = None if text is None else np.arange(len(text.lengths))
        for epoch in range(epochs):
            if count > 1:
                # The same on all ranks: rows of one index have similar lengths on every rank (`kdray.rollouts.batching.shard`).
                rows = np.random.default_rng([self.seed, batch.step, epoch]).permutation(len(rows))
            for number in range(count):
                part = batch if count == 1 else self._part(batch, rows[number::count])
                if text is None or windows is None:
                    yield part, None
                else:
                    yield part, text if count == 1 else self._part(text, windows[number::count])

    def _part(self, batch: TrainBatch, rows: np.ndarray) -> TrainBatch:
        """Some rows of every rank's shard, with the total number of target tokens that they have on all ranks."""
        part = take_rows(batch, np.sort(rows))
        (tokens,) = self.backend.reduce([float(part.loss_mask.sum())])
        return replace(part, num_target_tokens=int(tokens))

    def _update(self, batch: TrainBatch, text: TrainBatch | None, objective: Objective, number: int) -> _Update:
        """Run one optimizer update. Args: number: updates made before it in this step."""
        assert self.phase is not None
        parts = [(part, False) for part in self._micro_batches(batch)]
        parts += [] if text is None else [(part, True) for part in self._micro_batches(text)]
        # Backends average gradients over ranks; the loss is a sum over all of them.
        scale = self.world_size / max(self._divisor(batch), 1)
        text_scale = 0.0
        if text is not None and self.training.pretraining is not None:
            text_scale = self.training.pretraining.weight * self.world_size / max(text.num_target_tokens, 1)
        total = torch.zeros((), dtype=torch.float64)
        sums: dict[str, float] = {}
        text_sums: dict[str, float] = {}
        bad: list[str] = []
        wrong: list[str] = []
        for index, (part, is_text) in enumerate(parts):
            last = index == len(parts) - 1
            output, weighted = self._micro_batch(part, is_text, objective, text_scale if is_text else scale, last)
            if not is_text:
                self._record.add(part)
            if not bool(torch.isfinite(output.total)):
                what = "window" if is_text else "sample"
                samples = [str(sample) for sample in part.sample_ids if sample >= 0]
                bad.append(f"it is not finite for {what} {', '.join(samples)}")
            total += weighted.detach().double().cpu()
            into = text_sums if is_text else sums
            for name, value in output.sums.items():
                into[name] = into.get(name, 0.0) + float(value)
        tokens_here = int(batch.loss_mask.sum())
        if sums.get("teacher_head_error", 0.0) > HEAD_TOLERANCE * tokens_here:
            error = sums["teacher_head_error"] / tokens_here
            wrong.append(
                f"the teacher's output head gives log p {error:.2g} nats from the recorded ones, so it is not the whole "
                "way from hidden state to logits: set rollout.teacher_signal=support"
            )
        refuse_loss(self.backend, bad, wrong, batch.step, number, self.phase.name)
        moved = self.backend.step()
        refuse_gradient(moved, batch, number)
        self._record.applied()
        reduced = self._reduce({"": float(total), **sums})
        return _Update(
            loss=reduced.pop("") / self.world_size,
            sums=reduced,
            text_sums=self._reduce(text_sums),
            text_tokens=0 if text is None else text.num_target_tokens,
            grad_norm=moved.grad_norm,
            learning_rate=moved.learning_rate,
        )

    def _micro_batches(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """The forward passes of an update."""
        if self.training.micro_batch_tokens is None:
            return micro_batches(batch, self.training.micro_batch_size)
        longest = np.max(self.backend.gather(batch.lengths.tolist()), axis=0)
        return packed_micro_batches(batch, longest, self.training.micro_batch_tokens)

    def _divisor(self, batch: TrainBatch) -> int:
        """Number of tokens that the sums of an update are divided by; supervised phases have no constant one."""
        constant = None if self.phase is None or self.phase.loss is None else self.training.loss_tokens
        return batch.num_target_tokens if constant is None else constant

    def _micro_batch(
        self, part: TrainBatch, is_text: bool, objective: Objective, scale: float, last: bool
    ) -> tuple[LossOutput, torch.Tensor]:
        """Forward and backward pass of a micro-batch. Returns: its sums, and its scaled share of the update's loss."""
        done: list[tuple[LossOutput, torch.Tensor]] = []

        def loss(forward: Forward) -> torch.Tensor:
            output = self._pretraining_loss(forward, part) if is_text else self._distillation_loss(forward, part, objective)
            done.append((output, output.total * scale))
            return done[0][1]

        self.backend.forward_backward(loss, last)
        return done[0]

    def _pretraining_loss(self, forward: Forward, part: TrainBatch) -> LossOutput:
        assert self.training.pretraining is not None
        assert self._micro_batch_loss is not None
        return self._micro_batch_loss(forward, part, Objective.of_text(self.training.pretraining))

    def _distillation_loss(self, forward: Forward, part: TrainBatch, objective: Objective) -> LossOutput:
        """The phase's loss on one micro-batch: with the teacher's hidden states if the phase has its head."""
        assert self._micro_batch_loss is not None
        if self._teacher_head is None:
            return self._micro_batch_loss(forward, part, objective, features=True)
        return hidden_state_loss(
            forward, self.backend.module, part, self._loss, self._teacher_head, self.vocab_size, *self._micro_batch_loss.chunks
        )

    def _whitening(self, batch: TrainBatch) -> Whitening | None:
        """Mean and deviation of the whole step's returns, for losses that whiten them; the same on all ranks."""
        sums = return_sums(batch, self._loss)
        return None if sums is None else Whitening.from_sums(self.backend.reduce(sums.tolist()))

    def _reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over ranks; all ranks have the same names."""
        names = sorted(sums)
        return dict(zip(names, self.backend.reduce([sums[name] for name in names]), strict=True))

    def log_probabilities(self, ids: Sequence[int]) -> TrainedLogprobs:
        """log q of every id but the first under the present weights, by the forward pass of training.

        Replicas compare theirs with it; a collective, like everything here.
        """
        tokens = torch.tensor([list(ids)], device=self.device)
        output = self.backend.evaluate(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        rows = output.logits[0, :-1, : self.vocab_size].log_softmax(-1, dtype=torch.float32)
        logprobs = rows.gather(-1, tokens[0, 1:, None])[:, 0]
        return TrainedLogprobs(logprobs.cpu().numpy(), float(rows.std(-1).mean()))

    @property
    def fixed(self) -> Fixed:
        """Weights that no update of the phase changes."""
        return fixed_weights(self.backend, unwrapped(self.backend.module))

    def weight_buckets(
        self, device: torch.device | str = "cpu", fixed: bool | None = None, reuse: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The student's tensors as checkpoint files have them, in buckets of `training.sync_bucket_mib`: copies on `device`.

        Rank 0 gets the tensors; other ranks get the same number of empty buckets: gathering is collective.
        Args: fixed: True for those of `self.fixed` alone, False for all others; reuse: True for copies on the CPU that hold
        until the next call with True.
        """
        for bucket in self._module_buckets(device, fixed, self._copies if reuse else None):
            yield in_files(unwrapped(self.backend.module), bucket)

    def _module_buckets(
        self, device: torch.device | str = "cpu", fixed: bool | None = None, copies: CopyBuffers | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Parameters, then persistent buffers, under the names that they have in the module."""
        module, held = unwrapped(self.backend.module), set(self.fixed.names)
        chosen = (each for each in lora.published(module) if fixed is None or (each.name in held) == fixed)
        # A forward pass of training may change a buffer.
        buffers = {} if fixed else persistent_buffers(module)
        yield from whole_buckets(self.backend, chosen, buffers, self.training.sync_bucket_mib * 2**20, device, copies)

    def _adapter(self) -> dict[str, torch.Tensor]:
        """Whole A and B by name in the module, on rank 0's CPU; empty on other ranks, and without an adapter."""
        parameters = lora.adapter_parameters(unwrapped(self.backend.module))
        tensors = self.backend.whole(list(parameters.values()), "cpu") if parameters else []
        return dict(zip(parameters, tensors, strict=False))

    def _adapter_facts(self) -> dict[str, Any] | None:
        """What the adapter belongs to, on rank 0; computed once a phase, since its base is frozen."""
        if self.training.lora is None:
            return None
        if self._facts is None:
            parts = (each.parameters[:1] for each in lora.published(unwrapped(self.backend.module)))
            tensors = (tensor for part in parts for tensor in self.backend.whole(part, "cpu"))
            self._facts = lora.facts_of(self.training.lora, tensors)
        return self._facts

    def averaged_buckets(self, decay: float, fixed: bool | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Exponential moving average of the weights, after an update: average <- decay average + (1 - decay) weights.

        It is initialised with the weights, kept on rank 0's CPU in float32, and part of every checkpoint. Buckets as in
        `weight_buckets`, in the weights' own dtype; those that no update changes are their own average. Source: Tarvainen &
        Valpola 2017, mean teacher (arXiv 1703.01780).
        """
        if fixed:
            yield from self.weight_buckets(fixed=True)
            return
        for bucket in self.weight_buckets(fixed=fixed):
            averaged = {}
            for name, tensor in bucket.items():
                last = self._average.get(name)
                self._average[name] = tensor.float() if last is None else torch.lerp(tensor.float(), last, decay)
                averaged[name] = self._average[name].to(tensor.dtype)
            yield averaged

    def has_average(self) -> bool:
        """True, on every rank, once there is such an average."""
        return bool(self.gather(bool(self._average))[0])

    def export(self, folder: Path, tokenizer: TokenizerSource | None = None, ids: Sequence[int] = ()) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer): `from_pretrained` loads it.

        Args: ids: token ids on which the folder, loaded anew, is compared with the student; empty leaves that out.
        Raises: TrainingError on all ranks if it is another model.
        """
        state: dict[str, torch.Tensor] = {}
        reasons: list[str] = []
        trained = self.log_probabilities(ids) if ids else None
        adapter = self._adapter()
        # `save_pretrained` itself turns names of the module into those of files.
        for bucket in self._module_buckets():
            state |= bucket
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            module = unwrapped(self.backend.module)
            module.config.use_cache = True
            save_model(module, folder, state)
            if adapter:
                lora.save_adapter(module, adapter, folder / lora.ADAPTER)
            module.config.use_cache = False
            if trained is not None and (gap := export_gap(folder, self._dtype, ids, trained, self.vocab_size)) is not None:
                reasons.append(gap)
            if tokenizer is not None:
                tokenizer.save(folder)
        (failed,) = self.gather(reasons)[:1]
        if failed:
            raise TrainingError(failed[0])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on all ranks."""
        return self.backend.gather(value)

    def _meet(self) -> None:
        """Barrier: wait until every rank has called."""
        self.backend.gather(None)

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint into `folder`; complete once every rank has returned."""
        self.backend.save(folder, {"steps_done": self.steps_done})
        facts = self._adapter_facts()
        if facts is not None and self.rank == 0:
            (folder / lora.FACTS).write_text(json.dumps(facts), encoding="utf-8")
        if self._average:
            save_file(self._average, folder / _AVERAGE)
        self._meet()

    def load(self, folder: Path) -> None:
        """Continue from `folder`, after `start_phase` with the same phase.

        Raises: TrainingError if it cannot be read, or contains more than tensors and plain values.
        """
        own = self._adapter_facts()
        reason = lora.differing_facts(folder, own) if self.rank == 0 else None
        (found,) = self.gather(reason)[:1]
        if found is not None:
            raise TrainingError(found)
        self.steps_done = int(self.backend.load(folder)["steps_done"])
        if self.rank == 0 and (folder / _AVERAGE).exists():
            self._average = load_file(folder / _AVERAGE)

    def close(self) -> None:
        """Release the model and its optimizer; another `start_phase` may follow."""
        self.backend.close()
