"""Optimisers and their learning rates, from what a method declares."""

from __future__ import annotations

import math

import torch

from fewstep.methods.method import Networks, Optimizer, Progress


def make_optimizer(spec: Optimizer, nets: Networks, group: str) -> torch.optim.Optimizer:
    """Fused or multi-tensor optimisers only: per-tensor ones cost more than a small network's backward pass."""
    parameters = nets.group_parameters(group)
    if spec.kind == "radam":
        return torch.optim.RAdam(
            parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, foreach=True
        )
    kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
    return kind(parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def rate(spec: Optimizer, progress: Progress) -> float:
    """The learning rate at this point, as a multiple of ``lr``."""
    warm = min(1.0, (progress.step + 1) / spec.warmup) if spec.warmup else 1.0
    left = {
        "constant": 1.0,
        "linear": 1 - progress.fraction,
        "cosine": (1 + math.cos(math.pi * progress.fraction)) / 2,
    }[spec.decay]
    return warm * left
