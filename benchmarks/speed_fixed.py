"""Two costs of a training step that should not grow with the machine: random draws with the number of processes, and
an optimizer's step with the number of threads.

    python benchmarks/speed_fixed.py [--parts 64] [--rounds 25]

A part of the draws asks for 32 samples of 28x28 numbers; the optimizers move the numbers of a U-net of about a
million.  Both are medians in processor time, which a busy machine disturbs less than the clock on the wall; "whole"
draws the numbers of all parts, and "free" leaves the threads of the optimizer as they are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the Makefile has it; read when PyTorch is imported

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from fewstep.methods.method import Networks
from fewstep.methods.optimizer import Optimizer
from fewstep.networks import UNet
from fewstep.randomness import Rng
from fewstep.training.optimizers import few_threads, make_optimizer

SHAPE = (32, 1, 28, 28)


def alternate(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median milliseconds of each way, in rounds of one of each."""
    times: list[list[float]] = [[] for _ in ways]
    for k in range(rounds + 2):
        for way, seen in zip(ways, times, strict=True):
            start = time.process_time()
            way()
            if k >= 2:
                seen.append(1e3 * (time.process_time() - start))
    return [statistics.median(seen) for seen in times]


def compare_draws(parts: int, rounds: int) -> None:
    alone, part, whole = Rng(0), Rng(0, part=parts // 2, parts=parts), Rng(0)
    n, *rest = SHAPE
    kinds: dict[str, Callable[[Rng, int], object]] = {
        "normal float32": lambda rng, n: rng.normal(n, *rest),
        "normal float64": lambda rng, n: rng.normal(n, *rest, dtype=torch.float64),
        "uniform": lambda rng, n: rng.uniform(n, *rest),
        "one uniform": lambda rng, n: rng.uniform(n),
        "integers": lambda rng, n: rng.integers(n, 0, 10),
    }
    print(f"{'draw, ms':18}{'1 part':>10}{f'of {parts}':>10}{'whole':>10}")
    for name, draw in kinds.items():
        ways = [lambda d=draw: d(alone, n), lambda d=draw: d(part, n), lambda d=draw: d(whole, n * parts)]
        print(f"{name:18}" + "".join(f"{ms:10.2f}" for ms in alternate(ways, rounds)), flush=True)


def compare_optimizers(threads: int, rounds: int) -> None:
    print(f"{f'{threads} threads, ms':18}{'step':>10}{'free':>10}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for kind in ("adamw", "radam"):
        spec = Optimizer(("model",), 1e-4, kind=kind)
        nets = Networks({"model": UNet((1, 28, 28), (40, 80), 1, 128, 10)}, {"model": spec})
        optimizer = make_optimizer(spec, nets, "model")
        for p in nets.group_parameters("model"):
            p.grad = torch.randn_like(p)
        ways = []
        for block in (few_threads, nullcontext):

            def step(block=block, optimizer=optimizer) -> None:
                with block(optimizer):
                    optimizer.step()

            ways.append(step)
        print(f"{kind:18}" + "".join(f"{ms:10.2f}" for ms in alternate(ways, rounds)), flush=True)
    torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=64, help="the processes that share a batch")
    parser.add_argument("--threads", type=int, default=2, help="the threads an optimizer finds")
    parser.add_argument("--rounds", type=int, default=25, help="repetitions of everything that is measured")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    compare_draws(chosen.parts, chosen.rounds)
    compare_optimizers(chosen.threads, chosen.rounds)


if __name__ == "__main__":
    main()
