"""Every system in a limiting case is another one: one row a system, in float64, on the same draws.

A row says which equality proves the system and gives pairs of tensors that must agree to its tolerance, 0 for bit for
bit; and one pair that must not, from a case beside the limiting one, so that the row can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation, tangent_update
from fewstep.methods.consistency.tbcm import TBCM, jittered_times, walk
from fewstep.methods.flow_maps.mdt_dist import MDTDist, slope_engine, velocity_matching
from fewstep.methods.method import Batch, Method, Progress, alone
from fewstep.methods.parts.identities import eulerian
from fewstep.methods.parts.teacher_steps import guided_by_choice
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching, Schedule, TrigFlow

SHAPE, CLASSES = (3,), 2
#: Pairs by name: what must agree, and under a name that begins with "not " what must not.
Pairs = Iterator[tuple[str, Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """What proves a system, and to how many digits."""

    system: str
    equality: str
    tolerance: float
    pairs: Callable[[], Pairs]


ROWS: list[Row] = []


def row(system: str, equality: str, tolerance: float = 0.0) -> Callable[[Callable[[], Pairs]], Callable[[], Pairs]]:
    """Adds a row to the table."""

    def add(pairs: Callable[[], Pairs]) -> Callable[[], Pairs]:
        ROWS.append(Row(system, equality, tolerance, pairs))
        return pairs

    return add


def teacher(schedule: Schedule | None = None, seed: int = 0, classes: int | None = CLASSES) -> NetworkDenoiser:
    """A small network with weights away from their start."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP(SHAPE, 16, 2, classes).double()
        with torch.no_grad():
            for p in net.parameters():
                p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, classes)


def batch(n: int = 8, seed: int = 3, cond: Cond = None) -> Batch:
    """Data with labels, and the draws that go with it."""
    x = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % CLASSES if cond is None else cond, Rng(seed, "equalities"))


