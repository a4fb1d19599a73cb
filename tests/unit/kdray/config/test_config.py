"""Settings: loading, overriding, dumping, and each refusal with its remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from kdray.config import Config, Settings, load_config, parse_config
from kdray.errors import ConfigError

CONFIGS = Path(__file__).parents[4] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "clusters")
TINY = {"type": "tiny"}


def tree(**sections: object) -> dict:
    return {"run": {"name": "trial"}, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}} | sections


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree()))
    return path


def all_settings() -> list[type[Settings]]:
    found, todo = [], [Settings]
    while todo:
        todo += (children := todo.pop().__subclasses__())
        found += [child for child in children if child.__module__.startswith("kdray.config")]
    return found


# ------------------------------------------------------------------------------------------------- every setting


@pytest.mark.parametrize("settings", all_settings(), ids=lambda settings: settings.__name__)
def test_every_field_is_documented(settings: type[BaseModel]):
    # `type` chooses the member of a union; the union's own field explains it.
    undocumented = [
        name for name, field in settings.model_fields.items() if name != "type" and not (field.description or "").strip()
    ]
    assert undocumented == []


def test_every_section_is_reachable_and_refuses_unknown_keys():
    assert len(all_settings()) > 15
    assert all(settings.model_config["extra"] == "forbid" for settings in all_settings())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    load_config(path)


def test_there_are_recipes():
    assert "quickstart" in [path.stem for path in RECIPES]


# -------------------------------------------------------------------------------------------- load, dump, override


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"loss": {"type": "jsd", "beta": 0.1}, "rollout": {"alpha": 0.0}},
        {"data": {"prompts": {"type": "jsonl", "path": "p.jsonl", "answer_column": "a"}}},
        {"data": {"prompts": {"type": "hub", "name": "openai/gsm8k", "subset": "main"}}},
        {"rollout": {"sampler": "student"}},
        {"rollout": {"sampler": "student", "alpha": 0}},
        {"student": {"model": "Qwen/Qwen3-8B", "revision": "main"}},
        {"teachers": {"t": {"model": {"type": "tiny", "train": {"steps": 5}}, "resources": {"big": 1.0}}}},
    ],
)
def test_the_dump_loads_to_an_equal_config(tmp_path, sections):
    config = parse_config(tree(**sections))
    path = tmp_path / "dumped.yaml"
    path.write_text(config.dump())
    assert load_config(path) == config
    assert "learning_rate" in config.dump(), "defaults included"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("training.learning_rate=1e-5", lambda c: c.training.learning_rate, 1e-5),
        ("training.learning_rate=2.5e-4", lambda c: c.training.learning_rate, 2.5e-4),
        ("training.sft.steps=7", lambda c: c.training.sft.steps, 7),
        ("run.name=b", lambda c: c.run.name, "b"),
        ("run.output=/tmp/x=y", lambda c: c.run.output, Path("/tmp/x=y")),
        ("evaluation.control=true", lambda c: c.evaluation.control, True),
        ("evaluation.prompts=null", lambda c: c.evaluation.prompts, None),
        ("data.prompts={type: task, tasks: [coin_flip]}", lambda c: c.data.prompts.tasks, ["coin_flip"]),
        ("teachers.t.num_gpus=1", lambda c: c.teachers["t"].num_gpus, 1.0),
        ("teachers.t.engine_args.enforce_eager=true", lambda c: c.teachers["t"].engine_args, {"enforce_eager": True}),
        ("loss={type: jsd, beta: 0.25}", lambda c: c.loss.beta, 0.25),
        ("student.model=./folder", lambda c: c.student.model, "./folder"),
    ],
)
def test_overrides_reach_their_setting(recipe, override, read, value):
    assert read(load_config(recipe, [override])) == value


def test_the_last_override_wins_and_an_empty_section_can_be_filled(recipe):
    recipe.write_text(recipe.read_text() + "training:\n")
    config = load_config(recipe, ["training.steps=5", "training.steps=6"])
    assert config.training.steps == 6


def test_derived_values():
    config = parse_config(tree(data={"max_prompt_tokens": 100}, rollout={"max_new_tokens": 20}))
    assert (config.max_model_len, config.run_folder) == (120, Path("runs/trial"))
    assert config.rollout.alpha == 0.2
    assert parse_config(tree(rollout={"sampler": "student"})).rollout.alpha == 0.0


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("training.steps=[1", "not valid YAML"),
        ("training.steps.more=1", "training.steps"),
        ("run.name.x=1", "run.name is a value, not a section"),
    ],
)
def test_overrides_that_make_no_sense(recipe, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "found list"), ("", "found NoneType"), ("run: [\n", "not valid YAML"), ("\xff", "not valid YAML")],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainng": {}}, "trainng: unknown key; did you mean `training`?"),
        ({"training": {"lr": 5}}, "training.lr: unknown key; did you mean `learning_rate`?"),
        ({"learning_rate": 5}, "learning_rate: unknown key; did you mean `training.learning_rate`?"),
        ({"seed": 5}, "seed: unknown key; did you mean `run.seed`?"),
        ({"zzz": 5}, "zzz: unknown key; valid keys: cluster, data, evaluation"),
        ({"loss": "reverse_kl"}, "loss='reverse_kl': a section, not a value; write loss.type=reverse_kl"),
        (
            {"data": {"prompts": {"type": "task", "tasks": "coin_flip"}}},
            "data.prompts.tasks='coin_flip': input should be a valid list; write data.prompts.tasks='[coin_flip]'",
        ),
        ({"training": {"stepz": 5}}, "training.stepz: unknown key; did you mean `steps`?"),
        ({"training": {"sft": {"stepz": 1}}}, "training.sft.stepz: unknown key; did you mean `steps`?"),
        ({"teachers": {"t": {"model": TINY, "replica": 2}}}, "teachers.t.replica: unknown key; did you mean"),
        ({"student": {"model": TINY | {"layer": 2}}}, "student.model.layer: unknown key; did you mean `layers`?"),
        ({"loss": {"type": "jsd", "bta": 0.1}}, "loss.bta: unknown key; did you mean `beta`?"),
        ({"data": {"prompts": {"type": "hub", "name": "x", "splitt": "y"}}}, "did you mean `split`?"),
        ({"evaluation": {"qqqqqq": 1}}, "evaluation.qqqqqq: unknown key; valid keys: control, every, lm_eval, pass_at, "),
    ],
)  # fmt: skip
def test_unknown_keys_are_refused_with_the_nearest_valid_one(sections, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"rollout": {"temperature": 0.7}}, ["rollout.temperature=0.7", "exact", "remove rollout.temperature"]),
        ({"rollout": {"top_p": 0.9}}, ["rollout.top_p=0.9", "exact", "remove rollout.top_p"]),
        ({"rollout": {"top_p": 0}}, ["rollout.top_p=0"]),
        (
            {"rollout": {"sampler": "student", "alpha": 0.2}},
            ["rollout.alpha=0.2", "sampler=student", "rollout.alpha=0"],
        ),
        ({"rollout": {"alpha": 1.5}}, ["rollout.alpha=1.5"]),
        ({"rollout": {"alpha": math.nan}}, ["rollout.alpha"]),
        ({"rollout": {"alpha": 1}}, ["rollout.alpha=1", "loss.type=minillm", "alpha below 1"]),
        ({"rollout": {"samples_per_prompt": 3}}, ["training.batch_size=64", "rollout.samples_per_prompt=3"]),
        ({"rollout": {"max_staleness": -1}}, ["rollout.max_staleness=-1"]),
        ({"training": {"batch_size": 60}}, ["training.batch_size=60", "1 x 16", "whole micro-batches"]),
        ({"training": {"ranks": 3, "batch_size": 96}}, ["training.sft.batch_size=64", "3 x 16"]),
        ({"training": {"zero_stage": 4}}, ["training.backend.zero_stage=4"]),
        ({"training": {"learning_rate": 0}}, ["training.learning_rate=0"]),
        ({"training": {"steps": 0}}, ["training.steps=0"]),
        ({"training": {"precision": "fp8"}}, ["training.precision='fp8'", "bf16"]),
        ({"student": {"model": TINY | {"width": 33}}}, ["student.model", "width=33", "multiple of 32"]),
        ({"student": {"model": {"layers": 2}}}, ["student.model.type: required"]),
        ({"loss": {"type": "jsd", "beta": 1}}, ["loss.beta=1"]),
        ({"loss": {"type": "kl"}}, ["loss", "kl", "reverse_kl"]),
        ({"data": {"prompts": {"type": "csv"}}}, ["data.prompts", "csv", "jsonl"]),
        ({"data": {"prompts": {"type": "task", "tasks": []}}}, ["data.prompts.tasks"]),
        ({"data": {"prompts": {"type": "task", "tasks": ["sums"]}}}, ["data.prompts.tasks.0='sums'", "arithmetic"]),
        (
            {"rollout": {"filters": {"agreement": "majority"}}},
            ["rollout.filters.agreement=majority with rollout.samples_per_prompt=1", "raise rollout.samples_per_prompt"],
        ),
        (
            {"rollout": {"filters": {"rules": [{"type": "agreement", "agreement": "majority"}]}}},
            ["rollout.filters.agreement=majority with rollout.samples_per_prompt=1"],
        ),
        ({"rollout": {"filters": {"pattern": "a{99999999999}"}}}, ["rollout.filters", "not a regular expression"]),
        *(
            (
                {
                    "rollout": {"alpha": 1, "samples_per_prompt": 2, "program": {"type": "rationale"}, "filters": filters},
                    "loss": {"type": "sequence"},
                },
                ["rollout.filters with rollout.program.type=rationale", "keep `finished` alone"],
            )
            for filters in ({"distinct": True}, {"correct": True}, {"pattern": "a"}, {"rules": ["distinct"]})
        ),
        ({"teachers": {}}, ["teachers"]),
        ({"teachers": {"a": {"model": TINY}, "b": {"model": TINY}}}, ["a, b", "rollout.teachers.type", "route or ensemble"]),
        ({"teachers": {"Big One": {"model": TINY}}}, ["teachers", "Big One"]),
        ({"run": {"name": "../x"}}, ["run.name='../x'"]),
        ({"run": {}}, ["run.name: required"]),
        ({"run": {"name": "x", "seed": -1}}, ["run.seed=-1"]),
    ],
)
def test_refusals_name_setting_and_remedy(sections, parts):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(run={}, training={"steps": 0}, evaluation={"evry": 1}), source="recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml:")
    for part in ("run.name: required", "training.steps=0", "did you mean `every`?"):
        assert part in message


def test_a_config_cannot_be_changed():
    config = parse_config(tree())
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_alpha_1_is_fine_where_no_weight_is_unbounded():
    config: Config = parse_config(tree(rollout={"alpha": 1}, loss={"type": "forward_kl"}))
    assert config.rollout.alpha == 1.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"prompts": {"type": "jsonl"}}}, "data.prompts.path: required"),
        ({"teachers": {"tiny": {"model": TINY, "replica": 2}}}, "teachers.tiny.replica: unknown key"),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate"),
    ],
)
def test_locations_keep_keys_that_are_also_tags(sections, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teachers": {"main": {"model": "t", "engine_args": {"logits_processors": []}}}}, "the recorder needs it"),
        ({"teachers": {"main": {"model": "t", "engine_args": {"speculative_config": {}}}}}, "does not speculate"),
        ({"teachers": {"main": {"model": "t", "tensor_parallel_size": 4, "num_gpus": 2}}}, "set num_gpus=4"),
        ({"teachers": {"rollout": {"model": "t"}}}, "name of the rollout pool"),
        ({"training": {"deepspeed": {"gradient_accumulation_steps": 4}}}, "use training.micro_batch_size"),
        ({"training": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, "use training.backend.zero_stage"),
        ({"loss": {"type": "forward_kl_sampled"}, "rollout": {"alpha": 0.0}}, "p/m is unbounded"),
        ({"loss": {"type": "vopd"}, "rollout": {"alpha": 1.0}}, "q/m is unbounded"),
        ({"training": {"features": {}}}, "training.features names no term"),
        ({"training": {"features": {"hidden": {}}, "lora": {}}}, "training.features with training.lora"),
        (
            {
                "training": {"features": {"hidden": {}}},
                "teachers": {"far": {"type": "openai", "base_url": "http://here/v1", "model": "m"}},
            },
            r"training\.features with teachers far \(type=openai\).*keep one of type vllm or hf",
        ),
        (
            {
                "training": {"features": {"relation": {}}},
                "teachers": {"a": {"model": TINY}, "b": {"model": TINY}},
                "rollout": {"teachers": {"type": "ensemble"}},
            },
            r"training\.features with teachers a \(type=vllm\), b",
        ),
        (
            {"training": {"features": {"hidden": {}}}, "loss": {"type": "uld"}, "rollout": {"sampler": "student"}},
            "training.features with loss.type=uld",
        ),
    ],
)
def test_what_kdray_sets_itself_cannot_be_contradicted(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree(**sections))


NCCL = {"weight_transfer": "nccl", "gpus_per_rank": 1}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"weight_transfer": "nccl"}},
            r"training\.weight_transfer=nccl with training\.gpus_per_rank=0: .*set training\.gpus_per_rank=1, or "
            r"training\.weight_transfer=object_store",
        ),
        ({"training": NCCL | {"gpus_per_rank": 0.5}}, r"gpus_per_rank=0\.5"),
        (
            {"training": NCCL, "teachers": {"t": {"model": TINY, "tensor_parallel_size": 2}}},
            r"teachers\.t\.num_gpus=0: .*set teachers\.t\.num_gpus=2, or training\.weight_transfer=object_store",
        ),
        (
            {"training": NCCL, "teachers": {"t": {"model": TINY, "num_gpus": 1}}, "rollout": {"sampler": "student"}},
            r"rollout\.pool\.num_gpus=0",
        ),
        (
            {"training": NCCL, "teachers": {"b": {"type": "peer", "model": TINY | {"seed": 2}, "num_gpus": 1}}},
            r"teachers of type peer \(b\): .*set training\.weight_transfer=object_store",
        ),
        (
            {"training": NCCL | {"sync_full_every": 5}, "teachers": {"t": {"model": TINY, "num_gpus": 1}}},
            r"training\.sync_full_every=5: .*set training\.sync_full_every=1, or training\.weight_transfer=object_store",
        ),
        ({"training": NCCL | {"weight_transfer": "gloo"}}, r"training\.weight_transfer.*object_store.*nccl"),
    ],
)
def test_nccl_is_refused_where_it_cannot_bring_weights(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"teachers": {"t": {"model": TINY, "num_gpus": 1}}},
        # Its replicas hold no student: they may have no GPU.
        {
            "teachers": {"t": {"model": TINY, "prompt_template": "{prompt}"}},
            "rollout": {"sampler": "student", "pool": {"num_gpus": 1}},
        },
    ],
)
def test_nccl_is_accepted_where_everyone_who_takes_weights_has_a_gpu(sections: dict[str, Any]) -> None:
    assert parse_config(tree(training=NCCL, **sections)).training.weight_transfer == "nccl"
    assert parse_config(tree(**sections)).training.weight_transfer == "object_store"


def test_pass_through_settings_pass() -> None:
    config = parse_config(tree(training={"deepspeed": {"zero_optimization": {"overlap_comm": True}}}))
    assert config.training.backend.model_dump()["options"]["zero_optimization"] == {"overlap_comm": True}


@pytest.mark.parametrize(
    ("evaluation", "passes"),
    [
        ({}, []),
        ({"samples_per_prompt": 4}, [4]),
        ({"samples_per_prompt": 4, "pass_at": [2, 1, 2]}, [1, 2]),
        ({"samples_per_prompt": 4, "pass_at": []}, []),
    ],
)
def test_pass_at_k_is_measured_for_all_responses_unless_told_otherwise(evaluation, passes):
    assert parse_config(tree(evaluation=evaluation)).evaluation.passes == passes


def test_pass_at_k_needs_k_responses():
    with pytest.raises(ConfigError, match=r"pass@8 needs at least 8 responses .*raise evaluation.samples_per_prompt"):
        parse_config(tree(evaluation={"samples_per_prompt": 4, "pass_at": [2, 8]}))


def test_a_message_says_that_the_overrides_may_be_what_is_wrong(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: x}\nstudent: {model: {type: tiny}}\nteachers: {t: {model: {type: tiny}}}\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml with the overrides: training.stepz: unknown key"):
        load_config(path, ["training.stepz=3"])
    with pytest.raises(ConfigError, match=r"a folder, not a config file"):
        load_config(tmp_path)
    path.rename(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"a run folder, not a config file; give .*/config.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("sections", "limit"),
    [
        ({"cluster": {"stuck_run_after_s": 14400}}, "2 x training.stuck_loading_after_s=14400"),
        ({"cluster": {"start_timeout_s": 6000}}, "3 x cluster.start_timeout_s=18000"),
        ({"training": {"stuck_loading_after_s": 9000}}, "2 x training.stuck_loading_after_s=18000"),
        ({"training": {"stuck_after_s": 9000}}, "2 x training.stuck_after_s=18000"),
        ({"cluster": {"request_silence_s": 86400}}, "cluster.request_silence_s=86400"),
        ({"cluster": {"stuck_after_s": 86400}}, "cluster.stuck_after_s=86400"),
        ({"cluster": {"wait_s": 86400}}, "cluster.wait_s=86400"),
        (
            {"teachers": {"api": {"type": "openai", "base_url": "http://h/v1", "model": "m", "timeout_s": 7200, "retries": 2}}},
            "3 x teachers.api.timeout_s=21600",
        ),
    ],
)
def test_the_last_deadline_has_to_be_the_longest(sections: dict[str, Any], limit: str) -> None:
    given = tree(**sections)
    if "teachers" in sections:
        given |= {"rollout": {"alpha": 1}, "loss": {"type": "sequence"}}
    wanted = sections.get("cluster", {}).get("stuck_run_after_s", 18000)
    with pytest.raises(ConfigError, match=rf"cluster\.stuck_run_after_s={wanted} is not above {limit}.* raise the first above"):
        parse_config(given)
    parse_config({**given, "cluster": given.get("cluster", {}) | {"stuck_run_after_s": 1e6}})
