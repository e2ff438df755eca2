"""Plain teacher training: regress what the network predicts on noised data.

On the EDM or TrigFlow prediction with a log-normal time law this is EDM's loss (its weight times ``c_out^2`` is 1);
on flow matching with a velocity prediction and uniform times it is the conditional flow-matching loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from fewstep.denoisers import Denoiser
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update
from fewstep.methods.parts.score_matching import denoising_loss, drop_condition
from fewstep.methods.parts.times import LogNormal, TimeLaw, Uniform
from fewstep.methods.start import Start
from fewstep.ranges import Least, NonNegative, Positive, Share


@dataclass(frozen=True)
class Regression(Method):
    """Regression of what a :class:`NetworkDenoiser` predicts, from its current weights, at times of some law.

    ``label_dropout`` is the share of unconditional samples.
    """

    healthy: ClassVar[dict[str, str]] = {"model/loss": "falls quickly, then slowly; it does not reach 0"}

    lr: Annotated[NonNegative, "learning rate"] = 1e-3
    label_dropout: Annotated[Share, "share of samples that are trained without their label"] = 0.1
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 100

    @abstractmethod
    def times(self) -> TimeLaw:
        """At which times the loss looks."""

    def networks(self, start: Start) -> Networks:
        optimizer = Optimizer(
            ("model",), self.lr, betas=(0.9, 0.99), clip=self.clip, warmup=self.warmup, decay="cosine"
        )
        model = start.network("teacher").native()
        return Networks({"model": model}, {"model": optimizer}, ema=("model",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        t = self.times().draw(nets.model.schedule, len(batch.x), batch.rng)
        cond = drop_condition(batch.cond, nets.model.null, self.label_dropout, batch.rng)
        yield Update("model", denoising_loss(nets.model, batch.x, t, cond, batch.rng))

    def student(self, nets: Networks) -> Denoiser:
        return nets.model

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"teacher": nets.model}


@dataclass(frozen=True)
class Denoising(Regression):
    """Denoising score matching of a :class:`NetworkDenoiser` from its current weights."""

    name: ClassVar[str] = "denoising"
    paper: ClassVar[Paper] = Paper(
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364", "verified",
        ("`noise_mean` and `noise_std` suit small grey pictures (-1.2 and 1.2 there)",
         "short runs: `warmup` of 100 steps (10 million images there), `decay` of the rate to 0 over the budget (there "
         "it is constant), second moments that forget faster (`betas`), gradients bounded (`clip`)",
         "`label_dropout` is for guidance, which the paper has none of"),
    )  # fmt: skip

    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times that training looks at"] = -1.0
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.4

    def times(self) -> TimeLaw:
        return LogNormal(self.noise_mean, self.noise_std)


@dataclass(frozen=True)
class FlowMatchingTraining(Regression):
    """Conditional flow matching: uniform times between ``t_min`` and ``t_max``.

    The paper's on :class:`~fewstep.schedules.FlowMatching` with a network that predicts the velocity, which is what
    ``fewstep train --method flow-matching`` makes; another teacher is trained in its own time and prediction.
    """

    name: ClassVar[str] = "flow-matching"
    paper: ClassVar[Paper] = Paper(
        "Flow Matching for Generative Modeling", "2210.02747", "verified",
        ("short runs: `lr` is twice the paper's on CIFAR-10, `warmup` 100 steps (45k there), its `decay` a cosine "
         "(polynomial there), second moments forget faster (`betas`), gradients are bounded (`clip`)",
         "`label_dropout` is for guidance, which the paper has none of"),
    )  # fmt: skip

    def times(self) -> TimeLaw:
        return Uniform()
