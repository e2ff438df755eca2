"""Attention: its tangent and its gradients against the written-out form and differences, by tiles and by shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import run_on_two
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.method import Networks, Optimizer
from fewstep.networks import UNet, attention, attention_blocked
from fewstep.networks.attention import PLAIN_SCORES, Shard, attend, attend_shard, merge_shards
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow
from fewstep.tangents import ForwardRules, finite_difference, tangent
from fewstep.training.sharding import Sharded

BLOCKS = [(1, 1), (4, 5), (7, 3), (64, 64)]  # 13 queries and 11 keys: none divides both
Triple = tuple[Tensor, Tensor, Tensor]


def draws(seed: int = 0, m: int = 13, n: int = 11, d: int = 8, dv: int = 5, dtype=torch.float64) -> Triple:
    """Queries, keys and values for a batch of two with three heads."""
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, *s, dtype=dtype, generator=gen) for s in ((m, d), (n, d), (n, dv)))


def masks(m: int = 13, n: int = 11) -> dict[str, Tensor | None]:
    gen = torch.Generator().manual_seed(9)
    seen = torch.rand(2, 1, m, n, generator=gen) < 0.5
    seen[:, :, 4] = False  # a query that sees nothing
    added = torch.randn(3, m, n, dtype=torch.float64, generator=gen).masked_fill(~seen[1], -math.inf)
    return {
        "none": None,
        "bool": seen,
        "added": added,
        "causal": torch.ones(m, n).tril().bool(),
        "keys": seen[:, :, :1],
    }


def jvp(run: Callable[..., Any], primals: Triple, tangents: Triple) -> Any:
    return torch.func.jvp(run, primals, tangents)  # type: ignore[misc]


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("mask", masks())
def test_blocked_is_plain_forwards_tangent_and_backwards(mask: str, block: tuple[int, int]) -> None:
    """T1, T7 and T8 by tiles that do not divide the tokens, queries that see nothing included: no NaN anywhere."""
    primals, tangents, seen = draws(), draws(1), masks()[mask]
    value, slope = jvp(lambda *a: attend(*a, seen, kernel="plain"), primals, tangents)
    (out, _), (out_slope, _) = jvp(lambda *a: tuple(attend_shard(*a, seen, block=block)), primals, tangents)
    close(out, value)
    close(out_slope, slope)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()

    held = [p.requires_grad_() for p in primals]
    weight = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((attend(*held, seen, kernel="plain") * weight).sum(), held)
    close(torch.autograd.grad((attend_shard(*held, seen, block=block).out * weight).sum(), held), expected)
    assert all(torch.isfinite(g).all() for g in expected)
    with torch.no_grad():
        close(scaled_dot_product_attention(*primals, attn_mask=seen), value)


@pytest.mark.parametrize("kernel", ["plain", "blocked"])
def test_the_tangent_is_the_central_difference(kernel: attention.Kernel) -> None:
    """T2, along all three inputs at once."""
    primals, tangents = draws(), draws(1)
    _, slope = jvp(lambda *a: attend(*a, kernel=kernel, scale=0.7), primals, tangents)

    def at(h: float) -> Tensor:
        return attend(*(p + h * dp for p, dp in zip(primals, tangents, strict=True)), kernel=kernel, scale=0.7)

    step = 1e-3  # 4 and 2 points, extrapolated: error h^4
    near, far = (at(step) - at(-step)) / (2 * step), (at(2 * step) - at(-2 * step)) / (4 * step)
    close(slope, (4 * near - far) / 3, 1e-9)


def test_the_tangent_of_the_logsumexp_is_mu() -> None:
    """T3: against PyTorch's own derivative of logsumexp, and minus infinity where nothing is seen."""
    primals, tangents, seen = draws(), draws(1), masks()["bool"]
    scores = lambda q, k, v: (q @ k.mT / math.sqrt(8)).masked_fill(~seen, -math.inf).logsumexp(-1)  # noqa: E731
    sums, mu = jvp(scores, primals, tangents)
    (_, ours), (_, slope) = jvp(lambda *a: tuple(attend_shard(*a, seen, block=(4, 5))), primals, tangents)
    close(ours, sums)
    alive = seen.any(-1).expand(sums.shape)
    close(slope[alive], mu[alive])
    assert (slope[~alive] == 0).all() and (ours[~alive] == -math.inf).all()


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_merged_shards_are_the_whole(mask: str) -> None:
    """T4: for tangents that come as tensors and for those that PyTorch carries, and for gradients; parts of 3, 1 and 7
    keys, some of which some queries do not see."""
    primals, tangents, seen = draws(), draws(1), masks()[mask]
    cuts = [slice(0, 3), slice(3, 4), slice(4, 11)]

    def part(cut: slice, q: Tensor, k: Tensor, v: Tensor) -> Shard:
        return attend_shard(q, k[..., cut, :], v[..., cut, :], None if seen is None else seen[..., cut])

    def merged(*given: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(merge_shards([part(cut, *given) for cut in cuts])[0])

    def whole(*given: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(attend_shard(*given, seen))

    expected, slopes = jvp(whole, primals, tangents)
    pairs = [jvp(lambda *a, cut=cut: tuple(part(cut, *a)), primals, tangents) for cut in cuts]
    out, slope = merge_shards([Shard(*p) for p, _ in pairs], [Shard(*dp) for _, dp in pairs])
    close((*out, *slope), (*expected, *slopes), 4e-15)
    assert merge_shards([Shard(*p) for p, _ in pairs])[1] is None
    close(jvp(merged, primals, tangents), (expected, slopes), 4e-15)

    held = [p.requires_grad_() for p in primals]
    close(*(torch.autograd.grad(run(*held)[0].sin().sum(), held) for run in (merged, whole)), 4e-15)


def test_the_gradient_of_the_logsumexp() -> None:
    """What merging differentiates through, against PyTorch's own."""
    held = [p.requires_grad_() for p in draws()]
    ours = torch.autograd.grad(attend_shard(*held, block=(4, 5)).logsumexp.sin().sum(), held, allow_unused=True)
    sums = (held[0] @ held[1].mT / math.sqrt(8)).logsumexp(-1)
    close(ours[:2], torch.autograd.grad(sums.sin().sum(), held[:2]))
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("kernel", ["plain", "blocked"])
def test_the_tangent_is_linear(kernel: attention.Kernel) -> None:
    """T5: additive, zero for zero, and ``P v.`` for values alone; a missing tangent is a zero one."""
    primals, first, second = draws(), draws(1), draws(2)

    def slope(*tangents: Tensor) -> Tensor:
        return jvp(lambda *a: attend(*a, kernel=kernel), primals, tangents)[1]

    both = slope(*(a - 2 * b for a, b in zip(first, second, strict=True)))
    close(both, slope(*first) - 2 * slope(*second))
    zeros = [torch.zeros_like(p) for p in primals]
    assert (slope(*zeros) == 0).all()
    q, k, _ = primals
    close(slope(zeros[0], zeros[1], first[2]), (q @ k.mT / math.sqrt(8)).softmax(-1) @ first[2])
    for i in range(3):  # only one of the three carries a tangent at all
        alone = torch.func.jvp(
            lambda a, i=i: attend(*primals[:i], a, *primals[i + 1 :], kernel=kernel), (primals[i],), (first[i],)
        )[1]  # type: ignore[misc]
        close(alone, slope(*(first[j] if j == i else zeros[j] for j in range(3))))


@pytest.mark.parametrize("kernel", ["plain", "blocked"])
def test_one_vector_added_to_all_keys_changes_nothing(kernel: attention.Kernel) -> None:
    """T6: scores and their tangents move by a constant a query only; 100 times the size of a score."""
    (q, k, v), tangents = draws(), draws(1)
    shift = 40 * torch.ones(8, dtype=torch.float64)
    plain, moved = (jvp(lambda *a: attend(*a, kernel=kernel), (q, key, v), tangents) for key in (k, k + shift))
    close(moved, plain, 1e-11)


def test_tangents_leave_the_gradient_alone() -> None:
    """T8: the gradient of the primal is the same bits whether a tangent is carried or not, in either kernel."""
    for kernel in ("plain", "blocked"):
        held = [p.requires_grad_() for p in draws()]
        bare = torch.autograd.grad(attend(*held, kernel=kernel).sin().sum(), held)
        value, slope = jvp(lambda *a, kernel=kernel: attend(*a, kernel=kernel), tuple(held), draws(1))
        assert slope.abs().sum() > 0
        for a, b in zip(torch.autograd.grad(value.sin().sum(), held), bare, strict=True):
            assert torch.equal(a, b)


def test_derivatives_of_higher_order() -> None:
    """The gradient of a gradient, of a tangent, and the tangent of a gradient."""
    small = tuple(x[:1, :1].clone().requires_grad_() for x in draws(m=3, n=4, d=2, dv=2))
    fixed = draws(1, m=3, n=4, d=2, dv=2)
    run = lambda *a: attend_shard(*a, block=(2, 3)).out  # noqa: E731
    assert torch.autograd.gradgradcheck(run, small)
    assert torch.autograd.gradcheck(lambda *a: jvp(run, a, tuple(f[:1, :1] for f in fixed))[1], small)
    grads = lambda run: torch.func.grad(lambda q: run(q, *small[1:]).sin().sum())  # noqa: E731
    ways = [run, lambda *a: attend(*a, kernel="plain")]
    close(*(torch.func.jvp(grads(w), (small[0],), (fixed[0][:1, :1],)) for w in ways))


def test_vmap_and_dual_numbers() -> None:
    """A mapped dimension anywhere, over some of the inputs, inside and outside a jvp; and PyTorch's other interface."""
    (q, k, v), (tq, _, _) = draws(), draws(1)
    seen = masks()["bool"]
    for kernel in ("plain", "blocked"):
        run = lambda *a, kernel=kernel: attend(*a, kernel=kernel)  # noqa: E731
        expected = run(q, k[:1].expand(2, -1, -1, -1), v, seen)
        mapped = torch.vmap(run, (2, None, 0, 0))(q.movedim(0, 2), k[0], v, seen)
        close(mapped, expected)
        slope = torch.func.jvp(lambda q, run=run: run(q, k, v, seen), (q,), (tq,))[1]
        along = torch.vmap(lambda t, run=run: torch.func.jvp(lambda q: run(q, k, v, seen), (q,), (t,))[1])
        close(along(torch.stack([tq, 2 * tq])), torch.stack([slope, 2 * slope]))
        with forward_ad.dual_level():
            dual = run(forward_ad.make_dual(q, tq), k, v, seen)
            close(forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("kernel", ["plain", "blocked", "auto"])
def test_grouped_queries(kernel: attention.Kernel, mask: str) -> None:
    """Six heads of queries on three of keys are the repeated keys; also through a mask of one head's size."""
    (q, k, v), seen = draws(), masks()[mask]
    six = torch.cat([q, -q], 1)
    if mask == "added":
        seen = torch.cat([seen, -seen.masked_fill(seen == -math.inf, 0)])
    expected = attend(six, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), seen, kernel="plain")
    close(attend(six, k, v, seen, kernel=kernel), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["plain", "blocked"])
def test_half_precision_is_computed_in_float32(kernel: attention.Kernel, dtype: torch.dtype) -> None:
    """Value and tangent are those of float64 on the rounded inputs, to the rounding of the result alone, and autocast
    means the same as such inputs; scores of several hundred would overflow float16."""
    primals, tangents = draws(m=70, n=90, dv=8, dtype=torch.float32), draws(1, m=70, n=90, dv=8, dtype=torch.float32)
    primals = (20 * primals[0], 20 * primals[1], primals[2])
    low, low_tangents = (tuple(x.to(dtype) for x in given) for given in (primals, tangents))
    run = lambda *a: attend(*a, kernel=kernel)  # noqa: E731
    rough = jvp(run, low, low_tangents)
    exact = jvp(run, tuple(x.double() for x in low), tuple(x.double() for x in low_tangents))
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= 1.01 * b.abs() * torch.finfo(dtype).eps / 2 + 1e-4).all()
    with torch.autocast("cpu", dtype):
        cast = jvp(run, primals, tangents)
        held = [p.clone().requires_grad_() for p in primals]
        slopes = torch.autograd.grad(run(*held).float().sum(), held)
    assert all(torch.equal(a, b) for a, b in zip(cast, rough, strict=True))
    assert all(s.dtype == torch.float32 for s in slopes)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else (made,):
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // part.element_size())
        return made


def largest(work: Callable[[], Any]) -> int:
    with Largest() as seen:
        work()
    return seen.numbers


def test_memory_is_linear_in_the_tokens() -> None:
    """Forwards, in the tangent and backwards no tensor is larger than q or a tile; the written-out form has all
    scores.  "auto" under a tangent is the former, from the size on where it leaves the latter."""
    tokens, features = 1024, 16
    gen = torch.Generator().manual_seed(0)
    q, k, v, t = (torch.randn(1, 1, tokens, features, generator=gen) for _ in range(4))
    tile = attention_blocked.ROWS * attention_blocked.COLUMNS
    for kernel, bound in (("blocked", tile), ("auto", tile), ("plain", tokens**2)):
        run = lambda *a, kernel=kernel: attend(*a, kernel=kernel)  # noqa: E731
        assert largest(lambda run=run: jvp(run, (q, k, v), (t, t, t))) == bound, kernel
    small = attend_shard(*(x.requires_grad_() for x in (q, k, v)), block=(32, 64)).out
    assert largest(lambda: small.sum().backward()) == tokens * features
    assert tokens**2 > PLAIN_SCORES


def test_a_tile_is_bounded_over_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 24 samples of 16 heads go at once a tile has fewer queries, and the memory stays."""
    assert attention_blocked.block_for(torch.empty(24, 16, 4096, 64, device="meta")) == (85, 512)
    assert attention_blocked.block_for(torch.empty(4096, 64, device="meta")) == (256, 512)
    monkeypatch.setattr(attention_blocked, "NUMBERS", 2 * 3 * 512 * 20)
    primals, tangents = draws(m=64, n=600), draws(1, m=64, n=600)
    assert largest(lambda: jvp(lambda *a: attend(*a, kernel="blocked"), primals, tangents)) == 2 * 3 * 512 * 20


def unet(seed: int = 0) -> UNet:
    """With 256 tokens in its attention, too many for "plain"."""
    torch.manual_seed(seed)
    net = UNet((1, 32, 32), (8,), 1, 16).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    x, dx = torch.randn(2, 2, 1, 32, 32, dtype=torch.float64, generator=gen)
    return x, dx, torch.tensor([0.3, 1.1], dtype=torch.float64)


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that "auto" chooses, as they are chosen."""
    chosen: list[str] = []
    plain = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *a: chosen.append(plain(*a)) or chosen[-1])
    return chosen


