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
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config

from actors.vllm_plugin.config_hooks import InnerHooks, check_beside
from actors.vllm_plugin.row_statistics import Rows
from actors.vllm_plugin.sub_models import build, text_weights, unfilled

ARCHITECTURE = "KdrayMixtureForCausalLM"
_STUDENT = "student."


def register() -> None:
    """Register the architecture with vLLM in this process; idempotent."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MixtureForCausalLM)
    MODELS_CONFIG_MAP[ARCHITECTURE] = InnerHooks


class MixtureForCausalLM(nn.Module):
    """Teacher and student in one engine; either may be absent (`kdray_role` teacher or student)."""

    active: MixtureForCausalLM | None = None
    """The only model of this process: vLLM gives a logits processor no other access to it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if current_platform.is_cpu():
            # vLLM's attention in bfloat16 uses AMX tiles but leaves it to other kernels to ask the system for them (0.32).
            # Where none does, as with float32 logits, its first step is an illegal instruction. Without AMX this does nothing.
            torch.cpu._init_amx()
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
            self.teacher = build(vllm_config, "teacher", config, architectures, quantised=True)
        if self.role == "student":
            self.student = build(vllm_config, "student", config, architectures, quantised=True)
        if self.role == "mixture":
            source = config.kdray_student
            revision = config.kdray_student_revision
            student_config = get_config(source, trust_remote_code=False, revision=revision)
            check_beside(student_config.architectures, architectures)
            self.student = build(
                vllm_config, "student", student_config, student_config.architectures, quantised=False, prefix="student"
            )
            self.secondary_weights = [DefaultModelLoader.Source(source, revision=revision, prefix=_STUDENT)]
        self.plain = vllm_config.quant_config is None
        """True if the weights of the engine's own checkpoint are not quantised."""
        self.teacher_width = _width(self.teacher)
        self.filled: dict[str, set[str]] = {"teacher": set(), "student": set()}
        """Parameters and buffers that each model's first load filled; an update has to fill the same."""
        # Outputs of both models. A captured graph's output may be overwritten by the next graph, since graphs share one pool of
        # memory, so that a model's output is copied here before the other model runs.
        self._hidden = torch.empty(0, self.teacher_width + _width(self.student))
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.student_only_step = False
        """Set by the recorder before each step: all of its requests are drawn from the student alone, so the teacher rests."""
        self.steps = 0
        self.teacher_steps = 0
        """Forward passes since the start, and those that ran the teacher."""
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
        """Hidden states of both models, concatenated: [tokens, teacher width + student width].

        The teacher's part is undefined in a step of requests that are drawn from the student alone.
        """
        # No metadata while vLLM profiles memory: there are no requests yet.
        is_step = bool(get_forward_context().attn_metadata)
        teacher_rests = is_step and self.student_only_step
        for model, first in ((None if teacher_rests else self.teacher, 0), (self.student, self.teacher_width)):
            if model is not None:
                output = model(input_ids, positions, None, None)
                self._reserve(output)
                self._hidden[: len(output), first : first + output.shape[-1]].copy_(output)
        hidden = self._hidden[: len(positions)]
        if is_step:
            self.outputs = hidden
            self.steps += 1
            self.teacher_steps += self.teacher is not None and not teacher_rests
        return hidden

    def _reserve(self, output: torch.Tensor) -> None:
        """Make the buffer of hidden states large enough, once, for the largest batch; its address must not change later."""
        if len(self._hidden) < len(output):
            self._hidden = output.new_empty(max(len(output), self._max_tokens), self._hidden.shape[-1])

    def log_rows(self, hidden: torch.Tensor) -> Rows:
        """Log-softmax rows of the models that ran, from hidden states as returned by `forward`."""
        halves = (hidden[..., : self.teacher_width], hidden[..., self.teacher_width :])
        teacher = None if self.student_only_step else self.teacher
        rows: list[torch.Tensor | None] = []
        for model, half in zip((teacher, self.student), halves, strict=True):
            if model is None:
                rows.append(None)
                continue
            logits = model.compute_logits(half.contiguous())
            # Truncated before the softmax: padding rows of a model's embedding must not receive probability mass.
            rows.append(logits[:, : self.vocab_size].log_softmax(-1, dtype=torch.float32))
        return Rows(rows[0], rows[1], None if teacher is None else halves[0])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The teacher's log p (log q if it did not run), padded to the model's declared vocabulary with -inf."""
        self.rows = self.log_rows(hidden_states)
        rows = self.rows.teacher if self.rows.teacher is not None else self.rows.student
        assert rows is not None
        # A copy: the engine modifies its logits in place. vLLM's own masks span the declared vocabulary.
        return torch.nn.functional.pad(rows, (0, self.declared_size - rows.shape[-1]), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights: the engine's own checkpoint goes to its main model (the teacher, if both), `student.` to the
        student."""
        own = "student" if self.teacher is None else "teacher"
        loaded: set[str] = set()
        for is_student, group in groupby(weights, key=lambda item: item[0].startswith(_STUDENT)):
            which = "student" if is_student else own
            names = self.load(which, ((name.removeprefix(_STUDENT), tensor) for name, tensor in group))
            self.filled[which] |= names
            loaded |= {f"{which}.{name}" for name in names}
        for which, model, plain in (("teacher", self.teacher, self.plain), ("student", self.student, True)):
            # vLLM's own check leaves out linear layers. Of quantised ones, only vLLM knows what files have to hold.
            if model is not None and plain and (lacking := unfilled(model, self.filled[which])):
                raise ValueError(f"the files of the {which} lack {', '.join(lacking[:4])} ({len(lacking)} tensors in all)")
        return loaded

    def load(self, which: str, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors of a checkpoint, or some of them, into one model; returns the names of what they filled."""
        model = self.student if which == "student" else self.teacher
        assert model is not None, f"this engine holds no {which}"
        return model.load_weights(text_weights(weights))


def _width(model: Any) -> int:
    return 0 if model is None else model.config.get_text_config().hidden_size


register()
