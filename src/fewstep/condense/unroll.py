"""An optimizer that can be differentiated: SGD with momentum, unrolled, for any problem in two levels.

The inner problem is a loss of the weights ``theta``, which depends on outer variables (synthetic images, a learning
rate).  SGD with momentum makes the iterates::

    v_1 = g_1,   v_{k+1} = m v_k + g_{k+1},   theta_k = theta_{k-1} - eta v_k,   g_k = d loss / d theta at theta_{k-1}

each a differentiable function of the outer variables, because the graph of every ``g_k`` is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fewstep.networks.norms import batch_norms
from fewstep.randomness import Rng

#: The loss of the weights in an inner step (from 0); it may close over outer variables, and is called again in the
#: backward pass where steps are checkpointed: what is random in it must be drawn before.
Loss = Callable[[Tensor, int], Tensor]


class FlatNet(nn.Module):
    """A network as a function of one vector ``[P]`` of all its weights, in the order of ``parameters()``.

    Its buffers are those of ``net``.  ValueError for batch norm, whose statistics are no weights: a step would move
    them, and two networks of the same weights would differ.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        refuse_batch_norm(net)
        self.net = net
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the network of these weights makes of ``x`` ``[B, ...]``."""
        return functional_call(self.net, self.named(weights), (x,))

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """The vector as tensors by name: views, through which gradients flow."""
        parts = weights.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def perturbed(self, weights: Tensor, strength: float, rng: Rng) -> Tensor:
        """The weights with noise on every kernel of a convolution (a tensor of four dimensions): ``w + strength d / |d|
        w``, elementwise, for standard normal ``d``, whose norm is that of the whole tensor."""
        named = self.named(weights)
        for name, w in named.items():
            if w.ndim == 4:
                d = rng.normal_like(w)
                named[name] = w + strength * d / d.norm() * w
        return torch.cat([w.reshape(-1) for w in named.values()])


def vector_of(net: nn.Module) -> Tensor:
    """The weights of a network as one vector ``[P]`` of its own memory."""
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def refuse_batch_norm(net: nn.Module) -> None:
    """ValueError naming the first layer of batch norm."""
    for layer in batch_norms(net):
        name = next(name for name, module in net.named_modules() if module is layer)
        raise ValueError(
            f"layer '{name}' is a {type(layer).__name__}, whose statistics are no weights: use a network with instance "
            "or group norm, or none"
        )


def unroll(
    loss: Loss,
    start: Tensor,
    lr: Tensor,
    steps: int,
    momentum: float = 0.9,
    *,
    second_order: int | None = None,
    outer: Sequence[Tensor] | None = None,
) -> Iterator[Tensor]:
    """The iterates ``theta_1 .. theta_steps`` from the weights ``start`` ``[P]`` with the learning rate ``lr`` ``[]``.

    With ``second_order`` only the last so many steps keep the graph of their gradient: those before are constants for
    the outer variables, but for the learning rate, through which every step is still differentiated.  With ``outer``,
    the tensors that ``loss`` closes over and that are differentiated, steps are checkpointed: each keeps two vectors
    instead of its graph, and is computed again in the backward pass.  ValueError for a negative ``second_order``, and
    for a loss that reaches another tensor that asks for gradients.
    """
    if second_order is not None and second_order < 0:
        raise ValueError(f"second_order={second_order} must be at least 0: so many last steps keep their graph")
    theta = start if start.requires_grad else start.detach().requires_grad_()
    velocity = torch.zeros_like(theta)
    for k in range(steps):
        if second_order is not None and k < steps - second_order:
            slope = gradient(loss, theta.detach().requires_grad_(), k, graph=False)
        elif outer is not None:
            slope = RecomputedGradient.apply(loss, k, theta, *outer)
        else:
            slope = gradient(loss, theta, k, graph=True)
        velocity = momentum * velocity + slope
        theta = theta - lr * velocity
        yield theta


def gradient(loss: Loss, theta: Tensor, k: int, *, graph: bool) -> Tensor:
    """The gradient of the loss of step ``k`` in the weights, itself differentiable with ``graph``."""
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(theta, k), theta, create_graph=graph)
    return found


class RecomputedGradient(torch.autograd.Function):
    """:func:`gradient`, whose graph is made in the backward pass only, which is a product with second derivatives."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, k: int, theta: Tensor, *outer: Tensor) -> Tensor:
        ctx.loss, ctx.k, ctx.outer = loss, k, outer
        ctx.save_for_backward(theta)
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(theta, k)
            refuse_other_leaves(value, (theta, *outer))
            (found,) = torch.autograd.grad(value, theta)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        (theta,) = ctx.saved_tensors
        theta = theta.detach().requires_grad_()
        slope = gradient(ctx.loss, theta, ctx.k, graph=True)
        found = torch.autograd.grad(slope, (theta, *ctx.outer), direction, allow_unused=True)
        return None, None, *found


def refuse_other_leaves(value: Tensor, known: Sequence[Tensor]) -> None:
    """ValueError where ``value`` depends on a leaf that asks for gradients, other than through the ``known`` tensors:
    its gradient would be left out without a word."""
    ends = {tensor.grad_fn for tensor in known}
    seen, waiting = set(ends), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad" and not any(node.variable is leaf for leaf in known):  # type: ignore[attr-defined]
            shape = list(node.variable.shape)  # type: ignore[attr-defined]
            raise ValueError(f"the loss depends on a tensor {shape} that asks for gradients and is not among outer")
