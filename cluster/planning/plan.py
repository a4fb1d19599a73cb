"""`kdray plan`: placement of the roles, their memory, and the expected bottleneck, before anything starts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from cluster.planning.accelerators import Accelerator
from cluster.planning.head import HEAD, head_lines, head_of, hidden_width
from cluster.planning.memory import GIB, EngineMemory, Lengths, LossTensors, ModelShape, RankMemory, engine_memory, rank_memory
from cluster.planning.node_memory import check_gpu_memory, check_node_memory
from cluster.planning.placement import (
    ACCELERATOR_LABEL,
    Bundle,
    Node,
    Placed,
    bundles,
    check_capacity,
    could_hold,
    describe_resources,
)
from cluster.planning.publication import publication_lines, stored_versions
from cluster.planning.roles import GPU_MEMORY, Role, cores, weakest_gpu
from cluster.planning.throughput import Measured, measured, sampling_rate, scoring_rate, training_rate
from kdray.checks.models import check_models
from kdray.config import Config, EngineSettings, ModelSource, TrainingSettings
from kdray.config.base import NonNegativeFloat, Positive, PositiveFloat, Settings
from kdray.config.load import load_saved_config
from kdray.config.route import Route
from kdray.errors import CapacityError, ConfigError, DataError
from kdray.models.adapters import adapted_layers
from kdray.models.inspect import architecture
from kdray.models.precision import engine_dtype
from kdray.runs.folder import RunFolder
from kdray.teachers.kind import kind_of

_CAPACITY_GAP = 20.0
"""Ratio of teacher to student parameters beyond which students learn less from the teacher than from a smaller one (Mirzadeh et
al., 2020; Busbridge et al., 2025)."""

_OBJECT_STORE_SHARE = 0.3
"""Share of a node's memory that Ray's object store takes by default."""


class NodeKind(Settings):
    """A group of identical nodes in a described cluster."""

    count: Positive = 1
    """Number of nodes of this kind."""
    cpus: NonNegativeFloat = 1
    """CPUs per node."""
    gpus: NonNegativeFloat = 0
    """GPUs per node."""
    accelerator_type: str | None = None
    """Ray's name of the GPUs, such as `H100`."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of each GPU, GiB; None takes it from the type."""
    memory_gib: PositiveFloat | None = None
    """Memory of each node, GiB; None ignores it."""
    object_store_gib: PositiveFloat | None = None
    """Size of Ray's object store on each node, GiB; None takes Ray's default, 30% of `memory_gib`."""
    head: bool = False
    """The first of these nodes is Ray's head, on which the driver runs."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources per node."""
    labels: dict[str, str] = Field(default={})
    """Labels of each node."""


class DescribedCluster(Settings):
    """Description of a cluster that does not exist yet."""

    nodes: list[NodeKind] = Field(min_length=1)
    """Nodes of the cluster, by kind."""


