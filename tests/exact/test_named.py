"""Solvers and grids by name, with parameters."""

import pytest
import torch

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import three_modes
from fewstep.grids import GRIDS
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.sampling import (
    DDIM,
    NATIVE,
    NOISE,
    SOLVERS,
    TAB,
    Churn,
    DPMSolverPP2M,
    DualFast,
    RungeKutta,
    UniPC,
    balanced,
    sample,
)
from fewstep.sampling.named import named_grid, named_solver
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.sampling.solvers.runge_kutta import EULER, HEUN2
from fewstep.schedules import TrigFlow, VPLinear


def test_parameters_of_a_solver():
    """Numbers, words, switches and forms, in the types of the fields."""
    assert named_solver("ddim:eta=0.5") == DDIM(eta=0.5)
    assert named_solver("deis:degree=2") == TAB(degree=2)
    assert named_solver("unipc:p=3,variant=bh1,corrector=false") == UniPC(p=3, variant="bh1", corrector=False)
    assert named_solver("dpmpp-2m:form=noise,lower_order_final=true") == DPMSolverPP2M(True, NOISE)
    assert named_solver("dualfast:ramp=linear,weight=0.3") == DualFast(ramp="linear", weight=0.3)
    assert named_solver("dualfast:weight=none, anchor=first") == DualFast(anchor="first")
    assert named_solver("heun:churn=40") == RungeKutta(HEUN2, churn=Churn(40.0))
    churn = Churn(amount=40.0, low=0.05, high=50.0, inflation=1.003)
    named = named_solver("euler:churn=40,churn_low=0.05,churn_high=50,churn_noise=1.003")
    assert named == RungeKutta(EULER, NATIVE, churn)
    assert all(named_solver(name) == SOLVERS[name]() for name in SOLVERS)


def test_parameters_of_a_grid():
    """The arguments of the grid function."""
    schedule = VPLinear()
    assert torch.equal(named_grid("balanced:centre=3,kappa=2")(schedule, 7), balanced(schedule, 7, 3.0, 2.0))
    assert torch.equal(named_grid("karras:rho=5")(schedule, 7), GRIDS["karras"](schedule, 7, 5.0))


@pytest.mark.parametrize(
    ("make", "text", "said"),
    [
        (named_solver, "nosuch", "choose one of"),
        (named_solver, "unipc:q=3", "'q' is not a parameter; it has lower_order_final, p"),
        (named_solver, "unipc:p", "'p' has no value"),
        (named_solver, "unipc:p=two", "p: 'two' is not a whole number"),
        (named_solver, "unipc:p=0", "p=0 must be at least 1"),
        (named_solver, "unipc:corrector=no", "corrector: 'no' is not true or false"),
        (named_solver, "unipc:variant=bh3", "variant: 'bh3' is not one of bh1, bh2, vary"),
        (named_solver, "dpm2:form=x0", "form: 'x0' is not data or noise"),
        (named_solver, "ddim:eta=2", r"eta=2.0 must lie in \[0, 1\]"),
        (named_solver, "dpmpp-2m-sde:form=noise", "needs form=DATA"),
        (named_grid, "nosuch", "choose one of"),
        (named_grid, "karras:rho=x", "rho: 'x' is not a finite number"),
        (named_grid, "uniform:rho=3", "'rho' is not a parameter"),
    ],
)
def test_mistakes_get_one_line(make, text, said):
    """The name, the value and what would be right."""
    with pytest.raises(ValueError, match=said) as caught:
        make(text)
    assert "\n" not in str(caught.value)


def test_churn_has_ranges():
    """The bounds themselves are allowed."""
    for field, value, said in (
        ("amount", -1e-9, r"in \[0, inf\]"), ("low", -0.1, r"in \[0, 2\]"), ("low", 2.1, r"in \[0, 2\]"),
        ("inflation", -0.1, r"in \[0, 10\]"), ("inflation", 10.1, r"in \[0, 10\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Churn: {field}={value:g} must .*{said}"):
            Churn(**{"high": 2.0, field: value})
    for allowed in (Churn(low=2.0, high=2.0), Churn(inflation=0.0), Churn(inflation=10.0)):
        assert allowed.amount == 0


def test_too_few_steps_for_the_order():
    """Solvers of third order and more refuse fewer steps than their history is long; one step of second order is
    DDIM."""
    world = three_modes()
    for name in ("unipc-3", "dpmpp-3m", "deis", "lms", "ipndm", "dpmpp-3s-fast"):
        with pytest.raises(ValueError, match=f"steps=2 are too few for solver '{name}'"):
            sample(world, 3, solver=name, steps=2)
    assert torch.allclose(sample(world, 3, solver="unipc", steps=1), sample(world, 3, solver="ddim", steps=1))


def test_thresholds_and_the_last_call():
    """Static thresholding keeps predictions in [-1, 1], dynamic divides; denoise returns the prediction at the end."""
    world, how = three_modes(), {"solver": "dpmpp-2m", "steps": 8, "grid": "log-snr"}
    plain = sample(world, 64, **how)
    static = sample(world, 64, **how, threshold="static", denoise=True)
    dynamic = sample(world, 64, **how, threshold="dynamic", denoise=True)
    assert float(plain.abs().max()) > 1.2 and float(static.abs().max()) <= 1 and float(dynamic.abs().max()) <= 1
    assert torch.allclose(sample(world, 64, **how, denoise=True), world(plain, world.schedule.t_min))
    with pytest.raises(ValueError, match="threshold='hard' must be"):
        sample(world, 3, threshold="hard")


def test_one_path_for_every_number_of_steps():
    """With one_path a stochastic solver's samples for many steps are close to each other, without they are not."""
    world = three_modes()

    def distance(one_path):
        a, b = (
            sample(world, 200, solver="dpmpp-2m-sde", steps=n, grid="log-snr", one_path=one_path) for n in (100, 200)
        )
        return float((a - b).square().mean().sqrt())

    assert distance(True) < 0.1 < 0.5 < distance(False)


def test_self_conditioning_feeds_predictions_back():
    """The result is that of the driver, and differs from zeros given; a world takes no estimate."""
    torch.manual_seed(0)
    net = MLP((3,), width=16, blocks=1, beside=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (3,))
    noise = torch.randn(5, 3)
    times = balanced(model.schedule, 6, 1.0)
    how = {"solver": "ddim", "grid": times, "noise": noise}
    fed = sample(model, 5, **how, self_conditioning=SelfConditioning(bound=2.0))
    start = model.schedule.sigma(times[:1]).float() * noise
    with torch.no_grad():
        expected = SelfConditioning(bound=2.0).solve(model, start, times, DDIM())
    assert torch.equal(fed, expected)
    assert not torch.allclose(fed, sample(model, 5, **how), atol=1e-3)
    with pytest.raises(ValueError, match="needs a network"):
        sample(three_modes(), 5, self_conditioning=SelfConditioning())
