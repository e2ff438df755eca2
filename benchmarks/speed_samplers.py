"""What a sampling step costs besides the network, against diffusers and k-diffusion, in one run.

    python benchmarks/speed_samplers.py [--steps 40] [--repeats 40]

A state of four numbers and a model that halves it: what is left is the sampler's own work.  Every sampler is timed
over a whole trajectory; the time of its model calls alone is subtracted, the rest is divided by the steps.  Ours
includes the making of its table (``solve``); the column "table made" is the loop alone (``run``).  diffusers'
``set_timesteps`` is left out.  Times are the least of many repeats, so that other work on the machine matters little;
the ratios are what to read.

Needs diffusers, and k-diffusion installed without its dependencies (see tests/referee/kdiffusion.py).
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.randomness import Rng
from fewstep.sampling import SOLVERS, Levels, run, solve
from fewstep.schedules import EDM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "referee"))

AIM = 15.0  # microseconds a step for a multistep solver


class Half(Denoiser):
    """The cheapest model that depends on the state."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return x * 0.5


def half(x: Tensor, sigma: Tensor) -> Tensor:
    return x * 0.5


def microseconds(work: Callable[[], Any], repeats: int) -> float:
    """The least time of one call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def ours(name: str, steps: int, repeats: int) -> tuple[float, float]:
    """Microseconds a step with and without the making of the table."""
    denoiser = Half(EDM(), (4,))
    x, times = torch.randn(1, 4), torch.linspace(80, 0, steps + 1, dtype=torch.float64)
    solver, rng = SOLVERS[name](), Rng(0)
    table = solver.table(Levels.of(denoiser.schedule, times))
    t = times[:1]
    model = microseconds(lambda: [denoiser(x, t, None) for _ in range(table.calls)], repeats)
    whole = microseconds(lambda: solve(denoiser, x, times, solver, rng=rng), repeats)
    loop = microseconds(lambda: run(denoiser, x, table, rng=rng), repeats)
    return (whole - model) / steps, (loop - model) / steps


def diffusers(make: Callable[[], Any], steps: int, repeats: int) -> float:
    """Microseconds a step of a scheduler's ``scale_model_input`` and ``step``."""
    scheduler, x = make(), torch.randn(1, 4)

    def trajectory() -> float:
        scheduler.set_timesteps(steps)
        sample = x
        start = time.perf_counter()
        for t in scheduler.timesteps:
            sample = scheduler.step(half(scheduler.scale_model_input(sample, t), t), t, sample, return_dict=False)[0]
        return time.perf_counter() - start

    whole = min(trajectory() for _ in range(repeats)) * 1e6
    calls = len(scheduler.timesteps)
    return (whole - microseconds(lambda: [half(x, x) for _ in range(calls)], repeats)) / steps


def k_diffusion(name: str, steps: int, repeats: int) -> float:
    """Microseconds a step of a sampling function, its progress bar switched off."""
    from kdiffusion import sampling  # tests/referee/kdiffusion.py

    calls = 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return half(x, sigma)

    x, sigmas = torch.randn(1, 4), torch.linspace(80, 0, steps + 1)
    sampler = getattr(sampling, name)
    sampler(counted, x, sigmas, disable=True)
    whole = microseconds(lambda: sampler(half, x, sigmas, disable=True), repeats)
    return (whole - microseconds(lambda: [half(x, x) for _ in range(calls)], repeats)) / steps


PEERS: dict[str, list[tuple[str, Callable[[int, int], float]]]] = {
    "euler": [
        ("diffusers Euler", lambda n, r: diffusers(EulerDiscreteScheduler, n, r)),
        ("k-diffusion euler", lambda n, r: k_diffusion("sample_euler", n, r)),
    ],
    "ddim": [("diffusers DDIM", lambda n, r: diffusers(DDIMScheduler, n, r))],
    "heun": [
        ("diffusers Heun", lambda n, r: diffusers(HeunDiscreteScheduler, n, r)),
        ("k-diffusion heun", lambda n, r: k_diffusion("sample_heun", n, r)),
    ],
    "dpmpp-2m": [
        ("diffusers DPMSolverMultistep", lambda n, r: diffusers(DPMSolverMultistepScheduler, n, r)),
        ("k-diffusion dpmpp_2m", lambda n, r: k_diffusion("sample_dpmpp_2m", n, r)),
    ],
    "unipc": [("diffusers UniPCMultistep", lambda n, r: diffusers(UniPCMultistepScheduler, n, r))],
    "unipc-3": [
        ("diffusers UniPCMultistep(3)", lambda n, r: diffusers(lambda: UniPCMultistepScheduler(solver_order=3), n, r))
    ],
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread, {args.steps} steps")
    print(f"{'sampler':32}{'us/step':>9}{'table made':>12}{'ratio to ours':>15}")
    for name, peers in PEERS.items():
        whole, loop = ours(name, args.steps, args.repeats)
        late = "" if loop <= AIM or name == "heun" else f"   above the aim of {AIM:g}"
        print(f"{'fewstep ' + name:32}{whole:9.1f}{loop:12.1f}{1:15.1f}{late}")
        for label, measure in peers:
            theirs = measure(args.steps, args.repeats)
            print(f"  {label:30}{theirs:9.1f}{'':12}{theirs / whole:15.1f}")


if __name__ == "__main__":
    main()