def described_nodes(path: Path) -> list[Node]:
    """Read the nodes of a cluster described in a YAML file. Raises: DataError naming the file and the fault."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        cluster = DescribedCluster.model_validate(tree)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--cluster {path}: cannot be read: {error}") from error
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors())
        keys = ", ".join(NodeKind.model_fields)
        raise DataError(f"--cluster {path}: {'; '.join(wrong)}; a cluster is `nodes`, a list of kinds with {keys}") from error
    nodes = []
    for number, kind in enumerate(cluster.nodes):
        resources = {"CPU": kind.cpus, "GPU": kind.gpus, **kind.resources}
        labels = dict(kind.labels)
        if kind.memory_gib is not None:
            resources["memory"] = kind.memory_gib * GIB
        if (store := kind.object_store_gib or _OBJECT_STORE_SHARE * (kind.memory_gib or 0.0)) > 0:
            resources["object_store_memory"] = store * GIB
        if kind.accelerator_type is not None:
            resources[f"accelerator_type:{kind.accelerator_type}"] = 1.0
            labels.setdefault(ACCELERATOR_LABEL, kind.accelerator_type)
        if kind.gpu_memory_gib is not None:
            resources[GPU_MEMORY] = kind.gpu_memory_gib
        node = Node({k: v for k, v in resources.items() if v}, labels, f"kind {number + 1}")
        first = replace(node, resources={**node.resources, HEAD: 1.0}) if kind.head else node
        nodes += [first, *[node] * (kind.count - 1)]
    return nodes


def rates_of(run: Path) -> Measured:
    """Read the rates measured by a run from its metrics. Raises: DataError if the folder holds none."""
    folder = RunFolder.open(run)
    try:
        return measured(folder.metrics, load_saved_config(folder.config).training.batch_size)
    except (OSError, ValueError) as error:
        raise DataError(f"--run {run}: its metrics say nothing of rates: {error}") from error


@dataclass(frozen=True)
class Plan:
    roles: list[Role]
    lines: list[str] = field(default_factory=list)
    """Bottleneck, parameter ratio, warnings."""


def plan(config: Config, nodes: Sequence[Node], run: Measured | None = None) -> Plan:
    """Place a run on nodes, and predict its bottleneck.

    Args: run: rates measured by a run with this config's models; None models them.
    Raises: CapacityError for what can never fit, with an alternative that would; ConfigError for a model that cannot be used.
    """
    check_models(config)
    wanted = bundles(config)
    try:
        placed = check_capacity(wanted, nodes)
    except CapacityError as error:
        if not config.cluster.may_grow:
            raise
        # Nodes that can hold it may be added; their type is known only from a description.
        return Plan(
            [], [f"note: not on these nodes, and cluster.may_grow=true asks for more: {error}; describe them: --cluster FILE"]
        )
    shapes = _shapes(config)
    student = shapes[_STUDENT]
    lengths = Lengths(config.data.max_prompt_tokens, config.rollout.max_response_tokens)
    roles = []
    for item in placed:
        # Ray may place it on any node that matches, not only on these.
        gpu, limit = weakest_gpu([node for node in nodes if could_hold(node, item.bundle)])
        if item.bundle.role == "student":
            roles.append(_student_role(config, item, shapes, nodes, gpu, limit, lengths))
        else:
            roles.append(_engine_role(config, item, shapes, nodes, gpu, limit, lengths))
    check_node_memory(placed, roles, nodes)
    check_gpu_memory(placed, roles, nodes)
    lines = _balance(config, roles) if run is None else _measured_balance(run)
    for name, shape in shapes.items():
        if name != _STUDENT and shape.parameters > _CAPACITY_GAP * student.parameters:
            lines.append(
                f"warning: teacher {name} has {shape.parameters / student.parameters:.0f} times the student's parameters; "
                f"beyond about {_CAPACITY_GAP:.0f} a student often learns less than from a smaller teacher: consider one in "
                "between, or two stages"
            )
    lines += publication_lines(config, student, placed, nodes)
    lines += head_lines(config, nodes, _used_on_head(placed, roles, nodes), stored_versions(config, student, placed))
    lines += _growth(wanted, config, nodes)
    return Plan(roles, lines)


def table(found: Plan) -> dict[str, dict[str, str]]:
    """Format the roles as columns of text: resources, placement, and memory by component."""
    return {role.bundle.role: _column(role) for role in found.roles}


def _column(role: Role) -> dict[str, str]:
    bundle, memory = role.bundle, role.memory
    limit = "" if role.memory_limit is None else f" of {role.memory_limit / GIB:.0f}"
    cells = {
        "does": role.does,
        "bundles": f"{bundle.count} x {describe_resources(bundle.resources)}",
        "nodes": "; ".join(f"{count} on {kind or 'a node'}" for kind, count in role.nodes.items()),
    }
    if isinstance(memory, RankMemory):
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            "log-probabilities": memory.logprobs,
            "of the teacher": memory.teacher,
            "to send": memory.sent,
            "process": memory.base,
        }
        total = memory.total
    else:
        parts = {
            "weights": memory.weights,
            "activations": memory.activations,
            "log-probabilities": memory.logprobs,
            "process": memory.base,
            "KV cache": memory.kv_room,
        }
        total = memory.needed + memory.kv_room
    cells |= {f"{name}, GiB": f"{size / GIB:.2f}" for name, size in parts.items() if size}
    cells["together, GiB"] = f"{total / GIB:.1f}{limit}"
    if isinstance(memory, EngineMemory):
        cells["KV cache, tokens"] = f"{memory.kv_tokens:,}"
    if role.rate is not None and not role.on_cpus:
        cells["response tokens/s, modelled"] = f"{role.rate:,.0f}"
    return cells


_STUDENT = ""


def _shapes(config: Config) -> dict[str, ModelShape]:
    """Shapes of the student (key "") and of every teacher with weights, by name."""
    sources: dict[str, tuple[ModelSource, str | None]] = {_STUDENT: (config.student.model, config.student.revision)}
    for name in config.teachers:
        model = kind_of(config, name).model
        if model is not None:
            sources[name] = model
    found: dict[str, ModelShape] = {}
    for name, (source, revision) in sources.items():
        try:
            model = architecture(source, revision)
            found[name] = ModelShape.of(model)
            if name == _STUDENT and config.training.lora is not None:
                layers = adapted_layers(model, config.training.lora)
                found[name] = replace(found[name], adapter=layers.parameters, adapted=layers.changed)
        except (OSError, ValueError) as error:
            where = f"teachers.{name}.model" if name else "student.model"
            first = str(error).splitlines()[0]
            raise ConfigError(f"{where}={source}: its config describes no model that can be built: {first}") from error
    return found


def _engine_role(
    config: Config,
    item: Placed,
    shapes: dict[str, ModelShape],
    nodes: Sequence[Node],
    gpu: Accelerator | None,
    limit: float | None,
    lengths: Lengths,
) -> Role:
    name = item.bundle.role.removeprefix("teacher ")
    pool, route = item.bundle.role == "rollout pool", Route.of(config)
    settings: EngineSettings = config.rollout.pool if pool else config.served_teachers[name]
    models = [shapes[_STUDENT if pool else name]]
    if not pool and config.student_beside(name):
        models.append(shapes[_STUDENT])
    on_gpu = settings.num_gpus > 0
    source = (config.student.model, config.student.revision) if pool else config.source(name)
    element = 4 if engine_dtype(settings, *source) == "float32" else 2
    parts = settings.tensor_parallel_size if on_gpu else 1

    def memory(parallel: int) -> EngineMemory:
        return engine_memory(
            models,
            element,
            parallel,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            (limit or 0.0) * settings.gpu_memory_utilization,
            None if on_gpu and limit is not None else settings.kv_cache_gib * GIB,
            "GPU" if on_gpu else "CPU",
        )

    setting = "rollout.pool" if pool else f"teachers.{name}"
    most = settings.replicas if settings.autoscaling is None else settings.autoscaling.max_replicas
    sharing = min(int(1 / settings.num_gpus), most) if 0 < settings.num_gpus < 1 else 1
    if sharing * settings.gpu_memory_utilization > 1:
        raise CapacityError(
            f"{setting}.num_gpus={settings.num_gpus:g} puts {sharing} replicas on a GPU, and each takes "
            f"gpu_memory_utilization={settings.gpu_memory_utilization:g} of it; lower that to {1 / sharing:.2g} or less"
        )
    found = memory(parts)
    sequence = lengths.prompt + lengths.response
    if on_gpu and limit is not None and found.kv_tokens < sequence:
        whole = [p for p in (1, 2, 4, 8, 16) if not any(model.heads % p for model in models)]
        fits = next((p for p in whole if memory(p).kv_tokens >= sequence), None)
        remedy = (
            f"set {setting}.tensor_parallel_size={fits} and num_gpus={fits}"
            if fits is not None and fits > parts
            else f"use GPUs with more memory, or lower {setting}.max_num_seqs"
        )
        raise CapacityError(
            f"{setting}: a replica needs {found.needed / GIB:.1f} GiB on each of {parts} GPUs before any KV cache, and one"
            f" sequence of {sequence} tokens {sequence * found.kv_per_token / GIB:.2f} GiB more; the smallest "
            f"GPU that it may be placed on gives {limit * settings.gpu_memory_utilization / GIB:.1f} GiB; {remedy}"
        )
    running = min(settings.max_num_seqs, max(1, found.kv_tokens // sequence))
    samples = pool or route.sampler != "students"
    rate, hardware = None, gpu if on_gpu else cores(item.bundle)
    if hardware is not None:
        one = (
            sampling_rate(models, hardware, parts, running, lengths, element)
            if samples
            else scoring_rate(models, hardware, parts, lengths)
        )
        rate = one * item.bundle.count
    does = f"samples, {running} sequences at once" if samples else "scores by prefill"
    return Role(item.bundle, _where(item, nodes), found, limit if on_gpu else None, rate, does)


def _student_role(
    config: Config,
    item: Placed,
    shapes: dict[str, ModelShape],
    nodes: Sequence[Node],
    gpu: Accelerator | None,
    limit: float | None,
    lengths: Lengths,
) -> Role:
    training, student = config.training, shapes[_STUDENT]
    on_gpu = training.gpus_per_rank > 0
    element = 2 if training.precision == "bf16" else 4
    held = 0.0
    if width := hidden_width(config):
        (name,) = config.teachers
        held = width * shapes[name].vocab * element
    if training.features is not None and config.white_box_teacher is not None:
        held = shapes[config.white_box_teacher[0]].parameters * element

    def memory(settings: TrainingSettings) -> RankMemory:
        return rank_memory(student, settings, lengths, held, LossTensors.of(config.loss, config.rollout))

    found = memory(training)
    if on_gpu and limit is not None and found.total > limit:
        raise CapacityError(
            f"training: a rank needs {found.total / GIB:.1f} GiB (optimizer {found.optimizer / GIB:.1f}, gradients "
            f"{found.gradients / GIB:.1f}, weights {found.weights / GIB:.1f}, activations {found.activations / GIB:.1f}, "
            f"log-probabilities {found.logprobs / GIB:.1f}), and the smallest GPU that it may be placed on has "
            f"{limit / GIB:.1f} GiB; {_smaller(training, lengths, memory, limit)}"
        )
    rate, hardware = None, gpu if on_gpu else cores(item.bundle)
    if hardware is not None:
        rate = training_rate(student, hardware, training.ranks, lengths, training.gradient_checkpointing)
    return Role(
        item.bundle,
        _where(item, nodes),
        found,
        limit if on_gpu else None,
        rate,
        f"trains, {training.backend.description}, {training.precision}",
    )


def _used_on_head(placed: Sequence[Placed], roles: Sequence[Role], nodes: Sequence[Node]) -> float:
    """Main memory that the parts on CPUs take on the driver's node, bytes."""
    head = head_of(nodes)
    here = next((index for index, node in enumerate(nodes) if node is head), None)
    if here is None:
        return 0.0
    on_cpus = [(role, item) for item, role in zip(placed, roles, strict=True) if not role.bundle.resources.get("GPU")]
    return sum(role.memory_bytes * item.nodes.get(here, 0) for role, item in on_cpus)


