"""ABM: exact where it must be, of its order elsewhere, and its limits among the older solvers."""

import math
from itertools import pairwise

import pytest
import torch

import fewstep as fs
from fewstep import grids
from fewstep.denoisers import Denoiser, NetworkDenoiser, half_level_of
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, ring, three_modes
from fewstep.guidance import Guided, guidance_scale
from fewstep.networks import MLP
from fewstep.predictions import Eps
from fewstep.randomness import Rng
from fewstep.sampling import ABM, DATA, NOISE, Hooks, Levels, RhoAB, balanced, run
from fewstep.sampling.search import half_level, solver_for
from fewstep.sampling.solvers.abm import order_for, scale_for, too_large
from fewstep.sampling.solvers.dpm_solver import DPMSolver1
from fewstep.sampling.solvers.stochastic import DDIM
from fewstep.schedules import EDM, FlowMatching, VPLinear


class Polynomial(Denoiser):
    """A prediction that is a polynomial of degree ``degree`` in ``v``, whatever the state."""

    def __init__(self, schedule, degree, c, form):
        super().__init__(schedule, (1,))
        self.degree, self.c, self.form = degree, c, form

    def v(self, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return sigma / (sigma + self.c * alpha)

    def forward(self, x, t, cond=None):
        t = torch.as_tensor(t, dtype=torch.float64)
        value = ((1 + self.v(t)) ** self.degree).reshape(-1, 1).expand_as(x)
        if self.form == DATA:
            return value
        alpha, sigma = self.schedule.alpha(t).reshape(-1, 1), self.schedule.sigma(t).reshape(-1, 1)
        return (x - sigma * value) / alpha


def integral(world, form, degree, s, t):
    """``x_t`` from ``x_s = 0`` for that prediction, by a fine midpoint rule."""
    schedule = world.schedule
    rho = schedule.ratio(torch.tensor([s, t], dtype=torch.float64))
    edges = torch.linspace(*rho.log().tolist(), 200_001, dtype=torch.float64).exp()
    middle = (edges[1:] * edges[:-1]).sqrt()
    value = (1 + middle / (middle + world.c)) ** degree
    at_t = schedule.alpha(torch.tensor(t, dtype=torch.float64))
    if form == NOISE:  # d(x / alpha) = eps d rho
        return float(at_t * (value * edges.diff()).sum())
    weight = (1 / edges).diff()  # d(x / (alpha rho)) = D d(1 / rho)
    return float(at_t * rho[1] * (value * weight).sum())


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), FlowMatching(), DiscreteVP.scaled_linear()])
@pytest.mark.parametrize("form", [DATA, NOISE])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_polynomials_in_v_are_integrated_exactly(schedule, form, p):
    """The predictor is exact for degree p - 1, the corrector for degree p, on a grid with no two steps alike."""
    ratios = torch.tensor([9.0, 4.0, 1.7, 0.8, 0.3, 0.11], dtype=torch.float64)
    times = schedule.time_at(-ratios.log())
    levels = Levels.of(schedule, times)
    solver = ABM(p=p, c=0.7, form=form)
    for degree, which in ((p - 1, 0), (p, 1)):
        world = Polynomial(schedule, degree, 0.7, form)
        row = solver.rows(levels, 3, p)[which]
        nodes = times[[3 - j for j in range(p)]] if which == 0 else times[[4 - j for j in range(p + 1)]]
        outputs = ((1 + world.v(nodes)) ** degree).tolist()
        got = sum(c * m for c, m in zip(row.c, outputs, strict=True))
        assert got == pytest.approx(integral(world, form, degree, float(times[3]), float(times[4])), rel=2e-9)


