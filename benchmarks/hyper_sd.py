"""Stages of 8, 4, 2 and 1 segments against one segment from the start, on a law whose one-step map is known.

    python benchmarks/hyper_sd.py [--seeds 0 1 2] [--steps 1200] [--told] [--picture docs/img/hyper-sd.png]

The law is a one-dimensional mixture, whose exact map from noise to data is that of quantiles.  Both students start from
one small network that was fitted to its denoiser, and have the same number of steps in all.  Rows are the root mean
square difference to the exact map, over quantiles of the noise, in 1, 2, 4 and 8 calls.  The picture shows the maps of
one call and of four.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import three_modes
from fewstep.methods.consistency.hyper_sd import HyperSD
from fewstep.methods.consistency.tscd import SegmentConsistency
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import Student
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

matplotlib.use("Agg")
from matplotlib import pyplot

STAGES = (8, 4, 2, 1)
SCHEDULE = TrigFlow(sigma_data=1.0, t_max=1.55)
WORLD = three_modes(SCHEDULE)


def fitted(seed: int, steps: int = 1500) -> NetworkDenoiser:
    """A small network, fitted to the exact denoiser."""
    torch.manual_seed(seed)
    model = NetworkDenoiser(MLP((1,), 64, 2), SCHEDULE, TrigPrediction(sigma_data=1.0), (1,))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = Rng(seed, "fit")
    for _ in range(steps):
        x, t = WORLD.sample(256, rng), rng.uniform(256, high=SCHEDULE.t_max)
        x_t = SCHEDULE.add_noise(x, rng.normal_like(x), t)
        loss = (model.velocity(x_t.float(), t) - WORLD.velocity(x_t, t).float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return model.eval()


def quantiles(n: int = 400) -> tuple[Tensor, Tensor]:
    """Noise at the quantiles of a standard normal law, and where the exact map takes it."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = torch.special.ndtri(u)[:, None]
    start = SCHEDULE.prior(z)
    return z, WORLD.flow(start, SCHEDULE.t_max, SCHEDULE.t_min)


@torch.no_grad()
def mapped(student: Student, calls: int) -> Tensor:
    return student(quantiles()[0].float(), steps=calls).double()


def error(student: Student, calls: int) -> float:
    return float((mapped(student, calls) - quantiles()[1]).square().mean().sqrt())


def trained(recipe: HyperSD | SegmentConsistency, start: NetworkDenoiser, steps: int, seed: int) -> Student:
    data = Dataset("modes", WORLD.sample(8192, Rng(seed, "data")).float())
    settings = Settings(Budget(steps), batch=128, seed=seed, precision="fp32")
    found: Student = run_recipe(recipe, start, data, settings, show=False).model
    return found


def recipe(segments: tuple[int, ...], told: bool) -> HyperSD:
    """TSCD alone, by the distance alone, with a network that is told the target time or not."""
    n = len(segments)
    return HyperSD(
        segments=segments,
        distance_weights=(1.0,) * n,
        adversarial_weights=(0.0,) * n,
        one_step_share=0.0,
        lr=1e-3,
        mu=0.8,
        eta=(0.0,),
        target_time=told,
    )


def compare(seed: int, steps: int, told: bool) -> dict[str, Student]:
    """The students of one seed by name."""
    start = fitted(seed)
    return {
        name: trained(recipe(stages, told), start, steps, seed) for name, stages in (("8-4-2-1", STAGES), ("1", (1,)))
    }


def draw(found: dict[str, Student], picture: Path) -> None:
    z, end = (part[:, 0] for part in quantiles())
    figure, axes = pyplot.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
    for axis, calls in zip(axes, (1, 4), strict=True):
        axis.plot(z, end, color="#999999", lw=4, label="exact map")
        for (name, student), color in zip(found.items(), ("#1f5fbf", "#d2691e"), strict=True):
            axis.plot(z, mapped(student, calls)[:, 0], color=color, lw=1.4, label=f"stages {name}")
        axis.set(xlabel="noise", title=f"{calls} call{'s' * (calls > 1)}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("sample")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=110)
    shrink(picture)


def shrink(picture: Path) -> None:
    """Sixty-four colours are enough."""
    from PIL import Image

    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="of all stages together")
    parser.add_argument("--told", action="store_true", help="tell the networks the target time, as CTM does")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[tuple[str, int], list[float]] = {}
    for seed in chosen.seeds:
        found = compare(seed, chosen.steps, chosen.told)
        for name, student in found.items():
            for calls in student.plans:
                errors.setdefault((name, calls), []).append(error(student, calls))
        if chosen.picture and seed == chosen.seeds[0]:
            draw(found, chosen.picture)
    for (name, calls), each in errors.items():
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        print(
            f"stages {name:8} {calls} calls  {statistics.mean(each):.4f} +- {spread:.4f}  {[round(e, 4) for e in each]}"
        )


if __name__ == "__main__":
    main()
