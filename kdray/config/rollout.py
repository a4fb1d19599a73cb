"""Who writes the responses, and how several teachers share the work."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Settings
from kdray.config.filters import FilterSettings
from kdray.config.programs import ProgramSettings
from kdray.config.teachers import EngineSettings


class RouteRule(Settings):
    pattern: str
    """Regular expression, found anywhere in the prompt's text as it was tokenized."""
    teacher: str
    """Name of the teacher that prompts with it go to."""

    @model_validator(mode="after")
    def _compiles(self) -> RouteRule:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r}: not a regular expression: {error}") from error
        return self


class RouteSettings(Settings):
    """Every prompt goes to one teacher. Give one of `map`, `rules`, `weights`."""

    one_target: ClassVar[bool] = False
    """Several teachers make one target together, instead of each its own."""
    support_of_sampler: ClassVar[bool] = False
    """The one target stands at the ids of the teacher that sampled alone."""

    type: Literal["route"]
    map: dict[str, str] | None = None
    """Teacher by the prompt's domain: the task's name, or what `data.prompts.domain_column` holds."""
    rules: list[RouteRule] | None = None
    """The first rule whose pattern is found decides."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Each sample goes to a teacher drawn in proportion to these."""
    default: str | None = None
    """Teacher of prompts that `map` or `rules` do not name; None refuses them."""
    missing: Literal["wait", "stop"] = "wait"
    """What happens to the prompts of a teacher without any replica: `wait` for one, or `stop` the run with the reason."""
    missing_after_s: PositiveFloat = 120.0
    """Time without a replica after which a teacher counts as missing."""

    @model_validator(mode="after")
    def _one_way(self) -> RouteSettings:
        given = [name for name in ("map", "rules", "weights") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"rollout.teachers: type=route takes one of map, rules, weights, and {len(given)} are given")
        if self.weights is not None and self.default is not None:
            raise ValueError("rollout.teachers.default: weights send every prompt somewhere; remove it")
        return self

    @property
    def drawn_per_sample(self) -> bool:
        """Each sample goes to a teacher drawn anew, whatever its prompt."""
        return bool(self.weights)

    def names(self) -> set[str]:
        """Teachers that it mentions."""
        mapped = [*(self.map or {}).values(), *(rule.teacher for rule in self.rules or []), *(self.weights or {})]
        return {*mapped, *([] if self.default is None else [self.default])}


class EnsembleSettings(Settings):
    """Several teachers make the target of every prompt together; one of them samples with the student."""

    one_target: ClassVar[bool] = True
    drawn_per_sample: ClassVar[bool] = False

    type: Literal["ensemble"]
    teachers: list[str] | None = None
    """The chosen ones, in order; None takes all."""
    mean: Literal["arithmetic", "geometric"] | None = None
    """What the target is: the `arithmetic` mean of the probabilities is what a forward KL to each teacher asks for, the
    `geometric` mean what a reverse KL does. None takes the one of `loss.type`."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Shares of the teachers; None is equal ones."""
    domain_weights: dict[str, dict[str, NonNegativeFloat]] | None = None
    """Shares by the prompt's domain; prompts of another domain have `weights`."""
    confidence_temperature: PositiveFloat | None = None
    """Given, every token has weights of its own: a softmax of the teachers' negative entropies, nats, over this. Sure is not
    right: it trusts a teacher that is wrong with confidence."""
    sampler: Literal["rotate", "first", "weights"] = "rotate"
    """Who samples: the teachers in turn, always the first, or one drawn by its weight."""
    support: Literal["union", "sampler"] = "union"
    """Ids at which the teachers are averaged. `union`: all teachers' and the student's top ids and the drawn one, which takes a
    second prefill at every teacher. `sampler`: those of the teacher that sampled, one prefill at the others."""
    missing: Literal["wait", "renormalise", "stop"] = "wait"
    """What happens while a teacher has no replica: `wait` for one, `renormalise` the weights of the others, or `stop` the run
    with the reason."""
    missing_after_s: PositiveFloat = 120.0
    """Time without a replica after which a teacher counts as missing."""

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> EnsembleSettings:
        if self.confidence_temperature is not None and (self.weights or self.domain_weights):
            raise ValueError(
                "rollout.teachers.confidence_temperature: it makes every token's weights; remove weights and domain_weights"
            )
        if self.teachers is not None and (not self.teachers or len(set(self.teachers)) != len(self.teachers)):
            raise ValueError(f"rollout.teachers.teachers={self.teachers}: name at least one teacher, and each once")
        return self

    @property
    def support_of_sampler(self) -> bool:
        """The target stands at the ids of the teacher that sampled alone."""
        return self.support == "sampler"

    def names(self) -> set[str]:
        """Teachers that it mentions."""
        shares = [self.weights or {}, *(self.domain_weights or {}).values()]
        return {*(self.teachers or []), *(name for mapping in shares for name in mapping)}


