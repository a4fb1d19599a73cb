"""Products of hidden states and an output head, in the dtype of both or kept in a wider one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear


def head_products(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """hidden @ head.T + bias, [..., vocab]; without gradient if `dtype` is wider.

    Args: hidden: [..., d]; head: [vocab, d], in the same dtype; bias: [vocab]; dtype: of the result; None keeps that of the
    states. Half-precision numbers have exact products in float32, so what a wider dtype saves is the rounding of their sum.
    """
    if dtype is None or dtype == hidden.dtype:
        return linear(hidden, head, bias)
    if hidden.is_cuda and dtype == torch.float32:
        # Tensor cores add up in float32 in either case. The other way would copy the whole head.
        flat = torch.mm(hidden.reshape(-1, hidden.shape[-1]), head.T, out_dtype=dtype)
        products = flat.reshape(*hidden.shape[:-1], len(head))
    else:
        products = linear(hidden.to(dtype), head.to(dtype))
    return products if bias is None else products + bias.to(dtype)


class WideProducts(torch.autograd.Function):
    """`head_products` in a wider dtype, with gradients in the dtype of states and head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, head, bias)
        return head_products(hidden, head, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, head, bias = ctx.saved_tensors
        wants_hidden, wants_head, wants_bias, _ = ctx.needs_input_grad
        narrow = grad.to(hidden.dtype).reshape(-1, grad.shape[-1])
        return (
            (narrow @ head).reshape(hidden.shape) if wants_hidden else None,
            narrow.T @ hidden.reshape(-1, hidden.shape[-1]) if wants_head else None,
            grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype) if bias is not None and wants_bias else None,
            None,
        )
