"""MSD on a plane of eight classes: how near tiny students are to their teacher, by how many of them there are.

    python benchmarks/msd.py [--picture docs/img/msd.png] [--parts 1 2 4 8] [--updates 400]

Every class is three Gaussians along an arc; the teacher is a network that has learned them, the students are networks
of 16 units, whatever their number, and each has the same number of updates: a quarter of teacher score matching, the
rest DMD with pairs.  A row is the distance between histograms of the students' samples and the teacher's, half the sum
of absolute differences; parts are blocks of neighbouring classes, or random ones of the same sizes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import GaussianMixture
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.msd import MSD
from fewstep.methods.parts.host import Host
from fewstep.methods.parts.stores import solve_heun
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

matplotlib.use("Agg")
from matplotlib import pyplot

CLASSES, SIGMA, BATCH, SIDE, N = 8, 1.4, 128, 16, 8192
DM = Host(DMD(pairs=4096, ode_steps=8, lr=3e-3, critic_lr=4e-3))


def world() -> GaussianMixture:
    """Three modes a class on arcs of radius 1, 1.9 and 2.8."""
    angle = torch.arange(3 * CLASSES, dtype=torch.float64) * (2 * math.pi / (3 * CLASSES))
    radius = 1 + 0.9 * torch.tensor([(k + k // 3) % 3 for k in range(3 * CLASSES)], dtype=torch.float64)
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    labels = [k // 3 for k in range(3 * CLASSES)]
    return GaussianMixture(TrigFlow(sigma_data=SIGMA), torch.ones(len(means)), means, torch.full((len(means),), 0.04),
                           labels)  # fmt: skip


def network(width: int, blocks: int, seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    net = MLP((2,), width, blocks, CLASSES)
    return NetworkDenoiser(net, TrigFlow(sigma_data=SIGMA), TrigPrediction(sigma_data=SIGMA), (2,), CLASSES)


def histogram(x: Tensor, labels: Tensor) -> Tensor:
    """Shares of the samples in ``SIDE x SIDE`` cells, class by class."""
    cell = ((x.double() + 3.6) / 7.2 * SIDE).long().clamp(0, SIDE - 1)
    place = (labels * SIDE + cell[:, 0]) * SIDE + cell[:, 1]
    return torch.bincount(place, minlength=CLASSES * SIDE * SIDE).double() / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--updates", type=int, default=300, help="of every student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    labels = torch.arange(N) % CLASSES
    data = Dataset("arcs", world().sample(N, Rng(1), labels).float(), labels, tuple("abcdefgh"))
    settings = Settings(Budget(800), 256, precision="fp32")
    teacher = train(Denoising(lr=4e-3, warmup=20), Start(network(64, 2, 0), data), settings, show=False).model
    noise = Rng(3).normal(2, N, 2)
    made = {"teacher": solve_heun(teacher, noise[0], 18, labels)}
    target, again = histogram(made["teacher"], labels), solve_heun(teacher, noise[1], 18, labels)
    print("| parts | by | distance of each seed |\n|---:|---|---|")
    print(f"| teacher | again | {distance(again, labels, target):.3f} |", flush=True)
    figures: dict[str, dict[int, list[float]]] = {"classes": {}, "random": {}}
    for parts in chosen.parts:
        for by in ("classes", "random") if 1 < parts < CLASSES else ("classes",):
            found = []
            for seed in chosen.seeds:
                recipe = MSD(parts=parts, by=by, parts_seed=seed, tsm=0.25, adm=0.0, dm=DM, tsm_lr=4e-3)  # type: ignore[arg-type]
                here = Settings(Budget(parts * chosen.updates), BATCH, seed=seed, precision="fp32")
                run = run_recipe(recipe, teacher, data, here, given={"student": network(16, 1, seed)}, show=False)
                x = run.model.sample(N, labels, seed=9)  # type: ignore[operator]
                found.append(distance(x, labels, target))
                if by == "classes":
                    made.setdefault(f"{parts} student{'s' * (parts > 1)}", x)
            figures[by][parts] = found
            print(f"| {parts} | {by} | {', '.join(f'{d:.3f}' for d in found)} |", flush=True)
    if chosen.picture:
        draw(made, labels, figures, chosen.picture)


def distance(x: Tensor, labels: Tensor, target: Tensor) -> float:
    return float((histogram(x, labels) - target).abs().sum()) / 2


def draw(made: dict[str, Tensor], labels: Tensor, figures: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Samples of the teacher and of all numbers of students, coloured by class, and the distances."""
    figure, axes = pyplot.subplots(1, len(made) + 1, figsize=(1.55 * len(made) + 2.2, 1.9), layout="constrained",
                                   width_ratios=[1] * len(made) + [1.4])  # fmt: skip
    for ax, (name, x) in zip(axes, made.items(), strict=False):
        ax.scatter(*x[:1200].T, s=0.6, c=labels[:1200], cmap="tab10", vmax=9)
        ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[])
        ax.set_title(name, fontsize=8)
        ax.set_aspect("equal")
    for (by, rows), style in zip(figures.items(), ("o-", "s--"), strict=True):
        axes[-1].plot(list(rows), [sum(v) / len(v) for v in rows.values()], style, ms=4, label=by)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(list(figures["classes"]), list(figures["classes"]))
    axes[-1].tick_params(labelsize=7)
    axes[-1].set_title("distance from the teacher", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    from PIL import Image

    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
