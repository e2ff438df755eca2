"""The trainer: everything a method must not know.

Devices, precision, optimisers, accumulation, averages, exact resume, budgets, records, signals and processes.  A
method is a generator of updates; the trainer drives one generator per micro-batch in lock step, runs each loss
backward as soon as it is yielded (so that one graph lives at a time), averages gradients over micro-batches and
processes, and steps the group that the update names.

To resume a run, run the same command again: a run folder holds ``checkpoint.safetensors``, and data order and random
draws are functions of the seed and the number of steps done.
"""

from __future__ import annotations

import fcntl
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset, epoch_indices
from fewstep.denoisers import Denoiser
from fewstep.distill.method import Batch, Method, Networks, Optimiser, Progress, Update
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling.rollout import Student
from fewstep.training import checkpoint
from fewstep.training.budget import Budget
from fewstep.training.ema import Average, Power, Profile
from fewstep.training.parallel import Parallel
from fewstep.training.precision import Precision, autocast, resolve
from fewstep.training.progress import Bar, Records


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

    ``batch`` is the *global* batch: all processes and all ``accumulate`` micro-batches together.
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

    def __post_init__(self) -> None:
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be positive and divisible by accumulate={self.accumulate}; "
                "batch counts all micro-batches together"
            )
        if self.log_steps < 1:
            raise ValueError(f"log_steps={self.log_steps} must be at least 1")


@dataclass
class Result:
    """What a run made: the student (or teacher), with the first average's weights when the method has one, and its
    cost."""

    model: Student | Denoiser
    steps: int
    images: int
    seconds: float
    records: list[dict[str, Any]]


