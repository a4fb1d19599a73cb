"""The models that an engine is made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.vllm_plugin import mixture_model


@pytest.mark.parametrize(("role", "held"), [("teacher", ["teacher"]), ("mixture", ["teacher", "student"])])
def test_an_engine_holds_a_student_for_the_role_of_a_mixture_alone(
    role: str, held: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that only scores loads none: no second model, and no second source of weights."""
    built: list[str] = []
    monkeypatch.setattr(mixture_model.MixtureForCausalLM, "active", None)

    def build(vllm_config: Any, tag: str, config: Any, architectures: Any, **how: Any) -> Any:
        built.append(tag)
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8)))

    monkeypatch.setattr(mixture_model, "build", build)
    monkeypatch.setattr(mixture_model, "get_config", lambda *of, **how: SimpleNamespace(architectures=["LlamaForCausalLM"]))
    config = SimpleNamespace(
        kdray_role=role,
        kdray_vocab_size=8,
        kdray_architectures=["LlamaForCausalLM"],
        kdray_student="folder",
        kdray_student_revision=None,
    )
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, get_vocab_size=lambda: 8),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        quant_config=None,
    )
    model = mixture_model.MixtureForCausalLM(vllm_config=engine)
    assert built == held
    assert (model.student is None) == (role == "teacher")
    assert hasattr(model, "secondary_weights") == (role == "mixture")
