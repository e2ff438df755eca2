"""What self-conditioning and asymmetric time intervals do to Analog Bits, on digits and on captions of digits.

    python benchmarks/analog_bits.py digits                       pictures of 17 levels as five bits a pixel
    python benchmarks/analog_bits.py captions                     a picture's caption as five bits a token
    python benchmarks/analog_bits.py encodings                    codes and losses
    python benchmarks/analog_bits.py picture docs/img/analog-bits.png

Every row is the mean and standard deviation over ``--seeds``, each with its own training run; all rows of a seed start
from the same noise.  Models with and without self-conditioning train for equally many steps, so the former cost a
third more for half of their batch.  Digits: invalid codes in percent of all pixels; distance of the per-pixel
histograms from the training digits; Fréchet distance and class accuracy by the bundled classifier, invalid pixels
replaced by their nearest level.  Captions: the share of the 500 test pictures whose caption is right, the share of
captions that are sentences at all.  Rows are kept in ``--out`` and not made again; beside FILE.json stands FILE.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete.bits import COSINE, ENCODINGS, Encoding, Unsigned
from fewstep.discrete.captions import WORDS, Captioner, Captions, Lookup, sentence
from fewstep.discrete.heads import SigmoidHead, SoftmaxHead
from fewstep.discrete.levels import histogram_distance, invalid_fraction, to_levels, to_pictures
from fewstep.files import write_atomically
from fewstep.grids import to_data, uniform
from fewstep.methods.start import Start
from fewstep.methods.teachers.analog_bits import AnalogBits, SigmoidAnalogBits, SoftmaxAnalogBits
from fewstep.metrics import Evaluator, load_features
from fewstep.models import model_of
from fewstep.networks import UNet
from fewstep.predictions import X0
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling import SOLVERS, Solver, solve
from fewstep.sampling.self_conditioning import Asymmetric, SelfConditioning, SelfGuided
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings, train

Row = dict[str, float]
Sampler = Callable[[NetworkDenoiser, Tensor, int, Tensor, int], Tensor]

LEVELS = 17
TDS = (0.0, 0.5, 1.0, 2.0, 4.0)
CAPTION_TDS = (0.0, 1.0, 2.0, 4.0, 8.0)


def main() -> None:
    chosen = arguments()
    if chosen.what == "picture":
        draw(chosen.path, chosen.steps)
        return
    make = {"digits": digits, "captions": captions, "encodings": encodings}[chosen.what]
    rows: dict[str, Row] = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
    for seed in chosen.seeds:
        key = f"{chosen.what}, {chosen.steps} training steps, seed {seed}"
        if not any(known.startswith(f"{key}: ") for known in rows):
            rows |= {f"{key}: {name}": row for name, row in make(chosen.steps, seed).items()}
            write_atomically(chosen.out.absolute(), (json.dumps(rows, indent=1) + "\n").encode())
    text = table({k: v for k, v in rows.items() if k.startswith(f"{chosen.what}, {chosen.steps} ")})
    write_atomically(chosen.out.with_name(f"{chosen.out.stem}-{chosen.what}.md").absolute(), text.encode())
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "captions", "encodings", "picture"))
    parser.add_argument("path", type=Path, nargs="?", default=Path("analog-bits.png"), help="of the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of every model (default 1500)")
    parser.add_argument("--out", type=Path, default=Path("analog-bits.json"))
    return parser.parse_args()


# Sampling


def plain(solver: Solver) -> Sampler:
    """Without an estimate: zeros beside the state."""

    def sampled(model: NetworkDenoiser, noise: Tensor, steps: int, cond: Tensor, seed: int) -> Tensor:
        return solve(model, noise, to_data(uniform(COSINE, steps), COSINE), solver, cond, Rng(seed, "fresh"))

    return sampled


def fed_back(solver: Solver, momentum: float = 0.0) -> Sampler:
    """With the estimate of the call before."""

    def sampled(model: NetworkDenoiser, noise: Tensor, steps: int, cond: Tensor, seed: int) -> Tensor:
        how, times = SelfConditioning(momentum=momentum), to_data(uniform(COSINE, steps), COSINE)
        return how.solve(model, noise, times, solver, cond, Rng(seed, "fresh"))

    return sampled


def self_guided(model: NetworkDenoiser, noise: Tensor, steps: int, cond: Tensor, seed: int) -> Tensor:
    """With the estimate of the same time, twice the calls."""
    return solve(SelfGuided(model, 3.0), noise, to_data(uniform(COSINE, steps), COSINE), SOLVERS["ddim"](), cond)


def start(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return COSINE.prior(Rng(seed, "start").normal(n, *shape))


# Digits


class Digits:
    """The data, and what is measured on samples."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        train_data, test = load_data("digits"), load_data("digits", "test")
        self.real = to_levels(train_data.x)
        self.bits = Dataset("bits", encoding.encode(self.real), train_data.labels, train_data.class_names)
        self.judge = Evaluator(test, train_data, load_features("digits"))
        self.labels = torch.arange(500) % 10
        self.floor = histogram_distance(to_levels(test.x), self.real)

    def trained(self, method: AnalogBits, steps: int, seed: int) -> NetworkDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "initial weights"))
            net = self.network(method)
        model = NetworkDenoiser(net, COSINE, X0(), self.bits.shape, 10)
        settings = Settings(Budget(steps), batch=64, seed=seed, precision="fp32")
        return model_of(train(method, Start(model, self.bits), settings, show=False).model).teacher()

    def network(self, method: AnalogBits) -> torch.nn.Module:
        return small_unet(self.bits.shape, self.bits.shape[0])

    @torch.no_grad()
    def measured(self, model: NetworkDenoiser, sampler: Sampler, steps: int, seed: int) -> Row:
        x = sampler(model, start(500, self.bits.shape, seed), steps, self.labels, seed)
        symbols = self.encoding.decode(x)
        quality = self.judge(to_pictures(self.encoding.nearest(x)), self.labels)
        assert quality.accuracy is not None
        return {
            "invalid %": 100 * invalid_fraction(symbols),
            "histograms": histogram_distance(symbols, self.real),
            "Fréchet": quality.frechet.value,
            "class accuracy": quality.accuracy,
        }


