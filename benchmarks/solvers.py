"""Error against network calls for every solver, on exact mixtures and on a bundled teacher, guided and not.

    python benchmarks/solvers.py [--out site/solvers]

Three parts, in one run:

1. the ring of eight Gaussians in the plane: our default against the best of diffusers' schedulers for that very number
   of calls (``diffusers_peers.py``), which get the same model and the same starting points, at 5, 10, 20 and 40 calls;
2. every solver on its default grid at 4 to 50 calls, on mixtures in 2, 16 and 256 dimensions and on the digits teacher,
   unguided and at guidance 1, 3 and 7.5: tables and a figure;
3. pictures of the digits teacher at 4, 6, 8 and 15 calls with some of the solvers.

Worlds that no choice has seen are in ``benchmarks/held_out.py``.

The error of a sample is its root mean square deviation from where the exact flow (for the teacher: 200 calls of
UniPC-3) takes the same starting point, averaged over starting points.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from diffusers.utils import logging
from diffusers_peers import best_of
from torch import Tensor

from fewstep import api
from fewstep.denoisers import Cond, Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import GaussianMixture
from fewstep.randomness import Rng
from fewstep.report.pictures import sheet
from fewstep.sampling import SOLVERS, Levels, sample
from fewstep.sampling.search import Reference, noise_for, reference, setting_of, solver_for, tried
from fewstep.schedules import VPLinear, as_time

matplotlib.use("agg")

CALLS = (4, 5, 6, 8, 10, 15, 20, 30, 50)


def ring(schedule: VPLinear | DiscreteVP) -> GaussianMixture:
    """Eight Gaussians of standard deviation 1/4 on a circle of radius 2."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(schedule, torch.ones(8), means, torch.full((8,), 1 / 16), labels=list(range(8)))


def cloud(d: int) -> GaussianMixture:
    """Ten classes in d dimensions, a correlated Gaussian each, of about unit variance in all."""
    rng = Rng(d, "cloud")
    means = 0.8 * rng.normal(10, d, dtype=torch.float64)
    mix = rng.normal(10, d * d, dtype=torch.float64).view(10, d, d) / math.sqrt(d)
    covariances = 0.15 * mix @ mix.mT + 0.01 * torch.eye(d, dtype=torch.float64)
    return GaussianMixture(VPLinear(), torch.ones(10), means, covariances, labels=list(range(10)))


