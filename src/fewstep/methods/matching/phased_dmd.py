"""Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals (2025, arXiv
2510.27684).

The noise levels are cut into phases ``t_max = t_0 > t_1 > .. > t_P = t_min``.  Expert ``k`` takes over at ``t_{k-1}``
what the experts before it made, and moves it to ``t_k`` only, in a few DDIM steps; every phase matches the law of its
own states ``x_s``, ``s = t_k``, at all noisier times ``t``::

    x_t      = (alpha_t / alpha_s) x_s + sigma_{t|s} n
    student:   surrogate(x_s, g),   g = (D_critic(x_t) - D_teacher(x_t)) / mean|x_0 - D_teacher(x_t)|
    critic:    || D_critic(x_t) - [ x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) n ] ||^2

The paper's weight makes of ``g`` the gradient in ``x_s`` of the reverse KL divergence of the noised laws,
``alpha_t / alpha_s (s_critic - s_teacher)``, which on flow matching is
``alpha_t (alpha_t / alpha_s) / sigma_t (u_teacher - u_critic)``; DMD's, above, is that of the code, with the expert's
own data prediction ``x_0``.  There are no data behind ``x_s`` that a critic could be trained on: its target is unbiased
without them, where ``n - x_s`` for the velocity is not.  The critic of every phase starts from the teacher; the product
is a mixture of experts over the noise levels.

From the paper's text by way of notes on it, and ModelTC/LightX2V (Apache-2.0), the code of the authors' organisation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.denoisers import gradients
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    three_networks,
    two_optimizers,
)
from fewstep.methods.parts.score_matching import (
    TwoScores,
    Weight,
    by_distance,
    interval_denoising_loss,
    known_at,
    matching_vector,
    noised_from,
    sample_std,
    surrogate,
)
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive
from fewstep.routing import ByTime, RoutedFlowMap
from fewstep.sampling.rollout import Call, Plan, Student, rollout
from fewstep.sampling.student_generator import fresh_noise
from fewstep.schedules import Schedule

Weighting = Literal["kl", "distance"]
#: Shares of the own index: from the end of a phase to the first time at which its samples are looked at, and the last.
MARGIN, LAST = 0.02, 0.98


def by_divergence(s: Tensor) -> Weight:
    """``alpha_t^2 / (alpha_s sigma_t^2)`` of the difference of two data predictions: the gradient in ``x_s`` of the
    reverse KL divergence at ``t``."""

    def weight(found: TwoScores) -> Tensor:
        _, _, a, _ = known_at(found.schedule, s, found.t)
        return a * found.schedule.alpha(found.t) / found.schedule.sigma(found.t) ** 2

    return weight


def experts_by_time(experts: Sequence[FlowMap], bounds: Sequence[float]) -> FlowMap:
    """Experts as one flow map, the first for the times above the first of ``bounds``; a single one is itself."""
    return RoutedFlowMap(experts, ByTime(bounds)) if bounds else experts[0]


@dataclass(frozen=True)
class _Phases(Recipe):
    """The hyper-parameters of one phase and of all."""

    phases: Annotated[Count, "phases, with an expert each"] = 2
    steps: Annotated[Count, "network calls in every phase"] = 2
    critic_steps: Annotated[Count, "critic updates for each of the student's"] = 5
    weight: Annotated[Weighting, "weight of the two scores' difference: DMD's, or that of the KL divergence"] = (
        "distance"
    )
    early_exit: Annotated[bool, "the call with the gradient ends the phase in training, as in the code"] = True
    bound: Annotated[Positive | None, "clamp of the critic's weight 1 / sigma_{t|s}^2; none without"] = 10.0
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20


@dataclass(frozen=True)
class Phase(_Phases, Method):
    """One phase, number ``index`` of ``phases``: an expert, and a critic on what it ends in.

    The data give nothing but conditions and how many samples to make: they may be absent.  ``steps`` are the network
    calls of the phase.  Times are equal parts of :func:`~fewstep.grids.student_grid`, of the schedule's own time as a
    rule.
    """

    name: ClassVar[str] = "phased-dmd-phase"
    paper: ClassVar[Paper] = Paper(
        "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals", "2510.27684",
        "from paper text",
        ("the paper is known from notes on it; the code read is that of the authors' organisation (LightX2V)",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (2e-6 and 4e-7 there), and "
         "the critic's is the higher one",
         "short runs: a warm-up of 20 steps, `decay` of the experts' rates to 0 over a phase (constant there)",
         "`guidance` of the teacher is 1 (4 there)",
         "phases are trained one after the other, with equal shares of the budget (the code alternates between two), "
         "all from one teacher; boundaries are equal parts of the schedule's time (500 of 1000 before a shift of 7)",
         "the clamp of the critic's weight 1 / sigma_{t|s}^2 is read as that of a loss of the score in units of "
         "sigma_{t|s}; where a phase ends in data there is none; times keep a margin of 2 % from its end, as in the "
         "code",
         "the loss is on the state at the end of the phase (the code's on the data prediction there)",
         "not here: averaging the critic towards the student, a diversity loss, real data for the critic (extras of "
         "the code); experts are trained in full unless low-rank weights are asked for, as they are in the paper",
         "sampling uses a power-function average of the experts (none there)"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level within a phase; that of an early phase is higher, because its target is noisy",
        "student/matching_norm": "starts near 0 in every phase (the critic is a copy of the teacher), rises as the "
        "critic turns to the expert's samples, then falls slowly",
        "student/sample_std": "stays near the noised data's at the end of the phase; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"critic/denoising": RUNAWAY_CRITIC, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    index: Annotated[int, Least(0), "number of the phase, 0 for the noisiest"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index >= self.phases:
            raise ValueError(f"index={self.index} must be one of {self.phases} phases, counted from 0")

    def networks(self, start: Start) -> Networks:
        modules = three_networks(start)
        schedule = modules["student"].schedule
        modules |= {expert(k): Jump(start.model(expert(k)).on(schedule)) for k in range(self.index)}
        groups = two_optimizers(self.lr, self.critic_lr, self.clip, self.warmup)
        groups = {name: dataclasses.replace(group, betas=(0.0, 0.999)) for name, group in groups.items()}
        return Networks(modules, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x_s, x0 = self.draw(nets, batch, trainable=progress.step % self.critic_steps == 0)
        if x_s.requires_grad:
            loss, logs = self.student_loss(nets, batch, x_s, x0)
            yield Update("student", loss, logs)
        denoising = self.critic_loss(nets, batch, x_s.detach())
        yield Update("critic", denoising, {"denoising": denoising.detach()})

    def plan(self, schedule: Schedule) -> Plan:
        """All times at which students are called, noisiest first."""
        return Plan(tuple(grids.student_grid(schedule, self.phases * self.steps)[:-1].tolist()), gamma=0.0)

    def bounds(self, schedule: Schedule) -> tuple[float, ...]:
        """The ends of all phases but the last."""
        return self.plan(schedule).times[self.steps :: self.steps]

    def end(self, schedule: Schedule) -> float:
        """Where the phase ends."""
        return (*self.bounds(schedule), schedule.t_min)[self.index]

    def law(self, schedule: Schedule, margin: float, last: float) -> Own:
        """All times that are noisier than the end of the phase, with a margin; ValueError where there are none."""
        low = float(schedule.own_share(torch.tensor(self.end(schedule), dtype=torch.float64))) + margin
        if not low < last:
            raise ValueError(f"phases={self.phases}: the first one ends too near the noise to be looked at, take fewer")
        return Own(low, last)

    def before(self, nets: Networks) -> list[FlowMap]:
        """The experts of the phases before."""
        return [nets.get_submodule(expert(k)) for k in range(self.index)]  # type: ignore[misc]

    def draw(self, nets: Networks, batch: Batch, trainable: bool) -> tuple[Tensor, Tensor]:
        """States at the end of the phase, made as inference makes them but for the early exit, with a gradient in one
        random call of the expert; and the data prediction, without a graph, that the last call moved along."""
        schedule, first, made = nets.student.schedule, self.index * self.steps, list[Call]()
        plan, call = self.plan(schedule), first + batch.rng.shared_integer(0, self.steps)
        noise = fresh_noise(nets.student, batch.n, batch.rng)
        x = schedule.prior(noise)
        if first:
            with torch.no_grad():
                before = experts_by_time(self.before(nets), self.bounds(schedule)[: self.index - 1])
                x = rollout(before, noise, plan, batch.cond, stop=first - 1, end=plan.times[first])
        stop = call if self.early_exit else first + self.steps - 1
        with gradients(nets.student, "all" if trainable else "none"):
            x_s = rollout(
                nets.student, None, plan, batch.cond, start=(first, x), stop=stop, end=self.end(schedule),
                grad_at=call, calls=made,
            )  # fmt: skip
        return x_s, made[-1].x0.detach()

    def student_loss(self, nets: Networks, batch: Batch, x_s: Tensor, x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching of the states ``x_s`` at all times above them; the gradient reaches the student through
        ``x_s`` only.  ``x0`` is what DMD's weight measures the distance of."""
        schedule, rng = nets.teacher.schedule, batch.rng
        s = torch.tensor(self.end(schedule), dtype=torch.float64, device=x_s.device)
        t = self.law(schedule, MARGIN, LAST).draw(schedule, len(x_s), rng)
        x_t = noised_from(schedule, x_s.detach(), s, t, rng.normal_like(x_s))
        weight = by_divergence(s) if self.weight == "kl" else by_distance
        g = matching_vector(x0, x_t, t, guided(nets.teacher, self.guidance), nets.critic, batch.cond, weight)
        return surrogate(x_s, g), {"matching_norm": g.square().mean().sqrt(), "sample_std": sample_std(x_s)}

    def critic_loss(self, nets: Networks, batch: Batch, x_s: Tensor) -> Tensor:
        """Score matching at all times above the states ``x_s``."""
        schedule = nets.critic.schedule
        s = torch.tensor(self.end(schedule), dtype=torch.float64, device=x_s.device)
        data = self.index == self.phases - 1  # the target is theirs, and nothing grows near them
        t = self.law(schedule, 0.0 if data else MARGIN, 1.0).draw(schedule, len(x_s), batch.rng)
        return interval_denoising_loss(nets.critic, x_s, s, t, batch.cond, batch.rng, None if data else self.bound)

    def student(self, nets: Networks) -> Student:
        """All experts; the teacher's own steps stand where there is none yet."""
        schedule = nets.student.schedule
        after = [Jump(nets.teacher)] * (self.phases - self.index - 1)
        made = experts_by_time([*self.before(nets), nets.student, *after], self.bounds(schedule))
        return Student(made, {self.phases * self.steps: self.plan(schedule)})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {expert(self.index): nets.student.denoiser}


def expert(index: int) -> str:
    """The role of an expert."""
    return f"expert-{index}"


@dataclass(frozen=True)
class PhasedDMD(_Phases):
    """The phases one after the other, from noise to data; a student of ``phases * steps`` calls.

    ``weight`` "kl" is the paper's, "distance" the code's, which is DMD's.  With ``early_exit`` the call that has the
    gradient jumps to the end of the phase (stochastic gradient truncation within the phase), without it the calls
    after it are made too and pass the gradient on; ``phases = 1`` with it is few-step DMD with that truncation.
    """

    name: ClassVar[str] = "phased-dmd"
    paper: ClassVar[Paper] = Phase.paper
    system: ClassVar[System] = System(
        "Phased DMD", 2025, "matching", "teacher", "4",
        "experts over the noise levels, each matched at the end of its own phase, with unbiased critics there",
        real="trajectory_matching_real",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    def stages(self) -> list[Stage]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [Stage(Phase(index=k, **fields)) for k in range(self.phases)]
