"""LSD and LSD+ beside Euler, Tweedie and a temperature, at 4, 8 and 16 steps, over several seeds.

    python benchmarks/lsd.py world                      exact laws of the samplers, no sampling noise; seconds
    python benchmarks/lsd.py countdown                  a rule that samples keep or break
    python benchmarks/lsd.py text --seeds 0 1 2         a small model of letters, trained first: perplexity and entropy
    python benchmarks/lsd.py digits                     17 grey levels: Frechet distance, class accuracy
    python benchmarks/lsd.py picture docs/img/lsd.png   digits by every sampler, from the same seeds

The models are trained once into ``--work`` and read back from there.  Perplexity is that of a 5-gram model made from
the held-out part of the text.  Every row is the mean over the seeds (of the fit and of the samples), with the standard
deviation over them; entropy stands beside every perplexity and error rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.data.text import LETTERS, load_text
from fewstep.discrete.chains import Chain, Masked, Uniform
from fewstep.discrete.denoisers import DiscreteDenoiser, NetworkDiscreteDenoiser
from fewstep.discrete.exact import JointLaw, countdown, countdown_errors, sampler_law, total_variation
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.levels import to_levels, to_pictures
from fewstep.discrete.noise import Cosine, Geometric, LogLinear, TotalNoise
from fewstep.discrete.samplers import Euler, Plan, Stepper, Tempered, Tweedie, sample
from fewstep.methods.samplers.lsd import LSD, LSDPlus, least_squares
from fewstep.methods.start import Start
from fewstep.methods.teachers.discrete_denoising import DiscreteDenoising
from fewstep.metrics import Evaluator, load_features
from fewstep.metrics.tokens import NGram, token_quality
from fewstep.networks.transformer import Transformer
from fewstep.randomness import Rng
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings, train

STEPS = (4, 8, 16)
TEACHER_STEPS = 32
NOISES: dict[str, TotalNoise] = {"log-linear": LogLinear(), "cosine": Cosine(), "geometric": Geometric()}
LEVELS, SIDE = 17, 8

Fit = Callable[[DiscreteDenoiser, int, int], LearnedSampler]


def fitted(**arguments: Any) -> Fit:
    """LSD by least squares."""
    return lambda denoiser, steps, seed: least_squares(denoiser, steps, TEACHER_STEPS, 64, seed=seed, **arguments)


def trained(method: type[LSD], iterations: int = 20, **arguments: Any) -> Fit:
    """A method in the trainer; the data only say how many samples a batch has."""

    def run(denoiser: DiscreteDenoiser, steps: int, seed: int) -> LearnedSampler:
        data = Dataset("nothing", torch.zeros(64, *denoiser.shape, dtype=torch.long))
        settings = Settings(Budget(iterations), batch=16, seed=seed, precision="fp32")
        recipe = method(steps=steps, teacher_steps=TEACHER_STEPS, **arguments)
        made: Any = train(recipe, Start(denoiser, data), settings, show=False).model  # type: ignore[arg-type]
        return made

    return run


LEARNED: dict[str, Fit] = {
    "LSD": fitted(),
    "LSD, relaxed 5 %": fitted(share=0.05),
    "LSD, accumulated": fitted(target="accumulated"),
    "LSD, accumulated, restart": fitted(target="accumulated", restart=True),
    "LSD+": trained(LSDPlus, share=0.0),
}


def spread(values: Iterable[float]) -> str:
    found = list(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.fmean(found):.4g} ± {deviation:.1g}" if deviation else f"{statistics.fmean(found):.4g}"


def world(seeds: list[int]) -> None:
    """Three tokens of three values, mostly equal: total variation between the sampler's law and the data's."""
    generator = torch.Generator().manual_seed(0)
    table = 0.05 * torch.rand(3, 3, 3, generator=generator, dtype=torch.float64)
    for i in range(3):
        table[i, i, i] += 1
    print("| chain | noise | sampler | " + " | ".join(f"{k} steps" for k in STEPS) + " |")
    print("|---|---|---|" + "---|" * len(STEPS))
    chains: list[tuple[str, Chain]] = [(name, Masked(3, noise)) for name, noise in NOISES.items()]
    chains.append(("log-linear", Uniform(3)))
    for noise, chain in chains:
        law = JointLaw(chain, table)

        def distance(plan: Plan, stepper: Stepper, law: JointLaw = law) -> float:
            made = sampler_law(law, plan, stepper).reshape((law.chain.states,) * 3)[:3, :3, :3]
            return total_variation(made.flatten(), law.law)

        rows: dict[str, list[str]] = {
            name: [f"{distance(Plan.uniform(chain, k), stepper):.4f}" for k in STEPS]
            for name, stepper in {"Euler": Euler(), "Tweedie": Tweedie()}.items()
        }
        for name, fit in LEARNED.items():
            rows[name] = [spread(distance(fit(law, k, seed).plans[k], Euler()) for seed in seeds) for k in STEPS]
        for name, cells in rows.items():
            print(f"| {type(chain).__name__.lower()} | {noise} | {name} | " + " | ".join(cells) + " |", flush=True)


def samplers(denoiser: DiscreteDenoiser, steps: int, seed: int, n: int, cond: Tensor | None) -> dict[str, Tensor]:
    """Samples of every sampler."""

    def drawn(plan: Plan | int, stepper: Stepper) -> Tensor:
        return sample(denoiser, n, plan, stepper, cond=cond, seed=seed)

    made = {"Euler": drawn(steps, Euler()), "Tweedie": drawn(steps, Tweedie())}
    made["score^1.15"] = drawn(steps, Tempered(Tweedie(), 1.15))
    for name, fit in LEARNED.items():
        if "restart" in name and isinstance(denoiser.chain, Masked):
            continue  # there it changes little
        made[name] = drawn(fit(denoiser, steps, seed).plans[steps], Euler())
    return made


def compare(
    titles: tuple[str, ...], denoiser: DiscreteDenoiser, measure: Callable[[Tensor], tuple[float, ...]],
    seeds: list[int], n: int, real: Tensor, label: str, cond: Tensor | None = None,
) -> None:  # fmt: skip
    """Print a table of samplers by steps."""
    print(f"\n{label}, n={n} per seed, seeds {seeds}")
    print("| steps | sampler | " + " | ".join(titles) + " |")
    print("|---|---|" + "---|" * len(titles))

    def line(steps: str, name: str, found: list[tuple[float, ...]]) -> None:
        cells = " | ".join(spread(values) for values in zip(*found, strict=True))
        print(f"| {steps} | {name} | {cells} |", flush=True)

    line("", "real", [measure(real)])
    teacher = [measure(sample(denoiser, n, TEACHER_STEPS, Tweedie(), cond=cond, seed=seed)) for seed in seeds]
    line(str(TEACHER_STEPS), "Tweedie", teacher)
    for steps in STEPS:
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in seeds:
            for name, x in samplers(denoiser, steps, seed, n, cond).items():
                found.setdefault(name, []).append(measure(x))
        for name, values in found.items():
            line(str(steps), name, values)


def on(denoiser: NetworkDiscreteDenoiser, noise: TotalNoise) -> NetworkDiscreteDenoiser:
    """The same network on a masked chain with another noise: its posterior does not depend on the time."""
    chain = replace(denoiser.chain, noise=noise)
    return NetworkDiscreteDenoiser(denoiser.net, chain, denoiser.shape[0], denoiser.classes)


def network(name: str, data: Dataset, tokens: int, width: int, steps: int, work: Path) -> NetworkDiscreteDenoiser:
    """A masked model of the data, trained into the folder or read back."""
    chain, length = Masked(tokens), data.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Transformer(length, tokens, chain.states, width, 2, 8, classes=data.classes, timed=False)
    start: Any = NetworkDiscreteDenoiser(net, chain, length, data.classes)
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    settings = Settings(Budget(steps), batch=64, precision="fp32")
    result: Any = train(DiscreteDenoising(lr=3e-3), Start(start, data), settings, folder)
    print(f"{name}: {sum(p.numel() for p in net.parameters())} parameters, {steps} steps, {result.seconds:.0f} s, "
          f"loss {result.records[-1]['model/loss']:.3f} ({time.perf_counter() - begun:.0f} s here)")  # fmt: skip
    return result.model


def digits_network(work: Path) -> NetworkDiscreteDenoiser:
    found = load_data("digits")
    tokens = Dataset("digit levels", to_levels(found.x, LEVELS).flatten(1), found.labels, found.class_names)
    return network("digits", tokens, LEVELS, 96, 1000, work)


def text(seeds: list[int], n: int, work: Path) -> None:
    length = 32
    data, held = load_text(length=length), load_text(split="test", length=length)
    denoiser = network("text", data, len(LETTERS), 96, 1500, work)
    judge = NGram(held.x, len(LETTERS), 5)

    def measure(x: Tensor) -> tuple[float, ...]:
        found = token_quality(x, judge, len(LETTERS))
        return found.perplexity.value, found.entropy, found.sequence_entropy

    titles = ("perplexity", "entropy", "entropy in a sequence")
    for name in ("log-linear", "cosine"):
        compare(titles, on(denoiser, NOISES[name]), measure, seeds, n, data.x[:: len(data) // n][:n],
                f"text, {name}")  # fmt: skip
    print("\n".join(LETTERS.decode(sample(denoiser, 4, TEACHER_STEPS))))


def count(seeds: list[int], n: int) -> None:
    law = countdown(Masked(16), 32)

    def measure(x: Tensor) -> tuple[float, ...]:
        counts = torch.bincount(x.flatten(), minlength=16).double()
        share = counts / counts.sum()
        return countdown_errors(x), float(-torch.xlogy(share, share).sum())

    compare(("error rate", "entropy"), law, measure, seeds, n, law.draw(n, Rng(0)), "countdown from 16, exact model")


def digits(seeds: list[int], n: int, work: Path) -> None:
    denoiser = digits_network(work)
    train_data, test = load_data("digits"), load_data("digits", "test")
    judges = [Evaluator(test, train_data, load_features(name)) for name in ("pixels", "digits")]
    labels = torch.arange(n) % 10

    def measure(x: Tensor) -> tuple[float, ...]:
        pictures = to_pictures(x.reshape(-1, SIDE, SIDE), LEVELS)
        pixels, classes = (judge(pictures, labels) for judge in judges)
        share = torch.bincount(x.flatten(), minlength=LEVELS).double() / x.numel()
        return pixels.frechet.value, classes.accuracy or 0.0, float(-torch.xlogy(share, share).sum())

    real = to_levels(train_data.x, LEVELS).flatten(1)
    assert train_data.labels is not None
    by_class = [real[train_data.labels == k][: n // 10] for k in range(10)]
    titles = ("Frechet distance (pixels)", "class accuracy", "entropy")
    compare(titles, denoiser, measure, seeds, n, torch.stack(by_class, 1).flatten(0, 1), "digits, log-linear", labels)


def picture(out: Path, work: Path) -> None:
    """Rows of digits from the same seed."""
    from io import BytesIO

    import matplotlib.pyplot as plt
    from PIL import Image

    from fewstep.report.pictures import sheet

    denoiser = digits_network(work)
    labels = torch.arange(20) % 10
    rows: dict[str, tuple[Plan | int, Stepper]] = {
        "teacher, 32 steps": (TEACHER_STEPS, Tweedie()),
        "Euler, 4 steps": (4, Euler()),
        "LSD, 4 steps": (LEARNED["LSD"](denoiser, 4, 0).plans[4], Euler()),
        "LSD+, 4 steps": (LEARNED["LSD+"](denoiser, 4, 0).plans[4], Euler()),
        "Euler, 16 steps": (16, Euler()),
        "LSD, 16 steps": (LEARNED["LSD"](denoiser, 16, 0).plans[16], Euler()),
    }
    figure, panels = plt.subplots(len(rows), 1, figsize=(6, 1.45 * len(rows)))
    for panel, (title, (plan, stepper)) in zip(panels, rows.items(), strict=True):
        x = sample(denoiser, 20, plan, stepper, cond=labels, seed=0)
        panel.imshow(plt.imread(BytesIO(sheet(to_pictures(x.reshape(-1, SIDE, SIDE), LEVELS), 10))), cmap="gray")
        panel.set_title(title, loc="left", fontsize=9, pad=3)
        panel.axis("off")
    figure.tight_layout(pad=0.3, h_pad=0.6)
    figure.savefig(out, dpi=100)
    Image.open(out).convert("L").save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("world", "countdown", "text", "digits", "picture"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("lsd.png"), help="of the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=200, help="samples per seed (default 200)")
    parser.add_argument("--work", type=Path, default=Path("runs/lsd"), help="where the trained models lie")
    chosen = parser.parse_args()
    if chosen.part == "world":
        world(chosen.seeds)
    elif chosen.part == "countdown":
        count(chosen.seeds, chosen.n)
    elif chosen.part == "text":
        text(chosen.seeds, chosen.n, chosen.work)
    elif chosen.part == "digits":
        digits(chosen.seeds, chosen.n, chosen.work)
    else:
        picture(chosen.out, chosen.work)


if __name__ == "__main__":
    main()
