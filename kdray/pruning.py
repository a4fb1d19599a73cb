"""A smaller model cut out of a larger one: some of its layers, neurons and heads, as the start of a student.

Three cuts, each exact: the model with fewer layers is the source with those layers skipped; a block with fewer neurons or
heads is the block with the others set to zero. The hidden size and the vocabulary stay: a narrower residual stream changes
every matrix of the model, and what each normalisation divides by.

What to keep is ranked by weights alone, within each layer: the squared L2 norm of everything that would leave with a neuron or
a head, summed over its coupled matrices (the groups of LLM-Pruner, Ma et al. 2023, arXiv 2305.11627; the norm of DepGraph,
Fang et al. 2023, arXiv 2301.12900). Rankings by activations on calibration text, as in Minitron (Muralidharan et al. 2024,
arXiv 2407.14679), are better where little training follows; LLM-Pruner reports norms behind a random choice there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


def prune(weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The weights of the cut model, by name, from those of the source; with everything kept, the same values."""
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_LAYERS)}
    for new, old in enumerate(plan.layers):
        prefix = f"{_LAYERS}{old}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        kept |= {f"{_LAYERS}{new}.{name}": tensor for name, tensor in _narrow(layer, plan).items()}
    return kept


def neuron_importance(layer: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of each neuron's rows of gate and up (with biases) and its column of down, [neurons] float32.

    Args: layer: the weights of one layer, by their name inside it.
    """
    down = layer["mlp.down_proj.weight"].float().square().sum(0)  # [neurons]
    return _row_norms(layer, "mlp.gate_proj") + _row_norms(layer, "mlp.up_proj") + down


def group_importance(layer: Mapping[str, Tensor], groups: int) -> Tensor:
    """Squared norm of each key-value head with its query heads: rows of q, k, v (with biases), columns of o; [groups] float32.

    Args: layer: the weights of one layer, by their name inside it; groups: its key-value heads.
    """
    output = layer["self_attn.o_proj.weight"].float().square().sum(0)  # [query heads * head size]
    parts = [output, *(_row_norms(layer, f"self_attn.{name}_proj") for name in "qkv")]
    total = parts[0].new_zeros(groups)
    for part in parts:
        # Query heads of one key-value head are neighbours, so that equal runs of rows are groups in q, k, v and o alike.
        total += part.reshape(groups, -1).sum(1)
    return total


def _narrow(layer: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """One layer with its most important neurons and groups, in their old order."""
    neuron_scores = neuron_importance(layer)
    neurons = len(neuron_scores), _largest(neuron_scores, plan.neurons)
    groups = plan.source_groups, _largest(group_importance(layer, plan.source_groups), plan.groups)
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
