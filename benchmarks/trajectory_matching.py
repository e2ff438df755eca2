"""TDM and Phased DMD beside DMD2: students of four calls on a mixture in the plane and on the digits.

    python benchmarks/trajectory_matching.py toy --seeds 0 1 2     two classes of five modes, the rarest a tenth
    python benchmarks/trajectory_matching.py digits                the bundled teacher
    python benchmarks/trajectory_matching.py pictures docs/img     phased-dmd.png and tdm.png

``spread`` is the mean distance of two samples under the same condition, 1 that of the data (on the digits in the
features of their classifier); ``rare`` the share of samples in the two rarest modes of a class, 1 that of the data.
The energy distance and the Fréchet distance say how near the laws are.  The teacher of the mixture is a network trained
on it.  All students have the same number of iterations; one of TDM's moves its student, one in five of the others'.
"""

from __future__ import annotations

import argparse
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from fewstep import api, grids
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import GaussianMixture
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.phased_dmd import PhasedDMD
from fewstep.methods.matching.tdm import TDM
from fewstep.methods.method import Recipe
from fewstep.methods.teachers.denoising import FlowMatchingTraining
from fewstep.metrics import Evaluator, load_features
from fewstep.networks import MLP
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.sampling.rollout import Call, rollout
from fewstep.schedules import FlowMatching
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

matplotlib.use("Agg")
from matplotlib import pyplot

FLOW = FlowMatching()
#: Modes of each class, the first ones more probable.
SHARES = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)
STUDENTS: dict[str, Recipe] = {
    "DMD2, no GAN": DMD2(steps=4, gan_weight=0.0),
    "one phase, truncated (SGTS)": PhasedDMD(phases=1, steps=4),
    "one phase, whole": PhasedDMD(phases=1, steps=4, early_exit=False),
    "Phased DMD, two by two": PhasedDMD(),
    "Phased DMD, whole phases": PhasedDMD(early_exit=False),
    "Phased DMD, the KL's weight": PhasedDMD(weight="kl"),
    "TDM, four steps": TDM(),
    "TDM, 1, 2 and 4 steps": TDM(steps=(1, 2, 4)),
}
#: Those of the toy.
TOY = ("DMD2, no GAN", "one phase, truncated (SGTS)", "one phase, whole", "Phased DMD, two by two",
       "Phased DMD, whole phases", "TDM, four steps")  # fmt: skip


def mixture() -> GaussianMixture:
    """Two classes with five modes each, on a ring and turned against each other."""
    angle = torch.arange(10, dtype=torch.float64) / 10 * 2 * torch.pi
    order = torch.tensor([0, 4, 8, 2, 6, 1, 5, 9, 3, 7])  # the modes of a class lie apart
    means = torch.stack([angle.cos(), angle.sin()], 1)[order]
    return GaussianMixture(FLOW, SHARES.repeat(2), means, torch.full((10,), 0.06**2), [0] * 5 + [1] * 5)


def toy_teacher(world: GaussianMixture, seed: int = 0) -> tuple[Denoiser, Dataset]:
    """A network trained on samples of the mixture, and these."""
    labels = torch.arange(20_000) % 2
    data = Dataset("mixture", world.sample(20_000, Rng(seed, "data"), labels).float(), labels)
    torch.manual_seed(seed)
    fresh = NetworkDenoiser(MLP((2,), 96, 3, 2), FLOW, Velocity(), (2,), 2)
    settings = Settings(Budget(2000), batch=256, seed=seed, precision="fp32")
    model = run_recipe(FlowMatchingTraining(lr=2e-3), fresh, data, settings, show=False).model
    assert isinstance(model, Denoiser)
    return model, data


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double())


def energy(a: Tensor, b: Tensor) -> float:
    """The energy distance of two sets of points."""
    n = len(a)
    inside = [distances(x, x).sum() / (n * (n - 1)) for x in (a, b)]
    return float(2 * distances(a, b).mean() - sum(inside))


def spread(x: Tensor, classes: int) -> float:
    """The mean distance of two samples under the same condition; conditions take turns."""
    parts = [x[k::classes] for k in range(classes)]
    return float(sum(distances(p, p).sum() / (len(p) * (len(p) - 1)) for p in parts)) / classes


def rare(x: Tensor, world: GaussianMixture) -> float:
    """The share of samples whose nearest mode is one of the two rarest of its class, over that of the data."""
    share = 0.0
    for k in range(2):
        near = distances(x[k::2], world.means[5 * k : 5 * k + 5]).argmin(1)
        share += float((near >= 3).double().mean()) / 2
    return share / float(SHARES[3:].sum())


def figures(x: Tensor, truth: Tensor, world: GaussianMixture) -> list[str]:
    return [
        f"energy {energy(x, truth):.4f}", f"spread {spread(x, 2) / spread(truth, 2):.3f}",
        f"rare {rare(x, world):.2f}",
    ]  # fmt: skip