class SoftmaxDigits(Digits):
    """A network of 17 logits a pixel."""

    def network(self, method: AnalogBits) -> torch.nn.Module:
        return SoftmaxHead(small_unet((LEVELS, 8, 8), self.bits.shape[0]), self.encoding)


class SigmoidDigits(Digits):
    """A network of a logit a bit."""

    def network(self, method: AnalogBits) -> torch.nn.Module:
        return SigmoidHead(small_unet(self.bits.shape, self.bits.shape[0]))


def small_unet(shape: tuple[int, ...], beside: int) -> UNet:
    image, height, width = shape
    return UNet((image, height, width), channels=(32,), blocks=1, width=64, classes=10, beside=beside)


def digits(steps: int, seed: int) -> dict[str, Row]:
    """Self-conditioning off and on, td, and other solvers, in 10 steps."""
    world = Digits(Unsigned(LEVELS))
    print(f"histograms of 500 test digits against the training digits: {world.floor:.3f}")
    without = world.trained(AnalogBits(lr=2e-3, self_conditioning=0.0), steps, seed)
    model = world.trained(AnalogBits(lr=2e-3), steps, seed)
    rows = {}
    for td in TDS:
        solver = Asymmetric(td=td)
        rows[f"ddim, td {td:g} | trained without"] = world.measured(without, plain(solver), 10, seed)
        rows[f"ddim, td {td:g} | self-conditioned"] = world.measured(model, fed_back(solver), 10, seed)
    rows["ddim, td 0 | trained with, sampled without"] = world.measured(model, plain(SOLVERS["ddim"]()), 10, seed)
    rows["ddim, td 0 | self-guided, w = 3, 20 calls"] = world.measured(model, self_guided, 10, seed)
    for name in ("ddpm", "ddpm-large", "dpmpp-2m"):
        rows[f"{name} | trained without"] = world.measured(without, plain(SOLVERS[name]()), 10, seed)
        rows[f"{name} | self-conditioned"] = world.measured(model, fed_back(SOLVERS[name]()), 10, seed)
    ddim = SOLVERS["ddim"]()
    rows["ddim, 100 steps | trained without"] = world.measured(without, plain(ddim), 100, seed)
    rows["ddim, 100 steps | self-conditioned"] = world.measured(model, fed_back(ddim), 100, seed)
    rows["ddim, 100 steps | self-conditioned, momentum 0.9"] = world.measured(model, fed_back(ddim, 0.9), 100, seed)
    return rows


