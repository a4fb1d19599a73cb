"""`training.logits: float32`: a half-precision student's logits are the exact products, with and without chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.student.output_head import Float32Head, UnknownHeadError, use_float32_head
from kdray.losses import Objective
from kdray.losses.head_products import WideProducts, head_products
from tests.unit.actors.student.test_micro_batch_loss import CHUNK, CONFIGS, LOSSES, Unknown, computed, student

CONFIG_NAMES = ("llama", "tied", "soft-capped", "scaled up", "with a bias")


def half(name: str, float32_logits: bool = False) -> Any:
    model = student(CONFIGS[name], torch.bfloat16)
    if float32_logits:
        use_float32_head(model)
    return model


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_logits_are_products_that_nothing_rounded(name: str) -> None:
    model = half(name, float32_logits=True)
    ids = torch.arange(7).unsqueeze(0)
    states: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, given, made: states.extend((given[0], made)))
    logits = model(ids, use_cache=False).logits
    handle.remove()
    head = model.get_output_embeddings()
    exact = states[0].double() @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double())
    assert states[1].dtype == logits.dtype == torch.float32
    assert (states[1] - exact).abs().max() < 1e-5
    assert (half(name)(ids, use_cache=False).logits - logits).abs().max() > 1e-4, "the model's own logits are as exact"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_chunks_give_the_loss_of_float32_logits(name: str, loss: Objective) -> None:
    model = half(name, float32_logits=True)
    want, of_logits = computed(model, loss, 10_000)
    found, of_chunks = computed(model, loss, CHUNK)
    # The states are the same, and so are the products: what is left is the order of a float32 sum.
    assert found.total.item() == pytest.approx(want.total.item(), rel=1e-5)
    for each, gradient in of_logits.items():
        chunked = of_chunks[each]
        assert gradient is not None
        assert chunked is not None
        assert gradient.dtype == torch.bfloat16
        assert (chunked - gradient).float().norm() < 0.02 * gradient.float().norm(), each
    narrow = computed(half(name), loss, CHUNK)[0].total.item()
    assert narrow != pytest.approx(want.total.item(), rel=1e-5), "rounded logits give the same loss"


def test_gradients_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    states, head, bias = (torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 3, 8), (5, 8), (5,)))
    weights = torch.randn(2, 3, 5)
    products = WideProducts.apply(states, head, bias, torch.float32)
    (products * weights).sum().backward()
    exact = [each.detach().double().requires_grad_() for each in (states, head, bias)]
    exact_products = head_products(*exact)
    torch.testing.assert_close(products.double(), exact_products, rtol=1e-5, atol=1e-5)
    (exact_products * weights).sum().backward()
    for made, wanted in zip((states, head, bias), exact, strict=True):
        assert made.grad is not None
        assert wanted.grad is not None
        assert made.grad.dtype == torch.bfloat16
        assert (made.grad.double() - wanted.grad).norm() < 0.01 * wanted.grad.norm()


def test_the_head_stays_tied_and_is_saved_under_its_name(tmp_path: Path) -> None:
    model = half("tied", float32_logits=True)
    assert isinstance(model.get_output_embeddings(), Float32Head)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = half("llama", float32_logits=True)
    assert untied.state_dict().keys() == half("llama").state_dict().keys()
    untied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)


def test_a_head_that_is_not_linear_is_refused_by_name() -> None:
    model = half("llama")
    model.lm_head = Unknown(16, 32, bias=False)
    with pytest.raises(UnknownHeadError, match="its output head is a Unknown, not a linear layer of its own"):
        use_float32_head(model)
