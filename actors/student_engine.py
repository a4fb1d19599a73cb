"""DeepSpeed around the student: forward, backward, step, weights out, save, load. Knows no Ray.

One instance a rank, inside a torch process group that somebody else made. Every public method is a collective: all ranks
call it, in the same order.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdray.batching import micro_batches
from kdray.config import LossSettings, TrainingSettings
from kdray.errors import TrainingError
from kdray.losses import LossBatch, loss_function
from kdray.losses.policy_gradient import Whitening, return_sums
from kdray.metrics import reduce_sums
from kdray.types import StepReport, TrainBatch


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimizer: supervised warm-up, distillation, control."""

    name: str
    model: str
    """Folder or hub id of the weights that the phase starts from."""
    revision: str | None
    """Commit or tag, where `model` is a hub id."""
    loss: LossSettings | None
    """What is minimised; None is supervised cross entropy."""
    learning_rate: float
    steps: int
    """Length of the learning-rate schedule, in optimizer steps."""
    warmup_steps: int = 0
    schedule: str = "constant"


class StudentEngine:
    """One rank's share of the student. `start_phase` before anything else."""

    def __init__(self, training: TrainingSettings, vocab_size: int, seed: int) -> None:
        self.training = training
        self.vocab_size = vocab_size
        self.seed = seed
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.steps_done = 0
        self.phase: Phase | None = None
        self._engine: Any = None

    def start_phase(self, phase: Phase) -> None:
        """Load the phase's weights and start a fresh optimizer and schedule."""
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed
        from transformers import AutoModelForCausalLM, get_scheduler
        from transformers.integrations import HfDeepSpeedConfig

        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
            gc.collect()
        torch.manual_seed(self.seed)
        training = self.training
        config = self._deepspeed_config()
        # At stage 3 transformers loads each weight straight into its shards while this object is alive.
        sharded_loading = HfDeepSpeedConfig(config) if training.zero_stage == 3 else None
        model = AutoModelForCausalLM.from_pretrained(
            phase.model,
            revision=phase.revision,
            dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
        )
        del sharded_loading
        model.config.use_cache = False
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Dropout would make the trained law differ from the one that the replicas sample from.
        model.eval()
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=phase.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )
        schedule = "constant_with_warmup" if phase.schedule == "constant" else phase.schedule
        scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=phase.warmup_steps, num_training_steps=phase.steps)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
        )
        self._engine.module.eval()
        self.phase = phase
        self.steps_done = 0

    def _deepspeed_config(self) -> dict[str, Any]:
        training = self.training
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            # The number of micro-batches of a step is set by hand, boundary by boundary.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.gradient_clipping,
            "zero_optimization": {"stage": training.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": training.precision == "bf16"},
            "steps_per_print": 10**9,
        }
        return _merge(config, training.deepspeed)

    # -------------------------------------------------------------------------------------------------- training

    def train_step(self, batch: TrainBatch) -> StepReport:
        """One optimizer step on this rank's shard; every rank gets the same report.

        The loss of every token counts the same, whatever the split in micro-batches and ranks: sums are divided by the
        target tokens of the whole step. Raises: TrainingError on all ranks, before the optimizer moves, if any rank's loss
        is not finite.
        """
        assert self.phase is not None
        started = time.perf_counter()
        engine = self._engine
        device = engine.device
        parts = list(micro_batches(batch, self.training.micro_batch_size))
        total = torch.zeros((), dtype=torch.float64)
        sums: dict[str, float] = {}
        # DeepSpeed averages gradients over ranks; the loss is a sum over all of them.
        scale = self.world_size / max(batch.num_target_tokens, 1)
        bad_samples: list[int] = []
        loss_fn = loss_function(self.phase.loss, self._whitening(batch))
        for index, part in enumerate(parts):
            engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            tensors = LossBatch.from_train_batch(part, self.vocab_size, device)
            logits = self._forward(part, device)
            output = loss_fn(logits, tensors, self.phase.loss)
            if not bool(torch.isfinite(output.total)):
                bad_samples += [int(sample) for sample in part.sample_ids if sample >= 0]
            engine.backward(output.total * scale, scale_wrt_gas=False)
            total += output.total.detach().double().cpu()
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        self._refuse_non_finite(bad_samples, batch.step)
        plain_norm = self._plain_grad_norm()
        if plain_norm is not None and not math.isfinite(plain_norm):
            raise TrainingError(f"step {batch.step}: the gradient is not finite; the optimizer was not moved")
        learning_rate = float(engine.get_lr()[0])
        engine.step()
        grad_norm = float(engine.get_global_grad_norm() if plain_norm is None else plain_norm)
        if not math.isfinite(grad_norm):
            raise TrainingError(f"step {batch.step}: the gradient is not finite; continue from the last checkpoint")
        total_sum, sums = self._reduce(total, sums)
        self.steps_done += 1
        return StepReport(
            step=batch.step,
            loss=total_sum / max(batch.num_target_tokens, 1),
            num_target_tokens=batch.num_target_tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - started,
            metrics=reduce_sums(sums, batch.num_target_tokens),
        )

    def _whitening(self, batch: TrainBatch) -> Whitening | None:
        """Mean and deviation of the whole step's returns, for the losses that whiten them; the same on all ranks."""
        assert self.phase is not None
        sums = return_sums(batch, self.phase.loss)
        if sums is None:
            return None
        totals = torch.from_numpy(sums).to(self._engine.device)
        dist.all_reduce(totals)
        return Whitening.from_sums(totals.tolist())

    def _forward(self, part: TrainBatch, device: torch.device) -> torch.Tensor:
        """Logits [rows, seq, vocab] aligned with the token that they predict; column 0 predicts nothing."""
        ids = torch.from_numpy(part.token_ids).to(device, torch.long)
        lengths = torch.from_numpy(part.lengths).to(device)
        attention = torch.arange(ids.shape[1], device=device) < lengths.clamp(min=1).unsqueeze(1)
        logits = self._engine(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
        return logits.roll(1, dims=1)

    def _plain_grad_norm(self) -> float | None:
        """The gradient norm before clipping, where DeepSpeed has no optimizer of its own that would tell it."""
        if self.training.zero_stage or self.training.precision != "fp32":
            return None
        gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _refuse_non_finite(self, bad_samples: list[int], step: int) -> None:
        flag = torch.tensor([len(bad_samples)], device=self._engine.device)
        dist.all_reduce(flag)
        if int(flag):
            named: list[list[int]] = [[] for _ in range(self.world_size)]
            dist.all_gather_object(named, bad_samples)
            samples = sorted(sample for rank in named for sample in rank)
            raise TrainingError(
                f"step {step}: the loss of the batch is not finite (samples {samples[:16]}); "
                "the optimizer was not moved. Lower training.learning_rate or look at these samples"
            )

    def _reduce(self, total: torch.Tensor, sums: dict[str, float]) -> tuple[float, dict[str, float]]:
        names = sorted(sums)
        values = torch.tensor([float(total), *(sums[name] for name in names)], dtype=torch.float64)
        values = values.to(self._engine.device)
        dist.all_reduce(values)
        reduced = values.tolist()
        return reduced[0], dict(zip(names, reduced[1:], strict=True))

    # --------------------------------------------------------------------------------------------------- weights

    def weight_buckets(self) -> Iterator[dict[str, torch.Tensor]]:
        """The weights under their checkpoint names, in buckets of `training.sync_bucket_mib`, on the CPU.

        Rank 0 gets the tensors; other ranks get empty buckets, in the same number: gathering is collective.
        """
        import deepspeed

        limit = self.training.sync_bucket_mib * 2**20
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size = 0.0
        named = list(self._engine.module.named_parameters())
        for name, parameter in named:
            count = getattr(parameter, "ds_numel", parameter.numel())
            if bucket and size + count * parameter.element_size() > limit:
                yield self._gather(bucket, deepspeed)
                bucket, size = [], 0.0
            bucket.append((name, parameter))
            size += count * parameter.element_size()
        if bucket:
            yield self._gather(bucket, deepspeed)

    def _gather(self, bucket: list[tuple[str, torch.nn.Parameter]], deepspeed: Any) -> dict[str, torch.Tensor]:
        sharded = self.training.zero_stage == 3
        parameters = [parameter for _, parameter in bucket]
        with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
            if self.rank != 0:
                return {}
            return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in bucket}

    def export(self, folder: Path, tokenizer: str | None = None) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer): `from_pretrained` loads it."""
        state: dict[str, torch.Tensor] = {}
        for bucket in self.weight_buckets():
            state |= bucket
        if self.rank == 0:
            from transformers import AutoTokenizer

            folder.mkdir(parents=True, exist_ok=True)
            module = self._engine.module
            module.config.use_cache = True
            module.save_pretrained(folder, state_dict=state, safe_serialization=True)
            module.config.use_cache = False
            if tokenizer is not None:
                AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        dist.barrier()

    # ----------------------------------------------------------------------------------------------- checkpoints

    def agree(self, value: bool) -> bool:
        """Rank 0's view, on all ranks: a file that one rank sees, another may not see yet."""
        views = [value]
        dist.broadcast_object_list(views, src=0)
        return views[0]

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint into `folder`; complete once every rank returned."""
        self._engine.save_checkpoint(str(folder), tag="state", client_state={"steps_done": self.steps_done})
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Continue from `folder`, after `start_phase` with the same phase. Raises: TrainingError if it cannot be read."""
        loaded, state = self._engine.load_checkpoint(str(folder), tag="state")
        if loaded is None or state is None:
            raise TrainingError(f"{folder}: DeepSpeed found no checkpoint for this number of ranks and ZeRO stage")
        self.steps_done = int(state["steps_done"])


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
