"""Memory and rates against what can be counted, and plans for clusters that are not there."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from actors.weights.deltas import CHANGES
from cluster.cli import app
from cluster.diagnosis.meter import Storages
from cluster.planning.accelerators import ACCELERATORS, Accelerator
from cluster.planning.memory import (
    GIB,
    EngineMemory,
    Lengths,
    LossTensors,
    ModelShape,
    RankMemory,
    activation_bytes,
    engine_memory,
    loss_bytes,
    rank_memory,
)
from cluster.planning.placement import ACCELERATOR_LABEL, Node
from cluster.planning.plan import described_nodes, plan, table
from cluster.planning.publication import CHANGES as PUBLISHED_CHANGES
from cluster.planning.throughput import measured, sampling_rate, scoring_rate, training_rate
from kdray.config import Config, LoRASettings, MiniLLMLoss, RolloutSettings, TrainingSettings, load_config, parse_config
from kdray.errors import CapacityError, DataError
from kdray.losses import Objective, chunked_loss
from kdray.losses.features import predicting
from kdray.models.adapters import adapted_layers
from tests.support.loss_batches import built_in_losses, loss_batch
from tests.support.published_models import save_config

CLUSTERS = Path(__file__).parents[4] / "docs" / "clusters.md"
LLAMA_8B = {
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_32B = LLAMA_8B | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "vocab_size": 152064,
}


def _tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    for name, shape in (("student", LLAMA_8B), ("teacher", LLAMA_70B)):
        LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("student", "teacher")}


def _config(models: dict[str, str], **sections: Any) -> Config:
    training = sections.pop("training", {})
    tree: dict[str, Any] = {
        "run": {"name": "planned"},
        "data": {"max_prompt_tokens": 512},
        "student": {"model": models["student"]},
        "teachers": {
            "main": {"model": models["teacher"], "tensor_parallel_size": 4, "num_gpus": 4, "replicas": 2}
            | sections.pop("teacher", {})
        },
        "rollout": {"max_new_tokens": 512},
        "training": {
            "ranks": 8,
            "gpus_per_rank": 1,
            "precision": "bf16",
            "micro_batch_size": 2,
            "gradient_checkpointing": True,
        }
        | ({} if "backend" in training else {"zero_stage": 3})
        | training,
    }
    return parse_config(tree | sections)


def _nodes(count: int, kind: str, gpus: int = 8, **labels: str) -> list[Node]:
    return [Node({"CPU": 96, "GPU": gpus, f"accelerator_type:{kind}": 1}, {ACCELERATOR_LABEL: kind, **labels}, kind)] * count


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    model = _tiny(tied)
    assert ModelShape.of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_published_numbers_of_a_model_that_everybody_knows() -> None:
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B))
    assert shape.parameters == 8_030_261_248
    assert shape.kv_bytes(2) == 128 * 1024, "Llama 3 8B keeps 128 KiB a token in bfloat16"


def test_optimizer_gradients_and_weights_are_what_adamw_holds() -> None:
    model = _tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 100, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    )
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    found = rank_memory(ModelShape.of(model.config), TrainingSettings(micro_batch_size=2), Lengths(4, 4))
    assert (found.optimizer, found.gradients, found.weights) == (moments, gradients, gradients)


@pytest.mark.parametrize(
    ("stage", "divided"),
    [(0, ()), (1, ("optimizer",)), (2, ("optimizer", "gradients")), (3, ("optimizer", "gradients", "weights"))],
)
def test_zero_stages_divide_by_ranks(stage: int, divided: tuple[str, ...]) -> None:
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B))
    sizes = {"precision": "bf16", "ranks": 8, "micro_batch_size": 2}
    whole = rank_memory(shape, TrainingSettings.model_validate(sizes), Lengths(32, 32))
    found = rank_memory(shape, TrainingSettings.model_validate(sizes | {"zero_stage": stage}), Lengths(32, 32))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(found, part) == getattr(whole, part) / (8 if part in divided else 1)
    # Whoever sends weights has them whole, twice.
    sending = rank_memory(
        shape, TrainingSettings.model_validate(sizes | {"zero_stage": stage, "weight_transfer": "nccl"}), Lengths(32, 32)
    )
    assert sending.total - found.total == 4 * shape.parameters
    # 2 + 2 + 12 bytes a parameter is the ZeRO paper's count; here gradients are added up in float32.
    assert whole.weights + whole.gradients + whole.optimizer == (2 + 4 + 12) * shape.parameters


@pytest.mark.parametrize(("gpus", "optimizer"), [(1, 0), (0, 12 / 8)])
def test_an_offloaded_optimizer_takes_no_memory_of_the_gpu(gpus: int, optimizer: float) -> None:
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B))
    options = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    sizes = {"precision": "bf16", "ranks": 8, "micro_batch_size": 2, "gpus_per_rank": gpus}
    training = TrainingSettings.model_validate(sizes | {"backend": {"zero_stage": 2, "options": options}})
    assert rank_memory(shape, training, Lengths(32, 32)).optimizer == optimizer * shape.parameters


def test_an_adapter_alone_has_gradients_and_optimizer_states() -> None:
    config = LlamaConfig(**LLAMA_8B)
    layers = adapted_layers(config, LoRASettings(rank=16))
    # q, k, v, o, gate, up, down of 32 layers: rank x (inputs + outputs) each.
    hidden, kv, inner = 4096, 1024, 14336
    each = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert (len(layers.names), layers.parameters) == (7 * 32, 16 * 32 * each)
    whole = ModelShape.of(config)
    training = TrainingSettings.model_validate({"precision": "bf16", "micro_batch_size": 2})
    found = rank_memory(replace(whole, adapter=layers.parameters), training, Lengths(32, 32))
    full = rank_memory(whole, training, Lengths(32, 32))
    assert found.weights == 2 * (whole.parameters + layers.parameters)
    assert (found.gradients, found.optimizer) == (4 * layers.parameters, 12 * layers.parameters)
    assert found.activations == full.activations


def test_one_process_of_torch_holds_everything() -> None:
    """In bfloat16 the sums of gradients are float32, beside the optimizer's float32 copy and two moments."""
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B))
    torch_alone = {"backend": {"type": "torch"}}
    half = rank_memory(shape, TrainingSettings.model_validate(torch_alone | {"precision": "bf16"}), Lengths(32, 32))
    whole = rank_memory(shape, TrainingSettings.model_validate(torch_alone), Lengths(32, 32))
    assert half.weights + half.gradients + half.optimizer == (2 + 4 + 12) * shape.parameters
    assert whole == rank_memory(shape, TrainingSettings(), Lengths(32, 32)), "as DeepSpeed without sharding"


