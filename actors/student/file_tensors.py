"""Tensors of a student as checkpoint files hold them, which is how inference engines read them, and a check of such files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.student.backend import StudentBackend
from actors.student.lora import Published, published
from actors.weights.copies import CopyBuffers
from kdray.checks.parity import TrainedLogprobs, judge
from kdray.models.attention import attention_arguments


@dataclass(frozen=True)
class Fixed:
    """Weights of a phase's student that no update changes, so that replicas need them once."""

    names: tuple[str, ...] = ()
    """In the module, without an adapter."""
    nbytes: int = 0
    joined: str | None = None
    """Tensors of the module that the student's files hold in one, for which frozen weights are sent with every version."""


def fixed_weights(backend: StudentBackend, module: Any) -> Fixed:
    """Find the weights that are frozen and have no adapter; none in a family whose files join several tensors of the module.

    There a frozen tensor may be part of one file tensor with a trained one, and all are sent with every version.
    """
    found = [each for each in published(module) if not any(part.requires_grad for part in each.parameters)]
    if found and (joined := _joined(module)):
        return Fixed(joined=joined)
    return Fixed(tuple(each.name for each in found), sum(_size(backend, each) for each in found))


def _joined(model: Any) -> str | None:
    """Tensors of the module that the model's files hold in one; None if there are none."""
    # Those that loading the model went through; a mere renaming has no operations.
    conversions = getattr(model, "_weight_conversions", None) or ()
    several = (each.target_patterns for each in conversions if getattr(each, "operations", None))
    return next((" and ".join(targets) for targets in several if len(targets) > 1), None)


def _size(backend: StudentBackend, each: Published) -> int:
    return backend.numel(each.parameters[0]) * each.parameters[0].element_size()


def whole_buckets(
    backend: StudentBackend,
    parameters: Iterable[Published],
    buffers: Mapping[str, torch.Tensor],
    limit: float,
    device: torch.device | str = "cpu",
    copy_buffers: CopyBuffers | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole parameters in buckets, then buffers in one, under the names that they have in the module: copies on `device`.

    A collective: ranks other than 0 get the same number of empty buckets. Args: limit: size of a bucket, bytes; copy_buffers:
    memory of the parameters' copies, which are on the CPU then.
    """
    bucket: list[Published] = []
    size = 0
    for each in parameters:
        needed = _size(backend, each)
        if bucket and size + needed > limit:
            yield _whole(backend, bucket, device, copy_buffers)
            bucket, size = [], 0
        bucket.append(each)
        size += needed
    if bucket:
        yield _whole(backend, bucket, device, copy_buffers)
    if buffers:
        # No backend shards them.
        yield {name: buffer.to(device, copy=True) for name, buffer in buffers.items()} if backend.rank == 0 else {}


def _whole(
    backend: StudentBackend, bucket: list[Published], device: torch.device | str, copy_buffers: CopyBuffers | None
) -> dict[str, torch.Tensor]:
    parameters = [parameter for each in bucket for parameter in each.parameters]
    tensors = iter(backend.whole(parameters, device) if copy_buffers is None else backend.whole_into(parameters, copy_buffers))
    if backend.rank != 0:
        return {}
    return {each.name: each.value(tuple(next(tensors) for _ in each.parameters)) for each in bucket}


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
