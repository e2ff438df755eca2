"""DPM-Solver-v3 against DPM-Solver++ and UniPC: distance to the exact solution at few calls.

    python benchmarks/dpm_solver_v3.py digits --picture docs/img/dpm-solver-v3.png
    python benchmarks/dpm_solver_v3.py digits --guidance 4
    python benchmarks/dpm_solver_v3.py digits --sizes

All solvers start from the same noise, on the same grid (the library's default, "balanced" with centre 1); the error is
the mean square distance of a pixel (in [-1, 1]) to 200 steps of UniPC.  A seed draws the data that the statistics are
estimated from, the noise of the estimate and the noise of the samples.
"""

from __future__ import annotations

import argparse
import statistics as stats
import time
from pathlib import Path

import torch
from torch import Tensor

from fewstep import api
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser
from fewstep.guidance import Guided
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, DPMSolverPP2M, DPMSolverPP3M, Solver, UniPC, sample
from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3, Statistics, statistics_grid
from fewstep.sampling.solvers.model_statistics import estimate

REFERENCE_STEPS = 200
BASE: dict[str, Solver] = {
    "DDIM": DDIM(),
    "DPM-Solver++ 2M": DPMSolverPP2M(),
    "DPM-Solver++ 3M": DPMSolverPP3M(),
    "UniPC-2": UniPC(),
    "UniPC-3": UniPC(p=3),
}


def variants(made: Statistics) -> dict[str, Solver]:
    constant = Statistics.data_prediction(made.log_snr, made.shape)
    return {
        "default solver, constant statistics (l = 1)": DPMSolverV3(constant),
        "v3, order 1": DPMSolverV3(made, 1, "off"),
        "v3, order 2": DPMSolverV3(made, 2, "off"),
        "v3, order 2, corrector": DPMSolverV3(made, 2, "on", pseudo_corrector=False),
        "v3, order 2, pseudo corrector (default)": DPMSolverV3(made),
        "v3, order 3, corrector": DPMSolverV3(made, 3, "on", pseudo_corrector=False),
        "v3, order 3, pseudo corrector": DPMSolverV3(made, 3),
        "v3, default, half corrector": DPMSolverV3(made, corrector="half"),
        "v3, default, first-half corrector": DPMSolverV3(made, corrector="first-half"),
    }


def estimated(
    model: Denoiser, data: Dataset, grid: int, samples: int, seed: int, half_window: int = 0
) -> tuple[Statistics, float]:
    """The statistics and how long they took."""
    rows = Rng(seed, "data").shuffled(len(data))[:samples]
    labels = data.labels[rows] if model.classes and data.labels is not None else None
    levels = statistics_grid(model.schedule, grid)
    start = time.perf_counter()
    made = estimate(
        model, data.read(rows), Rng(seed, "noise"), cond=labels, log_snr=levels, batch=256, half_window=half_window
    )
    return made, time.perf_counter() - start


class Distances:
    """Mean square distances to the reference from one set of noise."""

    def __init__(self, model: Denoiser, n: int, seed: int) -> None:
        self.model, self.n, self.seed = model, n, seed
        self.reference = self.drawn(UniPC(), REFERENCE_STEPS)

    def drawn(self, solver: Solver, steps: int) -> Tensor:
        return sample(self.model, self.n, solver=solver, steps=steps, seed=self.seed)

    def __call__(self, solver: Solver, steps: int) -> float:
        return float((self.drawn(solver, steps) - self.reference).square().mean())


def table(title: str, found: dict[str, list[list[float]]], steps: list[int]) -> None:
    """Rows of (mean and spread over seeds) in units of 1e-4."""
    print(f"\n{title}\n\n| solver | {' | '.join(f'{k} calls' for k in steps)} |\n|---|{'---:|' * len(steps)}")
    for name, seeds in found.items():
        columns = zip(*seeds, strict=True)
        print(f"| {name} | {' | '.join(cell([1e4 * v for v in column]) for column in columns)} |")


