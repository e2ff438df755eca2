"""iCT: Improved Techniques for Training Consistency Models (Song & Dhariwal 2023, arXiv 2310.14189).

Consistency training, from data alone, with everything around the loss reconsidered::

    loss = E  1 / (t - s)  d( f(x_0 + t z, t),  sg f(x_0 + s z, s) ),     d = sqrt(||.||^2 + c^2) - c

* the target is the network itself, not an average of it;
* ``d`` is pseudo-Huber over the whole sample, ``c = 0.00054 sqrt(n)``;
* ``s`` and ``t`` are neighbours on a Karras grid, drawn as a log-normal law falls on its intervals;
* the grid is doubled in equal phases, from ``s0`` to ``s1`` intervals.

There is no official code; read against a public re-implementation (Kinyugo/consistency_models), which differs in that
it takes pseudo-Huber number by number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.flow_maps import EDMConsistency
from fewstep.methods.consistency.cm import consistency_loss
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.distances import pseudo_huber
from fewstep.methods.parts.teacher_steps import edm_like
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Positive, Within
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule


def interval_probabilities(levels: Tensor, mean: float, std: float) -> Tensor:
    """The share of ``log sigma ~ N(mean, std^2)`` in each interval of falling noise ``levels`` ``[N]``, as ``[N - 1]``:
    ``p(i) ~ erf((log t_i - mean) / (sqrt(2) std)) - erf((log s_i - mean) / (sqrt(2) std))`` (the paper's table 1)."""
    below = torch.erf((levels.log() - mean) / (math.sqrt(2) * std))
    return (below[:-1] - below[1:]) / (below[0] - below[-1])


@dataclass(frozen=True)
class ImprovedConsistencyTraining(Method):
    """Consistency training without a teacher; the model that it is given only lends its network and first weights.

    ``second_level`` is 0.821 on CIFAR-10 and 1.526 on ImageNet-64.  Gradients double with the grid, so that ``beta2``
    must let the optimizer forget faster (0.98) where a phase lasts only hundreds of steps.
    """

    name: ClassVar[str] = "ict"
    paper: ClassVar[Paper] = Paper(
        "Improved Techniques for Training Consistency Models", "2310.14189", "from paper text",
        ("no official code",
         "the network and its dropout are those of the model that is given (the paper's have a dropout of 0.3 and a "
         "Fourier embedding of scale 0.02)",
         "it starts from that model's weights: fresh ones with 'fewstep train --method ict'",
         "phases are equal shares of the budget, whatever its unit",
         "sampling uses a power-function average (the paper's decays by 0.99993)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "iCT", 2023, "consistency", "data", "1, 2",
        "consistency training without a teacher, with better weights, distances and grids", real="witnesses",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "changes in steps, because the grid is doubled; it measures agreement between neighbours over "
        "their distance, not quality",
        "student/scales": "11, 21, 41, .., doubled in equal phases",
        "student/grad_norm": "doubles with the grid; where it does so faster than the optimiser forgets, lower beta2",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    sigma_data: Annotated[Positive, "standard deviation of the data, in the boundary coefficients"] = 0.5
    s0: Annotated[Count, "intervals of the grid at the start"] = 10
    s1: Annotated[int, Within(1, grids.MOST_STEPS), "intervals of the grid at the end"] = 1280
    noise_mean: Annotated[float, "mean of the log of the noise levels that training looks at"] = -1.1
    noise_std: Annotated[Positive, "standard deviation of the log of those noise levels"] = 2.0
    second_level: Annotated[Positive, "noise level of the second call of two-step sampling"] = 0.821
    beta2: Annotated[float, Within(0, 1 - 1e-9), "decay of the optimizer's second moment; less for short runs"] = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s1 < self.s0:
            raise ValueError(f"{type(self).__name__}: s1={self.s1} must be at least s0={self.s0}: the grid grows")

    def networks(self, start: Start) -> Networks:
        model = EDMConsistency(start.network("student", on=edm_like(start.teacher.schedule)), self.sigma_data)
        self.plans(model.schedule)
        group = Optimizer(("student",), self.lr, kind="radam", betas=(0.9, self.beta2))
        return Networks({"student": model}, {"student": group}, ema=("student",))

    def scales(self, progress: Progress) -> int:
        """``N(k) = min(s0 2^floor(k / K'), s1) + 1``, ``K' = K / (log2 floor(s1 / s0) + 1)``: times of the grid."""
        phases = math.log2(self.s1 // self.s0) + 1
        return min(self.s0 * 2 ** int(progress.fraction * phases), self.s1) + 1

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        grid = grids.karras(schedule, self.scales(progress) - 1)
        share = interval_probabilities(grid, self.noise_mean, self.noise_std).cumsum(0).to(batch.x.device)
        n = torch.searchsorted(share, rng.uniform(len(batch.x)), right=True).clamp_max(len(share) - 1)
        grid = grid.to(batch.x.device)
        t, s = grid[n], grid[n + 1]
        z = rng.normal_like(batch.x)
        x_t, x_s = schedule.add_noise(batch.x, z, t), schedule.add_noise(batch.x, z, s)
        d = consistency_loss(nets.student, nets.student, batch, x_t, x_s, t, s, pseudo_huber)
        yield Update("student", (d / (t - s).to(d)).mean(), {"scales": len(grid)})

    def plans(self, schedule: Schedule) -> dict[int, Plan]:
        """One call, and two."""
        top, second = schedule.t_max, self.second_level
        if not schedule.t_min < second < top:
            raise ValueError(
                f"{type(self).__name__}: second_level={second:g} must lie between {schedule.t_min:g} and {top:g}, the "
                "model's noise levels"
            )
        return {1: Plan((top,)), 2: Plan((top, second))}

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, self.plans(nets.student.schedule))
