"""Feature and relation terms: the layers of student and teacher to compare, the distance, and its weight."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import NonNegative, NonNegativeFloat, PositiveFloat, Settings
from kdray.errors import ConfigError

Layers = Literal["uniform", "last"] | Annotated[list[tuple[NonNegative, NonNegative]], Field(min_length=1)]


class FeatureTerm(Settings):
    """A term of the loss; its value is a mean over pairs of layers and over response tokens."""

    setting: ClassVar[str] = "training.features"
    first_layer: ClassVar[int] = 0

    weight: NonNegativeFloat = 0.1
    """Weight of the term relative to the loss; `training.schedules` may change it. 0 only measures the term, and trains no
    projection. If the models are far apart, the terms' gradients are many times the loss's."""
    layers: Layers = "last"
    """Pairs [student layer, teacher layer], or `uniform`, or `last`."""

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """Resolve `layers` to (student layer, teacher layer) pairs. Raises: ConfigError for a layer that does not exist."""
        if self.layers == "last":
            return [(student_layers, teacher_layers)]
        if self.layers == "uniform":
            # Rounded to the nearest teacher layer, halves up.
            count = 2 * student_layers
            nearest = [
                (s, (2 * s * teacher_layers + student_layers) // count) for s in range(self.first_layer, student_layers + 1)
            ]
            return [(s, max(self.first_layer, t)) for s, t in nearest]
        for pair in self.layers:
            for whose, layer, last in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
                if not self.first_layer <= layer <= last:
                    raise ConfigError(
                        f"{self.setting}.layers={[list(each) for each in self.layers]}: the {whose} has no layer {layer} to "
                        f"compare; choose from {self.first_layer} to {last}"
                    )
        return list(self.layers)


class HiddenTerm(FeatureTerm):
    """Distance between the student's hidden states, through a learned linear projection, and the teacher's."""

    setting: ClassVar[str] = "training.features.hidden"

    layers: Layers = "uniform"
    """Pairs [student layer, teacher layer]: 0 is the embedding output, the last is after the final norm. `uniform` pairs every
    student layer with the teacher layer at the same relative depth, `last` only the last ones."""
    distance: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 - cos, independent of the states' magnitude (PKD). `mse`: mean squared difference over channels (FitNets,
    TinyBERT); if a few channels of the teacher are huge, they dominate it."""
    projection_learning_rate: PositiveFloat = 1e-3
    """Peak AdamW learning rate of the projections, which are initialised randomly unless the widths are equal; it follows the
    schedule."""


class AttentionTerm(FeatureTerm):
    """Distance between the attention maps of student and teacher, at the positions that predict response tokens."""

    setting: ClassVar[str] = "training.features.attention"
    first_layer: ClassVar[int] = 1

    layers: Layers = "last"
    """As for hidden states; layers count from 1."""
    distance: Literal["kl", "mse"] = "kl"
    """`kl`: KL(teacher || student) over keys, nats (MiniLM). `mse`: sum of squared differences over keys (TinyBERT, on
    probabilities). Heads are compared one by one if both models have the same number, otherwise by their mean."""


class RelationTerm(FeatureTerm):
    """Pairwise relations between the states of a response's tokens; needs no projection between the models' widths."""

    setting: ClassVar[str] = "training.features.relation"

    layers: Layers = "last"
    """As for hidden states."""
    distance: Literal["similarities", "distances"] = "similarities"
    """`similarities`: squared difference of cosine similarities. `distances`: Huber loss on distances divided by their mean
    (RKD)."""


class FeatureSettings(Settings):
    """Terms that match the teacher's internals, added to the loss; every student rank holds a copy of the teacher."""

    hidden: HiddenTerm | None = None
    """Match hidden states; None disables the term."""
    attention: AttentionTerm | None = None
    """Match attention maps; both models then run without fused attention. None disables the term."""
    relation: RelationTerm | None = None
    """Match relations among tokens; None disables the term."""

    @model_validator(mode="after")
    def _some_term(self) -> FeatureSettings:
        if not self.terms:
            raise ValueError("training.features names no term; give hidden, attention or relation, or remove it")
        return self

    @property
    def terms(self) -> list[HiddenTerm | AttentionTerm | RelationTerm]:
        """The enabled terms."""
        return [term for term in (self.hidden, self.attention, self.relation) if term is not None]
