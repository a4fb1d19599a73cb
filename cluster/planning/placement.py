"""Resource demand of a run, role by role, and a check that the cluster can ever satisfy it. Pure computation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdray.config import Config, EngineSettings
from kdray.config.engine_args import OWN_SERVER
from kdray.config.labels import ACCELERATOR_LABEL
from kdray.config.route import Route
from kdray.errors import CapacityError

_ACCELERATOR_RESOURCE = "accelerator_type:"
STUDENT, ROLLOUT_POOL, _TEACHER = "student", "rollout pool", "teacher "
"""Names of roles; a teacher's has its own name behind it."""


@dataclass(frozen=True)
class Node:
    """A node: its total resources, and its labels in Ray."""

    resources: Mapping[str, float]
    """Total resources, such as {"CPU": 8, "GPU": 1}."""
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def of_ray(cls, node: Mapping[str, Any]) -> Node:
        """Convert an entry of `ray.nodes()`."""
        labels = dict(node.get("Labels") or {})
        for resource in node["Resources"]:
            # A node whose resource was set by hand has it without the label.
            if resource.startswith(_ACCELERATOR_RESOURCE):
                labels.setdefault(ACCELERATOR_LABEL, resource.removeprefix(_ACCELERATOR_RESOURCE))
        return cls(node["Resources"], labels, str(node.get("NodeManagerHostname") or node.get("NodeID", ""))[:24])


@dataclass(frozen=True)
class Bundle:
    """Resources required on a single node, and the number of such bundles."""

    role: str
    setting: str
    """The setting to change if the resources are not available."""
    count: int
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray label selector that the node must match."""
    per_node: int | None = None
    """Maximum bundles of this role on one node; None is unlimited."""
    together: bool = False
    """All of them must be on the same node."""


@dataclass(frozen=True)
class Placed:
    """Placement of a bundle: the number of copies on each node."""

    bundle: Bundle
    nodes: Mapping[int, int]
    """Index of a node -> bundles on it."""


def bundles(config: Config) -> list[Bundle]:
    """Every bundle of a run; autoscaled pools count with their initial size."""
    wanted = []
    for name, teacher in config.served_teachers.items():
        wanted.append(_engine_bundle(_TEACHER + name, teacher))
    if Route.of(config).student_pool:
        wanted.append(_engine_bundle(ROLLOUT_POOL, config.rollout.pool))
    training = config.training
    rank = {"CPU": training.cpus_per_rank, "GPU": training.gpus_per_rank} | training.resources
    rank |= _accelerator(training.accelerator_type)
    wanted.append(
        Bundle(
            STUDENT,
            "training.ranks",
            training.ranks,
            {k: v for k, v in rank.items() if v},
            training.labels,
            per_node=1 if training.placement == "strict_spread" else None,
            together=training.placement == "strict_pack",
        )
    )
    return wanted


def _accelerator(kind: str | None) -> dict[str, float]:
    """Ray's demand for an accelerator type: a small fraction of a resource that every node of the type has once."""
    return {} if kind is None else {f"{_ACCELERATOR_RESOURCE}{kind}": 0.001}


def engine_setting(role: str) -> str:
    """Section of the settings that describes a role's engines."""
    return "rollout.pool" if role == ROLLOUT_POOL else f"teachers.{role.removeprefix(_TEACHER)}"


def _engine_bundle(role: str, settings: EngineSettings) -> Bundle:
    resources = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    resources |= _accelerator(settings.accelerator_type)
    count, of = settings.replicas, "replicas"
    if settings.autoscaling is not None:
        count, of = settings.autoscaling.starting_replicas, "autoscaling.initial_replicas"
    taken = {name: amount for name, amount in resources.items() if amount}
    return Bundle(role, f"{engine_setting(role)}.{of}", count, taken, settings.label_selector, settings.max_replicas_per_node)


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """True if a node's labels satisfy a Ray label selector: `value`, `!value`, `in(a, b)` or `!in(a, b)` for each key."""
    for key, condition in selector.items():
        excluded = condition.startswith("!")
        values = condition.removeprefix("!")
        listed = re.fullmatch(r"in\((.*)\)", values)
        allowed = [value.strip() for value in listed[1].split(",")] if listed else [values]
        if (labels.get(key) in allowed) == excluded:
            return False
    return True


def check_capacity(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> list[Placed]:
    """Place the bundles; reject what these nodes can never provide: in sum, for a single bundle, or for all together.

    Raises: CapacityError naming the setting, its demand and what is available.
    """
    for bundle in wanted:
        if bundle.count and not any(could_hold(node, bundle) for node in nodes):
            matching = [node for node in nodes if matches(node.labels, bundle.labels)]
            lacking = "no node has that" if matching or not bundle.labels else "no node has these labels"
            raise CapacityError(
                f"{bundle.setting}: one {bundle.role} needs {_asked(bundle)} on one node, and {lacking} "
                f"(nodes: {describe_nodes(nodes)}); ask for less, or add a node{_elsewhere(bundle, nodes)}"
            )
    for name in sorted({name for bundle in wanted for name in bundle.resources}):
        asked_sum = sum(bundle.count * bundle.resources.get(name, 0.0) for bundle in wanted)
        there = sum(node.resources.get(name, 0.0) for node in nodes)
        if asked_sum > there + 1e-9:
            parts = ", ".join(
                f"{bundle.setting}={bundle.count} x {bundle.resources[name]:g}" for bundle in wanted if name in bundle.resources
            )
            remedy = "; on one machine cluster.local_cpus lets small models share cores" if name == "CPU" else ""
            raise CapacityError(
                f"the run needs {asked_sum:g} {name} ({parts}), but the cluster has {there:g}; "
                f"lower one of these or add nodes{remedy}"
            )
    return pack(wanted, nodes)


def _elsewhere(bundle: Bundle, nodes: Sequence[Node]) -> str:
    """Further remedy for a teacher's engine with more GPUs than any node has; empty for any other bundle."""
    gpus = bundle.resources.get("GPU", 0.0)
    if not bundle.role.startswith(_TEACHER) or gpus <= max((node.resources.get("GPU", 0.0) for node in nodes), default=0.0):
        return ""
    return f"; {OWN_SERVER}" if gpus > 1 else ""


def pack(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> list[Placed]:
    """Assign every bundle to a node, the most constrained roles first, each on nodes that the fewest other roles could use.

    Bin packing is NP-hard; this is first-fit in two orders, and may reject what an exhaustive search would place.
    Raises: CapacityError for the bundle that fits on no node.
    """
    could = {id(bundle): [index for index, node in enumerate(nodes) if could_hold(node, bundle)] for bundle in wanted}
    usable = Counter(index for indices in could.values() for index in indices)

    def size(bundle: Bundle) -> tuple[float, ...]:
        whole = bundle.count if bundle.together else 1
        return tuple(-whole * bundle.resources.get(name, 0.0) for name in ("GPU", "CPU"))

    def fit(order: Callable[[Bundle], tuple[Any, ...]]) -> list[Placed]:
        placed = {id(each.bundle): each for each in _first_fit(sorted(wanted, key=order), nodes, could, usable)}
        return [placed[id(bundle)] for bundle in wanted]

    try:
        return fit(lambda bundle: (len(could[id(bundle)]), size(bundle)))
    except CapacityError:
        # A constrained role may be small, and fragment a node that a large one needed.
        return fit(lambda bundle: (size(bundle), len(could[id(bundle)])))


def _first_fit(
    ordered: Sequence[Bundle], nodes: Sequence[Node], could: Mapping[int, list[int]], usable: Mapping[int, int]
) -> list[Placed]:
    left = [dict(node.resources) for node in nodes]
    placed = []
    for bundle in ordered:
        found: Counter[int] = Counter()
        missing = bundle.count
        # A node's free resources never grow while a role is placed, so each node is tried once per role.
        for index in sorted(could[id(bundle)], key=lambda index: usable[index]):
            room = min(missing, _room(left[index], bundle))
            if bundle.together and room < bundle.count:
                continue
            if room:
                found[index] = room
                missing -= room
                for name, amount in bundle.resources.items():
                    left[index][name] -= room * amount
            if not missing:
                break
        if missing:
            over = describe_nodes([Node(rest, node.labels) for rest, node in zip(left, nodes, strict=True)])
            raise CapacityError(
                f"{bundle.setting}={bundle.count}: all parts of the run cannot be placed together; after "
                f"{bundle.count - missing} of this {bundle.role}, no node has {_asked(bundle)} left (left over: {over}); ask "
                "for less, or add a node"
            )
        placed.append(Placed(bundle, dict(found)))
    return placed


def could_hold(node: Node, bundle: Bundle) -> bool:
    """True if the empty node could hold this bundle; all of them if they must be together."""
    if not matches(node.labels, bundle.labels):
        return False
    return _room(node.resources, bundle) >= (bundle.count if bundle.together else 1)


def _room(resources: Mapping[str, float], bundle: Bundle) -> int:
    """Number of copies of the bundle that fit into these resources."""
    # Sums of GPU fractions have rounding errors.
    fit = (int((resources.get(name, 0.0) + 1e-9) / amount) for name, amount in bundle.resources.items() if amount)
    room = min(fit, default=bundle.count)
    return room if bundle.per_node is None else min(room, bundle.per_node)


def _asked(bundle: Bundle) -> str:
    text = describe_resources(bundle.resources)
    if bundle.together and bundle.count > 1:
        text += f", {bundle.count} times"
    return text + (f" and labels {_labels(bundle.labels)}" if bundle.labels else "")


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


_SHOWN = 8


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Describe nodes for a message: equal ones once, with their number."""
    kinds = Counter(
        describe_resources(node.resources)
        + (f" [{shown}]" if (shown := _labels({k: v for k, v in node.labels.items() if k != "ray.io/node-id"})) else "")
        for node in nodes
    )
    listed = [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.most_common(_SHOWN)]
    more = len(kinds) - len(listed)
    return "; ".join(listed) + (f"; and {more} other kinds" if more > 0 else "")


def describe_resources(resources: Mapping[str, Any]) -> str:
    """Describe resources for a message, without Ray's own."""
    shown = {name: amount for name, amount in resources.items() if not name.startswith(("node:", "memory", "object_store"))}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"
