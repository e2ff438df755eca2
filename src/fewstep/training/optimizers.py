"""Optimizers and their learning rates, from what a method declares."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.methods.method import Networks, Progress
from fewstep.methods.optimizer import Optimizer


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
