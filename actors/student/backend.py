"""Interface between training and its backend, which computes one rank's share of the student's weights, gradients and
optimizer.

`StudentTrainer` (`actors.student.trainer`) is the only caller. To add a backend: derive `StudentBackend`, derive its settings
from `kdray.config.backends.StudentBackendSettings`, and register those under the entry-point group `kdray.student_backends`.
`tests/unit/actors/student/test_backend_contract.py` tests any backend against this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actors.student.features import parameter_groups
from actors.weights.copies import CopyBuffers
from kdray.config import TrainingSettings
from kdray.errors import TrainingError

Forward = Callable[..., Any]
"""The module's forward pass through the backend: takes Hugging Face's keyword arguments, returns the module's output."""


@dataclass(frozen=True)
class Optimization:
    """Optimizer of a phase: AdamW and its learning-rate schedule."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: str
    """Name of a schedule in transformers."""
    warmup_steps: int
    """Warm-up length of the learning rate, in updates."""
    steps: int
    """Length of the schedule, in updates."""

    fused: bool = False
    """Update all parameters in one kernel, without temporary copies of them; they are then on a CUDA device or in main memory
    when the optimizer is stepped."""

    def optimizer(self, module: torch.nn.Module) -> torch.optim.AdamW:
        """AdamW over the module's parameters, in their order. A backend that replaces parameters calls it afterwards."""
        return torch.optim.AdamW(
            parameter_groups(module),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=self.fused or None,
        )

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A torch scheduler, to be stepped once per update."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        return get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=self.steps)


def keep_learning_rates(scheduler: Any, starting: Sequence[float]) -> None:
    """Continue a restored schedule from other peak learning rates. Args: starting: `base_lrs` before it was restored."""
    state = scheduler.state_dict()
    stored, groups = state["base_lrs"], scheduler.optimizer.param_groups
    if list(stored) == list(starting):
        return
    for group, own, other in zip(groups, starting, stored, strict=True):
        group["initial_lr"] = own
        # The schedules are factors of the peak.
        group["lr"] *= own / other
    scheduler.load_state_dict(state | {"base_lrs": list(starting), "_last_lr": [group["lr"] for group in groups]})


class Update(NamedTuple):
    """Outcome of `StudentBackend.step`, the same on all ranks."""

    grad_norm: float
    """Global norm of the gradient before clipping; not finite if the gradient is not."""
    learning_rate: float
    """Learning rate of this update."""
    applied: bool
    """True if the optimizer was stepped: a backend may detect a non-finite gradient only afterwards."""


