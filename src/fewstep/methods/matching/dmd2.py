"""DMD2: Improved Distribution Matching Distillation (Yin et al. 2024, arXiv 2405.14867).

The student's samples move along ``g = (D_critic - D_teacher) / mean|x - D_teacher|``, the difference between the score
of its own samples (a critic, trained all the time) and the teacher's; a discriminator on the critic's bottleneck
adds what only real data know::

    student:   surrogate(x, g) + gan_weight softplus(-l(x))
    critic:    denoising loss on x + discriminator_weight [softplus(l(x)) + softplus(-l(real))]

The critic moves in every iteration, the student in one of ``critic_steps``.  With several steps the student is
trained on the inputs that its own rollout produces (backward simulation).

NVIDIA's FastGen has the discriminator on the frozen teacher instead (``discriminator = "teacher"``): the teacher's one
pass at ``x_t`` gives its prediction and the features there, and the critic learns nothing but the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from fewstep.denoisers import Denoiser
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    WON_GAME,
    check_first_level,
    critic_loss,
    matching_loss,
    renoising_plan,
    simulated,
    three_networks,
    two_optimizers,
    vector_loss,
)
from fewstep.methods.parts.energy import feature_energy
from fewstep.methods.parts.score_matching import weighted_difference
from fewstep.methods.parts.shared_pass import Body, scores_and_logits, tapped_discriminator
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student


@dataclass(frozen=True)
class DMD2(Method):
    """Distribution matching without pairs.

    ``steps`` student calls; ``critic_steps`` is the paper's two-time-scale ratio (5 on ImageNet, 10 on SD 1.5);
    ``gan_weight = 0`` leaves the GAN out altogether; ``guidance`` acts on the teacher only.  ValueError for a
    ``first_level`` below 1 with several ``steps``.
    """

    name: ClassVar[str] = "dmd2"
    paper: ClassVar[Paper] = Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis", "2405.14867", "verified",
        ("`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (2e-6 for both on ImageNet-64 "
         "there), and the critic's is higher than the student's",
         "short runs: `warmup` of 20 steps (500 there), `decay` of the student's rate to 0 over the budget (constant "
         "there)",
         "sampling uses a power-function average of the student (the official code has none)",
         "the discriminator head is sized for small bottlenecks",
         "the critic loss is the teacher's own training loss, equal to the official EDM weight on the data prediction",
         "a sample is the student's jump to the least noise of its schedule (0.002 on EDM), not its data prediction",
         "an energy distance between features of the frozen teacher can stand beside or in place of the GAN "
         "(energy_weight, 0 by default): ours, for runs of minutes",
         "times of a student of several steps are equally spaced, on EDM in TrigFlow's angle"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "DMD2", 2024, "matching", "teacher, data", "1, 4",
        "distribution matching without pairs: two time scales, a GAN, simulated inputs",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/matching_norm": "starts near 0 (the critic is a copy of the teacher), rises as the critic turns to "
        "the student's samples, then falls slowly",
        "critic/discriminator_accuracy": "between 0.5 and 0.8; near 1 the GAN gradient is noise: lower gan_weight",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }

    unstable: ClassVar[dict[str, Alarm]] = {
        "critic/denoising": RUNAWAY_CRITIC,
        "critic/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[Count, "network calls that the student is made for"] = 1
    critic_steps: Annotated[
        Count, "critic updates for each of the student's; the paper has 5 on ImageNet, 10 on SD 1.5"
    ] = 5
    first_level: Annotated[
        Share, "share of the noise levels at which a student of one step is called; 0.4 is 399 of 1000, as for SDXL"
    ] = 1.0
    gan_weight: Annotated[NonNegative, "weight of the adversarial term; 0 leaves the GAN out altogether"] = 3e-3
    discriminator_weight: Annotated[NonNegative, "weight of the discriminator's loss beside the critic's own"] = 1e-2
    discriminator: Annotated[Body, "whose features the discriminator sees; the paper's is on the critic"] = "critic"
    r1: Annotated[NonNegative, "weight of the approximate R1 penalty of the discriminator, 0 for none"] = 0.0
    energy_weight: Annotated[
        NonNegative,
        "weight of the energy distance between the teacher's features of samples and of data; 0 leaves it out",
    ] = 0.0
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic and the discriminator"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_first_level(self.first_level, self.steps)

    def networks(self, start: Start) -> Networks:
        modules = three_networks(start)
        critic: tuple[str, ...] = ("critic",)
        if self.gan_weight:
            made = tapped_discriminator if self.discriminator == "teacher" else Discriminator
            modules["discriminator"] = made(Adversary(r1=self.r1), start.teacher.native(), start.condition())
            critic = ("critic", "discriminator")
        groups = two_optimizers(self.lr, self.critic_lr, self.clip, self.warmup, critic)
        return Networks(modules, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        x = self.draw(nets, batch, trainable=progress.step % self.critic_steps == 0)
        if x.requires_grad:
            with nets.held("critic"):
                loss, logs = self.student_loss(nets, batch, x)
                if self.energy_weight:
                    energy, logs["energy"] = yield from feature_energy(nets.teacher, x, batch)
                    loss = loss + self.energy_weight * energy
                yield Update("student", loss, logs)
        loss, logs = self.critic_loss(nets, batch, x.detach())
        yield Update("critic", loss, logs)

    def plan(self, nets: Networks) -> Plan:
        """The student's times."""
        return renoising_plan(nets.student.schedule, self.steps, self.first_level)

    def draw(self, nets: Networks, batch: Batch, trainable: bool) -> Tensor:
        """Student samples as inference makes them: backward simulation."""
        return simulated(nets.student, self.plan(nets), batch, trainable)

    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching plus the adversarial term; the gradient reaches the student through ``x`` only."""
        rng = batch.rng
        if self.gan_weight and self.discriminator == "teacher":
            found, told = scores_and_logits(nets, "teacher", x, batch.cond, rng, self.guidance)
            loss, logs = vector_loss(x, weighted_difference(found))
            fake = nets.discriminator.rules.loss.generator(told)
        else:
            loss, logs = matching_loss(x, guided(nets.teacher, self.guidance), nets.critic, batch.cond, rng)
            if not self.gan_weight:
                return loss, logs
            fake = nets.discriminator.student_loss(nets.critic, x, batch.cond, rng)
        return loss + self.gan_weight * fake, {**logs, "gan": fake.detach()}

    def critic_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic learns the score of the student's samples, and the discriminator beside it to tell them from
        data; on the teacher that learns alone."""
        denoising = critic_loss(nets.critic, x, batch.cond, batch.rng)
        logs = {"denoising": denoising.detach()}
        if not self.gan_weight:
            return denoising, logs
        body: Denoiser = getattr(nets, self.discriminator)
        told, more = nets.discriminator.loss(body, batch.x, x, batch.cond, batch.rng)
        return denoising + self.discriminator_weight * told, {**logs, **more}

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {self.steps: self.plan(nets)})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"student": self.student(nets), "critic": nets.critic}
