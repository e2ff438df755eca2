"""The last part of a run, in which a discriminator joins another loss: the adversarial term of CTM, PCM, Align Your
Flow and Constant Acceleration Flow.

From there on one iteration is the student's and the next that of the discriminator, on features of the frozen teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Networks, Optimizer, Progress, Update
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.randomness import Rng


@dataclass(frozen=True)
class AdversarialPhase:
    """The last ``share`` of the budget, 0 for none, with a discriminator of learning rate ``lr``.

    The networks have its body as "body"; the weight of the student's adversarial loss is that which balances gradients,
    between ``least`` and ``most``.
    """

    share: float
    lr: float
    adversary: Adversary = field(default_factory=Adversary)
    least: float = 0.01
    most: float = 10.0

    def modules(self, body: Denoiser, cond: Cond = None) -> dict[str, nn.Module]:
        """What the phase adds to a method's networks; ``cond`` as for the discriminator."""
        return {"body": body, "discriminator": Discriminator(self.adversary, body, cond)} if self.share else {}

    def optimizers(self) -> Mapping[str, Optimizer]:
        return {"discriminator": Optimizer(("discriminator",), self.lr, betas=(0.5, 0.9))} if self.share else {}

    def joins(self, progress: Progress) -> bool:
        """Whether the student's loss has an adversarial term now."""
        return self.share > 0 and progress.fraction >= 1 - self.share

    def discriminates(self, progress: Progress) -> bool:
        """Whether this iteration is the discriminator's."""
        return self.joins(progress) and progress.step % 2 == 1

    def discriminate(
        self, nets: Networks, real: Tensor, fake: Tensor, cond: Cond, rng: Rng, real_cond: Cond = None
    ) -> Update:
        """The discriminator's iteration, for data and samples without a graph, under the same conditions unless data
        have their own."""
        loss, logs = nets.discriminator.loss(nets.body, real, fake, cond, rng, real_cond=real_cond)
        return Update("discriminator", loss, {"loss": loss.detach(), **logs})

    def student_loss(self, nets: Networks, fake: Tensor, cond: Cond, rng: Rng, real: Tensor | None = None) -> Tensor:
        """The adversarial term of the student's samples; yield its update while
        ``nets.held("discriminator")``."""
        loss: Tensor = nets.discriminator.student_loss(nets.body, fake, cond, rng, real)
        return loss
