"""Sampling of the responses, and division of labour between several teachers."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdray.config.base import (
    FormerDefault,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    OnResume,
    Positive,
    PositiveFloat,
    Settings,
)
from kdray.config.environments import EnvironmentSource
from kdray.config.filters import FilterSettings
from kdray.config.programs import ProgramSettings
from kdray.config.teachers import EngineSettings


class RouteRule(Settings):
    pattern: str
    """Regular expression, searched in the prompt's text as it was tokenized."""
    teacher: str
    """Name of the teacher for matching prompts."""

    @model_validator(mode="after")
    def _compiles(self) -> RouteRule:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r}: not a regular expression: {error}") from error
        return self


class RouteSettings(Settings):
    """Route every prompt to one teacher. Give one of `map`, `rules`, `weights`."""

    one_target: ClassVar[bool] = False
    """Several teachers produce a joint target, instead of one each."""
    support_of_sampler: ClassVar[bool] = False
    """The joint target covers only the ids of the teacher that sampled."""

    type: Literal["route"]
    map: dict[str, str] | None = None
    """Teacher by the prompt's domain: the task's name, or the value of `data.prompts.domain_column`."""
    rules: list[RouteRule] | None = None
    """Rules in order; the first whose pattern matches decides."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Sampling weights of the teachers; a teacher is drawn anew for each sample."""
    default: str | None = None
    """Teacher of prompts that `map` or `rules` do not cover; None rejects such prompts."""
    missing: Literal["wait", "stop"] = "wait"
    """Action while a teacher has no replica: `wait` for one with its prompts, or `stop` the run with the reason."""
    missing_after_s: Annotated[PositiveFloat | None, FormerDefault(120.0), OnResume()] = None
    """Seconds without a replica after which a teacher counts as missing. None: 120, or twice as long as its replicas took to
    start, if that is longer."""

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
        """A teacher is drawn anew for each sample, whatever its prompt."""
        return bool(self.weights)

    def names(self) -> set[str]:
        """Names of the teachers that the settings mention."""
        mapped = [*(self.map or {}).values(), *(rule.teacher for rule in self.rules or []), *(self.weights or {})]
        return {*mapped, *([] if self.default is None else [self.default])}


class EnsembleSettings(Settings):
    """Combine several teachers into one target for every prompt; one of them samples with the student."""

    one_target: ClassVar[bool] = True
    drawn_per_sample: ClassVar[bool] = False

    type: Literal["ensemble"]
    teachers: list[str] | None = None
    """Teachers to combine, in order; None takes all."""
    mean: Literal["arithmetic", "geometric"] | None = None
    """Combination rule: the `arithmetic` mean of the probabilities is the target of a forward KL to each teacher, the
    `geometric` mean that of a reverse KL. None takes the one that suits `loss.type`."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Weights of the teachers; None makes them equal."""
    domain_weights: dict[str, dict[str, NonNegativeFloat]] | None = None
    """Weights by the prompt's domain; other domains use `weights`."""
    confidence_temperature: PositiveFloat | None = None
    """If set, weights are computed per token: a softmax of the teachers' negative entropies, nats, divided by this. Confidence
    is not correctness: this trusts a teacher that is confidently wrong."""
    sampler: Literal["rotate", "first", "weights"] = "rotate"
    """Choice of the sampling teacher: `rotate` through all, always the `first`, or drawn by `weights`."""
    support: Literal["union", "sampler"] = "union"
    """Token ids over which the teachers are averaged. `union`: the top ids of all teachers and the student, and the sampled id,
    which takes a second prefill at every teacher. `sampler`: those of the teacher that sampled, with one prefill at the
    others."""
    missing: Literal["wait", "renormalise", "stop"] = "wait"
    """Action while a teacher has no replica: `wait` for one, `renormalise` the weights of the others, or `stop` the run with
    the reason."""
    missing_after_s: Annotated[PositiveFloat | None, FormerDefault(120.0), OnResume()] = None
    """Seconds without a replica after which a teacher counts as missing. None: 120, or twice as long as its replicas took to
    start, if that is longer."""

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
        """The joint target covers only the ids of the teacher that sampled."""
        return self.support == "sampler"

    def names(self) -> set[str]:
        """Names of the teachers that the settings mention."""
        shares = [self.weights or {}, *(self.domain_weights or {}).values()]
        return {*(self.teachers or []), *(name for mapping in shares for name in mapping)}


