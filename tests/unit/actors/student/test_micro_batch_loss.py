"""Losses inside the output head of real architectures: the numbers of their own logits, in the memory of a chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3MoeConfig,
)

from actors.student.hidden_state_loss import hidden_state_loss, load_output_head
from actors.student.micro_batch_loss import MicroBatchLoss
from actors.student.output_head import AfterHead, UnknownHeadError
from cluster.diagnosis.meter import Storages
from kdray.config import ForwardKLLoss, MiniLLMLoss, ReverseKLLoss, TrainingSettings
from kdray.losses import LossOutput, Objective
from kdray.rollouts.batching import take_rows
from kdray.types import TrainBatch
from tests.unit.actors.student.test_backend_contract import batch_of
from tests.unit.actors.student.test_hidden_state_loss import batch_with_hidden

torch.set_num_threads(1)

VOCAB, PADDING, CHUNK = 29, 3, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB + PADDING,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "soft-capped": lambda: Gemma2Config(**SIZES, final_logit_softcapping=2.0, attn_implementation="eager"),
    "scaled up": lambda: CohereConfig(**SIZES, logit_scale=3.0),
    "scaled down": lambda: GraniteConfig(**SIZES, logits_scaling=6.0),
    "with a bias": lambda: PhiConfig(**SIZES),
    "experts": lambda: Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "another layout": lambda: GPT2Config(vocab_size=VOCAB + PADDING, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5),
    "a decoder inside": lambda: OPTConfig(**{**SIZES, "pad_token_id": 1}, ffn_dim=24, word_embed_proj_dim=16),
}
LOSSES = {
    "minillm": Objective.of(MiniLLMLoss()),
    "forward_kl": Objective.of(ForwardKLLoss(type="forward_kl")),
    "supervised": Objective.of(None),
}
BATCH = batch_of(1)
CPU = torch.device("cpu")


def student(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()


def computed(
    model: Any, loss: Objective, chunk: int, batch: TrainBatch = BATCH
) -> tuple[LossOutput, dict[str, torch.Tensor | None]]:
    """The loss, scaled as an update scales it, and the gradient of every parameter."""
    model.zero_grad()
    found = MicroBatchLoss(model, TrainingSettings(loss_chunk_tokens=chunk), VOCAB, CPU)
    assert found.refused is None
    output = found(model.__call__, batch, loss)
    (0.7 * output.total).backward()
    return output, {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_architecture_gives_the_numbers_of_its_own_logits(config: Callable[[], Any], loss: Objective) -> None:
    model = student(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms begin without a preference.
            parameter.add_(0.1 * torch.randn(parameter.shape))
    want, of_logits = computed(model, loss, 10_000)
    found, of_chunks = computed(model, loss, CHUNK)
    assert found.total.item() == pytest.approx(want.total.item(), rel=1e-5)
    assert {name: float(value) for name, value in found.sums.items()} == pytest.approx(
        {name: float(value) for name, value in want.sums.items()}, rel=1e-4, abs=1e-5
    )
    largest = max(float(gradient.abs().max()) for gradient in of_logits.values() if gradient is not None)
    for name, gradient in of_logits.items():
        if gradient is None:
            assert of_chunks[name] is None, name
        else:
            torch.testing.assert_close(of_chunks[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)
    assert "forward" not in vars(model.get_output_embeddings()), "the head gives logits again"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_follows_the_head_is_the_models_own(config: Callable[[], Any]) -> None:
    model = student(config)
    ids = torch.arange(7).unsqueeze(0)
    products: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *each: products.append(each[-1]))
    logits = model(ids, use_cache=False).logits[0]
    handle.remove()
    after = AfterHead(model)
    torch.testing.assert_close(after(products[0][0]), logits, rtol=0, atol=0)
    torch.testing.assert_close(after(products[0][0][2:4, :9]), logits[2:4, :9], rtol=0, atol=0)
    assert after.vocab == VOCAB + PADDING


def test_nothing_of_the_model_is_changed_by_the_twin() -> None:
    model = student(CONFIGS["llama"])
    before = {name: id(child) for name, child in model.named_modules()}
    AfterHead(model)
    assert {name: id(child) for name, child in model.named_modules()} == before


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bfloat16_is_as_close_to_the_exact_gradient_as_all_logits(loss: Objective) -> None:
    exact = student(CONFIGS["soft-capped"], torch.float64)
    half = student(CONFIGS["soft-capped"], torch.float64).bfloat16()
    exact.load_state_dict({name: each.double() for name, each in half.state_dict().items()})
    _, want = computed(exact, loss, 10_000)
    of_logits, of_chunks = (computed(half, loss, chunk)[1] for chunk in (10_000, CHUNK))
    for name, gradient in want.items():
        assert gradient is not None
        whole, chunked = of_logits[name], of_chunks[name]
        assert whole is not None
        assert chunked is not None
        size = gradient.norm()
        assert (chunked.double() - gradient).norm() / size < max(1.5 * (whole.double() - gradient).norm() / size, 0.05), name


# ------------------------------------------------------------------------------------------- heads that are not known


class Unknown(torch.nn.Linear):
    """A head that does more than multiply."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).log_softmax(-1)