def encodings(steps: int, seed: int) -> dict[str, Row]:
    """Codes, heads and losses in 10 steps with self-conditioning."""
    rows = {}
    variants: dict[str, tuple[type[Digits], str, AnalogBits]] = {
        "uint, squared error": (Digits, "uint", AnalogBits(lr=2e-3)),
        "uint, sigmoid": (SigmoidDigits, "uint", SigmoidAnalogBits(lr=2e-3)),
        "gray, squared error": (Digits, "gray", AnalogBits(lr=2e-3)),
        "rand, squared error": (Digits, "rand", AnalogBits(lr=2e-3)),
        "rand, softmax factorisation, squared error": (SoftmaxDigits, "rand", AnalogBits(lr=2e-3)),
        "one-hot, softmax": (SoftmaxDigits, "one-hot", SoftmaxAnalogBits(lr=2e-3)),
    }
    for name, (kind, code, method) in variants.items():
        world = kind(ENCODINGS[code](LEVELS))
        model = world.trained(method, steps, seed)
        for td in (0.0, 1.0):
            rows[f"{name} | td {td:g}"] = world.measured(model, fed_back(Asymmetric(td=td)), 10, seed)
    return rows


# Captions


class Captioning:
    """Pictures of digits with captions, and the share of right ones."""

    def __init__(self) -> None:
        self.encoding = Unsigned(len(WORDS))
        self.train, self.test = (Captions.of(load_data("digits", part)) for part in ("train", "test"))
        self.bits = self.train.bits(self.encoding)

    def trained(self, method: AnalogBits, steps: int, seed: int) -> NetworkDenoiser:
        channels, length = self.bits.shape
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "initial weights"))
            net = Lookup(Captioner((channels, length)), self.train.pictures)
        model = NetworkDenoiser(net, COSINE, X0(), self.bits.shape, len(self.train.pictures))
        settings = Settings(Budget(steps), batch=64, seed=seed, precision="fp32")
        made = model_of(train(method, Start(model, self.bits), settings, show=False).model).teacher()
        return NetworkDenoiser(made.net.net, COSINE, X0(), self.bits.shape)  # told pictures, not their numbers

    @torch.no_grad()
    def made(self, model: NetworkDenoiser, sampler: Sampler, steps: int, seed: int) -> Tensor:
        noise = start(len(self.test.pictures), self.bits.shape, seed)
        return self.encoding.decode(sampler(model, noise, steps, self.test.pictures, seed))

    def measured(self, model: NetworkDenoiser, sampler: Sampler, steps: int, seed: int) -> Row:
        made = self.made(model, sampler, steps, seed)
        return {
            "right %": 100 * float(self.test.right(made).double().mean()),
            "sentences %": 100 * float(self.test.sensible(made).double().mean()),
            "invalid %": 100 * invalid_fraction(made),
        }


