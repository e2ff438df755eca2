"""``--dry-run``: what a run would do, from its networks to its hours, without writing anything."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewstep.cli.errors import one_line
from fewstep.cli.flags import as_words
from fewstep.cli.terminal import console
from fewstep.data import Dataset, Samples
from fewstep.denoisers import Denoiser
from fewstep.methods import CONDENSERS
from fewstep.methods.method import Method, Networks, Recipe
from fewstep.methods.parts.stores import Store
from fewstep.methods.start import Start
from fewstep.networks.lora import factors_in, merged
from fewstep.runs.conditions import as_read_by, check_readable
from fewstep.runs.course import ignored
from fewstep.runs.stages import borrowed, stages_of
from fewstep.training.feed import fitted
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings
from fewstep.training.trainer import Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console
    from rich.table import Table

ITERATIONS = 2
MEGA = 1 << 20


@dataclass
class Glimpses:
    """Stores as a plan makes them: a glimpse of each, and the ``seconds`` that the whole would take, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, what: Store, seed: int) -> Dataset:
        tensors, seconds = what.glimpse(seed)
        self.seconds[what.name] = self.seconds.get(what.name, 0.0) + seconds
        return what.dataset(tensors)


def show(
    recipe: Recipe,
    teacher: Denoiser,
    data: Samples,
    settings: Settings,
    given: Mapping[str, nn.Module] | None = None,
) -> None:
    """Print the plan; runs two iterations of the first stage on copies of the networks."""
    check_readable(teacher, data)
    terminal = console()
    stages = [stage.method for stage in stages_of(recipe, given or ())]
    terminal.print(f"[bold]{recipe.name}[/]: {recipe.paper.title} (arXiv {recipe.paper.arxiv})", highlight=False)
    if len(stages) > 1:
        terminal.print(f"{len(stages)} stages, each from what those before made; the plan below is the first one's:")
        for k, stage in enumerate(stages):
            values = ", ".join(f"{name} {as_words(value)}" for name, value in vars(stage).items())
            terminal.print(f"  {k}. {stage.name}: {values}", highlight=False)
    for line in ignored(recipe, settings):
        terminal.print(line, highlight=False)
    stage, device, stores = stages[0], torch.device(settings.device), Glimpses()
    start = Start(
        borrowed(teacher, device),
        fitted(as_read_by(teacher, data, most=settings.batch if recipe.task == "generation" else None), teacher),
        settings.seed,
        given={k: borrowed(m, device) for k, m in (given or {}).items()},
        keep=stores,
        low_rank=settings.low_rank,
    )
    sources = stage.sources(start)
    run = Run(stage, stage.networks(start), settings, Parallel())
    terminal.print(networks_table(run.nets))
    seconds = timed(run, sources)
    terminal.print(f"memory:    {memory(run)}", highlight=False)
    for line in durations(settings, seconds, stores.seconds, len(stages)):
        terminal.print(line, highlight=False)
    if recipe.name not in CONDENSERS:  # which make data, after a look at all of them
        last = stages[-1]
        nets = run.nets if last is stage else last.networks(start)
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
        moved, whole = sum(p.numel() for p in nets.weights(name)), count(module)
        size = f"{whole:,}" if moved == whole else f"{moved:,} of {whole:,}"
        table.add_row(name, type(module).__name__, size, state, "yes" if name in nets.ema else "")
    return table


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def timed(run: Run, data: Mapping[str, Samples]) -> float:
    """Mean seconds of the first iterations."""
    start = time.perf_counter()
    for _ in range(ITERATIONS):
        run.step(data)
    return (time.perf_counter() - start) / ITERATIONS


def memory(run: Run) -> str:
    """Where the memory goes, measured after the first iterations."""
    weights = sum({p.data_ptr(): tensor_bytes(p) for p in run.nets.parameters()}.values())
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
        total = f"{peak_memory() / MEGA:,.0f} MiB for the whole process"
    parts = {"weights": weights, "gradients": gradients, "optimisers": moments, "averages": averages}
    return f"{total} (" + ", ".join(f"{name} {size / MEGA:.1f}" for name, size in parts.items()) + ")"


def peak_memory() -> float:
    """The most bytes that this process has held; not a number where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def durations(settings: Settings, seconds: float, preparing: Mapping[str, float], stages: int) -> list[str]:
    """What the budget comes to at the measured speed."""
    budget = settings.budget
    lines = [f"iteration: {seconds:.3g} s ({ITERATIONS} timed, batch {settings.batch})"]
    for name, whole in preparing.items():
        lines.append(f"{name + ':':10} about {duration(whole)} before the first iteration")
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

    student = stage.student(nets)
    try:
        return foretold(merged(student) if factors_in(student) else student)
    except (ValueError, TypeError, ImportError) as error:
        return f"not possible: {one_line(error)}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
