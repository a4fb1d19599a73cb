"""Rules across sections of a config, expressed in facts about the kinds that it names, never in their types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kdray.config.explain import explain
from kdray.config.losses import LOSSES
from kdray.config.registry import name_of

if TYPE_CHECKING:
    from kdray.config.run_config import Config

SCHEDULED_SHARES = ("alpha", "teacher_share", "data_share")
"""Settings of `rollout` that `training.schedules` may change."""


def first_broken(config: Config) -> str | None:
    """Message of the first rule that the config violates; None if it satisfies all. Later rules rely on earlier ones."""
    return next((message for rule in RULES for message in rule(config)), None)


# ----------------------------------------------------------------------------------------------- several teachers


def _teachers_are_shared_out(config: Config) -> Iterator[str]:
    names, sharing = ", ".join(config.teachers), config.rollout.teachers
    share = _text_share(config)
    if share and not config.served_teachers:
        yield (
            f"training.pretraining.teacher_share={share:g}: the text is scored by a teacher of type vllm, and "
            "there is none; set it to 0"
        )
    if sharing is None:
        if len(config.teachers) > 1:
            yield f"teachers names {names}: say who teaches what: set rollout.teachers.type to route or ensemble"
        return
    unknown = sorted(sharing.names() - set(config.teachers))
    if unknown:
        yield f"rollout.teachers names {', '.join(unknown)}, but the teachers are {names}"
    if sharing.support_of_sampler and config.rollout.sampler == "student":
        yield (
            "rollout.teachers.support=sampler with rollout.sampler=student: no teacher samples, so none has a support to "
            "share; use rollout.teachers.support=union"
        )
    if config.rollout.teacher_signal == "hidden" and len(config.teachers) > 1:
        yield (
            f"rollout.teacher_signal=hidden with teachers {names}: the ranks hold one output head; use "
            "rollout.teacher_signal=support"
        )
    if share and len(config.teachers) > 1:
        yield (
            f"training.pretraining.teacher_share={share:g} with teachers {names}: nothing says which of them "
            "scores the text; set it to 0"
        )


def _text_share(config: Config) -> float:
    """Weight of the teacher's term on pretraining text."""
    text = config.training.pretraining
    return 0.0 if text is None else text.teacher_share


# ------------------------------------------------------------------------------------- sampling, and the loss that it needs


def _loss_learns_from_its_writers(config: Config) -> Iterator[str]:
    rollout, loss = config.rollout, config.loss
    drawn = (1.0 - rollout.data_share) * (1.0 - rollout.teacher_share)
    if rollout.sampler == "student" and rollout.teacher_share:
        yield (
            f"rollout.teacher_share={rollout.teacher_share:g} with rollout.sampler=student: student-only replicas cannot "
            "write for the teacher; set rollout.sampler=mixture with rollout.alpha=0"
        )
    if loss.label_setting is not None and rollout.alpha < 1.0 and drawn > 0.0:
        yield (
            f"rollout.alpha={rollout.alpha:g} with {loss.label_setting}: what the student drew is no label, and cross entropy "
            "of it teaches nothing; set rollout.alpha=1, so that the teacher writes, or rollout.data_share=1"
            + (", or loss.soft_share=1" if loss.label_setting.startswith("loss.soft_share") else "")
        )
    if loss.importance_weight is not None and rollout.data_share:
        yield (
            f"rollout.data_share={rollout.data_share:g} with loss.type={loss.type}: its weights divide by the density that "
            "each token was drawn from, and nobody knows the data's; use a divergence, or loss.type=sequence"
        )
    if loss.importance_weight == "q/m" and rollout.teacher_share:
        yield (
            f"rollout.teacher_share={rollout.teacher_share:g} with loss.type={loss.type}: the weight q / m is unbounded "
            "where the teacher writes alone; use a divergence, or rollout.alpha for mixing token by token"
        )
    rules = [] if rollout.filters is None else rollout.filters.in_order()
    comparing = [rule.setting for rule in rules if rule.needs_siblings]
    if comparing and rollout.samples_per_prompt == 1:
        yield (
            f"{comparing[0]} with rollout.samples_per_prompt=1: there is nothing to agree with; raise "
            "rollout.samples_per_prompt"
        )


