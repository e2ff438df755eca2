"""MLCM and its successor TLCM: one student of 2 to 8 calls, without data (Xie et al. 2024, arXiv 2406.05768).

The teacher's trajectory is cut into segments.  Four stages, each from what the last one made, share the budget as
12 : 2 : 0.5 : 1::

    segments     || g(z_t, t -> e) - sg g(z_s, s -> e) ||^2        e the lower edge of the segment of t
    joining      || f(z_t, t) - sg f(z_s, s) ||^2                  t and s neighbouring edges, f = g(. -> data)
    preference   relu(margin - reward(x, cond))                    x made by the student
    matching     surrogate(x, g) + gan_weight softplus(-l(x_1))    x_1 made in one call, the "real" ones in q calls

with ``g`` the DDIM jump by the student's data prediction and ``z_s`` made of ``z_t`` by the guided teacher: one DDIM
step of ``skip`` of its index in a segment, ``teacher_steps`` from an edge to the next.  No state is a noised sample of
data.  In the segments ``z_t`` comes from noise by the teacher's own guided steps, more of them the cleaner ``t`` is; at
edges it is the student's own sample, noised.  Joining at edges ("milestones") is TLCM's; MLCM joins by *merging*: the
first stage again, with fewer segments each time.  There is no average of the weights as a target.

Read from the paper's text in its version of TLCM; MLCM's list of segments is not certain.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond, rows
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.cm import consistency_loss
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Recipe,
    Stage,
    System,
    Update,
)
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    WON_GAME,
    critic_loss,
    matching_loss,
)
from fewstep.methods.parts.feedback import FEW_CLASSES, GIVEN, ROLE, Feedback, feedback_loss
from fewstep.methods.parts.score_matching import sample_std
from fewstep.methods.parts.teacher_steps import check_tells_data, ddim_step, ddim_steps, guided, times_between
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Share
from fewstep.sampling.rollout import Call, Plan, Student, rollout
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.sampling.student_samplers import ending_clean
from fewstep.schedules import Schedule


@torch.no_grad()
def trajectory_states(teacher: Denoiser, x: Tensor, t: Tensor, steps: Tensor, most: int, cond: Cond = None) -> Tensor:
    """Where the teacher takes ``x`` ``[B, ...]`` from ``t_max`` to ``t`` ``[B]`` in ``steps`` ``[B]`` DDIM steps, at
    most ``most``, equal in its own index.

    Rows that have arrived cost nothing.  The teacher is called ``most`` times, however the rows fall: processes that
    share its parts call it in step.
    """
    schedule = teacher.schedule
    first, last = grids.last_index(schedule), grids.own_index(schedule, t)
    for k in range(most):
        moving = (steps > k).nonzero().flatten()
        here = moving if len(moving) else steps.new_zeros(1)
        way, n = last[here] - first, steps[here].clamp_min(1).double()
        high = grids.at_index(schedule, first + way * (k / n))
        low = torch.where(n == k + 1, t[here], grids.at_index(schedule, first + way * ((k + 1) / n)))
        moved = ddim_step(teacher, x[here], high, low.minimum(high), rows(cond, here))
        x = x.index_copy(0, moving, moved) if len(moving) else x
    return x


def even_plan(schedule: Schedule, steps: int, gamma: float = 1.0) -> Plan:
    """Calls at the upper edges of as many segments: 999, 749, 499 and 249 of a table of 1000 for four."""
    return Plan(tuple(Segments(steps).edges(schedule)[1:].flip(0).tolist()), gamma)


@dataclass(frozen=True)
class _Multistep(Method):
    """What the stages share: the guided teacher, the student that jumps on its schedule, and the plans."""

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 4e-4
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    segments: Annotated[Count, "segments of the trajectory"] = 8
    student_steps: Annotated[Count, "calls of the student that make a training sample"] = 4
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (2, 4, 8)
    gamma: Annotated[Share, "noise between calls: 1 noises the data prediction anew, 0 jumps on along the path"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared"] = L2

    def networks(self, start: Start) -> Networks:
        check_tells_data(start.teacher)
        schedule = ending_clean(start.teacher.schedule)
        for count in (self.segments, self.student_steps, *self.steps):
            Segments(count).edges(schedule)
        return self.made(start, guided(start.teacher.on(schedule), self.guidance))

    @abstractmethod
    def made(self, start: Start, teacher: Denoiser) -> Networks:
        """The networks, beside the guided teacher."""

    def jump(self, start: Start, teacher: Denoiser) -> Jump:
        return Jump(start.network("student", on=teacher.schedule))

    def group(self) -> dict[str, Optimizer]:
        return {"student": Optimizer(("student",), self.lr, kind="adamw", clip=1.0, decay="linear")}

    def plan(self, nets: Networks) -> Plan:
        """How training samples are made."""
        return even_plan(nets.student.schedule, self.student_steps)

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {k: even_plan(nets.student.schedule, k, self.gamma) for k in self.steps})


@dataclass(frozen=True)
class _Consistent(_Multistep):
    """The stages that ask for consistency."""

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "small from the start when the student is a copy of the teacher, and stays small; it measures "
        "agreement between neighbours, not quality",
    }

    def made(self, start: Start, teacher: Denoiser) -> Networks:
        distance = self.distance.network(teacher)
        modules = {"student": self.jump(start, teacher), "teacher": teacher, "distance": distance}
        return Networks(modules, self.group(), ema=("student",))


@dataclass(frozen=True)
class MultistepConsistency(_Consistent):
    """Consistency within segments, at states of the teacher's own trajectory; at noised ``states`` of data it is PCM
    without a target network."""

    name: ClassVar[str] = "mlcm-segments"

    skip: Annotated[Count, "steps of the teacher's table that its solver takes at once, thousandths without one"] = 20
    states: Annotated[Literal["trajectory", "data"], "where training looks"] = "trajectory"

    def times(self, schedule: Schedule) -> Tensor:
        """The falling times of the teacher's solver, which starts again at each edge."""
        return grids.skipping(schedule, self.skip, Segments(self.segments).indices(schedule))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        grid = self.times(schedule).to(rng.device)
        n = rng.integers(batch.n, 0, len(grid) - 1)
        t, s = grid[n], grid[n + 1]
        noise = batch.normal()
        if self.states == "data":
            x_t = schedule.add_noise(batch.x, noise, t)
        else:
            steps = torch.where(t < schedule.t_max, self.segments - Segments(self.segments).of(schedule, t), 0)
            x_t = trajectory_states(nets.teacher, schedule.prior(noise), t, steps, self.segments, batch.cond)
        with torch.no_grad():
            x_s = ddim_step(nets.teacher, x_t, t, s, batch.cond)
        end = Segments(self.segments).end(schedule, t)
        loss = consistency_loss(nets.student, nets.student, batch, x_t, x_s, t, s, nets.distance, end)
        yield Update("student", loss.mean())


