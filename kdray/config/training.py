"""Optimizer, ranks, precision, checkpoints, and the phases around distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdray.config.backends import Backend, Precision, default_backend, with_backend
from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, OnResume, Positive, PositiveFloat, Settings
from kdray.config.data import TextSource
from kdray.config.features import FeatureSettings
from kdray.config.labels import LabelSelector
from kdray.config.lora import LoRASettings
from kdray.config.schedules import ScheduleSettings

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""Attention implementation of transformers."""
_CHUNK_NUMBERS = 2**25
"""Log-probabilities of a chunk by default: 128 MiB in float32. Larger chunks add up the head's gradient less often."""


class SFTSettings(Settings):
    """Supervised fine-tuning on the reference answers: before distillation (MiniLLM's first phase), or after it."""

    steps: Annotated[NonNegative, OnResume()] = 0
    """Optimizer steps; 0 leaves the phase out."""
    learning_rate: Annotated[PositiveFloat, OnResume()] = 1e-5
    """Peak AdamW learning rate."""
    batch_size: Positive = 64
    """Examples per step, over all ranks."""


class PretrainingSettings(Settings):
    """Plain text that the student also trains on during distillation, to limit forgetting (MiniLLM's L_PT)."""

    source: TextSource
    """Source of documents; the keys depend on `type`: jsonl, parquet, hub, task."""
    weight: PositiveFloat = 1.0
    """Weight of the mean over text tokens relative to the mean over response tokens."""
    batch_size: Positive = 64
    """Windows per step, over all ranks."""
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Maximum window length; a longer document is split into several windows, without dropping tokens."""
    teacher_share: Fraction = 0.0
    """Share of the forward KL to the teacher on the text; the rest is cross entropy. MiniLLM's reference code uses 0.5, its
    paper 0. Above 0 the teacher scores every window."""


class TrainingSettings(Settings):
    steps: Annotated[Positive, OnResume()] = 100
    """Steps of the distillation phase: each trains on one batch of rollouts and publishes one version of the student."""
    batch_size: Positive = 64
    """Rollouts per step, over all ranks."""
    micro_batch_size: Positive = 16
    """Rollouts per rank in one forward pass; the gradient does not depend on it."""
    micro_batch_tokens: Positive | None = None
    """Tokens per rank in one forward pass, prompts and padding included, in place of `micro_batch_size`: rollouts of like
    length share a pass, as many as fit, so that short ones are not as few in a pass as long ones. The gradient does not depend
    on it."""
    loss_chunk_tokens: Positive | None = None
    """Tokens per rank whose rows of log-probabilities exist at once while the loss is computed: memory is proportional to it,
    the result does not depend on it. None takes as many as make float32 rows of 128 MiB: 1,048 with 32,000 ids, 220 with
    152,000. A micro-batch of no more tokens, prompts included, is computed without chunks."""
    learning_rate: Annotated[PositiveFloat, OnResume()] = 5e-6
    """Peak AdamW learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate schedule after warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clipping: Annotated[PositiveFloat, OnResume()] = 1.0
    """Maximum global gradient norm."""
    ranks: Positive = 1
    """Number of student ranks, one process each (one GPU each on a GPU cluster)."""
    cpus_per_rank: PositiveFloat = 1.0
    """CPUs that Ray reserves for a rank; also its number of compute threads on CPUs."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for a rank: 1 on a GPU cluster, 0 on CPUs."""
    accelerator_type: str | None = None
    """Ray accelerator type to place the ranks on, such as `H100`."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources that a rank requires, for placement."""
    labels: LabelSelector = Field(default={})
    """Labels that a rank's node must have: `value`, `!value`, `in(a, b)` or `!in(a, b)` by label."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Placement of ranks on few nodes (`pack`, the fastest links) or many (`spread`); `strict_pack` requires a single node,
    `strict_spread` a node per rank."""
    backend: Backend = Field(default_factory=default_backend)
    """Training backend of the student; the keys depend on `type`: one of kdray's own (docs/architecture.md lists them), or one
    that an installed distribution adds."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward; losses are reduced in float32 in either case."""
    attention: Attention = "auto"
    """Attention implementation of transformers. `auto` takes transformers' default unless that leaves out a part of the model,
    such as the soft-capping of attention logits of Gemma 2: then the one that computes what the replicas compute."""
    logits: Literal["model", "float32"] = "model"
    """Dtype of logits, in the ranks and in all replicas: `model` computes them in that of the model, `float32` does not round
    what the output head adds up. Half precision rounds a logit of 16 by up to 0.06, and its log-probability with it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    checkpoint_every: Annotated[NonNegative, OnResume()] = 50
    """Steps between checkpoints, in every phase; 0 writes one only at the end and on interruption. The batches since the last
    one are kept for restarted ranks, which replay them (`replay_gib`)."""
    replay_gib: Annotated[PositiveFloat, OnResume()] = 64.0
    """Disk for the batches since the last checkpoint, in the folder for temporary files (`TMPDIR`) of the driver's node, GiB. A
    checkpoint is written early when they take that much; `kdray plan` says how much a step takes."""
    keep_checkpoints: Annotated[Positive, OnResume()] = 2
    """Number of most recent checkpoints to keep."""
    max_restarts: Annotated[NonNegative, OnResume()] = 2
    """Maximum number of restarts of the ranks from the last checkpoint after one is lost, without progress in between: the next
    checkpoint, or 100 steps without a loss, allow as many again. Nodes taken away with notice (preemption) do not count."""
    stuck_after_s: Annotated[PositiveFloat, OnResume()] = 1800.0
    """Longest step, save or publication, and longest loading after a restart; beyond it the ranks count as stuck (one hanging
    rank blocks all) and are restarted from the last checkpoint."""
    stuck_loading_after_s: Annotated[PositiveFloat, OnResume()] = 7200.0
    """Longest loading of a phase's model, including the start of the ranks, and longest export: `stuck_after_s` for these."""
    sync_bucket_mib: Annotated[PositiveFloat, OnResume()] = 256.0
    """Size of a bucket of weights sent to the replicas, MiB."""
    sync_full_every: Annotated[Positive, OnResume()] = 1
    """Versions of the student from one that is sent whole to the next; of those in between only the weights that changed are
    sent, and replicas hold the same bits. 1 sends every version whole. It pays with `precision: bf16`, where a small learning
    rate moves a few percent of the weights, and slow links between nodes. A bucket is sent whole earlier once its changes add
    up to half of it, which in fp32 every update does. Finding changes takes a copy of the weights in main memory of rank 0's
    node."""
    weight_transfer: Annotated[Literal["object_store", "nccl"], OnResume()] = "object_store"
    """Transport of weights to the replicas: `object_store` uses Ray's object store and files, and works everywhere; `nccl`
    sends them from rank 0's GPU to each replica's with vLLM's weight-transfer engine, one replica at a time. Untested: nccl has
    not run on GPUs; only the code around NCCL has run, on CPUs. It requires whole GPUs for ranks and replicas, memory for two
    more copies of the weights on rank 0's GPU, and for two buckets of `sync_bucket_mib` on both sides."""
    on_not_finite: Annotated[Literal["stop", "skip"], OnResume()] = "stop"
    """Consequence of a loss or gradient that is not finite during distillation: `stop` ends the run; `skip` leaves the whole
    batch out of training, on all ranks, under the rule `not_finite` in the ledger. Supervised phases stop in either case."""
    max_skipped: Annotated[Positive, OnResume()] = 3
    """Largest number of batches that `on_not_finite: skip` leaves out within 100 consecutive steps; one more ends the run."""
    mini_batch_size: Positive | None = None
    """Rollouts per optimizer update, over all ranks; None takes `batch_size`."""
    inner_epochs: Positive = 1
    """Passes over the rollouts of a step (PPO's inner epochs; MiniLLM uses 4). The weights change meanwhile: the staleness
    ratio of the policy-gradient losses corrects for that, up to its cap."""
    loss_tokens: Positive | None = None
    """Constant, in tokens, that the loss of an update is divided by; None divides by the number of its response tokens. That
    number is random, and the expectation of a ratio is not the ratio of expectations: with a few responses an update it biases
    the policy gradients, with 64 hardly. Near rollouts per update x mean response length, it keeps the scale of the loss
    relative to pretraining text and of the gradient relative to `gradient_clipping`."""
    schedules: dict[str, ScheduleSettings] = Field(default={})
    """Settings that change during distillation, by their full name: rollout.alpha, rollout.teacher_share, rollout.data_share, a
    number of the loss, such as loss.temperature, or the weight of a term, such as training.features.hidden.weight. Each starts
    from the value of the setting itself."""
    sft: SFTSettings = SFTSettings()
    """Supervised phase before distillation."""
    finetune: SFTSettings = SFTSettings()
    """Supervised phase after distillation, on the task's reference answers: the second stage of two-stage distillation."""
    pretraining: PretrainingSettings | None = None
    """Pretraining text mixed into every update; None disables it."""
    lora: LoRASettings | None = None
    """Train adapters of low rank on frozen weights (LoRA); None trains all weights."""
    features: FeatureSettings | None = None
    """Hidden states, attention maps and relations of a white-box teacher that the student matches in addition to the loss; None
    disables them."""

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
        if self.skips_not_finite and self.updates_per_step > 1:
            raise ValueError(
                f"training.on_not_finite=skip with {self.updates_per_step} updates a step (training.mini_batch_size, "
                "training.inner_epochs): a batch whose first update was made can no longer be left out; set "
                "training.on_not_finite=stop, or make one update a step"
            )
        for name, size in sizes.items():
            # Packed by tokens, passes are of any number of rows, and the last rows of a rank may be padding.
            if self.micro_batch_tokens is None and size % (self.ranks * self.micro_batch_size):
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
        return self

    @property
    def skips_not_finite(self) -> bool:
        """True if batches without a finite loss and gradient are left out."""
        return self.on_not_finite == "skip"

    @property
    def sends_parts(self) -> bool:
        """True if a version may bring less than the whole student: replicas have the rest."""
        return self.sync_full_every > 1 or self.lora is not None

    @property
    def mini_batches(self) -> int:
        """Number of mini-batches per step."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

    @property
    def update_size(self) -> int:
        """Rollouts per optimizer update, over all ranks."""
        return self.mini_batch_size or self.batch_size

    def chunk_tokens(self, vocab: int) -> int:
        """Tokens per chunk of the loss. Args: vocab: rows of the student's output head."""
        return self.loss_chunk_tokens or max(1, _CHUNK_NUMBERS // vocab)

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer updates per step."""
        return self.mini_batches * self.inner_epochs
