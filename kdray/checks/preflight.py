"""Checks of data, tokenizers and models that run before anything starts: no Ray, no engine, no training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdray.checks.capabilities import check_capabilities
from kdray.checks.data_look import grading_line
from kdray.checks.devices import check_gpus, check_model_runners, precision_notes, quantisation_notes
from kdray.checks.gradient_notes import gradient_notes
from kdray.checks.models import check_heads, check_models
from kdray.checks.paths import check_files
from kdray.checks.unsafe_notes import unsafe_notes
from kdray.config import Config
from kdray.config.route import Route
from kdray.config.secret_files import set_secrets
from kdray.data.chat import ChatTemplate
from kdray.data.dataset import Dataset, load_dataset
from kdray.data.pretraining import load_windows
from kdray.data.references import reference_of
from kdray.errors import ConfigError
from kdray.models.adapters import adapted_layers
from kdray.models.inspect import depth, describe, origin, shape, student_tokenizer
from kdray.models.resolve import model_config, resolve_model
from kdray.rollouts.environments import check_environment
from kdray.runs.context import Checked
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.teachers.programs import check_prompts
from kdray.teachers.team import prompts_of


def check_warm_up(config: Config) -> None:
    """Check that the learning rate reaches its peak. A run that goes on may end before: its schedule is that of its beginning.

    Raises: ConfigError.
    """
    training = config.training
    if training.warmup_steps > training.steps:
        raise ConfigError(
            f"training.warmup_steps={training.warmup_steps} is more than training.steps={training.steps}; "
            "lower it, such as to 0"
        )


def check(config: Config, prompts: Iterable[Any] | None = None, begins: bool = True) -> Checked:
    """Run every check, those of names and paths first.

    Args: prompts: texts or records, for `data.prompts.type: iterable`; begins: False for a run that goes on.
    Raises: ConfigError, DataError or VocabError with setting, value and remedy.
    """
    set_secrets(config.cluster.secret_files("driver"))
    if begins:
        check_warm_up(config)
    check_files(config)
    check_models(config)
    student = config.student
    tokenizer = student_tokenizer(config)
    student_rows, student_positions = shape(student.model, student.revision)
    _check_student(config)
    check_capabilities(config)
    check_gpus(config)
    check_model_runners(config)
    kinds = {name: kind_of(config, name) for name in config.teachers}
    found = {name: kind.check(tokenizer, student_rows) for name, kind in kinds.items()}
    check_heads(config)
    vocab_size = min([student_rows, *(each.vocab_size for each in found.values() if each.vocab_size is not None)])
    lines = [f"student: {describe(student.model)}, {student_rows} vocabulary rows"]
    lines += [each.line for each in found.values() if each.line is not None]
    if config.training.lora is not None:
        student_config = model_config(*origin(student.model, student.revision))
        lines.append(f"lora: {adapted_layers(student_config, config.training.lora)}")
    lines += unsafe_notes(config)
    notes = [*precision_notes(config), *quantisation_notes(config), *gradient_notes(config)]
    notes += [each.note for each in found.values() if each.note is not None]
    if config.training.features is not None:
        lines.append(_features(config))
    positions = {f"teachers.{name}.model": each.positions for name, each in found.items()}
    _check_lengths(config, {"student.model": student_positions, **positions})
    if tokenizer.eos_token_id is None:
        raise ConfigError("student.model: the tokenizer has no end-of-sequence token; a rollout could never end")
    dataset = load_dataset(config, tokenizer, prompts)
    every = [*dataset.train, *dataset.heldout]
    if config.rollout.environment is not None:
        lines.append(check_environment(config.rollout.environment, tokenizer, vocab_size, every))
    if config.rollout.program is not None:
        check_prompts(config.rollout.program, every)
        lines.append(f"program: {config.rollout.program.type}, of whose calls the final answer alone is trained on")
    for name in config.teachers:
        # Find a prompt that no teacher takes now, rather than when its turn comes.
        if not prompts_of(config, name, every):
            lines.append(f"teacher {name}: rollout.teachers sends it no prompt; it is started and never asked")
    stop_ids = _stop_ids(config, tokenizer, vocab_size, dataset)
    context = TeacherContext(config, tokenizer, dataset, vocab_size, stop_ids)
    lines += [line for kind in kinds.values() if (line := kind.check_with_data(context)) is not None]
    _check_references(config, dataset, tokenizer)
    _check_rouge(config, dataset)
    _check_grading(config, dataset)
    _check_supervised(config, dataset, tokenizer, student_positions)
    if unknown := _with_unknown_tokens(dataset, tokenizer):
        lines.append(f"{unknown} prompts hold characters that the student's tokenizer reads as its unknown token")
    text = config.training.pretraining
    windows = [] if text is None else load_windows(text, tokenizer, config.run.seed)
    if windows:
        tokens = sum(len(window.token_ids) - 1 for window in windows)
        lines.append(f"pretraining text: {len(windows)} windows, {tokens} target tokens")
    lines.append(f"prompts: {len(dataset.train)} to train on, {len(dataset.heldout)} held out")
    lines += [f"left out: {each.words}" for each in dataset.left_out]
    lines += [f"data: {line}" for line in dataset.lines]
    if dataset.grade is None:
        lines.append(grading_line(dataset))
    if config.rollout.sampler == "student":
        lines.append("sampling: student-only replicas at alpha 0, scored by prefill (rollout.sampler=student)")
    return Checked(config, tokenizer, dataset, vocab_size, stop_ids, Route.of(config), windows, lines, notes)


def _check_student(config: Config) -> None:
    student = config.student
    if getattr(model_config(*origin(student.model, student.revision)), "quantization_config", None) is not None:
        raise ConfigError(
            f"student.model={student.model}: its weights are quantised, and training moves plain numbers, also beside an "
            "adapter (training.lora); name the folder before quantisation (kdray eval --student measures a quantised one)"
        )


def _check_lengths(config: Config, positions: Mapping[str, int | None]) -> None:
    """Check that every sequence fits every model that reads it. Args: positions: limits by setting; None is unlimited."""
    rollout = config.rollout
    needed = config.data.max_prompt_tokens + rollout.max_response_tokens
    text, program = config.training.pretraining, config.rollout.program
    for setting, longest in positions.items():
        if longest is None:
            continue
        if needed > longest:
            raise ConfigError(
                f"{setting} holds {longest} positions, but data.max_prompt_tokens={config.data.max_prompt_tokens} plus "
                f"rollout.max_new_tokens={rollout.max_new_tokens}{_of_environment(config)} need {needed}; lower one of them"
            )
        if program is not None and program.max_stage_tokens > longest:
            raise ConfigError(
                f"{setting} holds {longest} positions, but rollout.program.max_stage_tokens={program.max_stage_tokens}; "
                "lower it"
            )
        reads_text = text is not None and (setting == "student.model" or text.teacher_share > 0)
        if reads_text and text is not None and text.window_tokens > longest:
            raise ConfigError(
                f"{setting} holds {longest} positions, but training.pretraining.window_tokens={text.window_tokens}; lower it"
            )


def _of_environment(config: Config) -> str:
    environment = config.rollout.environment
    return "" if environment is None else f" and the environment's max_turns x max_reply_tokens={environment.max_tokens}"


def _check_supervised(config: Config, dataset: Dataset, tokenizer: Any, student_positions: int | None) -> None:
    """Check that phases on reference answers have some, and that the student's context fits them."""
    answered = [prompt for prompt in dataset.train if prompt.has_reference]
    if config.training.sft.steps and not answered:
        raise ConfigError(
            f"training.sft.steps={config.training.sft.steps}, but the prompts have no reference answers; "
            "set data.prompts.answer_column, or training.sft.steps=0"
        )
    if config.evaluation.control and not answered:
        raise ConfigError("evaluation.control=true, but the prompts have no reference answers to train the control on")
    if (config.training.sft.steps or config.evaluation.control) and student_positions is not None:
        lengths = [len(reference_of(tokenizer, prompt)) for prompt in answered]
        if max(lengths) > student_positions:
            raise ConfigError(
                f"student.model holds {student_positions} positions, but {sum(n > student_positions for n in lengths)} prompts "
                f"with their answers are longer (the longest has {max(lengths)} tokens); leave them out of the data, or set "
                "training.sft.steps=0 and evaluation.control=false"
            )


