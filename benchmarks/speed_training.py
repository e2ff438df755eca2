"""What the trainer costs: time of an iteration over a bare loop of the same passes, per method, in one run.

    python benchmarks/speed_training.py [--batch 32] [--repeats 15]

The bare loop draws its batch from a tensor, runs the method's own updates backward and steps fused Adam; it keeps no
averages, checks and clips nothing, records nothing.  Iterations of the two alternate; medians are compared.  The last
column is the fixed cost in milliseconds, measured on a network so small that its passes cost next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser, TrigPrediction
from fewstep.distill.consistency.cm import ConsistencyDistillation
from fewstep.distill.consistency.scm import ContinuousConsistencyDistillation
from fewstep.distill.denoising import Denoising
from fewstep.distill.flow_map.progressive import ProgressiveDistillation
from fewstep.distill.flow_map.rectified_flow import ReflowDistillation
from fewstep.distill.matching.dmd2 import DMD2
from fewstep.distill.method import Batch, Method
from fewstep.networks import MLP, UNet
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings

METHODS: dict[str, Method] = {
    "denoising": Denoising(),
    "cm": ConsistencyDistillation(),
    "scm": ContinuousConsistencyDistillation(),
    "dmd2 (student and critic)": DMD2(critic_steps=1),
    "pd": ProgressiveDistillation(),
    "reflow-distil": ReflowDistillation(),
}


def teacher(big: bool) -> NetworkDenoiser:
    """About a million parameters on 28x28, or a few thousand on 8x8."""
    shape = (1, 28, 28) if big else (1, 8, 8)
    net = UNet(shape, (40, 80), 1, 128, 10) if big else MLP(shape, 16, 1, 10)
    return NetworkDenoiser(net, TrigFlow(), TrigPrediction(), shape, 10)


def bare(method: Method, model: NetworkDenoiser, data: Dataset, batch: int) -> Callable[[], None]:
    """One iteration of a hand-written loop."""
    nets = method.networks(model)
    optimisers = {
        name: torch.optim.Adam(nets.group_parameters(name), spec.lr, fused=True) for name, spec in nets.groups.items()
    }
    run = Run(method, nets, Settings(Budget(10**6), batch=batch, precision="fp32", averages=()), Parallel())
    noise = None if data.noise is None else data.noise[:batch]
    x = data.read(slice(0, batch))

    def iteration() -> None:
        for update in method.updates(nets, Batch(x, data.labels[:batch], Rng(0), noise), run.progress()):
            nets.zero_grad(set_to_none=True)
            update.loss.backward()
            optimisers[update.group].step()
            if update.then is not None:
                update.then()

    return iteration


def compare(method: Method, big: bool, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of an iteration, ours and bare, measured in turns."""
    model = teacher(big)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, *model.shape, generator=generator)
    data = Dataset("random", x, torch.arange(256) % 10, noise=x.flip(0))
    run = Run(
        method, method.networks(model), Settings(Budget(10**6), batch=batch, precision="fp32"), Parallel()
    )  # fmt: skip
    ways = (lambda: run.step(data), bare(method, model, data, batch))
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(repeats + 2):
        for way, kept in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if k >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    print(f"{'method':28}{'ours ms':>10}{'bare ms':>10}{'ratio':>8}{'fixed ms':>10}")
    for name, method in METHODS.items():
        ours, plain = compare(method, True, chosen.batch, chosen.repeats)
        small, small_bare = compare(method, False, 8, 100)
        fixed = 1e3 * (small - small_bare)
        print(f"{name:28}{1e3 * ours:10.1f}{1e3 * plain:10.1f}{ours / plain:8.3f}{fixed:10.2f}", flush=True)


if __name__ == "__main__":
    main()
