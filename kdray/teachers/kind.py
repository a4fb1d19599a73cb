"""Teacher kinds: how a teacher is checked, opened, identified and counted, one class for each `type` of its settings.

The settings (`kdray.config.teachers`) say which class it is, by `implementation`; everything else asks the class and never the
type, so that a kind of another distribution is used as those of this one are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, Protocol, TypeVar

from kdray.config import Config, ModelSource, TeacherSettings
from kdray.config.signals import Signal
from kdray.data.dataset import Dataset
from kdray.errors import ConfigError
from kdray.interfaces import Teacher
from kdray.models.inspect import describe, load_tokenizer, shape
from kdray.models.resolve import model_name, weights_hash
from kdray.models.vocab import check_vocab
from kdray.teachers.fingerprint import Fingerprint
from kdray.types import Prompt

Member = TypeVar("Member", bound=TeacherSettings)


@dataclass(frozen=True)
class TeacherContext:
    """The parts of a run that its teachers may use."""

    config: Config
    tokenizer: Any
    """The student's."""
    dataset: Dataset
    vocab_size: int
    """Ids that every teacher and the student share."""
    stop_ids: tuple[int, ...]
    """End-of-sequence ids of the student."""
    on_event: Callable[..., None] = field(default=lambda kind, **fields: None, kw_only=True, compare=False)
    """Called with events of teachers: kind, and fields by name."""

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that a teacher may be asked about."""
        return [*self.dataset.train, *self.dataset.heldout]

    @property
    def model_cache(self) -> Path:
        """Folder of tiny models that are built for the run."""
        return self.config.run.output / ".models"


@dataclass(frozen=True)
class Found:
    """Findings of a kind's check, before any data is read."""

    line: str | None = None
    """A line for the user."""
    vocab_size: int | None = None
    """Ids that teacher and student share; None where the teacher sets no limit."""
    positions: int | None = None
    """Longest sequence that the teacher's model holds, in tokens; None where there is no limit, or it reads other sequences."""
    note: str | None = None
    """A warning, which a run also says at its start."""


class LocalTeacher(Teacher, Protocol):
    """A teacher that answers inside the run's process, or through it: no pool of replicas."""

    retried: int
    """Requests that were sent again after a failure."""

    async def check(self) -> None:
        """Prove that the teacher can be asked. Raises: ConfigError with setting, value and remedy."""
        ...

    async def fingerprint(self, canary: Sequence[int]) -> Fingerprint | None:
        """Identity of the teacher, with its log p over the canary's ids; None for a black box."""
        ...

    async def close(self) -> None: ...


class TeacherKind(ABC, Generic[Member]):
    """A teacher of a run, from its settings: everything about it that is known before it answers."""

    def __init__(self, name: str, settings: Member, config: Config) -> None:
        self.name = name
        self.settings = settings
        self.config = config

    @abstractmethod
    def offers(self) -> frozenset[Signal]:
        """The signals that it gives. Raises: DataError where they are recorded in files that cannot be read."""

    def remedy(self, signal: Signal) -> str | None:
        """What to do where the run needs a signal that it does not give; None leaves the general advice."""
        return None

    def check(self, tokenizer: Any, student_rows: int) -> Found:
        """Everything that can be wrong with the teacher's settings and files.

        Args: tokenizer: the student's; student_rows: rows of its embedding.
        Raises: ConfigError, DataError or VocabError with setting, value and remedy.
        """
        return Found()

    def check_with_data(self, context: TeacherContext) -> str | None:
        """The rest, once the prompts are known; returns a line for the user. Raises: ConfigError or DataError."""
        return None

    @property
    def model(self) -> tuple[ModelSource, str | None] | None:
        """Model and revision whose weights this run loads; None where it loads none."""
        return None

    def recorded_answers(self) -> dict[str, str]:
        """Digests by the name of each file of answers that it replays, by which a resumed run recognises them; empty where it
        answers itself. Raises: DataError if a file cannot be read."""
        return {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that it reads secrets from, by the setting that names each."""
        return {}

    @property
    def in_flight(self) -> int:
        """Answers that it works on at once."""
        return 1

    capturable: bool = False
    """`kdray capture` can record its answers: they do not depend on the run."""

    def identity(self, model: str | None, vocab_size: int) -> dict[str, Any]:
        """Plain values that decide what it answers, by which a capture is found again; empty where it cannot be captured.

        Args: model: where the weights of `model` lie; vocab_size: ids that teacher and student share.
        """
        return {}

    def open(self, context: TeacherContext) -> LocalTeacher:
        """The teacher itself; not asked of a kind that replicas serve. Raises: ConfigError."""
        raise ConfigError(f"teachers.{self.name}.type={self.settings.type}: this kind is served by replicas")


class ModelKind(TeacherKind[Member]):
    """A teacher whose weights this run loads, in replicas or in its own process."""

    capturable = True

    @property
    def model(self) -> tuple[ModelSource, str | None]:
        return self.config.source(self.name)

    def describe(self) -> str:
        """The model in a few words."""
        return describe(self.model[0])

    def check(self, tokenizer: Any, student_rows: int) -> Found:
        model, revision = self.model
        rows, positions = shape(model, revision)
        own = load_tokenizer(model, revision)
        if not self.config.loss.shared_ids:
            if own.eos_token_id is None or not own.is_fast:
                raise ConfigError(
                    f"teachers.{self.name}.model: loss.type={self.config.loss.type} needs a fast tokenizer with an "
                    f"end-of-sequence token; {'it is slow' if not own.is_fast else 'set its eos_token'}"
                )
            return Found(f"teacher {self.name}: {self.describe()}, {rows} vocabulary rows of its own")
        shared = check_vocab(own, tokenizer, rows, student_rows)
        padded = f"; {max(rows, student_rows) - shared} padded rows are cut" if rows != student_rows else ""
        return Found(f"teacher {self.name}: {self.describe()}, {rows} vocabulary rows{padded}", shared, positions)

    def identity(self, model: str | None, vocab_size: int) -> dict[str, Any]:
        assert model is not None
        rollout = self.config.rollout
        return {
            "model": model_name(model),
            "revision": self.model[1],
            "weights": weights_hash(model),
            "teacher_top_k": min(rollout.teacher_top_k, vocab_size),
            "teacher_signal": rollout.teacher_signal,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
        }


def kind_of(config: Config, name: str) -> TeacherKind[Any]:
    """The kind of the teacher called `name`."""
    settings = config.teachers[name]
    kind: type[TeacherKind[Any]] = resolve_name(settings.implementation)
    return kind(name, settings, config)
