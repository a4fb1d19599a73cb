"""Adjustments that vLLM makes to an engine's configuration for single architectures, such as the name of gpt-oss's format.

vLLM looks them up by the engine's architecture, which is kdray's own, so that entry calls those of the model in the engine's
checkpoint. They change settings of the whole engine: a second model that needs others cannot be held beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig


class InnerHooks(VerifyAndUpdateConfig):
    """vLLM's entry for kdray's architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Part of vLLM's interface: called when the model's config was read."""
        for hook in _hooks(model_config.hf_config.kdray_architectures):
            hook.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Part of vLLM's interface: called when the engine's whole configuration is known."""
        for hook in _hooks(vllm_config.model_config.hf_config.kdray_architectures):
            hook.verify_and_update_config(vllm_config)


def check_beside(student: Sequence[str], own: Sequence[str]) -> None:
    """Check that a student needs no other settings of the engine than the model of the engine's own checkpoint.

    Args: student, own: architectures. Raises: ValueError.
    """
    lacking = [hook for hook in _hooks(student) if hook not in list(_hooks(own))]
    if lacking:
        raise ValueError(
            f"a student of {'/'.join(student)} needs settings of the whole engine that vLLM does not make for its teacher of "
            f"{'/'.join(own)}; hold them apart: rollout.sampler: student, and holds_student: false of the teacher"
        )


def _hooks(architectures: Sequence[str]) -> Iterator[type[VerifyAndUpdateConfig]]:
    return (MODELS_CONFIG_MAP[each] for each in architectures if each in MODELS_CONFIG_MAP)
