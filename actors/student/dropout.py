"""Removal of what a model computes only while it trains: the replicas sample from the model as it is in evaluation mode."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

_RATE = re.compile(r"dropout|layerdrop|pdrop|drop_prob|^(?:input_)?jitter_noise$|^moe_jitter_eps$")
"""Names of rates that modules pass to functions or read in their forward pass. PhiMoE's `router_jitter_noise` is not among
them: its routing reads it in evaluation mode, too."""


def without_dropout(model: torch.nn.Module) -> None:
    """Set every rate of dropout, of dropped layers and of routing noise to 0, permanently.

    Some modules read their rates from the config (Falcon): all but the model itself, whose config is exported, get a copy.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _set_to_zero(module)
        config = getattr(module, "config", None)
        if module is not model and config is not None:
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _set_to_zero(configs[id(config)])
            module.config = configs[id(config)]


def _set_to_zero(holder: Any) -> None:
    """Set the rates among an object's own attributes to 0."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and _RATE.search(name):
            setattr(holder, name, 0.0)


def set_recomputation(model: torch.nn.Module, enabled: bool) -> None:
    """Put a model in evaluation mode, except that modules with gradient checkpointing recompute their activations if `enabled`.

    Transformers recomputes in training mode only, and some models do more in it than recompute: PhiMoE draws its experts.
    """
    model.eval()
    for module in model.modules():
        if enabled and getattr(module, "gradient_checkpointing", False):
            # Not `train()`, which would include the modules inside.
            module.training = True
