"""DPM-OT: how long ten thousand targets take, and what the expressway gives and costs beside the plain solver.

    python benchmarks/dpm_ot.py timing             10,000 targets of 64 and of 784 dimensions
    python benchmarks/dpm_ot.py quality            digits: 1000 targets at several noise levels, beside the plain solver
    python benchmarks/dpm_ot.py bound              digits: what the error bound says
    python benchmarks/dpm_ot.py picture docs/img/dpm-ot.png

The quality table compares at equal network calls and without class labels, where modes mix; memorisation stands in
every row, and one row starts from a stored state chosen at random instead of by the transport.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time as clock
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from fewstep import api
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser
from fewstep.exact import FiniteData
from fewstep.metrics import Evaluator, load_features
from fewstep.metrics.mode_mixture import mode_mixture
from fewstep.randomness import Rng
from fewstep.sampling import sample, solve
from fewstep.sampling.dpm_ot.expressway import (
    Expressway,
    annealed_langevin,
    error_bound,
    express,
    noisy_targets,
    reverse_targets,
    transport_error,
)
from fewstep.sampling.dpm_ot.optimal_transport import Adam, AveragedGradient, Masses, transport
from fewstep.sampling.named import named_solver, named_times
from fewstep.schedules import EDM

SOLVER = "unipc"
N = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["timing", "quality", "bound", "picture"])
    parser.add_argument("out", nargs="?", type=Path, help="the picture's file")
    parser.add_argument("--targets", type=int, default=10_000, help="of the timing (default 10,000)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of the masses, in the timing (default 0.1)")
    parser.add_argument("--data", nargs="+", default=["digits", "fashion"], help="data sets of the timing")
    parser.add_argument("--adam", action="store_true", help="also time the paper's solver, with as many draws")
    parser.add_argument("--seeds", type=int, default=3, help="of the quality table (default 3)")
    chosen = parser.parse_args()
    if chosen.what == "timing":
        for name in chosen.data:
            timing(load_data(name), chosen.targets, chosen.tolerance, chosen.adam)
    elif chosen.what == "quality":
        quality(chosen.seeds)
    elif chosen.what == "bound":
        bound()
    else:
        picture(chosen.out)


def repeated(data: Dataset, n: int, ratio: float, seed: int) -> Tensor:
    """``n`` noisy pictures, every one of the data as often as any other up to one."""
    rows = torch.cat([Rng(seed, i).shuffled(len(data)) for i in range(n // len(data) + 1)])[:n]
    return noisy_targets(EDM(), ratio, data.read(rows), Rng(seed, "noise"))


def timing(data: Dataset, n: int, tolerance: float, adam: bool) -> None:
    """One solve at noise level 0.5, its course, and what a sample costs afterwards."""
    y = repeated(data, n, 0.5, 0)
    print(f"\n{data.name}: {n} targets of {y[0].numel()} dimensions, {torch.get_num_threads()} threads")
    begin, cpu = clock.perf_counter(), clock.process_time()
    used = [0]

    def report(draws: int, allowed: int, masses: Masses) -> None:
        used[0] = draws
        print(
            f"  {draws / n:6.0f} draws a target  error {masses.error:.3f}  empty {len(masses.empty):4d}  "
            f"{clock.perf_counter() - begin:6.1f} s, {clock.process_time() - cpu:6.1f} s of processor"
        )

    potential, _ = transport(y, Rng(0), solver=AveragedGradient(tolerance), report=report)
    fresh = potential.masses(50 * n, Rng(1))
    print(f"  averaged gradient: error over 50 fresh draws a target {fresh.error:.3f}, empty {len(fresh.empty)}")
    x = potential.source.draw(1000, potential.shape, Rng(2))
    begin = clock.perf_counter()
    potential(x)
    print(f"  T(noise): {1e3 * (clock.perf_counter() - begin):.0f} us a sample")
    print(f"  largest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    if adam:
        slow, _ = transport(y, Rng(0), solver=Adam(iterations=used[0] // (10 * n)))
        fresh = slow.masses(50 * n, Rng(1))
        print(f"  Adam, as many draws: error {fresh.error:.3f}, empty {len(fresh.empty)}")


def at_ratio(teacher: Denoiser, ratio: float) -> float:
    """The time with this noise-to-signal ratio."""
    return float(teacher.schedule.time_at(torch.tensor(-math.log(ratio), dtype=torch.float64)))


def road_to(teacher: Denoiser, y: Tensor, time: float, labels: Tensor | None, seed: int) -> Expressway:
    return Expressway(transport(y, Rng(seed, "transport"))[0], teacher.schedule, time, labels)


def quality(seeds: int) -> None:
    """Rows of Fréchet distance, precision, recall, mode mixture and memorisation, means and spreads over seeds."""
    teacher, train, test = api.load("digits"), load_data("digits"), load_data("digits", "test")
    features = load_features("digits")
    judge = Evaluator(test, train, features)
    no_class = torch.full((N,), -1)
    rows: dict[tuple[str, int], list[list[float]]] = {}

    def add(name: str, calls: int, x: Tensor) -> None:
        x = x.clamp(-1, 1)
        found = judge(x)
        probabilities = features.classify(features(x)).softmax(dim=1)
        rows.setdefault((name, calls), []).append([
            found.frechet.value, found.precision, found.recall, mode_mixture(probabilities, 0.4),
            mode_mixture(probabilities, 0.1), found.memorisation.ratio, found.memorisation.close,
        ])  # fmt: skip

    add("held-out digits (500)", 0, test.read(slice(None)))
    for seed in range(seeds):
        noise = Rng(seed, "sample").normal(N, *teacher.shape)
        for calls in (3, 5, 10):
            add("solver alone", calls, sample(teacher, N, solver=SOLVER, steps=calls, cond=no_class, noise=noise))
        chosen = Rng(seed, "rows").shuffled(len(train))[:N]
        for ratio in (0.2, 0.5, 0.8, 1.2):
            time = at_ratio(teacher, ratio)
            y = noisy_targets(teacher.schedule, time, train.read(chosen), Rng(seed, "noise"))
            road = road_to(teacher, y, time, None, seed)
            for calls in (3, 5):
                x, _ = express(teacher, road, noise, solver=SOLVER, steps=calls, cond=no_class)
                add(f"expressway to noise {ratio}", calls, x)
            if ratio == 0.5:
                stored = y[Rng(seed, "choice").integers(N, 0, N)]
                add(f"random stored state at noise {ratio}", 3, three_steps(teacher, stored, time, no_class))
                add(f"annealed Langevin from noise {ratio}", 21, by_langevin(teacher, road, noise, ratio, seed))
                runs = reverse_targets(teacher, N, time, Rng(seed, "runs"), steps=32, cond=no_class)
                landed = road_to(teacher, runs, time, None, seed)(noise)
                add(f"expressway to 32-step runs, noise {ratio}", 3, three_steps(teacher, landed, time, no_class))
    print("| start | calls | Fréchet | precision | recall | mixture 0.4 | mixture 0.1 | memorisation | close |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for (name, calls), found in rows.items():
        cells = [spread([row[i] for row in found], 2 if i < 3 else 3) for i in range(7)]
        print(f"| {name} | {calls} | {' | '.join(cells)} |")


def three_steps(teacher: Denoiser, x: Tensor, time: float, cond: Tensor) -> Tensor:
    solver = named_solver(SOLVER)
    return solve(teacher, x, named_times(replace(teacher.schedule, t_max=time), solver, 3, None), solver, cond)


def by_langevin(teacher: Denoiser, road: Expressway, noise: Tensor, ratio: float, seed: int) -> Tensor:
    """The paper's base sampler for the last part: 4 geometric levels down to 0.05, 5 steps each."""
    schedule = EDM(t_min=0.05, t_max=80.0)
    start = road(noise) / float(teacher.schedule.alpha(torch.tensor(road.time, dtype=torch.float64)))
    times = torch.logspace(math.log10(ratio), math.log10(0.05), 4, dtype=torch.float64)
    no_class = torch.full((len(noise),), -1)
    return annealed_langevin(
        teacher.on(schedule), start, times, Rng(seed, "langevin"), step_lr=0.2 * 0.05**2, cond=no_class
    )


