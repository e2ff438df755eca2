"""The trainer: everything a method must not know.

Devices, precision, optimisers, accumulation, averages, exact resume, budgets, records, signals and processes.  A
method is a generator of updates; the trainer drives one generator per micro-batch in lock step, runs each loss
backward as soon as it is yielded (so that one graph lives at a time), averages gradients over micro-batches and
processes, and steps the group that the update names.

To resume a run, run the same command again: a run folder holds ``checkpoint.safetensors``, and data order and random
draws are functions of the seed and the number of steps done.  A step costs its passes and little else: multi-tensor
norm, clip and averages, fused optimisers, numbers read from the device only when they are recorded.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.conditions import to
from fewstep.data.dataset import Rows, Samples
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Batch, Method, Networks, Progress, Update
from fewstep.methods.start import Start
from fewstep.randomness import Rng, derive_seed, repeated_draws
from fewstep.sampling.rollout import Student
from fewstep.training import checkpoint, snapshots
from fewstep.training.budget import Budget
from fewstep.training.checkpoint import Checkpoint
from fewstep.training.ema import Average, Power, Profile
from fewstep.training.feed import MAIN, Feed, fitted
from fewstep.training.interruptions import only_run_in, stop_on_signals
from fewstep.training.optimisers import make_optimiser, rate
from fewstep.training.parallel import Parallel
from fewstep.training.precision import Precision, autocast, resolve
from fewstep.training.progress import Bar, Records, TensorBoard


class NonFiniteError(RuntimeError):
    """A loss or gradient stopped being a number; the message names the tensor."""


class Interrupted(RuntimeError):
    """The run was asked to stop by signal ``number``; it is saved and the same command resumes it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the method.

    ``batch`` is the *global* batch: all processes and all ``accumulate`` micro-batches together.  The first of
    ``averages`` is what the run hands out; with two or more :class:`~fewstep.training.ema.Power` profiles the run
    keeps ``snapshots/`` from which other widths are made afterwards (:mod:`fewstep.training.snapshots`).  ``shard``
    cuts every network over the processes that ``torchrun`` started, for networks that do not fit in one
    (:mod:`fewstep.training.sharding`).  ``tensorboard`` also writes event files to ``tensorboard/`` in the run folder.
    """

    budget: Budget = field(default_factory=lambda: Budget(1000))
    batch: int = 64
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "auto"
    averages: tuple[Profile, ...] = (Power(0.1),)
    device: str = "cpu"
    save_seconds: float = 60.0
    log_steps: int = 10
    shard: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be positive and divisible by accumulate={self.accumulate}; "
                "batch counts all micro-batches together"
            )
        if self.log_steps < 1:
            raise ValueError(f"log_steps={self.log_steps} must be at least 1")
        if self.save_seconds < 0:
            raise ValueError(f"save_seconds={self.save_seconds:g} must not be negative (0 saves after every step)")


@dataclass
class Result:
    """What a run made: the student (or teacher), with the first average's weights when the method has one, and its
    cost.  ``records`` are the lines of ``log.jsonl``, those before a resume included; ``made`` are the models for the
    stages after it, by role."""

    model: Student | Denoiser
    steps: int
    images: int
    seconds: float
    records: list[dict[str, Any]]
    made: Mapping[str, nn.Module] = field(default_factory=dict)


class Run:
    """One training run in memory: networks, optimisers, averages and counters."""

    def __init__(self, method: Method, nets: Networks, settings: Settings, parallel: Parallel) -> None:
        parts = settings.accumulate * parallel.world
        if settings.batch % parts:
            raise ValueError(f"batch={settings.batch} does not divide over {parts} parts (processes x accumulate)")
        self.method, self.nets, self.settings, self.parallel = method, nets, settings, parallel
        self.device = torch.device(settings.device)
        parallel.place(nets, self.device)
        fast = resolve(settings.precision, self.device) == "bf16"
        self.precision: Literal["fp32", "bf16"] = "bf16" if parallel.agree(fast) else "fp32"
        self.optimisers = {name: make_optimiser(group, nets, name) for name, group in nets.groups.items()}
        self.parameters = {name: nets.group_parameters(name) for name in nets.groups}
        self.averaged = {name: list(nets.get_submodule(name).parameters()) for name in nets.ema}
        self.averages = {
            name: [Average(profile, weights) for profile in settings.averages]
            for name, weights in self.averaged.items()
        }
        self.feed: Feed | None = None
        self.steps = 0
        self.seconds = 0.0
        # scalars since the last record, so that a group that moves in one step of five is in every record
        self.recent: dict[str, Tensor | float] = {}

    def progress(self) -> Progress:
        images = self.steps * self.settings.batch
        return Progress(self.steps, images, self.settings.budget.fraction(self.steps, images, self.seconds))

    def step(self, data: Samples | Mapping[str, Samples]) -> None:
        """One iteration of the method on its data, or on its sources by name."""
        progress = self.progress()
        pending = [self.method.updates(self.nets, batch, progress) for batch in self.batches(data)]
        while updates := self.backward(pending):
            self.recent |= mean_logs(updates)
            self.recent |= self.apply(updates, progress)
            if updates[0].then is not None:
                updates[0].then()
        self.steps += 1

    def batches(self, data: Samples | Mapping[str, Samples]) -> Iterator[Batch]:
        """This process's micro-batches of the current iteration."""
        settings, parts = self.settings, self.settings.accumulate * self.parallel.world
        first = self.parallel.rank * settings.accumulate
        mine = range(first, first + settings.accumulate)
        sources = named(data)
        if self.feed is None or not self.feed.reads(sources):
            self.feed = Feed(sources, settings.batch, settings.seed, mine, parts)
        # dropout is the one draw that a network makes itself, from PyTorch's own generator
        torch.manual_seed(derive_seed(settings.seed, "dropout", self.steps, self.parallel.rank))
        for part, rows in zip(mine, self.feed.read(self.steps), strict=True):
            rng = Rng(settings.seed, "step", self.steps, part=part, parts=parts, device=self.device)
            found = {name: self.batch(sources[name], read, rng) for name, read in rows.items()}
            yield dataclasses.replace(found.pop(MAIN), of=found)

    def batch(self, data: Samples, rows: Rows, rng: Rng) -> Batch:
        """The rows of a source on the device."""
        n = self.settings.batch // (self.settings.accumulate * self.parallel.world)
        x = None if rows.x is None else rows.x.to(self.device)
        columns = {name: column.to(self.device) for name, column in rows.columns.items()}
        return Batch(x, to(rows.cond, self.device), rng, columns, shape=(n, *data.shape))

    def backward(self, pending: list[Iterator[Update]]) -> list[Update]:
        """The next update of every micro-batch, each run backward at once; empty when the iteration is over."""
        updates: list[Update] = []
        for generator in pending:
            with autocast(self.precision, self.device):
                update = next(generator, None)
            if update is None:
                continue
            if not updates:
                self.forget_gradients()
            (update.loss / len(pending) if len(pending) > 1 else update.loss).backward()
            updates.append(update)
        if updates and len(updates) != len(pending):
            raise RuntimeError(f"{self.method.name}: micro-batches yielded different numbers of updates")
        self.parallel.settle(self.nets)
        return updates

    def forget_gradients(self) -> None:
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def apply(self, updates: list[Update], progress: Progress) -> dict[str, Tensor | float]:
        """Average gradients over processes, check and clip them, step the group's optimiser and averages."""
        group = updates[0].group
        spec, optimiser = self.nets.groups[group], self.optimisers[group]
        gradients = self.parallel.local([p.grad for p in self.parameters[group] if p.grad is not None])
        self.parallel.average(gradients)
        size = self.parallel.norm(gradients)
        if not math.isfinite(size):
            raise NonFiniteError(self.diagnosis(updates))
        if spec.clip is not None and size > spec.clip:
            torch._foreach_mul_(gradients, spec.clip / size)
        lr = spec.lr * rate(spec, progress)
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
        for name in spec.modules:
            for average in self.averages.get(name, ()):
                average.update(self.averaged[name])
        return {f"{group}/grad_norm": size, f"{group}/lr": lr}

    def check_weights(self) -> None:
        """NonFiniteError when a step left a weight that is no number, so that none is saved or given back."""
        if bad := self.not_finite(dict(self.nets.named_parameters())):
            raise NonFiniteError(
                f"step {self.steps - 1}: it left the weight {bad[0]} not finite; lower the learning rate (the last "
                "checkpoint is from before this step)"
            )

    def diagnosis(self, updates: list[Update]) -> str:
        """Which tensors stopped being numbers: a weight, else the loss, else a gradient."""
        group = updates[0].group
        advice = "(the last checkpoint is from before this step)"
        named = dict(self.nets.named_parameters())
        if bad := self.not_finite(named):
            return f"step {self.steps}: the weight {bad[0]} is not finite {advice}"
        members = set(map(id, self.parameters[group]))
        bad = self.not_finite({n: p.grad for n, p in named.items() if id(p) in members and p.grad is not None})
        gradients = f"the gradient of {bad[0]} ({len(bad)} in all) is" if bad else f"the gradient norm of '{group}' is"
        losses = [float(u.loss.detach()) for u in updates]
        if not all(map(math.isfinite, losses)):
            return (
                f"step {self.steps}: the loss of '{group}' is {losses[0]:g} and {gradients} not finite; all weights "
                f"are, so look at the data and the loss {advice}"
            )
        return f"step {self.steps}: {gradients} not finite; lower the learning rate or look at the data {advice}"

    def not_finite(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of the tensors that hold anything but numbers, in any process's part."""
        flags = [float(not torch.isfinite(part).all()) for part in self.parallel.local(list(tensors.values()))]
        return [name for name, flag in zip(tensors, self.parallel.total(*flags), strict=True) if flag]

    def record(self) -> dict[str, Any]:
        """What there is to tell since the last record, averaged over the processes."""
        counted = {"step": self.steps, "images": self.steps * self.settings.batch, "seconds": round(self.seconds, 3)}
        logs, self.recent = self.numbers(), {}
        return {**counted, **logs}

    def numbers(self) -> dict[str, float]:
        """The recent scalars as numbers, averaged over the processes."""
        values = self.parallel.total(*(float(value) / self.parallel.world for value in self.recent.values()))
        return dict(zip(self.recent, values, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Everything that moves, as named tensors."""
        tensors: dict[str, Tensor] = {}
        for name in self.kept():
            tensors |= checkpoint.module_tensors(name, self.nets.get_submodule(name))
        for name, optimiser in self.optimisers.items():
            tensors |= checkpoint.optimiser_tensors(name, optimiser)
        for name, averages in self.averages.items():
            for i, average in enumerate(averages):
                tensors |= {f"average/{name}/{i}/{j}": w for j, w in enumerate(average.weights)}
        return tensors

    def identity(self, data: Mapping[str, Samples]) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "method": repr(self.method),
            "data": ", ".join(f"{source.name} ({len(source)} samples)" for source in data.values()),
            "batch": self.settings.batch, "seed": self.settings.seed, "averages": repr(self.settings.averages),
        }  # fmt: skip

    def save(self, saved: Checkpoint, data: Mapping[str, Samples]) -> None:
        """Write the checkpoint."""
        updates = {name: [a.updates for a in averages] for name, averages in self.averages.items()}
        counters = {
            "steps": self.steps, "seconds": self.seconds, "averages": updates, "recent": self.numbers(),
            "precision": self.precision, "run": self.identity(data),
        }  # fmt: skip
        saved.write(self.state(), counters)

    @torch.no_grad()
    def load(self, saved: Checkpoint, data: Mapping[str, Samples]) -> None:
        """Take up a checkpoint; ValueError when it is damaged or belongs to another run."""
        counters = saved.counters()
        for name, value in self.identity(data).items():
            if counters["run"][name] != value:
                raise ValueError(
                    f"{saved.path}: this folder holds a run with {name} {counters['run'][name]}, not {value}; repeat "
                    "its command to resume it, or choose another folder"
                )
        self.allocate_moments()
        tensors = saved.tensors(self.state())
        for name in self.kept():
            checkpoint.load_module(name, self.nets.get_submodule(name), tensors)
        for name, optimiser in self.optimisers.items():
            checkpoint.load_optimiser(name, optimiser, tensors)
        for name, averages in self.averages.items():
            for i, average in enumerate(averages):
                average.updates = counters["averages"][name][i]
                for j, weight in enumerate(average.weights):
                    weight.copy_(tensors[f"average/{name}/{i}/{j}"])
        self.steps, self.seconds, self.recent = counters["steps"], counters["seconds"], counters["recent"]
        if self.settings.precision == "auto":
            self.precision = counters["precision"]  # a second measurement could choose otherwise

    def allocate_moments(self) -> None:
        """Give the optimisers the state that a checkpoint is read into, by a step that loading undoes."""
        for group, optimiser in self.optimisers.items():
            for parameter in self.parameters[group]:
                parameter.grad = torch.zeros_like(parameter)
            optimiser.step()
        self.forget_gradients()

    def kept(self) -> list[str]:
        """The networks that a checkpoint holds: those that train and those the method moves."""
        trained = [name for group in self.nets.groups.values() for name in group.modules]
        return sorted({*trained, *self.nets.moved})

    def snapshot(self, folder: Path) -> None:
        """Store the power-function averages under the names that the method's product gives its parameters."""
        product = {id(p): name for name, p in self.method.student(self.nets).named_parameters()}
        held: dict[float, dict[str, Tensor]] = {}
        updates = 0
        for name, averages in self.averages.items():
            for average in averages:
                if isinstance(average.profile, Power):
                    updates = average.updates
                    pairs = zip(self.averaged[name], average.weights, strict=True)
                    found = {product[id(p)]: self.parallel.whole(w) for p, w in pairs if id(p) in product}
                    held.setdefault(average.profile.sigma_rel, {}).update(found)
        if len(held) >= 2 and updates and self.parallel.main:
            snapshots.write(folder, self.steps, updates, held)

    @torch.no_grad()
    def finish(self, plain: Networks) -> tuple[Student | Denoiser, Mapping[str, nn.Module]]:
        """The method's product and what it hands on, with averaged weights where it has them, in evaluation mode.

        ``plain`` are the networks to put it in: the run's own, or uncut ones when it is sharded.
        """
        for name, averages in self.averages.items():
            if averages and averages[0].updates:
                local = self.parallel.local
                torch._foreach_copy_(local(self.averaged[name]), local(averages[0].weights))
        if plain is not self.nets:
            for name in self.kept():
                weights = self.nets.get_submodule(name).state_dict()
                plain.get_submodule(name).load_state_dict({k: self.parallel.whole(w) for k, w in weights.items()})
        plain.requires_grad_(False).eval()
        return self.method.student(plain).requires_grad_(False).eval(), self.method.hands_on(plain)


def mean_logs(updates: list[Update]) -> dict[str, Tensor | float]:
    """The loss and logged scalars of one update, averaged over micro-batches; nothing is read from the device."""
    group = updates[0].group
    logs: dict[str, Tensor | float] = {f"{group}/loss": sum(u.loss.detach() for u in updates) / len(updates)}
    for name in updates[0].logs:
        logs[f"{group}/{name}"] = sum(u.logs[name] for u in updates) / len(updates)
    return logs


def train(method: Method, start: Start, settings: Settings, folder: Path | None = None, *, show: bool = True) -> Result:
    """Run ``method`` from ``start`` until the budget is used.

    With a ``folder`` the run is recorded (``log.jsonl``), saved every ``save_seconds`` and resumed when the folder
    already holds a checkpoint.  Raises :class:`Interrupted` after SIGTERM or Ctrl-C (saved), :class:`NonFiniteError`
    when a gradient stops being finite, ValueError for settings that cannot work, a damaged checkpoint, and a folder
    that another run holds or has left.
    """
    main = Parallel.from_environment(torch.device(settings.device)).main
    with only_run_in(folder) if folder is not None and main else nullcontext():
        return train_held(method, start, settings, folder, show=show)


def train_held(
    method: Method, start: Start, settings: Settings, folder: Path | None = None, *, show: bool = True
) -> Result:
    """What :func:`train` does, in a folder that the caller holds against other runs."""
    if settings.tensorboard and folder is None:
        raise ValueError("tensorboard=True writes into the run folder: give one")
    start = dataclasses.replace(start, data=fitted(start.data, start.teacher))
    sources = {name: fitted(source, start.teacher) for name, source in method.sources(start).items()}
    device = torch.device(settings.device)
    parallel = processes(settings, device)

    def networks() -> Networks:
        torch.manual_seed(derive_seed(settings.seed, "networks"))
        return method.networks(start.apart() if settings.shard else start)

    with repeated_draws(device):  # PyTorch's generator, which new layers and dropout use, is left as it was
        run = Run(method, networks(), settings, parallel)
        records = loop(run, sources, folder, show and parallel.main)
        model, made = run.finish(networks() if settings.shard else run.nets)
    return Result(model, run.steps, run.steps * settings.batch, run.seconds, records, made)


def named(data: Samples | Mapping[str, Samples]) -> Mapping[str, Samples]:
    """The sources of a run by name; a single one is the main one."""
    return data if isinstance(data, Mapping) else {MAIN: data}


def processes(settings: Settings, device: torch.device) -> Parallel:
    """What ``torchrun`` started; ValueError when there is nothing to cut networks over."""
    if not settings.shard:
        return Parallel.from_environment(device)
    from fewstep.training.sharding import Sharded  # a second of imports that few runs need

    parallel = Sharded.from_environment(device)
    if parallel.world == 1:
        raise ValueError("shard=True cuts networks over several processes: start them with torchrun --nproc-per-node")
    return parallel


def loop(run: Run, data: Mapping[str, Samples], folder: Path | None, show: bool) -> list[dict[str, Any]]:
    """Step until the budget is used, saving, recording and listening for signals on the way; the records."""
    settings, parallel = run.settings, run.parallel
    saved = None if folder is None else parallel.checkpoint(folder)
    if saved is not None and saved.exists():
        run.load(saved, data)
    if parallel.total(run.steps)[0] != run.steps * parallel.world:
        raise ValueError(f"{folder}: the processes found different checkpoints; all must see the same run folder")
    records = Records(folder / "log.jsonl" if folder is not None and parallel.main else None, run.steps)
    outputs: list[Records | TensorBoard] = [records]
    if folder is not None and parallel.main:
        snapshots.forget_after(folder / "snapshots", run.steps)
        if settings.tensorboard:
            outputs.append(TensorBoard(folder / "tensorboard", run.steps))
    bar = Bar(run.method.name, show)
    said = ""
    start, before, last_save = time.perf_counter(), run.seconds, time.perf_counter()
    with stop_on_signals() as caught:
        try:
            while (fraction := run.progress().fraction) < 1:
                run.step(data)
                now = time.perf_counter()
                # the main process's clock counts; a signal to any process stops all
                mine = (before + now - start, now - last_save > settings.save_seconds) if parallel.main else (0.0, 0.0)
                run.seconds, due, signals = parallel.total(*mine, len(caught))
                after = run.progress().fraction
                if run.steps % settings.log_steps == 0 or run.steps == 1 or after == 1:
                    record = run.record()
                    for output in outputs:
                        output.write(record)
                    said = losses(record)
                bar.update(after, said)
                saving = bool(due or signals or after == 1)
                if saving:
                    run.check_weights()
                if folder is not None and snapshots.due(fraction, after):
                    run.snapshot(folder / "snapshots")
                if saving and saved is not None:
                    run.save(saved, data)
                    last_save = time.perf_counter()
                if signals:
                    where = f"saved in {folder}; the same command resumes" if saved else "nothing was saved"
                    raise Interrupted(f"stopped after {run.steps} steps, {where}", *caught[:1])
        finally:
            bar.close()
            if run.feed is not None:
                run.feed.close()
            for output in outputs:
                output.close()
    return records.lines


def losses(record: dict[str, Any]) -> str:
    """The losses of a record, for the progress bar."""
    found = {name.removesuffix("/loss"): value for name, value in record.items() if name.endswith("/loss")}
    return "  ".join(f"{group} {value:.3g}" for group, value in found.items())
