"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al. 2023, arXiv 2311.18828).

The student's samples ``x`` move along the approximate gradient of a reverse KL divergence between the noised laws, the
difference of two scores: the teacher's, and that of a critic, which learns the score of the student's own samples all
the time.  Beside it a regression on pairs ``(z, y)`` of noise and the teacher's own output for it keeps all modes::

    g        = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|
    student:   surrogate(x, g) + regression_weight d(G(z), y)
    critic:    denoising loss on x

Fresh noise makes ``x``; the pairs are a second source of training samples, with an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from fewstep.data.dataset import Samples
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    critic_loss,
    matching_loss,
    three_networks,
    two_optimizers,
)
from fewstep.methods.parts.stores import pairs_of
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive
from fewstep.sampling.rollout import Plan, Student, rollout
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.schedules import Schedule


@dataclass(frozen=True)
class DMD(Method):
    """Distribution matching and a regression on the teacher's own pairs, to one step.

    The data give nothing but conditions and how many samples to make: they may be absent.  ``guidance`` acts on the
    teacher, in the matching as in the pairs; ``regression_weight = 0`` makes no pairs, and is DMD2 without its GAN and
    with one critic update for each of the student's.
    """

    name: ClassVar[str] = "dmd"
    paper: ClassVar[Paper] = Paper(
        "One-step Diffusion with Distribution Matching Distillation", "2311.18828", "reconstructed",
        ("no training code of the authors is public: the matching term is that of their DMD2, without the paper's "
         "factor alpha_t, which their code drops; the regression is from the paper and a public re-implementation",
         "`distance` is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (5e-5 on CIFAR-10 there), and "
         "the critic's is higher than the student's",
         "short runs: `warmup` of 20 steps (500 there), `decay` of the student's rate to 0 over the budget (constant "
         "there)",
         "fewer `pairs`, by Heun steps for every teacher (the paper has PNDM and 500k pairs for Stable Diffusion)",
         "sampling uses a power-function average of the student (the paper's has none)",
         "the critic loss is the teacher's own training loss, equal to EDM's weight on the data prediction"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "DMD", 2023, "matching", "teacher", "1",
        "a one-step generator along the difference of two scores, with a regression on pairs", real="dmd_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/matching_norm": "starts near 0 (the critic is a copy of the teacher), rises as the critic turns to "
        "the student's samples, then falls slowly",
        "student/regression": "falls quickly at first, then slowly",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }

    unstable: ClassVar[dict[str, Alarm]] = {"critic/denoising": RUNAWAY_CRITIC, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    regression_weight: Annotated[
        NonNegative, "weight of the regression on pairs, the paper's lambda_reg; 0 makes no pairs"
    ] = 0.25
    distance: Annotated[Distance, "how the regression compares two samples; LPIPS in the paper"] = L2
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 18
    match_pairs: Annotated[bool, "match on the samples made from the pairs' noise too, as for text in the paper"] = (
        False
    )
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def sources(self, start: Start) -> Mapping[str, Samples]:
        if not self.regression_weight:
            return {"data": start.data}
        pairs = pairs_of(start.teacher, start, self.pairs, self.ode_steps, self.guidance)
        return {"data": start.data, "pairs": pairs}

    def networks(self, start: Start) -> Networks:
        modules = {**three_networks(start), "distance": self.distance.network(start.teacher)}
        return Networks(modules, two_optimizers(self.lr, self.critic_lr, self.clip, self.warmup), ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x, _ = StudentGenerator(nets.student, self.plan(nets.student.schedule)).draw(batch.n, batch.rng, batch.cond)
        if "student" in nets.groups:  # else it is held, and its critic learns alone
            loss, logs = self.student_loss(nets, batch, x)
            yield Update("student", loss, logs)
        denoising = critic_loss(nets.critic, x.detach(), batch.cond, batch.rng)
        yield Update("critic", denoising, {"denoising": denoising.detach()})

    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching of ``x``, plus the regression on the batch's pairs."""
        teacher = guided(nets.teacher, self.guidance)
        matching, logs = matching_loss(x, teacher, nets.critic, batch.cond, batch.rng)
        if not self.regression_weight:
            return matching, logs
        pairs = batch.of["pairs"]
        made = rollout(nets.student, pairs.column("noise"), self.plan(nets.student.schedule), pairs.cond)
        if self.match_pairs:
            other, _ = matching_loss(made, teacher, nets.critic, pairs.cond, batch.rng)
            matching = (matching + other) / 2
        regression = nets.distance(made, pairs.x).mean()
        return matching + self.regression_weight * regression, {**logs, "regression": regression.detach()}

    def plan(self, schedule: Schedule) -> Plan:
        """One call, at the noisiest time."""
        return Plan((float(schedule.t_max),))

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: self.plan(nets.student.schedule)})
