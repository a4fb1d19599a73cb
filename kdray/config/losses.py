"""Objectives: a settings class for each, with the facts that the rest of the program needs about it.

A loss from another distribution is a subclass of `LossSettings`, registered under its `type` in the entry-point group
`kdray.losses`; see docs/extending.md.
"""

from __future__ import annotations

import sys
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, PositiveFloat, Settings
from kdray.config.registry import SettingsRegistry
from kdray.config.signals import Signal

StalenessHandling = Literal["truncate", "mask"]

Reads = Literal["token", "buckets", "logits"]
"""What a loss reads of the student, from the least to the most: see `LossSettings.reads`."""

LOSSES: SettingsRegistry[LossSettings] = SettingsRegistry("kdray.losses", "loss", default="minillm")


class RecordedReturns(NamedTuple):
    """Policy-gradient returns computed from the recorded log p and log q, as in `kdray.losses.policy_gradient`."""

    gamma: float
    """Discount factor of later rewards."""
    length_norm: bool
    """Divide the return by the number of rewards that it sums."""
    own_reward: bool
    """Include the token's own reward in its return."""
    reward_scaling: float | None = None
    """Divisor of the rewards."""
    reward_clip: float | None = None
    """Largest absolute reward, after scaling."""


@LOSSES.root
class LossSettings(Settings):
    """An objective. The class variables and properties are facts: what the loss needs, reads and guarantees."""

    type: str
    """Name of the loss; a subclass narrows it to a `Literal` of its own."""
    reward_weight: NonNegativeFloat = 0.0
    """Weight of a reward beside distillation: the grader's value of a response (1 if right, 0 if wrong) minus the mean value of
    the prompt's other responses, as a policy gradient. Needs a grader and `rollout.samples_per_prompt` of at least 2."""
    distillation_weight: NonNegativeFloat = 1.0
    """Weight of the distillation loss beside a reward; 0 trains on the reward alone."""

    implementation: ClassVar[str]
    """Implementation as `module:name`: `f(student_logits, batch, settings) -> LossOutput`; for a divergence
    `f(rows, settings) -> [N]`, one value per position; for a loss that reads `buckets`, `f(rows, batch, settings) ->
    LossOutput`. See `kdray.losses`."""
    divergence: ClassVar[bool] = False
    """The loss is a function of both models' rows at each position and nothing else."""
    reads: ClassVar[Reads] = "logits"
    """What the implementation reads of the student; the first two are computed in chunks of tokens, so that the logits of all
    tokens never exist at once. `token`: the loss is a sum over tokens, each term from the logits and columns of that token
    alone, so that any split of the tokens gives the same sums (every divergence is). `buckets`: log q at the recorded token, at
    the support and of its tail, of all tokens together (`kdray.losses.support.Buckets`). `logits`: anything else."""
    importance_weight: ClassVar[Literal["q/m", "p/m"] | None] = None
    """Density ratio that weights each token, with m the density that the token was sampled from; None does not use m."""
    shared_ids: ClassVar[bool] = True
    """Teacher and student use the same token ids; otherwise the teacher has its own tokenizer."""
    ensemble_mean: ClassVar[Literal["arithmetic", "geometric"]] = "arithmetic"
    """Mean of several teachers' distributions as the target of the loss. `geometric` if the gradient is linear in log p: the
    target then has the gradient of the weighted sum over teachers, over whole responses with log Z in the rewards. `arithmetic`
    has it if the gradient is linear in p: `forward_kl`, `forward_kl_sampled`, `hinton` at temperature 1. For the other losses
    neither mean has it, and this one vetoes no id."""
    support_with_token: ClassVar[bool] = True
    """The support may hold the sampled token because it was sampled. False if the support must depend on the prefix alone."""
    zero_gradient_at_teacher: ClassVar[bool] = True
    """The gradient vanishes at every sample when the student equals the teacher. False if it vanishes only in the mean over
    samples, or the loss has a kink there."""

    @property
    def signals(self) -> frozenset[Signal]:
        """Signals that the loss reads from a teacher's answer besides its text."""
        return frozenset(("top_k",))

    @property
    def label_setting(self) -> str | None:
        """Setting that uses responses as labels, so that the student's own teach nothing; None if there is none."""
        return None

    @property
    def returns(self) -> RecordedReturns | None:
        """The returns that the loss computes from recorded log-probabilities; None if it uses none."""
        return None

    @property
    def staleness_bound(self) -> tuple[float, StalenessHandling]:
        """Cap of the staleness ratio q_theta / q_sampled in sampled terms, and the handling of a token above it."""
        return 2.0, "truncate"

    @property
    def response_window(self) -> int | None:
        """Number of tokens to either side whose ratios q_theta / m weight a sampled term, from 0 to the largest integer for the
        whole response; None weights each token by its own ratio, bounded by `staleness_bound`."""
        return None

    @property
    def reads_buckets(self) -> bool:
        """The loss is a function of `Buckets`: terms of the sampled tokens can be added to it."""
        return self.divergence or self.reads == "buckets"

    @property
    def in_chunks(self) -> bool:
        """The loss can be computed in chunks of tokens."""
        return self.divergence or self.reads != "logits"

    @property
    def whitens(self) -> bool:
        """The loss normalises `returns` by their mean and variance over the whole step, which it is given."""
        return False

    def soft_part(self) -> LossSettings | None:
        """Reduce the loss to the terms that vanish for a student equal to its teacher; None if there are none."""
        return self


