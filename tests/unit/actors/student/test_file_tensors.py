"""Tensors of a student under the names of its files: fused experts, buffers of a router, an export that is another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from actors.student.file_tensors import export_gap, in_files, persistent_buffers
from actors.student.trainer import Phase, StudentTrainer
from kdray.config import TrainingSettings
from kdray.errors import TrainingError
from kdray.models.random_models import VOCAB, RandomModel

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
IDS = tuple(range(3, 40))


def of_files(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a mapping


@pytest.mark.parametrize(
    "model",
    [
        RandomModel("qwen3_moe", config=EXPERTS),
        RandomModel("mixtral", config={"num_local_experts": 4, "sliding_window": None}),
        RandomModel("glm4_moe", config=ROUTED),
        RandomModel("gpt_neox", config={"num_key_value_heads": None, "head_dim": None}),
        RandomModel("llama", tied=True),
    ],
    ids=lambda model: model.model_type,
)
def test_published_tensors_are_those_of_the_files(model: RandomModel, tmp_path: Path) -> None:
    folder = model.write(tmp_path / "model")
    training = TrainingSettings.model_validate({"backend": {"type": "torch"}, "sync_bucket_mib": 0.05})
    trainer = StudentTrainer(training, VOCAB, 0)
    trainer.start_phase(Phase("sft", str(folder), None, None, 1e-3, 1))
    published: dict[str, torch.Tensor] = {}
    for bucket in trainer.weight_buckets():
        assert not published.keys() & bucket.keys()
        published |= bucket
    expected = of_files(folder)
    # A tied head has a name in some files, and weights of its own in none.
    assert expected.keys() - published.keys() <= {"lm_head.weight"}
    assert published.keys() <= expected.keys()
    for name, tensor in published.items():
        assert torch.equal(tensor, expected[name]), name


def test_buffers_of_the_checkpoint_alone_are_published(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(RandomModel("glm4_moe", config=ROUTED).write(tmp_path))
    (name,) = persistent_buffers(model)
    assert name.endswith("e_score_correction_bias")
    assert in_files(model, persistent_buffers(model)).keys() <= of_files(tmp_path).keys()


def test_an_export_that_lost_a_tensor_is_found(tmp_path: Path) -> None:
    folder = RandomModel("glm4_moe", config=ROUTED).write(tmp_path / "model")
    training = TrainingSettings.model_validate({"backend": {"type": "torch"}})
    trainer = StudentTrainer(training, VOCAB, 0)
    trainer.start_phase(Phase("sft", str(folder), None, None, 1e-3, 1))
    trainer.export(tmp_path / "export", ids=IDS)
    trained = trainer.log_probabilities(IDS)
    assert export_gap(tmp_path / "export", torch.float32, IDS, trained, VOCAB) is None
    # A buffer that transformers makes anew without a word: the correction of a router's scores.
    exported = tmp_path / "export" / "model.safetensors"
    tensors = of_files(tmp_path / "export")
    (lost,) = (name for name in tensors if name.endswith("e_score_correction_bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, exported, {"format": "pt"})
    message = export_gap(tmp_path / "export", torch.float32, IDS, trained, VOCAB)
    assert message is not None
    assert "the exported student, loaded anew, is another model than the one that was trained: log q differs by" in message


def test_a_student_whose_files_lack_a_tensor_is_not_trained_from_random_weights(tmp_path: Path) -> None:
    folder = RandomModel("llama").write(tmp_path / "model")
    tensors = of_files(folder)
    lost = "model.layers.1.mlp.down_proj.weight"
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors", {"format": "pt"}
    )
    trainer = StudentTrainer(TrainingSettings.model_validate({"backend": {"type": "torch"}}), VOCAB, 0)
    with pytest.raises(TrainingError, match=rf"its files lack {lost} \(1 tensors in all\)"):
        trainer.start_phase(Phase("sft", str(folder), None, None, 1e-3, 1))
