"""Averages: what they are by definition, how wide they are, and how others are made of them."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.training.ema import Average, profile_overlap, reconstruct
from fewstep.training.profiles import HalfLife, Power, Profile, gamma_of


def walk(n: int, size: int = 40, start: float = 0.0) -> list[Tensor]:
    """A random walk in float64, as weights during training."""
    gen = torch.Generator().manual_seed(0)
    return list(start + torch.randn(n, size, generator=gen, dtype=torch.float64).cumsum(0))


def averaged(profile: Profile, path: list[Tensor]) -> Tensor:
    average = Average(profile, [path[0]])
    for weights in path:
        average.update([weights])
    return average.weights[0]


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_power_average_is_its_definition(sigma_rel: float) -> None:
    """The recursion gives weight k the share of the profile (g + 1) tau^g / n^(g + 1) that lies in [k - 1, k]."""
    path, power = walk(300), gamma_of(sigma_rel) + 1
    edges = (torch.arange(301, dtype=torch.float64) / 300) ** power
    direct = (edges.diff()[:, None] * torch.stack(path)).sum(0)
    assert torch.allclose(averaged(Power(sigma_rel), path), direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_of_the_power_profile(sigma_rel: float) -> None:
    """The standard deviation of the profile over the run's length is sigma_rel: in closed form for the exponent, and
    by summing the shares that the recursion gives to each of many updates."""
    gamma = gamma_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-10)
    n = 20000
    times = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    first = averaged(Power(sigma_rel), list(times[:, None]))
    second = averaged(Power(sigma_rel), list(times[:, None].square()))
    assert math.sqrt(float(second - first.square())) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 1.0])
def test_impossible_widths_are_named(sigma_rel: float) -> None:
    """A flat average has width 1 / sqrt(12): nothing is wider, nothing has none."""
    with pytest.raises(ValueError, match=f"sigma_rel={sigma_rel} must lie in"):
        Power(sigma_rel)


def test_half_life() -> None:
    """After its warm-up the profile halves a weight's share every ``updates`` updates."""
    profile = HalfLife(20)
    assert math.prod(profile.decay(n) for n in range(201, 221)) == pytest.approx(0.5, rel=1e-12)
    assert profile.decay(1) == 0
    assert profile.decay(50) == pytest.approx(0.5 ** (1 / 5))
    with pytest.raises(ValueError, match="updates=0 must be positive"):
        HalfLife(0)


@pytest.mark.parametrize("profile", [Power(0.1), HalfLife(20)])
def test_the_first_update_forgets_the_start(profile: Profile) -> None:
    """An average of one update is that update, and constant weights stay what they are."""
    average = Average(profile, [torch.full((3,), 7.0)])
    average.update([torch.ones(3)])
    assert torch.equal(average.weights[0], torch.ones(3))
    for _ in range(50):
        average.update([torch.ones(3)])
    assert torch.equal(average.weights[0], torch.ones(3))


def test_an_average_is_its_own_tensor() -> None:
    """Later changes of the weights reach the average through updates only, in the weights' type and layout."""
    weights = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    average = Average(Power(0.1), [weights])
    average.update([weights])
    before = average.weights[0].clone()
    with torch.no_grad():
        weights.add_(1)
    assert torch.equal(average.weights[0], before) and not average.weights[0].requires_grad
    assert average.weights[0].dtype == torch.float32
    assert average.weights[0].is_contiguous(memory_format=torch.channels_last)


def test_overlap_is_the_integral() -> None:
    """The closed form of the profiles' inner product against quadrature."""
    n = torch.tensor([300.0, 500.0], dtype=torch.float64)
    gamma = torch.tensor([gamma_of(0.05), gamma_of(0.12)], dtype=torch.float64)
    edges = torch.linspace(0, 500, 400_001, dtype=torch.float64)
    tau = (edges[1:] + edges[:-1]) / 2
    p = [(g + 1) * (tau / m) ** g / m * (tau <= m) for m, g in zip(n, gamma, strict=True)]
    for i in range(2):
        for j in range(2):
            integral = (p[i] * p[j]).sum() * (edges[1] - edges[0])
            assert float(profile_overlap(n[i], gamma[i], n[j], gamma[j])) == pytest.approx(float(integral), rel=1e-6)


def kept(path: list[Tensor], every: int) -> list[tuple[int, float, list[Tensor]]]:
    """Snapshots of two power averages along a path."""
    widths = (0.05, 0.1)
    averages = [Average(Power(width), [path[0]]) for width in widths]
    found: list[tuple[int, float, list[Tensor]]] = []
    for n, weights in enumerate(path, 1):
        for average, width in zip(averages, widths, strict=True):
            average.update([weights])
            if n % every == 0:
                found.append((n, width, [average.weights[0].clone()]))
    return found


def relative_error(path: list[Tensor], every: int, sigma_rel: float, updates: int | None = None) -> float:
    updates = len(path) if updates is None else updates
    made = reconstruct(kept(path, every), updates, sigma_rel)[0]
    direct = averaged(Power(sigma_rel), path[:updates])
    return float((made - direct).norm() / direct.norm())


@pytest.mark.parametrize(("every", "bound"), [(480, 1.5e-3), (120, 2e-5), (40, 1e-6)])
def test_reconstruction_after_the_fact(every: int, bound: float) -> None:
    """A width of 0.07 from snapshots of 0.05 and 0.10 along a random walk: more snapshots, less error (measured
    8.6e-4 from 8 snapshots, 1.1e-5 from 32, 4.9e-7 from 96)."""
    assert relative_error(walk(3840), every, 0.07) < bound


def test_reconstruction_far_from_zero() -> None:
    """Weights are not centred: the same walk around 100 has the same absolute error, for the coefficients sum to 1."""
    errors = []
    for start in (0.0, 100.0):
        path = walk(3840, start=start)
        made = reconstruct(kept(path, 480), 3840, 0.07)[0]
        errors.append(float((made - averaged(Power(0.07), path)).norm()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_reconstruction_of_what_is_there_is_exact() -> None:
    """A stored width at a stored moment is given back, in the middle of the run too, without later snapshots."""
    path = walk(960)
    snapshots = kept(path, 120)
    for updates, width, weights in snapshots:
        assert torch.allclose(reconstruct(snapshots, updates, width)[0], weights[0], rtol=0, atol=1e-7)


def test_reconstruction_keeps_the_type_and_needs_a_snapshot() -> None:
    snapshots = [(n, s, [w[0].float().reshape(8, 5)]) for n, s, w in kept(walk(200), 50)]
    made = reconstruct(snapshots, 200, 0.07)[0]
    assert made.dtype == torch.float32 and made.shape == (8, 5)
    with pytest.raises(ValueError, match="no snapshot at or before update 10"):
        reconstruct(snapshots, 10, 0.07)
