"""Mutual distillation: one run per student, in which the other students are the teachers."""

from __future__ import annotations

from collections.abc import Mapping

from kdray.config import Config, PeerTeacherSettings
from kdray.config.storage import below
from kdray.errors import ConfigError

MAIN_STUDENT = "student"
"""Name of the run's own student among its peers' teachers."""


def peer_configs(config: Config, peers: Mapping[str, str], student: str) -> dict[str, Config]:
    """Build the config of every peer's run, by its name: the run's own settings, with the peer as the student.

    A peer's replicas hold one of its teachers together with the peer itself, so they have the size that the run gives to that
    peer's pool. Its folder is `peers/<name>` in the run's folder. Only the main student has an SFT control.
    Raises: ConfigError if a peer has the name of the run's student.
    Args: peers, student: paths of the weights, already built, so that no run builds them again.
    Source: Zhang et al. 2018, deep mutual learning (arXiv 1706.00384), sections 2.2 and 2.4.
    """
    if MAIN_STUDENT in config.peers:
        raise ConfigError(f"teachers.{MAIN_STUDENT}: that is what peers call the run's own student; give it another name")
    found = {}
    for name, settings in config.peers.items():
        others = {MAIN_STUDENT: (student, config.student.revision)} | {
            other: (peers[other], teacher.revision) for other, teacher in config.peers.items() if other != name
        }
        teachers = {
            other: PeerTeacherSettings.model_validate(
                settings.model_dump() | {"model": model, "revision": revision, "prompt_template": settings.prompt_template}
            )
            for other, (model, revision) in others.items()
        }
        where = {
            "output": config.run_folder / "peers",
            "storage": None if config.run.storage is None else below(config.run.storage, config.run.name, "peers"),
        }
        found[name] = config.model_copy(
            update={
                "run": config.run.model_copy(update={"name": name, **where}),
                "student": config.student.model_copy(update={"model": peers[name], "revision": settings.revision}),
                "teachers": teachers,
                "evaluation": config.evaluation.model_copy(update={"control": False}),
            }
        )
    return found