def test_the_unet_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's without a tangent, by tiles with one, written out for few tokens; the tangent is the derivative."""
    chosen, net, (x, dx, t) = count(monkeypatch), unet(), pictures()
    value, slope = tangent(net, x, t, dx, torch.ones_like(t))
    assert chosen == ["blocked"]
    again, difference = finite_difference(net, x, t, dx, torch.ones_like(t), step=1e-5)
    close(value, again)
    close(slope, difference, 1e-7)
    few = UNet((1, 8, 8), (8,), 1, 16).double()
    tangent(few, x[..., :8, :8], t, dx[..., :8, :8], torch.ones_like(t))
    assert chosen == ["blocked"]


@pytest.mark.parametrize("masked", ["none", "causal", "bool"])
def test_pytorchs_attention_becomes_ours_in_a_tangent(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls ``scaled_dot_product_attention``, with every argument it has; outside, it stays PyTorch's."""
    chosen = count(monkeypatch)
    (q, k, v), (tq, _, _) = draws(m=150, n=150), draws(1, m=150, n=150)
    seen = masks(150, 150)["bool"] if masked == "bool" else None
    heads = torch.cat([q, q.flip(-1)], 1)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            x * t, k, v, attn_mask=seen, is_causal=masked == "causal", scale=0.4, enable_gqa=True
        )

    one, tangents = torch.tensor(1.0, dtype=torch.float64), torch.cat([tq, tq], 1)
    value, slope = tangent(field, heads, one, tangents, one)
    assert chosen == ["blocked"]
    again, difference = finite_difference(field, heads, one, tangents, one, step=1e-5)
    assert len(chosen) == 1
    close(value, again)
    close(slope, difference, 1e-8)