def _rewards_have_what_they_need(config: Config) -> Iterator[str]:
    rollout, loss = config.rollout, config.loss
    if not config.rewarded:
        if loss.distillation_weight != 1.0 or "loss.distillation_weight" in config.training.schedules:
            yield (
                f"loss.distillation_weight={loss.distillation_weight:g} without a reward: it weighs the loss against "
                "loss.reward_weight; set that, or remove it"
            )
        return
    if not loss.reads_buckets:
        able = sorted(name_of(kind) for kind in LOSSES.known() if kind.divergence or kind.reads == "buckets")
        yield (
            f"loss.reward_weight with loss.type={loss.type}: a reward joins the divergences and the policy-gradient losses "
            f"({', '.join(able)}); choose one of them, or set it to 0"
        )
    if rollout.samples_per_prompt == 1:
        yield (
            "loss.reward_weight with rollout.samples_per_prompt=1: a response is compared with the others to its prompt; raise "
            "rollout.samples_per_prompt"
        )
    undrawn = {"alpha": rollout.alpha == 1.0, "teacher_share": rollout.teacher_share > 0, "data_share": rollout.data_share > 0}
    for name in (name for name, there in undrawn.items() if there):
        yield (
            f"loss.reward_weight with rollout.{name}={getattr(rollout, name):g}: the reward's gradient weighs each token by "
            "q / m, which is unbounded or unknown where the student did not draw; set it "
            + ("below 1" if name == "alpha" else "to 0")
        )
    if rollout.teacher_signal == "hidden":
        yield (
            "loss.reward_weight with rollout.teacher_signal=hidden: exact rows are made for the divergences alone; use "
            "rollout.teacher_signal=support"
        )


def _importance_weights_are_bounded(config: Config) -> Iterator[str]:
    loss, alpha = config.loss, config.rollout.alpha
    if loss.importance_weight == "q/m" and alpha == 1.0:
        yield (
            f"rollout.alpha=1 with loss.type={loss.type}: the weight q/m is unbounded when the teacher draws "
            "every token; use alpha below 1, or loss.type=forward_kl"
        )
    if loss.importance_weight == "p/m" and alpha == 0.0:
        yield (
            f"rollout.alpha=0 with loss.type={loss.type}: the weight p/m is unbounded when the student draws every "
            "token; use alpha above 0, or loss.type=forward_kl"
        )


def _hidden_states_are_for_divergences(config: Config) -> Iterator[str]:
    if config.rollout.teacher_signal == "hidden" and not config.loss.divergence:
        divergences = sorted(name_of(kind) for kind in LOSSES.known() if kind.divergence)
        yield (
            f"rollout.teacher_signal=hidden with loss.type={config.loss.type}: exact rows are made for the divergences "
            f"({', '.join(divergences)}); choose one of them, or rollout.teacher_signal=support"
        )


def _other_tokenizer_scores_alone(config: Config) -> Iterator[str]:
    if config.loss.shared_ids:
        return
    loss = f"loss.type={config.loss.type}"
    if config.rollout.sampler != "student" or len(config.teachers) > 1 or not config.served_teachers:
        yield (
            f"{loss}: a teacher with another tokenizer cannot sample beside the student, nor share a target with "
            "others; set rollout.sampler=student, and keep one teacher of type vllm"
        )
    if _text_share(config):
        yield f"training.pretraining.teacher_share with {loss}: the text is in other ids; set it to 0"


# ------------------------------------------------------------------------------------- teachers with other inputs


def _other_prompts_are_read_alone(config: Config) -> Iterator[str]:
    if not config.loss.shared_ids:
        return
    for name, teacher in config.served_teachers.items():
        if teacher.prompt_template is not None and (config.rollout.sampler != "student" or len(config.teachers) > 1):
            yield (
                f"teachers.{name}.prompt_template: a teacher that reads another prompt cannot sample beside the student, "
                "nor share a target with others; set rollout.sampler=student, and keep one teacher"
            )


def _teachers_without_the_student_only_score(config: Config) -> Iterator[str]:
    for name, teacher in config.served_teachers.items():
        if not teacher.holds_student and config.rollout.sampler != "student":
            yield (
                f"teachers.{name}.holds_student=false: its replicas cannot sample from a mixture with the student; set "
                "rollout.sampler=student, or holds_student=true"
            )


