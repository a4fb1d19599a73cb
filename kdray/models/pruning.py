"""Structured pruning: a smaller model cut out of a larger one by layers, neurons and heads, to initialise a student.

Each of the three cuts is exact: removing layers equals skipping them in the source, and removing neurons or heads of a block
equals setting them to zero. Hidden size and vocabulary are kept: a narrower residual stream would change every matrix of the
model and the divisor of every normalisation.

Parts are ranked within each layer. By weights alone: the squared L2 norm of everything that is removed together with a neuron
or head, summed over its coupled matrices (the groups of LLM-Pruner, Ma et al. 2023, arXiv 2305.11627; the norm of DepGraph,
Fang et al. 2023, arXiv 2301.12900). With calibration text: the mean squared change of the block's output when that part alone
is dropped. This combines activations and weights, as Wanda does (Sun et al. 2023, arXiv 2306.11695), and needs only forward
passes, as Minitron does (Muralidharan et al. 2024, arXiv 2407.14679).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdray.config import PrunedModel
from kdray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers have `self_attn.{q,k,v,o}_proj` and `mlp.{gate,up,down}_proj`."""

_LAYERS = "model.layers."


@dataclass(frozen=True)
class Plan:
    """Parts of the source to keep, and the config of the resulting model."""

    layers: list[int]
    """Indices of the kept layers in the source, ascending."""
    neurons: int
    """Neurons kept in each feed-forward block."""
    groups: int
    """Key-value heads kept in each attention block; the query heads that share them are kept too."""
    source_groups: int
    """Key-value heads in the source."""
    config: Any
    """Hugging Face config of the pruned model."""