@LOSSES.add("minillm")
class MiniLLMLoss(LossSettings):
    """Policy gradient of the sequence-level reverse KL, split in a single-step and a long term (MiniLLM, eq. 3-6)."""

    implementation = "kdray.losses.minillm:minillm"
    reads = "buckets"
    importance_weight = "q/m"
    ensemble_mean = "geometric"

    type: Literal["minillm"] = "minillm"
    length_norm: bool = True
    """Divide the return by the number of tokens it sums (eq. 6 divides by one less); without it long responses dominate."""
    gamma: Fraction = 1.0
    """Discount factor of the return per token; the paper uses 1."""
    single_step: bool = True
    """Compute a token's own reward as the exact per-position reverse KL (eq. 3); otherwise estimate it from the sampled token
    as part of the return (eq. 2), with higher variance."""
    mixing_weight: bool = True
    """Weight the long term of a token by q / m, which accounts for the teacher's share in drawing it (eq. 5, where it also
    multiplies the single-step term); without it the weight is 1. Nothing changes at alpha 0."""
    whitening: bool = False
    """Normalise the returns to mean 0 and variance 1 over the response tokens of the whole step, with q taken from the sampler.
    Stabilises the size of the long term relative to the single-step term, and thereby changes the objective."""
    staleness: StalenessHandling = "truncate"
    """Handling of a token whose staleness ratio q_theta / q_sampled exceeds the cap: clip the ratio to the cap (`truncate`), or
    leave the token out of the long term (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled. The mixing weight q / m is bounded by 1 / (1 - alpha) and is
    never clipped."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset(("top_k" if self.single_step else "sampled",))

    @property
    def staleness_bound(self) -> tuple[float, StalenessHandling]:
        return self.staleness_cap, self.staleness

    @property
    def returns(self) -> RecordedReturns:
        return RecordedReturns(self.gamma, self.length_norm, own_reward=not self.single_step)

    @property
    def whitens(self) -> bool:
        return self.whitening

    def soft_part(self) -> LossSettings:
        # Returns that are all zero would be divided by their own rounding error.
        return self.model_copy(update={"whitening": False})


@LOSSES.add("lmops")
class LMOpsLoss(LossSettings):
    """MiniLLM as its reference code computes it (microsoft/LMOps), with the values of its training scripts; for comparison."""

    implementation = "kdray.losses.lmops:lmops"
    reads = "buckets"
    importance_weight = "q/m"
    ensemble_mean = "geometric"

    type: Literal["lmops"]
    gamma: Fraction = 0.95
    """Discount factor of the return per token; the return starts at the token itself."""
    length_norm: bool = True
    """Divide the return by the number of remaining tokens, including the token itself."""
    single_step: bool = True
    """Add the exact per-position reverse KL term."""
    whitening: bool = True
    """Normalise the returns to mean 0 and variance 1 over the response tokens of the whole step."""
    reward_scaling: PositiveFloat = 0.5
    """Divisor of a token's log-ratio; whitening undoes most of its effect. The code's parser defaults to none, the scripts pass
    0.5."""
    reward_clip: PositiveFloat = 100.0
    """Largest absolute reward of a token, after scaling. The code's parser defaults to 1, the scripts pass 100."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.2
    """PPO clip range of q_theta / m: no gradient above 1 + clip at a positive advantage, or below 1 - clip at a negative one.
    Mixing alone reaches it, before any staleness. None turns it off."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset(("top_k" if self.single_step else "sampled",))

    @property
    def returns(self) -> RecordedReturns:
        return RecordedReturns(self.gamma, self.length_norm, True, self.reward_scaling, self.reward_clip)

    @property
    def whitens(self) -> bool:
        return self.whitening

    def soft_part(self) -> LossSettings:
        # As for minillm.
        return self.model_copy(update={"whitening": False})


@LOSSES.add("per_decision")
class PerDecisionLoss(LossSettings):
    """Reverse KL over whole responses with per-decision importance weights: unbiased under mixing and staleness."""

    implementation = "kdray.losses.per_decision:per_decision"
    reads = "buckets"
    importance_weight = "q/m"
    ensemble_mean = "geometric"

    type: Literal["per_decision"]
    horizon: NonNegative | None = None
    """Number of tokens that weights look back and returns look ahead. None is exact, with variance that grows exponentially
    with response length; 0 is the per-position reverse KL; a few tokens trade bias for variance."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset(("sampled",))

    @property
    def response_window(self) -> int:
        return sys.maxsize if self.horizon is None else self.horizon


