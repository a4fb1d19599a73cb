"""The student's backend: by `type`, by the keys of before, in roles and overrides; and where its name may stand at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdray.config import Config, DeepSpeedSettings, TorchSettings, TrainingSettings, load_config, parse_config
from kdray.config.backends import STUDENT_BACKENDS
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder
from tests.support.flat_backend import install

ROOT = Path(__file__).parents[4]


def tree(**sections: Any) -> dict[str, Any]:
    return {"run": {"name": "x"}, "student": {"model": "s"}, "teachers": {"t": {"model": "m"}}, **sections}


def training(**settings: Any) -> TrainingSettings:
    return parse_config(tree(training=settings)).training


def test_deepspeed_is_the_default() -> None:
    assert training().backend == DeepSpeedSettings(zero_stage=0)
    assert training(backend={"zero_stage": 2}).backend == DeepSpeedSettings(zero_stage=2)
    assert training(backend={"type": "torch"}).backend == TorchSettings()


OPTIONS = {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"zero_stage": 3}, {"zero_stage": 3}),
        ({"deepspeed": OPTIONS}, {"options": OPTIONS}),
        ({"zero_stage": 1, "deepspeed": {}}, {"type": "deepspeed", "zero_stage": 1}),
        ({"zero_stage": 1, "backend": {"type": "deepspeed", "options": OPTIONS}}, {"zero_stage": 1, "options": OPTIONS}),
        ({"zero_stage": 1, "backend": {"zero_stage": 1}}, {"zero_stage": 1}),
    ],
)
def test_the_keys_of_before_mean_the_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    assert training(**before) == training(backend=now)
    assert TrainingSettings.model_validate(before) == TrainingSettings.model_validate({"backend": now})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 1, "backend": {"zero_stage": 2}}, r"training\.zero_stage and training\.backend\.zero_stage are one"),
        ({"zero_stage": 1, "backend": {"type": "torch"}}, r"training\.zero_stage: a setting of .*type=deepspeed, .*type=torch"),
        ({"backend": {"type": "torch", "zero_stage": 1}}, r"training\.backend\.zero_stage: a key of another `type`"),
        ({"backend": {"zero_stge": 1}}, r"training\.backend\.zero_stge: unknown key; did you mean `zero_stage`"),
        ({"backend": {"zero_stage": 4}}, r"training\.backend\.zero_stage=4: input should be less than or equal to 3"),
        (
            {"backend": {"type": "torhc"}},
            r"training\.backend\.type='torhc': no installed student backend .*did you mean `torch`",
        ),
        ({"backend": {"type": [1]}}, r"training\.backend\.type: not given; it says which student backend .*deepspeed, torch"),
        ({"backend": 3}, r"training\.backend=3: "),
        ({"backend": 3, "zero_stage": 1}, r"training\.backend: expected settings"),
        (
            {"backend": {"type": "torch"}, "ranks": 2},
            r"training\.ranks=2 with .*type=torch: .*set training\.ranks=1, or choose",
        ),
        ({"backend": {"options": {"zero_optimization": 3}, "zero_stage": 9}}, r"training\.backend\.zero_stage=9"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(**settings)


# ------------------------------------------------------------------------------------------------------- overrides


@pytest.fixture(params=[{"zero_stage": 1, "deepspeed": OPTIONS}, {"backend": {"zero_stage": 1, "options": OPTIONS}}])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One that says its backend in the keys of before, or in those of now."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(training={"ranks": 2, **request.param}, run={"name": "x", "output": str(tmp_path)})))
    return path


@pytest.mark.parametrize("override", ["training.zero_stage=2", "training.backend.zero_stage=2"])
def test_an_override_by_either_name_wins(recipe: Path, override: str) -> None:
    backend = load_config(recipe, [override]).training.backend
    assert backend == DeepSpeedSettings(zero_stage=2, options=OPTIONS)


def test_an_override_reaches_into_the_options(recipe: Path) -> None:
    config = load_config(
        recipe, ["training.deepspeed.zero_optimization.reduce_bucket_size=5", "training.backend.unsafe_options.x=1"]
    )
    wanted = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5}}
    assert config.training.backend == DeepSpeedSettings(zero_stage=1, options=wanted, unsafe_options={"x": 1})


def test_an_override_replaces_the_backend(recipe: Path) -> None:
    assert load_config(recipe, ["training.backend={type: torch}", "training.ranks=1"]).training.backend == TorchSettings()


def test_a_recipe_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(training={"zero_stage": 1, "backend": {"zero_stage": 2}})))
    with pytest.raises(ConfigError, match=rf"{path}: training\.zero_stage and"):
        load_config(path)


# ----------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("values", [{"zero_stage": 3}, {"backend": {"zero_stage": 3}}])
def test_a_role_says_how_the_student_is_spread(recipe: Path, values: dict[str, Any]) -> None:
    config = load_config(recipe, [f"cluster.roles.training={yaml.safe_dump(values, default_flow_style=True)}"])
    assert config.training.backend == DeepSpeedSettings(zero_stage=3, options=OPTIONS)
    assert parse_config(config.model_dump(mode="json")) == config
    overridden = load_config(recipe, ["cluster.roles.training.zero_stage=0"])
    assert overridden.training.backend == DeepSpeedSettings(zero_stage=0, options=OPTIONS)


@pytest.mark.parametrize(
    ("backend", "values", "key"),
    [
        ({}, {"deepspeed": {}}, "backend.options"),
        ({}, {"backend": {"type": "torch"}}, "backend.type"),
        ({"type": "torch"}, {"zero_stage": 1}, "backend.zero_stage"),
        ({}, {"backend": 3}, "backend"),
    ],
)
def test_a_role_says_nothing_else_of_the_backend(backend: dict[str, Any], values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.roles\.training\.{re.escape(key)}: says nothing about size or place"):
        parse_config(tree(training={"backend": backend}, cluster={"roles": {"training": values}}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (3, "training=3"),
        ({"backend": 3}, "training.backend=3"),
        ({"backend": {"type": "x"}}, "training.backend.type='x': no installed"),
    ],
)
def test_a_section_that_is_none_is_refused_for_what_it_is(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(tree(training=section, cluster={"roles": {"training": {"zero_stage": 1}}}))


# --------------------------------------------------------------------------------------------------------- resuming


def test_a_run_of_before_is_the_same_run(recipe: Path) -> None:
    """The config in its folder has the keys of before, with every default."""
    config = load_config(recipe)
    folder = RunFolder.create(config)
    written = yaml.safe_load(folder.config.read_text())
    backend = written["training"].pop("backend")
    written["training"] |= {"zero_stage": backend["zero_stage"], "deepspeed": backend["options"]}
    folder.config.write_text(yaml.safe_dump(written))
    assert load_config(folder.config) == config
    RunFolder.create(config, resume=True)
    assert load_config(folder.config) == config


def test_a_resumed_run_keeps_its_backend_and_may_change_its_zero_stage(recipe: Path) -> None:
    RunFolder.create(load_config(recipe, ["training.ranks=1"]))
    RunFolder.create(load_config(recipe, ["training.ranks=1", "training.zero_stage=2"]), resume=True)
    with pytest.raises(ConfigError, match=re.escape("training.backend.type: 'deepspeed' there, 'torch' now")):
        RunFolder.create(load_config(recipe, ["training.ranks=1", "training.backend={type: torch}"]), resume=True)


# ----------------------------------------------------------------------------------------------------------- others


def test_a_backend_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path))
    assert STUDENT_BACKENDS.names() == ["deepspeed", "flat", "torch"]
    config: Config = parse_config(
        tree(training={"backend": {"type": "flat"}}, cluster={"roles": {"training": {"backend": {"pieces": 4}}}})
    )
    assert config.training.backend.model_dump() == {"type": "flat", "pieces": 4}
    assert parse_config(yaml.safe_load(config.dump())) == config
    with pytest.raises(ConfigError, match=r"training\.backend\.piece: unknown key; did you mean `pieces`"):
        parse_config(tree(training={"backend": {"type": "flat", "piece": 4}}))


ITS_OWN = {"kdray/config/backends.py", "actors/student/backends/deepspeed.py", "actors/student/backends/zero_shards.py"}
VERSIONS = {"cluster/diagnosis/doctor.py", "cluster/commands/library_log.py"}
"""Modules that list packages: their versions, and whose log lines are kept."""


def test_deepspeed_has_files_of_its_own() -> None:
    """Code elsewhere asks the backend's settings; words like ZeRO may explain a thing, but not in the student's other files."""
    for package in ("kdray", "actors", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text()
            if name in ITS_OWN | VERSIONS:
                continue
            assert not re.search(r"zero_stage|deepspeed", text), name
            assert not (name.startswith("actors/student/") and re.search(r"DeepSpeed|ZeRO\b", text)), name


# --------------------------------------------------------------------------------------- DeepSpeed's own settings


def zero(**parts: Any) -> dict[str, Any]:
    return {"zero_optimization": parts}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            {"zero_stage": 0, "options": zero(offload_optimizer={"device": "cpu"})},
            r"offload_optimizer with training\.backend\.zero_stage=0: .* set training\.backend\.zero_stage=1, or remove it",
        ),
        (
            {"zero_stage": 2, "options": zero(offload_param={"device": "cpu"})},
            r"offload_param with training\.backend\.zero_stage=2: .* set training\.backend\.zero_stage=3, or remove it",
        ),
        (
            {"zero_stage": 3, "options": zero(offload_optimizer={"device": "nvme", "nvme_path": "/disk"})},
            r"zero_optimization\.offload_optimizer\.device=nvme: only cpu is supported",
        ),
    ],
)
def test_an_offload_that_would_not_take_place_is_refused(backend: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(backend=backend)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        # Each imports a function or a class by its name, writes to a path, or rounds what is trained.
        ({"options": {"compile": {"backend": "evil.module.function"}}}, r"options\.compile: not free to set; .*unsafe_options"),
        ({"options": {"torch_autocast": {"lower_precision_safe_modules": ["a.B"]}}}, r"options\.torch_autocast: not free"),
        ({"options": {"csv_monitor": {"enabled": True, "output_path": "/x"}}}, r"options\.csv_monitor: not free to set"),
        ({"options": {"autotuning": {"enabled": True}}}, r"options\.autotuning: not free to set"),
        ({"options": zero(zero_quantized_weights=True)}, r"options\.zero_optimization\.zero_quantized_weights: not free"),
        ({"options": zero(leaf_module={"classes": ["a.B"]})}, r"options\.zero_optimization\.leaf_module: not free to set"),
        ({"options": zero(overlap_comm="a.B")}, r"options\.zero_optimization\.overlap_comm='a\.B': "),
        ({"options": {"zero_optimization": "a.B"}}, r"options\.zero_optimization='a\.B': expected settings"),
        ({"unsafe_options": {"optimizer": {}}}, r"unsafe_options\.optimizer: set by kdray"),
        ({"unsafe_options": zero(stage=3)}, r"unsafe_options\.zero_optimization\.stage: set by kdray"),
        ({"options": zero(), "unsafe_options": zero()}, r"unsafe_options\.zero_optimization: also in options"),
    ],
)
def test_an_option_that_is_not_listed_is_refused(backend: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(backend=backend)


def test_unsafe_options_reach_deepspeed_and_the_facts_of_the_backend() -> None:
    given = training(backend={"zero_stage": 1, "unsafe_options": zero(offload_optimizer={"device": "cpu", "ratio": 0.5})})
    assert given.backend.offloads_optimizer
    assert given.backend.unsafe == {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    assert TorchSettings().unsafe == {}


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_an_offload_is_a_fact_of_the_backend(device: str) -> None:
    backend = training(backend={"zero_stage": 1, "options": zero(offload_optimizer={"device": device})}).backend
    assert backend.offloads_optimizer == (device == "cpu")
    assert backend.description == ("ZeRO 1, optimizer in main memory" if device == "cpu" else "ZeRO 1")
    assert not TorchSettings().offloads_optimizer


@pytest.mark.parametrize(
    ("stage", "options", "gradients"),
    [
        (0, {}, 4),
        (1, {}, 4),
        (2, {}, 1),
        (3, {}, 1),
        (2, {"data_types": {"grad_accum_dtype": "fp32"}}, 1),
        (2, {"data_types": {"grad_accum_dtype": "bf16"}}, 0.5),
    ],
)
def test_gradients_take_four_bytes_in_either_precision(stage: int, options: dict[str, Any], gradients: float) -> None:
    backend = DeepSpeedSettings(zero_stage=stage, options=options)
    assert backend.parameter_bytes("bf16", 4).gradients == gradients
    assert backend.parameter_bytes("fp32", 4).gradients == (4 if stage < 2 else 1)
    assert backend.parameter_bytes("bf16", 4).optimizer == (12 if stage == 0 else 3)
