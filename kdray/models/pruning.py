"""A smaller model cut out of a larger one: some of its layers, neurons and heads, as the start of a student.

Three cuts, each exact: the model with fewer layers is the source with those layers skipped; a block with fewer neurons or
heads is the block with the others set to zero. The hidden size and the vocabulary stay: a narrower residual stream changes
every matrix of the model, and what each normalisation divides by.

What to keep is ranked within each layer. By weights alone: the squared L2 norm of everything that would leave with a neuron or
a head, summed over its coupled matrices (the groups of LLM-Pruner, Ma et al. 2023, arXiv 2305.11627; the norm of DepGraph, Fang
et al. 2023, arXiv 2301.12900). With calibration text: by how much dropping it alone changes its block's output there, in the
mean square. This joins activations and weights, as Wanda (Sun et al. 2023, arXiv 2306.11695), and needs forward passes alone,
as Minitron (Muralidharan et al. 2024, arXiv 2407.14679).
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
    """What is kept, and the config of the model that results."""

    layers: list[int]
    """Of the source, ascending."""
    neurons: int
    """Of each feed-forward block."""
    groups: int
    """Key-value heads of each attention block; each takes its query heads along."""
    source_groups: int
    """Key-value heads in the source."""
    config: Any
    """Of the cut model, a Hugging Face config."""


def plan_pruning(config: Any, source: PrunedModel) -> Plan:
    """What `source` asks of a model with this Hugging Face config. Raises: ConfigError where the model cannot be cut so."""
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
    # Before the number of heads: from then on it no longer follows from the hidden size.
    cut.head_dim = _head_size(config)
    cut.num_attention_heads = groups * heads
    cut.num_key_value_heads = groups
    cut.num_hidden_layers = len(layers)
    cut.intermediate_size = neurons
    if getattr(config, "layer_types", None) is not None:
        # Windowed and full attention alternate in some models: each kept layer stays what it was.
        cut.layer_types = [config.layer_types[layer] for layer in layers]
    if getattr(config, "max_window_layers", None) is not None:
        cut.max_window_layers = sum(layer < config.max_window_layers for layer in layers)
    return Plan(layers, neurons, groups, config.num_key_value_heads, cut)


@dataclass(frozen=True)
class Importance:
    """Of the parts of one layer; what is larger is kept."""

    neurons: Tensor
    """[neurons]"""
    groups: Tensor
    """[key-value heads]"""


def prune(weights: Mapping[str, Tensor], plan: Plan, importance: Sequence[Importance] | None = None) -> dict[str, Tensor]:
    """The weights of the cut model, by name, from those of the source; with everything kept, the same values.

    Args: importance: of every layer of the source; None ranks by weights.
    """
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_LAYERS)}
    for new, old in enumerate(plan.layers):
        prefix = f"{_LAYERS}{old}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        ranks = weight_importance(layer, plan.source_groups) if importance is None else importance[old]
        kept |= {f"{_LAYERS}{new}.{name}": tensor for name, tensor in _narrow(layer, plan, ranks).items()}
    return kept


def weight_importance(layer: Mapping[str, Tensor], groups: int) -> Importance:
    """Squared norms of what would leave with each part: its rows (with biases) in what reads, its columns in what writes.

    Args: layer: the weights of one layer, by their name inside it; groups: its key-value heads.
    """
    neurons = _column_norms(layer, "mlp.down_proj") + _row_norms(layer, "mlp.gate_proj") + _row_norms(layer, "mlp.up_proj")
    attention = [_column_norms(layer, "self_attn.o_proj"), *(_row_norms(layer, f"self_attn.{name}_proj") for name in "qkv")]
    # Query heads of one key-value head are neighbours, so that equal runs of rows are groups in q, k, v and o alike.
    by_group = [part.unflatten(0, (groups, -1)).sum(1) for part in attention]
    return Importance(neurons, by_group[0] + by_group[1] + by_group[2] + by_group[3])


def activation_importance(model: Any, texts: Iterable[Sequence[int]]) -> list[Importance]:
    """Of every layer: by how much each part, dropped alone, would change its block's output; mean square over all tokens.

    Args: model: a Hugging Face model of FAMILIES; texts: token ids, each text read from its start, at least one token.
    """
    import torch

    layers, groups = model.model.layers, model.config.num_key_value_heads
    neurons = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in layers]
    heads = [torch.zeros(groups, dtype=torch.float64) for _ in layers]
    tokens = 0

    def read_neurons(total: Tensor) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            # A neuron writes its activation times its column: the norm of the product is the product of the norms.
            total.add_(inputs[0].float().square().flatten(0, -2).sum(0) * module.weight.float().square().sum(0))

        return hook

    def read_groups(total: Tensor) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            written = inputs[0].float().flatten(0, -2).chunk(groups, -1)  # of each group: [tokens, its channels]
            columns = module.weight.float().chunk(groups, -1)  # of each group: [hidden, its channels]
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
    """One layer with its most important neurons and groups, in their old order."""
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
    # What these two write is the residual stream, which keeps its width, and so their biases.
    for module, (count, chosen) in {"mlp.down": neurons, "self_attn.o": groups}.items():
        narrowed[f"{module}_proj.weight"] = _blocks(layer[f"{module}_proj.weight"], 1, count, chosen)
    return narrowed


def _blocks(tensor: Tensor, axis: int, count: int, chosen: Tensor) -> Tensor:
    """`tensor` with only the chosen ones of the `count` equal blocks along `axis`."""
    return tensor.unflatten(axis, (count, -1)).index_select(axis, chosen).flatten(axis, axis + 1)


def _largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; of equal ones the first."""
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
        # Rounded to the nearest, halves up, in integers: the same on every machine.
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
