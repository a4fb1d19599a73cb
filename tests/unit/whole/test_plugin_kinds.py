"""The loss and the teacher of the example distribution: exact, checked, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdray
from kdray.checks.capabilities import check_capabilities
from kdray.checks.teacher_signal import check_loss, check_rows
from kdray.data.dataset import encode_answer, load_dataset
from kdray.errors import ConfigError
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.columns import unscored
from kdray.teachers.kind import TeacherContext, kind_of
from kdray.types import SampleRequest

EOS = 1


def config(**sections: Any) -> kdray.Config:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "data": {"prompts": {"type": "task", "tasks": ["reversal"], "size": 40}, "heldout_size": 4},
        "student": {"model": {"type": "tiny"}},
        "teachers": {"main": {"type": "oracle", "doubt": 0.1}},
        "loss": {"type": "hellinger"},
        "rollout": {"sampler": "student"},
    }
    return kdray.parse_config(tree | sections)


def opened(of: kdray.Config) -> tuple[Any, TeacherContext]:
    tokenizer = task_tokenizer()
    context = TeacherContext(of, tokenizer, load_dataset(of, tokenizer), len(tokenizer), (EOS,))
    return kind_of(of, "main").open(context), context


def requests(context: TeacherContext, count: int) -> list[SampleRequest]:
    prompts = context.dataset.train
    return [
        SampleRequest(index, prompt.prompt_id, prompt.token_ids, 1.0, seed=index, max_new_tokens=8)
        for index, prompt in ((index, prompts[index % len(prompts)]) for index in range(count))
    ]


def test_the_loss_is_the_squared_hellinger_distance(example_plugin: Path) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 5, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[False, True, True]])
    p, q = teacher[0, :2].softmax(-1).numpy(), student[0, :2].softmax(-1).numpy()
    expected = (0.5 * (np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2
    found = kdray.distillation_loss(student, teacher, ids, mask, "hellinger")
    assert found.item() == pytest.approx(expected, rel=1e-12)


async def test_the_teacher_draws_from_the_distribution_that_it_scores(example_plugin: Path) -> None:
    teacher, context = opened(config())
    (drawn,) = [rollouts async for rollouts in teacher.sample(requests(context, 2000))]
    right = np.concatenate([rollout.token_ids == rollout.support_ids[:, 0] for rollout in drawn])
    assert right.mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / len(right)))
    answers = {prompt.prompt_id: encode_answer(context.tokenizer, prompt).tolist() for prompt in context.dataset.train}
    whole = [rollout for rollout in drawn if rollout.token_ids.tolist() == answers[rollout.prompt_id]]
    assert len(whole) > len(drawn) / 2
    check_rows(drawn, context.vocab_size)
    assert check_loss(drawn, context.config.loss, 1.0, context.vocab_size)["gradient_perturbed"] > 0
    (scored,) = [rollouts async for rollouts in teacher.score([unscored(rollout) for rollout in drawn])]
    for before, after in zip(drawn, scored, strict=True):
        np.testing.assert_array_equal(before.teacher_logprobs, after.teacher_logprobs)
        np.testing.assert_allclose(np.exp(after.support_logprobs[:, 0]) + np.exp(after.tail_logprobs), 1.0, rtol=1e-6)


def test_the_config_asks_the_plugins_teacher_what_it_gives(example_plugin: Path) -> None:
    check_capabilities(config())
    with pytest.raises(
        ConfigError, match=r"rollout\.alpha=0\.2 needs sampling beside the student, and teachers\.main \(type=oracle\)"
    ):
        check_capabilities(config(rollout={"alpha": 0.2}))
    with pytest.raises(ConfigError, match=r"teachers\.main\.doubt=2: "):
        config(teachers={"main": {"type": "oracle", "doubt": 2}})
    with pytest.raises(ConfigError, match=r"teachers\.main\.doub: unknown key; did you mean `doubt`\?"):
        config(teachers={"main": {"type": "oracle", "doub": 0.2}})
    with pytest.raises(ConfigError, match=r"teachers\.main\.type='orcale': no installed teacher .* did you mean `oracle`\?"):
        config(teachers={"main": {"type": "orcale"}})


def test_a_capture_of_a_kind_that_does_not_support_it_is_refused(example_plugin: Path) -> None:
    from cluster.capture_run import check_capturable

    with pytest.raises(ConfigError, match=r"teachers\.main\.type=oracle: its answers cannot be captured"):
        check_capturable(config(rollout={"alpha": 1.0}))


def test_the_config_survives_its_dump(example_plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config().dump())
    again = kdray.load_config(tmp_path / "config.yaml")
    assert again == config()
    assert type(again.loss).__module__ == "kdray_example.loss"


def test_without_the_distribution_its_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers\.main\.type='oracle': no installed teacher has this name"):
        config(loss={"type": "jsd"}, data={})
