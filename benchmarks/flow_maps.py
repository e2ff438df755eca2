"""How far learned flow maps are from the true one, on worlds whose flow map is known.

    python benchmarks/flow_maps.py --out site/flow-maps           2-D and 16-D, every method of the family
    python benchmarks/flow_maps.py --methods ctm scm --dimensions 2 --out site/flow-maps --pictures docs/img

The world is a Gaussian mixture, the teacher its exact denoiser, and every student starts from one small network that
was trained on the world's samples; all see the same number of images.  A row is the root mean square distance between
the student's output and the true end of the trajectory of the same noise, over the size of the data, in 1, 2, 4 and 8
calls where the plan is deterministic (re-noising goes to other ends); *jumps* is the same for jumps between random
times, for students that know them.  *Discretisation* is what the steps that the method asks of its teacher are wrong
by already, with the exact teacher: no student can be expected to be better.  Rows that the results file holds are not
made again.  In two dimensions a picture of every method shows where its one call sends the noise, beside the truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser, View
from fewstep.exact.mixture import GaussianMixture
from fewstep.files import write_atomically
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Recipe
from fewstep.methods.parts.stores import solve_heun
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling import DDIM, solve
from fewstep.sampling.rollout import Student
from fewstep.schedules import FlowMatching, Schedule, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

matplotlib.use("Agg")
from matplotlib import pyplot

SCHEDULE = TrigFlow(sigma_data=0.5)
BATCH = 256
CALLS = (1, 2, 4, 8)


def ddim(grid: grids.Grid, steps: int) -> Callable[[Denoiser, Tensor], Tensor]:
    """DDIM steps of the teacher on a grid, from standard normal noise."""

    def steps_of(teacher: Denoiser, noise: Tensor) -> Tensor:
        times = grids.to_data(grid(teacher.schedule, steps), teacher.schedule)
        return solve(teacher, teacher.schedule.prior(noise), times, DDIM())

    return steps_of


def straight(steps: int) -> Callable[[Denoiser, Tensor], Tensor]:
    """Euler steps of equal length on flow matching, from standard normal noise."""
    return lambda teacher, noise: ddim(grids.uniform, steps)(teacher.on(FlowMatching()), noise)


def skipping(schedule: Schedule, skip: int) -> Tensor:
    """LCM's grid, every ``skip``-th of a thousand levels."""
    return grids.skipping(schedule, skip)


def heun(steps: int) -> Callable[[Denoiser, Tensor], Tensor]:
    """Heun steps of the teacher on a Karras grid, from standard normal noise."""
    return lambda teacher, noise: solve_heun(teacher, noise, steps)


@dataclass(frozen=True)
class Setup:
    """How a method is run here, and what it asks of its teacher: None where it asks for velocities only."""

    settings: dict[str, Any]
    discretisation: Callable[[Denoiser, Tensor], Tensor] | None = None
    #: The teacher is the trained network instead of the exact one, for methods that train a copy of it.
    of_network: bool = False
    #: Samples an iteration; a trajectory of TBCM is fifteen states.
    batch: int = BATCH
    #: The modes have labels, which the student is told, for methods that need a teacher that can be guided.
    labelled: bool = False


UNGUIDED = {"guidance": 1.0, "guidance_low": 1.0, "guidance_high": 1.0}
SETUPS: dict[str, Setup] = {
    "cm": Setup({"lr": 1e-3}, heun(17)),
    "scm": Setup({"lr": 5e-4}),
    "ctm": Setup({"lr": 1e-3}, heun(17)),
    "lcm": Setup({"lr": 1e-3, "guidance_max": 1.0}, ddim(skipping, 20)),
    "pcm": Setup({"lr": 1e-3}, ddim(skipping, 20)),
    "tbcm": Setup({"lr": 5e-4, "guidances": (1.0,)}, batch=BATCH // 15),
    "mean-flow": Setup({}),
    "ayf": Setup(UNGUIDED),
    "ayf-lmd": Setup(UNGUIDED),
    "boot": Setup({}, straight(10)),
    "free-flow": Setup({}),
    "mdt-dist": Setup({}),
    "shortcut": Setup({"lr": 1e-3}, straight(32)),
    "pd": Setup({"lr": 1e-3}, ddim(grids.even, 16)),
    "guided-distillation": Setup({}, ddim(grids.even, 16), labelled=True),
    "instaflow": Setup({"lr": 1e-3}, heun(16), of_network=True),
    "slim-flow": Setup({}, heun(16)),
    "caf": Setup({}, heun(16)),
}


@dataclass(frozen=True)
class Result:
    """A method on a world: errors by number of calls, of single jumps, and of the teacher's steps."""

    method: str
    dimensions: int
    images: int
    seconds: float
    calls: dict[str, float]
    jumps: float | None
    discretisation: float | None


def world(dimensions: int, labelled: bool = False) -> GaussianMixture:
    """Five modes, of two classes where they have labels: on a circle in two dimensions, at random places in more."""
    rng = Rng(0, "world", dimensions)
    if dimensions == 2:
        angle = 2 * torch.pi * torch.arange(5, dtype=torch.float64) / 5
        means = 0.65 * torch.stack([angle.cos(), angle.sin()], 1)
    else:
        means = 0.45 * rng.normal(5, dimensions, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.5], dtype=torch.float64)
    labels = [0, 0, 0, 1, 1] if labelled else None
    return GaussianMixture(SCHEDULE, weights, means, torch.full((5,), 0.15**2, dtype=torch.float64), labels)


