"""Optimizer, ranks, precision, checkpoints, and the phases around distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdray.config.backends import Backend, Precision, default_backend, with_backend
from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Settings
from kdray.config.data import TextSource
from kdray.config.features import FeatureSettings
from kdray.config.labels import LabelSelector
from kdray.config.schedules import ScheduleSettings


class SFTSettings(Settings):
    """Supervised fine-tuning on the reference answers: before distillation (MiniLLM's first phase), or after it."""

    steps: NonNegative = 0
    """Optimizer steps; 0 leaves the phase out."""
    learning_rate: PositiveFloat = 1e-5
    """Peak AdamW learning rate."""
    batch_size: Positive = 64
    """Examples a step, over all ranks."""


class PretrainingSettings(Settings):
    """Plain text that the student keeps modelling beside distillation, so that it forgets less (MiniLLM's L_PT)."""

    source: TextSource
    """Where documents come from; the keys depend on `type`: jsonl, parquet, hub, task."""
    weight: PositiveFloat = 1.0
    """Weight of the mean over text tokens beside the mean over response tokens."""
    batch_size: Positive = 64
    """Windows a step, over all ranks."""
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest window; a longer document is cut into several, none of its tokens is left out."""
    teacher_share: Fraction = 0.0
    """Share of the forward KL to the teacher on the text; the rest is the text's own cross entropy. The reference code of
    MiniLLM has 0.5, its paper 0. Above 0 the teacher scores every window."""


class TrainingSettings(Settings):
    steps: Positive = 100
    """Steps of the distillation phase: each trains one batch of rollouts and publishes one version of the student."""
    batch_size: Positive = 64
    """Rollouts a step, over all ranks."""
    micro_batch_size: Positive = 16
    """Rollouts that one rank holds in one forward pass; the gradient does not depend on it."""
    learning_rate: PositiveFloat = 5e-6
    """Peak AdamW learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clipping: PositiveFloat = 1.0
    """Largest global gradient norm."""
    ranks: Positive = 1
    """Student ranks, one process each (one GPU each on a GPU cluster)."""
    cpus_per_rank: PositiveFloat = 1.0
    """CPUs that Ray reserves for a rank; also its compute threads when it runs on CPUs."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for a rank: 1 on a GPU cluster, 0 on CPUs."""
    accelerator_type: str | None = None
    """Ray accelerator type that the ranks are placed on, such as `H100`."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources that a rank takes, for placement."""
    labels: LabelSelector = Field(default={})
    """Labels that a node must have for a rank to be placed on it: `value`, `!value`, `in(a, b)` or `!in(a, b)` by label."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Ranks on few nodes (`pack`, the fastest links) or many; `strict_pack` wants one node, `strict_spread` one each."""
    backend: Backend = Field(default_factory=default_backend)
    """What holds the student on the ranks and moves its weights; the keys depend on `type` (docs/architecture.md says which
    there are). `kdray.config.backends` has those of kdray; installed distributions may add others."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward; losses reduce in float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    checkpoint_every: NonNegative = 50
    """Steps between checkpoints; 0 writes one only at the end and on interruption. The batches since the last one stay in Ray's
    object store, which moves them to disk when it is full: ranks that are lost repeat them."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept."""
    max_restarts: NonNegative = 2
    """Times the ranks may be restarted from the last checkpoint after one is lost."""
    stuck_after_s: PositiveFloat = 1800.0
    """Longest step, save or publication, and longest loading after a restart; beyond it the ranks are stuck (one that hangs
    holds up all), and start again from the last checkpoint."""
    stuck_loading_after_s: PositiveFloat = 7200.0
    """Longest loading of a phase's model, the start of the ranks included, and longest export: `stuck_after_s` for these."""
    sync_bucket_mib: PositiveFloat = 256.0
    """Size of one bucket of weights on their way to the replicas, MiB."""
    weight_transfer: Literal["object_store", "nccl"] = "object_store"
    """How weights reach the replicas: through Ray's object store and files, which works everywhere; or `nccl`, from rank 0's
    GPU to each replica's by vLLM's weight-transfer engine, one replica after the other. Untested: nccl has not run on GPUs,
    only what is around NCCL has run, on CPUs. It takes whole GPUs for ranks and replicas, room for two more copies of the
    weights on rank 0's GPU, and for two buckets of `sync_bucket_mib` at both ends."""
    mini_batch_size: Positive | None = None
    """Rollouts of one optimizer update, over all ranks; None takes `batch_size`."""
    inner_epochs: Positive = 1
    """Passes over the rollouts of a step (PPO's inner epochs; MiniLLM has 4). The weights move meanwhile: the staleness ratio
    of the policy-gradient losses corrects that, up to its cap."""
    schedules: dict[str, ScheduleSettings] = Field(default={})
    """Settings that change during distillation, by their full name: rollout.alpha, rollout.teacher_share, rollout.data_share,
    a number of the loss, such as loss.temperature, or the weight of a term, such as training.features.hidden.weight. Their own
    values are where they begin."""
    sft: SFTSettings = SFTSettings()
    """The supervised phase before distillation."""
    finetune: SFTSettings = SFTSettings()
    """The supervised phase after distillation, on the task's reference answers: the second stage of two-stage distillation."""
    pretraining: PretrainingSettings | None = None
    """Pretraining text mixed into every update; None leaves it out."""
    features: FeatureSettings | None = None
    """Hidden states, attention maps and relations of a white-box teacher that the student matches beside the loss; None leaves
    them out."""

    @model_validator(mode="before")
    @classmethod
    def _former_keys(cls, tree: Any) -> Any:
        return with_backend(tree)

    @model_validator(mode="after")
    def _split(self) -> TrainingSettings:
        sizes = {"batch_size": self.batch_size, "sft.batch_size": self.sft.batch_size}
        if self.finetune.steps:
            sizes["finetune.batch_size"] = self.finetune.batch_size
        if self.mini_batch_size is not None:
            sizes["mini_batch_size"] = self.mini_batch_size
            if self.batch_size % self.mini_batch_size:
                raise ValueError(
                    f"training.batch_size={self.batch_size} is not a multiple of "
                    f"training.mini_batch_size={self.mini_batch_size}; choose a divisor"
                )
        if self.pretraining is not None:
            sizes["pretraining.batch_size"] = self.pretraining.batch_size
            if self.pretraining.batch_size < self.ranks * self.mini_batches:
                raise ValueError(
                    f"training.pretraining.batch_size={self.pretraining.batch_size} is less than one window for each of "
                    f"{self.ranks} ranks in each of {self.mini_batches} mini-batches; raise it to "
                    f"{self.ranks * self.mini_batches} or more"
                )
        for name, size in sizes.items():
            if size % (self.ranks * self.micro_batch_size):
                raise ValueError(
                    f"training.{name}={size} is not a multiple of ranks x micro_batch_size = {self.ranks} x "
                    f"{self.micro_batch_size}; choose {name} so that every rank gets whole micro-batches"
                )
        most = self.backend.max_ranks
        if most is not None and self.ranks > most:
            raise ValueError(
                f"training.ranks={self.ranks} with training.backend.type={self.backend.type}: it trains on {most} at most; "
                f"set training.ranks={most}, or choose another backend"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"training.warmup_steps={self.warmup_steps} is more than training.steps={self.steps}")
        return self

    @property
    def mini_batches(self) -> int:
        """Mini-batches that the rollouts of one step make."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one step."""
        return self.mini_batches * self.inner_epochs