def toy(seeds: list[int], steps: int) -> None:
    world = mixture()
    n, labels = 4000, torch.arange(4000) % 2
    truth = world.sample(n, Rng("truth"), labels)
    for seed in seeds:
        teacher, data = toy_teacher(world, seed)
        for calls in (4, 64):
            x = sample(teacher, n, steps=calls, solver="ddim", cond=labels, seed=seed)
            print(seed, f"teacher, {calls} calls", *figures(x, truth, world), flush=True)
        for name in TOY:
            recipe = STUDENTS[name]
            settings = Settings(Budget(steps), batch=256, seed=seed, precision="fp32")
            model: Any = run_recipe(recipe, teacher, data, settings, show=False).model
            for calls in model.plans:
                x = model.sample(n, labels, steps=calls, seed=seed)
                print(seed, f"{name}, {calls} calls", *figures(x, truth, world), flush=True)


def digits(seeds: list[int], steps: int) -> None:
    teacher, data = api.load("digits"), load_data("digits")
    features = load_features("digits")
    judge = Evaluator(load_data("digits", "test"), data, features)
    n, labels = 1000, torch.arange(1000) % 10
    order = torch.cat([(data.rows(slice(None)).cond == k).nonzero()[:100, 0] for k in range(10)])
    wide = spread(features(data.rows(order).x).reshape(10, 100, -1).transpose(0, 1).flatten(0, 1), 10)
    for seed in seeds:
        for name, recipe in STUDENTS.items():
            settings = Settings(Budget(steps), batch=64, seed=seed, precision="fp32")
            model: Any = run_recipe(recipe, teacher, data, settings, show=False).model
            for calls in model.plans:
                x = model.sample(n, labels, steps=calls, seed=seed)
                found = judge(x, labels)
                print(
                    seed, f"{name}, {calls} calls", f"Fréchet {found.frechet.value:.2f}",
                    f"accuracy {found.accuracy:.3f}", f"spread {spread(features(x), 10) / wide:.3f}", flush=True,
                )  # fmt: skip


def pictures(folder: Path, steps: int) -> None:
    world = mixture()
    teacher, data = toy_teacher(world)
    labels = torch.arange(400) % 2
    noise = Rng(0, "picture").normal(400, 2)
    data_at = {t: FLOW.add_noise(world.sample(6000, Rng(1), torch.zeros(6000).long()), Rng(2).normal(6000, 2).double(),
                                 torch.tensor(t).double()) for t in (1.0, 0.5, 0.0)}  # fmt: skip
    settings = Settings(Budget(steps), batch=256, precision="fp32")

    phased: Any = run_recipe(PhasedDMD(early_exit=False), teacher, data, settings, show=False).model
    calls: list[Call] = []
    with torch.no_grad():
        last = rollout(phased.flow_map, noise, phased.plan(), labels, calls=calls)
    figure, axes = pyplot.subplots(1, 3, figsize=(7.8, 2.7))
    states = ((1.0, calls[0].x, "noise"), (0.5, calls[1].out, "expert 1 ends here"), (0.0, last, "expert 2: data"))
    for axis, (t, x, title) in zip(axes, states, strict=True):
        law = data_at[t]
        axis.scatter(law[:, 0], law[:, 1], s=1, color="0.85", linewidths=0)
        axis.scatter(x[::2, 0], x[::2, 1], s=5, color="C0", linewidths=0)
        axis.set_title(title, fontsize=9)
    finish(figure, axes, folder / "phased-dmd.png")

    tdm: Any = run_recipe(TDM(), teacher, data, settings, show=False).model
    calls = []
    with torch.no_grad():
        last = rollout(tdm.flow_map, noise, tdm.plan(), labels, calls=calls)
    times = grids.even(FLOW, 4)
    own = [noise]
    with torch.no_grad():
        for t, s in pairwise(times):
            own.append(own[-1] + float(s - t) * teacher.velocity(own[-1], t, labels))
    figure, axes = pyplot.subplots(1, 2, figsize=(6.4, 3.2))
    for axis, path, title in (
        (axes[0], torch.stack(own), "the teacher's four DDIM steps"),
        (axes[1], torch.stack([*(c.x for c in calls), last]), "TDM: four steps of its own"),
    ):
        law = data_at[0.0]
        axis.scatter(law[:, 0], law[:, 1], s=1, color="0.8", linewidths=0)
        axis.plot(path[:, :120:2, 0], path[:, :120:2, 1], color="C0", linewidth=0.4, alpha=0.5)
        axis.scatter(path[-1, ::2, 0], path[-1, ::2, 1], s=5, color="C3", linewidths=0)
        axis.set_title(title, fontsize=9)
    finish(figure, axes, folder / "tdm.png")


def finish(figure: Any, axes: Any, path: Path) -> None:
    for axis in axes:
        axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    held = io.BytesIO()
    figure.savefig(held, dpi=110)
    pyplot.close(figure)
    Image.open(held).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("toy", "digits", "pictures"))
    parser.add_argument("folder", type=Path, nargs="?", help="where pictures go")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, default=800, help="iterations of every student (default 800)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "pictures":
        if args.folder is None:
            raise SystemExit("pictures: give the folder to write to, docs/img")
        pictures(args.folder, args.steps)
    else:
        {"toy": toy, "digits": digits}[args.what](args.seeds, args.steps)


if __name__ == "__main__":
    main()
