"""A teacher that reads another prompt: what it is asked, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from kdray.config import parse_config
from kdray.data.dataset import load_dataset, templated
from kdray.errors import ConfigError, DataError
from kdray.models.resolve import task_tokenizer
from kdray.teachers.privileged import PrivilegedScorer
from kdray.types import Rollout

BASE: dict[str, Any] = {
    "run": {"name": "x"},
    "student": {"model": {"type": "tiny"}},
    "teachers": {"t": {"type": "self", "prompt_template": "{answer}. {prompt}"}},
    "rollout": {"sampler": "student"},
    "loss": {"type": "reverse_kl"},
}


@dataclass
class Reader:
    """Scores by how long the prompt is that it was given, so that the test sees which one that was."""

    name: str = "reader"
    asked: list[Rollout] = field(default_factory=list)

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        for rollout in rollouts:
            self.asked.append(rollout)
            length = np.full(len(rollout.token_ids), -float(len(rollout.prompt_ids)), np.float32)
            yield [replace(rollout, teacher=self.name, teacher_logprobs=length, reverse_kl=length, forward_kl=length)]


async def test_responses_are_scored_after_the_teachers_prompt_and_come_back_with_the_students() -> None:
    versions = np.zeros(2, np.int32)
    rollouts = [
        Rollout(i, 10 + i, np.array([i, i], np.int32), np.array([1, 2], np.int32), None, None, versions, 0.0, "stop")
        for i in range(3)
    ]
    reader = Reader()
    prompts = {10 + i: np.arange(5 + i, dtype=np.int32) for i in range(3)}
    scored = [rollout async for part in PrivilegedScorer(reader, prompts).score(rollouts) for rollout in part]
    assert [rollout.prompt_ids.tolist() for rollout in reader.asked] == [list(range(5 + i)) for i in range(3)]
    for i, rollout in enumerate(scored):
        assert rollout.prompt_ids.tolist() == [i, i]
        assert rollout.token_ids.tolist() == [1, 2]
        assert rollout.teacher_logprobs.tolist() == [-5.0 - i] * 2
        # Both models read different prompts: a divergence between the two is not the student's distance from its teacher.
        assert rollout.reverse_kl is None
        assert rollout.forward_kl is None


def test_the_template_is_filled_with_question_and_answer() -> None:
    config, tokenizer = parse_config(BASE), task_tokenizer()
    prompts = load_dataset(config, tokenizer).train[:4]
    for prompt in prompts:
        ids = templated(config, tokenizer, [prompt], "{answer}. {prompt}")[prompt.prompt_id]
        assert tokenizer.decode(ids.tolist()) == f"{prompt.answer}. {prompt.question}"
    messages = replace(prompts[0], question=[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    ids = templated(config, tokenizer, [messages], "see {answer}: {prompt}")[messages.prompt_id]
    assert tokenizer.decode(ids.tolist()) == f"system:s;user:see {messages.answer}: q;"
    with pytest.raises(DataError, match="asks for {answer}, and prompt 0 has none"):
        templated(config, tokenizer, [replace(prompts[0], prompt_id=0, answer=None)], "{answer} {prompt}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"alpha": 0.2}}, "teachers.t.prompt_template: a teacher that reads another prompt"),
        ({"teachers": {"t": {"type": "self", "prompt_template": "{answer}"}}}, "prompt_template: lacks {prompt}"),
        ({"teachers": {"t": {"type": "self", "prompt_template": "{prompt} {hint}"}}}, "{hint} stands for nothing"),
        ({"teachers": {"t": {"type": "self", "prompt_template": "{prompt} {"}}}, "cannot be filled in"),
        ({"teachers": {"t": {"type": "self", "decay": 0.9}}}, "decay=0.9 without `every`"),
    ],
)
def test_templates_and_renewals_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(BASE | changes)
    assert message in str(raised.value)
