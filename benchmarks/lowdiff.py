"""LowDiff against the single-resolution model of equal training and sampling cost, on digits 4x4 -> 8x8.

    python benchmarks/lowdiff.py
    python benchmarks/lowdiff.py --space latents
    python benchmarks/lowdiff.py --seeds 0 --picture docs/img/lowdiff.png

For every seed a cascade trains for ``--steps`` iterations and a plain U-Net of the same layers for as many as cost the
same number of operations.  Both are sampled with UniPC at equal *effective* calls (operations over those of one call at
8x8): the cascade's plan "7+2" is seven steps at 4x4 and two at 8x8 and never costs more than the row's budget.
``--space latents`` does the same on latents: 2x2 patches in three of their four principal directions, ``[3, 4, 4]``,
averaged to 2x2, and decoded before they are measured.

Fréchet distance and kernel distance (features of the digits classifier, 1000 samples against the test part), class
accuracy, and the root mean square between the averaged result and the low picture that it was conditioned on; mean
and standard deviation over the seeds.  Trained models are kept in ``--runs`` and not trained again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.method import Method
from fewstep.methods.teachers.denoising import Denoising
from fewstep.methods.teachers.lowdiff import LowDiff
from fewstep.metrics import Evaluator, load_features
from fewstep.models import model_of
from fewstep.networks import CascadeUNet, UNet
from fewstep.predictions import EDMPrediction
from fewstep.randomness import derive_seed
from fewstep.report.pictures import sheet
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.sampling.cascade import Cascade, StagePlan, downsample, effective_calls, flop_costs, sample_cascade
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

SHAPES = {"pixels": (1, 8, 8), "latents": (3, 4, 4)}
SIZE = {"channels": (32, 32), "blocks": 1, "width": 64}
#: Effective calls -> steps at high resolution, in two splits; what is left of the budget goes into whole
#: steps at low resolution.
PLANS = {2: (1,), 3: (1, 2), 4: (2, 3), 6: (4, 5), 8: (5, 7), 12: (8, 11)}
#: Further ways to spend six calls: a partial start, noise on the condition.
VARIANTS = {"start at 3": {"start": 3.0}, "start at 1": {"start": 1.0}, "condition noise 0.1": {"augmentation": 0.1}}
FIGURES = ("frechet", "kernel", "accuracy", "gap")
N, CLASSES = 1000, 10


@dataclass(frozen=True)
class Patches:
    """A linear autoencoder: 2x2 patches in three principal directions, scaled to the pictures' own deviation."""

    directions: Tensor  # [3, 4]
    gain: float

    @classmethod
    def of(cls, x: Tensor) -> Patches:
        patches = torch.nn.functional.pixel_unshuffle(x, 2).permute(0, 2, 3, 1).reshape(-1, 4)
        covariance = torch.cov(patches.T)
        directions = torch.linalg.eigh(covariance)[1][:, 1:].T.flip(0)
        latents = patches @ directions.T
        return cls(directions, float(x.std() / latents.std()))

    def encode(self, x: Tensor) -> Tensor:
        return self.gain * torch.einsum("kc,bchw->bkhw", self.directions, torch.nn.functional.pixel_unshuffle(x, 2))

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(torch.einsum("kc,bkhw->bchw", self.directions, z) / self.gain, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=SHAPES, default="pixels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000, help="iterations of the cascade")
    parser.add_argument("--runs", type=Path, default=Path("runs/lowdiff"))
    parser.add_argument("--picture", type=Path, help="draw samples of the first seed instead of measuring")
    chosen = parser.parse_args()
    train, test = load_data("digits"), load_data("digits", "test")
    decode: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    data = train
    if chosen.space == "latents":
        coder = Patches.of(train.read(slice(None)))
        data, decode = replace(train, x=coder.encode(train.read(slice(None)))), coder.decode
    judge = Evaluator(test, train, load_features("digits"))
    rows: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for seed in chosen.seeds:
        cascade, single, cost = trained(data, seed, chosen.steps, chosen.runs / chosen.space)
        if chosen.picture is not None:
            return draw(chosen.picture, cascade, single, seed)
        share = seconds(cascade.stages[0]) / seconds(cascade.stages[-1])
        print(f"a call at low resolution: {cost[0]:.3f} of the operations and {share:.2f} of the time of one at high")
        for key, low, made, effective in samples(cascade, single, cost, seed):
            labels = torch.arange(N) % CLASSES if key[0] == "by class" else None
            found = judge(decode(made), labels)
            accuracy = math.nan if found.accuracy is None else found.accuracy
            gap = math.nan if low is None else float((downsample(made, low.shape[-2:]) - low).square().mean() ** 0.5)
            values = (found.frechet.value, found.kernel.value, accuracy, gap)
            rows[key].append({"effective": effective, **dict(zip(FIGURES, values, strict=True))})
    print(table(rows, judge.floor(N).value))


def trained(data: Dataset, seed: int, steps: int, runs: Path) -> tuple[Cascade, NetworkDenoiser, tuple[float, ...]]:
    """A cascade, a plain model of equal training cost, and the cost of the cascade's stages."""
    shape = SHAPES["pixels" if data.x.dtype == torch.uint8 else "latents"]

    def model(network: type[UNet]) -> NetworkDenoiser:
        torch.manual_seed(derive_seed(seed, "initial weights"))
        return NetworkDenoiser(network(shape, classes=CLASSES, **SIZE), EDM(), EDMPrediction(0.75), shape, CLASSES)

    def made(method: Method, start: NetworkDenoiser, count: int) -> NetworkDenoiser:
        settings = Settings(Budget(count), batch=64, seed=seed, precision="fp32")
        begun = time.process_time()
        result = run_recipe(method, start, data, settings, runs / f"{method.name}-{seed}-{count}", show=False)
        print(f"seed {seed}: {method.name}, {count} iterations, {time.process_time() - begun:.0f} s of processor time")
        return model_of(result.model).teacher()

    law = {"lr": 2e-3, "noise_mean": -0.5, "noise_std": 1.5}
    start = model(CascadeUNet)
    cost = flop_costs(Cascade.shared(start, start.net.resolutions))
    shared = made(LowDiff(**law), start, steps)
    single = made(Denoising(**law), model(UNet), round(steps * statistics.fmean(cost)))
    return Cascade.shared(shared, shared.net.resolutions), single, cost


def samples(
    cascade: Cascade, single: NetworkDenoiser, cost: tuple[float, ...], seed: int
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float]]:
    """``(key, low, samples, effective calls)`` of everything that is measured."""
    for what, labels in (("by class", torch.arange(N) % CLASSES), ("unconditional", torch.full((N,), -1))):
        for calls, splits in PLANS.items():
            made = sample(single, N, steps=calls, cond=labels, seed=seed)
            yield (what, f"{calls}", "one resolution", f"{calls}"), None, made, calls
            for many in splits:
                few = int((calls - many) / cost[0])
                variants = VARIANTS if (calls, many, what) == (6, 4, "by class") else {}
                for name, more in {"": {}, **variants}.items():
                    plans = [StagePlan(few), StagePlan(many, **more)]
                    low, made = sample_cascade(cascade, N, plans, cond=labels, seed=seed)
                    key = (what, f"{calls}", "cascade", f"{few}+{many}{', ' if name else ''}{name}")
                    yield key, low, made, effective_calls(cascade, plans, cost)