def plan_pruning(config: Any, source: PrunedModel) -> Plan:
    """Plan the cut that `source` describes, from the Hugging Face config. Raises: ConfigError if it is not possible."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model.source={source.source}: a {config.model_type} cannot be pruned here, only {', '.join(FAMILIES)}; "
            "take a source of these, or a smaller model of its own family as it is"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"model.source={source.source}: its weights are quantised; name the model before quantisation")
    layers = _kept_layers(source.layers, config.num_hidden_layers)
    neurons = _at_most("intermediate_size", source.intermediate_size, config.intermediate_size, "neurons a block")
    groups = _at_most("num_key_value_heads", source.num_key_value_heads, config.num_key_value_heads, "key-value heads")
    if config.model_type == "qwen2" and groups < config.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={groups}: vLLM derives the size of a qwen2's heads from their number, so they cannot "
            "become fewer; remove the setting, and cut layers or intermediate_size instead"
        )
    cut = copy.deepcopy(config)
    heads = config.num_attention_heads // config.num_key_value_heads
    # Before the number of heads changes: afterwards it no longer follows from the hidden size.
    cut.head_dim = _head_size(config)
    cut.num_attention_heads = groups * heads
    cut.num_key_value_heads = groups
    cut.num_hidden_layers = len(layers)
    cut.intermediate_size = neurons
    if getattr(config, "layer_types", None) is not None:
        # Some models alternate windowed and full attention: each kept layer keeps its type.
        cut.layer_types = [config.layer_types[layer] for layer in layers]
    if getattr(config, "max_window_layers", None) is not None:
        cut.max_window_layers = sum(layer < config.max_window_layers for layer in layers)
    return Plan(layers, neurons, groups, config.num_key_value_heads, cut)


@dataclass(frozen=True)
class Importance:
    """Importance scores of the parts of one layer; the highest are kept."""

    neurons: Tensor
    """[neurons]"""
    groups: Tensor
    """[key-value heads]"""


def prune(weights: Mapping[str, Tensor], plan: Plan, importance: Sequence[Importance] | None = None) -> dict[str, Tensor]:
    """Return the weights of the pruned model by name; if everything is kept, the source's values unchanged.

    Args: importance: scores for every layer of the source; None ranks by weights.
    """
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_LAYERS)}
    for new, old in enumerate(plan.layers):
        prefix = f"{_LAYERS}{old}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        ranks = weight_importance(layer, plan.source_groups) if importance is None else importance[old]
        kept |= {f"{_LAYERS}{new}.{name}": tensor for name, tensor in _narrow(layer, plan, ranks).items()}
    return kept


def weight_importance(layer: Mapping[str, Tensor], groups: int) -> Importance:
    """Squared norms of each part's weights: rows (with biases) in input projections, columns in the output projection.

    Args: layer: the weights of one layer, by their name within the layer; groups: number of key-value heads.
    """
    neurons = _column_norms(layer, "mlp.down_proj") + _row_norms(layer, "mlp.gate_proj") + _row_norms(layer, "mlp.up_proj")
    attention = [_column_norms(layer, "self_attn.o_proj"), *(_row_norms(layer, f"self_attn.{name}_proj") for name in "qkv")]
    # Query heads of one key-value head are adjacent, so equal runs of rows are the groups in q, k, v and o alike.
    by_group = [part.unflatten(0, (groups, -1)).sum(1) for part in attention]
    return Importance(neurons, by_group[0] + by_group[1] + by_group[2] + by_group[3])


def activation_importance(model: Any, texts: Iterable[Sequence[int]]) -> list[Importance]:
    """Mean squared change of each block's output, over all tokens, when one of its parts is dropped; for every layer.

    Args: model: a Hugging Face model of FAMILIES; texts: token ids, each text read from its start, at least one token.
    """
    import torch

    layers, groups = model.model.layers, model.config.num_key_value_heads
    neurons = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in layers]
    heads = [torch.zeros(groups, dtype=torch.float64) for _ in layers]
    tokens = 0

    def read_neurons(total: Tensor) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            # A neuron contributes its activation times its column, and the norm of that product is the product of the norms.
            total.add_(inputs[0].float().square().flatten(0, -2).sum(0) * module.weight.float().square().sum(0))

        return hook

    def read_groups(total: Tensor) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            written = inputs[0].float().flatten(0, -2).chunk(groups, -1)  # per group: [tokens, its channels]
            columns = module.weight.float().chunk(groups, -1)  # per group: [hidden, its channels]
            total.add_(torch.stack([(x @ w.T).square().sum() for x, w in zip(written, columns, strict=True)]))

        return hook

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(read_neurons(neurons[i])) for i, layer in enumerate(layers)]
    hooks += [layer.self_attn.o_proj.register_forward_pre_hook(read_groups(heads[i])) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            for text in texts:
                model.model(torch.tensor([list(text)]), use_cache=False)
                tokens += len(text)
    finally:
        for hook in hooks:
            hook.remove()
    return [Importance(neurons[i] / tokens, heads[i] / tokens) for i in range(len(layers))]


def _narrow(layer: Mapping[str, Tensor], plan: Plan, importance: Importance) -> dict[str, Tensor]:
    """Return one layer with only its most important neurons and groups, in their original order."""
    neurons = len(importance.neurons), _largest(importance.neurons, plan.neurons)
    groups = plan.source_groups, _largest(importance.groups, plan.groups)
    narrowed = dict(layer)
    for module, (count, chosen) in {
        "mlp.gate": neurons,
        "mlp.up": neurons,
        **{f"self_attn.{q}": groups for q in "qkv"},
    }.items():
        for name in (f"{module}_proj.weight", f"{module}_proj.bias"):
            if name in layer:
                narrowed[name] = _blocks(layer[name], 0, count, chosen)
    # These two write to the residual stream, which keeps its width, and so do their biases.
    for module, (count, chosen) in {"mlp.down": neurons, "self_attn.o": groups}.items():
        narrowed[f"{module}_proj.weight"] = _blocks(layer[f"{module}_proj.weight"], 1, count, chosen)
    return narrowed


def _blocks(tensor: Tensor, axis: int, count: int, chosen: Tensor) -> Tensor:
    """Select the `chosen` ones of the `count` equal blocks of `tensor` along `axis`."""
    return tensor.unflatten(axis, (count, -1)).index_select(axis, chosen).flatten(axis, axis + 1)


def _largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values, ascending; the first wins a tie."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _row_norms(layer: Mapping[str, Tensor], module: str) -> Tensor:
    norms = layer[f"{module}.weight"].float().square().sum(1)
    bias = layer.get(f"{module}.bias")
    return norms if bias is None else norms + bias.float().square()


def _column_norms(layer: Mapping[str, Tensor], module: str) -> Tensor:
    return layer[f"{module}.weight"].float().square().sum(0)


def _kept_layers(wanted: int | list[int] | None, count: int) -> list[int]:
    if wanted is None:
        return list(range(count))
    if isinstance(wanted, int):
        if wanted > count:
            raise ConfigError(f"model.layers={wanted}: the source has {count}; keep at most that")
        # Rounded half up in integer arithmetic, so that every machine gives the same layers.
        gaps = wanted - 1
        return [(2 * index * (count - 1) + gaps) // (2 * gaps) for index in range(wanted)]
    if wanted != sorted(set(wanted)):
        raise ConfigError(f"model.layers={wanted}: list each layer once, ascending; the order of layers is the source's")
    if wanted[-1] >= count:
        raise ConfigError(f"model.layers={wanted}: the source has layers 0 to {count - 1}; list some of these")
    return wanted


def _at_most(setting: str, wanted: int | None, count: int, what: str) -> int:
    if wanted is not None and wanted > count:
        raise ConfigError(f"model.{setting}={wanted}: the source has {count} {what}; keep at most that")
    return count if wanted is None else wanted


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
