"""A training iteration of DMD2, f-distill and LADD beside NVIDIA's FastGen (NVlabs/FastGen, Apache-2.0), in one run.

    git clone https://github.com/NVlabs/FastGen
    pip install attrs omegaconf loguru einops ftfy
    python benchmarks/fastgen.py --fastgen FastGen [--size large small] [--rounds 30] [--batch 8] [--memory]

Both libraries train the same thing: FastGen's own EDM network (SongUNet, class-conditional, random weights), FastGen's
own discriminator on the bottleneck of the frozen teacher, AdamW (fused), one average of the weights, the same data in
float32.  FastGen's iteration is its ``Trainer.train_step`` with the callbacks of its configurations (clipping, average)
and its ``preprocess_data``; ours is ``Run.step`` with its records.  *Bare* are the same passes, losses and optimizers
in plain PyTorch, with nothing else.

The unit is a round: one update of the student and ``k`` of the critic (and the discriminator), k = 4 for DMD2 and
f-distill, 1 for LADD.  FastGen takes k + 1 iterations for it and the bare loop too; ours takes k, since its critic
learns from the student's sample in the student's iteration as well.  Iterations of the three take turns in an order
that changes, and the ratios are medians over rounds.  Processor time, one thread.  Memory (Linux) is the peak of the
resident set of a process that trains with one library alone, above what it holds once both are imported.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastgen_training import CLASSES, CLIP, CRITIC_UPDATES, GAN, RATE, SIZES, FastGen, Setup, put_on_path, set_up
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot, softplus

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.f_distill import FDistill
from fewstep.methods.matching.ladd import LADD
from fewstep.methods.method import Method, Progress, Update
from fewstep.methods.start import Start
from fewstep.predictions import EDMPrediction
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings


class Unet(nn.Module):
    """FastGen's SongUNet as a network of ours: class labels as numbers, -1 for none."""

    def __init__(self, net: nn.Module, feature_shape: tuple[int, ...], last: int) -> None:
        super().__init__()
        self.net, self.feature_shape, self.last = net, feature_shape, last
        self.register_buffer("table", torch.cat([torch.eye(CLASSES), torch.zeros(1, CLASSES)]), persistent=False)

    table: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        labels = self.table[-1:] if cond is None else self.table[cond]
        out: Tensor = self.net(x, t.to(x.dtype), labels, feature_indices=())
        return out

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        labels = self.table[-1:] if cond is None else self.table[cond]
        found: list[Tensor] = self.net(
            x, t.to(x.dtype), labels, return_features_early=True, feature_indices={self.last}
        )
        return found[0]


