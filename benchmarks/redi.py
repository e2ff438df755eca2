"""Whether wrong traces help here: REDI beside more fine-tuning, DPO, SimPO and the symmetric loss, on sums.

    python benchmarks/redi.py [--seeds 3] [--width 20] [--steps 200]
    python benchmarks/redi.py --picture docs/img/redi.png

A small recurrent policy is fine-tuned on the right answers of 6000 sums of two-digit numbers until it gains little, and
then writes eight answers to each at temperature 1; the first right and the first wrong one make the pair.  Every
objective goes on from there for as many steps at each of a few learning rates; the rate is chosen on 1000 other sums,
and the table tells of the 3000 that are left: the share of right answers, the likeliest token taken and drawn at
temperature 1, mean and standard deviation over the seeds.  About a minute a seed on one core.

The picture is of the first seed: pairs of traces as the policy sees them before and after, and the courses of a healthy
and of a collapsing run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes

from fewstep.data import Dataset
from fewstep.language.arithmetic import Addition
from fewstep.language.log_probs import token_log_prob
from fewstep.language.preferences import DPO, REDILoss, SimPO, Symmetric
from fewstep.language.redi import FineTuning, PreferenceTuning
from fewstep.language.traces import accuracy, traces
from fewstep.language_models import LanguageModel, NetworkLanguageModel
from fewstep.methods.method import Method
from fewstep.methods.start import Start
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

PROBLEMS = Addition()
TRAIN, CHOOSE = 6000, 1000
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
#: What goes on from the fine-tuned policy, by the name in the table and the learning rate.
WAYS = {
    "SFT": lambda lr: FineTuning(lr=lr),
    "REDI, alpha = 0": lambda lr: PreferenceTuning(lr=lr, objective=REDILoss(alpha=0.0)),
    "REDI, alpha = 0.2": lambda lr: PreferenceTuning(lr=lr, objective=REDILoss(alpha=0.2)),
    "REDI, alpha = 0.8": lambda lr: PreferenceTuning(lr=lr, objective=REDILoss(alpha=0.8)),
    "symmetric": lambda lr: PreferenceTuning(lr=lr, objective=Symmetric()),
    "SimPO, beta = 2, gamma = 1": lambda lr: PreferenceTuning(lr=lr, objective=SimPO()),
    "DPO, beta = 0.1": lambda lr: PreferenceTuning(lr=lr, objective=DPO(beta=0.1)),
}


class Worth(NamedTuple):
    """The share of right answers, the likeliest token taken and drawn, and the mean log-probability of a token."""

    greedy: float
    drawn: float
    chosen: float
    rejected: float


def fresh(width: int, seed: int) -> NetworkLanguageModel:
    """A policy that has learned nothing."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = GRULanguageModel(len(PROBLEMS.symbols), PROBLEMS.length, width=width)
    return NetworkLanguageModel(net, len(PROBLEMS.symbols), PROBLEMS.length, PROBLEMS.symbols)


def trained(method: Method, policy: LanguageModel, data: Dataset, steps: int, seed: int) -> tuple[LanguageModel, dict]:
    """What a method makes of a policy, and its last record."""
    settings = Settings(Budget(steps), 64, seed=seed, precision="fp32", averages=())
    result = train(method, Start(policy, data, seed=seed), settings, show=False)
    return result.model, result.records[-1]  # type: ignore[return-value]


def shares(policy: LanguageModel, prompts: torch.Tensor) -> tuple[float, float]:
    """The share of right answers, the likeliest token taken and drawn four times."""
    rng = Rng(0, "answers")
    return accuracy(policy, PROBLEMS, prompts, rng), accuracy(policy, PROBLEMS, prompts, rng, temperature=1.0, tries=4)


def compared(seed: int, width: int, tuning: int, steps: int) -> dict[tuple[str, float], tuple[float, Worth]]:
    """By way and learning rate: the drawn share on the sums that choose the rate, and what it is worth on the rest."""
    drawn = PROBLEMS.prompts(len(PROBLEMS.texts), Rng(seed, "problems"))
    learn, choose, test = drawn.split((TRAIN, CHOOSE, len(drawn) - TRAIN - CHOOSE))
    tuned, _ = trained(FineTuning(lr=1e-2), fresh(width, seed), PROBLEMS.dataset(learn), tuning, seed)
    data = traces(tuned, PROBLEMS, learn, Rng(seed, "traces"))
    pairs = int(data.columns["rejected_mask"].any(1).sum())
    print(f"seed {seed}: {len(data)} right traces, {pairs} pairs", file=sys.stderr, flush=True)
    nan = float("nan")
    found = {("before", 0.0): (shares(tuned, choose)[1], Worth(*shares(tuned, test), nan, nan))}
    for name, way in WAYS.items():
        for lr in RATES:
            policy, record = trained(way(lr), tuned, data, steps, seed)
            chosen, rejected = (record.get(f"student/{which}_log_prob", nan) for which in ("chosen", "rejected"))
            found[name, lr] = shares(policy, choose)[1], Worth(*shares(policy, test), chosen, rejected)
    return found