class Run:
    """One training run in memory: networks, optimisers, averages and counters."""

    def __init__(self, method: Method, nets: Networks, settings: Settings, parallel: Parallel) -> None:
        self.method, self.nets, self.settings, self.parallel = method, nets, settings, parallel
        self.device = torch.device(settings.device)
        nets.to(self.device)
        self.precision = resolve(settings.precision, self.device)
        self.optimisers = {name: make_optimiser(group, nets, name) for name, group in nets.groups.items()}
        self.averages = {
            name: [Average(profile, self.weights(name)) for profile in settings.averages] for name in nets.ema
        }
        self.steps = 0
        self.seconds = 0.0

    def weights(self, name: str) -> list[Tensor]:
        return list(self.nets.get_submodule(name).parameters())

    def progress(self) -> Progress:
        images = self.steps * self.settings.batch
        return Progress(self.steps, images, self.settings.budget.fraction(self.steps, images, self.seconds))

    def step(self, data: Dataset) -> dict[str, float]:
        """One iteration of the method; returns its logged scalars."""
        progress = self.progress()
        pending = [self.method.updates(self.nets, batch, progress) for batch in self.batches(data)]
        logs: dict[str, float] = {}
        while updates := self.backward(pending):
            self.apply(updates[0].group, progress, logs)
            for name, value in mean_logs(updates).items():
                logs[name] = value
            if updates[0].then is not None:
                updates[0].then()
        self.steps += 1
        return logs

    def batches(self, data: Dataset) -> Iterator[Batch]:
        """This process's micro-batches of the current iteration."""
        settings, parts = self.settings, self.settings.accumulate * self.parallel.world
        if settings.batch % parts:
            raise ValueError(f"batch={settings.batch} does not divide over {parts} parts (processes x accumulate)")
        indices = epoch_indices(len(data), self.steps * settings.batch, settings.batch, settings.seed)
        for micro in range(settings.accumulate):
            part = self.parallel.rank * settings.accumulate + micro
            mine = indices.chunk(parts)[part]
            labels = None if data.labels is None else data.labels[mine].to(self.device)
            noise = None if data.noise is None else data.noise[mine].to(self.device)
            rng = Rng(settings.seed, "step", self.steps, part=part, parts=parts, device=self.device)
            torch.manual_seed(derive_seed(settings.seed, "dropout", self.steps, part))
            yield Batch(data.read(mine).to(self.device), labels, rng, noise)

    def backward(self, pending: list[Iterator[Update]]) -> list[Update]:
        """The next update of every micro-batch, each run backward at once; empty when the iteration is over."""
        updates: list[Update] = []
        for generator in pending:
            with autocast(self.precision, self.device):
                update = next(generator, None)
            if update is None:
                continue
            if not updates:
                self.nets.zero_grad(set_to_none=True)
            (update.loss / len(pending) if len(pending) > 1 else update.loss).backward()
            updates.append(update)
        if updates and len(updates) != len(pending):
            raise RuntimeError(f"{self.method.name}: micro-batches yielded different numbers of updates")
        return updates

    def apply(self, group: str, progress: Progress, logs: dict[str, float]) -> None:
        """Average gradients over processes, check and clip them, step the group's optimiser and averages."""
        spec, optimiser = self.nets.groups[group], self.optimisers[group]
        gradients = [p.grad for p in optimiser.param_groups[0]["params"] if p.grad is not None]
        self.parallel.average(gradients)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        size = float(norm)
        if not math.isfinite(size):
            raise NonFiniteError(self.name_of_bad(group))
        if spec.clip is not None and size > spec.clip:
            torch._foreach_mul_(gradients, spec.clip / size)
        optimiser.param_groups[0]["lr"] = spec.lr * rate(spec, progress)
        optimiser.step()
        logs[f"{group}/grad_norm"] = size
        for name in spec.modules:
            for average in self.averages.get(name, ()):
                average.update(self.weights(name))

    def name_of_bad(self, group: str) -> str:
        """Which gradient is not finite."""
        for name in self.nets.groups[group].modules:
            for key, parameter in self.nets.get_submodule(name).named_parameters():
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                    return (
                        f"step {self.steps}: the gradient of {name}.{key} is not finite; lower the learning rate or "
                        "look at the data (the last checkpoint is from before this step)"
                    )
        return f"step {self.steps}: the gradient norm of group '{group}' overflowed"

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name in self.kept():
            tensors |= checkpoint.module_tensors(name, self.nets.get_submodule(name))
        for name, optimiser in self.optimisers.items():
            tensors |= checkpoint.optimiser_tensors(name, optimiser)
        counters: dict[str, Any] = {"steps": self.steps, "seconds": self.seconds, "averages": {}}
        for name, averages in self.averages.items():
            counters["averages"][name] = [a.updates for a in averages]
            for i, average in enumerate(averages):
                tensors |= {f"average/{name}/{i}/{j}": w for j, w in enumerate(average.weights)}
        checkpoint.write(path, tensors, counters)

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        tensors, counters = checkpoint.read(path)
        for name in self.kept():
            checkpoint.load_module(name, self.nets.get_submodule(name), tensors)
        for name, optimiser in self.optimisers.items():
            checkpoint.load_optimiser(name, optimiser, tensors)
        for name, averages in self.averages.items():
            for i, average in enumerate(averages):
                average.updates = counters["averages"][name][i]
                average.weights = [
                    tensors[f"average/{name}/{i}/{j}"].to(self.device) for j in range(len(average.weights))
                ]
        self.steps, self.seconds = counters["steps"], counters["seconds"]

    def kept(self) -> list[str]:
        """The networks that a checkpoint holds: those that train and those the method moves."""
        trained = [name for group in self.nets.groups.values() for name in group.modules]
        return sorted({*trained, *self.nets.moved})

    @torch.no_grad()
    def finish(self) -> Student | Denoiser:
        """The method's product, with averaged weights where it has them, in evaluation mode."""
        for name, averages in self.averages.items():
            if averages and averages[0].updates:
                torch._foreach_copy_(self.weights(name), averages[0].weights)
        return self.method.student(self.nets).requires_grad_(False).eval()