def _changing_teachers_have_something_to_teach(config: Config) -> Iterator[str]:
    peers, sharing = config.peers, config.rollout.teachers
    selves = [teacher for teacher in config.teachers.values() if teacher.follows_student]
    if peers and len(peers) < len(config.teachers):
        yield (
            f"teachers: {', '.join(peers)} of type peer learn from this student and from each other; another kind of "
            "teacher beside them is not known: keep peers alone"
        )
    if len(peers) > 1 and (sharing is None or not sharing.one_target):
        yield "rollout.teachers: several peers teach as one; set rollout.teachers.type=ensemble"
    if peers and sharing is not None and sharing.names():
        yield "rollout.teachers: peers count alike, since every student has the others; remove their names"
    sources = [(config.student.model, config.student.revision), *((peer.model, peer.revision) for peer in peers.values())]
    if any(source in sources[:place] for place, source in enumerate(sources)):
        yield (
            "teachers: peers that start from one model and see the same data stay one model, and have nothing to teach; "
            "give them different models, or tiny ones of different seeds"
        )
    if selves and not config.teacher_needs_own_engine and config.rollout.data_share == 0.0 and config.loss.signals:
        yield (
            "teachers of type self: the student begins as its own teacher, where every divergence is zero and stays so; "
            "set rollout.data_share for answers to learn from, or prompt_template so that the teacher knows more"
        )
    if selves and (len(config.teachers) > 1 or not config.loss.shared_ids):
        yield "teachers: one of type self is the only teacher of its run, and reads the student's own ids; remove the others"
    if (peers or selves) and config.rollout.teacher_signal == "hidden":
        yield (
            "rollout.teacher_signal=hidden: the ranks hold an output head of fixed weights, and these teachers change; use "
            "rollout.teacher_signal=support"
        )


# --------------------------------------------------------------------------------------------------- weight transfer


def _both_ends_of_nccl_have_gpus(config: Config) -> Iterator[str]:
    training = config.training
    if training.weight_transfer == "object_store":
        return
    asked = f"training.weight_transfer={training.weight_transfer}"
    if training.sync_full_every > 1:
        yield (
            f"{asked} with training.sync_full_every={training.sync_full_every}: NCCL sends every version whole; set "
            "training.sync_full_every=1, or training.weight_transfer=object_store"
        )
    if training.gpus_per_rank < 1:
        yield (
            f"{asked} with training.gpus_per_rank={training.gpus_per_rank:g}: NCCL sends from a GPU of rank 0's own; "
            "set training.gpus_per_rank=1, or training.weight_transfer=object_store"
        )
    takers = {f"teachers.{name}": each for name, each in config.served_teachers.items() if config.student_beside(name)}
    for name, engine in (takers | ({"rollout.pool": config.rollout.pool} if config.has_rollout_pool else {})).items():
        if engine.num_gpus < 1:
            yield (
                f"{asked} with {name}.num_gpus={engine.num_gpus:g}: its replicas take the student's weights, and NCCL "
                f"brings them to GPUs of their own alone; set {name}.num_gpus={engine.tensor_parallel_size}, or "
                "training.weight_transfer=object_store"
            )
    if config.peers:
        yield (
            f"{asked} with teachers of type peer ({', '.join(config.peers)}): their replicas take weights of several "
            "students, which nccl does not bring; set training.weight_transfer=object_store"
        )


# --------------------------------------------------------------------------------------------------------- schedules


def _scheduled_settings_are_valid_throughout(config: Config) -> Iterator[str]:
    for name in config.training.schedules:
        if config.scheduled(name) is None:
            known = [f"rollout.{one}" for one in SCHEDULED_SHARES]
            known += [f"loss.{field}" for field, value in config.loss if isinstance(value, float)]
            known += [f"{term.setting}.weight" for term in config.feature_terms]
            yield f"training.schedules.{name}: no number that can change; those are {', '.join(known)}"
    for values, changed in config.extremes():
        try:
            type(config).model_validate(changed)
        except ValidationError as error:
            reasons = "; ".join(explain(item, type(config)) for item in error.errors())
            described = ", ".join(f"{name} at {value:g}" for name, value in values.items())
            yield f"training.schedules.{described}: {reasons}"


