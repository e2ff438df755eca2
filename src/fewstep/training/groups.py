"""The groups of a method's networks: their gradients, optimizers and averages, and what moves them.

No update waits for the device: whether its numbers are numbers is looked at before every record, snapshot and
checkpoint (:mod:`fewstep.training.nonfinite`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.methods.method import Networks, Progress, Update
from fewstep.training import checkpoint
from fewstep.training.ema import Average
from fewstep.training.nonfinite import (
    BEFORE,
    NonFiniteError,
    Tally,
    Watch,
    clip_norm,
    describe,
    waits,
    without_nonfinite,
)
from fewstep.training.optimizers import few_threads, make_optimizer, rate, set_rate
from fewstep.training.parallel import Parallel
from fewstep.training.profiles import Profile


class Groups:
    """The groups in memory; ``steps`` counts iterations done."""

    def __init__(self, nets: Networks, parallel: Parallel, profiles: Sequence[Profile]) -> None:
        self.nets, self.parallel = nets, parallel
        self.optimizers = {name: make_optimizer(group, nets, name) for name, group in nets.groups.items()}
        self.parameters = {name: nets.group_parameters(name) for name in nets.groups}
        self.averaged = {name: nets.weights(name) for name in nets.ema}
        self.averages = {
            name: [Average(profile, weights) for profile in profiles] for name, weights in self.averaged.items()
        }
        self.watches = {name: Watch() for name, group in nets.groups.items() if group.nonfinite == "stop"}
        self.tallies = {name: Tally() for name, group in nets.groups.items() if group.nonfinite != "stop"}
        self.steps = 0

    def forget_gradients(self) -> None:
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def apply(self, updates: list[Update], progress: Progress) -> tuple[bool, dict[str, Tensor | float]]:
        """Average gradients over processes, check and clip them, step the groups' optimizers and averages.

        Whether any group has moved, and what there is to record; of a step without numbers only that it happened.
        """
        gradients = {group: self.gradients(group) for group in updates[0].groups}
        sizes = {group: self.parallel.norm(found) for group, found in gradients.items()}
        ways = {group: self.judge(updates, group, gradients[group], sizes[group]) for group in gradients}
        logs = mean_logs(updates) if set(ways.values()) == {"move"} else {}
        for group, found in gradients.items():
            spec = self.nets.groups[group]
            lr = spec.lr * rate(spec, progress)
            if ways[group] == "zero":
                sizes[group] = self.parallel.norm(without_nonfinite(found))
            if ways[group] != "skip":
                self.move(group, found, sizes[group], lr)
                logs |= {f"{group}/grad_norm": sizes[group], f"{group}/lr": lr}
            if group in self.tallies:
                logs[f"{group}/nonfinite"] = float(self.tallies[group].bad)
        return set(ways.values()) != {"skip"}, logs

    def gradients(self, group: str) -> list[Tensor]:
        """The gradients of a group, averaged over the processes; this process's part of them when they are cut."""
        found = self.parallel.local([p.grad for p in self.parameters[group] if p.grad is not None])
        self.parallel.average(found)
        return found

    def judge(self, updates: list[Update], group: str, gradients: list[Tensor], size: Tensor) -> str:
        """What to do with the gradients: "move", or for ones that are no numbers "skip" or "zero", or an error.

        Where looking would wait for the device, a stop is put off to :meth:`check_gradients`.
        """
        tally = self.tallies.get(group)
        if tally is None and waits(size.device):
            norms = torch.stack([norm.to(size.dtype) for norm in torch._foreach_norm(gradients)])
            self.watches[group].look(self.steps, mean_loss(updates), size, norms)
            return "move"
        finite = math.isfinite(float(size))
        if tally is not None:
            tally.updates += 1
            tally.bad += not finite
        if finite:
            return "move"
        if tally is None or tally.too_many():
            often = f"; it was so at {tally.bad} of {tally.updates} updates of '{group}'" if tally else ""
            raise NonFiniteError(self.diagnosis(updates, group) + often)
        return self.nets.groups[group].nonfinite

    def move(self, group: str, gradients: list[Tensor], size: Tensor, lr: float) -> None:
        """One step of a group's optimizer, and of the averages of its networks."""
        spec, optimizer = self.nets.groups[group], self.optimizers[group]
        if spec.clip is not None:
            clip_norm(gradients, size, spec.clip)
        set_rate(optimizer, lr)
        with few_threads(optimizer):
            optimizer.step()
            for name in spec.modules:
                for average in self.averages.get(name, ()):
                    average.update(self.averaged[name])

    def check_gradients(self) -> None:
        """NonFiniteError when a gradient was no number since the run started; this waits for the device."""
        for group, watch in self.watches.items():
            if (step := watch.found()) is None:
                continue
            named = {id(p): name for name, p in self.nets.named_parameters()}
            moved = [named[id(p)] for p in self.parameters[group]]
            flags = self.parallel.total(*(float(not f) for f in watch.norms.isfinite().tolist()))
            # gradients that a loss does not reach have no norm, and then the names are not known
            bad = [n for n, f in zip(moved, flags, strict=True) if f] if len(moved) == len(flags) else []
            raise NonFiniteError(describe(step, group, bad, [float(watch.loss)]))

    def check_weights(self) -> None:
        """NonFiniteError when a step left a weight that is no number, so that none is saved or given back."""
        self.check_gradients()
        if bad := self.not_finite(dict(self.nets.named_parameters())):
            raise NonFiniteError(
                f"step {self.steps - 1}: it left the weight {bad[0]} not finite; lower the learning rate (the last "
                "checkpoint is from before this step)"
            )

    def diagnosis(self, updates: list[Update], group: str) -> str:
        """Which tensors stopped being numbers: a weight, else the loss, else a gradient."""
        named = dict(self.nets.named_parameters())
        if bad := self.not_finite(named):
            return f"step {self.steps}: the weight {bad[0]} is not finite {BEFORE}"
        members = set(map(id, self.parameters[group]))
        bad = self.not_finite({n: p.grad for n, p in named.items() if id(p) in members and p.grad is not None})
        return describe(self.steps, group, bad, [float(u.loss.detach()) for u in updates])

    def not_finite(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of the tensors that hold anything but numbers, in any process's part."""
        flags = [float(not torch.isfinite(part).all()) for part in self.parallel.local(list(tensors.values()))]
        return [name for name, flag in zip(tensors, self.parallel.total(*flags), strict=True) if flag]

    def kept(self) -> list[str]:
        """The networks that a checkpoint holds: those that train and those the method moves."""
        trained = [name for group in self.nets.groups.values() for name in group.modules]
        return sorted({*trained, *self.nets.moved})

    def weights(self) -> dict[str, Tensor]:
        """The networks and averages, as named tensors."""
        tensors: dict[str, Tensor] = {}
        for name in self.kept():
            tensors |= checkpoint.module_tensors(name, self.nets)
        for name, averages in self.averages.items():
            for i, average in enumerate(averages):
                tensors |= {f"average/{name}/{i}/{j}": w for j, w in enumerate(average.weights)}
        return tensors

    def averaged_updates(self) -> dict[str, list[int]]:
        """How many updates each average has seen."""
        return {name: [average.updates for average in averages] for name, averages in self.averages.items()}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor], updates: Mapping[str, Sequence[int]]) -> None:
        """Take up :meth:`weights`, averages of so many ``updates``."""
        for name in self.kept():
            checkpoint.load_module(name, self.nets, dict(tensors))
        for name, averages in self.averages.items():
            for i, average in enumerate(averages):
                average.updates = updates[name][i]
                for j, weight in enumerate(average.weights):
                    weight.copy_(tensors[f"average/{name}/{i}/{j}"])

    def allocate_moments(self) -> None:
        """Give the optimisers the state that a checkpoint is read into, by a step that loading undoes."""
        for group, optimizer in self.optimizers.items():
            for parameter in self.parameters[group]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        self.forget_gradients()


def mean_loss(updates: list[Update]) -> Tensor:
    """The loss of one update, averaged over micro-batches."""
    total: Tensor = sum(u.loss.detach() for u in updates)  # type: ignore[assignment]
    return total / len(updates)


def mean_logs(updates: list[Update]) -> dict[str, Tensor | float]:
    """The loss and logged scalars of one update, averaged over micro-batches; nothing is read from the device."""
    group = "+".join(updates[0].groups)
    logs: dict[str, Tensor | float] = {f"{group}/loss": mean_loss(updates)}
    for name in updates[0].logs:
        logs[f"{group}/{name}"] = sum(u.logs[name] for u in updates) / len(updates)
    return logs
