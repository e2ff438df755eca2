"""Every system in a limiting case is another one: one row a system, in float64, on the same draws.

A row says which equality proves the system and gives pairs of tensors that must agree to its tolerance, 0 for bit for
bit; and one pair that must not, from a case beside the limiting one, so that the row can fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.constant_acceleration import ConstantAcceleration, acceleration
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser, View
from fewstep.exact import ExactFlowMap, Gaussian
from fewstep.flow_maps import Jump, ddim_move
from fewstep.guidance import Guided
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.ctm import ConsistencyTrajectory
from fewstep.methods.consistency.hyper_sd import OneStepMatching
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation
from fewstep.methods.consistency.mlcm import MultistepConsistency
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation
from fewstep.methods.consistency.rcm import RCM, student_direction
from fewstep.methods.consistency.sana_sprint import SanaSprint
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation, tangent_update
from fewstep.methods.consistency.scott import StochasticConsistencyDistillation
from fewstep.methods.consistency.tbcm import TBCM, jittered_times, walk
from fewstep.methods.consistency.tscd import SegmentedConsistency
from fewstep.methods.flow_maps.align_your_flow import AlignYourFlow, Asked
from fewstep.methods.flow_maps.boot import BOOT, signal_step
from fewstep.methods.flow_maps.constant_acceleration import InitialVelocity
from fewstep.methods.flow_maps.free_flow import FreeFlow, followed
from fewstep.methods.flow_maps.guided_distillation import GuidedDenoiser, GuidedHalving
from fewstep.methods.flow_maps.mdt_dist import MDTDist, slope_engine, velocity_matching
from fewstep.methods.flow_maps.mean_flow import MeanFlowDistillation, MeanFlowTraining
from fewstep.methods.flow_maps.progressive import ProgressiveDistillation
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT, Reflow, straight_pair
from fewstep.methods.flow_maps.shortcut import Shortcut
from fewstep.methods.flow_maps.slim_flow import AnnealingReflow
from fewstep.methods.matching.diff_instruct import DiffInstruct
from fewstep.methods.matching.disback import Backtracking
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.f_distill import DIVERGENCES, FDistill
from fewstep.methods.matching.ladd import LADD
from fewstep.methods.matching.msd import MSD
from fewstep.methods.matching.phased_dmd import Phase
from fewstep.methods.matching.sid import SiD
from fewstep.methods.matching.sim import SIM
from fewstep.methods.matching.tdm import TDM, Interval
from fewstep.methods.method import Batch, Method, Networks, Progress, Recipe, alone
from fewstep.methods.parts.distribution_matching import matching_loss
from fewstep.methods.parts.from_noise import FromNoise
from fewstep.methods.parts.host import Host
from fewstep.methods.parts.identities import Direction, eulerian, lagrangian
from fewstep.methods.parts.ramp import Ramp
from fewstep.methods.parts.score_matching import denoising_loss
from fewstep.methods.parts.teacher_steps import ERSDE, DDIMNoise, ddim_step, guided, guided_by_choice
from fewstep.methods.parts.times import LogNormal, Ordered, Own, PairLaw, Segments, TimeLaw
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.inputs import with_inputs
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

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


def flat(slopes: Iterable[Tensor]) -> Tensor:
    """Gradients as one vector."""
    return torch.cat([slope.flatten() for slope in slopes])


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


@row("CTM", "one step on a grid of two times, without denoising, is CM's step with this parameterisation", 1e-12)
def ctm() -> Pairs:
    class Same(Rng):
        """The same noise wherever it is drawn."""

        def normal_like(self, x: Tensor) -> Tensor:
            return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))

    class OnJumps(ConsistencyDistillation):
        def networks(self, start: Start) -> Networks:
            return ConsistencyTrajectory(denoising_weight=0.0).networks(start)

    given = dataclasses.replace(batch(), rng=Same(3, "equalities"))
    one_step = ConsistencyTrajectory(grid_times=2, most_steps=1, denoising_weight=0.0)
    found, cm = gradients_of(one_step, teacher(), given), gradients_of(OnJumps(grid_times=2), teacher(), given)
    other = gradients_of(dataclasses.replace(one_step, grid_times=3), teacher(), given)
    for name, slope in cm.items():
        yield name, found[name], slope
        yield f"not {name}", other[name], slope


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


class FromPairs(AlignYourFlow):
    """The Eulerian objective of Align Your Flow with the pair's velocity ``eps - x_0`` in place of the teacher's, and
    MeanFlow's law of times."""

    def times(self) -> PairLaw:
        return Ordered(-0.4, 1.0, 0.5)

    def direction(self, student: Jump, teacher: Denoiser, asked: Asked, r: float) -> Direction:
        t = asked.t[:, None]
        return eulerian(student, asked.x, asked.t, asked.s, (asked.x - batch().x) / t, asked.cond, r=r)


PLAIN = {"guidance": 1.0, "guidance_low": 1.0, "guidance_high": 1.0}


