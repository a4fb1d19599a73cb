"""Tensors of a student as checkpoint files hold them, which is how inference engines read them."""

from __future__ import annotations

from typing import Any

import torch


def in_files(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the layout of the model's checkpoint files. Args: tensors: by name in the module.

    Transformers renames and fuses weights of some families while it loads them, the experts of a mixture among them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not tensors:
        return tensors
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's checkpoint, such as the correction of a router's scores, by name in the module."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in kept}