def make_optimiser(spec: Optimiser, nets: Networks, group: str) -> torch.optim.Optimizer:
    """Fused or multi-tensor optimisers only: per-tensor ones cost more than a small network's backward pass."""
    parameters = nets.group_parameters(group)
    if spec.kind == "radam":
        return torch.optim.RAdam(
            parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, foreach=True
        )
    kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
    return kind(parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def rate(spec: Optimiser, progress: Progress) -> float:
    """The learning rate at this point, as a multiple of ``lr``."""
    warm = min(1.0, (progress.step + 1) / spec.warmup) if spec.warmup else 1.0
    left = {
        "constant": 1.0,
        "linear": 1 - progress.fraction,
        "cosine": (1 + math.cos(math.pi * progress.fraction)) / 2,
    }[spec.decay]
    return warm * left


def mean_logs(updates: list[Update]) -> dict[str, float]:
    """The loss and logged scalars of one update, averaged over micro-batches."""
    group = updates[0].group
    logs = {f"{group}/loss": sum(float(u.loss.detach()) for u in updates) / len(updates)}
    for name in updates[0].logs:
        logs[f"{group}/{name}"] = sum(float(u.logs[name]) for u in updates) / len(updates)
    return logs


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C become an entry in the list, so that the step in progress ends well."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; ValueError when another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another run is training in this folder; wait for it or choose another") from None
        yield


def train(
    method: Method,
    teacher: Denoiser,
    data: Dataset,
    settings: Settings,
    folder: Path | None = None,
    *,
    show: bool = True,
) -> Result:
    """Run ``method`` from ``teacher`` on ``data`` until the budget is used.

    With a ``folder`` the run is recorded (``log.jsonl``), saved every ``save_seconds`` and resumed when the folder
    already holds a checkpoint.  Raises :class:`Interrupted` after SIGTERM or Ctrl-C (saved), :class:`NonFiniteError`
    when a gradient stops being finite, ValueError for settings that cannot work.
    """
    if tuple(data.shape) != tuple(teacher.shape):
        raise ValueError(f"data '{data.name}' has samples {list(data.shape)}, the teacher makes {list(teacher.shape)}")
    if (data.classes or 0) > (teacher.classes or 0) and teacher.classes:
        raise ValueError(f"data '{data.name}' has {data.classes} classes, the teacher knows {teacher.classes}")
    if not teacher.classes:
        data = Dataset(data.name, data.x, None, (), data.noise)
    parallel = Parallel.from_environment(torch.device(settings.device))
    run = Run(method, method.networks(teacher), settings, parallel)
    if folder is None or not parallel.main:
        saved = None if folder is None else folder / "checkpoint.safetensors"
        return loop(run, data, saved, None, show and parallel.main)
    with only_run_in(folder):
        return loop(run, data, folder / "checkpoint.safetensors", folder / "log.jsonl", show)


def loop(run: Run, data: Dataset, saved: Path | None, log: Path | None, show: bool) -> Result:
    """Step until the budget is used, saving, recording and listening for signals on the way."""
    if saved is not None and saved.exists():
        run.load(saved)
    records = Records(log, run.steps) if log is not None else None
    bar = Bar(run.method.name, show)
    kept: list[dict[str, Any]] = []
    recent: dict[str, float] = {}  # since the last record: a group that moves in one step of five is recorded too
    start, before = time.perf_counter(), run.seconds
    last_save = start
    with stop_on_signals() as caught:
        try:
            while run.progress().fraction < 1:
                logs = run.step(data)
                recent |= logs
                run.seconds = run.parallel.agree(before + time.perf_counter() - start)
                if run.steps % run.settings.log_steps == 0 or run.steps == 1:
                    images = run.steps * run.settings.batch
                    record = {"step": run.steps, "images": images, "seconds": round(run.seconds, 3), **recent}
                    recent = {}
                    kept.append(record)
                    if records is not None:
                        records.write(record)
                bar.update(run.progress().fraction, note(logs))
                stopping = bool(run.parallel.agree(float(len(caught))))
                due = time.perf_counter() - last_save > run.settings.save_seconds
                if saved is not None and run.parallel.main and (stopping or due):
                    run.save(saved)
                    last_save = time.perf_counter()
                if stopping:
                    where = f"saved in {saved.parent}; the same command resumes" if saved else "nothing was saved"
                    raise Interrupted(f"stopped after {run.steps} steps, {where}", *caught[:1])
            if saved is not None and run.parallel.main:
                run.save(saved)
        finally:
            bar.close()
            if records is not None:
                records.close()
    run.parallel.barrier()
    return Result(run.finish(), run.steps, run.steps * run.settings.batch, run.seconds, kept)


def note(logs: dict[str, float]) -> str:
    """The losses of a step, for the progress bar."""
    return "  ".join(f"{name.removesuffix('/loss')} {value:.3g}" for name, value in logs.items() if name.endswith("/loss"))