@LOSSES.add("vopd")
class VOPDLoss(LossSettings):
    """Reverse KL at the sampled token with the state's KL as baseline (vOPD, Oh et al. 2026)."""

    implementation = "kdray.losses.vopd:vopd"
    reads = "buckets"
    importance_weight = "q/m"
    ensemble_mean = "geometric"
    # A baseline that depends on the token that it is a baseline for changes the expected gradient.
    support_with_token = False

    type: Literal["vopd"]
    gamma: Fraction = 0.0
    """Discount factor of later rewards: 0 is on-policy distillation's immediate reward, 1 the return of the whole response."""
    staleness: StalenessHandling = "truncate"
    """As for minillm: clip the ratio to the cap (`truncate`), or leave the token out (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled."""

    @property
    def staleness_bound(self) -> tuple[float, StalenessHandling]:
        return self.staleness_cap, self.staleness


@LOSSES.add("reverse_kl")
class ReverseKLLoss(LossSettings):
    """KL(student || teacher) at every position of the student's samples (GKD with beta 1)."""

    implementation = "kdray.losses.reverse_kl:reverse_kl"
    divergence = True
    ensemble_mean = "geometric"

    type: Literal["reverse_kl"]


@LOSSES.add("forward_kl")
class ForwardKLLoss(LossSettings):
    """KL(teacher || student) at every position of the samples."""

    implementation = "kdray.losses.forward_kl:forward_kl"
    divergence = True

    type: Literal["forward_kl"]


