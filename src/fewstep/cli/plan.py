"""``--dry-run``: what a run would do, from its networks to its hours, without writing anything."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewstep.cli.errors import one_line
from fewstep.cli.flags import as_words
from fewstep.cli.runs import check_fit
from fewstep.cli.terminal import console
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Method, Networks, Recipe
from fewstep.randomness import Rng
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings
from fewstep.training.trainer import Run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table

ITERATIONS = 2
MEGA = 1 << 20


class FirstPairs(Exception):
    """Enough pairs were made to know how long all of them take."""


def show(recipe: Recipe, teacher: Denoiser, data: Dataset, settings: Settings) -> None:
    """Print the plan; runs two iterations of the first stage on copies of the networks."""
    check_fit(teacher, data)
    terminal = console()
    stages = recipe.stages()
    terminal.print(f"[bold]{recipe.name}[/]: {recipe.paper.title} (arXiv {recipe.paper.arxiv})", highlight=False)
    if len(stages) > 1:
        terminal.print(f"{len(stages)} stages, each from what the last one made; the plan below is the first one's:")
        for k, stage in enumerate(stages):
            values = ", ".join(f"{name} {as_words(value)}" for name, value in vars(stage).items())
            terminal.print(f"  {k}. {stage.name}: {values}", highlight=False)
    stage = stages[0]
    preparing = preparation(stage, teacher, data, settings.seed)
    run = Run(stage, stage.networks(teacher.to(settings.device)), settings, Parallel())
    terminal.print(networks_table(run.nets))
    seconds = timed(run, stand_in(stage, teacher, data, settings))
    terminal.print(f"memory:    {memory(run)}", highlight=False)
    for line in durations(settings, seconds, preparing, len(stages)):
        terminal.print(line, highlight=False)
    last = stages[-1]
    nets = run.nets if last is stage else last.networks(teacher)
    terminal.print(f"export:    {export(last, nets)}", highlight=False, markup=False)
    bullets(terminal, "differs from the paper:", recipe.paper.deviations or ("nothing known",))
    bullets(terminal, "a healthy run:", (f"{name} {text}" for name, text in stage.healthy.items()))


def bullets(terminal: Console, title: str, lines: Iterable[str]) -> None:
    terminal.print(f"\n{title}", style="bold", highlight=False)
    for line in lines:
        terminal.print(f"  - {line}", highlight=False)


def networks_table(nets: Networks) -> Table:
    """The networks of a method: their size, who trains them, whether they are averaged."""
    from rich.table import Table

    table = Table("network", "is a", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for title in ("trained by", "averaged"):
        table.add_column(title)
    for name, module in nets.named_children():
        trained = [
            f"{spec.kind}, lr {spec.lr:g} {spec.decay}" + (f", clip {spec.clip:g}" if spec.clip is not None else "")
            for spec in nets.groups.values()
            if name in spec.modules
        ]
        state = trained[0] if trained else "moved by the method" if name in nets.moved else "frozen"
        table.add_row(name, type(module).__name__, f"{count(module):,}", state, "yes" if name in nets.ema else "")
    return table


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def preparation(stage: Method, teacher: Denoiser, data: Dataset, seed: int) -> float | None:
    """Seconds that the stage will spend on making its data, from the first part of it; None when it makes none."""
    if type(stage).prepare is Method.prepare:
        return None
    start = time.perf_counter()
    share = 1.0

    def first(done: int, total: int) -> None:
        nonlocal share
        share = done / total
        raise FirstPairs

    with suppress(FirstPairs):
        stage.prepare(teacher, data, seed, first)
    return (time.perf_counter() - start) / share


def stand_in(stage: Method, teacher: Denoiser, data: Dataset, settings: Settings) -> Dataset:
    """Data to time an iteration on: the data themselves, paired with noise where the stage would make pairs."""
    labels = data.labels if teacher.classes else None
    if type(stage).prepare is Method.prepare:
        return Dataset(data.name, data.x, labels, data.class_names)
    x = data.read(slice(0, settings.batch))
    noise = Rng("stand-in").normal(*x.shape)
    return Dataset("pairs", x, None if labels is None else labels[: settings.batch], noise=noise)


def timed(run: Run, data: Dataset) -> float:
    """Mean seconds of the first iterations."""
    start = time.perf_counter()
    for _ in range(ITERATIONS):
        run.step(data)
    return (time.perf_counter() - start) / ITERATIONS


def memory(run: Run) -> str:
    """Where the memory goes, measured after the first iterations."""
    weights = sum(tensor_bytes(p) for p in run.nets.parameters())
    gradients = sum(tensor_bytes(p) for p in run.nets.parameters() if p.requires_grad)
    moments = sum(
        tensor_bytes(value)
        for optimizer in run.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    averages = sum(tensor_bytes(w) for kept in run.averages.values() for average in kept for w in average.weights)
    if run.device.type == "cuda":
        total = f"{torch.cuda.max_memory_allocated(run.device) / MEGA:,.0f} MiB on the device at most"
    else:
        total = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB for the whole process"
    parts = {"weights": weights, "gradients": gradients, "optimisers": moments, "averages": averages}
    return f"{total} (" + ", ".join(f"{name} {size / MEGA:.1f}" for name, size in parts.items()) + ")"


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def durations(settings: Settings, seconds: float, preparing: float | None, stages: int) -> list[str]:
    """What the budget comes to at the measured speed."""
    budget = settings.budget
    lines = [f"iteration: {seconds:.3g} s ({ITERATIONS} timed, batch {settings.batch})"]
    if preparing is not None:
        lines.append(f"pairs:     about {duration(preparing)} before the first iteration")
    each = {"steps": 1.0, "images": settings.batch, "seconds": seconds}[budget.unit]
    steps = budget.amount / each
    total = budget.amount if budget.unit == "seconds" else steps * seconds
    shared = f", split over {stages} stages" if stages > 1 else ""
    lines.append(
        f"budget:    {budget}: about {steps:,.0f} iterations, {steps * settings.batch:,.0f} samples, "
        f"{duration(total)}{shared}"
    )
    return lines


def export(stage: Method, nets: Networks) -> str:
    """What ``fewstep export`` will make of the result: a plain folder, one with code, or why nothing."""
    from fewstep.hub.exporting import foretold

    try:
        return foretold(stage.student(nets))
    except (ValueError, TypeError, ImportError) as error:
        return f"not possible: {one_line(error)}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
