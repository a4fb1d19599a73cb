"""White-box teacher next to the student: both read the same tokens, and the outputs of their layers are compared.

The teacher is a plain model that is in no optimizer, checkpoint or export. The learned projections between the models' widths
are trained with the student: wrapped together they are one module for the backend, which clips, shards and saves both alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdray.config import AttentionTerm, FeatureSettings, HiddenTerm
from kdray.config.features import RelationTerm
from kdray.errors import TrainingError
from kdray.losses import LossOutput
from kdray.losses.features import ATTENTION, HIDDEN, RELATION, over_responses, predicting
from kdray.models.attention import attention_arguments


def load_feature_teacher(model: str, revision: str | None, settings: FeatureSettings, dtype: torch.dtype) -> Any:
    """The teacher without its output head, frozen, on the CPU."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(
        model,
        revision=revision,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        **attention_arguments(model, revision, maps=settings.attention is not None),
    )
    return teacher.base_model.eval().requires_grad_(False)


class StudentWithFeatures(torch.nn.Module):
    """The student and the projections to the teacher's widths; its output has the feature terms if response tokens are given.

    Everything happens in `forward`: a backend that shards weights has the projections whole only there, and may need the terms
    among the outputs, to be prepared when the backward pass reaches the projections.
    """

    def __init__(self, student: Any, teacher: Any, settings: FeatureSettings, seed: int) -> None:
        """Args: student: the Hugging Face model; teacher: from `load_feature_teacher`; seed: of the projections' initial
        weights."""
        super().__init__()
        self.student = student
        self.settings = settings
        # In a tuple: an unregistered module is not trained, sharded, saved or moved.
        self._teacher = (teacher,)
        student_width, teacher_width = (model.config.get_text_config().hidden_size for model in (student, teacher))
        layers = [model.config.get_text_config().num_hidden_layers for model in (student, teacher)]
        self.pairs = {type(term): term.pairs(*layers) for term in settings.terms}
        self.weights = {term.setting: term.weight for term in settings.terms}
        dtype = next(student.parameters()).dtype
        generator = torch.Generator().manual_seed(seed)
        maps = [_linear(student_width, teacher_width, generator, dtype) for _ in self.pairs.get(HiddenTerm, [])]
        self.projections = torch.nn.ModuleList(maps)

    def place_teacher(self, device: torch.device) -> None:
        """Move the teacher to the student's device."""
        self._teacher[0].to(device)

    def get_output_embeddings(self) -> Any:
        return self.student.get_output_embeddings()

    def forward(self, response_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The student's output. Args: response_mask: [B, S], False in column 0; if given, the output has `feature_terms`, their
        sums over these tokens, by metric name and unweighted.
        """
        from transformers.modeling_outputs import CausalLMOutput

        if response_mask is None:
            output = self.student(**inputs)
            # A backend may accumulate a weight's gradient from the first part of an update and reduce it with the last: every
            # part, text too, has to pass through the projections, or they keep the gradient of another step.
            for projection in self.projections:
                output.logits = output.logits + 0.0 * projection(output.logits.new_zeros(1, projection.in_features)).sum()
            return output
        wanted = {"output_hidden_states": True, "output_attentions": self.settings.attention is not None}
        output = self.student(**inputs, **wanted)
        with torch.no_grad():
            teacher = self._teacher[0](**inputs, **wanted)
        terms = self._terms(output, teacher, response_mask)
        # The states are not read any further; the backward pass holds those that it needs.
        bare = CausalLMOutput(logits=output.logits)
        bare["feature_terms"] = terms
        return bare

    def _terms(self, student: Any, teacher: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        settings, at = self.settings, predicting(mask)
        values: dict[str, list[torch.Tensor]] = {}
        if settings.hidden is not None:
            hidden, pairs = HIDDEN[settings.hidden.distance], self.pairs[HiddenTerm]
            values["hidden"] = [
                hidden(projection(student.hidden_states[s][at]), teacher.hidden_states[t][at])
                for projection, (s, t) in zip(self.projections, pairs, strict=True)
            ]
        if settings.attention is not None:
            attention, pairs = ATTENTION[settings.attention.distance], self.pairs[AttentionTerm]
            maps = (_all_maps(student, self.student), _all_maps(teacher, self._teacher[0]))
            values["attention"] = [attention(maps[0][s - 1], maps[1][t - 1], mask) for s, t in pairs]
        if settings.relation is not None:
            relation, pairs = RELATION[settings.relation.distance], self.pairs[RelationTerm]
            values["relation"] = [
                over_responses(relation, student.hidden_states[s], teacher.hidden_states[t], mask) for s, t in pairs
            ]
        return {f"feature_{name}": torch.stack(each).mean() for name, each in values.items()}


def _linear(student_width: int, teacher_width: int, generator: torch.Generator, dtype: torch.dtype) -> torch.nn.Linear:
    """A projection: the identity if the widths are equal, otherwise one that preserves norms on average."""
    linear = torch.nn.Linear(student_width, teacher_width, bias=False, dtype=dtype)
    with torch.no_grad():
        if student_width == teacher_width:
            torch.nn.init.eye_(linear.weight)
        else:
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * teacher_width**-0.5)
    return linear


def _all_maps(output: Any, model: Any) -> tuple[torch.Tensor, ...]:
    layers = model.config.get_text_config().num_hidden_layers
    maps = output.attentions or ()
    if len(maps) != layers or any(each is None for each in maps):
        raise TrainingError(
            f"training.features.attention: a {model.config.model_type} shows attention maps of {len(maps)} of its {layers} "
            "layers; remove the term, or use models of softmax attention throughout"
        )
    return tuple(maps)


_WRAPPED = "student."
"""Prefix of the student's names in `StudentWithFeatures`."""


def unwrapped(module: Any) -> Any:
    """The student alone, with the weight names that replicas and exports use."""
    return module.student if isinstance(module, StudentWithFeatures) else module


def without_wrapper(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's weights under the names that the student has alone. Args: weights: by name in the module, wrapped or not."""
    own = {name.removeprefix(_WRAPPED): tensor for name, tensor in weights.items() if name.startswith(_WRAPPED)}
    return own or dict(weights)


def parameter_groups(module: Any) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: the student, and the projections with a learning rate of their own."""
    groups: list[dict[str, Any]] = [{"params": [each for each in unwrapped(module).parameters() if each.requires_grad]}]
    if isinstance(module, StudentWithFeatures) and module.settings.hidden is not None:
        groups.append({"params": list(module.projections.parameters()), "lr": module.settings.hidden.projection_learning_rate})
    return groups


def place_teacher(module: Any, device: torch.device) -> None:
    """Move the white-box teacher to the student's device."""
    if isinstance(module, StudentWithFeatures):
        module.place_teacher(device)


def feature_inputs(module: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass on rollouts besides the ids. Args: mask: [B, S], the response tokens."""
    return {"response_mask": mask} if isinstance(module, StudentWithFeatures) else {}


def weigh_features(module: Any, scheduled: Mapping[str, float]) -> None:
    """Set the weights of the terms for a step. Args: scheduled: values by full name; a term without an entry keeps its own."""
    if isinstance(module, StudentWithFeatures):
        for term in module.settings.terms:
            module.weights[term.setting] = scheduled.get(f"{term.setting}.weight", term.weight)


def with_features(loss: LossOutput, output: Any, module: Any) -> LossOutput:
    """`loss` plus the weighted terms in the module's `output`, and their sums for the metrics."""
    if not isinstance(module, StudentWithFeatures):
        return loss
    total, sums = loss.total, dict(loss.sums)
    for term in module.settings.terms:
        name = f"feature_{term.setting.rpartition('.')[2]}"
        total = total + module.weights[term.setting] * output["feature_terms"][name]
        sums[name] = output["feature_terms"][name].detach()
    return LossOutput(total=total, sums=sums)