class TheirHeads(nn.Module):
    """FastGen's discriminator in the place of our heads."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.heads = copy.deepcopy(heads)

    def forward(self, features: list[Tensor]) -> Tensor:
        logits: Tensor = self.heads(features)
        return logits

    def follow(self) -> None:
        """Nothing is to be done after an update."""


def our_method(name: str, layers: tuple[str, ...]) -> Method:
    """One step, the same weights and rates, nothing else than the defaults."""
    if name == "ladd":
        return LADD(
            steps=(1,), probabilities=(1.0,), first_probabilities=(1.0,), layers=layers, projection=0, pairs=0,
            lr=RATE, discriminator_lr=RATE, clip=CLIP, warmup=0,
        )  # fmt: skip
    shared: dict[str, Any] = {
        "critic_steps": CRITIC_UPDATES[name], "gan_weight": GAN, "discriminator_weight": 1.0, "lr": RATE,
        "critic_lr": RATE, "clip": CLIP, "warmup": 0, "discriminator": "teacher",
    }  # fmt: skip
    return DMD2(**shared) if name == "dmd2" else FDistill(divergence="js", **shared)


class Timed(Run):
    """A run that notes when each group had moved."""

    marks: list[tuple[str, float]]

    def apply(self, updates: list[Update], progress: Progress) -> tuple[bool, dict[str, Tensor | float]]:
        moved = super().apply(updates, progress)
        self.marks.append((updates[0].groups[0], time.process_time()))
        return moved


class Ours:
    """Our run, an iteration at a time."""

    def __init__(self, setup: Setup) -> None:
        side = min(setup.heads.in_res)
        last = len(setup.heads_config.all_res) - 1
        net = Unet(copy.deepcopy(setup.network.model), (setup.heads.in_channels, side, side), last)
        shape = tuple(setup.x.shape[1:])
        model = NetworkDenoiser(net, EDM(), EDMPrediction(sigma_data=setup.network.sigma_data), shape, CLASSES)
        check_same(setup, model)
        self.data = Dataset("random", setup.x, setup.labels)
        layers = (f"net.enc.{side}x{side}_block3",)
        method = our_method(setup.method, layers)
        nets = method.networks(Start(model, self.data))
        nets.discriminator.heads = TheirHeads(setup.heads)
        self.run = Timed(method, nets, Settings(Budget(10**6), batch=setup.batch, precision="fp32"), Parallel())

    def step(self) -> list[tuple[str, float]]:
        """The next iteration: what was updated, and the milliseconds up to there."""
        run = self.run
        run.marks = []
        begun = time.process_time()
        run.step(self.data)
        if run.steps % run.settings.log_steps == 0:
            run.record()
        run.marks[-1] = (run.marks[-1][0], time.process_time())
        found, before = [], begun
        for group, mark in run.marks:
            found.append(("student" if group == "student" else "critic", 1e3 * (mark - before)))
            before = mark
        return found


def check_same(setup: Setup, model: NetworkDenoiser) -> None:
    """SystemExit unless the two libraries see the same denoiser in the network."""
    t = torch.tensor([0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    x = setup.x[:4] + t.float()[:, None, None, None] * torch.randn_like(setup.x[:4])
    with torch.no_grad():
        theirs = setup.network.eval()(x, t, condition=one_hot(setup.labels[:4], CLASSES).float())
        gap = float((theirs - model(x, t, setup.labels[:4])).abs().max() / theirs.abs().max())
    if gap > 1e-5:
        raise SystemExit(f"the two denoisers differ by {gap:.1e} of the largest number")


class Bare:
    """The passes, losses and optimizers alone."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.place = setup, 0
        self.student, self.critic, self.teacher = (copy.deepcopy(setup.network).train() for _ in range(3))
        self.heads, self.average = copy.deepcopy(setup.heads), copy.deepcopy(list(self.student.parameters()))
        self.teacher.eval().requires_grad_(False)
        self.optimizers = [
            torch.optim.AdamW(net.parameters(), RATE, fused=True) for net in (self.student, self.critic, self.heads)
        ]
        self.x, self.cond = setup.x[: setup.batch], one_hot(setup.labels[: setup.batch], CLASSES).float()

    def times(self) -> Tensor:
        return torch.exp(3 * torch.randn(len(self.x))).clamp(0.002, 80)

    def noised(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t[:, None, None, None] * torch.randn_like(x)

    def sample(self) -> Tensor:
        x: Tensor = self.student(80 * torch.randn_like(self.x), torch.full((len(self.x),), 80.0), self.cond)
        return x

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """By a pass of the teacher that stops at the features."""
        asked = self.heads.feature_indices
        return self.heads(self.teacher(x_t, t, self.cond, return_features_early=True, feature_indices=asked))

    def descend(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def update_student(self) -> None:
        self.critic.requires_grad_(False)
        self.heads.requires_grad_(False)
        x, t = self.sample(), self.times()
        x_t = self.noised(x, t)
        if self.setup.method == "ladd":
            loss = softplus(-self.logits(x_t, t)).mean()
        else:
            with torch.no_grad():
                fake = self.critic(x_t, t, self.cond)
            real, features = self.teacher(x_t, t, self.cond, feature_indices=self.heads.feature_indices)
            with torch.no_grad():
                g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
            loss = 0.5 * mse_loss(x, (x - g).detach()) + GAN * softplus(-self.heads(features)).mean()
        self.descend(loss, self.optimizers[0])
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.student.parameters()), 1e-4)
        self.critic.requires_grad_(True)
        self.heads.requires_grad_(True)

    def update_critic(self) -> None:
        with torch.no_grad():
            x, t = self.sample(), self.times()
            x_t = self.noised(x, t)
            real = self.noised(self.x, self.times())
        loss = softplus(self.logits(x_t, t)).mean() + softplus(-self.logits(real, t)).mean()
        if self.setup.method == "ladd":
            self.descend(loss, self.optimizers[2])
            return
        loss = loss + mse_loss(self.critic(x_t, t, self.cond), x)
        self.descend(loss, *self.optimizers[1:])

    def step(self) -> list[tuple[str, float]]:
        kind = "critic" if self.place % (self.setup.updates + 1) else "student"
        self.place += 1
        begun = time.process_time()
        (self.update_critic if kind == "critic" else self.update_student)()
        return [(kind, 1e3 * (time.process_time() - begun))]


