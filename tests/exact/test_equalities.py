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
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.boot import BOOT, signal_step
from fewstep.methods.flow_maps.free_flow import FreeFlow, followed
from fewstep.methods.method import Batch, Method, Networks, Progress, alone
from fewstep.methods.parts.from_noise import FromNoise
from fewstep.methods.parts.identities import eulerian
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


# Flow maps


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
    method = FreeFlow(difference=0.0, k=1.0, eps=0.1)
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
