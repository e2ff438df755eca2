"""Who drops modes: a ring of eight by f-distill under every divergence, from a small student that knows two modes.

    python benchmarks/divergences.py --picture docs/img/f-distill.png

A teacher learns eight equal Gaussians on a circle, a small student two neighbours of them: what it makes in one call
must find the others.  Everything else is equal, and the adversarial term is left out: its discriminator gives the ratio
only.  A row says at how many modes at least half of a fair share of the samples lies, how many samples lie at no mode
(further than three standard deviations from all), the total variation between how often each mode is made and an
eighth, the energy distance to the data, and the largest weight of a sample over the run: means over seeds.  About a
minute of one core a seed.

    python benchmarks/divergences.py --covering docs/img/f-distill-covering.png

draws a Gaussian student of two modes instead, with exact scores and ratios, from the right one on: a few seconds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import get_args

import matplotlib
import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian, Mixture1D, ring
from fewstep.methods.matching.f_distill import FDistill, Name
from fewstep.methods.method import Method
from fewstep.methods.parts.score_matching import TwoScores, by_noise, surrogate, weighted_difference
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import energy_distance
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, train

matplotlib.use("Agg")
from matplotlib import pyplot

SCHEDULE = TrigFlow(sigma_data=1.4)
SD, MODES = 0.2, 8
TWO = Mixture1D(EDM(), torch.ones(2), torch.tensor([-1.5, 1.5]), torch.tensor([0.4, 0.4]))
TITLES: dict[Name, str] = {
    "rkl": "reverse KL (DMD2)", "soft-rkl": "softened reverse KL", "js": "Jensen-Shannon",
    "hellinger": "squared Hellinger", "kl": "forward KL", "jeffreys": "Jeffreys", "neyman": "Neyman",
    "pearson": "Pearson",
}  # fmt: skip


def network(width: int, blocks: int, seed: int) -> NetworkDenoiser:
    """An untrained model of the plane."""
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP((2,), width, blocks), SCHEDULE, TrigPrediction(sigma_data=1.4), (2,))


def trained(method: Method, start: Start, steps: int, batch: int, seed: int) -> Result:
    settings = Settings(Budget(steps), batch, seed=seed, precision="fp32", averages=(Power(0.1),), log_steps=20)
    return train(method, start, settings, None, show=False)


def seen(x: Tensor, means: Tensor) -> tuple[int, float, float]:
    """Modes with half a fair share, the share of samples at no mode, and the total variation of the others' modes."""
    far = torch.cdist(x.double(), means)
    at = far.amin(1) < 3 * SD
    count = torch.bincount(far.argmin(1)[at], minlength=MODES)
    shares = count / count.sum().clamp_min(1)
    modes = int((count / len(x) >= 0.5 / MODES).sum())
    return modes, 1 - float(at.double().mean()), float((shares - 1 / MODES).abs().sum()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=16, help="hidden units of the student (default 16)")
    parser.add_argument("--begun", type=int, default=2, help="modes that the student begins with (default 2)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--names", nargs="+", default=get_args(Name))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--covering", type=Path, help="draw the Gaussian student of two modes only")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.covering:
        draw_covering({name: gaussian_student(name) for name in chosen.names}, chosen.covering)
        return
    world = ring(SCHEDULE, MODES, 2.0, SD)
    x, means = world.sample(8192, Rng(1)).float(), world.means.reshape(MODES, 2)
    data = Dataset("ring", x)
    begun = x[torch.cdist(x.double(), means).argmin(1) < chosen.begun]
    few = Dataset("some modes", begun)
    teacher = trained(Denoising(lr=4e-3, warmup=20), Start(network(64, 2, 0), data), 800, 256, 0).model
    first = {
        seed: trained(Denoising(lr=4e-3, warmup=20), Start(network(chosen.width, 2, seed), few), 300, 256, seed).model
        for seed in chosen.seeds
    }
    shown: dict[Name, Tensor] = {}
    print(
        "| divergence | modes | at no mode | total variation | energy distance | largest weight |\n|---|" + "---:|" * 5
    )
    for name in chosen.names:
        rows = []
        for seed in chosen.seeds:
            method = FDistill(divergence=name, gan_weight=0.0, critic_steps=2, lr=2e-3, critic_lr=4e-3)
            start = Start(teacher, data, seed, given={"student": first[seed]})
            made = trained(method, start, chosen.steps, 128, seed)
            samples = made.model.sample(4000, seed=7)
            shown.setdefault(name, samples)
            largest = max(record["student/weight_max"] for record in made.records)
            rows.append((*seen(samples, means), energy_distance(samples, x[:4000]), largest))
        modes, none, tv, energy, weight = (statistics.fmean(column) for column in zip(*rows, strict=True))
        print(f"| {TITLES[name]} | {modes:.1f} | {none:.0%} | {tv:.2f} | {energy:.3f} | {weight:.1f} |", flush=True)
    if chosen.picture:
        draw(shown, means, chosen.picture)


