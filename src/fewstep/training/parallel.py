"""One process or several: what ``torchrun`` started, seen by the trainer.

Every process holds all networks and its part of each batch; gradients are averaged over the processes before an
update, in one flat message per update.  (The networks of a method are called in many ways, under ``jvp``, without
gradients, through their features, which module wrappers with hooks on ``forward`` do not survive; averaging the
gradients of the group that moves does the same arithmetic.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Parallel:
    """Rank and number of processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Parallel:
        """Join the process group that ``torchrun`` describes; one process without it."""
        if "RANK" not in os.environ or not dist.is_available():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        pieces = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])

    def agree(self, value: float) -> float:
        """The main process's value, on every process (stop signals, elapsed time)."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0)
        return float(box)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()
