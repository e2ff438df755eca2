"""SwiftBrush (Nguyen & Tran 2023, arXiv 2312.05239): variational score distillation of a one-step student, from
prompts.

ProlificDreamer's loss with a student in place of the scene.  The critic, which learns the score of the student's
samples, is the teacher itself under low-rank weights; guidance acts on *both* scores::

    x       = D_student(z, T)                                   one call on pure noise
    g       = sigma^2 (eps_teacher^w - eps_critic^w) = sigma alpha (D_critic^w - D_teacher^w)
    student:  surrogate(x, g)
    critic:   alpha^2 || eps_critic - eps ||^2 on x,            now and then without its prompt

No image is needed: conditions are all that is read of the data.  Read against VinAIResearch/SwiftBrush.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from fewstep.conditions import Cond, expand
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.distribution_matching import LOST_MODES, RUNAWAY_CRITIC, matching_loss
from fewstep.methods.parts.score_matching import by_noise
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.networks.lora import LowRank
from fewstep.randomness import Rng
from fewstep.ranges import Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.schedules import align

#: The layers that the critic's low-rank weights lie on, where networks name their attention as diffusers does.
TARGETS = ("to_q", "to_v")


def noise_loss(critic: Denoiser, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """``alpha^2 || eps_critic(x_t) - eps ||^2``, mean over everything, at all noise levels."""
    t = Own(0.0, 1.0).draw(critic.schedule, len(x), rng)
    eps = rng.normal_like(x)
    error = critic.eps(critic.schedule.add_noise(x, eps, t), t, cond) - eps
    return (align(critic.schedule.alpha(t), x) * error).square().mean()


@dataclass(frozen=True)
class SwiftBrush(Method):
    """One step from prompts alone.

    ``rank`` and ``alpha`` are those of the critic's low-rank weights; a rank of 0 trains a copy of the whole teacher in
    their place.  ``guidance`` acts on both scores, so the critic learns to do without a condition too, in a share
    ``label_dropout`` of the iterations.
    """

    name: ClassVar[str] = "swift-brush"
    paper: ClassVar[Paper] = Paper(
        "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation", "2312.05239",
        "verified",
        ("`guidance` is 1 by default (4.5 there), for small models: where it is not, it acts on both scores, as there",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (1e-6 and 1e-3 there)",
         "`warmup` of 20 steps and `decay` of the student's rate to 0 over the budget (none there)",
         "`rank` 16 and an `alpha` of 27 for small networks (64 and 108 there, the same ratio)",
         "the low-rank weights lie on the queries and values of attention where layers are called so (as there), "
         "on the default layers of other networks",
         "the last signal is that of the teacher's own schedule (a constant of Stable Diffusion 2.1's there)",
         "sampling uses a power-function average of the student (the official average is one of fixed decay)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "SwiftBrush", 2023, "matching", "teacher, prompts", "1",
        "variational score distillation of a one-step student from prompts, the critic a low-rank teacher",
        page="swift-brush",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/matching_norm": "exactly 0 in the first iteration, in which the critic is the teacher; rises as the "
        "critic turns to the student's samples, then falls slowly",
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"critic/denoising": RUNAWAY_CRITIC, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    guidance: Annotated[float, "scale of classifier-free guidance on teacher and critic, 1 for none"] = 1.0
    label_dropout: Annotated[Share, "share of iterations in which the critic is shown no condition"] = 0.1
    rank: Annotated[int, Least(0), "rank of the critic's low-rank weights; 0 trains all of a copy"] = 16
    alpha: Annotated[Positive, "scale of the critic's low-rank weights, over the rank"] = 27.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 3e-3

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        guided(teacher, self.guidance)  # ValueError for a teacher that cannot be guided
        student = Jump(start.network("student", on=teacher.schedule))
        critic = start.network("critic", on=teacher.schedule, low_rank=self.critic_weights(teacher))
        return Networks(
            {"student": student, "critic": critic, "teacher": teacher},
            {
                "student": Optimizer(("student",), self.lr, clip=1.0, warmup=20, decay="linear"),
                "critic": Optimizer(("critic",), self.critic_lr, clip=1.0, warmup=20),
            },
            ema=("student",),
        )

    def critic_weights(self, teacher: Denoiser) -> LowRank | None:
        if not self.rank:
            return None
        named = any(name.endswith(TARGETS) for name, _ in teacher.named_modules())
        return LowRank(self.rank, self.alpha, TARGETS if named else None)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        rng = batch.rng
        x, _ = StudentGenerator(nets.student, self.plan(nets)).draw(batch.n, rng, batch.cond)
        teacher, critic = guided(nets.teacher, self.guidance), guided(nets.critic, self.guidance)
        loss, logs = matching_loss(x, teacher, critic, batch.cond, rng, weight=by_noise)
        yield Update("student", loss, logs)
        hidden = batch.cond is not None and rng.shared_integer(0, 1000) < 1000 * self.label_dropout
        shown = expand(nets.critic.null, batch.n) if hidden else batch.cond
        denoising = noise_loss(nets.critic, x.detach(), shown, rng)
        yield Update("critic", denoising, {"denoising": denoising.detach()})

    def plan(self, nets: Networks) -> Plan:
        """One call, at the noisiest time."""
        return Plan((float(nets.student.schedule.t_max),))

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: self.plan(nets)})