def test_the_prediction_at_pure_noise_counts():
    """On flow matching the second step already uses two outputs: the first lies at v = 1, not infinitely far away."""
    levels = Levels.of(FlowMatching(), balanced(FlowMatching(), 5))
    assert levels.log_snr[0] == -math.inf
    assert len(ABM(p=2).table(levels).steps[1].stages[0].row.c) == 2
    assert len(fs.sampling.UniPC().table(levels).steps[1].stages[0].row.c) == 1


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), FlowMatching()])
def test_without_its_corrector_order_one_is_ddim(schedule):
    """A constant prediction is integrated exactly in every variable; with eta = 1 it is the ancestral step."""
    levels = Levels.of(schedule, balanced(schedule, 6))
    for eta, other in ((0.0, DDIM()), (1.0, DPMSolver1(eta=1.0)), (0.4, DPMSolver1(eta=0.4))):
        ours = ABM(p=1, corrector=False, eta=eta).table(levels)
        for mine, theirs in zip(ours.rows, other.table(levels).rows, strict=True):
            assert mine.a == pytest.approx(theirs.a, abs=1e-12) and mine.n == pytest.approx(theirs.n, abs=1e-12)
            assert mine.c[0] == pytest.approx(theirs.c[0], rel=1e-11)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_in_noise_prediction_a_large_scale_is_adams_bashforth_in_rho(p):
    """``v`` tends to ``rho / c``: rho-AB of DEIS, the LMS solver, to the order of rho / c."""
    levels = Levels.of(EDM(), torch.tensor([20.0, 9.0, 5.0, 2.0, 1.1, 0.3], dtype=torch.float64))
    ours = ABM(p=p, c=1e7, corrector=False, form=NOISE).table(levels)
    for mine, theirs in zip(ours.rows, RhoAB(degree=p - 1).table(levels).rows, strict=True):
        assert mine.c == pytest.approx(theirs.c, rel=1e-3)


