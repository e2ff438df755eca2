"""The energy distance as a loss: closed forms, no bias, the gradient of the whole batch from its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.method import Batch
from fewstep.methods.parts.energy import energy_distance, feature_energy, summaries
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow

F64 = torch.float64


def mean_distance(shift: float) -> float:
    """``E|d|`` of ``d ~ N(shift, 2)``: two normal numbers whose means lie ``shift`` apart."""
    return 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)


def test_the_distance_of_points_by_hand() -> None:
    """Samples 0 and 1, data 2 and 5: 2 * 3 - 1 - 3 = 2, over the data's distance 3."""
    x, y = torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor([[2.0], [5.0]], dtype=F64)
    _, distance = energy_distance(x, y, x, y)
    assert float(distance) == pytest.approx(2 / 3, rel=1e-14)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_no_bias_in_small_batches(shift: float) -> None:
    """Batches of four normal numbers: the mean over batches is ``2 E|x - y| - E|x - x'| - E|y - y'|``; with the
    pairs of a number with itself among them, the two means within a law would be a quarter smaller."""
    rng = Rng(0)
    x, y = rng.normal(20_000, 4, 1, dtype=F64), shift + rng.normal(20_000, 4, 1, dtype=F64)
    found = torch.stack(
        [energy_distance(a, b, a, b)[1] * torch.cdist(b, b).sum() / 12 for a, b in zip(x, y, strict=True)]
    )
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - 2 * (mean_distance(shift) - mean_distance(0.0))) < 4 * error
    assert error < 0.01


def test_the_gradient_is_that_of_the_distance() -> None:
    """The first number's gradient in the samples is that of the distance written as a function of all of them."""
    rng = Rng(1)
    x, y = rng.normal(5, 3, dtype=F64).requires_grad_(), rng.normal(6, 3, dtype=F64)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b[None]).square().sum(-1).clamp_min(1e-60).sqrt()

    data = apart(y, y).sum() / 30
    (2 * apart(x, y).mean() / data - apart(x, x).sum() / 20 / data).backward()
    there = x.grad
    x.grad = None
    energy_distance(x, y, x.detach(), y)[0].backward()
    torch.testing.assert_close(x.grad, there, atol=1e-14, rtol=1e-12)


def test_parts_have_the_gradient_of_the_whole() -> None:
    """The mean over two parts, each told all rows, has the gradient and the value of the batch in one part."""
    rng = Rng(2)
    x, y = rng.normal(8, 3, dtype=F64).requires_grad_(), rng.normal(8, 3, dtype=F64)
    loss, distance = energy_distance(x, y, x.detach(), y)
    loss.backward()
    whole = x.grad
    x.grad = None
    halves = [energy_distance(a, b, x.detach(), y) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
    (sum(loss for loss, _ in halves) / 2).backward()
    torch.testing.assert_close(x.grad, whole, atol=1e-15, rtol=1e-12)
    assert float(sum(found for _, found in halves) / 2) == pytest.approx(float(distance), rel=1e-12)


def test_features_under_the_batchs_conditions() -> None:
    """Samples far from the data have a greater distance than other data of the same classes; the gradient reaches the
    samples and not the teacher; one sample has no pair."""
    torch.manual_seed(0)
    net = MLP((2,), 32, 1, 3)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    teacher = NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), (2,), 3)
    teacher.requires_grad_(False)
    labels = torch.arange(64) % 3

    def distance(x: Tensor) -> tuple[Tensor, Tensor]:
        rng = Rng(5)
        asked = feature_energy(teacher, x, Batch(rng.normal(len(x), 2), labels[: len(x)], rng))
        answer = asked.send(next(asked).value.detach())
        with pytest.raises(StopIteration) as end:
            asked.send(answer.value.detach())
        found: tuple[Tensor, Tensor] = end.value.value
        return found

    near = distance(Rng(6).normal(64, 2))[1]
    x = (Rng(6).normal(64, 2) + 2).requires_grad_()
    loss, far = distance(x)
    loss.backward()
    assert float(far) > 5 * abs(float(near)) and x.grad is not None and float(x.grad.abs().min()) > 0
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="at least two samples"):
        distance(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((5,), [5]), ((7, 5), [5, 5]), ((1, 5), [5]),
        ((5, 6, 6), [5, 5, 80]), ((5, 1, 1), [5]), ((5, 2, 6, 6), [5, 5, 320]),
    ],
)  # fmt: skip
def test_summaries_of_features_of_every_shape(shape: tuple[int, ...], sizes: list[int]) -> None:
    """Vectors, tokens, grids and videos, down to a single place, which has no spread: numbers and slopes are finite."""
    f = Rng(0).normal(3, *shape, dtype=F64).requires_grad_()
    found = summaries(f)
    assert [part.shape for part in found] == [(3, size) for size in sizes]
    sum(part.square().sum() for part in found).backward()
    assert all(bool(part.isfinite().all()) for part in found) and f.grad is not None and bool(f.grad.isfinite().all())
