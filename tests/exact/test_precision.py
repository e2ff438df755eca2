"""States in half precision: the error is that of a network called in half precision, for every solver and schedule."""

import pytest
import torch

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.grids import karras
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, SOLVERS, Hooks, Levels, balanced, run, solve
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear

#: Schedules and grids: to pure data, and close to it.
CASES = [
    (VPLinear(), karras),
    (VPCosine(), karras),
    (VPCosine(), balanced),
    (EDM(), karras),
    (EDM(), balanced),
    (FlowMatching(), karras),
    (TrigFlow(), balanced),
    (DiscreteVP.scaled_linear(), karras),
]
HALF = (torch.float16, torch.bfloat16)


class Rounded(Denoiser):
    """An exact denoiser whose input and output have the type of the state, and nothing else."""

    def __init__(self, world):
        super().__init__(world.schedule, world.shape)
        self.world = world

    def forward(self, x, t, cond=None):
        return self.world(x.double(), t).to(x.dtype)


class Shaken(Denoiser):
    """An exact denoiser whose input and output are off by ``u`` of themselves, up or down by chance: at least as much
    as rounding to half precision puts them off."""

    def __init__(self, world, u):
        super().__init__(world.schedule, world.shape)
        self.world, self.u, self.rng = world, u, Rng(3)

    def shaken(self, x):
        return x * (1 + self.u * (2 * self.rng.integers(len(x), 0, 2) - 1)[:, None])

    def forward(self, x, t, cond=None):
        return self.shaken(self.world(self.shaken(x), t))


class Same(Rng):
    """The same fresh noise in every type."""

    def normal_like(self, x):
        return self.normal(*x.shape, dtype=torch.float64).to(x)


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_errs_by_the_rounding_of_the_networks_calls(name):
    """On every schedule, to pure data and close to it, in both half precisions: no more than calls that are off by a
    rounding each, with the rounding of the end and what float32 itself loses.  The worst case stands at
    0.9 of that."""
    noise = Rng(0).normal(64, 1)
    for schedule, grid in CASES:
        world, times = three_modes(schedule), grid(schedule, 4)
        table = SOLVERS[name]().table(Levels.of(schedule, times))
        start = (schedule.sigma(times[0]) * noise).bfloat16()  # which float16 holds as well
        exact = run(world, start.double(), table, rng=Same(1))
        single = run(Rounded(world), start.float(), table, rng=Same(1))
        for kind in HALF:
            u = torch.finfo(kind).eps / 2
            got = run(Rounded(world), start.to(kind), table, rng=Same(1))
            shaken = run(Shaken(world, u), start.double(), table, rng=Same(1))
            assert got.dtype == kind
            most = rms(shaken - exact) + u * rms(exact) + rms(single - exact)
            assert rms(got - exact) <= most, (schedule, grid, kind)


@pytest.mark.parametrize("kind", HALF)
def test_the_network_and_the_hooks_of_a_state_in_half_precision(kind):
    """The network is called in the type of the state; hooks see float32, and an edit of theirs is not rounded."""
    world, seen = three_modes(EDM()), set()

    class Listening(Rounded):
        def forward(self, x, t, cond=None):
            seen.add(("network", x.dtype))
            return super().forward(x, t, cond)

    hooks = Hooks(
        start=lambda x: seen.add(("start", x.dtype)) or x,
        output=lambda k, x0, x, t: seen.add(("output", x0.dtype)) or seen.add(("output", x.dtype)) or x0,
        after=lambda i, x: seen.add(("after", x.dtype)) or x,
    )
    x = Rng(0).normal(4, 1).to(kind)
    end = solve(Listening(world), 80 * x, balanced(world.schedule, 4), DDIM(), hooks=hooks)
    assert end.dtype == kind
    assert seen == {("network", kind), ("start", kind), ("output", torch.float32), ("after", torch.float32)}


def test_self_conditioning_in_half_precision():
    """What is fed back has the type of the network's input: a network in bfloat16 takes nothing else."""
    net = MLP((3,), width=16, blocks=1, beside=3).bfloat16()
    model = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (3,))
    x = Rng(0).normal(5, 3).bfloat16()
    with torch.no_grad():
        end = SelfConditioning().solve(model, x, balanced(model.schedule, 4), DDIM())
    assert end.dtype == torch.bfloat16