@LOSSES.add("jsd")
class JSDLoss(LossSettings):
    """Generalised Jensen-Shannon divergence on student samples (GKD, Agarwal et al. 2024)."""

    implementation = "kdray.losses.jsd:jsd"
    divergence = True

    type: Literal["jsd"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Teacher's share of the inner mixture: towards 0 it behaves like forward KL, towards 1 like reverse KL."""


@LOSSES.add("skew_forward_kl")
class SkewForwardKLLoss(LossSettings):
    """KL(teacher || skew teacher + (1 - skew) student) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    implementation = "kdray.losses.skew_kl:skew_forward_kl"
    divergence = True

    type: Literal["skew_forward_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Teacher's share of the inner mixture: bounds the loss by -log(skew); towards 0 it is forward KL."""


@LOSSES.add("skew_reverse_kl")
class SkewReverseKLLoss(LossSettings):
    """KL(student || skew student + (1 - skew) teacher) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    implementation = "kdray.losses.skew_kl:skew_reverse_kl"
    divergence = True

    type: Literal["skew_reverse_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Student's share of the inner mixture: bounds the loss by -log(skew); towards 0 it is reverse KL."""


@LOSSES.add("tvd")
class TVDLoss(LossSettings):
    """Total variation distance at every position of the samples (f-DISTILL, Wen et al. 2023)."""

    implementation = "kdray.losses.tvd:tvd"
    divergence = True
    zero_gradient_at_teacher = False

    type: Literal["tvd"]


@LOSSES.add("adaptive_kl")
class AdaptiveKLLoss(LossSettings):
    """Forward and reverse KL, weighted by the gaps in the teacher's head and tail (AKL, Wu et al. 2024)."""

    implementation = "kdray.losses.adaptive_kl:adaptive_kl"
    divergence = True

    type: Literal["adaptive_kl"]
    head_mass: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Probability mass that the teacher's most likely ids, the head, may sum to; the paper's mu."""


@LOSSES.add("mse_logit")
class MSELogitLoss(LossSettings):
    """Half the mean squared difference of centred logits at every position of the samples (Ba & Caruana 2014)."""

    implementation = "kdray.losses.mse_logit:mse_logit"
    divergence = True
    ensemble_mean = "geometric"

    type: Literal["mse_logit"]


@LOSSES.add("hinton")
class HintonLoss(LossSettings):
    """Softened forward KL plus cross entropy of the recorded tokens (Hinton et al. 2015). For responses written by the teacher:
    the student's own tokens are not labels."""

    implementation = "kdray.losses.hinton:hinton"
    divergence = True

    type: Literal["hinton"]
    temperature: PositiveFloat = 2.0
    """Divisor of both models' logits in the soft term, whose gradient is rescaled by its square."""
    soft_share: Fraction = 0.5
    """Weight of the soft term; the hard term gets the rest."""

    @property
    def label_setting(self) -> str | None:
        return f"loss.soft_share={self.soft_share:g}" if self.soft_share < 1.0 else None

    def soft_part(self) -> LossSettings:
        # The hard term is a cross entropy, which no student makes zero.
        return self.model_copy(update={"soft_share": 1.0})


@LOSSES.add("forward_kl_sampled")
class ForwardKLSampledLoss(LossSettings):
    """Forward KL at the sampled token, weighted by p / m: sequence-level distillation at `rollout.alpha: 1` (Kim & Rush 2016).
    With one teacher the weight is at most 1 / alpha; at alpha 0, and for an ensemble, of which one teacher samples, it is
    unbounded."""

    implementation = "kdray.losses.forward_kl_sampled:forward_kl_sampled"
    reads = "token"
    importance_weight = "p/m"
    zero_gradient_at_teacher = False

    type: Literal["forward_kl_sampled"]

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset(("sampled",))


@LOSSES.add("sequence")
class SequenceLoss(LossSettings):
    """Cross entropy of the responses: sequence-level distillation if a teacher wrote them (Kim & Rush 2016). Needs only their
    text, so a black-box teacher suffices; on the student's own samples it teaches nothing."""

    implementation = "kdray.losses.sft:sft"
    reads = "token"

    type: Literal["sequence"]

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset()

    @property
    def label_setting(self) -> str | None:
        return "loss.type=sequence"

    def soft_part(self) -> None:
        # It is a cross entropy of the text, with no other term.
        return None


@LOSSES.add("uld")
class ULDLoss(LossSettings):
    """Universal Logit Distillation from a teacher with another tokenizer, over texts aligned as in GOLD."""

    implementation = "kdray.losses.uld:uld"
    reads = "token"
    shared_ids = False

    type: Literal["uld"]
    sorted_weight: NonNegativeFloat = 0.1
    """Weight of the distance between both distributions sorted by probability (Boizard et al. 2024). A large one has local
    minima, in which a matched id takes another's rank."""
    matched_weight: NonNegativeFloat = 1.0
    """Weight of the forward KL over the student's ids that begin the teacher's tokens; everything else forms one bucket."""

    @model_validator(mode="after")
    def _some_weight(self) -> ULDLoss:
        if not self.sorted_weight + self.matched_weight > 0.0:
            raise ValueError("loss.sorted_weight and loss.matched_weight are both 0: there is nothing to learn; raise one")
        return self

    def soft_part(self) -> None:
        # The teacher's rows are over another vocabulary.
        return None


LossSource = Annotated[SerializeAsAny[LossSettings], LOSSES.member()]
"""A loss of any kind; its other keys depend on `type`."""
