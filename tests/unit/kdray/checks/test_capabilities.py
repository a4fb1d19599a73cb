"""What a run needs of its teachers against what they can say: before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdray.capturing.format import write_capture
from kdray.checks.capabilities import check_capabilities, needed
from kdray.config import Config, parse_config
from kdray.config.signals import MEANING, Signal
from kdray.errors import ConfigError
from kdray.teachers.kind import kind_of
from kdray.types import Rollout, written_by

TINY = {"type": "tiny"}
TEXT = {"type": "openai", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": None}
IDS = TEXT | {"chat": False, "token_ids": True, "logprobs": 5}


def config(teacher: dict[str, Any], loss: str, more_teachers: dict[str, Any] | None = None, **rollout: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "x"},
            "student": {"model": TINY},
            "teachers": {"one": teacher} | (more_teachers or {}),
            "loss": {"type": loss},
            "rollout": rollout,
        }
    )


@pytest.mark.parametrize(
    ("teacher", "loss", "rollout"),
    [
        (TEXT, "sequence", {"alpha": 1}),
        (IDS, "sequence", {"alpha": 1}),
        (IDS, "forward_kl", {"alpha": 1}),
        (IDS, "reverse_kl", {"sampler": "student"}),
        (IDS, "vopd", {"sampler": "student"}),
        ({"model": TINY}, "minillm", {}),
        ({"model": TINY}, "sequence", {"alpha": 1}),
        ({"model": TINY}, "jsd", {"teacher_signal": "hidden"}),
    ],
)
def test_what_fits_passes(teacher: dict[str, Any], loss: str, rollout: dict[str, Any]) -> None:
    check_capabilities(config(teacher, loss, **rollout))


@pytest.mark.parametrize(
    ("teacher", "loss", "rollout", "message"),
    [
        (TEXT, "forward_kl", {"alpha": 1}, r"loss\.type=forward_kl needs its logprobs at its top ids, and teachers\.one"),
        (
            TEXT,
            "reverse_kl",
            {"sampler": "student"},
            r"rollout\.sampler=student needs its log p of every token.*set its logprobs",
        ),
        (IDS, "reverse_kl", {}, r"rollout\.alpha=0\.2 needs sampling beside the student.*rollout\.sampler=student"),
        (IDS, "forward_kl_sampled", {"alpha": 1}, r"loss\.type=forward_kl_sampled needs sampling beside the student"),
        (IDS, "jsd", {"sampler": "student", "teacher_signal": "hidden"}, r"teacher_signal=hidden needs its hidden states"),
    ],
)
def test_what_a_teacher_cannot_say_is_refused_with_the_remedy(
    teacher: dict[str, Any], loss: str, rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_capabilities(config(teacher, loss, **rollout))


def test_the_weakest_teacher_of_several_decides() -> None:
    sharing = {"type": "ensemble"}
    with pytest.raises(ConfigError, match=r"rollout\.teachers\.type=ensemble needs its logprobs at ids.*teachers\.two"):
        check_capabilities(config({"model": TINY}, "forward_kl", {"two": IDS}, alpha=1, teachers=sharing))
    routed = {"type": "route", "weights": {"one": 1, "two": 1}}
    check_capabilities(config({"model": TINY}, "forward_kl", {"two": IDS}, alpha=1, teachers=routed))
    assert "beside" not in needed(config({"model": TINY}, "minillm", sampler="student"))


def test_sequence_needs_a_teacher_that_writes() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.alpha=0\.2 with loss\.type=sequence.*set rollout\.alpha=1"):
        config({"model": TINY}, "sequence")


def test_a_model_in_the_process_and_recorded_answers_say_what_they_can(tmp_path: Path) -> None:
    local = {"type": "hf", "model": TINY}
    check_capabilities(config(local, "forward_kl", alpha=1))
    check_capabilities(config(local, "reverse_kl", sampler="student"))
    with pytest.raises(ConfigError, match=r"minillm needs sampling beside the student, and teachers\.one \(type=hf\)"):
        check_capabilities(config(local, "minillm"))
    tokens = np.array([3, 1], np.int32)
    versions = np.zeros(2, np.int32)
    text = Rollout(0, 0, tokens, tokens, None, None, versions, 1.0, "stop", teacher="far")
    write_capture(tmp_path / "text", [text], None, "hash", 9)
    recorded = {"type": "capture", "path": str(tmp_path / "text")}
    check_capabilities(config(recorded, "sequence", alpha=1))
    with pytest.raises(ConfigError, match=r"loss\.type=forward_kl needs its logprobs at its top ids"):
        check_capabilities(config(recorded, "forward_kl", alpha=1))
    with pytest.raises(ConfigError, match=r"rollout\.sampler=student needs its log p of every token"):
        check_capabilities(config(recorded, "reverse_kl", sampler="student"))


ALL = set(MEANING)


@pytest.mark.parametrize(
    ("settings", "signals"),
    [
        ({}, ALL),
        ({"model_runner": "v2"}, ALL),
        ({"scoring": "prompt_logprobs"}, ALL - {"requested", "hidden"}),
        ({"scoring": "prompt_logprobs", "model_runner": "v2"}, ALL - {"hidden"}),
    ],
)
def test_a_served_teacher_offers_what_its_scoring_and_model_runner_give(settings: dict[str, Any], signals: set[Signal]) -> None:
    assert kind_of(config({"model": TINY} | settings, "minillm"), "one").offers() == signals


def test_an_ensemble_of_prompt_logprobs_needs_the_newer_model_runner() -> None:
    plain = {"model": TINY, "scoring": "prompt_logprobs"}
    newer = plain | {"model_runner": "v2"}
    sharing = {"alpha": 1, "teachers": {"type": "ensemble"}}
    check_capabilities(config(newer, "forward_kl", {"two": newer}, **sharing))
    for one, two, named in ((plain, newer, "one"), (newer, plain, "two")):
        with pytest.raises(ConfigError, match=rf"needs its logprobs at ids that another.*teachers\.{named} .*scoring=recorder"):
            check_capabilities(config(one, "forward_kl", {"two": two}, **sharing))
    with pytest.raises(ConfigError, match=r"teacher_signal=hidden needs its hidden states.*scoring=recorder"):
        check_capabilities(config(newer, "jsd", sampler="student", teacher_signal="hidden"))


def test_a_capture_offers_what_it_holds_and_hidden_states_where_its_model_is_named(tmp_path: Path) -> None:
    tokens, logprobs = np.array([3, 1], np.int32), np.zeros(2, np.float32)
    drawn = Rollout(0, 0, tokens, tokens, logprobs, None, np.zeros(2, np.int32), 1.0, "stop", "far", logprobs)
    drawn = replace(
        drawn,
        support_ids=tokens[:, None],
        support_logprobs=logprobs[:, None],
        tail_logprobs=logprobs,
        teacher_hidden=np.zeros((2, 4), np.float16),
    )
    write_capture(tmp_path / "drawn", [drawn], None, "hash", 9)
    write_capture(
        tmp_path / "data", [replace(drawn, alpha=0.0, writer=written_by("data", 2), mixture_logprobs=None)], None, "hash", 9
    )
    recorded = {"type": "capture", "path": str(tmp_path / "drawn")}
    named = recorded | {"model": "some/teacher"}
    data = recorded | {"path": str(tmp_path / "data")}
    can = [kind_of(config(teacher, "forward_kl", alpha=1), "one").offers() for teacher in (recorded, named, data)]
    assert can == [{"text", "top_k"}, {"text", "top_k", "hidden"}, {"references", "top_k"}]
    check_capabilities(config(named, "jsd", alpha=1, teacher_signal="hidden"))
    with pytest.raises(ConfigError, match=r"needs its hidden states.*name the teacher's model, whose output head"):
        check_capabilities(config(recorded, "jsd", alpha=1, teacher_signal="hidden"))
    with pytest.raises(ConfigError, match=r"rollout\.alpha=1 needs responses that it writes.*capture what the run needs"):
        check_capabilities(config(data, "forward_kl", alpha=1))
