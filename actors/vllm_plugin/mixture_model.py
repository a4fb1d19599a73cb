"""vLLM model that holds teacher and student: one forward pass gives both next-token distributions.

An out-of-tree vLLM model with up to two sub-models, each vLLM's own implementation of its architecture, so batching, paged KV
and prefix caching remain vLLM's. `compute_logits` computes both log-softmax rows, truncated to the shared vocabulary, keeps
them in `self.rows` for the recorder (`actors.vllm_plugin.recorder`) and returns the teacher's log p, so that the engine's
prompt logprobs are the teacher's. The recorder decides which token is sampled, and from which mixture.

Registered with vLLM through the entry point group `vllm.general_plugins`, and on import by `actors.vllm_plugin.recorder` and
`actors.vllm_plugin.worker_extension`, which vLLM loads by name if no entry point is installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.transformers_utils.config import get_config

from actors.vllm_plugin.row_statistics import Rows

ARCHITECTURE = "KdrayMixtureForCausalLM"
_STUDENT = "student."


def register() -> None:
    """Register the architecture with vLLM in this process; idempotent."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MixtureForCausalLM)


class MixtureForCausalLM(nn.Module):
    """Teacher and student in one engine; either may be absent (`kdray_role` teacher or student)."""

    active: MixtureForCausalLM | None = None
    """The only model of this process: vLLM gives a logits processor no other access to it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.role: str = config.kdray_role
        self.vocab_size: int = config.kdray_vocab_size
        self.declared_size: int = vllm_config.model_config.get_vocab_size()
        self.student_version = 0
        # Typed as Any: sub-models implement vLLM's text-model interface, which torch's Module does not declare.
        self.teacher: Any = None
        self.student: Any = None
        architectures = config.kdray_architectures
        if self.role in ("mixture", "teacher"):
            self.teacher = init_vllm_registered_model(
                vllm_config, prefix="teacher", hf_config=config, architectures=architectures
            )
        if self.role == "student":
            self.student = init_vllm_registered_model(
                vllm_config, prefix="student", hf_config=config, architectures=architectures
            )
        if self.role == "mixture":
            source = config.kdray_student
            revision = config.kdray_student_revision
            student_config = get_config(source, trust_remote_code=False, revision=revision)
            self.student = init_vllm_registered_model(
                vllm_config, prefix="student", hf_config=student_config, architectures=student_config.architectures
            )
            self.secondary_weights = [DefaultModelLoader.Source(source, revision=revision, prefix=_STUDENT)]
        self.teacher_width: int = config.get_text_config().hidden_size if self.teacher is not None else 0
        self.rows: Rows | None = None
        self.outputs: torch.Tensor | None = None
        """Outputs of the latest forward pass, [tokens, teacher width + student width], which scoring needs."""
        MixtureForCausalLM.active = self

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's interface of a text model; unused, since each sub-model embeds ids with its own matrix."""
        model = self.teacher if self.teacher is not None else self.student
        assert model is not None
        return model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of both models, concatenated: [tokens, teacher width + student width]."""
        models = [model for model in (self.teacher, self.student) if model is not None]
        hidden = torch.cat([model(input_ids, positions, None, None) for model in models], dim=-1)
        # No metadata while vLLM profiles memory: there are no requests yet.
        if get_forward_context().attn_metadata:
            self.outputs = hidden
        return hidden

    def log_rows(self, hidden: torch.Tensor) -> Rows:
        """Both models' log-softmax rows from hidden states as returned by `forward`."""
        halves = (hidden[..., : self.teacher_width], hidden[..., self.teacher_width :])
        rows: list[torch.Tensor | None] = []
        for model, half in zip((self.teacher, self.student), halves, strict=True):
            if model is None:
                rows.append(None)
                continue
            logits = model.compute_logits(half.contiguous())
            # Truncated before the softmax: padding rows of a model's embedding must not receive probability mass.
            rows.append(logits[:, : self.vocab_size].log_softmax(-1, dtype=torch.float32))
        return Rows(rows[0], rows[1], None if self.teacher is None else halves[0])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The teacher's log p (log q without a teacher), padded to the model's declared vocabulary with -inf."""
        self.rows = self.log_rows(hidden_states)
        rows = self.rows.teacher if self.rows.teacher is not None else self.rows.student
        assert rows is not None
        # A copy: the engine modifies its logits in place. vLLM's own masks span the declared vocabulary.
        return torch.nn.functional.pad(rows, (0, self.declared_size - rows.shape[-1]), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights: the engine's own checkpoint goes to its main model (the teacher, if both), `student.` to the
        student."""
        own, own_prefix = (self.student, _STUDENT) if self.teacher is None else (self.teacher, "teacher.")
        loaded: set[str] = set()
        for is_student, group in groupby(weights, key=lambda item: item[0].startswith(_STUDENT)):
            model, prefix = (self.student, _STUDENT) if is_student else (own, own_prefix)
            assert model is not None
            named = ((name.removeprefix(_STUDENT), tensor) for name, tensor in group)
            loaded |= {prefix + name for name in model.load_weights(named)}
        return loaded


register()