TeachersSettings = Annotated[RouteSettings | EnsembleSettings, Field(discriminator="type")]


class RolloutSettings(Settings):
    alpha: Fraction = 0.2
    """Teacher's share of every next-token draw (MiniLLM's alpha): 0 samples from the student alone, 1 from the teacher."""
    teacher_share: Fraction = 0.0
    """Share of the responses that the teacher writes whole, at alpha 1; the others follow `alpha`. With alpha 0 what is left is
    on-policy distillation's share of student samples (GKD's lambda)."""
    data_share: Fraction = 0.0
    """Share of the responses that are the data's reference answers, which the teacher then scores: 1 is distillation on a fixed
    dataset, 0.3 beside a writing teacher the usual mix with real data. Taken before `teacher_share`."""
    filters: FilterSettings | None = None
    """Rules that leave responses out of training; None trains on all."""
    max_new_tokens: Positive = 128
    """Longest response, in tokens."""
    samples_per_prompt: Positive = 1
    """Rollouts drawn for each prompt."""
    max_staleness: NonNegative = 1
    """Most optimizer steps between the weights that sampled a token and the weights being trained on it. A guarantee:
    0 is strictly on-policy; 1 lets sampling overlap training."""
    sampler: Literal["mixture", "student"] = "mixture"
    """`mixture`: teacher replicas sample and score in one pass. `student`: student-only replicas sample (alpha 0), teacher
    replicas score by prefill; for a teacher that is too slow to decode beside the student."""
    teacher_top_k: Positive = 32
    """Teacher logprobs kept for every token; the vocabulary's size makes every loss exact."""
    teacher_signal: Literal["support", "hidden"] = "support"
    """What a teacher returns for every token beside log p. `support`: logprobs at its top ids and the student's, and the mass
    outside; 6 bytes an id. `hidden`: its last hidden state too, from which the student's ranks make exact full rows with the
    teacher's output head; 2 bytes a channel, and a copy of the head on every rank. For the divergences."""
    student_top_k: NonNegative = 16
    """The student's own top ids at which the teacher's logprob is kept too: reverse KL needs them."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The mixture and its weights are exact at 1 only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus. The mixture and its weights are exact at 1 only."""
    teachers: TeachersSettings | None = None
    """With several teachers: how they share the prompts (`type: route`), or make one target (`type: ensemble`)."""
    program: ProgramSettings | None = None
    """A chain of calls to the teacher that makes each response, of which the final answer alone is kept: System-2 distillation;
    the keys depend on `type`: direct, rephrase_respond, system2_attention, branch_solve_merge, chain_of_thought, rationale.
    Needs rollout.alpha=1 and loss.type=sequence."""
    pool: EngineSettings = EngineSettings()
    """The student-only replicas of `sampler: student`."""
    retries: NonNegative = 5
    """Times a request is sent again after its replica died or failed."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_sampler(cls, tree: Any) -> Any:
        # The default of alpha depends on who samples; written down here, it survives a dump.
        if isinstance(tree, dict) and tree.get("sampler") == "student":
            return {"alpha": 0.0} | tree
        return tree

    @model_validator(mode="after")
    def _exact(self) -> RolloutSettings:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value != 1.0:
                raise ValueError(
                    f"rollout.{name}={value:g}: the mixture and its importance weights are exact at {name}=1 only; "
                    f"remove rollout.{name}"
                )
        if self.sampler == "student" and self.alpha != 0.0:
            raise ValueError(
                f"rollout.alpha={self.alpha:g} with rollout.sampler=student: student-only replicas sample at alpha 0; "
                "set rollout.alpha=0 or rollout.sampler=mixture"
            )
        return self
