"""rCM between its two limits: consistency alone and matching alone, on two modes and on digits.

    python benchmarks/rcm.py modes --picture docs/img/rcm.png
    python benchmarks/rcm.py digits

*modes*: a mixture of two Gaussians, one with a fifth of the weight; the teacher is a network that was trained on it,
the students are smaller ones, trained on it too before they become students.  A row says which share of 8,000 samples
of one call is nearer to the small mode, which share lies more than 3.5 deviations from both, and how wide the others
are around their mode, in its deviation.  *digits*: students of the bundled teacher, judged on the held-out scans;
diversity is that of the samples of a class beside that of the real ones.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from fewstep import api
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact.mixture import GaussianMixture
from fewstep.files import write_atomically
from fewstep.methods.consistency.rcm import RCM
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import Evaluator, load_features
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

SCHEDULE = TrigFlow(sigma_data=0.5)
WEIGHTS, SPREAD = (0.8, 0.2), 0.08
MEANS = torch.tensor([[-0.45, -0.15], [0.6, 0.3]], dtype=torch.float64)
#: The weight of the matching, None for nothing else.
CASES: dict[str, float | None] = {
    "consistency alone": 0.0, "weight 0.01": 0.01, "weight 1": 1.0, "matching alone": None
}  # fmt: skip


def recipe(weight: float | None, **settings: float) -> RCM:
    """rCM with a weight of the matching."""
    if weight is None:
        return RCM(consistency_weight=0.0, **settings)  # type: ignore[arg-type]
    return RCM(matching_weight=weight, **settings)  # type: ignore[arg-type]


def trained(world: GaussianMixture, data: Dataset, width: int, steps: int) -> NetworkDenoiser:
    """A denoiser of a width, trained on the world."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MLP(world.shape, width, 2)
    start = NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=0.5), world.shape)
    made: NetworkDenoiser = run_recipe(
        Denoising(lr=2e-3, label_dropout=0.0), start, data, Settings(Budget(steps), batch=256, precision="fp32"),
        show=False,
    ).model  # fmt: skip
    return made


def modes(steps: int, width: int, seeds: int, path: Path | None) -> None:
    world = GaussianMixture(SCHEDULE, torch.tensor(WEIGHTS, dtype=torch.float64), MEANS, torch.full((2,), SPREAD**2))
    data = Dataset("modes", world.sample(50_000, Rng(1, "data")).float())
    teacher, small = trained(world, data, 96, 2000), trained(world, data, width, 2000)
    shown = {"data": data.x[:8000]}
    print("| | small mode | beside both | width |\n|---|---:|---:|---:|")
    write("data", [measured(shown["data"])])
    for name, weight in CASES.items():
        rows = []
        for seed in range(seeds):
            settings = Settings(Budget(steps), batch=256, precision="fp32", seed=seed)
            student: Student = run_recipe(
                recipe(weight, lr=1e-3, critic_lr=2e-3, student_every=2), teacher, data, settings,
                given={"student": small}, show=False,
            ).model  # fmt: skip
            made = student.sample(8000, steps=1, seed=7)
            rows.append(measured(made))
            shown.setdefault(name, made)
        write(name, rows)
    if path:
        draw(shown, path)


def write(name: str, rows: list[tuple[float, ...]]) -> None:
    """A row of means over the seeds, and their deviations where there are several."""
    cells = torch.tensor(rows)
    spread = [f" ± {float(s):.3f}" for s in cells.std(0)] if len(rows) > 1 else [""] * cells.shape[1]
    print(f"| {name} | " + " | ".join(f"{float(m):.3f}{s}" for m, s in zip(cells.mean(0), spread, strict=True)) + " |",
          flush=True)  # fmt: skip


def measured(x: Tensor) -> tuple[float, float, float]:
    """The share nearer to the small mode, the share beside both, and the width of the others in the true deviation."""
    away = (x[:, None] - MEANS.to(x)).norm(dim=2)
    nearest = away.argmin(1)
    beside = away.amin(1) > 3.5 * SPREAD
    inside = (x - MEANS.to(x)[nearest])[~beside]
    width = float(inside.square().mean().sqrt()) / SPREAD if len(inside) else 0.0
    return float((nearest == 1).float().mean()), float(beside.float().mean()), width


def draw(shown: dict[str, Tensor], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(shown), figsize=(8.5, 1.6), layout="constrained")
    for axis, (name, x) in zip(axes, shown.items(), strict=True):
        axis.scatter(x[:2500, 0], x[:2500, 1], s=1.5, c="#2b6b8f", alpha=0.5, linewidths=0)
        axis.set(title=name, xlim=(-0.95, 1.05), ylim=(-0.6, 0.75), aspect="equal", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    store = io.BytesIO()
    figure.savefig(store, dpi=130)
    pyplot.close(figure)
    reduced = io.BytesIO()
    Image.open(store).convert("RGB").quantize(64).save(reduced, "PNG", optimize=True)
    write_atomically(path.absolute(), reduced.getvalue())


def digits(steps: int, seeds: int) -> None:
    teacher, data = api.load("digits"), load_data("digits")
    judge = Evaluator(load_data("digits", "test"), data, load_features("digits"))
    print("| | calls | Fréchet | precision | recall | diversity |\n|---|---:|---:|---:|---:|---:|")
    for name, weight in CASES.items():
        rows: dict[int, list[tuple[float, ...]]] = {1: [], 4: []}
        for seed in range(seeds):
            settings = Settings(Budget(steps), batch=64, precision="fp32", seed=seed)
            student: Student = run_recipe(recipe(weight), teacher, data, settings, show=False).model
            for calls in rows:
                labels = torch.arange(1000) % 10
                q = judge(student.sample(1000, labels, steps=calls, seed=7), labels)
                rows[calls].append((q.frechet.value, q.precision, q.recall, q.diversity))
        for calls, found in rows.items():
            mean = torch.tensor(found).mean(0)
            print(f"| {name} | {calls} | " + " | ".join(f"{value:.2f}" for value in mean) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    two = commands.add_parser("modes", help="two modes of a mixture, the teacher a network")
    two.add_argument("--steps", type=int, default=1500, help="iterations of 256 points (default 1500)")
    two.add_argument("--width", type=int, default=16, help="width of the student's network (default 16; teacher 96)")
    two.add_argument("--seeds", type=int, default=1)
    two.add_argument("--picture", type=Path)
    scans = commands.add_parser("digits", help="students of the bundled digits teacher")
    scans.add_argument("--steps", type=int, default=1000, help="iterations of 64 scans (default 1000)")
    scans.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.command == "modes":
        modes(chosen.steps, chosen.width, chosen.seeds, chosen.picture)
    else:
        digits(chosen.steps, chosen.seeds)


if __name__ == "__main__":
    main()