TeachersSettings = Annotated[RouteSettings | EnsembleSettings, Field(discriminator="type")]


class RolloutSettings(Settings):
    alpha: Fraction = 0.2
    """Teacher's weight in the mixture that every token is sampled from (MiniLLM's alpha): 0 samples from the student alone, 1
    from the teacher."""
    teacher_share: Fraction = 0.0
    """Share of the responses that the teacher writes completely, at alpha 1; the others use `alpha`. With alpha 0, the
    remaining share is that of student samples in on-policy distillation (GKD's lambda)."""
    data_share: Fraction = 0.0
    """Share of the responses that are the data's reference answers, which the teacher then scores: 1 is distillation on a fixed
    dataset; 0.3, with the teacher writing the rest, is the usual mix with real data. Applied before `teacher_share`."""
    filters: Annotated[FilterSettings | None, OnResume()] = None
    """Filters that drop responses from training; None trains on all."""
    max_new_tokens: Positive = 128
    """Maximum response length, tokens; those of an environment do not count."""
    samples_per_prompt: Positive = 1
    """Rollouts sampled per prompt."""
    max_staleness: NonNegative = 1
    """Maximum number of optimizer steps between the weights that sampled a token and the weights trained on it. A guarantee: 0
    is strictly on-policy; 1 lets sampling overlap training."""
    update_kv: Literal["recompute", "keep"] = "recompute"
    """Keys and values of responses in flight after an update of the student. `recompute`: dropped, so that every token is drawn
    from one version's distribution; prompts and responses in flight are computed again, by the teacher too. `keep`: the new
    weights attend to what older ones wrote. log m and log q are recorded as sampled, so that importance weights stay exact;
    staleness counts from the version under which the response began, and prompts share cached prefixes within a version."""
    sampler: Literal["mixture", "student"] = "mixture"
    """`mixture`: teacher replicas sample and score in one pass. `student`: student-only replicas sample (alpha 0) and teacher
    replicas score by prefill; for a teacher that is too slow to decode together with the student."""
    teacher_top_k: Positive = 32
    """Number of top teacher logprobs kept per token; with the vocabulary's size, every loss is exact."""
    teacher_signal: Literal["support", "hidden"] = "support"
    """Data that a teacher returns per token besides log p. `support`: logprobs at the top ids of teacher and student, and the
    tail mass; 8 bytes per id. `hidden`: also its last hidden state, from which the student's ranks compute exact full rows with
    the teacher's output head; 2 bytes per channel, and a copy of the head on every rank. For the divergences."""
    student_top_k: NonNegative = 16
    """Number of the student's own top ids at which the teacher's logprob is also kept: reverse KL needs them."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The mixture and its weights are exact only at 1."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus probability. The mixture and its weights are exact only at 1."""
    teachers: TeachersSettings | None = None
    """Cooperation of several teachers: divide the prompts (`type: route`), or produce one target (`type: ensemble`)."""
    program: ProgramSettings | None = None
    """A chain of calls to the teacher that produces each response, of which only the final answer is kept: System-2
    distillation; the keys depend on `type`: direct, rephrase_respond, system2_attention, branch_solve_merge, chain_of_thought,
    rationale. Needs rollout.alpha=1 and loss.type=sequence."""
    environment: EnvironmentSource = None
    """Answers to the model in the middle of a response, which goes on after them: a tool, or the other player of a game. What
    it writes is context, which no loss trains on; the keys depend on `type`: calculator, subtraction_game, or an environment of
    another distribution."""
    pool: EngineSettings = EngineSettings()
    """The student-only replicas of `sampler: student`."""
    retries: Annotated[NonNegative, OnResume()] = 5
    """Maximum number of times a request is resent after its replica died or failed, without any rollout in between."""

    @property
    def max_response_tokens(self) -> int:
        """Maximum length of a response with what the environment writes in it, tokens."""
        return self.max_new_tokens + (0 if self.environment is None else self.environment.max_tokens)

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_sampler(cls, tree: Any) -> Any:
        # The default of alpha depends on the sampler; setting it here preserves it in a dump.
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