torch.set_num_threads(1)

LOSS_SIZES = [(2, 17, 8_000, 8, 32), (4, 33, 8_000, 8, 32), (2, 17, 20_000, 4, 128)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "length", "vocab", "chunk", "width"), LOSS_SIZES)
@pytest.mark.parametrize("loss", ["minillm", "reverse_kl", "uld", "sequence"])
def test_the_loss_takes_what_a_meter_finds(
    loss: str, rows: int, length: int, vocab: int, chunk: int, width: int, precision: str
) -> None:
    """Within a fifth, over numbers of tokens, vocabularies, chunks and widths."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = loss_batch(rows, length, vocab, width=12, dtype=torch.float32)
    states = torch.randn(rows, length, width).to(dtype).requires_grad_()
    head = torch.randn(vocab, width).to(dtype).requires_grad_()
    settings = next(each for each in built_in_losses() if each.type == loss)
    objective = Objective.of(settings)
    with Storages().known((states, head)) as meter:
        chunked_loss(states[predicting(batch.mask)], head, None, batch, objective, chunk).total.backward()
    shape = ModelShape(1, 1, width, 1, 1, vocab, 1, 1)
    training = TrainingSettings.model_validate({"loss_chunk_tokens": chunk, "precision": precision})
    tensors = LossTensors.of(settings, RolloutSettings(teacher_top_k=8, student_top_k=4))
    counted = loss_bytes(shape, training, int(batch.mask.sum()), rows * length, tensors)
    assert 0.8 < counted / meter.peak < 1.2


@pytest.mark.parametrize("tokens", [17, 65])
def test_whole_logits_take_what_a_meter_finds(tokens: int) -> None:
    """For a loss that reads them, and for a micro-batch that is no more than a chunk."""
    vocab, width = 2_000, 16
    batch = loss_batch(2, tokens, vocab, width=12, dtype=torch.float32)
    states, head = torch.randn(2, tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    objective = Objective.of(MiniLLMLoss())
    with Storages().known((states, head)) as meter:
        objective.of_logits((states @ head.T).roll(1, dims=1), batch).total.backward()
    shape, targets = ModelShape(1, 1, width, 1, 1, vocab, 1, 1), int(batch.mask.sum())
    for training, loss in (
        (TrainingSettings(), LossTensors()),
        (TrainingSettings(loss_chunk_tokens=1), LossTensors(chunks=False)),
    ):
        assert 0.8 < loss_bytes(shape, training, targets, 2 * tokens, loss) / meter.peak < 1.25


def test_the_loss_of_long_responses_does_not_grow_with_tokens_times_vocabulary() -> None:
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B))
    training = TrainingSettings.model_validate({"precision": "bf16", "micro_batch_size": 1})
    short, long = (rank_memory(shape, training, Lengths(64, length)).logprobs for length in (1024, 8192))
    assert long - short == 4 * (8192 - 1024) * 4096 * 2, "states"
    assert long < 4 * GIB
    assert rank_memory(shape, training, Lengths(64, 8192), loss=LossTensors(chunks=False)).logprobs > 23 * GIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    """Within a fifth, as all that a plan counts."""
    model, tokens = _tiny().to(dtype), 4 * 64
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(torch.randint(0, 100, (4, 64))).last_hidden_state
    assert hidden.requires_grad
    modelled = activation_bytes(ModelShape.of(model.config), tokens, dtype.itemsize, False)
    assert 0.8 < modelled / sum(kept.values()) < 1.2
    checkpointed = activation_bytes(ModelShape.of(model.config), tokens, dtype.itemsize, True)
    assert checkpointed < modelled / 2


def test_an_engine_keeps_what_is_left_for_keys_and_values() -> None:
    teacher, student = ModelShape.of(LlamaConfig(**LLAMA_70B)), ModelShape.of(LlamaConfig(**LLAMA_8B))
    found = engine_memory([teacher, student], 2, 4, 128, 4096, 67 * GIB)
    assert found.weights == pytest.approx((teacher.parameters + student.parameters) * 2 / 4)
    assert found.needed + found.kv_room == pytest.approx(67 * GIB)
    assert found.kv_tokens == int(found.kv_room / ((teacher.kv_bytes(2) + student.kv_bytes(2)) / 4))


def test_a_gpu_holds_at_least_one_key_value_head() -> None:
    """With fewer heads than GPUs, each head is held more than once: the cache of a GPU no longer shrinks."""
    shape = ModelShape.of(LlamaConfig(**LLAMA_8B | {"num_key_value_heads": 2}))
    whole = shape.kv_bytes(2)
    assert [shape.kv_bytes(2, gpus) for gpus in (1, 2, 4, 8)] == [whole, whole / 2, whole / 2, whole / 2]
    found = engine_memory([shape, shape], 2, 8, 128, 4096, 67 * GIB)
    assert found.kv_per_token == whole
    # The GPUs together read every copy.
    gpu, lengths = Accelerator(80, 1000, 2000), Lengths(0, 100)
    seconds = (shape.parameters * 2 + 50 * 4 * whole) / (8 * 0.6 * 2e12)
    assert sampling_rate([shape], gpu, 8, 1, lengths, 2) == pytest.approx(1 / seconds)


def test_latent_attention_caches_one_latent_on_every_gpu() -> None:
    """DeepSeek-V3: 512 + 64 numbers a layer and token, 61 layers, 70,272 bytes in bfloat16."""
    shape = ModelShape.of(
        DeepseekV3Config(num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64, hidden_size=64, n_routed_experts=8)
    )
    assert shape.kv_bytes(2) == shape.kv_bytes(2, 8) == 61 * 576 * 2


def test_rates_follow_the_roofline() -> None:
    shape, gpu, lengths = ModelShape.of(LlamaConfig(**LLAMA_8B)), Accelerator(80, 1000, 2000), Lengths(0, 100)
    # One sequence: the weights are read once a token.
    seconds = (shape.parameters * 2 + 50 * shape.kv_bytes(2)) / (0.6 * 2e12)
    assert sampling_rate([shape], gpu, 1, 1, lengths, 2) == pytest.approx(1 / seconds)
    assert sampling_rate([shape, shape], gpu, 1, 1, lengths, 2) == pytest.approx(0.5 / seconds)
    assert sampling_rate([shape], gpu, 2, 1, lengths, 2) == pytest.approx(2 / seconds)
    assert scoring_rate([shape], gpu, 1, Lengths(100, 100)) == pytest.approx(0.6e15 / (4 * shape.parameters))
    assert training_rate(shape, gpu, 4, lengths, False) == pytest.approx(4 * 0.35e15 / (6 * shape.parameters))
    assert training_rate(shape, gpu, 4, lengths, True) == pytest.approx(4 * 0.35e15 / (8 * shape.parameters))


METRICS = {
    "response_tokens": 10.0,
    "tokens_per_s": 100.0,
    "wait_rollout_s": 3.0,
    "wait_teacher_s": 1.0,
    "teacher_replicas": 2.0,
}


def test_measured_rates_leave_waits_out(tmp_path: Path) -> None:
    def of(*lines: dict[str, Any]) -> Path:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"torn')
        return tmp_path / "metrics.jsonl"

    line = METRICS
    slow = line | {"tokens_per_s": 1.0}
    found = measured(of(slow, line, line, line | {"step": 3, "teacher/main/wait_s": 1.0}), batch_size=64)
    # 640 tokens in 6.4 s a step, 4 of them waiting; the first quarter is not counted.
    assert found.supply == pytest.approx(100)
    assert found.training == pytest.approx(640 / 2.4)
    assert (found.waits, found.replicas) == (pytest.approx(4 / 6.4), 2)
    with pytest.raises(ValueError, match="too few"):
        measured(of(line, line, line), 64)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*wait_rollout_s"):
        measured(of(line, {"tokens_per_s": 1.0, "response_tokens": 1.0}, line, line), 64)


def test_measured_rates_of_a_long_run_take_no_memory(tmp_path: Path) -> None:
    line = METRICS
    (tmp_path / "metrics.jsonl").write_text((json.dumps(line | {"other": [0.5] * 100}) + "\n") * 10_000)
    tracemalloc.start()
    try:
        measured(tmp_path / "metrics.jsonl", 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2e5, "the lines of 6 MB are held"


def test_a_plan_places_roles_by_label_and_names_the_bottleneck(models: dict[str, str]) -> None:
    config = _config(models, teacher={"labels": {"role": "t"}}, training={"labels": {"role": "s"}})
    found = plan(config, [*_nodes(1, "H100", role="t"), *_nodes(1, "A100-80G", role="s")])
    teacher, student = found.roles
    assert list(teacher.nodes.values()) == [2]
    assert "H100" in next(iter(teacher.nodes))
    assert "A100-80G" in next(iter(student.nodes))
    text = "\n".join(found.lines)
    assert "bottleneck: " in text
    assert teacher.rate is not None
    assert student.rate is not None
    assert ("bottleneck: student" in text) == (teacher.rate > student.rate)
    assert "warning" not in text, "70B to 8B is no gap"
    assert student.does == "trains, ZeRO 3, bf16"


def _on_cpus(models: dict[str, str], teacher: dict[str, Any], **training: Any) -> Config:
    return _config(
        models,
        teacher={"tensor_parallel_size": 1, "num_gpus": 0, "num_cpus": 1, "replicas": 1, **teacher},
        training={"ranks": 1, "gpus_per_rank": 0, "cpus_per_rank": 1, "precision": "fp32", "zero_stage": 0, **training},
    )


def test_on_cpus_the_bottleneck_is_named_by_ratios_alone(models: dict[str, str]) -> None:
    """As many cores for the student make it slower than one for the teacher; no rate of cores is shown."""
    node = [Node({"CPU": 64}, {}, "this machine")]
    found = plan(_on_cpus(models, {}), node)
    text = "\n".join(found.lines)
    assert "nothing is known" not in text
    assert "bottleneck: teacher main; the student would wait" in text
    assert "modelled for CPUs of one kind" in text
    assert "kdray plan CONFIG --run RUN" in text
    assert not any("tokens/s" in row for column in table(found).values() for row in column)
    assert "tokens/s" not in text
    turned = plan(_on_cpus(models | {"teacher": models["student"]}, {"num_cpus": 60}), node)
    assert "bottleneck: student; teacher main gives" in "\n".join(turned.lines)
    mixed = _on_cpus(models, {}, gpus_per_rank=1, ranks=8, precision="bf16", zero_stage=3)
    (line,) = [line for line in plan(mixed, [*node, *_nodes(1, "H200")]).lines if line.startswith("rates: ")]
    assert "those of CPUs (teacher main) are not known beside GPUs'" in line


def test_a_teacher_far_larger_than_its_student_is_warned_of(models: dict[str, str], tmp_path: Path) -> None:
    small = LLAMA_8B | {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaConfig(**small).save_pretrained(tmp_path / "small")
    found = plan(_config(models | {"student": str(tmp_path / "small")}), _nodes(2, "H100"))
    assert any(line.startswith("warning: teacher main has ") for line in found.lines)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teacher": {"tensor_parallel_size": 1, "num_gpus": 1}},
            r"teachers.main: a replica needs 1\d\d\.\d GiB .* set teachers.main.tensor_parallel_size=4 and num_gpus=4",
        ),
        ({"training": {"zero_stage": 0}}, r"training: a rank needs 1\d\d.*it fits with training.backend.zero_stage=1"),
        (
            {"training": {"ranks": 1, "micro_batch_size": 64}},
            r"training: a rank needs .*it fits with training.ranks=2, training.micro_batch_size=\d+",
        ),
        (
            {"training": {"ranks": 1, "micro_batch_tokens": 2**19}},
            r"training: a rank needs .*it fits with training.ranks=2, training.micro_batch_tokens=\d+",
        ),
        (
            # No number of ranks and no stage is a remedy for a backend that has neither.
            {"training": {"backend": {"type": "torch"}, "ranks": 1, "micro_batch_size": 64}},
            r"training: a rank needs .*use GPUs with more memory, or a smaller student",
        ),
        ({"teacher": {"replicas": 5}}, r"teachers.main.replicas=5 x 4"),
        ({"teacher": {"labels": {"zone": "b"}}}, r"labels zone=b on one node, and no node has these labels"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(models: dict[str, str], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        plan(_config(models, **sections), _nodes(2, "H100"))


def test_the_remedy_that_a_refusal_names_is_one(models: dict[str, str]) -> None:
    plan(_config(models, training={"zero_stage": 1}), _nodes(2, "H100"))


def test_the_weakest_node_that_may_be_taken_counts(models: dict[str, str]) -> None:
    """Without a label, Ray may put the ranks on the small GPUs."""
    nodes = [*_nodes(2, "H100"), *_nodes(4, "T4")]
    with pytest.raises(CapacityError, match=r"training: a rank needs .* has 15.0 GiB"):
        plan(_config(models, teacher={"accelerator_type": "H100"}), nodes)
    plan(_config(models, teacher={"accelerator_type": "H100"}, training={"accelerator_type": "H100"}), nodes)


def test_a_pool_that_may_outgrow_its_cluster_is_noted(models: dict[str, str]) -> None:
    teacher = {"autoscaling": {"min_replicas": 1, "max_replicas": 9}}
    assert any(
        "may grow to 9" in line and "cluster.may_grow=true" in line
        for line in plan(_config(models, teacher=teacher), _nodes(2, "H100")).lines
    )
    growing = _config(models, teacher=teacher, cluster={"may_grow": True})
    assert any("nodes are asked for" in line for line in plan(growing, _nodes(2, "H100")).lines)


def test_nodes_that_may_still_come_are_a_note(models: dict[str, str]) -> None:
    found = plan(_config(models, cluster={"may_grow": True}), [Node({"CPU": 1})])
    assert found.roles == []
    assert "cluster.may_grow=true asks for more: teachers.main.replicas" in found.lines[0]


def test_replicas_that_share_a_gpu_may_not_take_more_than_it_has(models: dict[str, str]) -> None:
    half = {"model": models["student"], "num_gpus": 0.5, "tensor_parallel_size": 1}
    with pytest.raises(CapacityError, match=r"teachers.main.num_gpus=0.5 puts 2 replicas on a GPU.*lower that to 0.5 or less"):
        plan(_config(models, teacher=half), _nodes(2, "H100"))
    plan(_config(models, teacher=half | {"gpu_memory_utilization": 0.45}), _nodes(2, "H100"))


def test_512_nodes_with_4096_gpus(models: dict[str, str]) -> None:
    teacher = {"replicas": 512, "labels": {"role": "t"}}
    training = {"ranks": 2048, "batch_size": 4096, "labels": {"role": "s"}, "sft": {"batch_size": 4096}}
    found = plan(
        _config(models, teacher=teacher, training=training), [*_nodes(256, "H100", role="t"), *_nodes(256, "H200", role="s")]
    )
    assert [sum(role.nodes.values()) for role in found.roles] == [512, 2048]


def test_the_command_reads_a_described_cluster_and_a_run(models: dict[str, str], tmp_path: Path) -> None:
    recipe, cluster = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(_config(models).dump())
    cluster.write_text("nodes:\n- {count: 2, cpus: 96, gpus: 8, accelerator_type: H100, memory_gib: 900}\n")
    result = CliRunner().invoke(app, ["plan", str(recipe), "--cluster", str(cluster)])
    assert result.exit_code == 0, result.output
    assert "bottleneck" in result.output
    cluster.write_text("nodes:\n- {count: 1, cpus: 96, gpus: 4, accelerator_type: H100}\n")
    result = CliRunner().invoke(app, ["plan", str(recipe), "--cluster", str(cluster)])
    assert result.exit_code == 2
    assert "16 GPU" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nodes: []", "nodes"),
        ("nodes: [{cpu: 3}]", "cpu"),
        ("- 1", "cluster.yaml"),
        ("nodes: [", "cannot be read"),
    ],
)
def test_a_described_cluster_that_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        described_nodes(path)


def test_every_accelerator_is_one_that_ray_knows() -> None:
    from ray.util.accelerators import accelerators

    assert set(ACCELERATORS) <= {value for name, value in vars(accelerators).items() if name.isupper()}


def _counted(config: dict[str, Any], linear: float, parallel: int) -> float:
    """Bytes of a model's weights on one of the GPUs that share it, tensor by tensor of a model without weights.

    Args: linear: bytes of a weight of a layer's linear modules; others have two, and norms are on every GPU.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{name: each for name, each in config.items() if name != "quantization_config"}))
    found = 0.0
    for name, module in model.named_modules():
        each = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            found += each / parallel * (linear if "proj" in name else 2)
        else:
            found += 2 * each
    return found