class StudentBackend(ABC):
    """A rank's share of the student. Every method is a collective: all ranks call it, in the same order.

    A phase is `close`, `loading`, `start`, then for each update `forward_backward` for every micro-batch and `step`; between
    updates `whole` (publication, export), `save` and `load`. Methods with a body have the right default for one process.
    """

    def __init__(self, training: TrainingSettings) -> None:
        """Args: training: the class of its `backend` settings selects this backend."""
        self.training = training
        self.rank = 0
        self.world_size = 1

    # ----------------------------------------------------------------------------------------------------- a phase

    def loading(self) -> AbstractContextManager[None]:
        """Context in which transformers loads the student's weights, for backends that shard them while loading."""
        return nullcontext()

    @abstractmethod
    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        """Take over a loaded module, with a fresh optimizer and schedule, and move it to `device`.

        Args: module: the Hugging Face model, or its wrapper (`actors.student.features`), in the dtype of `training.precision`,
        with its mode not yet set.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the phase's module, optimizer and memory; `start` may follow. No-op if nothing was started."""

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The module passed to `start`. Its parameters may be shards or empty outside a forward pass."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device on which the module expects its inputs."""

    # ---------------------------------------------------------------------------------------------------- an update

    @abstractmethod
    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        """Add the gradient of one micro-batch to the update's.

        Gradients are averaged over ranks: the trainer's losses contain the factor `world_size`. After an exception within an
        update, a backend may need `start` again; after its last micro-batch, `step` or `abandon` follows.
        Args: loss: runs the forward pass that it receives, exactly once, and returns the scalar to be minimised, without
        further scaling; last: true if `step` follows.
        """

    @abstractmethod
    def step(self) -> Update:
        """Clip the gradient to a global norm of `training.gradient_clipping`, update the weights, advance the schedule.

        A gradient known to be non-finite before the update leaves weights and optimizer unchanged.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Drop the gradients of an update after its last micro-batch, in place of `step` or after one that was not applied.

        They leave no trace in the next update. No-op if there are none.
        """

    @property
    @abstractmethod
    def updates(self) -> int:
        """Number of updates since `start`, as the optimizer itself counts them; restored by `load`."""

    def evaluate(self, **inputs: Any) -> Any:
        """The module's output without gradients, as a forward pass of training computes it."""
        with torch.no_grad():
            return self.module(**inputs)

    # -------------------------------------------------------------------------------------------------- across ranks

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks of each value, in float64."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable one), in rank order, on all ranks. No rank returns before all have called."""
        return [value]

    # ------------------------------------------------------------------------------------------------------- weights

    def numel(self, parameter: torch.nn.Parameter) -> int:
        """Number of elements of a full (unsharded) parameter of the module."""
        return parameter.numel()

    @abstractmethod
    def whole(self, parameters: Sequence[torch.nn.Parameter], device: torch.device | str) -> list[torch.Tensor]:
        """Contiguous copies on `device` of full parameters of the module, in their own dtype; on rank 0 only.

        Other ranks take part and return nothing. The parameters of one call fit into memory together.
        """

    def whole_into(self, parameters: Sequence[torch.nn.Parameter], buffers: CopyBuffers) -> list[torch.Tensor]:
        """`whole` on the CPU, in memory that the next copies of the same parameters are written to, where the backend can."""
        return self.whole(parameters, "cpu")

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @abstractmethod
    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write this rank's share of weights, optimizer and schedule into an existing folder, with `state`.

        File names differ between ranks, except for files that rank 0 writes for all. `average.safetensors` is written by the
        trainer.
        Args: state: plain values by name, the same on all ranks.
        """

    @abstractmethod
    def load(self, folder: Path) -> dict[str, Any]:
        """Restore the output of `save`, after `start`: the next updates are bit-identical. Returns: the saved `state`.

        Learning rate and gradient clipping are those of `start`, where they differ (`keep_learning_rates`).
        The folder has this rank's files and rank 0's, or those of all ranks if `reads_every_rank`.
        Nothing in a file may be executed: no pickles, or only those that contain just tensors and plain values
        (`actors.student.checkpoints.safe_load`).
        Raises: TrainingError if there is no checkpoint of this backend, or it contains anything else.
        """

    def reads_every_rank(self, folder: Path) -> bool:
        """True if `load` needs the files of all ranks that wrote a checkpoint: it was sharded otherwise than this backend does.

        Args: folder: has this rank's files and rank 0's.
        """
        return False

    @classmethod
    def trained_weights(cls, folder: Path) -> dict[str, torch.Tensor]:
        """Whole weights that all ranks saved into a folder, on the CPU, by name in the module; frozen ones may be left out.

        For `kdray export --step`: called in a process that is no rank, before anything is loaded. As `load`, it executes
        nothing.
        Raises: TrainingError if there is no checkpoint of this backend, or it contains anything else; by default always.
        """
        raise TrainingError(f"{folder}: {cls.__name__} cannot read weights without its ranks; resume the run, and end it there")


def training_device(training: TrainingSettings) -> torch.device:
    """The device that a rank trains on, by `training.gpus_per_rank`.

    Ray leaves every GPU of a node visible to a process that asked for none, so that a visible GPU may be another process's.
    Raises: TrainingError if the settings give the rank a GPU and torch can use none.
    """
    if training.gpus_per_rank == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(
            f"training.gpus_per_rank={training.gpus_per_rank:g}, but torch {torch.__version__} can use no GPU here; install a "
            "build of torch for GPUs (kdray doctor), or set training.gpus_per_rank=0"
        )
    return torch.device("cuda")


def uses_fused_optimizer(device: torch.device) -> bool:
    """True if AdamW is stepped in one kernel on this device: on CUDA, where its unfused form needs copies of the weights."""
    return device.type == "cuda"


def backend_class(training: TrainingSettings) -> type[StudentBackend]:
    """The class that the settings select."""
    module, _, name = training.backend.implementation.partition(":")
    found: type[StudentBackend] = getattr(import_module(module), name)
    return found


def open_backend(training: TrainingSettings) -> StudentBackend:
    """The backend selected by the settings, with nothing loaded."""
    return backend_class(training)(training)