def test_what_has_no_tangent_stays_fused() -> None:
    """Attention in a tangent pass that does not depend on its inputs makes no scores either."""
    q, k, v = (x[..., :5].float() for x in draws(m=300, n=300))
    one = torch.ones(())
    with torch.no_grad():
        seen = largest(
            lambda: tangent(lambda x, t: x * scaled_dot_product_attention(q, k, v).sum(), one, one, one, one)
        )
    assert seen < 300**2


def test_attention_with_dropout_keeps_pytorchs_rule() -> None:
    """Dropout inside attention is PyTorch's matter: the tangent is still the derivative under equal masks."""
    (q, k, v), (tq, _, _) = draws(), draws(1)

    def field(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)
        return scaled_dot_product_attention(x, k, v, dropout_p=0.5)

    zero = torch.zeros((), dtype=torch.float64)
    _, slope = tangent(field, q, zero, tq, zero)
    _, difference = finite_difference(field, q, zero, tq, zero, step=1e-5)
    close(slope, difference, 1e-8)


class Checkpointed(torch.nn.Module):
    """A layer whose activations are thrown away and made again in the backward pass."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Tensor) -> Tensor:
        return checkpoint(self.layer, *given, use_reentrant=False)


def slopes(net: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def consistency_loss(net: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The tangent at a network, and the loss that pulls its output along."""
    x, dx, t = pictures()
    value, slope = tangent(net, x, t, dx, torch.ones_like(t))
    return slope, (net(x, t) - value + slope).square().mean()


