"""What is refused before anything starts, beyond the config itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdray.checks.preflight import check
from kdray.config import TinyModel, parse_config
from kdray.data.references import encode_answer
from kdray.errors import ConfigError, DataError, KdrayError, VocabError
from kdray.models.resolve import build_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64), root / "student")
    build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64, vocab_rows=128), root / "teacher")
    with (root / "prompts.jsonl").open("w") as file:
        for index in range(40):
            file.write(json.dumps({"prompt": f"{index}+1=", "answer": str(index + 1)}) + "\n")
    return root


def _config(models: Path, **sections: Any) -> Any:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "data": {
            "prompts": {"type": "jsonl", "path": str(models / "prompts.jsonl")},
            "heldout_size": 8,
            "max_prompt_tokens": 32,
        },
        "student": {"model": str(models / "student")},
        "teachers": {"main": {"model": str(models / "teacher")}},
        "rollout": {"max_new_tokens": 16},
    }
    return parse_config(tree | {name: tree.get(name, {}) | value for name, value in sections.items()})


def test_a_sound_config_passes_and_padding_is_cut(models: Path) -> None:
    checked = check(_config(models, rollout={"environment": {"type": "calculator", "max_turns": 1, "max_reply_tokens": 2}}))
    assert any(line.startswith("environment: calculator, asked after each of the 1 tokens with '='") for line in checked.lines)
    assert checked.vocab_size == 99
    assert checked.stop_ids == (1,)
    assert any("29 padded rows are cut" in line for line in checked.lines)
    assert (len(checked.dataset.train), len(checked.dataset.heldout)) == (32, 8)


def test_every_end_of_sequence_of_the_student_stops(models: Path, tmp_path: Path) -> None:
    student = build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64), tmp_path / "student")
    generation = student / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": [1, 7]}))
    assert check(_config(models, student={"model": str(student)})).stop_ids == (1, 7)
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": [1, 700]}))
    with pytest.raises(ConfigError, match=r"\[700\] lie outside the 99 ids"):
        check(_config(models, student={"model": str(student)}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"max_new_tokens": 60}}, r"holds 64 positions.*need 92"),
        (
            {"rollout": {"max_new_tokens": 8, "environment": "calculator"}},
            r"holds 64 positions.*max_new_tokens=8 and the environment's max_turns x max_reply_tokens=64 need 104",
        ),
        (
            {"rollout": {"environment": {"type": "subtraction_game", "max_turns": 2, "max_reply_tokens": 2}}},
            r"rollout\.environment\.type=subtraction_game cannot start from prompt \d+: ValueError: .* names no pile",
        ),
        ({"student": {"model": "/nowhere/at/all"}}, r"/nowhere/at/all"),
        ({"data": {"heldout_size": 40}}, r"heldout_size=40"),
        ({"training": {"steps": 8, "warmup_steps": 9}}, r"training\.warmup_steps=9 is more than training\.steps=8"),
        (
            {"rollout": {"max_new_tokens": 16}, "teachers": {"main": {"model": {"type": "tiny", "vocab_rows": 9}}}},
            r"vocab_rows=9",
        ),
    ],
)
def test_what_cannot_run_is_refused(models: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(KdrayError, match=message):
        check(_config(models, **sections))


def test_a_run_that_goes_on_may_end_within_its_warm_up(models: Path) -> None:
    check(_config(models, training={"steps": 8, "warmup_steps": 9}), begins=False)


def test_a_folder_without_weights_is_refused(models: Path, tmp_path: Path) -> None:
    empty = build_tiny_model(TinyModel(type="tiny", layers=1, width=32), tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        check(_config(models, teachers={"main": {"model": str(empty)}}))


def test_a_model_that_is_no_language_model_is_refused(models: Path, tmp_path: Path) -> None:
    other = build_tiny_model(TinyModel(type="tiny", layers=1, width=32), tmp_path / "vision")
    (other / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="no language model"):
        check(_config(models, teachers={"main": {"model": str(other)}}))


def test_other_tokenizers_are_refused_with_the_ids(models: Path, tmp_path: Path) -> None:
    other = build_tiny_model(TinyModel(type="tiny", layers=1, width=32), tmp_path / "other")
    path = other / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tree))
    with pytest.raises(VocabError, match=r"'a'.*'b'|'b'.*'a'"):
        check(_config(models, teachers={"main": {"model": str(other)}}))


def test_answers_that_cannot_be_trained_are_refused(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(index), "answer": "9" * 80}) + "\n" for index in range(20)))
    sections = {
        "data": {"prompts": {"type": "jsonl", "path": str(path)}, "heldout_size": 4, "max_prompt_tokens": 32},
        "training": {"sft": {"steps": 2}},
    }
    with pytest.raises(ConfigError, match="16 prompts with their answers are longer"):
        check(_config(models, **sections))
    without = {**sections, "training": {"sft": {"steps": 0}}}
    assert check(_config(models, **without)).dataset.train


def _shared(tmp_path, **rollout):
    tiny = {"type": "tiny"}
    return parse_config(
        {
            "run": {"name": "x", "output": str(tmp_path)},
            "data": {"prompts": {"type": "task", "tasks": ["last_letters", "coin_flip"], "size": 16}, "heldout_size": 4},
            "student": {"model": tiny},
            "teachers": {"a": {"model": tiny}, "b": {"model": tiny}},
            "rollout": {"teachers": rollout},
        }
    )


def test_a_prompt_that_no_teacher_takes_is_found_before_anything_starts(tmp_path):
    with pytest.raises(DataError, match=r"domain='coin_flip' is not in rollout\.teachers\.map"):
        check(_shared(tmp_path, type="route", map={"last_letters": "a"}))
    with pytest.raises(DataError, match=r"rollout\.teachers\.domain_weights"):
        check(_shared(tmp_path, type="ensemble", domain_weights={"last_letters": {"a": 1}}))
    with pytest.raises(ConfigError, match="at least one of them above 0"):
        check(_shared(tmp_path, type="ensemble", weights={"a": 0, "b": 0}))
    with pytest.raises(ConfigError, match="at least one of them above 0"):
        check(_shared(tmp_path, type="route", weights={"a": 0, "b": 0}))
    lines = check(_shared(tmp_path, type="route", map={"last_letters": "a", "coin_flip": "a"})).lines
    assert any("teacher b: rollout.teachers sends it no prompt" in line for line in lines)


def test_an_endpoint_without_its_key_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("KDRAY_TEST_KEY", raising=False)
    tree = {
        "run": {"name": "x", "output": str(tmp_path)},
        "data": {"prompts": {"type": "task", "size": 8}, "heldout_size": 2},
        "student": {"model": {"type": "tiny"}},
        "teachers": {"far": {"type": "openai", "base_url": "https://here/v1", "model": "m", "api_key_env": "KDRAY_TEST_KEY"}},
        "rollout": {"alpha": 1},
        "loss": {"type": "sequence"},
    }
    with pytest.raises(ConfigError, match=r"teachers\.far\.api_key_env=KDRAY_TEST_KEY: the variable is not set"):
        check(parse_config(tree))
    monkeypatch.setenv("KDRAY_TEST_KEY", "k")
    assert "k" not in [line.rpartition(" ")[2] for line in check(parse_config(tree)).lines]


def test_layers_of_features_are_looked_up_in_both_models(models: Path) -> None:
    lines = check(_config(models, training={"features": {"hidden": {}, "attention": {}}})).lines
    assert any("teacher main" in line and "hidden 0-0, 1-1; attention 1-1" in line for line in lines)
    with pytest.raises(ConfigError, match=r"features\.relation\.layers=\[\[1, 2\]\]: the teacher has no layer 2.*from 0 to 1"):
        check(_config(models, training={"features": {"relation": {"layers": [[1, 2]]}}}))


def test_layers_with_an_adapter_are_looked_up_in_the_student(models: Path) -> None:
    lines = check(_config(models, training={"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}})).lines
    assert any(line.startswith("lora: 2 layers, ") for line in lines), lines
    for target, message in (
        ("q_prj", r"target_modules: 'q_prj' ends the path of no layer.*linear layers there: .*q_proj"),
        ("self_attn", r"'self_attn' is no linear layer"),
        ("lm_head", r"selects lm_head, the output head"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(_config(models, training={"lora": {"target_modules": [target]}}))
    with pytest.raises(ConfigError, match=r"lora\.dropout=0\.1: the replicas sample without dropout"):
        _config(models, training={"lora": {"dropout": 0.1}})


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ],
    ids=lambda quantised: quantised["quant_method"],
)
@pytest.mark.parametrize("training", [{}, {"lora": {"rank": 4}}], ids=["full", "adapter"])
def test_a_quantised_student_is_refused_with_what_to_name_instead(
    models: Path, tmp_path: Path, quantised: dict[str, Any], training: dict[str, Any]
) -> None:
    """QLoRA would train an adapter on weights that the replicas hold in another format than the ranks."""
    folder = shutil.copytree(models / "student", tmp_path / "student")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    message = (
        rf"^student\.model={re.escape(str(folder))}: its weights are quantised.*training\.lora.*name the folder before quant"
    )
    with pytest.raises(ConfigError, match=message):
        check(_config(models, student={"model": str(folder)}, training=training))


def _with_program(tmp_path: Path, **sections: Any) -> Any:
    tree: dict[str, Any] = {
        "run": {"name": "x", "output": str(tmp_path)},
        "data": {"prompts": {"type": "task", "size": 8}, "heldout_size": 2},
        "student": {"model": {"type": "tiny"}},
        "teachers": {"base": {"model": {"type": "tiny"}}},
        "rollout": {"alpha": 1, "program": {"type": "direct", "max_stage_tokens": 400}},
        "loss": {"type": "sequence"},
    }
    return parse_config(tree | {name: tree.get(name, {}) | value for name, value in sections.items()})


PAIRS = {"type": "rationale", "max_stage_tokens": 400}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"alpha": 0.5}}, r"rollout\.alpha=0\.5 with .*type=sequence|rollout\.alpha=0\.5 with rollout\.program"),
        ({"loss": {"type": "forward_kl"}}, r"loss\.type=forward_kl with rollout\.program\.type=direct"),
        ({"teachers": {"base": {"type": "capture", "path": "there"}}}, r"teachers\.base\.type=capture with rollout\.program"),
        ({"rollout": {"teachers": {"type": "ensemble"}}}, r"type=ensemble with rollout\.program"),
        ({"rollout": {"program": PAIRS}}, r"samples_per_prompt=1 with rollout\.program\.type=rationale"),
        (
            {"rollout": {"program": PAIRS | {"rationale_prefix": ""}, "samples_per_prompt": 2}},
            r"rationale_prefix='' is data\.prefix too",
        ),
    ],
)
def test_what_a_program_does_not_go_with_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _with_program(tmp_path, **sections)


def test_calls_longer_than_a_model_are_refused_and_a_sound_program_is_told(tmp_path: Path) -> None:
    sound = _with_program(tmp_path)
    assert sound.max_model_len == 400, "an engine must hold a call"
    assert any("program: direct" in line for line in check(sound).lines)
    long = {"program": {"type": "direct", "max_stage_tokens": 513}}
    with pytest.raises(ConfigError, match=r"holds 512 positions, but rollout\.program\.max_stage_tokens=513"):
        check(_with_program(tmp_path, rollout={"alpha": 1} | long))
    judge = {"program": {"type": "branch_solve_merge", "max_stage_tokens": 400}}
    with pytest.raises(DataError, match=r"rollout\.program\.pair=.* no two answers"):
        check(_with_program(tmp_path, rollout={"alpha": 1} | judge))


# ---------------------------------------------------------------------------------------------------------- grading


def test_a_grader_needs_references_that_it_can_use(models: Path, tmp_path: Path) -> None:
    def of(*answers: str | None, **sections: Any) -> Any:
        path = tmp_path / "graded.jsonl"
        rows = [{"prompt": f"{index}+1=", "answer": answer} for index, answer in enumerate(answers)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections["data"] = {"prompts": {"type": "jsonl", "path": str(path)}, "heldout_size": 2} | sections.get("data", {})
        return _config(models, training={"sft": {"steps": 0}}, **sections)

    graded: dict[str, Any] = {"data": {"grader": "last_number"}}
    correct: dict[str, Any] = {"rollout": {"filters": {"correct": True}, "max_new_tokens": 16}}
    assert check(of("1", "none", "3", "4", **graded)).dataset.grade is not None
    with pytest.raises(DataError, match="data.grader.type=last_number on prompt 3: no number in the reference answer 'none'"):
        check(of("1", "2", "3", "none", **graded))
    with pytest.raises(ConfigError, match="type=last_number, but none of the 2 held-out prompts has a reference answer"):
        check(of("1", "2", None, None, **graded))
    with pytest.raises(DataError, match="on prompt 1: no number in the reference answer 'none'"):
        check(of("1", "none", "3", "4", **graded, **correct))
    with pytest.raises(ConfigError, match=r"rollout.filters.correct=true, but 1 of 2 prompts have no reference answer"):
        check(of("1", None, "3", "4", **graded, **correct))
    with pytest.raises(ConfigError, match="rollout.filters.correct=true: nothing grades the responses; set data.grader"):
        check(of("1", "2", "3", "4", **correct))
    overlap: dict[str, Any] = {"evaluation": {"rouge_l": True}}
    check(of("1", "2", "3", None, **overlap))
    with pytest.raises(ConfigError, match="evaluation.rouge_l=true, but none of the 2 held-out prompts has a reference answer"):
        check(of("1", "2", None, None, **overlap))


# -------------------------------------------------------------------------------------------------------- chat data


@pytest.fixture
def chat(models: Path, tmp_path: Path) -> Callable[..., Any]:
    """A recipe of conversations, for a student whose tokenizer has no template and ends sequences with <eos>."""
    talk = [{"role": role, "content": text} for role, text in (("user", "1+1="), ("assistant", "2")) * 2]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<unk>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    prompts = {"type": "file", "path": str(tmp_path / "chat.jsonl")}

    def of(data: dict[str, Any], **sections: Any) -> Any:
        files = {"prompts": prompts, "chat_template_file": str(tmp_path / "chat.jinja"), "heldout_size": 1}
        return _config(models, data=files | data, **sections)

    return of


def test_conversations_go_through_a_template_given_by_file(chat: Callable[..., Any]) -> None:
    checked = check(chat({}, training={"sft": {"steps": 1}}))
    assert checked.dataset.train[0].text == "u:1+1=<unk>a:2<unk>u:1+1=<unk>a:"
    assert encode_answer(checked.tokenizer, checked.dataset.train[0]).tolist() == checked.tokenizer("2<unk>")["input_ids"]
    assert checked.stop_ids == (checked.tokenizer.eos_token_id, checked.tokenizer.unk_token_id), "a rollout would not end there"
    assert any(line.startswith("data: 4 rows, chat messages") for line in checked.lines)
    with pytest.raises(DataError, match=r"data\.chat_template_file=.*gone\.jinja: no such file or folder"):
        check(chat({"chat_template_file": "gone.jinja"}))
    with pytest.raises(DataError, match=r"chat messages need a chat template"):
        check(chat({"chat_template_file": None}))


def test_the_turns_that_count_follow_the_setting(chat: Callable[..., Any]) -> None:
    def targets(turns: str) -> list[int]:
        train = check(chat({"turns": turns}, training={"sft": {"steps": 1}})).dataset.train
        return [prompt.reference.num_targets for prompt in train if prompt.reference is not None]

    assert targets("last") == [2] * 3
    assert targets("all") == [4] * 3
    assert targets("each") == [2] * 6


def test_whole_conversations_need_a_teacher_that_scores_them(chat: Callable[..., Any]) -> None:
    capture = {"teachers": {"main": {"type": "capture", "path": "x"}}, "loss": {"type": "forward_kl"}}
    with pytest.raises(ConfigError, match=r"data\.turns=all with rollout\.data_share: only a teacher in replicas"):
        chat({"turns": "all"}, rollout={"data_share": 1.0, "alpha": 1.0}, **capture)


SMALL_UPDATES = {"training": {"mini_batch_size": 8, "micro_batch_size": 8}}
REWARDED = {"data": {"grader": "last_number"}, "rollout": {"samples_per_prompt": 2}}


@pytest.mark.parametrize(
    ("sections", "noted"),
    [
        (
            {"training": {"batch_size": 8, "micro_batch_size": 8, "sft": {"batch_size": 8}}},
            "training.batch_size=8 with loss.type=minillm",
        ),
        (SMALL_UPDATES, "training.mini_batch_size=8 with loss.type=minillm"),
        ({"training": {"mini_batch_size": 16}}, None),
        ({"training": {"mini_batch_size": 8, "micro_batch_size": 8, "loss_tokens": 100}}, None),
        (SMALL_UPDATES | {"loss": {"type": "reverse_kl"}}, None),
        (
            {"rollout": {"filters": {"distinct": True}}},
            "rollout.filters (unparsable, finished, distinct) with loss.type=minillm",
        ),
        ({"rollout": {"filters": {"finished": False}}}, None),
        ({"rollout": {"filters": {}}, "loss": {"type": "jsd"}}, None),
        (
            REWARDED | SMALL_UPDATES | {"loss": {"type": "jsd", "reward_weight": 0.5}},
            "training.mini_batch_size=8 with loss.reward_weight",
        ),
        (
            REWARDED
            | {"loss": {"type": "jsd"}}
            | {"training": {**SMALL_UPDATES["training"], "schedules": {"loss.reward_weight": {"type": "linear", "to": 0.5}}}},
            "training.mini_batch_size=8 with loss.reward_weight",
        ),
        (
            REWARDED
            | {"rollout": {"samples_per_prompt": 2, "filters": {}}}
            | {"loss": {"type": "reverse_kl", "reward_weight": 0.5}},
            "rollout.filters (unparsable, finished) with loss.reward_weight",
        ),
        (REWARDED | SMALL_UPDATES | {"loss": {"reward_weight": 0.5}}, "training.mini_batch_size=8 with loss.type=minillm"),
    ],
)
def test_settings_that_bias_a_policy_gradient_are_said_at_start(
    models: Path, sections: dict[str, Any], noted: str | None
) -> None:
    found = [line for line in check(_config(models, **sections)).notes if "docs/losses.md" in line]
    assert len(found) == (noted is not None)
    assert all(line.startswith(f"{noted}: ") for line in found)
