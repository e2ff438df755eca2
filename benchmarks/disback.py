"""DisBack on a ring whose student starts far away: how near it is after so many updates, with a path and without.

    python benchmarks/disback.py [--picture docs/img/disback.png] [--seeds 0 1 2 3]

The teacher is a small network that has learned eight Gaussians on a circle; the student is its copy, moved aside by
three standard deviations of the data.  The host is DMD2 without a GAN and with one critic update for each of the
student's.  The picture shows both students after some of their updates, and the energy distance over all of them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import ring
from fewstep.methods.matching.disback import Backtracking, DegradationRecording, Host
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Method
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import energy_distance
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings
from fewstep.training.trainer import Run, train

matplotlib.use("Agg")
from matplotlib import pyplot

SIGMA, UPDATES, EVERY, BATCH = 1.4, 240, 10, 128
HOST = Host(DMD2(gan_weight=0.0, critic_steps=1, lr=2e-3, critic_lr=4e-3))
NODES, RECORDING, BACK = 3, 15, 0.15
LEVELS = (0.5, 0.2, 0.1)


def settings(steps: int, seed: int = 0, batch: int = BATCH) -> Settings:
    return Settings(Budget(steps), batch, seed=seed, precision="fp32", averages=())


def course(method: Method, start: Start, seed: int) -> list[Tensor]:
    """Samples of the student after every ``EVERY`` of its updates, the same noise in all."""
    run, found = Run(method, method.networks(start), settings(UPDATES, seed), Parallel()), []
    noise = Rng(2).normal(2048, 2)
    for step in range(UPDATES + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                found.append(method.student(run.nets)(noise))
        if step < UPDATES:
            run.step(start.data)
    return found


def with_path(start: Start, seed: int) -> list[Tensor]:
    made = train(DegradationRecording(HOST, NODES), start, settings(RECORDING, seed + 100), show=False).made
    return course(Backtracking(HOST, BACK), dataclasses.replace(start, made=made), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = ring(TrigFlow(sigma_data=SIGMA))
    x, held_out = (world.sample(n, Rng(seed)).float() for n, seed in ((4096, 1), (2048, 9)))
    net = NetworkDenoiser(MLP((2,), 64, 2), world.schedule, TrigPrediction(sigma_data=SIGMA), (2,))
    data = Dataset("ring", x)
    teacher = train(Denoising(lr=4e-3, warmup=20), Start(net, data), settings(600, batch=256), show=False).model
    far = copy.deepcopy(teacher)
    with torch.no_grad():  # the data prediction out of pure noise is -sigma_data times this
        far.net.leave.bias[0] -= 3 * x[:, 0].std() / SIGMA
    start = Start(teacher, data, given={"student": far})

    runs = {"DMD2": [course(HOST.method, start, seed) for seed in chosen.seeds]}
    runs["DisBack around it"] = [with_path(start, seed) for seed in chosen.seeds]
    distances = {
        name: [[energy_distance(y, held_out) for y in samples] for samples in found] for name, found in runs.items()
    }
    print("| | updates to " + ", ".join(map(str, LEVELS)) + " (median) | mean distance |\n|---|---|---:|")
    for name, curves in distances.items():
        told = [median_updates(curves, level) for level in LEVELS]
        print(f"| {name} | {', '.join(told)} | {statistics.mean(map(statistics.mean, curves)):.2f} |")
    if chosen.picture:
        draw(runs, distances, held_out, chosen.picture)


def median_updates(curves: list[list[float]], level: float) -> str:
    """After how many updates the distance is below a level for the first time, by the median seed."""
    first = [next((EVERY * k for k, d in enumerate(curve) if d < level), None) for curve in curves]
    reached = sorted(UPDATES + 1 if k is None else k for k in first)
    middle = statistics.median_high(reached)
    return f"{middle}" if middle <= UPDATES else f"more than {UPDATES}"


def draw(
    runs: dict[str, list[list[Tensor]]], distances: dict[str, list[list[float]]], data: Tensor, path: Path
) -> None:
    """Samples after 60 and 120 updates, and the curves of all seeds with their medians."""
    figure, axes = pyplot.subplots(1, 3, figsize=(8.4, 2.7), layout="constrained", width_ratios=(1, 1, 1.5))
    colours = dict(zip(runs, ("#c0504d", "#2f6fb0"), strict=True))
    for ax, at in zip(axes, (60, 120), strict=False):
        ax.plot(*data[:800].T, ".", ms=1.5, color="0.8")
        for name, found in runs.items():
            ax.plot(*found[0][at // EVERY][:800].T, ".", ms=1.5, color=colours[name])
        ax.set(xlim=(-4, 6), ylim=(-4, 4), xticks=[], yticks=[], title=f"after {at} updates")
        ax.set_aspect("equal")
    steps = [EVERY * k for k in range(UPDATES // EVERY + 1)]
    for name, curves in distances.items():
        for curve in curves:
            axes[2].plot(steps, curve, lw=0.6, alpha=0.5, color=colours[name])
        axes[2].plot(steps, torch.tensor(curves).quantile(0.5, 0), lw=2, color=colours[name], label=name)
    axes[2].set(yscale="log", xlabel="updates of the student", ylabel="energy distance")
    axes[2].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    from PIL import Image

    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
