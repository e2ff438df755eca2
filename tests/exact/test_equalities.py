"""Every system in a limiting case is another one: one row a system, in float64, on the same draws.

A row says which equality proves the system and gives pairs of tensors that must agree to its tolerance, 0 for bit for
bit; and one pair that must not, from a case beside the limiting one, so that the row can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.method import Batch, Method, Progress, alone
from fewstep.methods.parts.identities import eulerian
from fewstep.methods.parts.teacher_steps import ddim_step, guided
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, Schedule, TrigFlow

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
