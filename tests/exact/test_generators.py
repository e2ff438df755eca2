"""Generators: samples of students and free samples, moved by the same difference of scores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_models import SHAPE, network, routed_by_class
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, View
from fewstep.exact import Gaussian
from fewstep.flow_maps import Jump
from fewstep.generators import Generator, Particles
from fewstep.methods.parts.distribution_matching import matching_loss
from fewstep.methods.parts.score_matching import matching_vector, surrogate
from fewstep.methods.parts.times import Own
from fewstep.randomness import Rng
from fewstep.sampling import Call, Plan, StudentGenerator, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear, align

F64 = torch.float64
MEAN = torch.tensor([0.7, -0.3], dtype=F64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
SCHEDULES = pytest.mark.parametrize(
    "schedule", [FlowMatching(), TrigFlow(), EDM(), VPLinear()], ids=lambda s: type(s).__name__
)


class Drawn(View):
    """A critic that knows the noise that was drawn: its data prediction is the sample itself."""

    def __init__(self, inner: Denoiser, x: Tensor) -> None:
        super().__init__(inner)
        self.x = x

    def forward(self, x: Tensor, t: Tensor | float, cond: object = None) -> Tensor:
        return self.x


# --- students ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Jump(network()), routed_by_class], ids=["jump", "routed"])
def test_a_students_samples_are_those_of_inference(make: Callable[[], Jump]) -> None:
    """The end of the plan, or with ``simulate`` the output of a random call, from the same draws as a rollout; what is
    given with the samples is what they were made under."""
    flow_map, plan, cond = make(), Plan((1.5, 0.9, 0.4)), torch.tensor([3, 8, 1, 6])
    flow_map.requires_grad_(True)
    rng = Rng(1)
    end = rollout(flow_map, rng.normal(4, *SHAPE), plan, cond, rng)
    whole = StudentGenerator(flow_map, plan, simulate=False)
    x, given = whole.draw(4, Rng(1), cond)
    assert torch.equal(x, end) and given is cond and whole.shape == SHAPE
    seen = set()
    for seed in range(12):
        rng = Rng(seed)
        call = rng.shared_integer(0, 3)
        at = rollout(flow_map, rng.normal(4, *SHAPE), plan, cond, rng, stop=call)
        x, _ = StudentGenerator(flow_map, plan).draw(4, Rng(seed), cond)
        assert torch.equal(x, at) and x.requires_grad
        seen.add(call)
    assert seen == {0, 1, 2}


def test_a_simulated_sample_has_the_gradient_of_its_own_call() -> None:
    """Calls before it are without a graph; the end of a plan has the gradient of all calls."""
    flow_map, plan, cond = Jump(network().requires_grad_(True)).double(), Plan((1.5, 0.9)), torch.tensor([3, 8])
    seed = next(s for s in range(9) if Rng(s).shared_integer(0, 2) == 1)

    def gradient(x: Tensor) -> Tensor:
        flow_map.zero_grad()
        x.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in flow_map.parameters() if p.grad is not None])

    x, _ = StudentGenerator(flow_map, plan).draw(2, Rng(seed), cond)
    last = gradient(x)
    rng = Rng(seed)
    rng.shared_integer(0, 2)
    calls: list[Call] = []
    noise = rng.normal(2, *SHAPE, dtype=F64)
    rollout(flow_map, noise, plan, cond, rng, calls=calls)
    assert torch.equal(last, gradient(flow_map.to_data(calls[1].x.detach(), 0.9, cond)))
    whole = StudentGenerator(flow_map, plan, simulate=False)
    assert x.dtype == F64 and not torch.equal(last, gradient(whole.draw(2, Rng(seed), cond)[0]))


# --- particles ---------------------------------------------------------------------------------------------------


def test_particles_are_drawn_without_repeats() -> None:
    """``n`` different ones with their own conditions, from two parts what one part would draw; all of them are all."""
    x, cond = torch.arange(6.0)[:, None], {"camera": torch.arange(6) + 10}
    particles = Particles(x, cond)
    assert particles.shape == (1,)
    drawn, told = particles.draw(4, Rng(0))
    assert len(set(drawn.flatten().tolist())) == 4
    assert not torch.equal(drawn, particles.draw(4, Rng(1))[0])
    assert isinstance(told, dict) and torch.equal(told["camera"], drawn.detach().flatten().long() + 10)
    halves = [particles.draw(2, Rng(0, part=part, parts=2))[0] for part in (0, 1)]
    assert torch.equal(torch.cat(halves), drawn)
    assert sorted(particles.draw(6, Rng(1))[0].flatten().tolist()) == list(range(6))
    given = torch.zeros(2, dtype=torch.int64)
    assert Particles(x).draw(2, Rng(0), given)[1] is given
    drawn.sum().backward()
    assert particles.x.grad is not None and float(particles.x.grad.sum()) == 4
    x += 1
    assert float(particles.x.min()) == 0


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: Particles(torch.zeros(3, 1), torch.zeros(2)), "cond holds 2 conditions for 3 particles: one each"),
        (lambda: Particles(torch.zeros(3, 1)).draw(4, Rng(0)), r"n=4 must lie in 1 \.\. 3, the number of particles"),
        (lambda: Particles(torch.zeros(3, 1)).draw(2, Rng(0, parts=2)), r"n=4 must lie in 1 \.\. 3"),
        (lambda: Particles(torch.zeros(3, 1)).draw(0, Rng(0)), r"n=0 must lie in 1 \.\. 3"),
        (
            lambda: Particles(torch.zeros(3, 1), torch.zeros(3)).draw(1, Rng(0), torch.zeros(1)),
            "cond: these particles have conditions of their own",
        ),
    ],
)
def test_particles_refuse(ask: Callable[[], object], words: str) -> None:
    """One line for what cannot be drawn."""
    with pytest.raises(ValueError, match=words):
        ask()


# --- score distillation on free samples ------------------------------------------------------------------------------


def train(particles: Particles, loss: Callable[[Tensor, Rng], Tensor], steps: int = 600) -> Tensor:
    """The particles after so many steps of Adam, all of them in each, at a rate that falls to 0."""
    rng, rate = Rng(0), 5e-2
    optimizer = torch.optim.Adam(particles.parameters(), lr=rate, betas=(0.0, 0.999))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        x, _ = particles.draw(len(particles.x), rng)
        optimizer.zero_grad()
        loss(x, rng).backward()
        optimizer.step()
    return particles.x.detach()


def law_of(x: Tensor, schedule: Schedule) -> Gaussian:
    """The Gaussian of the particles' own mean and covariance."""
    centred = x - x.mean(0)
    return Gaussian(schedule, x.mean(0), centred.T @ centred / len(x))


