"""TDM: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al. 2025, arXiv 2503.06674).

The student follows its own deterministic trajectory of K DDIM steps.  Step by step, from ``x_hi`` at ``hi`` to ``x_lo``
at ``lo``, the law of its states is matched to the teacher's, at the times ``tau`` of that step's own interval::

    x_tau    = (alpha_tau / alpha_lo) x_lo + sigma_{tau|lo} n
    student:   sum ( sqrt((x0 - y)^2 + c^2) - c ) / mean|x0 - D_teacher|,   y = x0 + D_teacher(x_tau) - D_critic(x_tau)
    critic:    min(SNR_tau, 5) rho || D_critic(x_tau) - x0 ||^2

with ``x0`` the student's data prediction at ``x_hi``.  The critic learns the denoiser of ``x0`` noised to ``tau``,
though it sees ``x_lo`` noised on: ``rho = exp(-mean m^2 / 2 + mean n^2 / 2)``, ``x_tau = alpha_tau x0 + sigma_tau m``,
is how much more probable ``x_tau`` is from ``x0`` than from ``x_lo``, but for a constant, and to the power of one over
the dimension.

With several numbers of steps one network serves them all: each iteration draws a K, and tells it to student and critic.
No data are needed.

Read against the official demonstration (Luo-Yihong/TDM, train_tdm_demo.py); the steps-aware objective from notes on the
paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, View
from fewstep.extras import Input
from fewstep.flow_maps import Jump, ddim_move
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.distribution_matching import LOST_MODES, RUNAWAY_CRITIC
from fewstep.methods.parts.score_matching import TwoScores, by_distance, noised_from, sample_std
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, Least, NonNegative, Positive
from fewstep.sampling.rollout import Call, Plan, Student, rollout
from fewstep.sampling.student_generator import fresh_noise
from fewstep.schedules import Schedule, align

#: Shares of the own index: the least time looked at, how far below its interval's upper end the last one stays, and how
#: far below it a random middle does (20, 10 and 20 of 1000 steps).
EARLIEST, BELOW, ROOM = 0.02, 0.01, 0.02


@dataclass(frozen=True)
class Interval:
    """One step of a trajectory a sample: from states ``x`` ``[B, ...]`` at ``hi`` ``[B]`` to ``lo`` ``[B]``, number
    ``i`` ``[B]`` of the steps, 0 the noisiest; ``x0`` is the data prediction there, without a graph."""

    x: Tensor
    x0: Tensor
    hi: Tensor
    lo: Tensor
    i: Tensor


class Told(View):
    """A denoiser whose further inputs are given already."""

    def __init__(self, inner: Denoiser, extras: Mapping[str, Tensor]) -> None:
        super().__init__(inner)
        self.given = dict(extras)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner(x, t, cond, **self.given, **extras)


def importance(m: Tensor, n: Tensor) -> Tensor:
    """``exp(-mean m^2 / 2 + mean n^2 / 2)`` ``[B]``: of how a state comes from ``x0`` (noise ``m``) over how it was
    made (noise ``n``)."""
    return torch.exp((n.square() - m.square()).flatten(1).mean(1) / 2)


def trajectory_matching_loss(x0: Tensor, found: TwoScores, kind: Literal["pseudo-huber", "l2"], c: float) -> Tensor:
    """The student's loss of data predictions ``x0``, through which alone gradients flow, by every element; ``found.x``
    are the same without a graph."""
    gap = x0 - (found.x + found.real - found.fake)
    loss = gap.square() if kind == "l2" else (gap.square() + c**2).sqrt() - c
    return (align(by_distance(found), loss) * loss).mean()


@dataclass(frozen=True)
class TDM(Method):
    """Trajectories of all the numbers of ``steps``, told to the network where there are several.

    The data give nothing but conditions and how many samples to make: they may be absent.  ``times`` is where a step
    is looked at: in its own interval ("separate"), or at all times above its end ("shared"), of which several steps
    have the same; the critic is told the step then.
    """

    name: ClassVar[str] = "tdm"
    paper: ClassVar[Paper] = Paper(
        "Learning Few-Step Diffusion Models by Trajectory Distribution Matching", "2503.06674", "verified",
        ("`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (4e-6 and 2e-5 in the "
         "demonstration)",
         "`guidance` of the teacher is 1 (4.5 there)",
         "`distance` is the square, which the code has too: pseudo-Huber, its default, ran away on small pictures at "
         "the rates here",
         "short runs: `warmup` of 20 steps (50 there), `decay` of the student's rate to 0 over the budget (a cosine "
         "with restarts there)",
         "trajectories start at the noisiest time (at 900 of 1000 steps there); steps are equal in the schedule's "
         "time, on EDM in TrigFlow's angle",
         "how the number of steps is told is not in the code: here as an input of its own, the number itself",
         "with shared times the critic is always told the step; the paper's text has no code for it",
         "full fine-tuning unless low-rank weights are asked for; the released models are low-rank",
         "no multistep solver in sampling; SD3's scale of 1/8 and CogVideoX's own times are not here",
         "sampling uses a power-function average of the student (none there)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "TDM", 2025, "matching", "teacher", "1, 2, 4",
        "every step of the student's own deterministic trajectory matched in distribution, without data",
        real="trajectory_matching_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "critic/importance": "near 1; far from it, the steps are too large for the weights",
        "student/loss": "rises from near 0 while the critic turns to the student's samples, then falls slowly",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"critic/denoising": RUNAWAY_CRITIC, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (4,)
    times: Annotated[Literal["separate", "shared"], "a step is looked at in its interval only, or above it too"] = (
        "separate"
    )
    distance: Annotated[Literal["pseudo-huber", "l2"], "distance of a data prediction from where it should be"] = "l2"
    c: Annotated[Positive, "size below which the pseudo-Huber distance is a square"] = 1e-3
    snr_bound: Annotated[Positive, "largest weight of the critic's loss, which is the signal-to-noise ratio"] = 5.0
    random_middle: Annotated[bool, "steps end at a random time of their interval, not at its lower end"] = False
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps or len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps={self.steps} must be different numbers of network calls, one at least")

    @property
    def inputs(self) -> dict[str, Input]:
        """The number of steps as an input, where there are several."""
        most = float(max(self.steps))
        return {"k": Input(most, 1.0, most)} if len(self.steps) > 1 else {}

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        for k in self.steps:
            check_room(teacher.schedule, k, self.random_middle)
        told = (*self.inputs, "i") if self.times == "shared" else tuple(self.inputs)
        student = start.network("student", extras=tuple(self.inputs), on=teacher.schedule)
        moves = Optimizer(
            ("student",), self.lr, "adamw", betas=(0.0, 0.95), weight_decay=0.01, clip=self.clip, warmup=self.warmup,
            decay="linear",
        )  # fmt: skip
        follows = dataclasses.replace(moves, modules=("critic",), lr=self.critic_lr, decay="constant")
        return Networks(
            {
                "student": Jump(student, extras=self.inputs),
                "critic": start.network("critic", extras=told, on=teacher.schedule),
                "teacher": teacher,
            },
            {"student": moves, "critic": follows},
            ema=("student",),
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        k = self.steps[batch.rng.shared_integer(0, len(self.steps))]
        calls: list[Call] = []
        with torch.no_grad():
            noise = fresh_noise(nets.student, batch.n, batch.rng)
            made = rollout(nets.student, noise, self.plan(nets.student.schedule, k), batch.cond, calls=calls)
        loss, logs = self.critic_loss(nets, batch, self.interval(nets, calls, batch.rng), k)
        yield Update("critic", loss, logs)
        loss = self.student_loss(nets, batch, self.interval(nets, calls, batch.rng), k)
        yield Update("student", loss, {"sample_std": sample_std(made)})

    def interval(self, nets: Networks, calls: Sequence[Call], rng: Rng) -> Interval:
        """A random step of the trajectory for every sample."""
        schedule, n = nets.student.schedule, len(calls[0].x)
        i = rng.integers(n, 0, len(calls))
        rows = torch.arange(n, device=i.device)
        x, x0 = (torch.stack(states)[i, rows] for states in ([c.x for c in calls], [c.x0 for c in calls]))
        times = torch.tensor([*(c.t for c in calls), schedule.t_min], dtype=torch.float64, device=i.device)
        hi, lo = times[i], times[i + 1]
        if self.random_middle:
            first, last = schedule.own_share(lo), schedule.own_share(hi) - ROOM
            lo = schedule.own_time(first + rng.uniform(n) * (last - first))
        return Interval(x, x0, hi, lo, i)

    def looked_at(self, schedule: Schedule, step: Interval, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_tau, tau, n)``: the end of a step noised to a time at which it is looked at."""
        high = schedule.own_share(step.hi) if self.times == "separate" else torch.ones_like(step.hi)
        low = schedule.own_share(step.lo).clamp_min(EARLIEST)
        tau = schedule.own_time(low + rng.uniform(len(x0)) * (high - BELOW - low))
        n = rng.normal_like(x0)
        return noised_from(schedule, ddim_move(step.x, x0, step.hi, step.lo, schedule), step.lo, tau, n), tau, n

    def critic(self, nets: Networks, step: Interval, k: int) -> Denoiser:
        """The critic, told what it has to know beside the time."""
        kind = torch.promote_types(step.x.dtype, torch.float32)
        given = {"k": torch.full_like(step.hi, k, dtype=kind)} if self.inputs else {}
        if self.times == "shared":
            given["i"] = step.i.to(kind)
        return Told(nets.critic, given)

    def critic_loss(self, nets: Networks, batch: Batch, step: Interval, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted denoising of the student's data predictions."""
        schedule = nets.critic.schedule
        x_tau, tau, n = self.looked_at(schedule, step, step.x0, batch.rng)
        m = (x_tau - align(schedule.alpha(tau), x_tau) * step.x0) / align(schedule.sigma(tau), x_tau)
        rho = importance(m, n)
        error = (self.critic(nets, step, k)(x_tau, tau, batch.cond) - step.x0).square().flatten(1).mean(1)
        loss = (schedule.ratio(tau).pow(-2).clamp_max(self.snr_bound) * rho * error).mean().to(error)
        return loss, {"denoising": loss.detach(), "importance": rho.mean()}

    def student_loss(self, nets: Networks, batch: Batch, step: Interval, k: int) -> Tensor:
        """Matching of the end of a step; the gradient reaches the student through its data prediction only."""
        extras = nets.student.inputs(step.x, {"k": k} if self.inputs else {})
        x0 = nets.student.predict(step.x, step.hi, step.lo, batch.cond, **extras)
        with torch.no_grad():
            x_tau, tau, _ = self.looked_at(nets.teacher.schedule, step, x0.detach(), batch.rng)
            real = guided(nets.teacher, self.guidance)(x_tau, tau, batch.cond)
            fake = self.critic(nets, step, k)(x_tau, tau, batch.cond)
        found = TwoScores(x0.detach(), x_tau, tau, real, fake, nets.teacher.schedule)
        return trajectory_matching_loss(x0, found, self.distance, self.c)

    def plan(self, schedule: Schedule, k: int) -> Plan:
        """Equal steps from the noisiest time on, without fresh noise."""
        return Plan(
            tuple(grids.student_grid(schedule, k)[:-1].tolist()), gamma=0.0, extras={"k": k} if self.inputs else {}
        )

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {k: self.plan(nets.student.schedule, k) for k in self.steps})


def check_room(schedule: Schedule, k: int, random_middle: bool) -> None:
    """ValueError when there are steps in which no time could be looked at."""
    share = schedule.own_share(grids.student_grid(schedule, k))
    room = share[:-1] - share[1:].clamp_min(EARLIEST)
    if not float(room.min()) > (ROOM if random_middle else BELOW):
        raise ValueError(f"steps={k}: the shortest of so many steps leaves no times to look at, take fewer")
