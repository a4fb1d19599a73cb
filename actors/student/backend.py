"""Interface between training and what computes it: one rank's share of the student's weights, gradients and optimizer.

`StudentTrainer` (`actors.student.trainer`) is the one caller. To add a backend: derive `StudentBackend`, derive its settings
from `kdray.config.backends.StudentBackendSettings`, and register those under the entry-point group `kdray.student_backends`.
`tests/unit/actors/student/test_backend_contract.py` holds any backend to what stands here.
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
from kdray.config import TrainingSettings

Forward = Callable[..., Any]
"""The module's forward pass by way of the backend: Hugging Face's keyword arguments in, its output out."""


@dataclass(frozen=True)
class Optimization:
    """How a phase moves the weights: AdamW, and the course of its learning rate."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: str
    """A schedule's name in transformers."""
    warmup_steps: int
    """Updates over which the learning rate rises."""
    steps: int
    """Length of the schedule, in updates."""

    def optimizer(self, module: torch.nn.Module) -> torch.optim.AdamW:
        """AdamW over the module's parameters, in their order. A backend that replaces parameters calls it afterwards."""
        return torch.optim.AdamW(
            parameter_groups(module), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A torch scheduler, to be stepped once an update."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        return get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=self.steps)


class Update(NamedTuple):
    """Outcome of `StudentBackend.step`, the same on all ranks."""

    grad_norm: float
    """Global norm of the gradient before clipping; not finite where the gradient is not."""
    learning_rate: float
    """Of this update."""
    applied: bool
    """Whether the optimizer was stepped: with a gradient that is not finite, a backend may know it only afterwards."""


class StudentBackend(ABC):
    """One rank's share of the student. Every method is a collective: all ranks call it, in the same order.

    A phase is `close`, `loading`, `start`, then for each update `forward_backward` for every micro-batch and `step`; between
    updates `whole` (publication, export), `save` and `load`. What has a body here is right for one process.
    """

    def __init__(self, training: TrainingSettings) -> None:
        """Args: training: its `backend` is of the class of settings that names this backend."""
        self.training = training
        self.rank = 0
        self.world_size = 1

    # ----------------------------------------------------------------------------------------------------- a phase

    def loading(self) -> AbstractContextManager[None]:
        """Context in which transformers loads the student's weights, for backends that shard them while they are read."""
        return nullcontext()

    @abstractmethod
    def start(self, module: torch.nn.Module, optimization: Optimization) -> None:
        """Take over a module that was loaded, with a fresh optimizer and schedule, and move it to `device`.

        Args: module: the Hugging Face model, or what wraps it (`actors.student.features`), in the dtype of
        `training.precision`, its mode not yet set.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the phase's module, optimizer and memory; `start` may follow. Does nothing where nothing was started."""

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The module that `start` was given. Its parameters may be shards or empty outside of a forward pass."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs of the module have to be."""

    # ---------------------------------------------------------------------------------------------------- an update

    @abstractmethod
    def forward_backward(self, loss: Callable[[Forward], torch.Tensor], last: bool) -> None:
        """Add the gradient of one micro-batch to the update's.

        Gradients are averaged over ranks: the trainer's losses carry the factor `world_size`. After an update that was given up
        (an exception, or no `step` after its last micro-batch), a backend may need `start` again.
        Args: loss: runs the forward pass that it is given, exactly once, and returns the scalar to be minimised, not scaled any
        further; last: whether `step` follows.
        """

    @abstractmethod
    def step(self) -> Update:
        """Clip the gradient to a global norm of `training.gradient_clipping`, update the weights, advance the schedule.

        A gradient that is known not to be finite before the update leaves weights and optimizer as they are.
        """

    # -------------------------------------------------------------------------------------------------- across ranks

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks of each value, in float64."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, any picklable one, in order of rank, on all ranks. No rank returns before all have called."""
        return [value]

    # ------------------------------------------------------------------------------------------------------- weights

    def numel(self, parameter: torch.nn.Parameter) -> int:
        """Elements of a whole parameter of the module."""
        return parameter.numel()

    @abstractmethod
    def whole(self, parameters: Sequence[torch.nn.Parameter], device: torch.device | str) -> list[torch.Tensor]:
        """Contiguous copies on `device` of whole parameters of the module, in their own dtype; on rank 0 alone.

        Other ranks take part and return nothing. The parameters of one call fit into memory together.
        """

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @abstractmethod
    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write this rank's share of weights, optimizer and schedule into an existing folder, with `state`.

        Files' names differ between ranks, but for what rank 0 writes for all. Writing `average.safetensors` is the trainer's.
        Args: state: plain values by name, the same on all ranks.
        """

    @abstractmethod
    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what `save` wrote, after `start`: the next updates are the same bits. Returns: the `state` of then.

        The folder has this rank's files and rank 0's. Nothing that a file may hold can be run: no pickles, or those that hold
        tensors and plain values alone (`actors.student.safe_load`).
        Raises: TrainingError where there is none of this backend's, or it holds more than that.
        """


def open_backend(training: TrainingSettings) -> StudentBackend:
    """The backend that the settings name, with nothing loaded."""
    module, _, name = training.backend.implementation.partition(":")
    backend: StudentBackend = getattr(import_module(module), name)(training)
    return backend