def _smaller(
    training: TrainingSettings, lengths: Lengths, memory: Callable[[TrainingSettings], RankMemory], limit: float
) -> str:
    """The smallest change of the training settings that makes a rank fit."""
    backend, most = training.backend, training.backend.max_ranks
    numbers = [ranks for ranks in (training.ranks * 2**power for power in range(6)) if most is None or ranks <= most]
    size, least = "micro_batch_size", 1
    if training.micro_batch_tokens is not None:
        size, least = "micro_batch_tokens", lengths.prompt + lengths.response
    whole = getattr(training, size)
    micros = [part for part in (whole // 2**power for power in range(whole.bit_length())) if part >= least]
    for ranks, leaner in product(numbers, (backend, *backend.leaner())):
        for checkpointing, micro in product(sorted({training.gradient_checkpointing, True}), micros):
            wanted = {"ranks": ranks, "gradient_checkpointing": checkpointing, size: micro}
            if memory(training.model_copy(update={**wanted, "backend": leaner})).total <= limit:
                changed = {name: value for name, value in wanted.items() if value != getattr(training, name)}
                changed |= {f"backend.{name}": value for name, value in leaner if value != getattr(backend, name)}
                described = ", ".join(f"training.{name}={str(value).lower()}" for name, value in changed.items())
                return f"it fits with {described}"
    return "use GPUs with more memory, or a smaller student"


def _where(item: Placed, nodes: Sequence[Node]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for index, count in item.nodes.items():
        node = nodes[index]
        labels = [f"{k}={v}" for k, v in sorted(node.labels.items()) if not k.startswith("ray.io/node")]
        kinds[" ".join([node.name, *labels]).strip()] += count
    return dict(kinds)


_ON_CPUS = (
    "modelled for CPUs of one kind, by arithmetic and memory alone: fixed costs, which rule small models, are left out; "
    "measure: kdray plan CONFIG --run RUN"
)


def _balance(config: Config, roles: Sequence[Role]) -> list[str]:
    """Describe the bottleneck, by modelled rates."""
    if any(role.rate is None for role in roles):
        unknown = ", ".join(role.bundle.role for role in roles if role.rate is None)
        return [
            f"rates: nothing is known of the hardware of {unknown}; name its accelerator type, or measure: "
            "kdray plan CONFIG --run RUN"
        ]
    nominal = [role.bundle.role for role in roles if role.on_cpus]
    if nominal and len(nominal) < len(roles):
        return [f"rates: those of CPUs ({', '.join(nominal)}) are not known beside GPUs'; measure: kdray plan CONFIG --run RUN"]
    rates = {role.bundle.role: role.rate or 0.0 for role in roles}
    training = rates.pop("student")
    sharing = config.rollout.teachers
    shared = len(config.served_teachers) > 1 and sharing is not None and not sharing.one_target
    supply: dict[str, float] = {}
    if shared:
        # Routed teachers share the prompts: at best, their rates add up.
        supply["the teachers together"] = sum(rate for role, rate in rates.items() if role.startswith("teacher"))
        rates = {role: rate for role, rate in rates.items() if not role.startswith("teacher")}
    supply |= rates
    if not supply:
        if nominal:
            return ["bottleneck: student; no replica samples"]
        return [f"modelled: the student trains {training:,.0f} response tokens/s; no replica samples"]
    slowest = min(supply, key=lambda role: supply[role])
    if nominal:
        lines = [_ON_CPUS]
    else:
        text = ", ".join(f"{role} {rate:,.0f}" for role, rate in {**supply, "student": training}.items())
        lines = [f"modelled response tokens/s: {text}"]
    ratio = supply[slowest] / training
    if ratio < 1:
        more = math.ceil(1 / ratio * 10) / 10
        lines.append(
            f"bottleneck: {slowest}; the student would wait {100 * (1 - ratio):.0f}% of the time; {more:g} times as many "
            "replicas would keep it busy"
        )
    else:
        lines.append(f"bottleneck: student; {slowest} gives {ratio:.1f} times what it trains, and could be that much smaller")
    return lines


def _measured_balance(run: Measured) -> list[str]:
    """Describe the bottleneck, as measured by a run."""
    lines = [
        f"measured response tokens/s: student {run.training:,.0f} while training, {run.supply:,.0f} with its waits "
        f"({100 * run.waits:.0f}% of the time), from {run.replicas:.1f} replicas"
    ]
    if run.waits > 0.05:
        needed = run.training / (run.supply / max(run.replicas, 1e-9))
        lines.append(f"bottleneck: teachers; about {math.ceil(needed)} such replicas would keep the student busy")
    else:
        lines.append("bottleneck: student; the replicas keep up")
    return lines


def _growth(wanted: Sequence[Bundle], config: Config, nodes: Sequence[Node]) -> list[str]:
    """Warn of pools whose maximum size exceeds the free resources."""
    lines = []
    for name, engine in {**config.served_teachers, "": config.rollout.pool}.items():
        role = f"teacher {name}" if name else "rollout pool"
        bundle = next((each for each in wanted if each.role == role), None)
        if bundle is None or engine.autoscaling is None:
            continue
        grown = replace(bundle, count=engine.autoscaling.max_replicas)
        try:
            check_capacity([grown if each is bundle else each for each in wanted], nodes)
        except CapacityError:
            lines.append(
                f"note: {role} may grow to {grown.count} replicas, and these nodes do not hold that many beside the rest; "
                + ("nodes are asked for" if config.cluster.may_grow else "set cluster.may_grow=true where nodes can be added")
            )
    return lines