def test_activation_checkpointing() -> None:
    """The tangent, and the gradient after it, of a U-Net whose blocks are checkpointed.  (One pass with both a graph
    and a tangent cannot be: PyTorch makes activations again outside of the jvp.)"""
    plain, thrifty = unet(), unet()
    for blocks in (thrifty.middle, thrifty.down):
        for i, layer in enumerate(blocks):
            blocks[i] = Checkpointed(layer)
    (slope, loss), (again, same) = consistency_loss(plain), consistency_loss(thrifty)
    assert torch.equal(slope, again)
    for a, b in zip(slopes(plain, loss), slopes(thrifty, same), strict=True):
        close(a, b)


def test_one_pass_may_carry_a_tangent_and_a_graph() -> None:
    """T8 through a network: the gradient of the value is that of a call without a tangent."""
    net, (x, dx, t) = unet(), pictures()
    with ForwardRules():
        value, slope = torch.func.jvp(lambda x_: net(x_, t), (x,), (dx,))  # type: ignore[misc]
    assert slope.abs().sum() > 0
    for a, b in zip(slopes(net, value.square().mean()), slopes(net, net(x, t).square().mean()), strict=True):
        close(a, b, 1e-11)


def sharded(rank: int, folder: Path) -> None:
    """One of two processes that hold a part each: how far tangent and gradients are from the whole network's."""
    whole = unet()
    made = NetworkDenoiser(unet(), TrigFlow(), TrigPrediction(), (1, 32, 32))
    nets = Networks({"model": made}, {"model": Optimizer(("model",), 1e-3)})
    parallel = Sharded(rank, 2)
    parallel.place(nets, torch.device("cpu"))
    (slope, loss), (again, same) = consistency_loss(whole), consistency_loss(made.net)
    same.backward()
    error = float((slope - again).abs().max())
    for p, g in zip(made.net.parameters(), slopes(whole, loss), strict=True):
        error = max(error, float((parallel.whole(p.grad) - g).abs().max()))
    (folder / str(rank)).write_text(str(error))