def spread(values: list[float], digits: int) -> str:
    value = f"{statistics.fmean(values):.{digits}f}"
    return value if len(values) < 2 else f"{value} ± {statistics.stdev(values):.{digits}f}"


def bound() -> None:
    """The error bound against the law of the training digits, whose exact denoiser is known: measured masses, measured
    errors of the network, largest rate found over noisy digits."""
    teacher, train = api.load("digits"), load_data("digits")
    exact = FiniteData(teacher.schedule, train.read(slice(None)).double())
    chosen = Rng(0, "rows").shuffled(len(train))[:N]
    for ratio in (0.1, 0.2, 0.5):
        time = at_ratio(teacher, ratio)
        y = noisy_targets(teacher.schedule, time, train.read(chosen), Rng(0, "noise"))
        road = road_to(teacher, y, time, None, 0)
        mass = transport_error(road.potential, Rng(1), 200_000)
        ratios = torch.logspace(math.log10(ratio), math.log10(0.05), 9, dtype=torch.float64)
        errors, rates = zip(*(at_level(teacher, exact, train, float(r)) for r in ratios), strict=True)
        alpha = float(teacher.schedule.alpha(torch.tensor(time, dtype=torch.float64)))
        told = error_bound(mass.distance / alpha, ratios, torch.tensor(errors), torch.tensor(rates))
        print(
            f"noise {ratio}: total variation below {mass.total_variation:.3f}, W2(T(noise), targets) below "
            f"{mass.distance:.2f}, energy gap below {mass.energy_gap:.1f} ({100 * mass.confidence:.0f} %); growth "
            f"{told.growth:.3g}; at noise 0.05: transport {told.transport:.3g} + score {told.score:.3g}"
        )


