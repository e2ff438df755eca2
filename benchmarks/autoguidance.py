"""Autoguidance on digits: a model guided by a worse one, beside classifier-free guidance and none, over several seeds.

    python benchmarks/autoguidance.py --seeds 0 1 2

For every seed a main model and a guide of half its width are trained, the guide for an eighth of the steps; both keep
two averages, from which others are made.  Every kind of guidance then gets its weight (and interval, and averages, and
moment of the guide) by the same search: the Fréchet distance of samples to the *training* data.  What was chosen is
measured with other noise against held-out data: Fréchet distance, precision and recall in the features of the data's
classifier, class accuracy, network calls of main model and guide for a sample, and the cost: calls weighted by the
parameters of the network, beside no guidance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.guidance import GuidanceInterval, Guided
from fewstep.hub.tables import network_of
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import Evaluator, Features, frechet_distance, load_features, measure
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import derive_seed
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.schedules import TrigFlow
from fewstep.training.autoguidance import autoguided, denoiser_of, moments, search
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.snapshots import reconstruct_model
from fewstep.training.trainer import Settings

WIDTH, BLOCKS = 160, 3
SIGMA_DATA = 0.75
METHOD = Denoising(lr=2e-3, noise_mean=-0.5, noise_std=1.5)
AVERAGES = (0.05, 0.1)
SCALES = (1.5, 2.0, 3.0)
MAIN_WIDTHS, GUIDE_WIDTHS = (0.05, 0.1), (0.1, 0.15)
INTERVALS = ((0.1, 1.0), (0.3, 3.0), (0.5, 10.0))
STEPS = 16


def trained(data: Dataset, width: int, steps: int, seed: int, folder: Path) -> Path:
    """The run folder of a model; a run that is there already is not repeated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights", width))
        net = MLP(data.shape, width=width, blocks=BLOCKS, classes=data.classes)
    schedule = TrigFlow(t_max=1.5614218, sigma_data=SIGMA_DATA)
    model = NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=SIGMA_DATA), data.shape, data.classes)
    averages = tuple(Power(width) for width in AVERAGES)
    settings = Settings(Budget(steps), batch=128, seed=seed, averages=averages, precision="fp32")
    run_recipe(METHOD, model, data, settings, folder, show=False)
    return folder


def drawn(model: Denoiser, n: int, seed: int) -> Tensor:
    return sample(model, n, solver="unipc", steps=STEPS, cond=torch.arange(n) % 10, seed=seed)


@dataclass(frozen=True)
class Row:
    """What was measured of one kind of guidance with one seed."""

    frechet: float
    precision: float
    recall: float
    accuracy: float
    main_calls: int
    guide_calls: int
    cost: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of the main model, 8 times those of the guide")
    parser.add_argument("--n", type=int, default=1000, help="samples (default 1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/autoguidance"), help="where the models train")
    chosen = parser.parse_args()

    data, held_out = load_data("digits"), load_data("digits", "test")
    features = load_features("digits")
    judge = Evaluator(held_out, data, features)
    found: dict[str, list[Row]] = {}
    for seed in chosen.seeds:
        start = time.perf_counter()
        place = chosen.runs / f"{chosen.steps}-steps-{seed}"
        main_run = trained(data, WIDTH, chosen.steps, seed, place / "main")
        guide_run = trained(data, WIDTH // 2, chosen.steps // 8, seed, place / "guide")
        for name, candidate in candidates(main_run, guide_run, scorer(features, data, seed)).items():
            found.setdefault(name, []).append(measured(judge, candidate, chosen.n, seed))
            print(f"seed {seed}: {name}: {candidate.chosen}", flush=True)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nn={chosen.n}, {STEPS} steps, real against real {judge.floor(chosen.n).value:.2f}; mean ± sd over seeds\n")
    print("| guidance | Fréchet | precision | recall | class accuracy | calls, main + guide | cost |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, rows in found.items():
        cells = [
            spread([r.frechet for r in rows], 2), spread([r.precision for r in rows], 3),
            spread([r.recall for r in rows], 3), spread([r.accuracy for r in rows], 3),
            f"{statistics.fmean(r.main_calls for r in rows):.0f} + "
            f"{statistics.fmean(r.guide_calls for r in rows):.0f}",
            f"{statistics.fmean(r.cost for r in rows):.2f}",
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def scorer(features: Features, data: Dataset, seed: int) -> Callable[[Denoiser], float]:
    """The Fréchet distance of 500 samples to the training data, always with the same noise."""
    real = features(data)
    return lambda model: frechet_distance(features(drawn(model, 500, derive_seed(seed, "search")).clamp(-1, 1)), real)


@dataclass(frozen=True)
class Candidate:
    """One kind of guidance at its best; ``networks`` are main model and guide, the same twice for classifier-free."""

    chosen: str
    model: Denoiser
    networks: tuple[nn.Module, ...]


def candidates(main_run: Path, guide_run: Path, score: Callable[[Denoiser], float]) -> dict[str, Candidate]:
    """Every kind of guidance, with the weight, interval, averages and guide that score best."""
    plain = denoiser_of(main_run)
    width = min(MAIN_WIDTHS, key=lambda w: score(reconstruct_model(plain, main_run, w)))
    reconstruct_model(plain, main_run, width)
    net = network_of(plain).net
    free = min(SCALES, key=lambda w: score(Guided(plain, w)))
    w, interval = min(product(SCALES, INTERVALS), key=lambda c: score(GuidanceInterval(Guided(plain, c[0]), *c[1])))
    made = {
        "none": Candidate(f"average {width}", plain, (net,)),
        "classifier-free": Candidate(f"w {free}", Guided(plain, free), (net, net)),
        "classifier-free in an interval": Candidate(
            f"w {w} in {interval}", GuidanceInterval(Guided(plain, w), *interval), (net, net)
        ),
    }
    for name, guide, stored in (
        ("autoguidance, half as wide, T/8", guide_run, moments(guide_run)[-1:]),
        ("autoguidance by itself at T/8 or T/4", main_run, moments(main_run)[:2]),
    ):
        best = search(
            main_run,
            guide,
            score,
            scales=SCALES,
            main_widths=MAIN_WIDTHS,
            guide_widths=GUIDE_WIDTHS,
            guide_moments=stored,
        )[0].choice
        model = autoguided(main_run, guide, best)
        made[name] = Candidate(str(best), model, (network_of(model.inner).net, network_of(model.bad).net))
    return made


def measured(judge: Evaluator, candidate: Candidate, n: int, seed: int) -> Row:
    """Quality with noise that the search has not seen, and what a sample costs."""
    quality = judge(drawn(candidate.model, n, seed), torch.arange(n) % 10)
    assert quality.accuracy is not None
    calls = [
        measure(lambda: drawn(candidate.model, 1, seed), network, repeats=1).calls for network in candidate.networks
    ]
    if len(set(candidate.networks)) < len(calls):  # one network plays both parts and was counted twice
        calls = [STEPS, calls[0] - STEPS]
    size = [sum(p.numel() for p in network.parameters()) for network in candidate.networks]
    weighted = sum(n * k for n, k in zip(calls, size, strict=True)) / (STEPS * size[0])
    return Row(
        quality.frechet.value, quality.precision, quality.recall, quality.accuracy, calls[0], sum(calls[1:]), weighted
    )


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the value alone of one seed."""
    value = f"{statistics.fmean(values):.{digits}f}"
    return value if len(values) < 2 else f"{value} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
