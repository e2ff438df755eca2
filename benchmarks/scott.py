"""What the noise of SCott's teacher does to the modes of a mixture on the line, and what the game puts back.

    python benchmarks/scott.py --picture docs/img/scott.png

Small students of one call are trained on two modes with weak and with strong noise in the teacher's steps, without an
adversary and with one.  Strong noise makes the fixed point the mean over stochastic paths, between the modes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Mixture1D
from fewstep.methods.consistency.scott import StochasticConsistencyDistillation
from fewstep.methods.method import Batch, Progress
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching

SCHEDULE = FlowMatching(t_max=0.99)
#: Weak noise, strong noise, and strong noise with a game.
CASES = {"eta = 0.1": (0.1, 0.0), "eta = 0.4": (0.4, 0.0), "eta = 0.4, with the game": (0.4, 1.0)}


def two_modes() -> Mixture1D:
    both = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return Mixture1D(SCHEDULE, torch.ones(2, dtype=torch.float64), both, torch.full((2,), 0.2, dtype=torch.float64))


def network(seed: int) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NetworkDenoiser(MLP((1,), 32, 2), SCHEDULE, TrigPrediction(sigma_data=1.0), (1,))


def one_call(eta: float, gan_weight: float, iterations: int = 300, n: int = 256, seed: int = 0) -> Tensor:
    """Samples ``[4000]`` of a student after some iterations, at a rate that falls to 0."""
    world: Any = two_modes().float()
    method = StochasticConsistencyDistillation(
        guidance_max=1.0, skip=100, steps=(1,), mu=0.9, noise=eta, gan_weight=gan_weight, critic_lr=1e-2, lr=5e-3
    )
    torch.manual_seed(seed)  # the heads' first weights
    nets = method.networks(Start(world, given={"student": network(0), "guide": network(1)}))
    optimizers = {name: torch.optim.Adam(nets.group_parameters(name), group.lr) for name, group in nets.groups.items()}
    rng = Rng(seed)
    for k in range(iterations):
        batch = Batch(world.sample(n, rng).float(), None, Rng(seed, "iteration", k))
        for update in method.updates(nets, batch, Progress(k, fraction=k / iterations)):
            optimizer = optimizers[str(update.group)]
            for group in optimizer.param_groups:
                group["lr"] = nets.groups[str(update.group)].lr * (1 - k / iterations)
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            if update.then is not None:
                update.then()
    with torch.no_grad():
        made: Tensor = method.student(nets)(rng.normal(4000, 1), None, 1)
    return made.flatten()


def at_modes(x: Tensor) -> float:
    """The share of samples within two standard deviations of a mode; 0.95 of the data."""
    return float(((x.abs() - 1).abs() < 0.4).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    made = {name: one_call(*case) for name, case in CASES.items()}
    for name, x in made.items():
        print(f"{name}: deviation {float(x.std()):.2f}, at a mode {at_modes(x):.2f}")
    if chosen.picture:
        draw(made, chosen.picture)


def draw(made: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    world, x = two_modes(), torch.linspace(-2, 2, 401, dtype=torch.float64)
    density = world.log_density(x[:, None], world.schedule.t_min).exp()
    figure, axes = plt.subplots(1, len(made), figsize=(9, 2.4), sharex=True, sharey=True, layout="constrained")
    for axis, (name, samples) in zip(axes, made.items(), strict=True):
        axis.hist(samples.numpy(), 80, range=(-2, 2), density=True, color="#7aa6c2")
        axis.plot(x, density, color="#333333", linewidth=1)
        axis.set_title(f"{name}: {100 * at_modes(samples):.0f} % at a mode", fontsize=9)
        axis.set_yticks([])
        axis.set_ylim(0, 1.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