def seconds(stage: NetworkDenoiser, repeats: int = 7) -> float:
    """The least time of one call on N samples."""
    x, taken = torch.zeros(N, *stage.shape), []
    with torch.no_grad():
        for _ in range(repeats):
            begun = time.perf_counter()
            stage(x, 1.0)
            taken.append(time.perf_counter() - begun)
    return min(taken)


def table(rows: dict[tuple[str, ...], list[dict[str, float]]], floor: float) -> str:
    """Markdown, in the order of measurement."""
    lines = [
        f"n = {N}, {len(next(iter(rows.values())))} seeds; real against real: Fréchet {floor:.2f}",
        "",
        "| labels | model | steps | effective calls | Fréchet | kernel | class accuracy | to the low picture |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (what, _, model, steps), found in rows.items():
        quality = [spread([row[name] for row in found], d) for name, d in zip(FIGURES, (2, 3, 3, 3), strict=True)]
        effective = f"{found[0]['effective']:.2f}"
        lines.append(f"| {' | '.join([what, model, steps, effective, *quality])} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds; a dash for what was not measured."""
    if any(math.isnan(value) for value in values):
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def draw(path: Path, cascade: Cascade, single: NetworkDenoiser, seed: int) -> None:
    """The two stages and the single model at equal cost."""
    import matplotlib.pyplot as plt
    from PIL import Image

    labels = torch.arange(20) % CLASSES
    low, high = sample_cascade(cascade, 20, [StagePlan(3), StagePlan(2)], cond=labels, seed=seed)
    panels = {
        "LowDiff, first stage: 3 steps at 4x4": low,
        "LowDiff, second stage: 2 steps at 8x8 given the pictures above (2.8 effective calls in all)": high,
        "one resolution: 3 steps at 8x8 (3 calls)": sample(single, 20, steps=3, cond=labels, seed=seed),
    }
    figure, axes = plt.subplots(len(panels), 1, figsize=(6, 1.45 * len(panels)))
    for axis, (title, x) in zip(axes, panels.items(), strict=True):
        axis.imshow(plt.imread(BytesIO(sheet(x, 10))), cmap="gray")
        axis.set_title(title, loc="left", fontsize=9, pad=3)
        axis.axis("off")
    figure.tight_layout(pad=0.3, h_pad=0.6)
    figure.savefig(path, dpi=100)
    Image.open(path).convert("L").save(path, optimize=True)


if __name__ == "__main__":
    main()
