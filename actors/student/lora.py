"""Low-rank adapters on the student (peft): creation, the weights that they give when merged, and their own files.

The adapter's layers replace linear layers of the module in place, so that the student keeps its class, forward pass and output
head; only A and B require gradients, which is all that a backend needs to know.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdray.config import LoRASettings
from kdray.errors import TrainingError
from kdray.models.adapters import adapted_layers
from kdray.models.resolve import hub_commit, model_name

ADAPTER = "adapter"
"""Folder of the adapter inside an exported student."""
FACTS = "adapter.json"
"""File of a checkpoint with what its adapter belongs to."""
_NAME = "default"
_CONFIG = "adapter_config.json"
_BASE = ".base_layer."


@dataclass(frozen=True)
class Published:
    """A parameter of the student as replicas know it, and the parameters of the module that give it."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    """The weight, or the frozen weight with A and B."""
    scale: float = 0.0
    transposed: bool = False
    """The weight is [in, out] (GPT-2), not [out, in]."""

    def value(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The whole weight. Args: tensors: of `parameters`. The product is added in float32 and rounded once."""
        if len(tensors) == 1:
            return tensors[0]
        weight, a, b = tensors
        change = self.scale * (b.float() @ a.float())
        return (weight.float() + (change.T if self.transposed else change)).to(weight.dtype)


def add_adapter(model: Any, settings: LoRASettings, base: tuple[str, str | None], folder: Path | None, seed: int) -> None:
    """Freeze the model and add an adapter to it: fresh, so that it changes nothing yet, or the one in `folder`.

    Args: base: folder or hub id, and revision, of the frozen weights, which the adapter's files name as others may know them.
    Raises: TrainingError if the adapter in `folder` has other settings.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    layers = adapted_layers(model.config, settings)
    name, revision = _public(*base)
    config = LoraConfig(
        r=settings.rank,
        # An integer in peft's own type, though it computes with any number.
        lora_alpha=settings.alpha,
        target_modules=list(layers.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        revision=revision,
        inference_mode=False,
    )
    model.requires_grad_(False)
    # The same A on every rank.
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, _NAME)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(model.dtype)
        parameter.requires_grad_(True)
    if folder is None:
        return
    _check_same(folder, config)
    stored = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(stored[_in_file(name)])


def _public(source: str, revision: str | None) -> tuple[str, str | None]:
    """Name of a model on other machines: hub id and the commit that was loaded, or the folder's name without its place."""
    name = model_name(source)
    return (name, None) if name != source else (name, hub_commit(source, revision) or revision)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A and B of every layer, by name in the module."""
    return {name: each for name, each in model.named_parameters() if f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name}


def published(model: torch.nn.Module) -> Iterator[Published]:
    """Every parameter of the student under the name that it has without an adapter."""
    for name, parameter in model.named_parameters():
        path, found, rest = name.rpartition(_BASE)
        if ".lora_" in name:
            continue
        if not found:
            yield Published(name, (parameter,))
            continue
        layer: Any = model.get_submodule(path)
        plain = f"{path}.{rest}"
        if rest != "weight":
            yield Published(plain, (parameter,))
            continue
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        yield Published(plain, (parameter, a, b), layer.scaling[_NAME], layer.fan_in_fan_out)


def save_adapter(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter as peft does. Args: tensors: whole A and B on the CPU, by name in the module."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({_in_file(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    model.peft_config[_NAME].save_pretrained(folder)
    # As in `save_model`: the weights are readable by whoever may read the config.
    shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")


def _in_file(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


def _check_same(folder: Path, config: Any) -> None:
    stored = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    for setting, name, own in (("rank", "r", config.r), ("alpha", "lora_alpha", config.lora_alpha)):
        if stored[name] != own:
            raise TrainingError(f"{folder}: its adapter has {setting} {stored[name]}, and training.lora.{setting}={own}")


def facts_of(settings: LoRASettings, frozen: Iterable[torch.Tensor]) -> dict[str, Any]:
    """What a checkpoint's adapter belongs to. Args: frozen: whole frozen weights on the CPU, in order."""
    total = hashlib.sha256()
    for tensor in frozen:
        total.update(tensor.view(torch.uint8).numpy().tobytes())
    targets = settings.target_modules
    return {"rank": settings.rank, "alpha": settings.alpha, "target_modules": targets, "base_sha256": total.hexdigest()}


def differing_facts(folder: Path, own: dict[str, Any] | None) -> str | None:
    """Reason why a checkpoint's adapter does not belong to this student; None if it does."""
    stored_here = (folder / FACTS).is_file()
    if own is None:
        if not stored_here:
            return None
        return f"{folder}: a checkpoint of an adapter; set training.lora as it was to continue it"
    if not stored_here:
        return f"{folder}: a checkpoint of a student without training.lora; remove training.lora to continue it"
    stored = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    for name, value in own.items():
        if stored[name] == value:
            continue
        if name == "base_sha256":
            return f"{folder}: its adapter belongs to other frozen weights than those of student.model; restore that model"
        return f"{folder}: its adapter has training.lora.{name}={stored[name]}, not {value}; set it to that"
    return None