def cell(values: tuple[float, ...] | list[float]) -> str:
    mean = stats.fmean(values)
    digits = 1 if mean >= 10 else 2
    spread = f" ± {stats.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="a bundled teacher (default digits)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 6, 7, 8, 10, 15])
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--grid", type=int, default=120)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--n", type=int, default=200, help="pictures of each (default 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", action="store_true", help="how much the number of levels and of samples matter")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    plain, data = api.load(chosen.model), load_data(chosen.model)
    model = plain if chosen.guidance is None else Guided(plain, chosen.guidance)
    if chosen.sizes:
        sizes(model, data, chosen)
        return
    found: dict[str, list[list[float]]] = {}
    seconds = []
    made: Statistics | None = None
    for seed in chosen.seeds:
        made, cost = estimated(model, data, chosen.grid, chosen.samples, seed)
        seconds.append(cost)
        distance = Distances(model, chosen.n, seed)
        for name, solver in (BASE | variants(made)).items():
            found.setdefault(name, []).append([distance(solver, k) for k in chosen.steps])
    w = 1 if chosen.guidance is None else chosen.guidance
    table(
        f"{chosen.model}, guidance {w:g}: mean square distance to the reference in 1e-4, {chosen.n} pictures, "
        f"{len(chosen.seeds)} seeds; statistics at {chosen.grid + 1} levels from {chosen.samples} samples in "
        f"{stats.fmean(seconds):.0f} s",
        found,
        chosen.steps,
    )
    if chosen.picture:
        assert made is not None
        picture(made, {k: [stats.fmean(c) for c in zip(*v, strict=True)] for k, v in found.items()}, chosen)


def sizes(model: Denoiser, data: Dataset, chosen: argparse.Namespace) -> None:
    """The default solver with coarser grids and fewer samples."""
    distances = [Distances(model, chosen.n, seed) for seed in chosen.seeds]
    found = {"UniPC-2": [[distance(UniPC(), k) for k in chosen.steps] for distance in distances]}
    for grid, samples, window in ((30, 64, 0), (60, 64, 0), (60, 64, 5), (120, 64, 0), (120, 64, 5), (120, 1024, 0)):
        seconds, rows = [], []
        for seed, distance in zip(chosen.seeds, distances, strict=True):
            made, cost = estimated(model, data, grid, samples, seed, window)
            seconds.append(cost)
            rows.append([fitting(distance, made, k) for k in chosen.steps])
        smooth = f", l' over {2 * window + 1} levels" if window else ""
        found[f"{grid + 1} levels, {samples} samples{smooth}, {stats.fmean(seconds):.0f} s"] = rows
    table(f"{chosen.model}: size of the statistics, distance in 1e-4", found, chosen.steps)


def fitting(distance: Distances, made: Statistics, steps: int) -> float:
    """NaN where the sampling grid is finer than the statistics'."""
    try:
        return distance(DPMSolverV3(made), steps)
    except ValueError:
        return float("nan")


def picture(made: Statistics, errors: dict[str, list[float]], chosen: argparse.Namespace) -> None:
    """The statistics over lambda, l as maps at four noise levels, and the errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10.5, 3.4))
    spec = figure.add_gridspec(2, 4, width_ratios=[1.35, 0.5, 0.5, 1.5])
    curves = figure.add_subplot(spec[:, 0])
    for name, value, colour in (("l", made.l, "#1d4ed8"), ("s", made.s, "#c2410c"), ("b", made.b, "#15803d")):
        flat = value.flatten(1)
        low, high = flat.quantile(0.1, dim=1), flat.quantile(0.9, dim=1)
        curves.fill_between(made.log_snr, low, high, color=colour, alpha=0.15, linewidth=0)
        curves.plot(made.log_snr, flat.mean(1), color=colour, label=name)
    curves.set_xlabel("half log-SNR (noise to data)")
    curves.set_title("mean and 10-90 % of the pixels", fontsize=9)
    curves.legend(frameon=False, fontsize=9)
    for i, ratio in enumerate((4.0, 1.0, 0.3, 0.1)):
        panel = figure.add_subplot(spec[i // 2, 1 + i % 2])
        place = int((made.log_snr + torch.tensor(ratio, dtype=torch.float64).log()).abs().argmin())
        panel.imshow(made.l[place].mean(0), vmin=0, vmax=1, cmap="gray")
        panel.set_title(f"l, σ/α = {ratio:g}", fontsize=8)
        panel.axis("off")
    panel = figure.add_subplot(spec[:, 3])
    for name, colour, style in (
        ("DDIM", "#94a3b8", ":"),
        ("DPM-Solver++ 2M", "#64748b", "--"),
        ("UniPC-2", "#0f172a", "--"),
        ("v3, order 1", "#fdba74", "-"),
        ("v3, order 2, pseudo corrector (default)", "#c2410c", "-"),
    ):
        label = name.replace(", order 2, pseudo corrector (default)", " (default)")
        panel.semilogy(chosen.steps, errors[name], style, color=colour, label=label, marker="o", markersize=3)
    panel.set_xlabel("network calls")
    panel.set_title("mean square distance to the exact solution", fontsize=9)
    panel.legend(frameon=False, fontsize=8)
    for axes in (curves, panel):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.tight_layout(pad=0.5)
    figure.savefig(chosen.picture, dpi=110)


if __name__ == "__main__":
    main()
