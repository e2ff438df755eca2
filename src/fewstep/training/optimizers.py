"""Optimizers and their learning rates, from what a method declares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.methods.method import Networks, Progress
from fewstep.methods.optimizer import Optimizer

#: Up to so many numbers, waking other threads of the CPU costs a step more than they save (9 and 14 % of a whole
#: training step of the bundled models, where two threads wait passively).
FEW_NUMBERS = 2**22
#: Beside such a number the root of a second moment is lost, in float64 too.
LARGE = 1e20


def make_optimizer(spec: Optimizer, nets: Networks, group: str) -> torch.optim.Optimizer:
    """Fused or multi-tensor optimizers only: per-tensor ones cost more than a small network's backward pass."""
    parameters: list[dict[str, Any]] = [{"params": nets.group_parameters(group)}]
    if spec.rates:
        parameters = [{"params": nets.weights(name), "rate": spec.rates.get(name, 1.0)} for name in spec.modules]
    if spec.decayed == "matrices":
        parameters = [part for whole in parameters for part in matrices_apart(whole)]
    if spec.kind == "sgd":
        return torch.optim.SGD(
            parameters, spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay,
            foreach=True,
        )  # fmt: skip
    if spec.kind == "radam":
        kind: type[torch.optim.Adam] = RectifiedAdam
    else:
        kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
    return kind(parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def matrices_apart(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A group as two: the weights of two dimensions and more, and those of fewer, which do not decay."""
    yield {**group, "params": [p for p in group["params"] if p.ndim >= 2]}
    yield {**group, "params": [p for p in group["params"] if p.ndim < 2], "weight_decay": 0.0}


class RectifiedAdam(torch.optim.Adam):
    """RAdam (Liu et al. 2020, arXiv 1908.03265), algorithm 2, by PyTorch's fused Adam, which ``torch.optim.RAdam`` has
    not: its step costs ten times as much on a CPU.

    With ``rho = rho_inf - 2 t beta_2^t / (1 - beta_2^t)`` and ``rho_inf = 2 / (1 - beta_2) - 1``, step t is one of
    Adam's whose learning rate is multiplied by ``r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2)
    rho))``, once ``rho > 5``; before that the second moment does not count.  As in PyTorch ``eps`` is added to the
    root of the second moment itself, not of its unbiased one.
    """

    done: int | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.done = None

    def step(self, closure: Any = None) -> Any:
        if self.done is None:
            self.done = max((int(moments["step"]) for moments in self.state.values()), default=0)
        self.done += 1
        asked = [(group["lr"], group["eps"]) for group in self.param_groups]
        for group, (lr, eps) in zip(self.param_groups, asked, strict=True):
            factor, least = rectified(self.done, group["betas"][1], eps)
            group.update(lr=lr * factor, eps=least)
        try:
            return super().step(closure)
        finally:
            for group, (lr, eps) in zip(self.param_groups, asked, strict=True):
                group.update(lr=lr, eps=eps)


def rectified(step: int, beta: float, eps: float) -> tuple[float, float]:
    """The factor on Adam's learning rate at a step (from 1), and its ``eps`` there."""
    unbiased = 1 - beta**step
    last = 2 / (1 - beta) - 1
    rho = last - 2 * step * beta**step / unbiased
    if rho <= 5:
        return LARGE, LARGE  # beside it the second moment is rounded away
    share = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
    return math.sqrt(share), eps / math.sqrt(unbiased)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Put the learning rate of a step into an optimizer of :func:`make_optimizer`."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr * parameters.get("rate", 1.0)


def rate(spec: Optimizer, progress: Progress) -> float:
    """The learning rate at this point, as a multiple of ``lr``."""
    warm = min(1.0, (progress.step + 1) / spec.warmup) if spec.warmup else 1.0
    return warm * spec.course()(progress.step, progress.fraction)


@contextmanager
def few_threads(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A block for one step of an optimizer: on one thread when it is small and on the CPU.

    Threads share out elements, so that the bits are the same; their number is put back in any case.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    threads = torch.get_num_threads()
    many = sum(p.numel() for p in parameters) > FEW_NUMBERS or any(p.device.type != "cpu" for p in parameters)
    if threads == 1 or many:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