# ---------------------------------------------------------------------------------------------------------- features


def _features_have_a_teacher_to_compare_with(config: Config) -> Iterator[str]:
    if config.training.features is not None and config.training.lora is not None:
        yield (
            "training.features with training.lora: the maps between both models' layers are trained beside the student, and an "
            "adapter's checkpoint and result have no place for them; remove one of the two"
        )
    if config.training.features is None:
        return
    described = ", ".join(f"{name} (type={teacher.type})" for name, teacher in config.teachers.items())
    if len(config.teachers) > 1 or config.white_box_teacher is None:
        yield (
            f"training.features with teachers {described}: the ranks load one teacher whose weights are at hand; keep one "
            "of type vllm or hf, or remove training.features"
        )
    if not config.loss.shared_ids:
        yield (
            f"training.features with loss.type={config.loss.type}: states are compared token by token, and the teacher's "
            "tokens are others; remove training.features"
        )
    if config.teacher_needs_own_engine:
        yield (
            "training.features with prompt_template: layers are compared at the student's prompt, and the teacher reads "
            "another; remove one of them"
        )


# ------------------------------------------------------------------------------------------------- names and numbers


def _pool_names_are_free(config: Config) -> Iterator[str]:
    if "rollout" in config.teachers:
        yield "teachers.rollout: that is the name of the rollout pool; give the teacher another name"
    if "rollout.pool" in config.cluster.roles and not config.has_rollout_pool:
        yield (
            f"cluster.roles.rollout.pool with rollout.sampler={config.rollout.sampler}: the teachers' replicas sample, and "
            "no pool of student replicas runs; remove the role, or set rollout.sampler=student"
        )


def _batches_hold_whole_prompts(config: Config) -> Iterator[str]:
    if config.training.batch_size % config.rollout.samples_per_prompt:
        yield (
            f"training.batch_size={config.training.batch_size} is not a multiple of "
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}"
        )


# ---------------------------------------------------------------------------------------------------------- programs


def _programs_are_written_by_one_teacher(config: Config) -> Iterator[str]:
    program = config.rollout.program
    if program is None:
        return
    setting = f"rollout.program.type={program.type}"
    if config.rollout.alpha < 1.0:
        yield f"rollout.alpha={config.rollout.alpha:g} with {setting}: the teacher writes; set rollout.alpha=1"
    if config.loss.signals:
        yield f"loss.type={config.loss.type} with {setting}: a final answer has no log-probabilities; set loss.type=sequence"
    recorded = [name for name, teacher in config.teachers.items() if teacher.replays]
    if recorded:
        yield (
            f"teachers.{recorded[0]}.type={config.teachers[recorded[0]].type} with {setting}: recorded answers cannot be asked "
            "anything new; remove rollout.program to train on them"
        )
    sharing = config.rollout.teachers
    if sharing is not None and sharing.one_target:
        yield f"rollout.teachers.type={sharing.type} with {setting}: answers have no target to share; use type=route"


def _paired_rows_stay_pairs(config: Config) -> Iterator[str]:
    program, filters = config.rollout.program, config.rollout.filters
    if program is None or not program.paired_rows:
        return
    setting = f"rollout.program.type={program.type}"
    if config.rollout.samples_per_prompt % 2:
        yield (
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with {setting}: label and rationale rows "
            "come in pairs; set rollout.samples_per_prompt=2"
        )
    if filters is not None and any(rule.reads_text for rule in filters.in_order()):
        yield f"rollout.filters with {setting}: a label and a rationale are never the same text; keep `finished` alone"
    if program.row_prefix == config.data.prefix:
        yield (
            f"rollout.program.rationale_prefix={program.row_prefix!r} is data.prefix too: the student could not "
            "tell the rows apart; set data.prefix to another text, such as '[label] '"
        )


