"""Low-rank adaptation (LoRA): rank, scale, and the layers that get an adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from kdray.config.base import NonNegativeFloat, Positive, PositiveFloat, Settings


class LoRASettings(Settings):
    """Adapters of low rank on linear layers whose own weights stay frozen: W + alpha / rank * B A (arXiv 2106.09685)."""

    rank: Positive = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale alpha / rank by which the product B A is multiplied."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: `all-linear` takes every linear layer but the output head, a list names them by the end of
    their path in the model, such as `q_proj` or `layers.0.self_attn.q_proj`."""
    dropout: NonNegativeFloat = 0.0
    """Dropout before A. Always 0: the replicas sample from the student without dropout, and training has to compute the
    probabilities of that same student."""

    @field_validator("dropout")
    @classmethod
    def _check_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(
                f"training.lora.dropout={value:g}: the replicas sample without dropout, so that training would compute the "
                "probabilities of another student than the one that wrote the rollouts; remove it, or set it to 0"
            )
        return value

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank
