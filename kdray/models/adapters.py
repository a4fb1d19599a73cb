"""Layers of a model that get a low-rank adapter, found on its skeleton: neither weights nor peft are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kdray.config import LoRASettings
from kdray.errors import ConfigError

_SETTING = "training.lora.target_modules"


@dataclass(frozen=True)
class AdaptedLayers:
    """Linear layers with an adapter, by their path in the model."""

    names: tuple[str, ...]
    parameters: int
    """Number of parameters of all adapters, A and B."""
    changed: int
    """Number of parameters of these layers' own weights, which the adapters change when they are merged."""
    total: int
    """Number of parameters of the model without adapters."""
    targets: tuple[str, ...]
    """Shortest names that select these layers and no others; peft compares them with the end of a path."""

    def __str__(self) -> str:
        share = 100 * self.parameters / self.total
        return (
            f"{len(self.names)} layers, {self.parameters:,} parameters trained beside {self.total:,} frozen ones ({share:.2g}%)"
        )


def adapted_layers(config: Any, settings: LoRASettings) -> AdaptedLayers:
    """Find the layers of a model of `config` (from transformers) that `settings` select.

    Raises: ConfigError for a target that selects no linear layer, or the output head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    sizes = {name: _sizes(module) for name, module in model.named_modules() if name}
    linear = {name: size for name, size in sizes.items() if size is not None}
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    inner = [name for name in linear if name != head_name]
    chosen = inner if settings.target_modules == "all-linear" else _matching(settings.target_modules, sizes, linear)
    if head_name in chosen:
        raise ConfigError(
            f"{_SETTING} selects {head_name}, the output head, inside which the loss is computed: it gets no adapter; leave it "
            "out"
        )
    return AdaptedLayers(
        names=tuple(chosen),
        parameters=sum(settings.rank * sum(linear[name]) for name in chosen),
        changed=sum(math.prod(linear[name]) for name in chosen),
        total=sum(parameter.numel() for parameter in model.parameters()),
        targets=_shortest(chosen, list(sizes)),
    )


def _sizes(module: Any) -> tuple[int, int] | None:
    """Widths of a linear layer's input and output; None for any other module."""
    import torch
    from transformers.pytorch_utils import Conv1D

    # Exact types: a layer that computes more than a product would lose the rest in the merged weight.
    if type(module) is torch.nn.Linear:
        return module.in_features, module.out_features
    if type(module) is Conv1D:
        return module.nx, module.nf
    return None


def _selects(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching(targets: list[str], sizes: dict[str, Any], linear: dict[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for target in targets:
        named = [name for name in sizes if _selects(target, name)]
        if not named or any(name not in linear for name in named):
            short = sorted({name.rpartition(".")[2] for name in linear})
            fault = f"is no linear layer in {named[0]}" if named else "ends the path of no layer of the student"
            raise ConfigError(f"{_SETTING}: {target!r:.100} {fault}; linear layers there: {', '.join(short)}")
        found |= dict.fromkeys(named)
    return [name for name in linear if name in found]


def _shortest(chosen: list[str], every: list[str]) -> tuple[str, ...]:
    """Last parts of the paths if those select nothing else, otherwise whole paths."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    selected = [name for name in every if any(_selects(end, name) for end in ends)]
    return tuple(ends) if set(selected) == set(chosen) else tuple(chosen)
