"""Objectives: one class each, a union on `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, PositiveFloat, Settings

StalenessHandling = Literal["truncate", "mask"]


class MiniLLMLoss(Settings):
    """Policy gradient of the sequence-level reverse KL, split in a single-step and a long term (MiniLLM, eq. 3-6)."""

    type: Literal["minillm"] = "minillm"
    length_norm: bool = True
    """Divide the return by the number of tokens it sums (eq. 6); without it long responses dominate."""
    gamma: Fraction = 1.0
    """Discount of the return per token; 1 is the paper's."""
    single_step: bool = True
    """Whether a token's own reward enters as the exact per-position reverse KL (eq. 3), or read at the one draw as part of
    the return (eq. 2), with a higher variance."""
    whitening: bool = False
    """Shift and scale the returns to mean 0 and variance 1 over the response tokens of the whole step; their q is then the
    sampler's. Steadies the size of the long term against the single-step term, and changes the objective by that."""
    staleness: StalenessHandling = "truncate"
    """What happens to a token whose staleness ratio q_theta / q_sampled is above the cap: its ratio becomes the cap
    (`truncate`), or the long term leaves the token out (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled. The mixing weight q / m is bounded by 1 / (1 - alpha) and is
    never clipped."""


class LMOpsLoss(Settings):
    """MiniLLM as its reference code computes it (microsoft/LMOps), with the defaults of that code; for comparison."""

    type: Literal["lmops"]
    gamma: Fraction = 0.95
    """Discount of the return per token; the return starts at the token itself."""
    length_norm: bool = True
    """Divide the return by the number of tokens left, the token itself included."""
    single_step: bool = True
    """Whether the exact per-position reverse KL term is added."""
    whitening: bool = True
    """Shift and scale the returns to mean 0 and variance 1 over the response tokens of the whole step."""
    reward_scaling: PositiveFloat = 0.5
    """The log-ratio of a token is divided by this; whitening takes most of it back."""
    reward_clip: PositiveFloat = 100.0
    """Largest absolute reward of a token, after scaling."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.2
    """PPO clip of q_theta / m: no gradient above 1 + clip at a positive advantage, nor below 1 - clip at a negative one. Mixing
    alone reaches it, before any staleness. None turns it off."""


class PerDecisionLoss(Settings):
    """Reverse KL over whole responses with per-decision importance weights: no bias from mixing or staleness."""

    type: Literal["per_decision"]
    horizon: NonNegative | None = None
    """Tokens that weights reach back and returns look ahead. None is exact, with a variance that grows exponentially in the
    response length; 0 is the per-position reverse KL; a few tokens trade one for the other."""


class VOPDLoss(Settings):
    """Reverse KL at the sampled token with the state's KL as baseline (vOPD, Oh et al. 2026)."""

    type: Literal["vopd"]
    gamma: Fraction = 0.0
    """Discount of later rewards: 0 is on-policy distillation's immediate reward, 1 the return of the whole response."""
    staleness: StalenessHandling = "truncate"
    """As for minillm: above the cap the ratio becomes the cap (`truncate`), or the token is left out (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled."""


class ReverseKLLoss(Settings):
    """KL(student || teacher) at every position of the student's samples (GKD with beta 1)."""

    type: Literal["reverse_kl"]


class ForwardKLLoss(Settings):
    """KL(teacher || student) at every position of the samples."""

    type: Literal["forward_kl"]


class JSDLoss(Settings):
    """Generalised Jensen-Shannon divergence on student samples (GKD, Agarwal et al. 2024)."""

    type: Literal["jsd"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Teacher's share of the mixture inside: towards 0 it behaves like forward KL, towards 1 like reverse KL."""


class SkewForwardKLLoss(Settings):
    """KL(teacher || skew teacher + (1 - skew) student) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    type: Literal["skew_forward_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Teacher's share of the mixture inside: bounds the loss by -log(skew); towards 0 it is forward KL."""


class SkewReverseKLLoss(Settings):
    """KL(student || skew student + (1 - skew) teacher) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    type: Literal["skew_reverse_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Student's share of the mixture inside: bounds the loss by -log(skew); towards 0 it is reverse KL."""


class TVDLoss(Settings):
    """Total variation distance at every position of the samples (f-DISTILL, Wen et al. 2023)."""

    type: Literal["tvd"]


class AdaptiveKLLoss(Settings):
    """Forward and reverse KL, weighted by the gaps in the teacher's head and tail (AKL, Wu et al. 2024)."""

    type: Literal["adaptive_kl"]
    head_mass: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Teacher's mass that its most likely ids, the head, may sum to; the paper's mu."""


class MSELogitLoss(Settings):
    """Half the mean square difference of centred logits at every position of the samples (Ba & Caruana 2014)."""

    type: Literal["mse_logit"]


class HintonLoss(Settings):
    """Softened forward KL and cross entropy of the recorded tokens (Hinton et al. 2015). For samples that the teacher wrote:
    the student's own tokens are no labels."""

    type: Literal["hinton"]
    temperature: PositiveFloat = 2.0
    """Divides both models' logits in the soft term, whose gradient is multiplied back by its square."""
    soft_share: Fraction = 0.5
    """Weight of the soft term; the hard term has the rest."""


class ForwardKLSampledLoss(Settings):
    """Forward KL at the sampled token, weighted by p / m: sequence-level distillation at `rollout.alpha: 1` (Kim & Rush 2016).
    The weight is at most 1 / alpha; at alpha 0 it has no bound."""

    type: Literal["forward_kl_sampled"]


class SequenceLoss(Settings):
    """Cross entropy of the responses as they are: sequence-level distillation where a teacher wrote them (Kim & Rush 2016).
    Needs their text alone, so a black-box teacher will do; on the student's own samples it teaches nothing."""

    type: Literal["sequence"]


class ULDLoss(Settings):
    """Universal Logit Distillation over texts aligned as in GOLD, from a teacher with another tokenizer."""

    type: Literal["uld"]
    sorted_weight: NonNegativeFloat = 0.1
    """Weight of the distance between both laws sorted by probability (Boizard et al. 2024). A large one has local minima, where
    a matched id takes the rank of another."""
    matched_weight: NonNegativeFloat = 1.0
    """Weight of the forward KL over the student's ids that begin the teacher's tokens, everything else being one bucket."""

    @model_validator(mode="after")
    def _some_weight(self) -> ULDLoss:
        if not self.sorted_weight + self.matched_weight > 0.0:
            raise ValueError("loss.sorted_weight and loss.matched_weight are both 0: there is nothing to learn; raise one")
        return self


LossSettings = Annotated[
    MiniLLMLoss
    | LMOpsLoss
    | PerDecisionLoss
    | VOPDLoss
    | ReverseKLLoss
    | ForwardKLLoss
    | JSDLoss
    | SkewForwardKLLoss
    | SkewReverseKLLoss
    | TVDLoss
    | AdaptiveKLLoss
    | MSELogitLoss
    | HintonLoss
    | ForwardKLSampledLoss
    | SequenceLoss
    | ULDLoss,
    Field(discriminator="type"),
]


DIVERGENCE_LOSSES = (
    ReverseKLLoss,
    ForwardKLLoss,
    JSDLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
    AdaptiveKLLoss,
    MSELogitLoss,
    HintonLoss,
)
"""Losses that compare both models' rows at every position and nothing else."""


def type_of(loss: type[Settings]) -> str:
    return str(loss.model_fields["type"].annotation.__args__[0])  # type: ignore[union-attr]
