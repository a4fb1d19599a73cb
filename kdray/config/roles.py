"""Placement kept apart from the recipe: `cluster.roles` overrides size and place in the sections that it names.

Only the `cluster` section has to change to move a recipe from a laptop to a cluster. Only settings of size and place can be
overridden, never those that change what is computed.
"""

from __future__ import annotations

from typing import Any

from kdray.config.backends import STUDENT_BACKENDS, with_backend
from kdray.config.teachers import TEACHERS, EngineSettings

ENGINE_PLACE = frozenset(EngineSettings.model_fields) - {"dtype", "model_runner", "engine_args", "unsafe_engine_args"}
"""Settings of an engine's size and placement."""
TRAINING_PLACE = frozenset(
    (
        "ranks",
        "cpus_per_rank",
        "gpus_per_rank",
        "accelerator_type",
        "resources",
        "labels",
        "placement",
        "micro_batch_size",
        "micro_batch_tokens",
        "loss_chunk_tokens",
        "gradient_checkpointing",
    )
)
"""Settings of the student ranks' size and placement; a backend adds its own (`StudentBackendSettings.placement`)."""


def role_keys(keys: list[str]) -> list[str]:
    """Join the first two keys below `cluster.roles` if they name the role of a single part, whose name contains a dot.

    The part after `teachers` is a teacher's name unless it is a setting that applies to all teachers.
    """
    of_one = keys[:2] == ["rollout", "pool"] or (keys[0] == "teachers" and len(keys) > 1 and keys[1] not in ENGINE_PLACE)
    return [".".join(keys[:2]), *keys[2:]] if of_one else keys


def with_roles(tree: Any) -> Any:
    """Apply `cluster.roles` to the sections of a config tree, the most specific role last.

    Raises: ValueError for an unknown role or setting.
    """
    cluster = tree.get("cluster") if isinstance(tree, dict) else None
    roles = cluster.get("roles") if isinstance(cluster, dict) else None
    teachers = tree.get("teachers") if isinstance(tree, dict) else None
    if not isinstance(roles, dict) or not isinstance(teachers, dict):
        return tree
    served = [name for name, each in teachers.items() if _is_served(each)]
    for role in sorted(roles, key=lambda role: str(role).count(".")):
        values = roles[role]
        if not isinstance(values, dict):
            raise ValueError(f"cluster.roles.{role}: expected settings, such as {{labels: {{role: teacher}}}}")
        if role in ("training", "rollout.pool"):
            names: list[str] = []
        elif role == "teachers":
            names = served
        elif isinstance(role, str) and role.removeprefix("teachers.") in served:
            names = [role.removeprefix("teachers.")]
        else:
            known = ", ".join(["teachers", *(f"teachers.{name}" for name in served), "rollout.pool", "training"])
            raise ValueError(f"cluster.roles.{role}: no role of this run; there are {known}")
        if role == "training":
            tree = {**tree, "training": _training(tree.get("training") or {}, values)}
            continue
        _check_place(role, list(values), ENGINE_PLACE)
        if role == "rollout.pool":
            rollout = tree.get("rollout") or {}
            tree = {**tree, "rollout": {**rollout, "pool": {**(rollout.get("pool") or {}), **values}}}
        else:
            tree = {**tree, "teachers": {**tree["teachers"], **{name: {**tree["teachers"][name], **values} for name in names}}}
    return tree


def _is_served(teacher: Any) -> bool:
    """Return True if a teacher's settings, not yet validated, are of a kind that replicas serve."""
    if not isinstance(teacher, dict):
        return False
    try:
        return TEACHERS.get(str(teacher.get("type", TEACHERS.default))).served
    except ValueError:
        # Validation of the teacher reports the error.
        return False


def _training(section: Any, values: dict[str, Any]) -> Any:
    """Apply the role's settings to the training section, those of the student's backend one by one.

    An invalid section or backend is left to its own validation.
    """
    section, values = with_backend(section), with_backend(values)
    backend = (section.get("backend") or {}) if isinstance(section, dict) else None
    name = backend.get("type", STUDENT_BACKENDS.default) if isinstance(backend, dict) else None
    if not isinstance(backend, dict) or name not in STUDENT_BACKENDS.names():
        return section
    kind: Any = STUDENT_BACKENDS.get(name)
    given = values.get("backend")
    keys = [key for key in values if key != "backend" or not isinstance(given, dict)]
    keys += [f"backend.{key}" for key in given] if isinstance(given, dict) else []
    _check_place("training", keys, TRAINING_PLACE | {f"backend.{name}" for name in kind.placement})
    return {**section, **values, **({"backend": {**backend, **given}} if isinstance(given, dict) else {})}


def _check_place(role: str, keys: list[str], allowed: frozenset[str]) -> None:
    for key in keys:
        if key not in allowed:
            raise ValueError(
                f"cluster.roles.{role}.{key}: says nothing about size or place; set it in the recipe itself, or use "
                f"{', '.join(sorted(allowed))}"
            )
