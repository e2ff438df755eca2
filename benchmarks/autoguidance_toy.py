"""Guidance in the plane: what classifier-free guidance and autoguidance do to a law with branches.

    python benchmarks/autoguidance_toy.py --picture docs/img/autoguidance.png --seeds 0 1 2

Small score models are trained on the fractal law of two classes (:mod:`fewstep.exact.fractal`): a main model of
class A, a guide of class A that is half as wide and trained for an eighth, and an equally small guide of both classes.
Samples of class A are then drawn without guidance, with classifier-free guidance away from the guide of both classes
and with autoguidance away from the guide of class A.  Since the law is known, what guidance does is counted: the share
of samples outside the region that holds 99 % of the class, the share of its branches that are reached, and the total
variation between how often each branch is drawn and how probable it is.

The recipe is that of Karras et al. 2024 with three savings for one core: trees of 5 levels instead of 7 (``--levels``),
batches of 1024 instead of 4096 (``--batch``), drawn from a fixed pool of noised states (``--pool``).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond, Denoiser
from fewstep.exact.fractal import Fractal, density_level
from fewstep.grids import karras
from fewstep.guidance import Autoguided
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling import sample
from fewstep.schedules import EDM, as_time
from fewstep.training.ema import Average
from fewstep.training.profiles import Power

SCHEDULE = EDM(t_min=0.002, t_max=5.0)
SIGMA_DATA = 0.5
CLASS_A, BOTH = 0, -1
SHARE = 0.99  # of the class inside the region that samples should stay in


class UnitLinear(nn.Module):
    """A linear layer with rows of unit norm: inputs of unit variance leave with unit variance."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ nn.functional.normalize(self.weight, dim=1).T

    @torch.no_grad()
    def renormalise(self) -> None:
        """Keep every number of the weight near 1, so that a learning rate means the same all along."""
        self.weight.copy_(nn.functional.normalize(self.weight, dim=1) * self.weight.shape[1] ** 0.5)


class ScoreModel(Denoiser):
    """A log-density ``mean(y^2) gain / sigma - |x_in|^2 / 2`` from a magnitude-preserving MLP ``y``; its score is taken
    by automatic differentiation.  The law of one class, so it takes no condition."""

    def __init__(self, width: int, layers: int = 4) -> None:
        super().__init__(SCHEDULE, (2,))
        self.hidden = nn.ModuleList(UnitLinear(4 if i == 0 else width, width) for i in range(layers))
        self.leave = UnitLinear(width, width)
        self.gain = nn.Parameter(torch.zeros(()))

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Up to a number that depends on ``sigma [B]`` only."""
        x_in = x * (sigma**2 + SIGMA_DATA**2).rsqrt()[:, None]
        y = torch.cat([x_in, (sigma.log() / 4)[:, None], torch.ones_like(sigma)[:, None]], 1)
        for layer in self.hidden:
            y = nn.functional.silu(layer(y)) / 0.596  # 0.596: root mean square of silu of a standard normal
        return self.leave(y).square().mean(1) * self.gain / sigma - x_in.square().sum(1) / 2

    def learned_score(self, x: Tensor, sigma: Tensor, keep_graph: bool = False) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_density(x, sigma).sum(), x, create_graph=keep_graph)[0]

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        sigma = as_time(t, x).to(x)
        return x + (sigma**2)[:, None] * self.learned_score(x, sigma)


class States:
    """Noised states with their exact scores, made once: the mixture is a hundred times dearer than the network."""

    def __init__(self, world: Fractal, label: int, n: int, rng: Rng) -> None:
        cond = torch.full((n,), label)
        self.sigma = torch.exp(-2.3 + 1.5 * rng.normal(n))
        self.x = world.sample(n, rng, cond).float() + self.sigma[:, None] * rng.normal(n, 2)
        parts = zip(*(part.split(512) for part in (self.x, self.sigma, cond)), strict=True)
        self.score = torch.cat([world.score(x, sigma, labels) for x, sigma, labels in parts])

    def batch(self, size: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        rows = rng.integers(size, 0, len(self.x))
        return self.x[rows], self.sigma[rows], self.score[rows]


def trained(states: States, width: int, iterations: int, batch: int, seed: int) -> ScoreModel:
    """A model after so many iterations, with its weights averaged over 1 % of the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights", width))
        model = ScoreModel(width)
    rng = Rng(seed, "training", width)
    weights = list(model.parameters())
    average = Average(Power(0.01), weights)
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.99))
    for i in range(iterations):
        x, sigma, score = states.batch(batch, rng)
        loss = (sigma[:, None] * (model.learned_score(x, sigma, keep_graph=True) - score)).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 1e-2 / math.sqrt(max(i / 512, 1))
        optimiser.step()
        for layer in (*model.hidden, model.leave):
            layer.renormalise()
        average.update(weights)
    with torch.no_grad():
        torch._foreach_copy_(weights, average.weights)
    return model


def drawn(model: Denoiser, n: int, seed: int) -> Tensor:
    """Samples by 32 Heun steps, the last one to pure data."""
    grid = torch.cat([karras(SCHEDULE, 31), torch.zeros(1, dtype=torch.float64)])
    return sample(model, n, solver="heun", grid=grid, seed=seed)


