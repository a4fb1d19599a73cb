"""Loss inside the student's output head: for the duration of a forward pass the head returns the loss instead of logits.

The head's weight is whole only in its own `forward` (a backend that shards weights gathers it around that call), which also
receives the hidden states that the model really passes to it. So logits of tokens x vocabulary are never materialised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

from actors.student.backend import Forward
from actors.student.features import unwrapped
from kdray.errors import TrainingError
from kdray.losses.head_products import WideProducts

HeadLoss = Callable[[Any, torch.Tensor], torch.Tensor]
"""(head, hidden states [B, S, d]) -> the loss, a scalar with gradient."""


class UnknownHeadError(TrainingError):
    """The way from the head's products to logits is not one that can be taken in chunks."""


class Float32Head(torch.nn.Linear):
    """Output head of a half-precision model whose logits are float32: the sums of its products are not rounded."""

    def __init__(self, head: torch.nn.Linear) -> None:
        """Args: head: whose parameters it takes over, the same objects."""
        # Without parameters of its own.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., vocab] float32. Args: input: [..., d]."""
        return cast(torch.Tensor, WideProducts.apply(input, self.weight, self.bias, torch.float32))


def use_float32_head(model: Any) -> None:
    """Put a `Float32Head` in the place of a model's output head. Raises: UnknownHeadError if that is not a linear layer."""
    head = model.get_output_embeddings()
    model.add_module(_name_of_head(model), Float32Head(head))


def logits_dtype(head: Any, hidden: torch.Tensor) -> torch.dtype:
    """Dtype of the logits that a head makes of hidden states."""
    return torch.float32 if isinstance(head, Float32Head) else hidden.dtype


def _name_of_head(model: Any) -> str:
    head, kind = model.get_output_embeddings(), type(model).__name__
    names = [name for name, child in model.named_children() if child is head]
    if not names or type(head).forward not in (torch.nn.Linear.forward, Float32Head.forward):
        raise UnknownHeadError(f"{kind}: its output head is a {type(head).__name__}, not a linear layer of its own")
    return str(names[0])


class AfterHead:
    """Computation from the head's products to logits by the student's own code: scaling, soft-capping, or nothing.

    The code is the model's `forward`, run on a twin without weights: its decoder passes on a placeholder, and its head returns
    the products.
    """

    def __init__(self, module: Any, device: torch.device | str = "cpu") -> None:
        """Args: module: the Hugging Face model, or its wrapper; device: of the products.

        Raises: UnknownHeadError if the head is not a plain linear layer of the model, or its products do not become logits
        element by element.
        """
        model = unwrapped(module)
        head = model.get_output_embeddings()
        self.kind = type(model).__name__
        name = _name_of_head(model)
        decoder = model.base_model_prefix
        if decoder not in dict(model.named_children()):
            raise UnknownHeadError(f"{self.kind}: it has no decoder named {decoder!r}")
        self.vocab: int = head.out_features
        self._products: list[torch.Tensor] = []
        # A copy of the object, not of its weights.
        self._twin = copy.copy(model)
        self._twin.__dict__["_modules"] = {
            **model._modules,
            decoder: _Placeholder(getattr(model, decoder)),
            name: self._pop,
        }
        self.slope = self._checked(torch.device(device))

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits [N, columns]. Args: products: [N, columns], of the head or of its first rows."""
        self._products.append(products.unsqueeze(0))
        # The class's function: no hooks of a backend run.
        states = products.new_zeros(1, 1, 1).expand(1, len(products), 1)
        logits: torch.Tensor = type(self._twin).forward(self._twin, inputs_embeds=states, use_cache=False).logits
        if self._products:
            raise UnknownHeadError(f"{self.kind}: its forward pass does not use its output head")
        return logits.squeeze(0)

    def _pop(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._products:
            raise UnknownHeadError(f"{self.kind}: its forward pass uses its output head more than once")
        return self._products.pop()

    def _checked(self, device: torch.device) -> float:
        """Derivative at 0, after a test that rows and columns do not influence each other."""
        generator = torch.Generator().manual_seed(0)
        products = (20.0 * torch.randn(3, 8, generator=generator)).to(device)
        products[0, 0] = 0.0
        products.requires_grad_()
        try:
            logits = self(products)
            cut = self(products[:2, :5])
            (slope,) = torch.autograd.grad(logits.sum(), products)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A forward pass of any shape: whatever it stumbles over, this way to its logits is not open.
            raise UnknownHeadError(f"{self.kind}: its output head cannot be run by itself: {error}") from error
        if logits.shape != products.shape or not torch.equal(logits[:2, :5], cut) or not float(slope[0, 0]):
            raise UnknownHeadError(f"{self.kind}: its logits are not an elementwise function of its output head's products")
        return float(slope[0, 0])


class _Placeholder:
    """Decoder that passes its input on as its last hidden state, with the attributes of the real one."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def __call__(self, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> _Output:
        return _Output((inputs_embeds,))

    @property
    def decoder(self) -> _Placeholder:
        """The part that some models call instead of the whole."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)


class _Output(tuple[torch.Tensor]):
    """Output of a decoder that has nothing but a last hidden state."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def loss_in_head(
    forward: Forward, module: Any, after_head: AfterHead, inputs: Mapping[str, Any], loss: HeadLoss
) -> tuple[torch.Tensor, Any]:
    """Run the forward pass with `loss` in the place of the head. Returns: the loss, and the module's output.

    Args: forward: runs the module through its backend; inputs: its keyword arguments.
    Raises: UnknownHeadError if the forward pass uses the head more than once, or not at all.
    """
    values: list[torch.Tensor] = []

    def in_place(head: Any, hidden: torch.Tensor) -> torch.Tensor:
        total = loss(head, hidden)
        values.append(total.detach())
        # The gradient has to take the way of the head's output, on which a backend prepares the head's weight for it. The
        # model's scaling or capping of logits maps 0 to 0, with a known slope.
        return (total - total.detach()).reshape(1, 1, 1)

    with _replaced(module.get_output_embeddings(), in_place):
        output = forward(**inputs)
    if len(values) != 1:
        raise UnknownHeadError(f"{after_head.kind}: its forward pass used its output head {len(values)} times, not once")
    carried = output.logits.reshape(())
    return values[0] + (carried - carried.detach()) / after_head.slope, output


@contextmanager
def _replaced(head: Any, function: HeadLoss) -> Iterator[None]:
    """Make `head(x)` return `function(head, x)`; its hooks, which gather and release its weight, run as usual."""
    head.forward = lambda hidden: function(head, hidden)
    try:
        yield
    finally:
        del head.forward
