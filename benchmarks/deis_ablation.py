"""The four ingredients of DEIS, switched on one after the other: error against network calls.

    python benchmarks/deis_ablation.py [--picture docs/img/deis.png]

1. Euler on the probability flow in time, uniform steps;
2. + the exponential integrator, with the score held fixed over a step;
3. + the noise prediction held fixed instead of the score (DDIM);
4. + a polynomial of degree 3 through the last noise predictions (tAB3);
5. + steps that are uniform in sqrt(t).

On the exact mixture of eight Gaussians in the plane and on the digits teacher, both on the linear VP schedule; the
error of a sample is its root mean square deviation from the exact flow (for the teacher: 200 calls of UniPC-3 to the
same time).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep import api, grids
from fewstep.denoisers import Cond, Denoiser
from fewstep.exact import ring
from fewstep.grids import Grid
from fewstep.sampling import SOLVERS, TAB, ScoreExponential, Solver, UniPC, balanced, solve
from fewstep.sampling.search import noise_for
from fewstep.schedules import VPLinear

matplotlib.use("agg")

CALLS = (5, 7, 10, 15, 20, 30, 50, 100)
STAGES: dict[str, tuple[Solver, Grid]] = {
    "Euler": (SOLVERS["euler"](), grids.uniform),
    "+ exponential integrator": (ScoreExponential(), grids.uniform),
    "+ noise prediction (DDIM)": (SOLVERS["ddim"](), grids.uniform),
    "+ polynomial (tAB3)": (TAB(degree=3), grids.uniform),
    "+ time grid": (TAB(degree=3), grids.power),
}


def errors(model: Denoiser, x: Tensor, cond: Cond) -> dict[str, list[float]]:
    """The mean error of every stage at every number of calls."""
    schedule = model.schedule
    x = schedule.prior(x)
    times = balanced(schedule, 201)[:-1]
    times[-1] = schedule.t_min
    exact = solve(model, x, times, UniPC(p=3, lower_order_final=False), cond)
    found: dict[str, list[float]] = {}
    for name, (solver, grid) in STAGES.items():
        for calls in CALLS:
            gap = (solve(model, x, grid(schedule, calls), solver, cond) - exact).flatten(1)
            found.setdefault(name, []).append(float(gap.square().mean(1).sqrt().mean()))
    return found


@torch.no_grad()
def main() -> None:
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--n", type=int, default=200, help="starting points")
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule = VPLinear(t_min=1e-3)
    models: dict[str, tuple[Denoiser, Cond]] = {
        "ring of eight Gaussians": (ring(schedule), None),
        "digits teacher": (api.load("digits").on(schedule), torch.arange(args.n) % 10),
    }
    fig, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), layout="constrained")
    for axis, (title, (model, cond)) in zip(axes, models.items(), strict=True):
        found = errors(model, noise_for(model, args.n, 0), cond)
        print(f"\n{title}\n| | " + " | ".join(map(str, CALLS)) + " |\n|---|" + "---:|" * len(CALLS))
        for name, row in found.items():
            print(f"| {name} | " + " | ".join(f"{e:.2g}" for e in row) + " |")
            axis.loglog(CALLS, row, marker="o", ms=3, label=name)
        axis.set_title(title)
        axis.set_xlabel("network calls")
        axis.set_xticks(CALLS, [str(c) for c in CALLS])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("error")
    axes[0].legend(fontsize=8)
    if args.picture:
        fig.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
