"""The trainer: everything a method must not know.

Devices, precision, optimizers, accumulation, averages, exact resume, budgets, records, signals and processes.  A
method is a generator of updates; the trainer drives one generator per micro-batch in lock step, runs each loss
backward as soon as it is yielded (so that one graph lives at a time), averages gradients over micro-batches and
processes, and steps the group that the update names.

To resume a run, run the same command again: a run folder holds ``checkpoint.safetensors``, and data order and random
draws are functions of the seed and the number of steps done.  A step costs its passes and little else: multi-tensor
norm, clip and averages, fused optimizers.  No update waits for the device: its numbers are read when they are recorded,
and whether they are numbers is looked at before every record, snapshot and checkpoint
(:mod:`fewstep.training.nonfinite`).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter as clock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.conditions import to
from fewstep.data.dataset import Rows, Samples
from fewstep.methods.method import Batch, Method, Networks, Progress, Question, Update, advance
from fewstep.methods.start import Start
from fewstep.networks.lora import factors_in
from fewstep.randomness import Rng, derive_seed, repeated_draws, seed_own_draws
from fewstep.training import checkpoint, nonfinite, snapshots
from fewstep.training.alarms import Alarms
from fewstep.training.checkpoint import Checkpoint
from fewstep.training.feed import MAIN, Feed, fitted
from fewstep.training.groups import Groups
from fewstep.training.healthy import Healthy
from fewstep.training.interruptions import only_run_in, stop_on_signals
from fewstep.training.parallel import Parallel
from fewstep.training.precision import autocast, resolve
from fewstep.training.progress import Bar, Records, TensorBoard
from fewstep.training.settings import Settings


class Interrupted(RuntimeError):
    """The run was asked to stop by signal ``number``; it is saved and the same command resumes it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


@dataclass
class Result:
    """What a run made: a ``model`` of any kind, with the first average's weights when the method has one, and its cost.
    ``records`` are the lines of ``log.jsonl``, those before a resume included; ``made`` are the models for the stages
    after it, by role; ``choosing`` are those of the ``seconds`` in which the order of the data said what to read."""

    model: Any
    steps: int
    images: int
    seconds: float
    records: list[dict[str, Any]]
    made: Mapping[str, nn.Module] = field(default_factory=dict)
    choosing: float = 0.0


