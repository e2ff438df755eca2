"""Where a network trained on a table of betas is best called: our grid, diffusers' spacings, Karras' levels.

    python benchmarks/beta_grids.py [--seeds 0 1] [--steps 4000]

Noise predictions are trained on the bundled digits at the whole steps of two tables (DDPM's linear betas, Stable
Diffusion's), with the time embedding's fastest wave at one radian a step, as theirs.  Every grid then goes through
``as_scheduler``, as in a pipeline, and ends in pure data.  Printed for each number of calls: the mean distance of the
samples to those of the same noise at all 1000 steps, per dimension, and the Frechet distance to the data in the
features of the bundled classifier; means over tables and seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from fewstep.data import load
from fewstep.hub import as_scheduler
from fewstep.metrics import frechet_distance, load_features
from fewstep.networks import MLP

TABLES = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
SPACINGS = ("trailing", "linspace", "leading")
GRIDS = ("balanced", "whole", *SPACINGS, "karras")
SOLVERS = ("dpmpp-2m", "unipc", "abm")
CALLS = (4, 6, 8, 10, 15, 20)


def train(alphas_cumprod: Tensor, data: Tensor, steps: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A noise prediction ``eps(x, t)``, the moving average of its weights."""
    torch.manual_seed(seed)
    net = MLP(tuple(data.shape[1:]), width=192, blocks=3)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimiser = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (192,))]
        t, eps = torch.randint(len(alphas_cumprod), (len(x0),)), torch.randn_like(x0)
        kept = alphas_cumprod[t].view(-1, 1, 1, 1)
        loss = torch.nn.functional.mse_loss(net(kept.sqrt() * x0 + (1 - kept).sqrt() * eps, t / 16), eps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        average.update_parameters(net)
    return lambda x, t: average(x, t.expand(len(x)) / 16)


def scheduler(table: str, solver: str, grid: str, calls: int) -> Any:
    """Ours, with its calls laid out."""
    like = diffusers.DDIMScheduler(
        **TABLES[table], clip_sample=False, timestep_spacing=grid if grid in SPACINGS else "leading", steps_offset=1
    )
    made = as_scheduler(solver, like, grid={"karras": "karras"}.get(grid, "original" if grid in SPACINGS else None))
    made.set_timesteps(calls)
    if grid == "whole":
        made.set_timesteps(timesteps=made.timesteps.round())
    return made


@torch.no_grad()
def sample(net: Callable[[Tensor, Tensor], Tensor], made: Any, noise: Tensor) -> Tensor:
    x = noise
    for t in made.timesteps:
        x = made.step(net(x, t), t, x).prev_sample
    return x


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    data, features = load("digits").read(slice(None)), load_features("digits")
    real, noise = features(data), torch.randn(512, *data.shape[1:], generator=torch.Generator().manual_seed(9))
    errors: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    distances: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for table in TABLES:
        for seed in args.seeds:
            net = train(diffusers.DDIMScheduler(**TABLES[table]).alphas_cumprod, data, args.steps, seed)
            reference = sample(net, scheduler(table, "dpmpp-2m", "trailing", 1000), noise)
            best = frechet_distance(features(reference), real)
            print(f"{table}, seed {seed}: Frechet distance {best:.2f} at all steps", flush=True)
            for solver in SOLVERS:
                for calls in CALLS:
                    for grid in GRIDS:
                        x = sample(net, scheduler(table, solver, grid, calls), noise)
                        gap = (x - reference).flatten(1).norm(dim=1).mean() / data[0].numel() ** 0.5
                        errors[solver, grid, calls].append(float(gap))
                        distances[solver, grid, calls].append(frechet_distance(features(x), real))
    for title, found in (("distance to all steps", errors), ("Frechet distance", distances)):
        print(f"\n{title}\n\n| solver | grid | {' | '.join(map(str, CALLS))} |\n{'|---' * (len(CALLS) + 2)}|")
        for solver in SOLVERS:
            for grid in GRIDS:
                row = [sum(found[solver, grid, n]) / len(found[solver, grid, n]) for n in CALLS]
                print(f"| {solver} | {grid} | " + " | ".join(f"{value:.3g}" for value in row) + " |")


if __name__ == "__main__":
    main()