def _check_references(config: Config, dataset: Dataset, tokenizer: Any) -> None:
    """Raises: ConfigError if a setting needs reference answers that the prompts lack, or that are too long."""
    schedule = config.training.schedules.get("rollout.data_share")
    wanted = {
        f"rollout.data_share={config.rollout.data_share:g}": config.rollout.data_share > 0.0 or schedule is not None,
        f"training.finetune.steps={config.training.finetune.steps}": config.training.finetune.steps > 0,
        **{
            f"teachers.{name}.prompt_template": "{answer}" in (teacher.prompt_template or "")
            for name, teacher in config.served_teachers.items()
        },
    }
    lacking = sum(prompt.answer is None and prompt.reply is None for prompt in dataset.train)
    for setting, asks in wanted.items():
        # Fine-tuning uses only the prompts that have an answer, as the first supervised phase does.
        if asks and (lacking == len(dataset.train) if setting.startswith("training") else lacking):
            raise ConfigError(
                f"{setting}, but {lacking} of {len(dataset.train)} prompts have no reference answer; set "
                "data.prompts.answer_column, or leave them out"
            )
    if config.rollout.data_share or schedule is not None:
        longest = max(len(reference_of(tokenizer, prompt).answer_ids) for prompt in dataset.train)
        if longest > config.rollout.max_new_tokens:
            raise ConfigError(
                f"rollout.max_new_tokens={config.rollout.max_new_tokens}, but the longest reference answer has {longest} "
                "tokens; raise it to that"
            )


