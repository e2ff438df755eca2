"""One process or several: what ``torchrun`` started, seen by the trainer.

Every process holds all networks and its part of each batch; gradients are averaged over the processes before an
update, in one flat message per update.  (The networks of a method are called in many ways, under ``jvp``, without
gradients, through their features, which PyTorch's ``DistributedDataParallel`` wrapper does not survive; averaging the
gradients of the group that moves does the same arithmetic.)  For networks that do not fit see ``sharding.py``.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.methods.method import Networks
from fewstep.training.checkpoint import Checkpoint, OneFile


@dataclass(frozen=True)
class Parallel:
    """Rank and number of processes, and what they do together; here every process holds everything."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Self:
        """Join the process group that ``torchrun`` describes; one process without it.

        On GPUs every process takes the one that ``torchrun`` numbered for it.
        """
        if "RANK" not in os.environ or not dist.is_available():
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def place(self, nets: Networks, device: torch.device) -> None:
        """Put the networks of a method where they are trained."""
        nets.to(device)

    def settle(self, nets: Networks) -> None:
        """Called between backward passes and the optimizer's step."""

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of tensors that this process holds."""
        return list(tensors)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor put together from the parts of all processes; all of them must ask."""
        return tensor

    def checkpoint(self, folder: Path) -> Checkpoint:
        """Where a run in ``folder`` keeps its state."""
        return OneFile(folder, self.main)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        pieces = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])

    def mean(self, parts: Sequence[Tensor]) -> Tensor:
        """The mean of a tensor over this process's parts and all processes; of one part, the tensor itself."""
        value = parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)
        if self.world == 1:
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value / self.world

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows ``[b, ...]`` of this process's parts and of all processes, ``[B, ...]``; of one part, the tensor."""
        value = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.world == 1:
            return value
        everyone = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(everyone, value.contiguous())
        return torch.cat(everyone)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, on their device."""
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes (with 0 from all but one: that one's value)."""
        if self.world == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box)
        return box.tolist()

    def agree(self, value: float) -> float:
        """The main process's value, on every process."""
        return self.total(value if self.main else 0.0)[0]

    def barrier(self) -> None:
        """Wait for the others."""
        self.total(0.0)


def leave() -> None:
    """Leave the process group at exit, if it is still there."""
    if dist.is_initialized():
        dist.destroy_process_group()