def test_a_network_that_is_cut_over_two_processes(tmp_path: Path) -> None:
    """``fully_shard``: tangent and gradients are those of the whole network."""
    run_on_two(sharded, tmp_path)
    assert max(float((tmp_path / str(rank)).read_text()) for rank in (0, 1)) < 1e-12


def test_what_does_not_fit_is_said() -> None:
    q, k, v = draws()
    for given, message in (
        (lambda: attend(q, k[..., :4], v), "are wanted"),
        (lambda: attend(q, k[..., :0, :], v[..., :0, :]), "N > 0"),
        (lambda: attend(q[:, :2], k, v), "leading dimensions"),
        (lambda: attend(q, k, v.float()), "one floating type"),
        (lambda: attend(q, k, v, torch.ones(12, 11)), r"mask \[12, 11\] cannot be broadcast to \[2, 3, 13, 11\]"),
        (lambda: attend(q, k, v, kernel="flash"), "kernel='flash': one of auto, plain, blocked, triton"),
        (lambda: attend(q, k, v, torch.zeros(13, 11, requires_grad=True), kernel="blocked"), "wants a gradient"),
        (lambda: attend_shard(q, k, v, block=(0, 4)), "at least one query"),
        (lambda: merge_shards([]), "no shard"),
        (lambda: merge_shards([attend_shard(q, k, v)], []), "0 tangents for 1 shards"),
    ):
        with pytest.raises(ValueError, match=message):
            given()
    bias = torch.zeros(150, 150, dtype=torch.float64)
    many = draws(m=150, n=150)
    with pytest.raises(ValueError, match="mask has a tangent"):
        torch.func.jvp(lambda b: attend(*many, b, kernel="blocked"), (bias,), (bias,))  # type: ignore[misc]
    learned = bias.requires_grad_()
    assert torch.autograd.grad(attend(*many, learned).sin().sum(), learned)[0].abs().sum() > 0


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/ideas/attention.md, and what its comments say that it prints."""
    page = (Path(__file__).parents[2] / "docs" / "ideas" / "attention.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    exec(code, {})
    said = [line.split("# ")[1] for line in code.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == said