def gaussian_student(name: Name, steps: int = 150, n: int = 128) -> tuple[float, float]:
    """The mean and the spread of ``b + a z`` after ``steps`` updates by the weighted difference of exact scores."""
    parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.6)]
    optimiser = torch.optim.Adam(parameters, betas=(0.0, 0.99))
    method, levels = FDistill(divergence=name), torch.ones(10, dtype=torch.float64)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        b, a = parameters
        rng = Rng(0, step)
        x = b + a * rng.normal(n, 1, dtype=torch.float64)
        critic = Gaussian(TWO.schedule, b.detach()[None], float(a.detach()) ** 2)
        t = Own(0.02, 0.3).draw(TWO.schedule, n, rng)  # up to where noise would join the modes
        x_t = TWO.schedule.add_noise(x.detach(), rng.normal_like(x), t)
        asked = method.weights(TWO.log_density(x_t, t) - critic.log_density(x_t, t), t, TWO.schedule, levels)
        question = next(asked)
        try:
            while True:
                question = asked.send(question.value)
        except StopIteration as answer:
            weight = answer.value[0]
        found = TwoScores(x.detach(), x_t, t, TWO(x_t, t), critic(x_t, t), TWO.schedule)
        optimiser.zero_grad()
        surrogate(x, weighted_difference(found, lambda scores, w=weight: by_noise(scores) * w)).backward()
        optimiser.step()
    return float(parameters[0].detach()), float(parameters[1].detach())


def draw_covering(found: dict[Name, tuple[float, float]], path: Path) -> None:
    """The law of the data and, in a panel for each divergence, that of its student."""
    figure, axes = pyplot.subplots(2, 4, figsize=(7.2, 2.6), layout="constrained", sharey=True)
    x = torch.linspace(-4, 4, 400, dtype=torch.float64)
    law = TWO.log_density(x[:, None], 0.0).exp()
    for ax, (name, (b, a)) in zip(axes.flat, found.items(), strict=True):
        left = float(torch.special.ndtr(torch.tensor(-b / abs(a))))
        print(f"{TITLES[name]}: mean {b:.2f}, spread {abs(a):.2f}, {left:.2f} on the left")
        ax.fill_between(x, law, color="0.85", lw=0)
        ax.plot(x, torch.distributions.Normal(b, abs(a)).log_prob(x).exp(), color="tab:blue", lw=1.2)
        ax.set(xticks=[], yticks=[], ylim=(0, 1.1))
        ax.set_title(f"{TITLES[name]}: {left:.0%} on the left", fontsize=6.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw(shown: dict[Name, Tensor], means: Tensor, path: Path) -> None:
    """A panel for each divergence: the modes as circles, samples as points."""
    figure, axes = pyplot.subplots(2, 4, figsize=(7.2, 3.9), layout="constrained")
    for ax, (name, x) in zip(axes.flat, shown.items(), strict=True):
        ax.scatter(*x[:1500].T, s=1.2, lw=0, alpha=0.5, color="tab:blue")
        for mean in means.tolist():
            ax.add_patch(pyplot.Circle(mean, 3 * SD, fill=False, lw=0.6, color="0.5"))
        ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        ax.set_title(f"{TITLES[name]}: {seen(x, means)[0]} of {MODES}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
