"""Format of a checkpoint's quantised weights, as its config states it: method, bits, and bytes of a weight with its scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_PACKED = frozenset({"compressed-tensors", "gptq", "awq"})
"""Methods whose weights are integers of 4 or 8 bits."""
_FLOAT8 = frozenset({"compressed-tensors", "fp8"})
_SCALE_BYTES = 2
_CHANNEL = 4096
"""Weights of a row that share a scale if there are no groups: the width of a usual model."""


@dataclass(frozen=True)
class WeightFormat:
    """Quantised weights of a model's linear layers; embeddings, output head and norms stay as they are."""

    method: str
    """As in `quantization_config.quant_method`."""
    bits: int
    group_size: int | None
    """Weights that share a scale; None for a scale a row, or one for all."""
    is_float: bool = False
    """Weights are floating-point numbers, as in FP8."""
    rounds_activations: bool = False
    """Inputs of the layers are quantised too."""

    @classmethod
    def of(cls, config: Any) -> WeightFormat | None:
        """The format of a model. Args: config: its Hugging Face config. Returns: None if its weights are not quantised."""
        found = getattr(config, "quantization_config", None)
        if found is None:
            return None
        settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
        method = str(settings.get("quant_method", ""))
        groups = settings.get("config_groups") or {}
        weights = next((group["weights"] for group in groups.values() if group.get("weights")), settings)
        bits = weights.get("num_bits") or settings.get("bits") or (4 if "mxfp4" in method else 8)
        size = weights.get("group_size") or settings.get("q_group_size")
        return cls(
            method,
            int(bits),
            int(size) if size and int(size) > 0 else None,
            is_float="fp8" in method or weights.get("type") == "float",
            rounds_activations=any(group.get("input_activations") for group in groups.values()),
        )

    def runs_on(self, device: Literal["cpu", "gpu"], model_type: str) -> bool:
        """Return True if engines load it there. A format that is not named here was not tried, or vLLM 0.32 has none of it.

        Args: device: that vLLM's build computes on; model_type: of the model's config.
        """
        if self.method == "mxfp4":
            return device == "gpu" and model_type == "gpt_oss"
        if self.is_float:
            return device == "gpu" and self.bits == 8 and self.method in _FLOAT8
        if self.method not in _PACKED:
            return False
        if device == "gpu":
            return self.bits in (4, 8)
        # The CPU build has kernels for plain activations over 4 bits, and for int8 with both sides rounded.
        if self.rounds_activations:
            return self.bits == 8 and self.method == "compressed-tensors"
        return self.bits == 4

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight with its share of a scale."""
        return self.bits / 8 + _SCALE_BYTES / (self.group_size or _CHANNEL)

    def __str__(self) -> str:
        return f"{self.method}, {self.bits} bits" + (f" in groups of {self.group_size}" if self.group_size else "")
