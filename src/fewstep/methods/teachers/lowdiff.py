"""LowDiff: one network over growing resolutions, each conditioned on the one below (Xu et al. 2025, arXiv 2509.15342).

Resolutions ``R_1 < .. < R_K``, ``x_k`` the data averaged over areas to ``R_k``, ``y_k`` the picture ``x_(k-1)`` with a
little noise, enlarged to ``R_k``.  The loss is denoising at every resolution with the condition in sight::

    sum_k q_k w_k E || D(x_k + sigma n, sigma; y_k, s, c) - x_k ||^2 lambda(sigma),   y_k = Up(x_(k-1) + s n')

with one ``k ~ q`` a batch, ``log(sigma / alpha) ~ N(noise_mean + shift log(R_k / R), noise_std^2)``, ``s ~ U(0,
augmentation_max)`` told to the network, and the condition (as the label) left out of a share of the samples.

Only the abstract and public reviews are known here, not the paper's text or code.  They say: one model, rising
resolution, a resolution embedding, weights and sampling parameters of their own for every resolution, pixels and
latents.  The noise law, the weights, the noise on the condition and its dropout are reconstructions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Cond, NetworkDenoiser, networks_in
from fewstep.methods.method import Batch, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import CascadeUNet, UNet
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.cascade import CascadeModel, downsample, upsample


def stage_loss(
    model: NetworkDenoiser,
    x0: Tensor,
    t: Tensor,
    cond: Cond,
    rng: Rng,
    beside: Tensor | None = None,
    augmentation: Tensor | None = None,
) -> Tensor:
    """``E || F(c_in x_t; beside) - target ||^2`` at one resolution, mean over everything; ``t`` ``[B]``.

    Without ``beside`` this is :func:`~fewstep.methods.teachers.denoising.denoising_loss`.
    """
    x_t = model.schedule.add_noise(x0, rng.normal_like(x0), t)
    target = model.prediction.target(x_t, x0, model.schedule, t)
    condition = {} if beside is None or augmentation is None else {"beside": beside, "augmentation": augmentation}
    return torch.nn.functional.mse_loss(model.raw(x_t, t, cond, **condition), target)


def condition(low: Tensor, size: tuple[int, ...], greatest: float, dropout: float, rng: Rng) -> tuple[Tensor, Tensor]:
    """``Up(low + s n)`` with ``s ~ U(0, greatest)`` for each sample, and ``s`` ``[B]``: infinite, "no condition", for a
    share ``dropout`` of them."""
    s = rng.uniform(len(low), high=greatest)
    noisy = low + s.to(low)[:, None, None, None] * rng.normal_like(low)
    return upsample(noisy, size), torch.where(rng.uniform(len(low)) < dropout, math.inf, s).to(low)


@dataclass(frozen=True)
class LowDiff(Denoising):
    """One U-Net trained at several resolutions, each conditioned on the one below.

    ``resolutions`` are the heights that a plain U-Net is made to work at, lowest first; by default half of the picture
    and the picture.  A teacher that is a :class:`~fewstep.networks.CascadeUNet` has its own.  ``shares`` are the
    probabilities of training on each, by default equal.  ``weights`` multiply the losses of each, by default one over
    K times the share.  ``shift`` moves the noise law down by so many times ``log(R / R_k)``.  ``augmentation_max`` is
    the greatest noise on the condition.  ``picture_dropout`` is the share of samples without a condition.
    """

    name: ClassVar[str] = "lowdiff"
    paper: ClassVar[Paper] = Paper(
        "LowDiff: Efficient Diffusion Sampling with Low-Resolution Condition", "2509.15342", "reconstructed",
        ("only the abstract and public reviews are known: no text, no code",
         "noise law, loss weights, noise on the condition and its dropout are our choices",
         "the way into the U-Net (own layer, level and head for each resolution) is our choice",
         "latents are averaged over areas like pictures; no transformer"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "LowDiff", 2025, "solvers", "data", "any",
        "one network over growing resolutions, each conditioned on the one below", real="lowdiff_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "a mixture over resolutions, so it jumps from batch to batch; look at loss_R of each",
    }

    resolutions: Annotated[
        tuple[Count, ...] | None, "heights that a plain U-Net is made to work at, lowest first (none: half and whole)"
    ] = None
    shares: Annotated[tuple[Positive, ...] | None, "probability of training on each resolution (none: equal)"] = None
    weights: Annotated[
        tuple[NonNegative, ...] | None, "factor on the loss of each resolution (none: one over K times its share)"
    ] = None
    shift: Annotated[float, "how many times log(R / R_k) the noise law moves down at resolution R_k"] = 1.0
    augmentation_max: Annotated[NonNegative, "greatest noise on the picture that conditions the next resolution"] = 0.3
    picture_dropout: Annotated[Share, "share of samples that are trained without that picture"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares and (min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise ValueError(f"LowDiff: shares={list(self.shares)} must be positive and sum to 1")

    def networks(self, start: Start) -> Networks:
        teacher = start.model("teacher")
        if teacher not in networks_in(teacher) or not isinstance(teacher.net, UNet):
            raise ValueError("LowDiff works on a U-Net at several resolutions; this teacher has another network")
        net = teacher.net
        if not isinstance(net, CascadeUNet):
            net = CascadeUNet.from_unet(net, self.resolutions or ())
        for name, values in {"shares": self.shares, "weights": self.weights}.items():
            if values and len(values) != len(net.resolutions):
                raise ValueError(
                    f"LowDiff: {name}={list(values)} for the resolutions {list(net.resolutions)}: one each"
                )
        model = NetworkDenoiser(net, teacher.schedule, teacher.prediction, teacher.shape, teacher.classes)
        return super().networks(dataclasses.replace(start, made={**start.made, "teacher": model}))

    def draw_stage(self, stages: int, rng: Rng) -> int:
        """The stage of this batch, the same on every process."""
        if stages == 1:
            return 0
        return rng.shared_choice(self.shares or (1 / stages,) * stages)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        model, resolutions, rng = nets.model, nets.model.net.resolutions, batch.rng
        k = self.draw_stage(len(resolutions), rng)
        height, width = batch.x.shape[-2:]
        sizes = [(r, width * r // height) for r in resolutions]
        x0 = downsample(batch.x, sizes[k])
        law = LogNormal(self.noise_mean + self.shift * math.log(resolutions[k] / height), self.noise_std)
        t = law.draw(model.schedule, len(x0), rng)
        cond = drop_condition(batch.cond, nets.model.null, self.label_dropout, rng)
        if k:
            low = downsample(x0, sizes[k - 1])
            beside = condition(low, sizes[k], self.augmentation_max, self.picture_dropout, rng)
            loss = stage_loss(model, x0, t, cond, rng, *beside)
        else:
            loss = stage_loss(model, x0, t, cond, rng)
        share = self.shares[k] if self.shares else 1 / len(resolutions)
        weight = self.weights[k] if self.weights else 1 / (len(resolutions) * share)
        yield Update("model", weight * loss, {f"loss_{resolutions[k]}": loss.detach()})

    def student(self, nets: Networks) -> Any:
        return CascadeModel(nets.model, nets.model.net.resolutions)
