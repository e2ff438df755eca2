"""PCM: Phased Consistency Models (Wang et al. 2024, arXiv 2405.18407).

The teacher's trajectory is cut into phases, and within each a consistency model goes to the phase's end::

    loss = E  d( g_theta(x_t, t -> e),  sg g_target(x_s, s -> e) ),   e the lower edge of the phase of t
    x_s  = one (guided) DDIM step of the teacher from t to s,         s = t - k in its own index, never below e
    g(x, t -> e) = alpha_e D_theta(x, t) + sigma_e eps_theta(x, t)    (:class:`~fewstep.flow_maps.Jump`)

Sampling is deterministic, one call a phase, so that what one call leaves out is not drawn again at random; with one
phase it is consistency distillation, with as many as the solver has steps the teacher's own DDIM.  Read against the
authors' repository (G-U-N/Phased-Consistency-Model, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import repeat
from fewstep.denoisers import Denoiser, gradients
from fewstep.extras import Input
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.lcm import SkippingDistillation
from fewstep.methods.method import Batch, Networks, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversarial_phase import AdversarialPhase
from fewstep.methods.parts.adversary import Adversary, Hinge
from fewstep.methods.parts.distribution_matching import WON_GAME
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, align


@dataclass(frozen=True)
class PhasedConsistencyDistillation(SkippingDistillation):
    """``phases`` is the number of calls that the student is made for.

    With ``gan_share`` a discriminator tells what the student makes of a state from what the target makes of the
    teacher's next one, both noised on from the phase's end to a time within it; its iterations and the student's take
    turns.  Taught by a teacher without guidance, with ``label_dropout``, the student can be guided as the teacher can.
    """

    name: ClassVar[str] = "pcm"
    paper: ClassVar[Paper] = Paper(
        "Phased Consistency Models", "2405.18407", "verified",
        ("the adversarial term between phases (`gan_share`) is off by default; its heads are those of DMD2, "
         "on the teacher's bottleneck, with a `gan_weight` and a `gan_lr` for runs of minutes (0.1 and 1e-5 there: at "
         "0.1 digits came to 11 in place of 2.4)",
         "`guidance_min` and `guidance_max` are 1, the authors' option of a teacher without guidance; their scripts "
         "draw the scale from 5 to 6 without telling the student, which is told a range here",
         "`lr` suits networks of a million parameters and runs of minutes (5e-6 there, for low-rank weights)",
         "`decay`: the learning rate falls linearly to 0 over the budget (constant there)",
         "no `weight_decay` (1e-3 there)",
         "`distance` is l2 (the authors' command: pseudo-Huber, element by element; here over the whole sample)",
         "the edges of a table's phases are the times of sampling (with four of 1000 steps 249, 499 and 749; 239, 499 "
         "and 739 there)",
         "sampling uses a power-function average of the weights"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "PCM", 2024, "consistency", "teacher, data", "as many as phases",
        "consistency distillation within phases of the trajectory: deterministic sampling, guidance left free",
    )  # fmt: skip

    unstable: ClassVar[dict[str, Alarm]] = {"head/discriminator_accuracy": WON_GAME}

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    mu: Annotated[Share, "decay of the target network; 0 makes it the student"] = 0.0
    phases: Annotated[Count, "parts of the trajectory, one network call each"] = 4
    label_dropout: Annotated[Share, "share of samples without their condition, for guidance in sampling"] = 0.0
    gan_share: Annotated[Share, "last share of the budget, in which a discriminator joins; 0 for none"] = 0.0
    gan_weight: Annotated[NonNegative, "weight of the adversarial term"] = 2e-3
    gan_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3

    def seen_on(self, schedule: Schedule) -> Schedule:
        return schedule

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        Segments(self.phases).edges(teacher.schedule)

    def flow_map(self, denoiser: Denoiser, extras: Mapping[str, Input]) -> FlowMap:
        return Jump(denoiser, extras=extras)

    def times(self, schedule: Schedule) -> Tensor:
        return grids.skipping(schedule, self.skip, Segments(self.phases).indices(schedule))

    def end(self, schedule: Schedule, t: Tensor) -> Tensor | None:
        return Segments(self.phases).end(schedule, t)

    @property
    def phase(self) -> AdversarialPhase:
        return AdversarialPhase(self.gan_share, self.gan_lr, Adversary(Hinge()))

    def networks(self, start: Start) -> Networks:
        nets = super().networks(start)
        if not self.gan_share:
            return nets
        game = self.phase.modules(start.teacher.on(nets.student.schedule), start.condition())
        return Networks(
            dict(nets.named_children()) | game, {**nets.groups, **self.phase.optimizers()}, nets.ema, nets.moved
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        cond = drop_condition(batch.cond, nets.student.null, self.label_dropout, batch.rng)
        batch = replace(batch, cond=cond)
        if not self.phase.joins(progress):
            yield from super().updates(nets, batch, progress)
            return
        judging, game = self.phase.discriminates(progress), nets.discriminator
        with gradients(nets.student, "none" if judging else "all"):
            made, aim, t = self.both_ends(nets, batch)
        states, time = self.noised_within(nets, aim, made, t, batch.rng)
        with nets.held("student" if judging else "discriminator"):
            real, fake = game.logits(nets.body, states, time, repeat(cond, 2)).chunk(2)
            if judging:
                yield Update("discriminator", *game.judge(real, fake))
                return
            loss, gan = nets.distance(made, aim).mean(), game.rules.loss.generator(fake)
            logs = {"consistency": loss.detach(), "gan": gan.detach()}
            yield Update("student", loss + self.gan_weight * gan, logs, self.moves(nets))

    def noised_within(self, nets: Networks, real: Tensor, fake: Tensor, t: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Two states at the lower edge of each phase noised on to one time within it, ``[2 B, ...]``."""
        schedule, phases = nets.student.schedule, Segments(self.phases)
        time = phases.within(schedule, t, 1 - rng.uniform(len(t)))
        a, sd = schedule.transition(phases.end(schedule, t), time)
        states = [align(a, x) * x + align(sd, x) * rng.normal_like(x) for x in (real, fake)]
        return torch.cat(states), time.repeat(2)

    def student(self, nets: Networks) -> Student:
        edges = Segments(self.phases).edges(nets.student.schedule)
        return Student(nets.student, {self.phases: Plan(tuple(edges[1:].flip(0).tolist()), gamma=0.0)})