SIDES: dict[str, Callable[[Setup], Any]] = {"fastgen": FastGen, "ours": Ours, "bare": Bare}


def one_round(sides: dict[str, Any], updates: int, turn: int) -> dict[str, dict[str, float]]:
    """One update of the student and so many of the critic by each, in turns: mean milliseconds by kind, and all."""
    taken: dict[str, list[tuple[str, float]]] = {name: [] for name in sides}
    names = list(sides)
    for slot in range(updates + 1):
        start = (turn + slot) % len(names)
        for name in names[start:] + names[:start]:
            if name != "ours" or slot < updates:
                taken[name] += sides[name].step()
    found = {}
    for name, steps in taken.items():
        # where a round has an iteration of the critic alone, that is what its update costs; else what follows
        alone = [ms for kind, ms in (steps[2:] if name == "ours" and updates > 1 else steps) if kind == "critic"]
        student = sum(ms for kind, ms in steps if kind == "student")
        found[name] = {"student": student, "critic": statistics.mean(alone), "round": sum(ms for _, ms in steps)}
    return found


def compare(setup: Setup, rounds: int) -> list[str]:
    """Rows of the table: medians, and the medians of the ratios of rounds."""
    sides = {name: make(setup) for name, make in SIDES.items()}
    for turn in range(2):
        one_round(sides, setup.updates, turn)
    found = [one_round(sides, setup.updates, turn) for turn in range(rounds)]
    rows = []
    for kind in ("student", "critic", "round"):
        theirs, ours, bare = ([one[name][kind] for one in found] for name in SIDES)
        pairs = [a / b for a, b in zip(theirs, ours, strict=True)]
        quarter = statistics.quantiles(pairs, n=4)
        label = f"1 + {setup.updates}" if kind == "round" else kind
        rows.append(
            f"| {setup.method} | {label} | {statistics.median(theirs):.1f} | {statistics.median(ours):.1f} | "
            f"{statistics.median(bare):.1f} | {quarter[1]:.2f} ({quarter[0]:.2f}–{quarter[2]:.2f}) |"
        )
    return rows


def status(name: str) -> float:
    """A line of this process's status, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def peak(setup: Setup, side: str) -> float:
    """Megabytes of the resident set at its peak in two rounds, above what is there before the networks are made."""
    one_round({"bare": Bare(replace(setup, batch=1))}, 1, 0)  # what PyTorch itself loads at first use
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    trained = {side: SIDES[side](setup)}
    for turn in range(2):
        one_round(trained, setup.updates, turn)
    return status("VmHWM") - before


def alone(command: list[str]) -> str:
    """What a process of its own prints, in which every tensor that is let go of goes back to the system at once."""
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768"}
    return subprocess.check_output(command, text=True, env=given).split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastgen", type=Path, required=True, help="a checkout of NVlabs/FastGen")
    parser.add_argument("--methods", nargs="+", choices=CRITIC_UPDATES, default=list(CRITIC_UPDATES))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--memory", action="store_true", help="the peak of memory in place of times (Linux)")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    put_on_path(chosen.fastgen)
    if chosen.alone:
        print(peak(set_up(chosen.methods[0], chosen.size[0], chosen.batch), chosen.alone))
        return
    for size in chosen.size:
        setup = set_up(chosen.methods[0], size, chosen.batch)
        numbers = sum(p.numel() for p in setup.network.parameters())
        print(f"\n{size}: {numbers:,} parameters, {list(setup.x.shape[1:])}, batch {chosen.batch}, one thread\n")
        if chosen.memory:
            print("| method | FastGen MB | ours MB | bare MB |\n|---|---:|---:|---:|")
        else:
            print("| method | updates | FastGen ms | ours ms | bare ms | FastGen / ours |")
            print("|---|---|---:|---:|---:|---:|")
        for method in chosen.methods:
            if chosen.memory:
                ask = [sys.executable, __file__, "--fastgen", str(chosen.fastgen), "--batch", str(chosen.batch)]
                ask += ["--methods", method, "--size", size]
                told = [alone([*ask, "--alone", side]) for side in SIDES]
                print(f"| {method} | {' | '.join(f'{float(value):.0f}' for value in told)} |", flush=True)
                continue
            for row in compare(set_up(method, size, chosen.batch), chosen.rounds):
                print(row, flush=True)


if __name__ == "__main__":
    main()