def normalised(model: Any) -> None:
    """Rows of logits that depend on all of their columns."""
    forward = type(model).forward

    def with_softmax(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits.log_softmax(-1)
        return output

    model.__class__ = type("Normalised", (type(model),), {"forward": with_softmax})


def replaced(model: Any) -> None:
    head = Unknown(16, VOCAB + PADDING, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


def twice(model: Any) -> None:
    """Two heads' logits, averaged."""
    model.__class__ = type(
        "Twice",
        (type(model),),
        {"forward": lambda self, inputs_embeds, **_: self.lm_head(self.lm_head(inputs_embeds))},
    )


def needy(model: Any) -> None:
    """It wants more of its decoder than the last hidden state."""
    forward = type(model).forward
    model.__class__ = type(
        "Needy", (type(model),), {"forward": lambda self, **inputs: forward(self, **inputs) + self.model.layers[0].missing}
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced, "its output head is a Unknown, not a linear layer of its own"),
        (normalised, "Normalised: its logits are not an elementwise function"),
        (needy, "Needy: its output head cannot be run by itself: .* no attribute 'missing'"),
        (twice, "Twice: its forward pass uses its output head more than once"),
    ],
)
def test_a_head_that_is_not_known_is_named(change: Callable[[Any], None], reason: str) -> None:
    model = student(CONFIGS["llama"])
    change(model)
    with pytest.raises(UnknownHeadError, match=reason):
        AfterHead(model)


def test_a_head_that_is_not_known_falls_back_to_logits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = student(CONFIGS["llama"])
    normalised(model)
    loss = MicroBatchLoss(model, TrainingSettings(loss_chunk_tokens=CHUNK), VOCAB, CPU)
    with caplog.at_level(logging.WARNING):
        loss.log()
    assert "Normalised: its logits are not an elementwise function" in caplog.text
    assert "memory for the logits of a whole micro-batch" in caplog.text
    total = loss(model.__call__, BATCH, LOSSES["minillm"]).total
    # Normalising rows of a softmax changes nothing, up to the padded ids, which are cut after it.
    assert total.item() == pytest.approx(
        computed(student(CONFIGS["llama"]), LOSSES["minillm"], CHUNK)[0].total.item(), rel=1e-4
    )
    with pytest.raises(UnknownHeadError, match="Normalised"):
        _ = loss.chunks


def test_a_known_head_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MicroBatchLoss(student(CONFIGS["llama"]), TrainingSettings(), VOCAB, CPU).log()
    assert not caplog.records


def test_a_loss_that_reads_logits_gets_them() -> None:
    shapes = []

    def of_logits(logits: torch.Tensor, batch: Any) -> LossOutput:
        shapes.append(tuple(logits.shape))
        return LossOutput(logits.square().sum())

    computed(student(CONFIGS["llama"]), Objective("logits", of_logits), CHUNK)
    assert shapes == [(*BATCH.token_ids.shape, VOCAB + PADDING)]


def test_a_soft_capped_student_learns_from_hidden_states(tmp_path: Any) -> None:
    """Its own capping belongs to its rows, and does not bend the loss."""
    teacher, model = student(CONFIGS["llama"]), student(CONFIGS["soft-capped"])
    teacher.save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    settings = ReverseKLLoss(type="reverse_kl")
    head = load_output_head(str(tmp_path))
    vocab = 23
    found = hidden_state_loss(model.__call__, model, batch, settings, head, vocab)
    found.total.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    mask = torch.from_numpy(batch.loss_mask)
    states = torch.from_numpy(batch.columns["teacher_hidden"]).float()[mask]
    p = (states @ head.weight.T)[:, :vocab].log_softmax(-1)
    q = model(torch.from_numpy(batch.token_ids).long()).logits.roll(1, dims=1)[mask][:, :vocab].log_softmax(-1)
    want = (q.exp() * (q - p)).sum()
    want.backward()
    assert found.total.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- memory


def test_a_micro_batch_takes_the_memory_of_a_chunk() -> None:
    """Forward and backward of a whole model: twice the rows add what its layers keep, and no logits."""
    vocab, chunk = 20_000, 4
    model = student(lambda: LlamaConfig(**{**SIZES, "vocab_size": vocab}))
    loss = MicroBatchLoss(model, TrainingSettings(loss_chunk_tokens=chunk), vocab, CPU)
    whole = MicroBatchLoss(model, TrainingSettings(loss_chunk_tokens=10_000), vocab, CPU)
    peaks = {}
    for name, each, rows in (("half", loss, 4), ("all", loss, 8), ("logits", whole, 8)):
        model.zero_grad()
        with Storages().known(model.parameters()) as meter:
            each(model.__call__, take_rows(BATCH, np.arange(rows)), LOSSES["minillm"]).total.backward()
        peaks[name] = meter.peak
    assert peaks["all"] - peaks["half"] < chunk * vocab * 4
    assert peaks["logits"] > peaks["all"] + 3 * BATCH.num_target_tokens * vocab * 4
