"""Tensors of a student as checkpoint files hold them, which is how inference engines read them, and a check of such files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdray.checks.parity import TrainedLogprobs, judge
from kdray.models.attention import attention_arguments


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


def export_gap(folder: Path, dtype: torch.dtype, ids: Sequence[int], trained: TrainedLogprobs, vocab_size: int) -> str | None:
    """Compare an exported student, loaded anew on the CPU, with the one that was trained. Returns: the fault, None if none.

    Args: trained: its log q of `ids`, over the first `vocab_size` rows.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, **attention_arguments(folder)
    ).eval()
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1, :vocab_size].float()
    found = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    verdict = judge(0, trained, found, str(dtype).removeprefix("torch."))
    if verdict.accepted:
        return None
    return (
        f"{folder}: the exported student, loaded anew, is another model than the one that was trained: log q differs by "
        f"{verdict.gap:.2g} nats a token (at most {verdict.tolerance:.2g} is rounding); transformers does not save or load "
        "this architecture whole"
    )