@pytest.mark.parametrize(("p", "corrector", "order"), [(1, False, 1), (2, False, 2), (1, True, 2), (2, True, 3)])
def test_orders_with_its_own_start(p, corrector, order):
    """The declared order on a random grid and on its own, from flow matching's pure noise to t = 0.1."""
    world = three_modes(FlowMatching())
    noise = Rng(0).normal(60, 1, dtype=torch.float64)
    exact = world.flow(noise, 1.0, 0.1)
    solver = ABM(p=p, corrector=corrector)
    assert solver.order == order
    for spread in (0.0, 0.4):
        errors = []
        for steps in (48, 96, 192):
            u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            shake = torch.rand(steps - 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
            u[1:-1] += spread * shake / steps
            levels = Levels.of(FlowMatching(), 1 - 0.9 * u)
            errors.append(float((run(world, noise, solver.table(levels)) - exact).abs().max()))
        slope = math.log2(errors[0] / errors[2]) / 2
        assert order - 0.25 < slope < order + 1, (spread, slope)


@pytest.mark.parametrize("p", [3, 4])
def test_orders_with_an_exact_history(p):
    """From a history that is exact, order p + 1: the start is what holds the third order and above back.  The first
    calls are shown exact states, and the state is put back on the exact path after them."""
    schedule = EDM(t_max=5.0)
    world = three_modes(schedule)
    start = world.flow(Rng(0).normal(40, 1, dtype=torch.float64) * 5.0, 5.0, 5.0)
    end = 0.3
    exact = world.flow(start, 5.0, end)
    errors = []
    for steps in (32, 64, 128):
        levels = Levels.of(schedule, torch.linspace(5.0**0.5, end**0.5, steps + 1, dtype=torch.float64) ** 2)

        def put_back(i, x, levels=levels):
            return world.flow(start, 5.0, levels.times[i + 1]) if i < p else x

        got = run(world, start, ABM(p=p).table(levels), hooks=Hooks(after=put_back))
        errors.append(float((got - exact).abs().max()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert p + 0.5 < slopes[-1] < p + 2.2, slopes


def test_with_more_noise_the_law_is_kept():
    """With the oracle D = x_0 a stochastic step takes N(alpha_s x_0, sigma_s^2) to N(alpha_t x_0, sigma_t^2)."""
    for schedule in (VPLinear(), EDM(), FlowMatching()):
        levels = Levels.of(schedule, balanced(schedule, 7))
        for row, i in zip(ABM(p=3, corrector=False, eta=0.6).table(levels).rows, range(7), strict=True):
            s, t = levels.point(i), levels.point(i + 1)
            assert row.a * s.alpha + sum(row.c) == pytest.approx(t.alpha, abs=1e-11)
            assert (row.a * s.sigma) ** 2 + row.n**2 == pytest.approx(t.sigma**2, abs=1e-11)


def test_bad_parameters_are_refused():
    """Every field says what would be right."""
    for options, word in (
        ({"p": 5}, "p=5"),
        ({"c": 0.0}, "c=0"),
        ({"c": math.inf}, "c"),
        ({"guidance": math.nan}, "guidance"),
        ({"eta": 0.5}, "corrector"),
        ({"eta": 0.5, "corrector": False, "form": NOISE}, "DATA"),
    ):
        with pytest.raises(ValueError, match=word):
            ABM(**options)


# the scale, the order, and what is chosen for a model


def test_the_half_level_of_a_gaussian_is_its_standard_deviation():
    """``D = s^2 x / (s^2 + rho^2)`` moves along ``x = x_T sqrt(s^2 + rho^2) / rho_T``: its square is half at rho = s;
    the measured one is interpolated between 16 levels."""
    for sd in (0.3, 1.0, 3.0):
        world = Gaussian(EDM(), torch.zeros(2), torch.eye(2, dtype=torch.float64) * sd**2)
        assert half_level(world) == pytest.approx(sd, rel=0.05)
        assert half_level(world.on(FlowMatching())) == pytest.approx(sd, rel=0.05)


def test_the_half_level_is_interpolated_in_v():
    """A prediction whose squared change from the start is linear in ``v = rho / (rho + 1.4)``: its half lies halfway in
    ``v`` between the first and the last level that was looked at, to rounding in float32."""

    class Straight(Denoiser):
        def forward(self, x, t, cond=None):
            v = float(t[0] / (t[0] + 1.4))
            seen.append(v)
            return torch.full_like(x, math.sqrt(1 - v / seen[0]))

    for steps in (3, 4, 7, 16):
        seen: list[float] = []
        found = half_level(Straight(EDM(), (2,)), steps=steps)
        v = (seen[0] + seen[-1]) / 2
        assert found == pytest.approx(1.4 * v / (1 - v), rel=1e-5)


def test_a_prediction_that_never_moves_has_no_half_level():
    """One line, not a division by zero."""

    class Still(Denoiser):
        def forward(self, x, t, cond=None):
            return torch.zeros_like(x)

    with pytest.raises(ValueError, match="half_level"):
        half_level(Still(EDM(), (2,)))


def test_the_default_takes_what_the_model_knows():
    """The half level and the guidance of a denoiser, through its wrappers, reach the solver; what was given stays."""
    world = ring(FlowMatching(), labels=list(range(8)))
    assert (half_level_of(world), guidance_scale(world)) == (None, 1.0)
    world.half_level = 1.7
    steered = Guided(world, torch.tensor([2.0, 4.0]))
    assert (half_level_of(steered), guidance_scale(steered)) == (1.7, 4.0)
    assert ABM().fitted_to(steered) == ABM(c=math.sqrt(1.7 * 1.4 * 4.0), guidance=4.0)
    assert ABM(c=0.5).fitted_to(steered).c == 0.5
    noise, labels = Rng(0).normal(5, 2, dtype=torch.float64), torch.arange(5)
    setting = fs.solver_for(12, model=world)
    picked = fs.sample(world, 5, noise=noise, cond=labels, **setting.options())
    assert torch.equal(picked, fs.sample(world, 5, noise=noise, cond=labels, steps=12))
    assert setting.solver == "abm:p=2,c=1.7"
    middle = math.sqrt(1.7 * half_level(Guided(world, 3.0)))
    assert fs.solver_for(12, 3.0, world).solver == f"abm:p=2,c={middle:.4g}"


def test_a_network_that_predicts_noise_is_called_at_higher_noise():
    """Its scale counts as 6 until it is measured, in fs.sample and in a scheduler."""
    from diffusers import DDIMScheduler

    from fewstep.hub import as_scheduler

    net = NetworkDenoiser(MLP((2,), width=8, blocks=1), DiscreteVP.linear(), Eps(), (2,))
    assert ABM().fitted_to(net) == ABM(p=2, c=6.0) and ABM(p=3).fitted_to(net).p == 3
    assert solver_for(20, model=net).solver == "abm:p=2,c=6"
    net.half_level = 0.9
    assert ABM().fitted_to(net).c == 0.9
    for kind, scale in (("epsilon", 6.0), ("v_prediction", 1.4)):
        assert as_scheduler("abm", DDIMScheduler(prediction_type=kind)).solver.scale == scale


def test_the_order_falls_with_the_steps_and_with_guidance():
    """1, 2 or 4; never more for stronger guidance or fewer steps."""
    orders = [[order_for(steps, w) for steps in range(1, 60)] for w in (1.0, 2.0, 4.0, 8.0)]
    assert {p for row in orders for p in row} == {1, 2, 4}
    assert all(row == sorted(row) for row in orders)
    assert all(
        a >= b for strong, weak in zip(orders[1:], orders, strict=False) for a, b in zip(weak, strong, strict=True)
    )


def test_where_the_order_changes():
    """Below 3 sqrt(w) steps it is 1, below 12.5 w^0.3 it is 2, then 4; guidance below 1 counts as none."""
    changes = {1.0: (3, 13), 0.2: (3, 13), 4.0: (6, 19), 16.0: (12, 29)}  # 12.5 * 4^0.3 = 18.9, 12.5 * 16^0.3 = 28.7
    for w, (two, four) in changes.items():
        assert [order_for(steps, w) for steps in (two - 1, two, four - 1, four)] == [1, 2, 2, 4]


def test_the_scale_is_the_geometric_mean_of_the_half_levels():
    """Without guidance the half level itself; one that is not known counts as 1.4, under guidance as 1.4 times that."""
    assert [scale_for(None), scale_for(2.0), scale_for(2.0, 0.5)] == [1.4, 2.0, 2.0]
    assert scale_for(2.0, 4.0) == pytest.approx(math.sqrt(2.0 * 5.6), rel=1e-15)
    assert scale_for(2.0, 4.0, 3.0) == pytest.approx(math.sqrt(6.0), rel=1e-15)
    assert scale_for(None, 4.0) == pytest.approx(2.8, rel=1e-15)


def test_seven_times_the_error_is_too_much():
    """Beside the weights' own sum, whatever its sign and size; exactly 7 is not."""
    assert [too_large(w) for w in ([4.0, -3.0], [2.0, -1.5], [-4.0, 3.0], [1.0])] == [False] * 4
    assert [too_large(w) for w in ([4.5, -3.5], [2.25, -1.75], [-0.45, 0.35])] == [True] * 3


def test_on_a_grid_that_is_not_its_own_the_open_order_is_lower():
    """Steps that grow in v make extrapolations explode: then fewer outputs are used, unless the order was given."""

    def used(solver, grid):
        levels = Levels.of(VPLinear(), grid(VPLinear(), 20))
        return len(solver.row(levels, 4, solver.usable(levels, 4)).c)

    assert used(ABM(), ABM().grid) == 4 and used(ABM(), grids.log_snr) == 2 and used(ABM(p=4), grids.log_snr) == 4
    world = ring(VPLinear())
    for grid in ("karras", "log-snr", "quadratic", "uniform"):
        x = fs.sample(world, 40, grid=grid, steps=20)
        assert float((x.norm(dim=1) - 2).abs().mean()) < 0.3, grid  # the radius itself has sd 0.25


def test_on_flow_matching_it_beats_unipc():
    """The ring of eight from pure noise, where UniPC starts blind: at 10 calls four fifths of UniPC's error at most
    (measured: .65), at 20 a quarter (measured: .10)."""
    world = ring(FlowMatching())
    noise = Rng(5).normal(200, 2, dtype=torch.float64)
    exact = world.flow(noise, 1.0, 0.0)

    def error(solver, steps):
        return float((fs.sample(world, 200, noise=noise, solver=solver, steps=steps) - exact).norm(dim=1).mean())

    for steps, share in ((10, 0.8), (20, 0.25)):
        assert error("abm", steps) < error("unipc", steps) * share
    assert solver_for(10).calls == 10
