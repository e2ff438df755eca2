"""Gradients that are no numbers: noticed without waiting for the device, and what is done about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: What every message about ruined numbers ends with.
BEFORE = "(the last checkpoint is from before this step)"
#: Where looking at the norm would wait for the device, it is looked at before every record, snapshot and checkpoint,
#: and after so many steps at most.
CHECK_STEPS = 20
#: A run that skips or mends steps goes on while they are at most this share of a group's updates ...
MOST_BAD = 0.1
#: ... or so few.
FEW_BAD = 10


class NonFiniteError(RuntimeError):
    """A loss or gradient stopped being a number; the message names the tensor."""


def waits(device: torch.device) -> bool:
    """Whether looking at a number on the device waits for all that it was asked to do before."""
    return device.type != "cpu"


@dataclass
class Watch:
    """The first update of a group whose gradient was not finite, remembered where the gradients are."""

    step: Tensor | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    norms: Tensor = field(default_factory=lambda: torch.zeros(0))

    def look(self, step: int, loss: Tensor, size: Tensor, norms: Tensor) -> None:
        """Take in an update: its loss, the norm of its gradient, and those of each tensor.  Nothing is read."""
        if self.step is None:
            self.step = torch.full((), -1, device=size.device)
            self.loss, self.norms = loss.detach().clone(), norms.clone()
        first = (self.step < 0) & ~size.isfinite()
        self.step = torch.where(first, step, self.step)
        self.loss = torch.where(first, loss.detach(), self.loss)
        if norms.shape == self.norms.shape:  # else the loss reached other parameters, and no name is given
            self.norms = torch.where(first, norms, self.norms)

    def found(self) -> int | None:
        """The step of the first such update, None when there was none; this waits for the device."""
        return None if self.step is None or int(self.step) < 0 else int(self.step)


@dataclass
class Tally:
    """How many of a group's updates were skipped or mended."""

    bad: int = 0
    updates: int = 0

    def too_many(self) -> bool:
        return self.bad > FEW_BAD and self.bad > MOST_BAD * self.updates


@torch.no_grad()
def clip_norm(gradients: list[Tensor], size: Tensor, bound: float) -> None:
    """Scale gradients of norm ``size`` down to ``bound``, in place."""
    if not gradients:
        return
    if not waits(size.device):
        if float(size) > bound:
            torch._foreach_mul_(gradients, bound / float(size))
        return
    scale = (bound / size).clamp_max(1.0)
    for dtype in {gradient.dtype for gradient in gradients}:
        torch._foreach_mul_([g for g in gradients if g.dtype == dtype], scale.to(dtype))


def without_nonfinite(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, with 0 where they were no numbers, in place."""
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    return gradients


def describe(step: int, group: str, bad: list[str], losses: list[float]) -> str:
    """What went wrong at a step whose weights were numbers: the loss, else the gradients of the tensors ``bad``."""
    gradients = f"the gradient of {bad[0]} ({len(bad)} in all) is" if bad else f"the gradient norm of '{group}' is"
    if not all(map(math.isfinite, losses)):
        return (
            f"step {step}: the loss of '{group}' is {losses[0]:g} and {gradients} not finite; all weights "
            f"are, so look at the data and the loss {BEFORE}"
        )
    return f"step {step}: {gradients} not finite; lower the learning rate or look at the data {BEFORE}"
