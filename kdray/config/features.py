"""Feature and relation terms: which layers of student and teacher are compared, how, and with what weight."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import NonNegative, NonNegativeFloat, PositiveFloat, Settings
from kdray.errors import ConfigError

Layers = Literal["uniform", "last"] | Annotated[list[tuple[NonNegative, NonNegative]], Field(min_length=1)]


class FeatureTerm(Settings):
    """One kind of comparison; its value is a mean over pairs of layers and over response tokens."""

    setting: ClassVar[str] = "training.features"
    first_layer: ClassVar[int] = 0

    weight: NonNegativeFloat = 0.1
    """Weight of the term beside the loss, which `training.schedules` may change; 0 only measures the term, and trains
    no map. The terms' gradients are many times the loss's where the models are far apart."""
    layers: Layers = "last"
    """Pairs [student layer, teacher layer], or `uniform`, or `last`."""

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """(student layer, teacher layer) of models with so many layers. Raises: ConfigError for a layer that is not there."""
        if self.layers == "last":
            return [(student_layers, teacher_layers)]
        if self.layers == "uniform":
            # Rounded to the nearest teacher layer, halves upwards.
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
    """Hidden states of the student, through a learned linear map, against the teacher's."""

    setting: ClassVar[str] = "training.features.hidden"

    layers: Layers = "uniform"
    """Pairs [student layer, teacher layer]: 0 is what the embeddings give, the last is after the final norm. `uniform` pairs
    every student layer with the teacher layer at the same share of the depth, `last` the last ones alone."""
    distance: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 - cos, blind to the size of the states (PKD). `mse`: mean square difference over channels (FitNets,
    TinyBERT); where a few channels of the teacher are huge, they are what it sees."""
    projection_learning_rate: PositiveFloat = 1e-3
    """Peak AdamW learning rate of the maps, which start at random unless the widths are equal; it follows the schedule."""


class AttentionTerm(FeatureTerm):
    """Attention maps of the student against the teacher's, at the positions that predict response tokens."""

    setting: ClassVar[str] = "training.features.attention"
    first_layer: ClassVar[int] = 1

    layers: Layers = "last"
    """As for hidden states; layers count from 1."""
    distance: Literal["kl", "mse"] = "kl"
    """`kl`: KL(teacher || student) over keys, nats (MiniLM). `mse`: sum of square differences over keys (TinyBERT, on
    probabilities). Heads are compared one by one where both models have as many, else as their mean."""


class RelationTerm(FeatureTerm):
    """How the states of one response's tokens lie to each other; needs no map between the models' widths."""

    setting: ClassVar[str] = "training.features.relation"

    layers: Layers = "last"
    """As for hidden states."""
    distance: Literal["similarities", "distances"] = "similarities"
    """`similarities`: square difference of cosine similarities. `distances`: Huber loss on distances over their mean (RKD)."""


class FeatureSettings(Settings):
    """What the student learns from inside the teacher, beside the loss; every student rank holds a copy of the teacher."""

    hidden: HiddenTerm | None = None
    """Compare hidden states; None leaves it out."""
    attention: AttentionTerm | None = None
    """Compare attention maps; both models then run without fused attention. None leaves it out."""
    relation: RelationTerm | None = None
    """Compare relations among tokens; None leaves it out."""

    @model_validator(mode="after")
    def _some_term(self) -> FeatureSettings:
        if not self.terms:
            raise ValueError("training.features names no term; give hidden, attention or relation, or remove it")
        return self

    @property
    def terms(self) -> list[HiddenTerm | AttentionTerm | RelationTerm]:
        """Those that are asked for."""
        return [term for term in (self.hidden, self.attention, self.relation) if term is not None]