def _check_rouge(config: Config, dataset: Dataset) -> None:
    """Raises: ConfigError if ROUGE-L is asked for and no measured prompt has a reference answer."""
    measured = dataset.heldout[: config.evaluation.prompts]
    if config.evaluation.rouge_l and not any(prompt.answer for prompt in measured):
        raise ConfigError(
            f"evaluation.rouge_l=true, but none of the {len(measured)} held-out prompts has a reference answer; set "
            "data.prompts.answer_column, or evaluation.rouge_l=false"
        )


def _check_grading(config: Config, dataset: Dataset) -> None:
    """Raises: ConfigError or DataError if responses are to be graded but the prompts do not allow it."""
    filters, grade = config.rollout.filters, dataset.grade
    asking = [rule.setting for rule in ([] if filters is None else filters.in_order()) if rule.needs_grader]
    if config.rewarded:
        asking.append("loss.reward_weight")
    if grade is None:
        if asking:
            raise ConfigError(f"{asking[0]}: nothing grades the responses; set data.grader, or use `pattern` or `agreement`")
        return
    measured = dataset.heldout[: config.evaluation.prompts]
    if not any(map(grade.can_grade, measured)):
        raise ConfigError(
            f"{grade.name}, but none of the {len(measured)} held-out prompts has a reference answer; set "
            "data.prompts.answer_column, or remove data.grader"
        )
    grade.check(measured)
    if asking:
        lacking = sum(not grade.can_grade(prompt) for prompt in dataset.train)
        if lacking:
            raise ConfigError(
                f"{asking[0]}, but {lacking} of {len(dataset.train)} prompts have no reference answer; set "
                "data.prompts.answer_column, or leave them out"
            )
        grade.check(dataset.train)


def _stop_ids(config: Config, tokenizer: Any, vocab_size: int, dataset: Dataset) -> tuple[int, ...]:
    """End-of-sequence id of the tokenizer, plus those of the student's generation config (chat models have several).

    Where prompts go through the chat template, the token that ends an assistant's turn in it is one of them: a base model's
    tokenizer can have a template of chats without saying that its turns end.
    """
    ids = [int(tokenizer.eos_token_id)]
    source, revision = origin(config.student.model, config.student.revision)
    if isinstance(source, str):
        from transformers import GenerationConfig

        try:
            declared = GenerationConfig.from_pretrained(resolve_model(source, Path()), revision=revision).eos_token_id
        except OSError as error:
            # A model need not have a generation config; if it does, that config lists the stop ids.
            if (Path(source) / "generation_config.json").exists():
                raise ConfigError(
                    f"student.model={source}: generation_config.json cannot be read: {error}; restore it"
                ) from error
            declared = None
        ids += declared if isinstance(declared, list) else [] if declared is None else [declared]
    if any(not isinstance(prompt.question, str) or prompt.text != prompt.question for prompt in dataset.train):
        end = ChatTemplate(tokenizer, config.data.chat_template_kwargs).end_of_turn()
        ids += [] if end is None else [end]
    outside = [token_id for token_id in ids if token_id >= vocab_size]
    if outside:
        raise ConfigError(
            f"student.model: end-of-sequence ids {outside} lie outside the {vocab_size} ids that teacher and student share; "
            "use a teacher and a student of one family"
        )
    return tuple(dict.fromkeys(ids))


def _features(config: Config) -> str:
    """Describe the pairs of layers that are compared, in one line. Raises: ConfigError for a layer that does not exist."""
    assert config.training.features is not None
    assert config.white_box_teacher is not None
    name, _ = config.white_box_teacher
    layers = depth(config.student.model, config.student.revision), depth(*config.source(name))
    named = {term.setting.rpartition(".")[2]: term.pairs(*layers) for term in config.training.features.terms}
    pairs = "; ".join(f"{term} {', '.join(f'{s}-{t}' for s, t in each)}" for term, each in named.items())
    return f"features of teacher {name}, which every student rank holds too (student layer - teacher layer): {pairs}"


def _with_unknown_tokens(dataset: Dataset, tokenizer: Any) -> int:
    if tokenizer.unk_token_id is None:
        return 0
    return sum(bool((prompt.token_ids == tokenizer.unk_token_id).any()) for prompt in [*dataset.train, *dataset.heldout])