class Run(Groups):
    """One training run in memory: networks, optimizers, averages and counters."""

    def __init__(self, method: Method, nets: Networks, settings: Settings, parallel: Parallel) -> None:
        parts = settings.accumulate * parallel.world
        if settings.batch % parts:
            raise ValueError(f"batch={settings.batch} does not divide over {parts} parts (processes x accumulate)")
        self.method, self.settings = method, settings
        self.device = torch.device(settings.device)
        parallel.place(nets, self.device)
        fast = resolve(settings.precision, self.device) == "bf16"
        self.precision: Literal["fp32", "bf16"] = "bf16" if parallel.agree(fast) else "fp32"
        super().__init__(nets, parallel, settings.averages)
        self.feed: Feed | None = None
        self.seconds = self.chosen = 0.0
        # scalars since the last record, so that a group that moves in one step of five is in every record
        self.recent: dict[str, Tensor | float] = {}
        self.healthy = Healthy(self) if settings.on_alarm == "stop" else None

    @property
    def ended(self) -> bool:
        """Whether an alarm has ended the run."""
        return self.healthy is not None and self.healthy.ended

    @property
    def choosing(self) -> float:
        """The seconds in which this process's orders said what to read, those before a resume included."""
        return self.chosen + (0.0 if self.feed is None else self.feed.choosing)

    def progress(self) -> Progress:
        images = self.steps * self.settings.batch
        return Progress(self.steps, images, self.settings.budget.fraction(self.steps, images, self.seconds))

    def over(self) -> bool:
        """Whether the budget is used, the method has enough, or an alarm has ended the run."""
        progress = self.progress()
        return self.ended or progress.fraction >= 1 or self.method.enough(self.nets, progress)

    def step(self, data: Samples | Mapping[str, Samples]) -> None:
        """One iteration of the method on its data, or on its sources by name."""
        progress = self.progress()
        pending = [self.method.updates(self.nets, batch, progress) for batch in self.batches(data)]
        while updates := self.backward(pending):
            moved, logs = self.apply(updates, progress)
            self.recent |= logs
            if moved and updates[0].then is not None:
                updates[0].then()
        self.steps += 1
        if self.steps % nonfinite.CHECK_STEPS == 0:
            self.check_gradients()

    def batches(self, data: Samples | Mapping[str, Samples]) -> Iterator[Batch]:
        """This process's micro-batches of the current iteration."""
        settings, parts = self.settings, self.settings.accumulate * self.parallel.world
        first = self.parallel.rank * settings.accumulate
        mine = range(first, first + settings.accumulate)
        sources = named(data)
        if self.feed is None or not self.feed.reads(sources):
            self.chosen = self.choosing
            self.feed = Feed(sources, settings.batch, settings.seed, mine, parts, settings.order)
        # dropout is the one draw that a network makes itself, from PyTorch's own generator
        seed_own_draws(derive_seed(settings.seed, "dropout", self.steps, self.parallel.rank), self.device)
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

    def backward(self, pending: list[Iterator[Update | Question]]) -> list[Update]:
        """The next update of every micro-batch, each run backward at once; empty when the iteration is over.

        Questions about the whole batch on the way there are answered when every micro-batch has asked.
        """
        answer: Tensor | None = None
        while True:
            updates: list[Update] = []
            questions: list[Question] = []
            for generator in pending:
                with autocast(self.precision, self.device):
                    asked = advance(generator, answer)
                if isinstance(asked, Question):
                    questions.append(asked)
                elif asked is not None:
                    if not updates:
                        self.forget_gradients()
                    (asked.loss / len(pending) if len(pending) > 1 else asked.loss).backward()
                    updates.append(asked)
            if max(len(updates), len(questions)) not in (0, len(pending)) or (updates and questions):
                raise RuntimeError(f"{self.method.name}: micro-batches yielded different numbers of updates")
            if not questions:
                self.parallel.settle(self.nets)
                return updates
            answer = questions[0].answer([question.value.detach() for question in questions], self.parallel)

    def record(self) -> dict[str, Any]:
        """What there is to tell since the last record, averaged over the processes."""
        self.check_gradients()
        counted = {"step": self.steps, "images": self.steps * self.settings.batch, "seconds": round(self.seconds, 3)}
        logs, self.recent = self.numbers(), {}
        return {**counted, **logs}

    def numbers(self) -> dict[str, float]:
        """The recent scalars as numbers, averaged over the processes."""
        values = self.parallel.total(*(float(value) / self.parallel.world for value in self.recent.values()))
        return dict(zip(self.recent, values, strict=True))

    def heed(self, record: dict[str, Any]) -> None:
        """Where alarms end runs: keep the weights of a record that set none off, and at one that did put the last such
        back, which the record names."""
        if self.healthy is None:
            return
        if self.parallel.agree("alarms" in record):  # others than the main process may not know all records
            self.healthy.put_back(self)
            record["healthy"] = self.healthy.step
        else:
            self.healthy.keep(self)

    def state(self) -> dict[str, Tensor]:
        """Everything that moves, as named tensors."""
        tensors = self.weights()
        for name, optimizer in self.optimizers.items():
            tensors |= checkpoint.optimizer_tensors(name, optimizer)
        return tensors if self.healthy is None else tensors | self.healthy.state()

    def identity(self, data: Mapping[str, Samples]) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "method": repr(self.method),
            "data": ", ".join(f"{source.name} ({len(source)} samples)" for source in data.values()),
            "batch": self.settings.batch, "seed": self.settings.seed, "averages": repr(self.settings.averages),
            "order": str(self.settings.order),
        }  # fmt: skip

    def save(self, saved: Checkpoint, data: Mapping[str, Samples]) -> None:
        """Write the checkpoint."""
        counters = {
            "steps": self.steps, "seconds": self.seconds, "averages": self.averaged_updates(), "recent": self.numbers(),
            "precision": self.precision, "run": self.identity(data),
            "nonfinite": {name: [tally.bad, tally.updates] for name, tally in self.tallies.items()},
            "healthy": None if self.healthy is None else self.healthy.counters(), "choosing": self.choosing,
        }  # fmt: skip
        saved.write(self.state(), counters)

    @torch.no_grad()
    def load(self, saved: Checkpoint, data: Mapping[str, Samples]) -> None:
        """Take up a checkpoint; ValueError when it is damaged or belongs to another run."""
        counters = saved.counters()
        for name, value in self.identity(data).items():
            if counters["run"].get(name, value) != value:
                raise ValueError(
                    f"{saved.path}: this folder holds a run with {name} {counters['run'][name]}, not {value}; repeat "
                    "its command to resume it, or choose another folder"
                )
        self.allocate_moments()
        tensors = saved.tensors(self.state())
        self.put(tensors, counters["averages"])
        for name, optimizer in self.optimizers.items():
            checkpoint.load_optimizer(name, optimizer, tensors)
        self.steps, self.seconds, self.recent = counters["steps"], counters["seconds"], counters["recent"]
        self.chosen = counters.get("choosing", 0.0)  # which earlier versions did not count
        self.tallies |= {name: nonfinite.Tally(*counts) for name, counts in counters.get("nonfinite", {}).items()}
        if self.healthy is not None:
            self.healthy.load(self, tensors, counters.get("healthy"))
        if self.settings.precision == "auto":
            self.precision = counters["precision"]  # a second measurement could choose otherwise

    def snapshot(self, folder: Path) -> None:
        """Store the power-function averages under the names that the method's product gives its parameters."""
        self.check_gradients()
        if not self.averages:
            return  # what a method makes can cost a pass over the data
        product = {id(p): name for name, p in self.method.student(self.nets).named_parameters()}
        held: dict[float, dict[str, Tensor]] = {}
        updates = 0
        for name, averages in self.averages.items():
            for average in averages:
                if average.profile.width is not None:
                    updates = average.updates
                    pairs = zip(self.averaged[name], average.weights, strict=True)
                    found = {product[id(p)]: self.parallel.whole(w) for p, w in pairs if id(p) in product}
                    held.setdefault(average.profile.width, {}).update(found)
        if len(held) >= 2 and updates and self.parallel.main:
            snapshots.write(folder, self.steps, updates, held)

    @torch.no_grad()
    def finish(self, plain: Networks) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """The method's product and what it hands on, with averaged weights where it has them, in evaluation mode.

        ``plain`` are the networks to put it in: the run's own, or uncut ones when it is sharded.
        """
        for name, averages in self.averages.items():
            if averages and averages[0].updates:
                local = self.parallel.local
                torch._foreach_copy_(local(self.averaged[name]), local(averages[0].weights))
        if plain is not self.nets:
            for name in self.kept():
                plain.load(name, {k: self.parallel.whole(w) for k, w in self.nets.state(name).items()})
        plain.requires_grad_(False).eval()
        return self.method.student(plain).requires_grad_(False).eval(), self.method.hands_on(plain)


