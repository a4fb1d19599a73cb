"""What a run asks of a cluster, role by role, and whether the cluster can ever give it. The maths is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdray.config import Config, EngineSettings
from kdray.errors import CapacityError


@dataclass(frozen=True)
class Bundle:
    """Resources that have to be on one node, and how many times."""

    role: str
    setting: str
    """The setting to change where this cannot be had."""
    count: int
    resources: Mapping[str, float]
    any_of: tuple[str, ...] = ()
    """Resources of which the node must have one; none are taken."""


def bundles(config: Config) -> list[Bundle]:
    """Every bundle of a run; autoscaled pools count with the size that they start with."""
    wanted = []
    for name, teacher in config.served_teachers.items():
        wanted.append(_engine_bundle(f"teacher {name}", f"teachers.{name}", teacher))
    if config.has_rollout_pool:
        wanted.append(_engine_bundle("rollout pool", "rollout.pool", config.rollout.pool))
    training = config.training
    rank = {"CPU": training.cpus_per_rank, "GPU": training.gpus_per_rank} | _accelerator(training.accelerator_type)
    wanted.append(Bundle("student", "training.ranks", training.ranks, {k: v for k, v in rank.items() if v}))
    return wanted


def _accelerator(kind: str | None) -> dict[str, float]:
    """What Ray asks for an accelerator type: a sliver of a resource that every node of the type has once."""
    return {} if kind is None else {f"accelerator_type:{kind}": 0.001}


def _engine_bundle(role: str, setting: str, settings: EngineSettings) -> Bundle:
    resources = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    resources |= _accelerator(settings.accelerator_type)
    count, of = settings.replicas, "replicas"
    if settings.autoscaling is not None:
        count, of = settings.autoscaling.starting_replicas, "autoscaling.initial_replicas"
    taken = {name: amount for name, amount in resources.items() if amount}
    any_of = tuple(f"accelerator_type:{kind}" for kind in settings.accelerator_types or ())
    return Bundle(role, f"{setting}.{of}", count, taken, any_of)


def check_capacity(wanted: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse what these nodes can never give: in sum, or for a bundle that no node could hold.

    Args: nodes: total resources of every node, such as {"CPU": 8, "GPU": 1}.
    Raises: CapacityError naming the setting, what it asks and what is there.
    """
    for bundle in wanted:
        if bundle.count and not any(_holds(node, bundle) for node in nodes):
            asked = _text(bundle.resources) + (f" and one of {', '.join(bundle.any_of)}" if bundle.any_of else "")
            raise CapacityError(
                f"{bundle.setting}: one {bundle.role} needs {asked} on one node, and no node has that "
                f"(nodes: {'; '.join(_text(node) for node in nodes)}); ask for less, or add a node"
            )
    for name in sorted({name for bundle in wanted for name in bundle.resources}):
        asked_sum = sum(bundle.count * bundle.resources.get(name, 0.0) for bundle in wanted)
        there = sum(node.get(name, 0.0) for node in nodes)
        if asked_sum > there:
            parts = ", ".join(
                f"{bundle.setting}={bundle.count} x {bundle.resources[name]:g}" for bundle in wanted if name in bundle.resources
            )
            remedy = "; on one machine cluster.local_cpus lets small models share cores" if name == "CPU" else ""
            raise CapacityError(
                f"the run needs {asked_sum:g} {name} ({parts}), but the cluster has {there:g}; "
                f"lower one of these or add nodes{remedy}"
            )

    _pack(wanted, nodes)


def _pack(wanted: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> None:
    """First-fit-decreasing: the largest bundles first, each on the first node that still holds it."""
    left = [dict(node) for node in nodes]
    for bundle in sorted(wanted, key=lambda bundle: [-bundle.resources.get(name, 0.0) for name in ("GPU", "CPU")]):
        for placed in range(bundle.count):
            node = next((node for node in left if _holds(node, bundle)), None)
            if node is None:
                raise CapacityError(
                    f"{bundle.setting}={bundle.count}: all parts of the run cannot be placed together; after {placed} of this "
                    f"{bundle.role}, no node has {_text(bundle.resources)} left (left over: "
                    f"{'; '.join(_text(node) for node in left)}); ask for less, or add a node"
                )
            for name, amount in bundle.resources.items():
                node[name] -= amount


def _holds(node: Mapping[str, float], bundle: Bundle) -> bool:
    if bundle.any_of and not any(node.get(name, 0.0) > 0 for name in bundle.any_of):
        return False
    # Fractions of a GPU add up with rounding.
    return all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in bundle.resources.items())


def _text(resources: Mapping[str, Any]) -> str:
    shown = {name: amount for name, amount in resources.items() if not name.startswith(("node:", "memory", "object_store"))}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"