@row("MeanFlow", "without its weight it is Align Your Flow's Eulerian objective along the pair's velocity", 1e-7)
def mean_flow() -> Pairs:
    method = MeanFlowTraining(power=0.0, equal=0.5, label_dropout=0.0)
    ours = gradients_of(method, teacher(), batch())
    far = 1e9  # so large a constant normalizes nothing: it divides
    other = FromPairs(c=far, r_max=1.0, tangent_warmup=0.0, **PLAIN)
    theirs = gradients_of(other, teacher(), batch())
    distilled = gradients_of(MeanFlowDistillation(power=0.0, equal=0.5), teacher(), batch())
    assert ours.keys() == theirs.keys()
    for name in ours:
        yield name, ours[name], far * theirs[name]
    name = "student.denoiser.net.leave.weight"
    yield "not the teacher's velocity", distilled[name], ours[name]


@row("MeanFlow, equal times", "where s = t it is flow matching", 1e-12)
def mean_flow_at_equal_times() -> Pairs:
    method = MeanFlowTraining(power=0.0, equal=1.0, label_dropout=0.0)
    ours = gradients_of(method, teacher(), batch())
    nets, given = method.networks(Start(teacher())), batch()
    moved(nets, "student")
    t, _ = method.times().draw(nets.student.schedule, given.n, given.rng)
    eps = given.rng.normal_like(given.x)
    x = (1 - t[:, None]) * given.x + t[:, None] * eps
    denoiser = nets.student.denoiser
    velocity = denoiser.velocity(x, t, given.cond, s=denoiser.label(t, x))
    loss = torch.nn.functional.mse_loss(velocity, eps - given.x)
    named = {name: p for name, p in nets.named_parameters() if name in ours}
    for name, slope in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        yield name, ours[name], slope
    name = "student.denoiser.net.leave.weight"
    apart = gradients_of(dataclasses.replace(method, equal=0.0), teacher(), batch())
    yield "not where the times differ", apart[name], ours[name]


def aligned() -> tuple[Jump, Tensor, Tensor, Tensor]:
    """A student of Align Your Flow away from its teacher, states, their times, and velocities of the teacher."""
    nets = AlignYourFlow(**PLAIN).networks(Start(teacher()))
    moved(nets, "student")
    x = batch().x
    t = torch.linspace(0.1, 0.95, len(x), dtype=torch.float64)
    return nets.student, x, t, nets.teacher.velocity(x, t).detach()


@row(
    "Align Your Flow",
    "to the data it moves the consistency function against its slope, as sCM does",
    1e-10,
)
def align_your_flow() -> Pairs:
    student, x, t, v = aligned()
    g = eulerian(student, x, t, 0 * t, v).g
    slope = torch.func.jvp(lambda x_, t_: student.to_data(x_, t_), (x, t), (v, torch.ones_like(t)))[1]
    yield "the slope of the consistency function", g, -slope
    # the same student seen on TrigFlow: the state on the circle, and the angle that moves as 1 / ((1 - t)^2 + t^2)
    trig = TrigFlow(t_min=0.0, t_max=1.5707, sigma_data=1.0)
    on_circle = Jump(student.denoiser.on(trig), two_times=True)
    angle, radius = torch.atan2(t, 1 - t), torch.sqrt((1 - t) ** 2 + t**2)
    state = x / radius[:, None]
    speed = (v / radius[:, None] - (2 * t - 1)[:, None] * x / radius[:, None] ** 3) * radius[:, None] ** 2
    scm = eulerian(on_circle, state, angle, 0 * t, speed, scale=angle.cos()).g
    yield "sCM's direction", g, scm / (angle.cos() * radius**2)[:, None]
    yield "not to another time", eulerian(student, x, t, 0.05 + 0 * t, v).g, -slope


@row("Align Your Flow, equal times", "where s = t it is velocity matching, by both objectives", 1e-12)
def align_your_flow_at_equal_times() -> Pairs:
    student, x, t, v = aligned()
    source = AlignYourFlow(**PLAIN).networks(Start(teacher())).teacher
    match = student.mean_velocity(x, t, t) - v
    yield "Eulerian", eulerian(student, x, t, t, v).g, match.detach()
    yield "Lagrangian", lagrangian(student, x, t, t, source).g, match.detach()
    yield "not between two times", eulerian(student, x, t, 0.9 * t, v).g, match.detach()


# Flow maps: what composes