def captions(steps: int, seed: int) -> dict[str, Row]:
    """td and self-conditioning in 5 and 10 steps."""
    task = Captioning()
    without = task.trained(AnalogBits(lr=1e-3, self_conditioning=0.0), steps, seed)
    model = task.trained(AnalogBits(lr=1e-3), steps, seed)
    rows = {}
    for calls in (5, 10):
        for td in CAPTION_TDS:
            solver = Asymmetric(td=td)
            rows[f"{calls} steps, td {td:g} | trained without"] = task.measured(without, plain(solver), calls, seed)
            rows[f"{calls} steps, td {td:g} | self-conditioned"] = task.measured(model, fed_back(solver), calls, seed)
        ddpm = SOLVERS["ddpm"]()
        rows[f"{calls} steps, ddpm | trained without"] = task.measured(without, plain(ddpm), calls, seed)
        rows[f"{calls} steps, ddpm | self-conditioned"] = task.measured(model, fed_back(ddpm), calls, seed)
    return rows


# Output


def table(rows: dict[str, Row]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    groups: dict[str, list[Row]] = {}
    for key, row in rows.items():
        groups.setdefault(key.partition(": ")[2], []).append(row)
    columns = list(next(iter(rows.values())))
    lines = [
        f"seeds: {len(next(iter(groups.values())))}",
        "",
        f"| | | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for name, group in groups.items():
        lines.append(f"| {name} | {' | '.join(spread([row[c] for row in group], DIGITS[c]) for c in columns)} |")
    return "\n".join(lines) + "\n"


DIGITS = {
    "invalid %": 2, "histograms": 3, "Fréchet": 2, "class accuracy": 3, "right %": 1, "sentences %": 1,
}  # fmt: skip


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the value alone of one seed."""
    found = list(values)
    value = f"{statistics.fmean(found):.{digits}f}"
    return value if len(found) < 2 else f"{value} ± {statistics.stdev(found):.{digits}f}"


def draw(path: Path, steps: int) -> None:
    """Digits plain, self-conditioned and with td = 1, from the same noise, and captions of test pictures."""
    from io import BytesIO

    import matplotlib.pyplot as plt
    from PIL import Image

    from fewstep.report.pictures import sheet

    world, task = Digits(Unsigned(LEVELS)), Captioning()
    model = world.trained(AnalogBits(lr=2e-3), steps, 0)
    captioner = task.trained(AnalogBits(lr=1e-3), steps, 0)
    labels, noise = torch.arange(20) % 10, start(20, world.bits.shape, 0)
    samplers = {
        "10 steps of DDIM, no self-conditioning": plain(Asymmetric()),
        "10 steps of DDIM, self-conditioned": fed_back(Asymmetric()),
        "10 steps of DDIM, self-conditioned, td = 1": fed_back(Asymmetric(td=1.0)),
    }
    figure, panels = plt.subplots(4, 1, figsize=(6, 6.6), gridspec_kw={"height_ratios": [1, 1, 1, 1.25]})
    for panel, (title, sampler) in zip(panels, samplers.items(), strict=False):
        with torch.no_grad():
            x = to_pictures(world.encoding.nearest(sampler(model, noise, 10, labels, 0)))
        panel.imshow(plt.imread(BytesIO(sheet(x, 10))), cmap="gray")
        panel.set_title(title, loc="left", fontsize=9, pad=3)
        panel.axis("off")
    said = task.made(captioner, fed_back(Asymmetric(td=4.0)), 10, 0)
    panels[3].set_title("captions of test pictures in 10 steps, td = 4", loc="left", fontsize=9, pad=3)
    panels[3].axis("off")
    for k in range(6):
        left, top = (k % 2) * 0.5, 0.68 - (k // 2) * 0.34
        inset = panels[3].inset_axes((left, top, 0.09, 0.3))
        inset.imshow(task.test.pictures[k, 0], cmap="gray")
        inset.axis("off")
        inset.text(9, 3.5, sentence(said[k]), fontsize=8, va="center")
    figure.tight_layout(pad=0.3, h_pad=0.6)
    figure.savefig(path, dpi=100)
    Image.open(path).convert("L").save(path, optimize=True)


if __name__ == "__main__":
    main()
