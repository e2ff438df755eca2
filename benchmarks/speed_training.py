"""What the trainer costs: time of an iteration over a bare loop of the same passes, per method, in one run.

    python benchmarks/speed_training.py [--batch 32] [--rounds 15] [--methods cm dmd2]

The bare loops are written out below in plain PyTorch, as one would in a notebook: the same network passes in the same
gradient modes, the paper's loss in float32, fused Adam; one fixed batch, no averages, no clipping, no checks, no
records, no explicit random numbers.  Iterations of the two alternate, and the median of their ratios is printed.  The
fixed cost is the difference in milliseconds on a network so small that its passes cost next to nothing.  Everything
runs on one thread and is timed in processor time, which a busy machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveDistillation
from fewstep.methods.flow_maps.rectified_flow import ReflowDistillation
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Method
from fewstep.methods.parts.heads import FeatureHead
from fewstep.methods.parts.identities import TimeWeight
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP, UNet
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings

Iteration = Callable[[], None]
SD = 0.5


def adam(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], 1e-4, fused=True)


def descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1))


def noised(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """TrigFlow's ``x_t`` and its noise."""
    z = SD * torch.randn_like(x)
    return column(t, x).cos() * x + column(t, x).sin() * z, z


def denoise(net: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return column(t, x).cos() * x - column(t, x).sin() * SD * net(x / SD, t, y)


def ddim(net: nn.Module, x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
    c = column(t - s, x)
    return c.cos() * x - c.sin() * SD * net(x / SD, t, y)


def bare_denoising(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    optimiser = adam(net)

    def iteration() -> None:
        t = 0.1 + 1.3 * torch.rand(len(x))
        x_t, z = noised(x, t)
        target = (column(t, x).cos() * z - column(t, x).sin() * x) / SD
        descend(mse_loss(net(x_t / SD, t, y), target), optimiser)

    return iteration


def bare_cm(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    teacher, target, optimiser = copy.deepcopy(net), copy.deepcopy(net), adam(net)

    def iteration() -> None:
        t = 0.1 + 1.3 * torch.rand(len(x))
        s = t - 0.05
        x_t, _ = noised(x, t)
        out = denoise(net, x_t, t, y)
        with torch.no_grad():
            first = teacher(x_t / SD, t, y)
            ahead = x_t - 0.05 * SD * first
            x_s = x_t - 0.05 * SD * (first + teacher(ahead / SD, s, y)) / 2
            aim = denoise(target, x_s, s, y)
        descend(mse_loss(out, aim), optimiser)
        with torch.no_grad():
            torch._foreach_copy_(list(target.parameters()), list(net.parameters()))

    return iteration


def bare_scm(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    teacher, weight = copy.deepcopy(net), TimeWeight()
    optimiser = adam(net, weight)

    def iteration() -> None:
        t = 0.1 + 1.3 * torch.rand(len(x))
        x_t, _ = noised(x, t)
        cos, sin = column(t, x).cos(), column(t, x).sin()
        with torch.no_grad():
            v = SD * teacher(x_t / SD, t, y)
            f_minus, j = torch.func.jvp(
                lambda a, b: net(a, b, y), (x_t / SD, t), (cos * sin * v / SD, t.cos() * t.sin())
            )
            g = -(cos**2) * (SD * f_minus - v) - (cos * sin * x_t + SD * j)
            g = g / (column(g.flatten(1).norm(dim=1), x) + 0.1)
        w = weight(t)
        error = (net(x_t / SD, t, y) - f_minus - g).square().flatten(1).mean(1)
        descend((w.exp() * error - w).mean(), optimiser)

    return iteration


def bare_dmd2(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    teacher, critic, head = copy.deepcopy(net), copy.deepcopy(net), FeatureHead(net.feature_shape)
    student_optimiser, critic_optimiser = adam(net), adam(critic, head)
    end = torch.full((len(x),), 1.5)

    def told(images: Tensor, labels: Tensor) -> Tensor:
        t = 0.1 + 1.3 * torch.rand(len(images))
        return head(critic.features(noised(images, t)[0] / SD, t, labels))

    def iteration() -> None:
        fake = denoise(net, SD * torch.randn_like(x), end, y)
        t = 0.1 + 1.3 * torch.rand(len(x))
        with torch.no_grad():
            x_t, _ = noised(fake, t)
            real = denoise(teacher, x_t, t, y)
            g = (denoise(critic, x_t, t, y) - real) / (fake - real).abs().mean((1, 2, 3), keepdim=True)
        critic.requires_grad_(False)
        head.requires_grad_(False)
        loss = 0.5 * mse_loss(fake, (fake - g).detach()) + 3e-3 * softplus(-told(fake, y)).mean()
        critic.requires_grad_(True)
        head.requires_grad_(True)
        descend(loss, student_optimiser)
        fake = fake.detach()
        x_t, z = noised(fake, t)
        target = (column(t, x).cos() * z - column(t, x).sin() * fake) / SD
        loss = mse_loss(critic(x_t / SD, t, y), target)
        on_real, on_fake = told(torch.cat([x, fake]), torch.cat([y, y])).chunk(2)
        descend(loss + 1e-2 * (softplus(on_fake) + softplus(-on_real)).mean(), critic_optimiser)

    return iteration


def bare_pd(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    teacher, optimiser = copy.deepcopy(net), adam(net)
    end = torch.full((len(x),), 1.5)

    def iteration() -> None:
        x_t, _ = noised(x, end)
        with torch.no_grad():
            middle = ddim(teacher, x_t, end, end / 2, y)
            target = denoise(teacher, middle, end / 2, y)
        descend(mse_loss(denoise(net, x_t, end, y), target), optimiser)

    return iteration


def bare_reflow(net: nn.Module, x: Tensor, y: Tensor) -> Iteration:
    optimiser, noise, end = adam(net), torch.randn_like(x), torch.full((len(x),), 1.5)

    def iteration() -> None:
        descend(mse_loss(denoise(net, noise, end, y), x), optimiser)

    return iteration


Bare = Callable[[nn.Module, Tensor, Tensor], Iteration]
METHODS: dict[str, tuple[Method, Bare]] = {
    "denoising": (Denoising(), bare_denoising),
    "cm": (ConsistencyDistillation(), bare_cm),
    "scm": (ContinuousConsistencyDistillation(), bare_scm),
    "dmd2": (DMD2(critic_steps=1), bare_dmd2),
    "pd": (ProgressiveDistillation(), bare_pd),
    "reflow-distil": (ReflowDistillation(), bare_reflow),
}


def teacher(big: bool) -> NetworkDenoiser:
    """About a million parameters on 28x28, or a few thousand on 8x8."""
    shape = (1, 28, 28) if big else (1, 8, 8)
    net = UNet(shape, (40, 80), 1, 128, 10) if big else MLP(shape, 16, 1, 10)
    return NetworkDenoiser(net, TrigFlow(sigma_data=SD), TrigPrediction(sigma_data=SD), shape, 10)


def compare(method: Method, bare: Bare, big: bool, batch: int, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of an iteration, ours and bare, and the median ratio of neighbours."""
    model = teacher(big)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, *model.shape, generator=generator)
    data = Dataset("random", x, torch.arange(256) % 10, columns={"noise": x.flip(0)})
    net = copy.deepcopy(model.net)
    settings = Settings(Budget(10**6), batch=batch, precision="fp32")
    run = Run(method, method.networks(Start(model)), settings, Parallel())
    ways = [lambda: run.step(data), bare(net, x[:batch], torch.arange(batch) % 10)]
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 2):
        for which in (0, 1) if k % 2 else (1, 0):
            start = time.process_time()
            ways[which]()
            if k >= 2:
                times[which].append(1e3 * (time.process_time() - start))
    ratios = [ours / plain for ours, plain in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples an iteration on the larger network")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of iterations measured on the larger network")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    size = sum(p.numel() for p in teacher(True).parameters())
    print(f"{size:,} parameters, batch {chosen.batch}, one thread, processor time")
    print(f"{'method':16}{'ours ms':>10}{'bare ms':>10}{'ratio':>8}{'fixed ms':>10}")
    for name in chosen.methods:
        method, bare = METHODS[name]
        ours, plain, ratio = compare(method, bare, True, chosen.batch, chosen.rounds)
        small, small_plain, _ = compare(method, bare, False, 8, 150)
        print(f"{name:16}{ours:10.1f}{plain:10.1f}{ratio:8.3f}{small - small_plain:10.2f}", flush=True)


if __name__ == "__main__":
    main()