@dataclass(frozen=True)
class SegmentJoining(_Consistent):
    """Consistency of whole jumps to the data between edges, at the student's own samples, noised."""

    name: ClassVar[str] = "mlcm-joining"

    teacher_steps: Annotated[Count, "steps of the teacher from an edge to the next"] = 3

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        edges = Segments(self.segments).edges(schedule).to(rng.device)
        with torch.no_grad():
            x = rollout(nets.student, batch.normal(), self.plan(nets), batch.cond, rng)
            n = rng.integers(batch.n, 0, self.segments)
            t, s = edges[n + 1], edges[n]
            x_t = schedule.add_noise(x, rng.normal_like(x), t)
            x_s = ddim_steps(nets.teacher, x_t, times_between(schedule, t, s, self.teacher_steps), batch.cond)
        loss = consistency_loss(nets.student, nets.student, batch, x_t, x_s, t, s, nets.distance)
        yield Update("student", loss.mean(), {"sample_std": sample_std(x)})


@dataclass(frozen=True)
class Preference(_Multistep):
    """A reward that is differentiated through the student's samples, as far as a margin.

    The role "reward" is a module: ``reward(pictures [B, ...], cond) -> [B]``, of decoded samples.  A sample is the
    prediction of a random call, the calls before it made as in sampling.
    """

    name: ClassVar[str] = "mlcm-preference"
    healthy: ClassVar[dict[str, str]] = {
        "student/reward": "rises to about the margin; samples of glaring colours say that the reward is being gamed",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"student/class_entropy": FEW_CLASSES, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student", ROLE)

    margin: Annotated[float, "the reward from which on a sample is good enough"] = 1.0

    def made(self, start: Start, teacher: Denoiser) -> Networks:
        modules = {"student": self.jump(start, teacher), ROLE: Feedback(GIVEN).reward(start)}
        return Networks(modules, self.group(), ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        x, _ = StudentGenerator(nets.student, self.plan(nets)).draw(batch.n, batch.rng, batch.cond)
        loss, logs = yield from feedback_loss(nets.reward, nets.student, x, batch.cond, (self.margin,))
        yield Update("student", loss, {**logs, "sample_std": sample_std(x)})


@dataclass(frozen=True)
class SelfMatching(_Multistep):
    """Distribution matching of the student's predictions, and a game in which its samples of several calls are the real
    ones and those of one call the generated ones: both without data.

    The critic begins as the teacher *without* guidance: it comes first, or the student would be led once more.
    """

    name: ClassVar[str] = "mlcm-matching"
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/matching_norm": "starts near 0 (the critic is a copy of the teacher) and rises a little",
        "critic/discriminator_accuracy": "between 0.5 and 0.8",
        "student/sample_std": "stays where it was; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "critic/denoising": RUNAWAY_CRITIC,
        "critic/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }

    critic_lr: Annotated[NonNegative, "learning rate of the critic and the discriminator"] = 1e-3
    critic_steps: Annotated[Count, "critic updates for each of the student's, which comes last"] = 5
    gan_weight: Annotated[NonNegative, "weight of the adversarial term beside the matching"] = 3e-3
    discriminator_weight: Annotated[NonNegative, "weight of the discriminator's loss beside the critic's own"] = 1e-2

    def made(self, start: Start, teacher: Denoiser) -> Networks:
        native = start.teacher.native()
        modules = {
            "student": self.jump(start, teacher),
            "critic": start.network("critic", on=native.schedule),
            "discriminator": Discriminator(Adversary(), native, start.condition()),
            "teacher": guided(native, self.guidance),
        }
        critic = Optimizer(("critic", "discriminator"), self.critic_lr, kind="adamw", clip=1.0)
        return Networks(modules, {**self.group(), "critic": critic}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        cond, rng, plan = batch.cond, batch.rng, self.plan(nets)
        calls: list[Call] = []
        with torch.no_grad():
            real = rollout(nets.student, batch.normal(), plan, cond, rng, calls=calls)
        # of every call of the rollout the data prediction is known: what one call makes, and a random one
        call = calls[rng.shared_integer(0, len(calls))]
        if progress.step % self.critic_steps == self.critic_steps - 1:
            one = nets.student.to_data(calls[0].x, calls[0].t, cond)
            x = one if call is calls[0] else nets.student.to_data(call.x, call.t, cond)
            with nets.held("critic"):
                loss, logs = matching_loss(x, nets.teacher, nets.critic, cond, rng)
                game = nets.discriminator.student_loss(nets.critic, one, cond, rng)
                yield Update("student", loss + self.gan_weight * game, {**logs, "gan": game.detach()})
        denoising = critic_loss(nets.critic, call.out, cond, rng)
        told, more = nets.discriminator.loss(nets.critic, real, calls[0].out, cond, rng)
        loss = denoising + self.discriminator_weight * told
        yield Update("critic", loss, {"denoising": denoising.detach(), **more})


@dataclass(frozen=True)
class MLCM(Recipe):
    """The four stages; that of the preference is left out where no reward is given."""

    name: ClassVar[str] = "mlcm"
    paper: ClassVar[Paper] = Paper(
        "MLCM: Multistep Consistency Distillation of Latent Diffusion Model", "2406.05768", "from paper text",
        ("the text is that of the successor, TLCM, whose way of joining is that at milestones; MLCM's own is merging, "
         "and its list of segments (4, 2) is not certain",
         "`lr`, `later_lr` and `critic_lr` suit networks of a million parameters and runs of minutes (1e-4, 1e-5 and "
         "1e-4 there, for low-rank weights)",
         "`guidance` is 1, for small models (8 there)",
         "`distance` is l2 (LPIPS on latents there, of a network whose weights are not public)",
         "stages are shares of one budget, 12 : 2 : 0.5 : 1 (12k, 2k, 0.5k and 1k iterations there, the last two in "
         "smaller batches)",
         "the learning rate falls linearly to 0 over each stage (not known there)",
         "rewards are asked about the prompts alone: there are no negative prompts",
         "the critic of the matching is DMD2's, with the discriminator's heads on its features (not known there); the "
         "weights of the two games and five updates of the critic for each of the student's are DMD2's",
         "sampling uses a power-function average of the weights",
         "no ControlNet, no transfer of style: nothing but the student itself"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "MLCM", 2024, "consistency", "teacher", "2, 4, 8",
        "consistency within segments of the teacher's own trajectories, then between them: no images",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student", ROLE)

    lr: Annotated[NonNegative, "learning rate of the first stage"] = 1e-3
    later_lr: Annotated[NonNegative, "learning rate of the stages after it"] = 1e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic and the discriminator"] = 1e-3
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    segments: Annotated[Count, "segments of the trajectory"] = 8
    skip: Annotated[Count, "steps of the teacher's table that its solver takes at once, thousandths without one"] = 20
    joining: Annotated[
        Literal["merging", "milestones", "both"], "how segments are joined: by fewer of them, between edges, or both"
    ] = "merging"
    merges: Annotated[tuple[Count, ...], "numbers of segments of the merging stages"] = (4, 2)
    student_steps: Annotated[Count, "calls of the student that make a training sample"] = 4
    teacher_steps: Annotated[Count, "steps of the teacher from an edge to the next"] = 3
    margin: Annotated[float, "the reward from which on a sample is good enough"] = 1.0
    shares: Annotated[
        tuple[NonNegative, NonNegative, NonNegative, NonNegative],
        "shares of the budget: segments, joining, preference, matching; 0 leaves one out",
    ] = (12.0, 2.0, 0.5, 1.0)
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (2, 4, 8)
    gamma: Annotated[Share, "noise between calls: 1 noises the data prediction anew, 0 jumps on along the path"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared"] = L2

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.segments, *self.merges)
        if self.joining != "milestones" and not all(b < a for a, b in pairwise(counts)):
            raise ValueError(
                f"mlcm: merges={','.join(map(str, self.merges))} must fall from below segments={self.segments}, or "
                "joining be milestones"
            )

    def stages(self) -> list[Stage]:
        first, second, third, fourth = self.shares
        later = (self.later_lr, self.guidance, self.segments, self.student_steps, self.steps, self.gamma, self.distance)
        joins: list[Method] = []
        if self.joining != "milestones":
            joins += [MultistepConsistency(later[0], later[1], count, *later[3:], self.skip) for count in self.merges]
        if self.joining != "merging":
            joins.append(SegmentJoining(*later, self.teacher_steps))
        return [
            Stage(MultistepConsistency(self.lr, *later[1:], self.skip), first),
            *(Stage(join, second / len(joins)) for join in joins),
            Stage(Preference(*later, self.margin), third, needs=ROLE),
            Stage(SelfMatching(*later, self.critic_lr), fourth),
        ]
