"""Optimizers and their learning rates, from what a method declares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.methods.method import Networks, Progress
from fewstep.methods.optimizer import Optimizer

#: Up to so many numbers, waking other threads of the CPU costs a step more than they save (9 and 14 % of a whole
#: training step of the bundled models, where two threads wait passively).
FEW_NUMBERS = 2**22


def make_optimizer(spec: Optimizer, nets: Networks, group: str) -> torch.optim.Optimizer:
    """Fused or multi-tensor optimizers only: per-tensor ones cost more than a small network's backward pass."""
    parameters: list[Any] = nets.group_parameters(group)
    if spec.rates:
        parameters = [
            {"params": list(nets.get_submodule(name).parameters()), "rate": spec.rates.get(name, 1.0)}
            for name in spec.modules
        ]
    if spec.kind == "sgd":
        return torch.optim.SGD(
            parameters, spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay,
            foreach=True,
        )  # fmt: skip
    if spec.kind == "radam":
        return torch.optim.RAdam(
            parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, foreach=True
        )
    kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
    return kind(parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


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