class Spheres(Denoiser):
    """Ten classes in d dimensions, an isotropic Gaussian each of its own size: exact, and cheap in many dimensions."""

    def __init__(self, d: int) -> None:
        super().__init__(VPLinear(), (d,), 10)
        self.means = 0.3 * Rng(d, "spheres").normal(10, d, dtype=torch.float64)
        self.variances = torch.logspace(-1.7, -0.3, 10, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        time_ = as_time(t, x)[:1]
        alpha, sigma = self.schedule.alpha(time_), self.schedule.sigma(time_)
        spread = alpha**2 * self.variances + sigma**2
        square = x.square().sum(1, keepdim=True) - 2 * alpha * x @ self.means.T + alpha**2 * self.means.square().sum(1)
        score = -square / (2 * spread) - x.shape[1] / 2 * spread.log()
        if cond is not None:
            chosen = torch.nn.functional.one_hot(cond.clamp_min(0), 10).bool() | (cond < 0)[:, None]
            score = score.masked_fill(~chosen, -math.inf)
        weight = torch.softmax(score, 1)
        gain = alpha * self.variances / spread
        return (weight @ gain)[:, None] * x + (weight * (1 - gain * alpha)) @ self.means


def against_diffusers(n: int) -> str:
    """Part 1.  Distances in the plane, not per coordinate."""
    world = ring(DiscreteVP.linear())
    x = Rng(0).normal(n, 2, dtype=torch.float64)
    everything = torch.full((n,), -1)
    exact = reference(world, x, everything, calls=400).ends  # of the data: the table's own last level is .01

    def distance(got: Tensor) -> float:
        gap = (got - exact).square().sum(1).sqrt()
        return float(gap.mean()) if bool(gap.isfinite().all()) else math.inf

    lines = ["| calls | default | `solver_for` | best of diffusers | which |", "|---|---:|---:|---:|---|"]
    for calls in (5, 10, 20, 40):
        ours = distance(sample(world, n, noise=x, steps=calls, cond=everything))
        setting = solver_for(calls, model=world, cond=everything)
        picked = distance(sample(world, n, noise=x, cond=everything, **setting.options()))  # type: ignore[arg-type]
        theirs, which = best_of("ddpm", calls, world, x, everything, distance)
        lines.append(f"| {calls} | {ours:.2g} | {picked:.2g} | {theirs:.2g} | {which} |")
    return "\n".join(lines)


def problems(n: int) -> dict[str, tuple[Denoiser, Reference]]:
    """Every model with its starting points and ends; mixtures are guided between their classes, exactly."""
    digits = api.load("digits")
    found: dict[str, tuple[Denoiser, Reference]] = {}
    worlds: dict[str, Denoiser] = {"ring, 2-d": ring(VPLinear()), "16-d": cloud(16), "256-d": Spheres(256)}
    for name, world in worlds.items():
        x, everything = noise_for(world, n, 0), torch.full((n,), -1)
        found[name] = world, Reference(x, reference(world, x, everything).ends, everything)
    for scale in (1.0, 3.0, 7.5):
        guidance = None if scale == 1 else scale
        for name, world in worlds.items():
            if scale > 1:
                x, cond = noise_for(world, n, 1), torch.arange(n) % (world.classes or 1)
                found[f"{name} at {scale:g}"] = world, reference(world, x, cond, guidance, 400)
        x, cond = noise_for(digits, n // 4, 2), torch.arange(n // 4) % 10
        found[f"digits at {scale:g}"] = digits, reference(digits, x, cond, guidance)
    return found


def deterministic() -> list[str]:
    """The names of all solvers that draw no noise."""
    levels = Levels.of(VPLinear(), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    return [name for name, make in SOLVERS.items() if not make().table(levels).noisy]


def curves(
    found: dict[str, tuple[Denoiser, Reference]], solvers: Sequence[str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Part 2: problem -> solver -> calls -> error, every solver on its default grid."""
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for problem, (model, target) in found.items():
        for solver in solvers:
            for calls in CALLS:
                setting = setting_of(solver, None, calls, model.schedule)
                if setting is not None:
                    error = tried(model, setting, target).error
                    errors.setdefault(problem, {}).setdefault(solver, {})[calls] = error
    return errors


def table_of(errors: dict[str, dict[int, float]]) -> str:
    """One problem as a Markdown table, the least error of every column in bold."""
    least = {calls: min(row.get(calls, math.inf) for row in errors.values()) for calls in CALLS}
    lines = ["| solver | " + " | ".join(map(str, CALLS)) + " |", "|---|" + "---:|" * len(CALLS)]
    for solver, row in errors.items():
        cells = []
        for calls in CALLS:
            error = row.get(calls)
            text = "" if error is None else "-" if not math.isfinite(error) else f"{error:.2g}"
            cells.append(f"**{text}**" if error == least[calls] else text)
        lines.append(f"| `{solver}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


SHOWN = ("abm", "ddim", "euler", "heun", "dpmpp-2m", "dpmpp-3m", "unipc", "unipc-3", "deis", "lms", "dpm3", "dualfast")


def figure(errors: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Error against calls for a choice of solvers, a panel a problem."""
    from matplotlib import pyplot as plt

    columns = 3
    rows = math.ceil(len(errors) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(10, 3.1 * rows), sharex=True, squeeze=False)
    for axis in axes.flat[len(errors) :]:
        axis.axis("off")
    for axis, (problem, found) in zip(axes.flat, errors.items(), strict=False):
        for i, solver in enumerate(name for name in SHOWN if name in found):
            row = {calls: e for calls, e in found[solver].items() if math.isfinite(e) and e < 10}
            axis.loglog(list(row), list(row.values()), marker="o", ms=3, lw=1.2, color=f"C{i % 10}", label=solver,
                        ls="--" if i >= 10 else "-")  # fmt: skip
        axis.set_title(problem, fontsize=11)
        axis.set_xticks(CALLS, [str(c) for c in CALLS], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("error")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=6, frameon=False, fontsize=10)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.savefig(path, dpi=90)


def pictures(path: Path) -> None:
    """Part 3: a row for each number of calls, a column block for each solver, the same starting points everywhere."""
    digits, cond = api.load("digits"), torch.arange(10)
    noise = noise_for(digits, 10, 5)
    rows = []
    for calls in (4, 6, 8, 15):
        for solver in ("ddim", "dpmpp-2m", "abm"):
            rows.append(sample(digits, 10, solver=solver, steps=calls, cond=cond, noise=noise))
    path.write_bytes(sheet(torch.cat(rows), 30, side=24))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("site/solvers"), help="folder for tables, figure and pictures")
    parser.add_argument("--n", type=int, default=256, help="starting points (a quarter of them for digits)")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="one part only")
    parser.add_argument("--solvers", nargs="+", choices=deterministic(), help="part 2 for these only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    start, text = time.perf_counter(), []
    if args.part in (None, 1):
        text.append("## The ring, beside diffusers\n\n" + against_diffusers(2000))
        print(text[-1], flush=True)
    if args.part in (None, 2):
        errors = curves(problems(args.n), args.solvers or deterministic())
        figure(errors, args.out / "solvers.png")
        text += [f"## {problem}\n\n{table_of(rows)}" for problem, rows in errors.items()]
        print(f"every solver: {time.perf_counter() - start:.0f} s", flush=True)
    if args.part in (None, 3):
        pictures(args.out / "digits.png")
    (args.out / "solvers.md").write_text("\n\n".join(text) + "\n")
    print(f"{args.out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