@SCHEDULES
def test_particles_reach_a_gaussian(schedule: Schedule) -> None:
    """With the critic of their own Gaussian law, particles take on the teacher's mean and covariance: the vector is 0
    for every one of them there and nowhere else."""
    teacher = Gaussian(schedule, MEAN, COVARIANCE)
    particles = Particles(0.2 * Rng(5).normal(24, 2, dtype=F64) - 1)

    def loss(x: Tensor, rng: Rng) -> Tensor:
        return matching_loss(x, teacher, law_of(x.detach(), schedule), None, rng)[0]

    reached = law_of(train(particles, loss), schedule)
    assert float((reached.mean - MEAN).norm()) < 1e-6
    covariance = (reached.basis * reached.variances) @ reached.basis.T
    assert float((covariance - COVARIANCE).norm()) < 1e-6


@SCHEDULES
def test_where_the_critic_is_the_teacher_particles_rest(schedule: Schedule) -> None:
    """Equal scores, no gradient: exactly 0."""
    teacher = Gaussian(schedule, MEAN, COVARIANCE)
    particles = Particles(Rng(5).normal(16, 2, dtype=F64))
    x, cond = particles.draw(16, Rng(1))
    matching_loss(x, teacher, teacher, cond, Rng(2))[0].backward()
    assert torch.equal(particles.x.grad, torch.zeros(16, 2, dtype=F64))