def train(method: Method, start: Start, settings: Settings, folder: Path | None = None, *, show: bool = True) -> Result:
    """Run ``method`` from ``start``, whose models it freezes, until the budget is used or, where they may, an alarm
    ends it.

    With a ``folder`` the run is recorded (``log.jsonl``), saved every ``save_seconds`` and resumed when the folder
    already holds a checkpoint.  Raises :class:`Interrupted` after SIGTERM or Ctrl-C (saved),
    :class:`~fewstep.training.nonfinite.NonFiniteError` when a gradient stops being finite, ValueError for settings that
    cannot work, a damaged checkpoint, and a folder that another run holds or has left.
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
    start = dataclasses.replace(start, data=fitted(start.data, start.teacher), low_rank=settings.low_rank)
    sources = {name: fitted(source, start.teacher) for name, source in method.sources(start).items()}
    device = torch.device(settings.device)
    parallel = processes(settings, device)

    def networks() -> Networks:
        torch.manual_seed(derive_seed(settings.seed, "networks"))
        return method.networks(start.apart() if settings.shard else start)

    with repeated_draws(device):  # PyTorch's generator, which new layers and dropout use, is left as it was
        run = Run(method, networks(), settings, parallel)
        if start.low_rank is not None and not factors_in(run.nets):
            raise ValueError(f"lora_rank={settings.lora_rank}: {method.name} trains no copy of a network")
        records = loop(run, sources, folder, show and parallel.main)
        model, made = run.finish(networks() if settings.shard else run.nets)
    return Result(model, run.steps, run.steps * settings.batch, run.seconds, records, made, run.choosing)


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
    """Step until the budget is used or an alarm ends the run, saving, recording and listening for signals on the way;
    the records."""
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
    bar, alarms = Bar(run.method.name, show), Alarms(run.method.unstable, show)
    said = ""
    start, before, last_save = clock(), run.seconds, clock()
    with stop_on_signals() as caught:
        try:
            while not run.over():
                fraction = run.progress().fraction
                run.step(data)
                now = clock()
                # the main process's clock counts; a signal to any process stops all
                mine = (before + now - start, now - last_save > settings.save_seconds) if parallel.main else (0.0, 0.0)
                run.seconds, due, signals = parallel.total(*mine, len(caught))
                after, last = run.progress().fraction, run.over()
                if run.steps % settings.log_steps == 0 or run.steps == 1 or last:
                    record = run.record()
                    alarms.check(record, records.lines)
                    run.heed(record)
                    alarms.tell_end(record)
                    for output in outputs:
                        output.write(record)
                    said = losses(record)
                bar.update(after, said)
                saving = bool(due or signals or last or run.ended)
                if saving:
                    run.check_weights()
                if folder is not None and snapshots.due(fraction, after) and not run.ended:
                    run.snapshot(folder / "snapshots")
                if saving and saved is not None:
                    run.save(saved, data)
                    last_save = clock()
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
