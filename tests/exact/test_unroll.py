"""The unrolled optimizer: its iterates are SGD's, its gradients those of finite differences, however they are kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewstep.condense.unroll import FlatNet, unroll, vector_of
from fewstep.randomness import Rng

CLASSES, PIXELS, IMAGES = 3, 5, 4
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture()
def softmax() -> FlatNet:
    """A linear softmax model in double precision."""
    net = nn.Linear(PIXELS, CLASSES).double()
    with torch.no_grad():
        for p, name in zip(net.parameters(), ("weight", "bias"), strict=True):
            p.copy_(0.3 * Rng(0, name).normal_like(p))
    return FlatNet(net)


@pytest.fixture()
def images() -> Tensor:
    return Rng(1).normal(IMAGES, PIXELS, dtype=torch.float64)


def last(student: FlatNet, x: Tensor, lr: Tensor, steps: int = 3, **how: Any) -> Tensor:
    """The squared distance of the last iterate from some target: what an outer problem could ask for."""
    start = vector_of(student.net)
    target = start + 0.1 * Rng(2).normal_like(start)
    *_, theta = unroll(lambda w, k: cross_entropy(student(w, x), LABELS), start, lr, steps, 0.9, **how)
    return (theta - target).square().sum()


def differences(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, one number at a time."""
    slopes = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at).view(-1)
        move[i] = h
        move = move.view(at.shape)
        slopes.view(-1)[i] = (function(at + move) - function(at - move)) / (2 * h)
    return slopes.detach()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_in_images_and_learning_rate_are_those_of_finite_differences(
    softmax: FlatNet, images: Tensor, checkpointed: bool
) -> None:
    x, lr = images.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(last(softmax, x, lr, outer=(x,) if checkpointed else None), (x, lr))
    wanted = (
        differences(lambda moved: last(softmax, moved, lr.detach()), x.detach()),
        differences(lambda moved: last(softmax, x.detach(), moved), lr.detach()),
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


def test_the_iterates_are_those_of_sgd_with_momentum(softmax: FlatNet, images: Tensor) -> None:
    net = nn.Linear(PIXELS, CLASSES).double()
    net.load_state_dict(softmax.net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.4, momentum=0.9)
    lr = torch.tensor(0.4, dtype=torch.float64)
    start = vector_of(softmax.net)
    for theta in unroll(lambda w, k: cross_entropy(softmax(w, images), LABELS), start, lr, 4, 0.9):
        optimizer.zero_grad()
        cross_entropy(net(images), LABELS).backward()
        optimizer.step()
        assert torch.allclose(theta, vector_of(net), rtol=0, atol=1e-14)


def test_every_step_sees_its_own_number(softmax: FlatNet, images: Tensor) -> None:
    seen: list[int] = []

    def loss(w: Tensor, k: int) -> Tensor:
        seen.append(k)
        return cross_entropy(softmax(w, images), LABELS)

    assert len(list(unroll(loss, vector_of(softmax.net), torch.tensor(0.1, dtype=torch.float64), 3))) == 3
    assert seen == [0, 1, 2]


def test_checkpointed_steps_change_nothing_and_keep_less(softmax: FlatNet) -> None:
    """What is saved for the backward pass falls, because a step's graph holds its activations."""
    x = Rng(1).normal(400, PIXELS, dtype=torch.float64).requires_grad_()
    lr = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(400) % CLASSES

    def outer(checkpointed: bool) -> Tensor:
        inner = unroll(
            lambda w, k: cross_entropy(softmax(w, x), labels),
            vector_of(softmax.net),
            lr,
            8,
            outer=(x,) if checkpointed else None,
        )
        return list(inner)[-1].square().sum()

    def kept(checkpointed: bool) -> tuple[int, tuple[Tensor, ...]]:
        saved: list[weakref.ref[Tensor]] = []

        def pack(t: Tensor) -> Tensor:
            saved.append(weakref.ref(t))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = outer(checkpointed)
        storages = [t.untyped_storage() for ref in saved if (t := ref()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(held.values()), torch.autograd.grad(loss, (x, lr))

    (plain_bytes, plain), (few_bytes, few) = kept(False), kept(True)
    for one, other in zip(plain, few, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)
    assert few_bytes < plain_bytes / 4


def test_a_tensor_that_checkpointing_does_not_know_of_is_not_left_out_in_silence(softmax: FlatNet) -> None:
    """Known tensors may come from others that ask for gradients."""
    x = Rng(1).normal(IMAGES, PIXELS, dtype=torch.float64).requires_grad_()
    brighter = 2 * x
    lr = torch.tensor(0.4, dtype=torch.float64)
    (plain,) = torch.autograd.grad(last(softmax, brighter, lr), x, retain_graph=True)
    (known,) = torch.autograd.grad(last(softmax, brighter, lr, outer=(brighter,)), x)
    assert torch.allclose(plain, known, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match=r"the loss depends on a tensor \[4, 5\] that asks for gradients and is not"):
        last(softmax, 2 * x, lr, outer=())


def test_the_last_steps_alone_can_keep_their_graph(softmax: FlatNet, images: Tensor) -> None:
    """With no graph at all the images get no gradient, and the learning rate that of the velocities held still; with
    all steps it is the whole gradient."""
    x, lr = images.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(last(softmax, x, lr), (x, lr))
    same = torch.autograd.grad(last(softmax, x, lr, second_order=3), (x, lr))
    assert all(torch.equal(one, other) for one, other in zip(whole, same, strict=True))
    part = torch.autograd.grad(last(softmax, x, lr, second_order=1), x)[0]
    assert 0 < float((part - whole[0]).norm() / whole[0].norm()) < 1
    none = last(softmax, x, lr, second_order=0)
    (nothing,) = torch.autograd.grad(none, x, allow_unused=True, retain_graph=True)
    assert nothing is None
    # the velocities held still: theta_K = theta_0 - lr sum v_k, so the slope is 2 (theta_K - target) . (-sum v_k)
    start = vector_of(softmax.net)
    target = start + 0.1 * Rng(2).normal_like(start)
    *_, theta = unroll(lambda w, k: cross_entropy(softmax(w, x), LABELS), start, lr.detach(), 3)
    (slope,) = torch.autograd.grad(none, lr)
    assert float(slope) == pytest.approx(float(2 * (theta - target) @ (theta - start) / lr), rel=1e-12)


def test_the_weights_to_start_from_can_be_learned_too(softmax: FlatNet, images: Tensor) -> None:
    start = vector_of(softmax.net).requires_grad_()
    lr = torch.tensor(0.4, dtype=torch.float64)

    def outer(at: Tensor) -> Tensor:
        *_, theta = unroll(lambda w, k: cross_entropy(softmax(w, images), LABELS), at, lr, 3)
        return theta.square().sum()

    (found,) = torch.autograd.grad(outer(start), start)
    wanted = differences(outer, start.detach())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_a_flat_network_is_the_network(softmax: FlatNet, images: Tensor) -> None:
    weights = vector_of(softmax.net)
    assert torch.equal(softmax(weights, images), softmax.net(images))
    doubled = 2 * weights
    assert torch.allclose(softmax(doubled, images), 2 * softmax.net(images), rtol=1e-14)
    weights += 1  # a memory of its own
    assert not torch.equal(vector_of(softmax.net), weights)


def test_noise_goes_on_kernels_of_four_dimensions_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    flat, w = FlatNet(net), vector_of(net)
    before, after = flat.named(w), flat.named(flat.perturbed(w, 2.0, Rng(0)))
    ratio = (after["0.weight"] / before["0.weight"] - 1) / 2.0
    assert float(ratio.norm()) == pytest.approx(1, rel=1e-12)
    assert float(ratio.std()) > 0.1
    for name in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(after[name], before[name])


def test_what_cannot_be_unrolled_is_refused_by_name(softmax: FlatNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="layer '1' is a BatchNorm2d, whose statistics are no weights"):
        FlatNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="second_order=-1 must be at least 0"):
        last(softmax, images, torch.tensor(0.1, dtype=torch.float64), second_order=-1)
