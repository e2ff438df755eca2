"""Analog Bits: denoising with self-conditioning (Chen, Zhang & Hinton 2022, arXiv 2208.04202).

The network takes its own estimate ``x~`` of the data beside the state.  Training (algorithm 1)::

    x~   = sg clip(D(x_t, 0, t), -b, b)     for a share of the batch, 0 for the rest
    loss = || D(x_t, x~, t) - x_0 ||^2      t uniform

No gradient flows through the first pass, which costs a third of a training step for the samples that have one.  The
data are whatever the network is made for: bits (:mod:`fewstep.discrete.bits`), or plain pictures, where
self-conditioning works as well.  Sampling is :mod:`fewstep.sampling.self_conditioning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fewstep.conditions import rows
from fewstep.denoisers import Cond, NetworkDenoiser, networks_in
from fewstep.discrete.heads import Head, SigmoidHead, SoftmaxHead
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.parts.times import Uniform
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Least, NonNegative, Positive, Share
from fewstep.sampling.self_conditioned import SelfConditioned
from fewstep.sampling.self_conditioning import SelfConditioning

H = TypeVar("H", bound=Head)


def squared_loss(model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
    """``E || D - x_0 ||^2``, mean over everything; ``extras`` hold the estimate ``beside`` where there is one."""
    return torch.nn.functional.mse_loss(model(x_t, t, cond, **extras), x0)


def sigmoid_loss(model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
    """``E -log sigmoid(x_0 f / b)``, the cross-entropy of every bit (appendix B.2), on a network under a
    :class:`~fewstep.discrete.heads.SigmoidHead`."""
    head = head_of(model, SigmoidHead)
    logits = head.logits(x_t, network_time(model, x_t, t), cond, **extras)
    return torch.nn.functional.softplus(-x0 / head.scale * logits).mean()


def softmax_loss(model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
    """``E -log softmax(f)[symbol]``, the cross-entropy of every symbol (appendix B.3), on a network under a
    :class:`~fewstep.discrete.heads.SoftmaxHead`."""
    head = head_of(model, SoftmaxHead)
    logits = head.logits(x_t, network_time(model, x_t, t), cond, **extras)
    return torch.nn.functional.cross_entropy(logits, head.encoding.decode(x0))


def network_time(model: NetworkDenoiser, x: Tensor, t: Tensor) -> Tensor:
    """The times ``t`` as the network is told them."""
    return model.prediction.time(model.schedule, t).to(torch.promote_types(x.dtype, torch.float32))


def head_of(model: NetworkDenoiser, kind: type[H]) -> H:
    """The output layer of the network; ValueError unless it is of this kind and predicts the data."""
    if not isinstance(model.net, kind) or not model.prediction.data:
        raise ValueError(
            f"this loss needs a network under a {kind.__name__} in x0-prediction, got {type(model.net).__name__} in "
            f"{type(model.prediction).__name__}"
        )
    return model.net


@dataclass(frozen=True)
class AnalogBits(Method):
    """Denoising in data prediction with self-conditioning, from the model's current weights.

    ``self_conditioning`` is the share of a batch that is given its own estimate, the first part of it (0: plain
    denoising); ``bound`` clips that estimate to [-bound, bound] (b, the size of a bit); ``label_dropout`` is the share
    of unconditional samples.
    """

    name: ClassVar[str] = "analog-bits"
    paper: ClassVar[Paper] = Paper(
        "Analog Bits: Generating Discrete Data using Diffusion Models with Self-Conditioning", "2208.04202", "verified",
        ("the network is told the schedule's time, not the signal power alpha^2",
         "`warmup` of 100 steps (the paper's counts 10k of 1.5M)",
         "the U-Net and MLP of the library, not TransUNet"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Analog Bits", 2022, "solvers", "data", "10-100",
        "discrete data as real-valued bits, with self-conditioning", real="analog_bits_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "falls quickly, then slowly; it does not reach 0",
        "model/estimate_loss": "the squared error of the first pass, which has no estimate to go by: above that of the "
        "second pass once the network uses what it is given",
    }

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    self_conditioning: Annotated[Share, "share of a batch that is given its own estimate, 0 for plain denoising"] = 0.5
    bound: Annotated[Positive, "bound that the estimate is clipped to, the size of a bit"] = 1.0
    label_dropout: Annotated[Share, "share of samples that are trained without their label"] = 0.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 100

    def loss(self, model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
        """The loss of a prediction."""
        return squared_loss(model, x_t, x0, t, cond, **extras)

    def networks(self, start: Start) -> Networks:
        teacher = start.model("teacher")
        if teacher not in networks_in(teacher):
            raise ValueError(f"{self.name} trains a network, got a {type(teacher).__name__}")
        model = start.network("teacher", beside=teacher.shape[0] if self.self_conditioning else 0)
        optimizer = Optimizer(("model",), self.lr, clip=1.0, warmup=self.warmup)
        return Networks({"model": model}, {"model": optimizer}, ema=("model",))

    def estimate(self, model: NetworkDenoiser, x_t: Tensor, t: Tensor, cond: Cond, chosen: Tensor) -> Tensor:
        """What every sample is given beside its state, without a graph: its own clipped prediction for those ``chosen``
        ``[B]``, zeros for the others."""
        estimate = torch.zeros_like(x_t)
        if bool(chosen.any()):
            with torch.no_grad():
                first = model(x_t[chosen], t[chosen], rows(cond, chosen))
            estimate[chosen] = first.clamp(-self.bound, self.bound)
        return estimate

    def chosen(self, n: int, rng: Rng) -> Tensor:
        """Which of a part's ``n`` samples are given an estimate ``[n]``: every second one of the batch for a half, and
        so on, however the batch is cut."""
        i = torch.arange(rng.part * n, (rng.part + 1) * n, device=rng.device)
        share = self.self_conditioning + 1e-12  # a third of three is one
        return torch.floor((i + 1) * share) > torch.floor(i * share)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.model.schedule, batch.rng
        t = Uniform().draw(schedule, len(batch.x), rng)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        cond = drop_condition(batch.cond, nets.model.null, self.label_dropout, rng)
        if not self.self_conditioning:
            yield Update("model", self.loss(nets.model, x_t, batch.x, t, cond))
            return
        chosen = self.chosen(len(x_t), rng)
        estimate = self.estimate(nets.model, x_t, t, cond, chosen)
        first = (estimate - batch.x)[chosen].square().sum() / chosen.sum().clamp_min(1) / batch.x[0].numel()
        yield Update("model", self.loss(nets.model, x_t, batch.x, t, cond, beside=estimate), {"estimate_loss": first})

    def student(self, nets: Networks) -> Any:
        if not self.self_conditioning:
            return nets.model
        return SelfConditioned(nets.model, SelfConditioning(self.bound))

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"teacher": nets.model}


@dataclass(frozen=True)
class SigmoidAnalogBits(AnalogBits):
    """Analog Bits with a cross-entropy of every bit, for networks under a
    :class:`~fewstep.discrete.heads.SigmoidHead`."""

    name: ClassVar[str] = "analog-bits-sigmoid"

    def loss(self, model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
        return sigmoid_loss(model, x_t, x0, t, cond, **extras)


@dataclass(frozen=True)
class SoftmaxAnalogBits(AnalogBits):
    """Analog Bits with a cross-entropy of every symbol, for networks under a
    :class:`~fewstep.discrete.heads.SoftmaxHead`.  (:class:`AnalogBits` trains such a network with the squared error of
    its expected code, the paper's softmax factorisation.)"""

    name: ClassVar[str] = "analog-bits-softmax"

    def loss(self, model: NetworkDenoiser, x_t: Tensor, x0: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> Tensor:
        return softmax_loss(model, x_t, x0, t, cond, **extras)
