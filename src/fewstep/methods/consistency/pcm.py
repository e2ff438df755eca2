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

from torch import Tensor

from fewstep import grids
from fewstep.denoisers import Denoiser
from fewstep.extras import Input
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.consistency.lcm import SkippingDistillation
from fewstep.methods.method import Batch, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.parts.times import Segments
from fewstep.ranges import Count, NonNegative, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule


@dataclass(frozen=True)
class PhasedConsistencyDistillation(SkippingDistillation):
    """PCM without its adversarial term; ``phases`` is the number of calls that the student is made for.

    Taught by a teacher without guidance, with ``label_dropout``, the student can be guided as the teacher can.
    """

    name: ClassVar[str] = "pcm"
    paper: ClassVar[Paper] = Paper(
        "Phased Consistency Models", "2405.18407", "verified",
        ("no adversarial term between phases: the consistency loss alone",
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

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    mu: Annotated[Share, "decay of the target network; 0 makes it the student"] = 0.0
    phases: Annotated[Count, "parts of the trajectory, one network call each"] = 4
    label_dropout: Annotated[Share, "share of samples without their condition, for guidance in sampling"] = 0.0

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

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        cond = drop_condition(batch.cond, nets.student.null, self.label_dropout, batch.rng)
        yield from super().updates(nets, replace(batch, cond=cond), progress)

    def student(self, nets: Networks) -> Student:
        edges = Segments(self.phases).edges(nets.student.schedule)
        return Student(nets.student, {self.phases: Plan(tuple(edges[1:].flip(0).tolist()), gamma=0.0)})
