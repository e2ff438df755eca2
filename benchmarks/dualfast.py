"""DualFast's two errors told apart, for every stretch of the trajectory, and what the mixed prediction does to each.

    python benchmarks/dualfast.py [--picture docs/img/dualfast.png]

For data ``x_0`` and noise ``eps`` the state at time s is ``x_s = alpha_s x_0 + sigma_s eps``.  Over a stretch s -> t

    A = alpha_t x_0 + sigma_t eps           the transition that the pair itself makes
    B = the network's own flow from x_s     (50 steps of UniPC-3)
    C = one step of the solver from x_s

    approximation error MSE(B, A),   total MSE(C, A),   discretisation MSE(C, B)

The network only knows the mean over all pairs that pass through x_s, so MSE(B, A) counts that spread too, and does not
vanish for an exact network.  A second table runs whole trajectories of the solver and of the solver with the mixed
prediction, on exact and on biased teachers, against the true flow.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep import api, grids
from fewstep.data import load as load_data
from fewstep.denoisers import Cond, Denoiser
from fewstep.exact import Mixture1D, three_modes
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, TAB, DPMSolverPP2M, DualFast, Multistep, UniPC, solve
from fewstep.schedules import Schedule, VPLinear

matplotlib.use("agg")

BASES: dict[str, Multistep] = {"DDIM": DDIM(), "DPM-Solver++ 2M": DPMSolverPP2M(), "DEIS tAB2": TAB(degree=2)}


def mean_square(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


def two_errors(model: Denoiser, x0: Tensor, eps: Tensor, cond: Cond, stretches: int) -> list[tuple[float, ...]]:
    """``(noise level at the start, approximation, discretisation, total)`` of one DDIM step over every stretch."""
    schedule = model.schedule
    times = grids.log_snr(schedule, stretches)
    rows = []
    for s, t in pairwise(times):
        batch = torch.ones(len(x0), dtype=torch.float64)
        start, a = schedule.add_noise(x0, eps, s * batch), schedule.add_noise(x0, eps, t * batch)
        lam = torch.lerp(*schedule.log_snr(torch.stack([s, t])), torch.linspace(0, 1, 51, dtype=torch.float64))
        fine = schedule.time_at(lam)
        fine[0], fine[-1] = s, t
        b = solve(model, start, fine, UniPC(p=3, lower_order_final=False), cond)
        c = solve(model, start, torch.stack([s, t]), DDIM(), cond)
        rows.append((float(schedule.ratio(s)), mean_square(b, a), mean_square(c, b), mean_square(c, a)))
    return rows


def teachers() -> dict[str, Denoiser]:
    """The exact mixture, and two that are wrong: too smooth, like a network that is too small, and too sharp."""
    world = three_modes()

    def like(stretch: float, shift: float) -> Mixture1D:
        means, sds = torch.tensor([-1.2, 0.3, 1.5]), torch.tensor([0.3, 0.35, 0.3])
        means = means + shift * torch.tensor([-1.0, 0.0, 1.0])
        return Mixture1D(world.schedule, torch.tensor([0.3, 0.5, 0.2]), means.double(), (sds * stretch).double())

    return {"exact": world, "too smooth": like(1.3, -0.1), "too sharp": like(0.8, 0.05)}


def trajectories(steps: int, weights: tuple[float, ...]) -> None:
    """The error against the *true* flow of whole trajectories, by base, teacher and weight (previous prediction)."""
    world = three_modes()
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    x, times = torch.special.ndtri(u)[:, None], grids.log_snr(world.schedule, steps)
    exact = world.flow(x, float(times[0]), float(times[-1]))
    print(f"\n{steps} steps, root mean square error against the true flow, weight c of the previous prediction")
    print("| base | teacher | " + " | ".join(f"{c:g}" for c in weights) + " |\n|---|---|" + "---:|" * len(weights))
    for base_name, base in BASES.items():
        for name, teacher in teachers().items():
            found = [mean_square(solve(teacher, x, times, DualFast(base, weight=c)), exact) ** 0.5 for c in weights]
            print(f"| {base_name} | {name} | " + " | ".join(f"{e:.4f}" for e in found) + " |")


@torch.no_grad()
def main() -> None:
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--stretches", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule: Schedule = VPLinear(t_min=1e-3)
    data = load_data("digits")
    cond = None if data.labels is None else data.labels[:256]
    world, rng = three_modes(), Rng(0)
    cases: dict[str, tuple[Denoiser, Tensor, Cond]] = {
        "exact mixture": (world, world.sample(2000, rng), None),
        "digits teacher": (api.load("digits").on(schedule), data.read(slice(256)), cond),
    }
    fig, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4), layout="constrained")
    for axis, (title, (model, x0, labels)) in zip(axes, cases.items(), strict=True):
        rows = two_errors(model, x0, rng.normal_like(x0), labels, args.stretches)
        print(f"\n{title}, {args.stretches} stretches of equal length in lambda, DDIM")
        print("| from sigma/alpha | approximation | discretisation | total |\n|---:|---:|---:|---:|")
        for level, approximation, discretisation, total in rows:
            print(f"| {level:.3g} | {approximation:.2g} | {discretisation:.2g} | {total:.2g} |")
        levels = [row[0] for row in rows]
        for i, name in enumerate(("approximation", "discretisation", "total"), start=1):
            style = "--" if name == "total" else "-"  # the total lies on the approximation error
            axis.loglog(levels, [row[i] for row in rows], style, marker="o", ms=3, label=name)
        axis.set_title(title)
        axis.set_xlabel("noise level sigma / alpha at the start of the stretch")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("mean square error of one DDIM step")
    axes[0].legend()
    for steps in (5, 10, 20):
        trajectories(steps, (-0.2, -0.1, 0.0, 0.1, 0.3, 0.5, 0.65, 0.8))
    if args.picture:
        fig.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
