"""Who drops modes: a ring of eight by f-distill under every divergence, from a small student that knows two modes.

    python benchmarks/divergences.py --picture docs/img/f-distill.png

A teacher learns eight equal Gaussians on a circle, a small student two neighbours of them: what it makes in one call
must find the others.  Everything else is equal, and the adversarial term is left out: its discriminator gives the ratio
only.  A row says at how many modes at least half of a fair share of the samples lies, how many samples lie at no mode
(further than three standard deviations from all), the total variation between how often each mode is made and an
eighth, the energy distance to the data, and the largest weight of a sample over the run: means over seeds.  About a
minute of one core a seed.
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
from fewstep.exact import ring
from fewstep.methods.matching.f_distill import FDistill, Name
from fewstep.methods.method import Method
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import energy_distance
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, train

matplotlib.use("Agg")
from matplotlib import pyplot

SCHEDULE = TrigFlow(sigma_data=1.4)
SD, MODES = 0.2, 8
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
    chosen = parser.parse_args()
    torch.set_num_threads(1)
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
