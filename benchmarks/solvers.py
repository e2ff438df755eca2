"""Error against network calls for every solver, on exact mixtures and on a bundled teacher, guided and not.

    python benchmarks/solvers.py [--out site/solvers] [--write]

Four parts, in one run:

1. the ring of eight Gaussians in the plane: our default against the best of diffusers' schedulers, which get the same
   model, the same starting points and their own grids, at 5, 10, 20 and 40 calls;
2. every solver on its default grid at 4 to 50 calls, on mixtures in 2, 16 and 256 dimensions and on the digits teacher,
   unguided and at guidance 1, 3 and 7.5: tables and a figure;
3. the search over solvers and grids from which ``fewstep.solver_for`` answers; ``--write`` stores it in the package;
4. pictures of the digits teacher at 4, 6, 8 and 15 calls with some of the solvers.

The error of a sample is its root mean square deviation from where the exact flow (for the teacher: 200 calls of
UniPC-3) takes the same starting point, averaged over starting points.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep import api
from fewstep.denoisers import Cond, Denoiser
from fewstep.exact import GaussianMixture
from fewstep.randomness import Rng
from fewstep.report.pictures import sheet
from fewstep.sampling import SOLVERS, Levels, sample
from fewstep.sampling.tuning import (
    EVIDENCE,
    Reference,
    Setting,
    as_json,
    candidates,
    noise_for,
    reference,
    setting_of,
    solver_for,
    tried,
)
from fewstep.schedules import DiscreteVP, VPLinear, as_time

matplotlib.use("agg")

CALLS = (4, 5, 6, 8, 10, 15, 20, 30, 50)
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
#: Best of diffusers at 5, 10, 20, 40 steps, measured once over more options than fit here.
PEERS: dict[str, Callable[[], object]] = {
    "UniPC": lambda: UniPCMultistepScheduler(**BETAS),
    "UniPC karras": lambda: UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "DEIS": lambda: DEISMultistepScheduler(**BETAS),
    "DEIS karras": lambda: DEISMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "2M": lambda: DPMSolverMultistepScheduler(**BETAS),
    "2M karras": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "2M lu": lambda: DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True),
    "2M lu, euler at final": lambda: DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True, euler_at_final=True),
    "3M lu": lambda: DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True, solver_order=3),
    "single-step karras": lambda: DPMSolverSinglestepScheduler(**BETAS, use_karras_sigmas=True),
    "DDIM": lambda: DDIMScheduler(**BETAS, clip_sample=False),
    "Euler karras": lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "Heun karras": lambda: HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True),
}


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


def diffusers_error(make: Callable[[], object], calls: int, world: GaussianMixture, x: Tensor, ends: Tensor) -> float:
    """The mean deviation of a scheduler's result, its model evaluated at the scheduler's own levels."""
    scheduler: object = make()
    two_calls = isinstance(scheduler, HeunDiscreteScheduler)
    scheduler.set_timesteps((calls + 1) // 2 if two_calls else calls)  # type: ignore[attr-defined]
    in_ve = isinstance(scheduler, (EulerDiscreteScheduler, HeunDiscreteScheduler))
    table = DiscreteVP.linear()
    if in_ve:
        x = x * float(scheduler.init_noise_sigma)  # type: ignore[attr-defined]
    for k, t in enumerate(scheduler.timesteps):  # type: ignore[attr-defined]
        scheduler.scale_model_input(x, t)  # type: ignore[attr-defined]
        if isinstance(scheduler, DDIMScheduler):
            time_, scale = t.double(), 1.0
        else:
            sigma = scheduler.sigmas[k].double()  # type: ignore[attr-defined]
            time_ = table.time_at(-sigma.log())
            scale = 1 / math.sqrt(1 + float(sigma) ** 2) if in_ve else 1.0
        eps = world.eps(x * scale, float(time_))
        x = scheduler.step(eps, t, x).prev_sample  # type: ignore[attr-defined]
    gap = (x - ends).square().sum(1).sqrt()
    return float(gap.mean()) if bool(gap.isfinite().all()) else math.inf


def against_diffusers(n: int) -> str:
    """Part 1.  Distances in the plane, not per coordinate."""
    world = ring(DiscreteVP.linear())
    x = Rng(0).normal(n, 2, dtype=torch.float64)
    exact = world.flow(x, world.schedule.t_max, 0.0)
    lines = ["| calls | fewstep default | solver_for | best of diffusers | which |", "|---|---:|---:|---:|---|"]
    for calls in (5, 10, 20, 40):
        ours = sample(world, n, noise=x, steps=calls, cond=torch.full((n,), -1))
        picked = sample(world, n, noise=x, cond=torch.full((n,), -1), **solver_for(calls).options())  # type: ignore[arg-type]
        theirs = {name: diffusers_error(make, calls, world, x, exact) for name, make in PEERS.items()}
        best = min(theirs, key=lambda name: theirs[name])
        errors = [float((got - exact).square().sum(1).sqrt().mean()) for got in (ours, picked)]
        lines.append(f"| {calls} | {errors[0]:.4f} | {errors[1]:.4f} | {theirs[best]:.4f} | {best} |")
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


def kind_of(problem: str) -> str:
    """The kind of guidance, as :func:`fewstep.solver_for` knows it."""
    return "guided at 3" if problem.endswith(" 3") else "guided at 7.5" if problem.endswith("7.5") else "unguided"


def default_grid(solver: str) -> str:
    """The grid that a solver gets when none is asked for."""
    return f"balanced:centre={SOLVERS[solver]().centre:g}"


def curves(found: dict[str, tuple[Denoiser, Reference]]) -> dict[str, dict[str, dict[int, float]]]:
    """Part 2: problem -> solver -> calls -> error, every deterministic solver on its default grid."""
    table = Levels.of(VPLinear(), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    solvers = [name for name, make in SOLVERS.items() if not make().table(table).noisy]
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for problem, (model, target) in found.items():
        for solver in solvers:
            for calls in CALLS:
                setting = setting_of(solver, default_grid(solver), calls, model.schedule)
                if setting is not None:
                    error = tried(model, setting, target).error
                    errors.setdefault(problem, {}).setdefault(solver, {})[calls] = error
    return errors


def search(found: dict[str, tuple[Denoiser, Reference]]) -> dict[str, dict[int, Setting]]:
    """Part 3: kind of guidance -> calls -> the setting with the least geometric mean of error over least error."""
    best: dict[str, dict[int, Setting]] = {}
    for kind in ("unguided", "guided at 3", "guided at 7.5"):
        mine = [pair for name, pair in found.items() if kind_of(name) == kind]
        for calls in CALLS:
            settings = candidates(calls, VPLinear())
            excess = dict.fromkeys(settings, 0.0)
            for model, target in mine:
                errors = {s: tried(model, s, target).error for s in settings}
                least = min(errors.values())
                for setting, error in errors.items():
                    excess[setting] += math.log(error / least)
            best.setdefault(kind, {})[calls] = min(settings, key=lambda s: excess[s])
            print(f"{kind}, {calls} calls: {best[kind][calls]}", flush=True)
    return best


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


SHOWN = ("ddim", "euler", "heun", "dpmpp-2m", "dpmpp-3m", "unipc", "unipc-3", "deis", "lms", "dpm3", "dualfast")


def figure(errors: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Error against calls for a choice of solvers, a panel a problem."""
    from matplotlib import pyplot as plt

    columns = 3
    rows = math.ceil(len(errors) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(10, 3.1 * rows), sharex=True, squeeze=False)
    for axis in axes.flat[len(errors) :]:
        axis.axis("off")
    for axis, (problem, found) in zip(axes.flat, errors.items(), strict=False):
        for i, solver in enumerate(SHOWN):
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
    """Part 4: a row for each number of calls, a column block for each solver, the same starting points everywhere."""
    digits, cond = api.load("digits"), torch.arange(10)
    noise = noise_for(digits, 10, 5)
    rows = []
    for calls in (4, 6, 8, 15):
        for solver in ("ddim", "dpmpp-2m", "unipc"):
            rows.append(sample(digits, 10, solver=solver, steps=calls, cond=cond, noise=noise))
    path.write_bytes(sheet(torch.cat(rows), 30, side=24))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("site/solvers"), help="folder for tables, figure and pictures")
    parser.add_argument("--n", type=int, default=256, help="starting points (a quarter of them for digits)")
    parser.add_argument("--write", action="store_true", help="store what the search found in the package")
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), help="one part only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    start, text = time.perf_counter(), []
    if args.part in (None, 1):
        text.append("## The ring, beside diffusers\n\n" + against_diffusers(2000))
        print(text[-1], flush=True)
    found = problems(args.n) if args.part in (None, 2, 3) else {}
    if args.part in (None, 2):
        errors = curves(found)
        figure(errors, args.out / "solvers.png")
        text += [f"## {problem}\n\n{table_of(rows)}" for problem, rows in errors.items()]
        print(f"every solver: {time.perf_counter() - start:.0f} s", flush=True)
    if args.part in (None, 3):
        best = search(found)
        if args.write:
            EVIDENCE.write_text(as_json(best, "benchmarks/solvers.py: error against the exact flow on four models"))
    if args.part in (None, 4):
        pictures(args.out / "digits.png")
    (args.out / "solvers.md").write_text("\n\n".join(text) + "\n")
    print(f"{args.out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
