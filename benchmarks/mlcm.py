"""MLCM's segments and its states, on a mixture on the line whose flow is known.

    python benchmarks/mlcm.py --picture docs/img/mlcm.png

Left: the flow, and the jumps of an exact student of four segments, each to the lower edge of its own.  Right: the law
of states near the data that the teacher makes of noise in one step and in eight, beside that of noised data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fewstep.exact import Mixture1D
from fewstep.methods.consistency.mlcm import trajectory_states
from fewstep.methods.parts.times import Segments
from fewstep.schedules import FlowMatching

SCHEDULE = FlowMatching()
#: Where the states of the right panel are.
TIME = 0.2


def two_modes() -> Mixture1D:
    both = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return Mixture1D(SCHEDULE, torch.ones(2, dtype=torch.float64), both, torch.full((2,), 0.2, dtype=torch.float64))


def quantiles(n: int) -> torch.Tensor:
    """``n`` evenly probable points of the normal law, ``[n, 1]``."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(share)[:, None]


def distances() -> dict[int, float]:
    """By steps, the largest gap (Kolmogorov-Smirnov) between the states' distribution and that of noised data."""
    world, z = two_modes(), quantiles(2000)
    found = {}
    for steps in (1, 2, 4, 8, 16):
        made = trajectory_states(world, z, torch.full((len(z),), TIME), torch.full((len(z),), steps), steps)
        level = world.cdf(made.sort(0).values, TIME).flatten()
        found[steps] = float((level - (torch.arange(len(z)) + 0.5) / len(z)).abs().max())
    return found


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    world, edges = two_modes(), Segments(4).edges(SCHEDULE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    times = torch.linspace(1, 0, 80, dtype=torch.float64)
    z = quantiles(14)
    paths = torch.stack([world.flow(z, 1.0, float(t)) for t in times])[..., 0]
    left.plot(times, paths, color="#c9d3da", linewidth=0.8)
    jumps = torch.stack([world.flow(quantiles(4), 1.0, float(t)) for t in edges])[..., 0]
    left.plot(edges, jumps, "o-", color="#c2543c", markersize=3, linewidth=1.2)
    for edge in edges:
        left.axvline(float(edge), color="#333333", linewidth=0.5, linestyle=":")
    left.set_xlim(1, 0)
    left.set_title("four segments: jumps to the lower edge", fontsize=9)
    left.set_xlabel("t, from noise to data", fontsize=8)

    x = torch.linspace(-1.8, 1.8, 400, dtype=torch.float64)
    right.plot(x, world.log_density(x[:, None], TIME).exp(), color="#333333", linewidth=1.4, label="noised data")
    many = quantiles(4000)
    for steps, colour in ((1, "#c2543c"), (8, "#4f86a8")):
        made = trajectory_states(world, many, torch.full((len(many),), TIME), torch.full((len(many),), steps), steps)
        right.hist(
            made.flatten().numpy(), 90, range=(-1.8, 1.8), density=True, histtype="step", color=colour,
            label=f"{steps} step{'s' * (steps > 1)} of the teacher",
        )  # fmt: skip
    right.set_title(f"states at t = {TIME}", fontsize=9)
    right.legend(fontsize=7, frameon=False)
    right.set_yticks([])
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    for steps, gap in distances().items():
        print(f"{steps} steps: {gap:.3f}")
    if chosen.picture:
        draw(chosen.picture)


if __name__ == "__main__":
    main()
