"""The forward-mode rules of :mod:`fewstep.tangents` against PyTorch's own, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from fewstep.tangents import ForwardRules, forward, tangent

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


W = drawn(8, seed=1)
CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "plus a tensor": (lambda x: x + W, (3, 8)),
    "a tensor plus": (lambda x: W + x, (3, 8)),
    "plus a number": (lambda x: x + 2, (3, 8)),
    "a number plus": (lambda x: 2.5 + x, (3, 8)),
    "minus a tensor": (lambda x: x - W, (3, 8)),
    "a tensor minus": (lambda x: W - x, (3, 8)),
    "a number minus": (lambda x: 1 - x, (3, 8)),
    "minus by name": (lambda x: torch.sub(W, x).sub(3.0), (3, 8)),
    "times a tensor": (lambda x: x * W, (3, 8)),
    "a tensor times": (lambda x: W * x, (3, 8)),
    "a number times": (lambda x: 0.3 * x, (3, 8)),
    "times by name": (lambda x: torch.mul(W, x).mul(W), (3, 8)),
    "over a tensor": (lambda x: x / W, (3, 8)),
    "a tensor over": (lambda x: W / x, (3, 8)),
    "a number over": (lambda x: 2 / x, (3, 8)),
    "over by name": (lambda x: torch.div(W, x).div(7), (3, 8)),
    "both have one": (lambda x: (x * x + x) / (x - x.square()), (3, 8)),
    "a small one that is spread": (lambda x: x + drawn(4, 3, 8, seed=2), (3, 8)),
    "a function with options": (lambda x: torch.add(x, W, alpha=3) + torch.div(x, W, rounding_mode=None), (3, 8)),
    "linear": (lambda x: functional.linear(x, drawn(5, 8, seed=3), drawn(5, seed=4)), (2, 3, 8)),
    "linear without bias": (lambda x: functional.linear(x, drawn(5, 8, seed=3)), (2, 8)),
    "weights that have one": (lambda x: functional.linear(W, x) + functional.layer_norm(W, (8,), x[0]).sum(), (3, 8)),
    "group norm": (lambda x: functional.group_norm(x, 4, W, 2 * W, eps=0.1), (2, 8, 3, 3)),
    "group norm of vectors": (lambda x: functional.group_norm(x, 2), (2, 8)),
    "group norm by name": (lambda x: functional.group_norm(x, num_groups=2, weight=W), (2, 8, 3)),
    "layer norm": (lambda x: functional.layer_norm(x, (8,), W, 2 * W, 0.1), (2, 3, 8)),
    "layer norm of two axes": (lambda x: functional.layer_norm(x, [3, 8], drawn(3, 8, seed=5)), (2, 3, 8)),
    "layer norm, bare": (lambda x: functional.layer_norm(x, (8,)), (2, 3, 8)),
    "rms norm": (lambda x: functional.rms_norm(x, (8,), W, 0.1), (2, 3, 8)),
    "rms norm, bare": (lambda x: functional.rms_norm(x, (8,)), (2, 3, 8)),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x + W, x * W), (2, 3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_rule_is_pytorchs(case: str) -> None:
    function, shape = CASES[case]
    x, dx = drawn(*shape, seed=6), drawn(*shape, seed=7)
    value, slope = forward(function, (x,), (dx,))
    expected: Any = torch.func.jvp(function, (x,), (dx,))  # type: ignore[misc]
    torch.testing.assert_close(value, expected[0], atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(slope, expected[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in {"weights that have one", "a function with options", "attention"}]
)
def test_nothing_is_made_for_what_has_no_tangent(case: str) -> None:
    """PyTorch's zeros for it are what costs."""
    function, shape = CASES[case]
    x = drawn(*shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward(function, (x,), (x,))
    assert not {event.key for event in profile.key_averages()} & {"aten::_efficientzerotensor", "prims::mul"}


def test_a_norm_keeps_layout_and_type() -> None:
    """Channels last, and half precision: computed in float32, a tangent of the type of its value."""
    x = drawn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    value, slope = tangent(lambda a, t: functional.group_norm(a, 4, W), x, torch.zeros(2), x.cos(), torch.zeros(2))
    expected: Any = torch.func.jvp(  # type: ignore[misc]
        lambda a: functional.group_norm(a, 4, W), (x.contiguous(),), (x.cos().contiguous(),)
    )
    torch.testing.assert_close((value, slope), expected, atol=1e-13, rtol=1e-12)
    half = [y.contiguous().bfloat16() for y in (x, x.cos())]
    with ForwardRules(), forward_ad.dual_level():
        made = forward_ad.unpack_dual(functional.group_norm(forward_ad.make_dual(*half), 4, W.float()))
    assert made.primal.dtype == made.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(made.tangent.double(), expected[1], atol=0.02, rtol=0.02)


def test_an_rms_norm_in_half_precision_has_the_eps_of_float32() -> None:
    """Where none is given: in the value as in the tangent, which small inputs show."""
    half = [0.1 * drawn(4, 8).bfloat16(), drawn(4, 8, seed=1).bfloat16()]
    with ForwardRules(), forward_ad.dual_level():
        made = forward_ad.unpack_dual(functional.rms_norm(forward_ad.make_dual(*half), (8,)))
    expected: Any = torch.func.jvp(lambda a: functional.rms_norm(a, (8,)), *((y.float(),) for y in half))  # type: ignore[misc]
    torch.testing.assert_close(made.primal.float(), expected[0], atol=0.01, rtol=0.01)
    torch.testing.assert_close(made.tangent.float(), expected[1], atol=0.1, rtol=0.01)