def labels_of(exact: GaussianMixture, n: int) -> Tensor | None:
    """Labels for ``n`` samples in turn; None for a world without."""
    return None if exact.classes is None else torch.arange(n) % exact.classes


def data_of(exact: GaussianMixture, n: int = 50_000) -> Dataset:
    labels = labels_of(exact, n)
    return Dataset("modes", exact.sample(n, Rng(1, "data"), labels).float(), labels)


def trained_network(exact: GaussianMixture, steps: int) -> NetworkDenoiser:
    """The network that every student starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MLP(exact.shape, 128, 3, exact.classes)
    start = NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=0.5), exact.shape, exact.classes)
    settings = Settings(Budget(steps), batch=BATCH, precision="fp32")
    recipe = Denoising(lr=2e-3, label_dropout=0.1)
    made: NetworkDenoiser = run_recipe(recipe, start, data_of(exact), settings, show=False).model
    return made


@torch.no_grad()
def measure(method: str, exact: GaussianMixture, network: NetworkDenoiser, steps: int) -> tuple[Result, Student]:
    setup, dimensions = SETUPS[method], exact.shape[0]
    cls = recipe_class(method)
    recipe: Recipe = cls(**setup.settings)
    given = {"student": network} if "student" in recipe.roles and not setup.of_network else {}
    settings = Settings(Budget(steps), batch=setup.batch, precision="fp32")
    with torch.enable_grad():
        run = run_recipe(
            recipe, network if setup.of_network else exact, data_of(exact), settings, given=given, show=False
        )
    student: Student = run.model
    noise, cond = Rng(2, "test").normal(2000, *exact.shape), labels_of(exact, 2000)
    size = float(exact.sample(2000, Rng(3, "size")).square().mean().sqrt())

    def error(found: Tensor, flow_schedule: Schedule) -> float:
        there = exact.on(flow_schedule)
        start = flow_schedule.prior(noise.double())
        truth = there.flow(start, flow_schedule.t_max, max(flow_schedule.t_min, 1e-9), cond)  # type: ignore[operator]
        return float((found.double() - truth).square().mean().sqrt()) / size

    here = student.flow_map.schedule
    calls = {
        str(k): error(student(noise, cond, k), here)
        for k, plan in student.plans.items()
        if k == 1 or (plan.gamma == 0 and plan.inner is None)
    }
    jumps = None
    if student.flow_map.two_times:
        rng = Rng(4, "jumps")
        t, s = (here.own_time(u) for u in rng.uniform(2000, 2).sort(dim=1, descending=True).values.unbind(1))
        x = here.add_noise(exact.sample(2000, rng), rng.normal(2000, *exact.shape, dtype=torch.float64), t)
        truth = exact.on(here).flow(x, t, s)  # type: ignore[operator]
        gap = student.flow_map(x.float(), t, s).double() - truth
        # in units of what the state is wide at s
        wide = torch.sqrt(here.alpha(s) ** 2 * size**2 + here.sigma(s) ** 2)[:, None]
        jumps = float((gap / wide).square().mean().sqrt())
    solved = None if setup.discretisation is None else setup.discretisation(Conditioned(exact, cond), noise.double())
    allowed = None if solved is None else error(solved, SCHEDULE)
    return Result(method, dimensions, steps * BATCH, run.seconds, calls, jumps, allowed), student


class Conditioned(View):
    """A world with its labels given."""

    def __init__(self, inner: Denoiser, cond: Tensor | None) -> None:
        super().__init__(inner)
        self.cond = cond

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.inner(x, t, self.cond)

    def on(self, schedule: Schedule) -> Denoiser:
        return Conditioned(self.inner.on(schedule), self.cond)


@torch.no_grad()
def picture(method: str, exact: GaussianMixture, student: Student, path: Path) -> None:
    """Where the noise goes: the truth, and the student in one call and in its most; a colour is a direction."""
    noise, cond = Rng(5, "picture").normal(1500, 2), labels_of(exact, 1500)
    schedule = student.flow_map.schedule
    angle = torch.atan2(noise[:, 1], noise[:, 0])
    start = schedule.prior(noise.double())
    truth = exact.on(schedule).flow(start, schedule.t_max, schedule.t_min, cond)  # type: ignore[operator]
    fewest, most = min(student.plans), max(student.plans)
    panels = [("noise", noise), ("exact map", truth), (f"{method}, {called(fewest)}", student(noise, cond, fewest))]
    if most != fewest:
        panels.append((f"{method}, {called(most)}", student(noise, cond, most, Rng(6, "fresh"))))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.3 * len(panels), 2.5), constrained_layout=True)
    for axis, (title, points) in zip(axes, panels, strict=True):
        axis.scatter(points[:, 0], points[:, 1], c=angle, cmap="twilight", s=2, linewidths=0)
        reach = 3.2 if title == "noise" else 1.25
        axis.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def called(steps: int) -> str:
    return "1 call" if steps == 1 else f"{steps} calls"


def table(rows: list[Result]) -> str:
    """The results as Markdown, one table a number of dimensions."""
    lines = []
    for dimensions in sorted({row.dimensions for row in rows}):
        own = [row for row in rows if row.dimensions == dimensions]
        lines += [f"**{dimensions} dimensions**, {own[0].images:,} images", ""]
        lines += [
            "| method | 1 call | 2 | 4 | 8 | jumps | discretisation | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(own, key=fewest):
            cells = [written(row.calls.get(str(k))) for k in CALLS]
            cells += [written(row.jumps), written(row.discretisation), f"{row.seconds:.0f}"]
            lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def written(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def fewest(row: Result) -> float:
    """The error in the fewest calls."""
    return row.calls[min(row.calls, key=int)]


def plot(rows: list[Result], path: Path) -> None:
    """Errors in the fewest calls, a bar a method, with what its teacher's steps are wrong by."""
    sizes = sorted({row.dimensions for row in rows})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 0.28 * len(SETUPS) + 1.2), squeeze=False)
    for axis, dimensions in zip(axes[0], sizes, strict=True):
        own = sorted((row for row in rows if row.dimensions == dimensions), key=lambda row: -fewest(row))
        names = [row.method for row in own]
        axis.barh(names, [fewest(row) for row in own], color="#7aa6c2", label="in the fewest calls (pcm: 4)")
        marks = [(name, row.discretisation) for name, row in zip(names, own, strict=True) if row.discretisation]
        axis.plot([value for _, value in marks], [name for name, _ in marks], "k|", ms=9, label="teacher's steps alone")
        axis.set(title=f"{dimensions} dimensions", xlabel="distance to the true map / size of the data")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in SETUPS if name in RECIPES]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--dimensions", nargs="+", type=int, choices=(2, 16), default=[2, 16])
    parser.add_argument("--steps", type=int, default=3000, help=f"iterations of {BATCH} images (default 3000)")
    parser.add_argument("--out", type=Path, default=Path("site/flow-maps"), help="folder of the results")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures map-METHOD.png (default: that of --out)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "flow-maps.json"
    rows = [Result(**row) for row in json.loads(file.read_text())] if file.exists() else []
    for dimensions in chosen.dimensions:
        networks: dict[bool, NetworkDenoiser] = {}
        for method in chosen.methods:
            if any((r.method, r.dimensions, r.images) == (method, dimensions, chosen.steps * BATCH) for r in rows):
                continue
            labelled = SETUPS[method].labelled
            exact = world(dimensions, labelled)
            if labelled not in networks:
                networks[labelled] = trained_network(exact, chosen.steps)
            row, student = measure(method, exact, networks[labelled], chosen.steps)
            rows.append(row)
            write_atomically(file.absolute(), json.dumps([asdict(row) for row in rows], indent=1).encode())
            print(f"{method}, {dimensions}-D: {row.calls} jumps {row.jumps} of {row.discretisation}", flush=True)
            if dimensions == 2:
                picture(method, exact, student, (chosen.pictures or chosen.out) / f"map-{method}.png")
    write_atomically((chosen.out / "flow-maps.md").absolute(), table(rows).encode())
    plot(rows, (chosen.pictures or chosen.out) / "flow-maps.png")
    print(table(rows))


if __name__ == "__main__":
    main()
