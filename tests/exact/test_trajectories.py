"""What a trajectory costs and takes: memory, shapes of samples, one graph."""

import gc
import weakref

import pytest
import torch

from fewstep import grids
from fewstep.denoisers import Denoiser
from fewstep.randomness import Rng
from fewstep.sampling import SOLVERS, BrownianPath, Levels, run, solve
from fewstep.schedules import VPLinear

SOME = ("ddim", "dpmpp-3m", "unipc-3", "deis", "dualfast", "rk4", "dpmpp-3s", "dpmpp-3m-sde", "dpmpp-sde")


class Elementwise(Denoiser):
    """A model that treats every number of a sample alike, and remembers which of its outputs are alive."""

    def __init__(self, shape):
        super().__init__(VPLinear(), shape)
        self.made = []

    def forward(self, x, t, cond=None):
        out = torch.tanh(x)
        self.made.append(weakref.ref(out))
        return out

    def alive(self):
        return sum(ref() is not None for ref in self.made)


def table_of(name, steps):
    return SOLVERS[name]().table(Levels.of(VPLinear(), grids.log_snr(VPLinear(), steps)))


@pytest.mark.parametrize("name", SOME)
def test_memory_is_that_of_the_history(name):
    """Outputs alive during a run: as many as the history holds, at 12 steps and at 60."""
    for steps in (12, 60):
        model, seen = Elementwise((3,)), []
        table = table_of(name, steps)

        def count(done, total, model=model, seen=seen):
            gc.collect(0)
            seen.append(model.alive())

        run(model, torch.randn(2, 3), table, rng=Rng(0), progress=count)
        assert max(seen) <= table.memory <= 4


def test_a_path_keeps_a_fixed_number_of_states():
    """Whatever the number of steps: the states on the way to the last value, and the last few values."""
    for steps in (10, 80):
        path = BrownianPath(0)
        run(Elementwise((3,)), torch.randn(2, 3), table_of("dpmpp-2m-sde", steps), rng=path)
        kept = 2 * len(path._way) + len(path._recent)
        assert kept <= 2 * path.levels + 5


@pytest.mark.parametrize("shape", [(6,), (3, 8), (1, 4, 4), (5, 3, 2, 2)])
@pytest.mark.parametrize("name", SOME)
def test_samples_of_any_shape(name, shape):
    """Vectors, sound [C, T], pictures [C, H, W] and videos [F, C, H, W] go the way of the flat vector."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = grids.log_snr(VPLinear(), 6)

    def noise():
        class Flat(Rng):
            """Draws for the flat vector."""

            def normal_like(self, y):
                return super().normal_like(y.flatten(1)).view_as(y)

        return Flat(0)

    got = solve(Elementwise(shape), x, times, SOLVERS[name](), rng=noise())
    flat = solve(Elementwise((x[0].numel(),)), x.flatten(1), times, SOLVERS[name](), rng=noise())
    assert got.shape == x.shape
    assert float((got.flatten(1) - flat).abs().max()) < 1e-13


class Tanh(Denoiser):
    """A model without Python state, for a graph."""

    def forward(self, x, t, cond=None):
        return torch.tanh(x) * torch.cos(t).to(x)[:, None]


@pytest.mark.parametrize("name", ["unipc", "heun"])
def test_a_trajectory_of_twenty_steps_is_one_graph(name):
    """Traced without a break, and the results are identical.  (The default back end is measured in
    benchmarks/speed_samplers.py --compile.)"""
    model, table, x = Tanh(VPLinear(), (3,)), table_of(name, 20).to("cpu"), torch.randn(4, 3)
    torch._dynamo.reset()
    traced = torch.compile(lambda y: run(model, y, table), fullgraph=True, backend="eager")
    assert torch.equal(traced(x), run(model, x, table))


def test_a_table_moves_its_tensors():
    """On the device of the state already, a table has nothing left to copy, and gives the same result."""
    table, x = table_of("unipc", 8), torch.randn(4, 3)
    moved = table.to("cpu")
    assert moved.times(x)[0].device == x.device
    assert torch.equal(run(Tanh(VPLinear(), (3,)), x, moved), run(Tanh(VPLinear(), (3,)), x, table))
