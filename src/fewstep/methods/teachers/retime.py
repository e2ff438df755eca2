"""Retiming: a teacher's network learns to be told TrigFlow's angle instead of its own time.

Continuous-time losses differentiate the network in time.  Networks that are told a logarithm of the noise level or a
count of a thousand steps change fast in it, without bound at the ends; told the angle, they do not (Lu & Song 2024,
section 4.1; Chen et al. 2025, "SANA-Sprint", section 3.2; Sabour et al. 2025, "Align Your Flow").  A short training
puts the same outputs on the new time::

    E || F_theta(c_in x_t, angle(t)) - F_teacher(c_in x_t, time(t)) ||^2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.denoisers import Denoiser, NetworkDenoiser, networks_in
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.networks.inputs import clock_of
from fewstep.predictions import retimed
from fewstep.ranges import NonNegative, Positive
from fewstep.schedules import TrigFlow

#: How fast a time input may change with the angle; that of EDM reaches 60 at its ends, that of a thousand steps 600.
FASTEST = 30.0


def time_slope(denoiser: Denoiser) -> float:
    """The largest derivative of what a denoiser's networks embed in TrigFlow's angle, over the times they know."""
    found = 0.0
    for part in networks_in(denoiser):
        angles = TrigFlow(sigma_data=1.0)
        ends = torch.tensor([part.schedule.t_min, part.schedule.t_max], dtype=torch.float64)
        low, high = (angles.time_at(part.schedule.log_snr(end)) for end in ends)
        a = low + (high - low) * torch.linspace(0.002, 0.998, 500, dtype=torch.float64)
        told = clock_of(part.net) * part.prediction.time(part.schedule, part.schedule.time_at(angles.log_snr(a)))
        found = max(found, float((told.diff() / a.diff()).abs().max()))
    return found


def check_time_input(denoiser: Denoiser, role: str = "student") -> None:
    """ValueError naming the remedy when a network's time input changes too fast for a loss that differentiates it."""
    slope = time_slope(denoiser)
    if slope > FASTEST:
        kinds = ", ".join({type(part.prediction).__name__ for part in networks_in(denoiser)})
        raise ValueError(
            f"the {role}'s network ({kinds}) is told a time that changes {slope:.0f} times as fast as the angle, and "
            "this loss differentiates it: train one that is told the angle first (fewstep distill retime), and give it "
            "as the student"
        )


@dataclass(frozen=True)
class Retime(Method):
    """A copy of the teacher's network that is told the angle, trained to say the same.

    ``noise_mean`` and ``noise_std`` are the law of ``log(sigma / alpha)``, wide enough to cover all times.
    """

    name: ClassVar[str] = "retime"
    paper: ClassVar[Paper] = Paper(
        "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", "2503.09641", "reconstructed",
        ("the network's own output is the target; the papers go on with the denoising loss",),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "falls from the size of the outputs to a few per mille of it; what stays is what a student is "
        "wrong by at its start",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    sigma_data: Annotated[Positive, "scale of the angle atan(rho / sigma_data) where the prediction has none"] = 0.5
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times that training looks at"] = -0.5
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 2.0

    def networks(self, start: Start) -> Networks:
        teacher, model = start.teacher.native(), start.network("student").native()
        if teacher.network is None or model.network is None:
            raise ValueError(f"{self.name} trains a network, got a {type(teacher).__name__}")
        network: NetworkDenoiser = model.network
        told = retimed(network.prediction, self.sigma_data)
        if told == network.prediction:
            raise ValueError(f"{self.name}: the network ({type(told).__name__}) is told the angle already")
        network.prediction = told
        optimizer = Optimizer(("model",), self.lr, clip=1.0, warmup=20, decay="cosine")
        return Networks({"model": network, "teacher": teacher}, {"model": optimizer}, ema=("model",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        t = LogNormal(self.noise_mean, self.noise_std).draw(nets.teacher.schedule, batch.n, batch.rng)
        x_t = nets.teacher.schedule.add_noise(batch.x, batch.rng.normal_like(batch.x), t)
        with torch.no_grad():
            target: Tensor = nets.teacher.raw(x_t, t, batch.cond)
        yield Update("model", (nets.model.raw(x_t, t, batch.cond) - target).square().mean())

    def student(self, nets: Networks) -> Denoiser:
        return nets.model

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"student": nets.model}