class Judge:
    """Counts where samples of class A lie."""

    def __init__(self, world: Fractal, rng: Rng) -> None:
        self.world = world
        self.level = density_level(world, torch.full((20_000,), CLASS_A), SHARE, rng)

    def __call__(self, x: Tensor) -> dict[str, float]:
        x = x.double()
        cond = torch.full((len(x),), CLASS_A)
        parts = zip(x.split(512), cond.split(512), strict=True)
        inside = torch.cat([self.world.log_density(a, 0.0, b) >= self.level for a, b in parts])
        parts = zip(x[inside].split(512), cond[inside].split(512), strict=True)
        found = torch.cat([self.world.branch_of(a, b) for a, b in parts])
        expected = self.world.branch_shares(CLASS_A)
        share = torch.bincount(found, minlength=len(expected)) / len(found)
        mine = expected > 0
        return {
            "outside": 1 - float(inside.double().mean()),
            # a branch counts as reached when it gets at least a tenth of its due
            "branches": float((share[mine] > 0.1 * expected[mine]).double().mean()),
            "variation": float((share - expected).abs().sum() / 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--n", type=int, default=8192, help="samples of each kind (default 8192)")
    parser.add_argument("--iterations", type=int, default=4096, help="of the main model, 8 times those of the guides")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--levels", type=int, default=5, help="generations of branches (default 5)")
    parser.add_argument("--pool", type=int, default=65536, help="states with their exact scores (default 65536)")
    parser.add_argument("--autoguidance", nargs="+", type=float, default=[2.0, 3.0], help="weights (default 2 3)")
    parser.add_argument("--cfg", nargs="+", type=float, default=[2.0, 4.0], help="weights (default 2 4)")
    parser.add_argument("--picture", type=Path, help="draw the samples of the first seed")
    chosen = parser.parse_args()

    world = Fractal(SCHEDULE, chosen.levels)
    w_free, w_auto = chosen.cfg[-1], chosen.autoguidance[-1]
    judge = Judge(world, Rng("level"))
    found: dict[str, list[dict[str, float]]] = {}
    for seed in chosen.seeds:
        start = time.perf_counter()
        rng = Rng(seed, "states")
        of_a, of_both = (States(world, label, chosen.pool, rng) for label in (CLASS_A, BOTH))
        main_model = trained(of_a, 64, chosen.iterations, chosen.batch, seed)
        guide = trained(of_a, 32, chosen.iterations // 8, chosen.batch, seed)
        both = trained(of_both, 32, chosen.iterations // 8, chosen.batch, seed)
        cond = torch.full((chosen.n,), CLASS_A)
        samples = {
            "exact": world.sample(chosen.n, Rng(seed, "exact"), cond),
            "the guide alone": drawn(guide, chosen.n, seed),
            "no guidance": drawn(main_model, chosen.n, seed),
        }
        for w in chosen.cfg:
            samples[f"classifier-free, w = {w:g}"] = drawn(Autoguided(main_model, both, w), chosen.n, seed)
        for w in chosen.autoguidance:
            samples[f"autoguidance, w = {w:g}"] = drawn(Autoguided(main_model, guide, w), chosen.n, seed)
        for name, x in samples.items():
            found.setdefault(name, []).append(judge(x))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        if chosen.picture and seed == chosen.seeds[0]:
            names = ("exact", "no guidance", f"classifier-free, w = {w_free:g}", f"autoguidance, w = {w_auto:g}")
            picture(world, judge, {name: samples[name] for name in names}, chosen.picture)
    print(f"\n{chosen.n} samples, {len(chosen.seeds)} seeds, mean ± standard deviation over seeds\n")
    print("| samples of class A | outside the 99 % region | branches reached | total variation over branches |")
    print("|---|---:|---:|---:|")
    for name, rows in found.items():
        cells = (spread([row[key] for row in rows], digits) for key, digits in
                 (("outside", 4), ("branches", 3), ("variation", 3)))  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the value alone of one seed."""
    value = f"{statistics.fmean(values):.{digits}f}"
    return value if len(values) < 2 else f"{value} ± {statistics.stdev(values):.{digits}f}"


def picture(world: Fractal, judge: Judge, samples: dict[str, Tensor], out: Path) -> None:
    """One panel for each way of sampling: points over the region that holds 99 % of the class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = 360
    across, up = torch.linspace(-0.9, 1.45, side).double(), torch.linspace(-1.1, 0.85, side).double()
    places = torch.cartesian_prod(up, across).flip(1).split(512)
    density = torch.cat([world.log_density(rows, 0.0, torch.full((len(rows),), CLASS_A)) for rows in places])
    ranges = [judge.level, float(density.max()) + 1]
    figure, panels = plt.subplots(1, len(samples), figsize=(3.0 * len(samples), 3.1))
    for panel, (name, x) in zip(panels, samples.items(), strict=True):
        panel.contourf(across, up, density.reshape(side, side), levels=ranges, colors="#d5dbe3")
        panel.contour(across, up, density.reshape(side, side), levels=ranges[:1], colors="#7a8fa8", linewidths=0.4)
        panel.scatter(x[:2500, 0], x[:2500, 1], s=0.7, c="#c2410c", linewidths=0)
        panel.set(xlim=(-0.9, 1.45), ylim=(-1.1, 0.85), xticks=[], yticks=[], aspect="equal")
        panel.set_title(f"{name}\n{100 * judge(x)['outside']:.1f} % outside", fontsize=9)
        for edge in panel.spines.values():
            edge.set_visible(False)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