@SCHEDULES
def test_a_critic_that_knows_the_noise_is_sds(schedule: Schedule) -> None:
    """Where the critic returns the noise that was drawn, the vector is score distillation sampling's, ``(sigma /
    alpha) (eps_teacher - eps)`` over the normaliser: bit for bit in data predictions, to rounding in noise."""
    teacher = Gaussian(schedule, MEAN, COVARIANCE)
    x, eps = Rng(3).normal(16, 2, dtype=F64), Rng(4).normal(16, 2, dtype=F64)
    t = Own(0.1, 0.9).draw(schedule, 16, Rng(5))
    x_t = schedule.add_noise(x, eps, t)
    real = teacher(x_t, t)
    scale = (x - real).abs().mean(1, keepdim=True)
    found = matching_vector(x, x_t, t, teacher, Drawn(teacher, x))
    assert torch.equal(found, 1 / scale * (x - real))
    ratio = align(schedule.sigma(t) / schedule.alpha(t), x)
    torch.testing.assert_close(found, ratio * (teacher.eps(x_t, t) - eps) / scale, atol=1e-9, rtol=1e-9)


@SCHEDULES
def test_sds_falls_onto_the_mean(schedule: Schedule) -> None:
    """A Gaussian teacher's prediction, averaged over the noise, lies between the sample and the mean, so with a critic
    that knows the noise every particle goes to the mean: the covariance that matching keeps is lost."""
    teacher = Gaussian(schedule, MEAN, COVARIANCE)
    particles = Particles(0.2 * Rng(5).normal(24, 2, dtype=F64) - 1)

    def loss(x: Tensor, rng: Rng) -> Tensor:
        return matching_loss(x, teacher, Drawn(teacher, x.detach()), None, rng)[0]

    reached = law_of(train(particles, loss), schedule)
    assert float((reached.mean - MEAN).norm()) < 1e-2
    assert float(reached.variances.sum()) < 2e-3  # of the teacher's 0.8


# --- what looks at an object -------------------------------------------------------------------------------------


class Scene(Generator):
    """One point in the plane, seen from random cameras: where it stands across the line of sight."""

    shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.point = torch.nn.Parameter(torch.zeros(2, dtype=F64))

    def draw(self, n: int, rng: Rng, cond: Cond = None) -> tuple[Tensor, Cond]:
        camera = torch.pi * rng.uniform(n)
        across = torch.stack([camera.cos(), camera.sin()], 1)
        return across @ self.point[:, None], camera


class Viewed(Denoiser):
    """The exact denoiser of what cameras see of a point that is certainly at ``MEAN``."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        assert isinstance(cond, Tensor)
        return torch.stack([cond.cos(), cond.sin()], 1) @ MEAN[:, None]


def test_a_scene_is_found_from_its_views() -> None:
    """A generator of one's own: the teacher knows each view from its camera, so score distillation finds the point."""
    schedule, scene, rng = FlowMatching(), Scene(), Rng(0)
    teacher = Viewed(schedule, (1,))
    optimizer = torch.optim.SGD(scene.parameters(), lr=0.5)
    for _ in range(100):
        x, camera = scene.draw(16, rng)
        t = Own(0.02, 0.98).draw(schedule, len(x), rng)
        x_t = schedule.add_noise(x.detach(), rng.normal_like(x), t)
        optimizer.zero_grad()
        surrogate(x, x.detach() - teacher(x_t, t, camera)).backward()
        optimizer.step()
    assert float((scene.point - MEAN).norm()) < 1e-6


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of the page on generators, from top to bottom: points reach the law that it says."""
    page = (Path(__file__).parents[2] / "docs/ideas/generators.md").read_text()
    names: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    x = names["particles"].x.detach()
    torch.testing.assert_close(x.mean(0), names["mean"], atol=1e-2, rtol=0)
    torch.testing.assert_close(torch.cov(x.T, correction=0), names["covariance"], atol=1e-2, rtol=0)
    assert "torch.Size([8, 1]) torch.Size([8])" in capsys.readouterr().out


def test_a_generator_is_asked_to_draw() -> None:
    """The base draws nothing."""
    with pytest.raises(TypeError, match="abstract"):
        Generator()  # type: ignore[abstract]