def _environments_answer_who_pauses(config: Config) -> Iterator[str]:
    environment = config.rollout.environment
    if environment is None:
        return
    setting = f"rollout.environment.type={environment.type}"
    if config.rollout.program is not None:
        yield (
            f"rollout.program.type={config.rollout.program.type} with {setting}: a program keeps its final answer alone, and "
            "no turns; remove one of them"
        )
    if not config.loss.shared_ids:
        yield (
            f"loss.type={config.loss.type} with {setting}: a teacher with another tokenizer reads the text in tokens that may "
            "reach from the environment's into the student's; use a teacher of the student's tokenizer, or remove "
            "rollout.environment"
        )
    for name, teacher in config.teachers.items():
        if teacher.replays:
            yield (
                f"teachers.{name}.type={teacher.type} with {setting}: recorded answers were given without an environment, and "
                "new ones cannot be scored; use a teacher that answers now, or remove rollout.environment"
            )
        elif config.rollout.sampler == "mixture" and not teacher.pauses:
            yield (
                f"teachers.{name}.type={teacher.type} with {setting}: it writes a response in one piece, and no environment "
                "can answer in it; set rollout.sampler=student, or use a teacher of type vllm or hf"
            )


def _whole_conversations_are_scored_as_they_are(config: Config) -> Iterator[str]:
    responds = config.rollout.data_share > 0.0 or "rollout.data_share" in config.training.schedules
    if (
        config.data.turns == "all"
        and responds
        and config.loss.signals
        and (config.other_teachers or config.teacher_needs_own_engine)
    ):
        yield (
            "data.turns=all with rollout.data_share: only a teacher in replicas, which reads the student's tokens, scores "
            "several turns of one row; set data.turns=each"
        )


def _a_pass_holds_the_longest_row(config: Config) -> Iterator[str]:
    training, rollout = config.training, config.rollout
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    of = "rollout.max_new_tokens" + ("" if rollout.environment is None else " + the environment's max_turns x max_reply_tokens")
    budget = training.micro_batch_tokens
    if budget is None:
        return
    if budget < longest:
        yield (
            f"training.micro_batch_tokens={budget} is less than the longest row, data.max_prompt_tokens + "
            f"{of} = {longest}; raise it to {longest} or more"
        )
    if training.pretraining is not None and budget < training.pretraining.window_tokens:
        yield (
            f"training.micro_batch_tokens={budget} is less than training.pretraining.window_tokens="
            f"{training.pretraining.window_tokens}; raise it, or shorten the windows"
        )


def _the_last_deadline_is_the_longest(config: Config) -> Iterator[str]:
    cluster, training = config.cluster, config.training
    limits = {
        # Ranks that hang are killed, and have the same time again to come back.
        "training.stuck_after_s": (training.stuck_after_s, 2),
        "training.stuck_loading_after_s": (training.stuck_loading_after_s, 2),
        "cluster.wait_s": (cluster.wait_s, 1),
        "cluster.stuck_after_s": (cluster.stuck_after_s, 1),
        "cluster.request_silence_s": (cluster.request_silence_s, 1),
        # An engine that hangs while it loads is started three times.
        "cluster.start_timeout_s": (cluster.start_timeout_s, 3),
    }
    for name, teacher in config.teachers.items():
        if teacher.silence is not None:
            setting, seconds, attempts = teacher.silence
            limits[f"teachers.{name}.{setting}"] = (seconds, attempts)
    name, (seconds, times) = max(limits.items(), key=lambda item: item[1][0] * item[1][1])
    longest = seconds * times
    if cluster.stuck_run_after_s <= longest:
        limit = name if times == 1 else f"{times} x {name}"
        yield (
            f"cluster.stuck_run_after_s={cluster.stuck_run_after_s:g} is not above {limit}={longest:g}, which would never be "
            f"reached: a run that still has a way on would end; raise the first above {longest:g}, or lower the other"
        )


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _teachers_are_shared_out,
    _loss_learns_from_its_writers,
    _other_prompts_are_read_alone,
    _teachers_without_the_student_only_score,
    _changing_teachers_have_something_to_teach,
    _both_ends_of_nccl_have_gpus,
    _scheduled_settings_are_valid_throughout,
    _importance_weights_are_bounded,
    _rewards_have_what_they_need,
    _hidden_states_are_for_divergences,
    _other_tokenizer_scores_alone,
    _features_have_a_teacher_to_compare_with,
    _pool_names_are_free,
    _batches_hold_whole_prompts,
    _programs_are_written_by_one_teacher,
    _paired_rows_stay_pairs,
    _environments_answer_who_pauses,
    _whole_conversations_are_scored_as_they_are,
    _a_pass_holds_the_longest_row,
    _the_last_deadline_is_the_longest,
)