def table(runs: Sequence[Mapping[tuple[str, float], tuple[float, Worth]]]) -> str:
    """Markdown, one row a way at the rate that is best on the sums put aside for that, over all seeds; and, of the
    highest rate, the mean log-probability of a right and a wrong token at the end."""
    lines = [
        "| then | lr | right, greedy | right, drawn | at lr 1e-3: drawn | chosen, rejected |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("before", *WAYS):
        rates = [lr for way, lr in runs[0] if way == name]
        best = max(rates, key=lambda lr: statistics.mean(run[name, lr][0] for run in runs))
        cells = [spread([run[name, best][1][i] for run in runs]) for i in (0, 1)]
        last = [run[name, rates[-1]][1] for run in runs]
        driven = ["", ""]
        if name != "before":
            logs = [statistics.mean(worth[i] for worth in last) for i in (2, 3)]
            driven = [spread([worth.drawn for worth in last]), ", ".join(f"{x:.2f}" for x in logs if x == x)]
        lines.append(f"| {name} | {f'{best:g}' if best else ''} | " + " | ".join([*cells, *driven]) + " |")
    return "\n".join(lines)


def drawn_picture(path: Path, width: int, tuning: int, steps: int) -> None:
    """Traces shaded by how unlikely each token is, and the log-probabilities of right and wrong ones over training."""
    from matplotlib.figure import Figure

    prompts = PROBLEMS.prompts(len(PROBLEMS.texts), Rng(0, "problems"))[:TRAIN]
    tuned, _ = trained(FineTuning(lr=1e-2), fresh(width, 0), PROBLEMS.dataset(prompts), tuning, 0)
    data = traces(tuned, PROBLEMS, prompts, Rng(0, "traces"))
    ways = {
        "REDI, alpha = 0.8, lr 3e-5": PreferenceTuning(lr=3e-5),
        "symmetric, lr 1e-3": PreferenceTuning(lr=1e-3, objective=Symmetric()),
    }
    settings = Settings(Budget(steps), 64, precision="fp32", averages=(), log_steps=5)
    runs = {name: train(method, Start(tuned, data), settings, show=False) for name, method in ways.items()}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    shaded, *courses = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    policies = {"after SFT": tuned, **{name: run.model for name, run in runs.items()}}
    paired = data.columns["rejected_mask"].any(1).nonzero()[:3, 0]
    shade(shaded, policies, data, paired)
    for axes, (name, run) in zip(courses, runs.items(), strict=True):
        for key, colour in (("chosen", "tab:green"), ("rejected", "tab:red")):
            values = [record[f"student/{key}_log_prob"] for record in run.records]
            axes.plot([record["step"] for record in run.records], values, color=colour, label=key)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
        axes.axhline(0, color="0.8", lw=0.8)
    courses[0].set_ylabel("log-probability of a token")
    courses[0].set_ylim(-2, 0.1)
    courses[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def shade(axes: Axes, policies: Mapping[str, LanguageModel], data: Dataset, chosen: torch.Tensor) -> None:
    """Pairs of traces below each other, for each policy: its own colour for right and wrong ones, the stronger the less
    likely a token is."""
    rows = data.rows(chosen)
    sides = {
        "Greens": (rows.x, rows.columns["mask"]),
        "Reds": (rows.columns["rejected"], rows.columns["rejected_mask"]),
    }
    axes.set_axis_off()
    axes.set_xlim(0, 12 * len(policies))
    axes.set_ylim(-3 * len(chosen), 2)
    for k, (name, policy) in enumerate(policies.items()):
        axes.text(12 * k, 0.6, name.replace(", lr", "\nlr"), fontsize=8)
        for side, (colours, (x, mask)) in enumerate(sides.items()):
            with torch.no_grad():
                log_p = token_log_prob(policy(x), x, mask)
            for i, text in enumerate(PROBLEMS.decode(x)):
                for t, symbol in enumerate(text.rstrip("_")):
                    share = min(float(-log_p[i, t]) / 6, 1.0) if bool(mask[i, t]) else 0.0
                    ground = {"boxstyle": "square,pad=0.15", "fc": colormaps[colours](0.75 * share), "ec": "none"}
                    place = (12 * k + t, -3 * i - side - 0.5)
                    axes.text(*place, symbol, family="monospace", fontsize=9, bbox=ground if bool(mask[i, t]) else None)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--tuning", type=int, default=3000, help="steps of the fine-tuning before")
    parser.add_argument("--steps", type=int, default=200, help="steps of each way")
    parser.add_argument("--picture", type=Path, help="draw this file instead")
    chosen = parser.parse_args()
    if chosen.picture is not None:
        drawn_picture(chosen.picture, chosen.width, chosen.tuning, chosen.steps)
        return
    runs = [compared(seed, chosen.width, chosen.tuning, chosen.steps) for seed in range(chosen.seeds)]
    print(table(runs))


if __name__ == "__main__":
    main()
