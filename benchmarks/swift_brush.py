"""The picture of SwiftBrush's page: a generator of two modes under a critic of its own samples, and under none.

    python benchmarks/swift_brush.py --out docs/img/swift-brush.png

The teacher is a mixture on the line, known exactly.  A generator ``x = f(z)`` moves along ``sigma alpha (D_critic -
D_teacher)``: with the exact score of its own samples (variational score distillation, the average over them as a kernel
estimate) and with the drawn noise in the critic's place (score distillation sampling).  About ten seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep.exact import FiniteData, GaussianMixture
from fewstep.methods.parts.distribution_matching import IN_THE_MIDDLE
from fewstep.methods.parts.score_matching import TwoScores, by_noise, weighted_difference
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching

matplotlib.use("Agg")
from matplotlib import pyplot

STEPS, RATE = 800, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/img/swift-brush.png"))
    chosen = parser.parse_args()
    schedule = FlowMatching()
    means, variances = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0.04, 0.04]).double()
    teacher = GaussianMixture(schedule, torch.tensor([0.5, 0.5]).double(), means, variances)
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    for axes, own, title in ((panels[0], True, "critic of its own samples"), (panels[1], False, "the drawn noise")):
        course = trained(teacher, own)
        axes.plot(torch.arange(0, STEPS + 1, 20), course, color="tab:blue", lw=0.4, alpha=0.5)
        for mean in (-1.0, 1.0):
            axes.axhspan(mean - 0.2, mean + 0.2, color="tab:orange", alpha=0.25, lw=0)
        axes.set(title=title, xlabel="iteration", ylim=(-2, 2))
    panels[0].set(ylabel="samples; the teacher's modes")
    figure.savefig(chosen.out, dpi=110)


def trained(teacher: GaussianMixture, own: bool, n: int = 128) -> Tensor:
    """The samples of a generator that is free in every sample, as they move."""
    schedule = teacher.schedule
    x = 0.5 * torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]
    course = [x[:, 0].clone()]
    for step in range(STEPS):
        g = torch.zeros_like(x)
        for k in range(8):
            rng = Rng(step, k)
            t = IN_THE_MIDDLE.draw(schedule, n, rng)
            x_t = schedule.add_noise(x, rng.normal_like(x), t)
            fake = FiniteData(schedule, x)(x_t, t) if own else x
            g += weighted_difference(TwoScores(x, x_t, t, teacher(x_t, t), fake, schedule), by_noise) / 8
        x = x - RATE * (1 - step / STEPS) * g
        if step % 20 == 19:
            course.append(x[:, 0].clone())
    return torch.stack(course)


if __name__ == "__main__":
    main()