def moved(nets: nn.Module, group: str) -> None:
    """Put the networks of a group away from the teacher, always to the same place: no loss is zero by itself."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in nets.group_parameters(group):  # type: ignore[operator]
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def gradients_of(
    method: Method,
    source: Denoiser,
    given: Batch,
    progress: Progress | None = None,
    group: str = "student",
    **roles: Any,
) -> Mapping[str, Tensor]:
    """The gradient of the first update of a group, by parameter, as the trainer would take it."""
    nets = method.networks(Start(source, given=roles))
    moved(nets, group)
    for update in alone(method.updates(nets, given, progress or Progress(fraction=0.5))):
        if group not in update.groups:
            continue
        names, parameters = zip(*nets.named_parameters(), strict=True)
        held = [p for p in parameters if p.requires_grad]
        slopes = iter(torch.autograd.grad(update.loss, held, allow_unused=True))
        found = ((name, next(slopes)) for name, p in zip(names, parameters, strict=True) if p.requires_grad)
        return {name: slope for name, slope in found if slope is not None}
    raise AssertionError(f"{method.name} has no update of {group}")


# Consistency


@row("sCM", "its direction is cos t times the Eulerian one at s = 0, whatever the warm-up", 1e-12)
def scm() -> Pairs:
    method = ContinuousConsistencyDistillation(sigma_data=0.7)
    nets = method.networks(Start(teacher()))
    moved(nets, "student")
    denoiser, x = nets.student.denoiser, batch().x
    t = torch.linspace(0.1, 1.5, len(x), dtype=torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    for r in (1.0, 0.3):
        f, slope = torch.func.jvp(lambda x_, t_: denoiser.velocity(x_, t_), (x, t), (v, torch.ones_like(t)))
        paper = -(cos**2) * (f - v) - r * cos * sin * (x + slope)
        yield f"r = {r}", eulerian(nets.student, x, t, 0 * t, v, r=r, scale=t.cos()).g, -paper
        yield f"not another r than {r}", eulerian(nets.student, x, t, 0 * t, v, r=r / 2, scale=t.cos()).g, -paper


@row("TBCM", "the velocity kept with a state is the teacher's there, under the guidance drawn")
def tbcm_velocity() -> Pairs:
    method = TBCM(sigma_data=0.7)
    nets = method.networks(Start(teacher()))
    n, rng = 8, Rng(3, "equalities")
    guided, w = guided_by_choice(nets.teacher, method.guidances, n, rng)
    times = jittered_times(nets.teacher.schedule, method.route, method.shift, n, rng)
    cond = torch.arange(n) % CLASSES
    for i, (x, t, v) in enumerate(zip(*walk(guided, batch(n).x, times, cond), strict=True)):
        yield f"state {i}", v, Guided(nets.teacher, w).velocity(x, t, cond)
        yield f"not without guidance {i}", v, nets.teacher.velocity(x, t, cond)


@row("TBCM on noised data", "there its update is sCM's", 1e-12)
def tbcm_update() -> Pairs:
    scm_method, given, r = ContinuousConsistencyDistillation(sigma_data=0.7), batch(), 0.6
    expected = gradients_of(scm_method, teacher(), given, Progress(fraction=r * scm_method.tangent_warmup))
    nets = TBCM(sigma_data=0.7, guidances=(1.0,)).networks(Start(teacher()))
    moved(nets, "student")
    rng = batch().rng
    t = LogNormal(scm_method.noise_mean, scm_method.noise_std).draw(nets.student.schedule, given.n, rng)
    x = nets.student.schedule.add_noise(given.x, rng.normal_like(given.x), t)
    for name, c in (("", 0.1), ("not ", 1.0)):
        update = tangent_update(nets, x, t, nets.teacher.velocity(x, t, given.cond), given.cond, r=r, c=c)
        for key, p in nets.student.named_parameters():
            (slope,) = torch.autograd.grad(update.loss, p, retain_graph=True, allow_unused=True)
            if slope is not None:
                yield f"{name}{key}, c = {c}", slope, expected[f"student.{key}"]


@row("TBCM on a whitened Gaussian", "the solution is sCM's, -tan(t / 2) x, at which the tangent is 0", 1e-12)
def tbcm_solution() -> Pairs:
    schedule = TrigFlow(sigma_data=0.7)
    world = Gaussian(schedule, torch.zeros(SHAPE, dtype=torch.float64), 0.49)
    times = jittered_times(schedule, 16, 2.5, 8, Rng(0))
    x, t, v = (part[1:].flatten(0, 1) for part in walk(world, schedule.prior(batch().x), times))
    zero = torch.zeros_like(t)
    student = ExactFlowMap(world)
    yield "solution", student.mean_velocity(x, t, zero), -(t / 2).tan()[:, None] * x
    yield "tangent", x + eulerian(student, x, t, zero, v, scale=t.cos()).g, x
    yield "not another velocity", x + eulerian(student, x, t, zero, v + x, scale=t.cos()).g, x


# Flow maps


@row("MDT-dist", "velocity matching is the Eulerian direction at s = 0, which Align Your Flow's has there")
def mdt_dist() -> Pairs:
    start = Start(teacher(FlowMatching()))
    one_time = MDTDist().networks(start).student
    two_times = Jump(start.network("student", extras=("s",), on=FlowMatching()), two_times=True)  # s at zero
    x, t = batch().x, torch.linspace(0.1, 0.95, 8, dtype=torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    engine = slope_engine(0.0, False)
    found = velocity_matching(one_time, x, t, v, None, engine)[1].g
    yield "s = 0", found, eulerian(two_times, x, t, 0 * t, v).g
    yield "not s = t / 2", found, eulerian(two_times, x, t, t / 2, v).g
    yield "not with a normalised slope", found, velocity_matching(one_time, x, t, v, None, slope_engine(0.0, True))[1].g


@row("MDT-dist, in time", "velocity matching is the limit of consistency between neighbours", 1e-5)
def mdt_dist_in_time() -> Pairs:
    student = MDTDist().networks(Start(teacher(FlowMatching()))).student
    x, t = batch().x, torch.linspace(0.1, 0.95, 8, dtype=torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g = velocity_matching(student, x, t, v, None, slope_engine(0.0, False))[1].g
    step = 1e-6
    with torch.no_grad():
        slope = (student.to_data(x, t) - student.to_data(x - step * v, t - step)) / step
    yield "minus the slope of the consistency function", g, -slope
    yield "not along another velocity", g + v, -slope


# The test, after all rows


@pytest.mark.parametrize("this", ROWS, ids=[row.system for row in ROWS])
def test_a_system_is_another_one_in_its_limiting_case(this: Row) -> None:
    agreed = differed = 0
    for name, one, other in this.pairs():
        assert one.shape == other.shape, (this.system, name)
        gap = float((one - other).abs().max() / other.abs().max().clamp_min(1e-300))
        if name.startswith("not "):
            assert gap > 1e3 * max(this.tolerance, 1e-9), (this.system, name, gap)
            differed += 1
        else:
            assert gap <= this.tolerance, (this.system, name, gap)
            agreed += 1
    assert agreed and differed, f"{this.system}: a row needs pairs that agree and one that does not"