class At(View):
    """A denoiser whose network is always told the same of its further inputs."""

    def __init__(self, inner: Denoiser, **told: float) -> None:
        super().__init__(inner)
        self.told = told

    def forward(self, x: Tensor, t: Any, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner(x, t, cond, **self.values(x), **extras)

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.affine(x, t, cond, **self.values(x), **extras)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        return {name: torch.full((len(x),), value, dtype=torch.float64) for name, value in self.told.items()}


def told(name: str, schedule: Schedule | None = None) -> NetworkDenoiser:
    """A teacher whose network takes a further input, which has an effect."""
    found = teacher(schedule)
    found.net = with_inputs(found.net, (name,))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in found.net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return found


def in_order(found: Mapping[str, Tensor]) -> Tensor:
    """Gradients as one vector, whatever the parameters are called."""
    return torch.cat([slope.flatten() for slope in found.values()])


@row("Guided distillation", "its halvings at one weight are Progressive Distillation of the network told that weight")
def guided_distillation() -> Pairs:
    source = told("w")
    pd = gradients_of(ProgressiveDistillation(steps=4), At(source, w=3.0), batch())
    for name, w in (("w = 3", 3.0), ("not w = 2", 2.0)):
        halving = GuidedHalving(steps=4, w_min=w, w_max=w)
        yield name, in_order(gradients_of(halving, source, batch())), in_order(pd)


@row("Guided distillation, stage 1", "its loss is 0 at the guided teacher itself, at every weight", 1e-12)
def guided_denoiser() -> Pairs:
    method, source = GuidedDenoiser(w_min=0.0, w_max=4.0), teacher()

    class Itself(View):
        """The guided teacher, told the weight."""

        def velocity(self, x: Tensor, t: Any, cond: Cond = None, **extras: Tensor) -> Tensor:
            return Guided(source, self.scale * extras["w"]).velocity(x, t, cond)

        def forward(self, x: Tensor, t: Any, cond: Cond = None, **extras: Tensor) -> Tensor:
            return Guided(source, self.scale * extras["w"])(x, t, cond)

    for name, scale in (("the scale", 1.0), ("not another", 1.1)):
        student = Itself(source)
        student.scale = scale
        nets = Networks({"student": method.jump(student, "ddim"), "teacher": Jump(source)}, {})
        (update,) = alone(method.updates(nets, batch(), Progress()))
        yield name, 1 + update.loss, torch.ones_like(update.loss)


@row("Shortcut", "one step from two on flow matching is Progressive Distillation's halving from two to one", 1e-12)
def shortcut() -> Pairs:
    source, given = told("d", FlowMatching()), batch()
    given.rng.integers(given.n, 0, 1)  # which step it is, drawn first there
    mine = gradients_of(Shortcut(finest=2, share=1.0, steps=(1, 2), label_dropout=0.0), source, given)
    for name, d in (("d = 1/2", 1.0), ("not d = 1", 0.0)):
        pd = gradients_of(ProgressiveDistillation(steps=1), At(source, d=d), batch(), student=At(source, d=0.0))
        yield name, in_order(mine), in_order(pd)


# Flow maps: couplings


def noise(n: int = 8) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def paired(cond: Cond = None) -> Batch:
    """The batch with a noise beside each sample."""
    given = batch(cond=cond)
    return dataclasses.replace(given, columns={"noise": noise()})


def with_velocity(schedule: Schedule = STRAIGHT) -> NetworkDenoiser:
    """A small network that predicts the velocity on the straight paths, as flow matching has it."""
    return NetworkDenoiser(teacher().net, schedule, Velocity(), SHAPE, CLASSES)


def flattened(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([slope.flatten() for _, slope in sorted(gradients.items())])


@row("Constant Acceleration Flow", "h = 1: reflow's states and targets, and with exact data no acceleration", 1e-14)
def caf() -> Pairs:
    x, n = batch().x, noise()
    tau = torch.linspace(0, 0.9, 8, dtype=torch.float64)
    nets = InitialVelocity(h=1).networks(Start(with_velocity()))
    moved(nets, "velocity")
    reflow = nets.velocity.velocity(straight_pair(x, n, 1 - tau), 1 - tau, batch().cond)
    for h in (1.0, 1.5):
        said, wanted, _ = InitialVelocity(h=h).prediction(nets, x, n, tau, batch())
        name = "" if h == 1 else "not "
        yield f"{name}reflow's prediction at h = {h}", said, reflow
        yield f"{name}its target at h = {h}", wanted, n - x
        curved = acceleration(n - x, h * (n - x))
        yield f"{name}rectified flow at h = {h}", n - x + curved, n - x
    flow = with_velocity(FlowMatching())
    made, euler = ConstantAcceleration(flow, Told(flow), 1.0), Jump(flow)
    one, two = (Plan(tuple((1 - torch.arange(k) / k).tolist()), gamma=0.0) for k in (1, 2))
    yield "one step is one Euler step", rollout(made, n, one), rollout(euler, n, one)
    yield "not of two, whose second call is bent", rollout(made, n, two), rollout(euler, n, two)


def annealed(given: Batch, b: float) -> Tensor:
    """The gradient of annealing reflow with a constant share of fresh noise."""
    return flattened(gradients_of(AnnealingReflow(beta=Ramp(b)), with_velocity(), fresh(given), group="model"))


@row("SlimFlow", "without fresh noise, b = 0, annealing reflow is reflow")
def slim_flow() -> Pairs:
    given = paired()
    reflow = flattened(gradients_of(Reflow(), with_velocity(), fresh(given), group="model"))
    yield "b = 0", annealed(given, 0.0), reflow
    yield "not b = 0.5", annealed(given, 0.5), reflow


@row("SlimFlow, b = 1", "with nothing but fresh noise it is flow matching on the teacher's samples", 1e-13)
def slim_flow_independent() -> Pairs:
    given, model = paired(), with_velocity()
    nets = AnnealingReflow().networks(Start(model))
    moved(nets, "model")
    rng = Rng(3, "equalities")
    t = rng.uniform(len(given.x), low=STRAIGHT.t_min, high=1.0)
    loss = denoising_loss(nets.model, given.x, t, given.cond, rng.stream("annealing"))
    names, parameters = zip(*nets.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    matched = {k: slope for k, slope in zip(names, slopes, strict=True) if slope is not None}
    yield "b = 1", annealed(given, 1.0), flattened(matched)
    yield "not b = 0.9", annealed(given, 0.9), flattened(matched)


def fresh(given: Batch) -> Batch:
    """The batch with nothing drawn yet."""
    return dataclasses.replace(given, rng=Rng(3, "equalities"))


class Told(View):
    """A denoiser that is told a velocity and does not listen."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner(x, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner.velocity(x, t, cond)


# Flow maps: from the prior alone


def from_noise(method: FromNoise) -> tuple[Networks, Tensor, Tensor, Cond]:
    """Networks on flow matching with a student that moved, noise, times and labels."""
    nets = method.networks(Start(teacher(FlowMatching())))
    moved(nets, "student")
    given = batch()
    return nets, given.normal(), torch.linspace(0.05, 0.75, given.n, dtype=torch.float64), given.cond


@row("BOOT", "one bootstrap step on flow matching is FreeFlow's by a difference of the path: y = z + F", 1e-14)
def boot() -> Pairs:
    nets, z, s, cond = from_noise(BOOT())
    one, t = torch.ones_like(s), s + 0.2
    with torch.no_grad():
        y = nets.student.predict(z, one, t, cond)
        step = signal_step(nets.teacher, z, y, t, s, cond)
    found = followed(nets.student, z, s, nets.teacher, cond, step=0.2)
    own, go = z - found.F, (1 - s[:, None]) / 0.2
    yield "the target", go * (own - step.y), -found.g
    d, later, state = (1 - t)[:, None], (1 - s)[:, None], z + (1 - t)[:, None] * (y - z)
    u = -nets.teacher.velocity(state, t, cond)
    yield "F(d + D) = F(d) + D / (d + D) (u - F(d))", step.y - z, (y - z) + 0.2 / later * (u - (y - z))
    # the slip of feeding the advanced state in place of the prediction
    yield "not the advanced state", step.y - z, (y - z) + 0.2 / later * (state + 0.2 * u - z - d * (y - z))


@row("FreeFlow", "its gradient is that of the Lagrangian direction at t = 1, g = F - d dF/ds - u", 1e-12)
def free_flow() -> Pairs:
    method = FreeFlow(difference=0.0, correction=0.0, k=1.0, eps=0.1)
    z = batch().normal()
    found = gradients_of(method, teacher(FlowMatching()), batch())

    def by_hand(sign: float) -> Mapping[str, Tensor]:
        nets = method.networks(Start(teacher(FlowMatching())))
        moved(nets, "student")
        rng, cond = batch().rng, batch().cond
        rng.normal_like(z)
        times = 1 - rng.uniform(len(z)) ** (1 / (1 + method.power))
        one = torch.ones_like(times)
        f, slope = torch.func.jvp(
            lambda s_: nets.student.mean_velocity(z, one, s_, cond), (times,), (torch.ones_like(one),)
        )
        d = (1 - times)[:, None]
        g = (f - d * slope - sign * nets.teacher.velocity(z - d * f, times, cond)).detach()
        weight = 1 / (g.square().mean(1, keepdim=True) + 0.1)
        own = nets.student.mean_velocity(z, one, times, cond)
        loss = (2 * weight * g * own).mean()
        held = {name: p for name, p in nets.named_parameters() if p.requires_grad}
        return dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))

    flat = [torch.cat([v.flatten() for v in grads.values()]) for grads in (found, by_hand(1.0), by_hand(-1.0))]
    yield "the gradient", flat[0], flat[1]
    yield "not with the other sign of the velocity", flat[0], flat[2]


@row("LCM", "at one weight it is consistency distillation with a DDIM step, whose grid on EDM it shares", 1e-12)
def lcm() -> Pairs:
    """Both around one consistency function: the two papers' differ in their boundary coefficients, LCM's being the
    teacher's denoiser to 3e-6 from the first time of the grid on, and in nothing else."""

    class WithDDIM(ConsistencyDistillation):
        def partner(self, nets: Any, given: Batch, x_t: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return ddim_step(guided(nets.teacher, self.guidance), x_t, t, s, given.cond)

    source, draw = teacher(EDM()), {"guidance_min": 2.0, "guidance_max": 2.0}
    skipping = LatentConsistencyDistillation(skip=20, mu=0.9, **draw)
    own = skipping.networks(Start(source))
    cm = WithDDIM(grid_times=51, mu=0.9, guidance=2.0)
    theirs = cm.networks(Start(source))
    theirs.student, theirs.target = own.student, own.target
    moved(own, "student")

    def slopes(method: Method, nets: nn.Module) -> Tensor:
        (update,) = method.updates(nets, batch(), Progress(fraction=0.5))  # type: ignore[arg-type]
        return flat(torch.autograd.grad(update.loss, list(own.student.parameters())))

    yield "gradient", slopes(skipping, own), slopes(cm, theirs)
    yield (
        "not with another skip",
        slopes(LatentConsistencyDistillation(skip=25, mu=0.9, **draw), own),
        slopes(cm, theirs),
    )


@row("PCM", "with one phase it is LCM at one weight, up to LCM's boundary coefficients (3e-6 from D)", 1e-4)
def pcm() -> Pairs:
    draw = {"guidance_min": 2.0, "guidance_max": 2.0, "mu": 0.9}
    one = gradients_of(PhasedConsistencyDistillation(phases=1, **draw), teacher(), batch())
    latent = gradients_of(LatentConsistencyDistillation(**draw), teacher(), batch())
    two = gradients_of(PhasedConsistencyDistillation(phases=2, **draw), teacher(), batch())
    yield "gradient", flat(one.values()), flat(latent.values())
    yield "not with two phases", flat(two.values()), flat(latent.values())


@row("PCM, a phase a step", "it regresses on the teacher's own DDIM step", 1e-12)
def pcm_steps() -> Pairs:
    source, schedule = teacher(), teacher().schedule
    found = gradients_of(PhasedConsistencyDistillation(phases=10, skip=100), source, batch())
    nets = PhasedConsistencyDistillation(phases=10, skip=100).networks(Start(source))
    moved(nets, "student")

    def regressed(phases: int) -> Tensor:
        given, edges = batch(), Segments(phases).edges(schedule)
        n = given.rng.integers(len(given.x), 0, phases)
        t, s = edges.flip(0)[n], edges.flip(0)[n + 1]
        x = schedule.add_noise(given.x, given.rng.normal_like(given.x), t)
        loss = (nets.student(x, t, s, given.cond) - ddim_step(source, x, t, s, given.cond)).square().mean()
        return flat(torch.autograd.grad(loss, list(nets.student.parameters())))

    yield "gradient", flat(found.values()), regressed(10)
    yield "not of another grid", flat(found.values()), regressed(9)


# f-distill and where DMD2's discriminator sits


def matched(method: DMD2 | FDistill, group: str, equal_logits: bool = False) -> Tensor:
    """The gradient of the first update of a group, with everything away from its start."""
    torch.manual_seed(0)
    nets = method.networks(Start(teacher())).double()
    moved(nets, "student")
    moved(nets, "critic")
    if equal_logits:
        for p in nets.discriminator.parameters():
            p.data.zero_()
    updates = alone(method.updates(nets, batch(), Progress()))
    loss = next(update.loss for update in updates if group in update.groups)
    return flat(torch.autograd.grad(loss, [p for p in nets.group_parameters(group) if p.requires_grad]))


ON_THE_TEACHER: dict[str, Any] = {"gan_weight": 0.3, "discriminator_weight": 0.5, "discriminator": "teacher", "r1": 2.0}


@row("f-distill, reverse KL", "it is DMD2, wherever the discriminator sits, student and critic")
def f_distill() -> Pairs:
    for body in ("teacher", "critic"):
        shared = {**ON_THE_TEACHER, "discriminator": body, "guidance": 1.5}
        ours, theirs = FDistill(divergence="rkl", **shared), DMD2(**shared)
        for group in ("student", "critic"):
            yield f"{group}, {body}", matched(ours, group), matched(theirs, group)
        yield (
            f"not js, {body}",
            matched(dataclasses.replace(ours, divergence="js"), "student"),
            matched(ours, "student"),
        )
    yield "not the other body", matched(ours, "student"), matched(FDistill("rkl", **ON_THE_TEACHER), "student")


@row("f-distill, equal ratios", "where the discriminator is blind every divergence is DMD2", 1e-12)
def f_distill_of_equal_ratios() -> Pairs:
    expected = matched(DMD2(**ON_THE_TEACHER), "student", equal_logits=True)
    for name in DIVERGENCES:
        yield name, matched(FDistill(name, **ON_THE_TEACHER), "student", equal_logits=True), expected
    yield "not where it sees", matched(FDistill("kl", **ON_THE_TEACHER), "student"), expected


@row("DMD2 with the teacher's features", "without the GAN's gradient the student's is that without a GAN")
def dmd2_on_the_teacher() -> Pairs:
    method = DMD2(**ON_THE_TEACHER)
    plain = matched(DMD2(gan_weight=0.0), "student")
    yield "a blind discriminator", matched(method, "student", equal_logits=True), plain
    yield "not one that sees", matched(method, "student"), plain


# Distribution matching: stages around a host, and parts of the conditions

HOSTS: tuple[Method, ...] = (
    DMD2(gan_weight=0.0, critic_steps=1), DMD(regression_weight=0.0), DiffInstruct(), SiD(), SIM(),
)  # fmt: skip


@row("DisBack", "without a recorded path its second stage is the host, whichever it is")
def disback() -> Pairs:
    def slopes(method: Method, **made: nn.Module) -> Tensor:
        nets = method.networks(Start(teacher(), made=made))
        moved(nets, "student")
        updates = alone(method.updates(nets, batch(), Progress()))
        loss = next(update.loss for update in updates if update.group == "student")
        return flat(torch.autograd.grad(loss, nets.group_parameters("student")))

    for host in HOSTS:
        method, expected = Backtracking(Host(host)), slopes(host)
        yield host.name, slopes(method), expected
        yield f"not with a node, {host.name}", slopes(method, path=nn.ModuleList([teacher(seed=1)])), expected


@row("MSD", "one part is the method that distils it, whichever it is")
def msd() -> Pairs:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(32, *SHAPE, dtype=torch.float64, generator=gen)
    data = Dataset("points", x, torch.arange(32) % CLASSES)

    def weights(recipe: Recipe) -> Tensor:
        made = run_recipe(recipe, teacher(), data, Settings(Budget(4), 8, precision="fp32"), show=False).model
        return flat(p.detach() for p in made.parameters())[: sum(p.numel() for p in teacher().parameters())]

    for host in HOSTS:
        expected = weights(host)
        yield host.name, weights(MSD(parts=1, adm=0.0, dm=Host(host))), expected
        yield f"not the first of two, {host.name}", weights(MSD(parts=2, adm=0.0, dm=Host(host))), expected


# rCM


@row("rCM", "at r = 1 its direction is sCM's, to the last bit")
def rcm() -> Pairs:
    nets = RCM(sigma_data=0.7).networks(Start(teacher()))
    moved(nets, "student")
    x = batch().x
    t = torch.linspace(0.1, 1.5, len(x), dtype=torch.float64)
    v = nets.teacher.velocity(x, t).detach()
    scm_direction = eulerian(nets.student, x, t, 0 * t, v, scale=t.cos())
    for name, r in (("direction", 1.0), ("not in its warm-up", 0.5)):
        yield name, student_direction(nets.student, x, t, v, None, r=r).g, scm_direction.g


@row("rCM without matching", "its gradient is sCM's at an even weight, times the number of dimensions", 1e-12)
def rcm_without_matching() -> Pairs:
    def slopes(method: Method, other: str) -> Tensor:
        nets = method.networks(Start(teacher()))
        moved(nets, "student")
        for p in nets.get_submodule(other).parameters() if other else ():
            p.data.fill_(0.1 * (other == "critic"))
        (update,) = method.updates(nets, batch(), Progress(fraction=0.95))  # type: ignore[arg-type]
        return flat(torch.autograd.grad(update.loss, list(nets.student.parameters())))

    expected = 3 * slopes(ContinuousConsistencyDistillation(sigma_data=0.7, noise_mean=-0.8), "weight")
    yield "gradient", slopes(RCM(sigma_data=0.7, matching_weight=0.0), ""), expected
    yield "not with matching", slopes(RCM(sigma_data=0.7, matching_weight=0.1), "critic"), expected


@row("rCM without consistency", "of one call it is DMD without its regression, at DMD's times, twice the sum", 1e-12)
def rcm_without_consistency() -> Pairs:
    class InnerTimes(RCM):
        def matching_law(self, shape: tuple[int, ...]) -> TimeLaw:
            return Own(0.02, 0.98)

    def slopes(method: Method) -> Tensor:
        nets = method.networks(Start(teacher()))
        moved(nets, "student")
        moved(nets, "critic")
        update = next(iter(method.updates(nets, batch(), Progress(fraction=0.5))))
        return flat(torch.autograd.grad(update.loss, list(nets.student.parameters())))  # type: ignore[union-attr]

    own = {"sigma_data": 0.7, "consistency_weight": 0.0, "matching_weight": 0.3}
    expected = 2 * 3 * 0.3 * slopes(DMD(regression_weight=0.0))
    yield "gradient", slopes(InnerTimes(rollout_steps=1, **own)), expected
    yield "not at times of its own", slopes(RCM(rollout_steps=1, **own)), expected


# Consistency with a stochastic teacher, and on segments


@row("SCott", "without noise, in one sub-step and without its game it is LCM, bit for bit")
def scott() -> Pairs:
    plain = {"skip": 24, "steps": (1, 2, 4)}
    expected = gradients_of(LatentConsistencyDistillation(**plain), teacher(), batch())
    bare = StochasticConsistencyDistillation(noise=DDIMNoise(0.0), substeps=1, gan_weight=0.0)
    yield "gradient", flat(gradients_of(bare, teacher(), batch()).values()), flat(expected.values())
    for name, change in (("noise", {"noise": DDIMNoise(0.2)}), ("two sub-steps", {"substeps": 2})):
        other = gradients_of(dataclasses.replace(bare, **change), teacher(), batch())
        yield f"not with {name}", flat(other.values()), flat(expected.values())


@row("SCott, ER-SDE", "phi = r^2 is DDIM's eta = 1, the posterior of DDPM, and phi = r the probability flow", 1e-12)
def scott_er_sde() -> Pairs:
    bare = StochasticConsistencyDistillation(gan_weight=0.0, substeps=2)

    def slopes(noise: Any) -> Tensor:
        return flat(gradients_of(dataclasses.replace(bare, noise=noise), teacher(), batch()).values())

    yield "phi = r^2", slopes(ERSDE("r^2")), slopes(DDIMNoise(1.0))
    yield "phi = r", slopes(ERSDE("r")), slopes(DDIMNoise(0.0))
    yield "not phi = r^1.5", slopes(ERSDE("r^1.5")), slopes(DDIMNoise(1.0))


@row("MLCM, one segment", "on noised data it is PCM in one phase without a target network, bit for bit")
def mlcm() -> Pairs:
    one = MultistepConsistency(segments=1, states="data", guidance=2.0)
    expected = gradients_of(
        PhasedConsistencyDistillation(phases=1, guidance_min=2.0, guidance_max=2.0), teacher(), batch()
    )
    for name, method in (
        ("gradient", one),
        ("not in two segments", dataclasses.replace(one, segments=2)),
        ("not on trajectories", dataclasses.replace(one, states="trajectory")),
        ("not without guidance", dataclasses.replace(one, guidance=1.0)),
    ):
        yield name, flat(gradients_of(method, teacher(), batch()).values()), flat(expected.values())


@row("MLCM, one segment, and LCM", "on noised data it is LCM at one weight, whose boundary is that of the jump", 1e-11)
def mlcm_lcm() -> Pairs:
    one = MultistepConsistency(segments=1, states="data", guidance=2.0)
    # c_skip = 0 and c_out = 1 to all digits from the first time on
    lcm_like = {"guidance_min": 2.0, "guidance_max": 2.0, "time_scale": 1e9}
    found = flat(gradients_of(one, teacher(), batch()).values())
    for name, mu in (("no average", 0.0), ("not with a target network", 0.95)):
        method = LatentConsistencyDistillation(mu=mu, **lcm_like)
        nets = method.networks(Start(teacher()))
        moved(nets, "student")
        (update,) = method.updates(nets, batch(), Progress())
        yield name, found, flat(torch.autograd.grad(update.loss, list(nets.student.parameters())))


@row("MLCM, a segment a step", "it regresses on the guided teacher's own DDIM step", 1e-12)
def mlcm_steps() -> Pairs:
    source, schedule = teacher(), teacher().schedule
    method = MultistepConsistency(segments=10, skip=100, states="data", guidance=2.0)
    found, nets = gradients_of(method, source, batch()), method.networks(Start(source))
    moved(nets, "student")
    edges = Segments(10).edges(schedule).flip(0)
    for name, scale in (("gradient", 2.0), ("not of the teacher alone", 1.0)):
        given = batch()
        n = given.rng.integers(given.n, 0, 10)
        t, s = edges[n], edges[n + 1]
        x = schedule.add_noise(given.x, given.rng.normal_like(given.x), t)
        aim = ddim_step(guided(source, scale), x, t, s, given.cond)
        loss = (nets.student(x, t, s, given.cond) - aim).square().mean()
        yield name, flat(found.values()), flat(torch.autograd.grad(loss, list(nets.student.parameters())))


# Matching along trajectories


@row("Phased DMD", "with one phase of one call it is DMD2 without its GAN on flow matching, student and critic")
def phased_dmd() -> Pairs:
    def slopes(method: Method) -> Mapping[str, Tensor]:
        nets = method.networks(Start(teacher(FlowMatching())))
        moved(nets, "student")
        moved(nets, "critic")
        return {
            update.groups[0]: flat(
                slope
                for slope in torch.autograd.grad(
                    update.loss, nets.group_parameters(update.groups[0]), allow_unused=True
                )
                if slope is not None
            )
            for update in alone(method.updates(nets, batch(), Progress()))
        }

    plain, one, first = (
        slopes(method)
        for method in (
            DMD2(gan_weight=0.0, critic_steps=1),
            Phase(phases=1, steps=1, critic_steps=1),
            Phase(phases=2, steps=1, critic_steps=1),
        )
    )
    for group in ("student", "critic"):
        yield group, one[group], plain[group]
        yield f"not the {group} of the first of two", first[group], plain[group]


@row("TDM", "with one step its gradient is DMD's, but for the pseudo-Huber distance; its critic's weights are 1", 1e-11)
def tdm() -> Pairs:
    source, given = teacher(FlowMatching()), batch()
    nets = TDM(steps=(1,)).networks(Start(source))
    moved(nets, "student")
    moved(nets, "critic")
    noise, one = given.x, torch.ones(len(given.x), dtype=torch.float64)
    x = nets.student.to_data(noise, 1.0, given.cond)
    step = Interval(noise, x.detach(), one, 0 * one, torch.zeros(len(noise), dtype=torch.long))
    weights = list(nets.student.parameters())

    def slope(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return flat(g for g in found if g is not None)

    plain, _ = matching_loss(x, source, nets.critic, given.cond, Rng(0), Own(0.02, 0.99))
    for name, method, factor in (
        ("squared", TDM(steps=(1,), distance="l2"), 0.5),
        ("pseudo-Huber of a wide square", TDM(steps=(1,), distance="pseudo-huber", c=1e6), 1e6),
        ("not pseudo-Huber as published", TDM(steps=(1,), distance="pseudo-huber", c=1e-3), 1e-3),
    ):
        found = method.student_loss(nets, dataclasses.replace(given, rng=Rng(0)), step, 1)
        yield name, factor * slope(found), slope(plain)
    loss, logs = TDM(steps=(1,)).critic_loss(nets, dataclasses.replace(given, rng=Rng(0)), step, 1)
    rng = Rng(0)
    t = Own(0.02, 0.99).draw(source.schedule, len(x), rng)
    x_t = source.schedule.add_noise(x.detach(), rng.normal_like(x), t)
    error = (nets.critic(x_t, t, given.cond) - x.detach()).square().mean(1)
    snr = ((1 - t) / t) ** 2
    yield "importance", logs["importance"], torch.ones((), dtype=torch.float64)
    yield "critic's loss", loss, (snr.clamp_max(5.0) * error).mean()
    yield "not the critic's loss without the bound", loss, (snr * error).mean()


# Hyper-SD


@row("TSCD, one segment", "it is TCD's step, written down", 1e-12)
def tscd() -> Pairs:
    """A guided DDIM step, two jumps to one time below it, squares; scales are drawn, and the student is not told."""
    source, method = teacher(), SegmentedConsistency(guidance_min=1.5, guidance_max=3.0, skip=50)
    found = gradients_of(method, source, batch())
    nets = method.networks(Start(source))
    moved(nets, "student")

    def tcd(sure: float = 0.0) -> Tensor:
        given, schedule = batch(), source.schedule
        rng, x_0, cond = given.rng, given.x, given.cond
        index = torch.arange(1000, -1, -50, dtype=torch.float64)  # of an own index of 1000 steps
        n = rng.integers(given.n, 0, len(index) - 1)
        t, s, end = (grids.at_index(schedule, place) for place in (index[n], index[n + 1], index[n + 1]))
        end = grids.at_index(schedule, rng.uniform(given.n) * index[n + 1] * (1 - sure))
        x_t = schedule.add_noise(x_0, rng.normal_like(x_0), t)
        w = rng.uniform(given.n, low=1.5, high=3.0)[:, None]
        with torch.no_grad():
            plain, away = source(x_t, t, cond), source(x_t, t, torch.full_like(cond, -1))
            x_s = ddim_move(x_t, away + w * (plain - away), t, s, schedule)
            aim = ddim_move(x_s, nets.target.denoiser(x_s, s, cond), s, end, schedule)
        landed = ddim_move(x_t, nets.student.denoiser(x_t, t, cond), t, end, schedule)
        return flat(torch.autograd.grad((landed - aim).square().mean(), list(nets.student.parameters())))

    yield "gradient", flat(found.values()), tcd()
    yield "not that of a consistency model, which jumps to the data", flat(found.values()), tcd(1.0)


@row("TSCD, one segment and one step", "it is CTM's, around a network that is not told the target time", 1e-12)
def tscd_is_ctm() -> Pairs:
    class InDDIMForm(ConsistencyTrajectory):
        """CTM with DDIM steps, and without the target time as an input."""

        def networks(self, start: Start) -> Networks:
            return SegmentedConsistency().networks(start)

        def ahead(self, nets: Networks, x: Tensor, times: Tensor, cond: Cond) -> Tensor:
            for k in range(len(times) - 1):
                x = ddim_step(nets.teacher, x, times[k], times[k + 1], cond)
            return x

    class Same(Rng):
        """The same noise wherever it is drawn."""

        def normal_like(self, x: Tensor) -> Tensor:
            return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))

    given = dataclasses.replace(batch(), rng=Same(3, "equalities"))
    theirs = InDDIMForm(grid_times=2, most_steps=1, denoising_weight=0.0)
    ctm_step = flat(gradients_of(theirs, teacher(EDM()), given).values())
    for name, skip in (("gradient", 1000), ("not with two steps", 500)):
        mine = gradients_of(SegmentedConsistency(skip=skip), teacher(EDM()), given)
        yield name, flat(mine.values()), ctm_step


@row("TSCD to the edges", "with all jumps to the edge of their segment it is PCM")
def tscd_is_pcm() -> Pairs:
    class ToTheEdge(SegmentedConsistency):
        def ends(self, schedule: Schedule, t: Tensor, s: Tensor, rng: Rng) -> Tensor:
            return Segments(self.segments).end(schedule, t)

    phased = gradients_of(PhasedConsistencyDistillation(phases=4, mu=0.8), teacher(), batch())
    for name, cls in (("gradient", ToTheEdge), ("not to anywhere in it", SegmentedConsistency)):
        yield name, flat(gradients_of(cls(segments=4), teacher(), batch()).values()), flat(phased.values())


@row("Hyper-SD's score distillation", "with nothing beside it, it is DMD without its regression")
def hyper_sd_matching() -> Pairs:
    bare = {"consistency_weight": 0.0, "regression_weight": 0.0}
    student = teacher(seed=1)
    for group in ("student", "critic"):
        dmd = flat(gradients_of(DMD(regression_weight=0.0), teacher(), batch(), group=group, student=student).values())
        mine = gradients_of(OneStepMatching(**bare), teacher(), batch(), group=group, student=student)
        yield group, flat(mine.values()), dmd
    with_it = gradients_of(OneStepMatching(regression_weight=0.0), teacher(), batch(), student=student)
    dmd = flat(gradients_of(DMD(regression_weight=0.0), teacher(), batch(), student=student).values())
    yield "not with consistency beside it", flat(with_it.values()), dmd


# Adversaries on the features of the teacher


@row("LADD", "distribution matching of weight 0 beside the same adversary leaves its loss")
def ladd() -> Pairs:
    method = LADD(pairs=0, blocks=2)

    def slopes(weight: float | None) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            nets = method.networks(Start(teacher()))
        moved(nets, "student")
        given, progress = batch(), Progress(fraction=0.5)
        with nets.held("discriminator"):
            if weight is None:
                loss = next(iter(alone(method.updates(nets, given, progress)))).loss
            else:
                x = method.draw(nets, given, progress)
                matching, _ = matching_loss(x, nets.teacher, nets.student.denoiser, given.cond, Rng(9, "matching"))
                loss = nets.discriminator.student_loss(nets.teacher, x, given.cond, given.rng) + weight * matching
            return flat(torch.autograd.grad(loss, list(nets.student.parameters())))

    yield "gradient", slopes(None), slopes(0.0)
    yield "not with a weight of 0.1", slopes(None), slopes(0.1)


@row("SANA-Sprint", "with an adversary of weight 0 and one guidance its gradient is sCM's, bit for bit")
def sana_sprint() -> Pairs:
    shared = {"sigma_data": 0.7, "tangent_warmup": 0.6}
    scm = ContinuousConsistencyDistillation(**shared, guidance=2.0, noise_mean=0.0)
    theirs = gradients_of(scm, teacher(), batch())
    for name, weight in (("gradient", 0.0), ("not with a weight of 0.1", 0.1)):
        sprint = SanaSprint(**shared, guidances=(2.0,), adversary_weight=weight)
        own = gradients_of(sprint, teacher(), batch())
        yield name, flat(own[key] for key in theirs), flat(theirs.values())


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