FP8 = {"quantization_config": {"quant_method": "fp8"}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
WORKED = [
    pytest.param(LLAMA_70B | FP8, 1 + 2 / 4096, 8, (2, "H100", 8), 8, id="70B FP8 on 8 H100"),
    pytest.param(QWEN_32B, 2.0, 4, (1, "H100", 8), 4, id="32B bf16 on 4 H100"),
    pytest.param(LLAMA_70B | AWQ, 0.5 + 2 / 128, 4, (2, "L40S", 4), 4, id="70B int4 on 4 L40S"),
]
"""Teacher, bytes of a weight of its layers, GPUs of its replica; nodes, their kind and GPUs; ranks of the 8B student."""


@pytest.mark.parametrize(("teacher", "weight", "parallel", "nodes", "ranks"), WORKED)
def test_a_large_teacher_with_an_8b_student(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    teacher: dict[str, Any],
    weight: float,
    parallel: int,
    nodes: tuple[int, str, int],
    ranks: int,
) -> None:
    """Replica and ranks of the worked examples, on their nodes, as docs/clusters.md has them."""
    for name, shape in (("teacher", teacher), ("student", LLAMA_8B)):
        LlamaConfig(**shape, max_position_embeddings=16384).save_pretrained(tmp_path / name)
    engine = {"tensor_parallel_size": parallel, "num_gpus": parallel, "replicas": 1, "max_num_seqs": 256}
    config = _config(
        {name: str(tmp_path / name) for name in ("teacher", "student")},
        teacher=engine,
        rollout={"max_new_tokens": 8192},
        training={"ranks": ranks, "micro_batch_size": 1},
    )
    count, kind, gpus = nodes
    found = {role.bundle.role: role for role in plan(config, _nodes(count, kind, gpus=gpus)).roles}
    replica, rank = found["teacher main"].memory, found["student"].memory
    assert isinstance(replica, EngineMemory)
    assert isinstance(rank, RankMemory)
    student = _counted(LLAMA_8B, 2.0, parallel)
    assert replica.weights == pytest.approx(_counted(teacher, weight, parallel) + student, rel=0.01)
    whole = _counted(LLAMA_8B, 2.0, 1) / 2
    assert (rank.weights, rank.gradients, rank.optimizer) == tuple(size * whole / ranks for size in (2, 4, 12))
    limit = found["student"].memory_limit
    assert limit is not None
    assert rank.total < limit
    responses = int(replica.kv_tokens / (8192 + 512))
    row = (
        f"| {gpus if count == 1 else f'{count} x {gpus}'} {kind} | {replica.weights / GIB:.1f} GiB | "
        f"{replica.kv_per_token / 1024:.0f} KiB | {responses} | {rank.total / GIB:.1f} of {limit / GIB:.1f} GiB |"
    )
    name = request.node.callspec.id.split(" on ")[0]
    (shown,) = (line for line in CLUSTERS.read_text().splitlines() if line.startswith("| " + name.replace("B ", "B in ", 1)))
    assert shown.endswith(row), f"docs/clusters.md shows {shown}, and the plan says {row}"


def test_publication_is_counted_and_a_small_object_store_is_named(models: dict[str, str], tmp_path: Path) -> None:
    """Two replicas on one node of 8 GPUs, the ranks on another of the same kind: two versions are 29.9 GiB."""
    described = tmp_path / "cluster.yaml"
    kinds = "nodes: [{count: 3, cpus: 32, gpus: 8, accelerator_type: H100, object_store_gib: 29}]"
    described.write_text(kinds)
    config = _config(models, training={"ranks": 8, "gpus_per_rank": 1, "precision": "bf16"})
    version = ModelShape.of(LlamaConfig(**LLAMA_8B)).parameters * 2 / GIB
    lines = plan(config, described_nodes(described)).lines
    (told,) = (line for line in lines if line.startswith("publication: "))
    assert f"has {version:.2f} GiB" in told
    assert f"{3 * version:.2f} GiB on rank 0's node" in told
    assert f"{4 * version:.2f} on a node of replicas" in told
    (note,) = (line for line in lines if "object store" in line and line.startswith("note: "))
    assert f"has 29.00 GiB, and 2 versions of the student {2 * version:.2f}" in note
    assert "(on 2 such nodes)" in note
    described.write_text(kinds.replace("object_store_gib: 29", "memory_gib: 100"))
    assert not any("note: the object store" in line for line in plan(config, described_nodes(described)).lines), (
        "30 GiB hold it"
    )
    assert CHANGES == PUBLISHED_CHANGES
    by_changes = config.model_copy(update={"training": config.training.model_copy(update={"sync_full_every": 10})})
    lines = plan(by_changes, described_nodes(described)).lines
    (told,) = (line for line in lines if line.startswith("publication: "))
    assert f"{4.5 * version:.2f} GiB on rank 0's node" in told
    assert f"{4.5 * version:.2f} on a node of replicas" in told
    (note,) = (line for line in lines if "object store" in line and line.startswith("note: "))
    assert f"has 30.00 GiB, and 2 versions of the student with changes {2.5 * version:.2f}" in note
    # Queries and values of all heads; an update brings their weights alone, though a phase begins with all.
    lora = LoRASettings(target_modules=["q_proj", "v_proj"])
    update = 32 * 4096 * (4096 + 1024) * 2 / GIB
    for every, copies, changes in ((1, 0.0, 0.0), (10, update, 0.5 * update)):
        settings = config.training.model_copy(update={"lora": lora, "sync_full_every": every})
        lines = plan(config.model_copy(update={"training": settings}), described_nodes(described)).lines
        (told,) = (line for line in lines if line.startswith("publication: "))
        assert f"has {version:.2f} GiB, of which every update sends {update:.2f}; " in told
        assert f"{3 * version + copies + changes:.2f} GiB on rank 0's node" in told
        assert f"{4 * version + changes:.2f} on a node of replicas" in told


@pytest.mark.parametrize(
    ("shares", "utilisation", "fits"),
    [((0.5, 0.5), 0.5, True), ((0.5, 0.5), 0.85, False), ((0.9, 0.5), 0.85, True), ((0.4, 0.2), 0.5, False)],
)
def test_parts_that_share_a_gpu_fit_into_it_together(
    tmp_path: Path, shares: tuple[float, float], utilisation: float, fits: bool
) -> None:
    """A 3B teacher, with the 0.5B student beside it, and the rank on one L40S; a second replica may come onto the same GPU."""
    small = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    large = LLAMA_8B | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    for name, shape in (("student", small), ("teacher", large)):
        LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(tmp_path / name)
    replicas = 2 if shares[0] < 0.5 else 1
    teacher = {"tensor_parallel_size": 1, "num_gpus": shares[0], "gpu_memory_utilization": utilisation, "replicas": replicas}
    config = _config(
        {name: str(tmp_path / name) for name in ("student", "teacher")},
        teacher=teacher,
        training={"ranks": 1, "gpus_per_rank": shares[1], "zero_stage": 2},
    )
    nodes = _nodes(1, "L40S", gpus=1 if fits and sum(shares) <= 1 else 2)
    if fits:
        assert {role.bundle.role for role in plan(config, nodes).roles} == {"teacher main", "student"}
        return
    with pytest.raises(CapacityError, match=r"on one GPU of 44\.\d GiB, and they need") as refused:
        plan(config, nodes)
    message = str(refused.value)
    assert f"{replicas} x teacher main" in message
    assert "1 x student" in message
    lower = float(message.partition("gpu_memory_utilization to ")[2].split(",")[0])
    assert 0.1 < lower < utilisation
    changed = config.model_copy(
        update={"teachers": {"main": config.teachers["main"].model_copy(update={"gpu_memory_utilization": lower})}}
    )
    assert plan(changed, nodes).roles


def test_the_recipe_for_one_gpu_fits_into_48_gb(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[4] / "configs" / "gsm8k_one_gpu.yaml"
    named = {"student": "Qwen/Qwen2.5-0.5B-Instruct", "teachers.math": "Qwen/Qwen2.5-7B-Instruct"}
    given = [f"{role}.model={save_config(model, tmp_path)}" for role, model in named.items()]
    found = plan(load_config(recipe, given), _nodes(1, "L40S", gpus=1))
    teacher, student = found.roles
    assert isinstance(teacher.memory, EngineMemory)
    assert teacher.memory.kv_tokens > 64 * 1024, "a batch of the longest sequences is not held at once"
    assert teacher.memory_bytes + student.memory_bytes < ACCELERATORS["L40S"].memory_gib * GIB
