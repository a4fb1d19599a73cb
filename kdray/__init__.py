"""kdray: distributed online distillation of language models, as a library.

    import kdray

    config = kdray.load_config("configs/quickstart.yaml", ["training.steps=20"])
    summary = kdray.run(config)
    kdray.report(config.run_folder)

Nothing heavy is imported before it is used: Ray, vLLM and DeepSpeed come with `run`, `evaluate` and `capture`, torch with the
losses. See docs/library.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdray.capturing.teacher import CapturedTeacher
    from kdray.config import Config, load_config, parse_config
    from kdray.errors import KdrayError
    from kdray.losses import LossBatch, LossOutput, distillation_loss, loss_function
    from kdray.rollouts.mixture import draw, log_mixture
    from kdray.runs.verify import Proof
    from kdray.teachers.huggingface import HFTeacher
    from kdray.teachers.openai import RemoteTeacher

__version__ = "0.1.0"

_LAZY = {
    "Config": "kdray.config",
    "load_config": "kdray.config",
    "parse_config": "kdray.config",
    "KdrayError": "kdray.errors",
    "LossBatch": "kdray.losses",
    "LossOutput": "kdray.losses",
    "distillation_loss": "kdray.losses",
    "loss_function": "kdray.losses",
    "draw": "kdray.rollouts.mixture",
    "log_mixture": "kdray.rollouts.mixture",
    "CapturedTeacher": "kdray.capturing.teacher",
    "HFTeacher": "kdray.teachers.huggingface",
    "RemoteTeacher": "kdray.teachers.openai",
}
"""Public names, and the module that each is imported from when it is first used."""

__all__ = [
    "CapturedTeacher",
    "Config",
    "HFTeacher",
    "KdrayError",
    "LossBatch",
    "LossOutput",
    "RemoteTeacher",
    "__version__",
    "capture",
    "distillation_loss",
    "draw",
    "evaluate",
    "load_config",
    "log_mixture",
    "loss_function",
    "losses",
    "parse_config",
    "report",
    "run",
    "verify",
]


def run(config: Config, resume: bool = False, prompts: Iterable[Any] | None = None) -> dict[str, Any]:
    """Distil as the config says, and return the run's summary (`summary.json` in its run folder).

    Joins the Ray that this process is connected to, else the one that `cluster.address` or RAY_ADDRESS names, else starts a
    local one that ends with the run. Works inside a running event loop too, as in a notebook.
    Args: resume: go on from the newest whole checkpoint; prompts: texts or dictionaries, as rows of a file, for
          `data.prompts.type=iterable`.
    Raises: ConfigError or DataError before anything starts; Interrupted after a checkpoint; KdrayError with the reason.
    """
    return _launch().run(config, resume=resume, prompts=prompts)


def evaluate(config: Config, student: Path | str | None = None) -> dict[str, Any]:
    """Measure a student against its teachers on the held-out prompts.

    Args: student: folder of the student, None for the config's own model.
    Returns: by metric name, such as `reverse_kl` (nats per response token) and `exact_match` (a share); under `intervals`, the
    bounds of those that have an interval (docs/evaluation.md).
    """
    return _launch().evaluate(config, None if student is None else Path(student))


def capture(
    config: Config, to: Path | str | None = None, epochs: int = 1, prompts: Iterable[Any] | None = None
) -> dict[str, Any]:
    """Record the teacher's answers to every training prompt as Parquet; a folder that holds some already is completed.

    Args: to: the folder, None for `<run folder>/capture`; epochs: passes over the prompts, each with draws of its own;
          prompts: as for `run`.
    Returns: the path and counts of what was wanted, held and asked.
    """
    return _launch().capture(config, None if to is None else Path(to), epochs, prompts=prompts)


def report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder: one file, which needs no network. Returns its path."""
    from kdray.runs.report import write_report

    return write_report(Path(run_folder))


def verify(run_folder: Path | str) -> Proof:
    """Check that a run's files agree with each other: every sample trained once, or left out by a rule.

    Returns: its `problems` are empty where the files agree.
    """
    from kdray.runs.verify import verify as prove

    return prove(Path(run_folder))


def _launch() -> ModuleType:
    """The module `cluster.launch` of kdray. Raises: ImportError if another module goes by the name of one of its packages."""
    own = Path(__file__).parents[1]
    for name in ("actors", "cluster"):
        found = getattr(import_module(name), "__file__", None)
        if found is None or Path(found).resolve() != (own / name / "__init__.py").resolve():
            raise ImportError(
                f"`import {name}` finds {found or 'a folder'}, not kdray's package of that name in {own}: rename the other, or "
                "start Python in another folder",
                name=name,
            )
    return import_module("cluster.launch")


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("kdray.losses")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