def at_level(teacher: Denoiser, exact: FiniteData, train: Dataset, ratio: float) -> tuple[float, float]:
    """The teacher's root mean square error in eps over noisy training digits, and its largest rate over 32 of them."""
    time, null = at_ratio(teacher, ratio), torch.full((N,), -1)
    x = noisy_targets(teacher.schedule, time, train.read(Rng(5).integers(N, 0, len(train))), Rng(6, str(ratio)))
    with torch.no_grad():
        wrong = teacher.eps(x, time, null) - exact.eps(x.double(), time).float()
    alpha = float(teacher.schedule.alpha(torch.tensor(time, dtype=torch.float64)))

    def eps(flat: Tensor) -> Tensor:
        return teacher.eps((alpha * flat).view(-1, *teacher.shape), time, null[:1]).flatten()

    largest = -math.inf
    for flat in (x[:32] / alpha).flatten(1):
        jacobian = torch.autograd.functional.jacobian(eps, flat)
        largest = max(largest, float(torch.linalg.eigvalsh(-(jacobian + jacobian.T) / 2)[-1]))
    return float(wrong.flatten(1).square().sum(1).mean().sqrt()), largest


def picture(out: Path | None) -> None:
    """Solver alone, landing states, samples and their nearest training pictures, three calls, no class labels."""
    import matplotlib.pyplot as plt
    from PIL import Image

    from fewstep.report.pictures import sheet

    if out is None:
        raise SystemExit("picture: give the file to write, docs/img/dpm-ot.png")
    teacher, train = api.load("digits"), load_data("digits")
    no_class = torch.full((20,), -1)
    time = at_ratio(teacher, 0.5)
    chosen = Rng(0, "rows").shuffled(len(train))[:N]
    y = noisy_targets(teacher.schedule, time, train.read(chosen), Rng(0, "noise"))
    road = road_to(teacher, y, time, None, 0)
    noise = road.draw(20, Rng(1))
    fast, _ = express(teacher, road, noise, solver=SOLVER, steps=3, cond=no_class)
    data = train.read(slice(None))
    nearest = torch.cdist(fast.flatten(1), data.flatten(1)).argmin(1)
    panels = {
        "the solver alone, 3 calls": sample(teacher, 20, solver=SOLVER, steps=3, cond=no_class, noise=noise),
        "T(noise): stored states at noise 0.5": road(noise),
        "3 calls from there": fast,
        "their nearest training pictures": data[nearest],
    }
    figure, axes = plt.subplots(len(panels), 1, figsize=(6, 1.45 * len(panels)))
    for axis, (title, x) in zip(axes, panels.items(), strict=True):
        axis.imshow(plt.imread(BytesIO(sheet(x.clamp(-1, 1), 10))), cmap="gray")
        axis.set_title(title, loc="left", fontsize=9, pad=3)
        axis.axis("off")
    figure.tight_layout(pad=0.3, h_pad=0.6)
    figure.savefig(out, dpi=100)
    Image.open(out).convert("L").save(out, optimize=True)


if __name__ == "__main__":
    main()
