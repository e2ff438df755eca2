"""What a sampling step costs besides the network, against diffusers and k-diffusion, in one run.

    python benchmarks/speed_samplers.py [--steps 40] [--repeats 40] [--model fashion] [--batch 64]

A state of four numbers and a model that halves it: what is left is the sampler's own work.  Every sampler is timed
over a whole trajectory; the time of its model calls alone is subtracted, the rest is divided by the steps.  Ours
includes the making of its table (``solve``); the column "table made" is the loop alone (``run``).  diffusers'
``set_timesteps`` is left out.  Times are the least of many repeats, so that other work on the machine matters little;
the ratios are what to read.

A second table samples a bundled model from end to end (noise, grid, table, preconditioning and all) and divides by
the time that its bare network takes for as many calls on the same batch.

Needs diffusers, and k-diffusion installed without its dependencies (see tests/referee/kdiffusion.py).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep import api
from fewstep.denoisers import Cond, Denoiser, NetworkDenoiser
from fewstep.randomness import Noise, Rng
from fewstep.sampling import SOLVERS, BrownianPath, Levels, balanced, run, sample, solve
from fewstep.schedules import EDM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "referee"))

AIM = 15.0  # microseconds a step for a multistep solver
SAMPLING_AIM = 1.05  # sampling time over the time of its network calls


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


def ours(name: str, steps: int, repeats: int, one_path: bool = False) -> tuple[float, float]:
    """Microseconds a step with and without the making of the table; the noise from one Brownian path or independent."""
    denoiser = Half(EDM(), (4,))
    x, times = torch.randn(1, 4), torch.linspace(80, 0, steps + 1, dtype=torch.float64)
    solver = SOLVERS[name]()
    rng: Noise = BrownianPath(0) if one_path else Rng(0)
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
    if "sde" in name:
        repeats = 3  # their Brownian tree takes milliseconds a step
    sampler = getattr(sampling, name)
    sampler(counted, x, sigmas, disable=True)
    whole = microseconds(lambda: sampler(half, x, sigmas, disable=True), repeats)
    return (whole - microseconds(lambda: [half(x, x) for _ in range(calls)], repeats)) / steps


PEERS: dict[str, list[tuple[str, Callable[[int, int], float]]]] = {
    "abm": [],
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
    "dpmpp-3m": [
        (
            "diffusers DPMSolverMultistep(3)",
            lambda n, r: diffusers(lambda: DPMSolverMultistepScheduler(solver_order=3), n, r),
        )
    ],
    "deis": [
        ("diffusers DEISMultistep(3)", lambda n, r: diffusers(lambda: DEISMultistepScheduler(solver_order=3), n, r))
    ],
    "lms": [
        ("diffusers LMSDiscrete", lambda n, r: diffusers(LMSDiscreteScheduler, n, r)),
        ("k-diffusion lms", lambda n, r: k_diffusion("sample_lms", n, r)),
    ],
    "ipndm": [],
    "dpm-2m": [],
    "dpmpp-2m-sde": [("k-diffusion dpmpp_2m_sde", lambda n, r: k_diffusion("sample_dpmpp_2m_sde", n, r))],
    "dpmpp-sde": [("k-diffusion dpmpp_sde", lambda n, r: k_diffusion("sample_dpmpp_sde", n, r))],
    "dpmpp-3m-sde": [("k-diffusion dpmpp_3m_sde", lambda n, r: k_diffusion("sample_dpmpp_3m_sde", n, r))],
}


def compiled(steps: int) -> None:
    """A whole trajectory as one graph: the bundled digits teacher, compiled and not."""
    model = api.load("digits")
    table = SOLVERS["unipc"]().table(Levels.of(model.schedule, balanced(model.schedule, steps))).to("cpu")
    x, cond = torch.randn(16, *model.shape), torch.arange(16) % 10
    trajectory = torch.compile(lambda x: run(model, x, table, cond), fullgraph=True)
    start = time.perf_counter()
    gap = float((trajectory(x) - run(model, x, table, cond)).abs().max())
    made = time.perf_counter() - start
    eager, fast = (
        microseconds(lambda f=f: f(x), 20) / 1000 for f in (lambda x: run(model, x, table, cond), trajectory)
    )
    print(f"\nunipc, {steps} steps, digits, batch 16, as one graph (compiled in {made:.0f} s): {fast:.1f} ms; eager "
          f"{eager:.1f} ms; largest difference {gap:.1e}")  # fmt: skip


def over_network(model: NetworkDenoiser, solver: str, steps: int, batch: int, repeats: int) -> tuple[float, float]:
    """``(milliseconds a call of the bare network, sampling time over the time of its calls)``.

    Processor time, the two timed in turn, medians: other work on the machine slows both.
    """
    x, label = torch.randn(batch, *model.shape), torch.zeros(batch)
    cond = torch.arange(batch) % model.classes if model.classes else None
    calls = SOLVERS[solver]().calls(steps)
    network, sampling = [], []
    for _ in range(repeats):
        marks = [time.process_time()]
        for _ in range(calls):
            model.net(x, label, cond)
        marks.append(time.process_time())
        sample(model, batch, solver=solver, steps=steps)
        marks.append(time.process_time())
        network.append(marks[1] - marks[0])
        sampling.append(marks[2] - marks[1])
    each = statistics.median(network)
    return 1000 * each / calls, statistics.median(sampling) / each


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--model", default="fashion", help="a bundled teacher for the second table")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", type=int, metavar="STEPS", help="only this: compile a whole trajectory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread, {args.steps} steps")
    if args.compile:
        compiled(args.compile)
        return
    print(f"{'sampler':32}{'us/step':>9}{'table made':>12}{'ratio to ours':>15}")
    for name, peers in PEERS.items():
        stochastic = "sde" in name  # theirs draws from a Brownian tree, so ours does too
        found = [ours(name, args.steps, args.repeats, one_path=stochastic)]
        theirs = [measure(args.steps, args.repeats) for _, measure in peers]
        found += [ours(name, args.steps, args.repeats, one_path=stochastic) for _ in range(2)]
        whole, loop = map(min, zip(*found, strict=True))  # a processor's speed changes from second to second
        late = "" if loop <= AIM or name == "heun" or stochastic else f"   above the aim of {AIM:g}"
        print(f"{'fewstep ' + name:32}{whole:9.1f}{loop:12.1f}{1:15.1f}{late}")
        for (label, _), each in zip(peers, theirs, strict=True):
            print(f"  {label:30}{each:9.1f}{'':12}{each / whole:15.1f}")
    model = api.load(args.model)
    if not isinstance(model, NetworkDenoiser):
        raise SystemExit(f"--model {args.model}: the second table needs a teacher")
    print(f"\n{args.model}, batch {args.batch}, 8 steps: sampling time over bare network time (aim {SAMPLING_AIM})")
    for name in ("ddim", "dpmpp-2m", "unipc", "abm"):
        network, ratio = over_network(model, name, 8, args.batch, args.repeats // 2)
        print(f"{name:32}{network:9.1f} ms a call{ratio:12.3f}")


if __name__ == "__main__":
    main()
