"""A run's whole state in one file that is replaced atomically.

Weights, averages and optimizer moments are tensors of one safetensors file; the counters and a checksum are its
metadata.  There is no random state to save: draws and data order are functions of the seed and the position.
"""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.files import save_tensors
from fewstep.methods.method import Networks
from fewstep.schemas import Count, Map, Maybe, Place, check, parse_json

#: What the trainer counts.
COUNTERS = {
    "steps": Count, "seconds": float, "averages": Map(".*", "a network", list[Count]), "recent": dict, "precision": str,
    "run": dict, "choosing": Maybe(float), ...: Any,
}  # fmt: skip


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer as flat named tensors (under "optimiser", as files that exist say)."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimiser/{name}/{index}/{key}": torch.as_tensor(value)
        for index, moments in state.items()
        for key, value in moments.items()
        if value is not None  # plain SGD keeps a name for the momentum that it has not
    }


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved moments back; an optimizer that had not moved when the state was saved starts anew."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    prefix = f"optimiser/{name}/"
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, moment = key.removeprefix(prefix).split("/")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape and tensor.ndim:
                # fused kernels walk memory flat: a moment must have the layout (channels last) of its weight
                tensor = torch.empty_like(parameter).copy_(tensor)
            state.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def module_tensors(name: str, nets: Networks) -> dict[str, Tensor]:
    """A network's weights under its name."""
    return {f"module/{name}/{key}": value for key, value in nets.state(name).items()}


def load_module(name: str, nets: Networks, tensors: dict[str, Tensor]) -> None:
    """Put saved weights back; ValueError when they do not fit."""
    prefix = f"module/{name}/"
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        nets.load(name, found)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint does not fit network '{name}': {first}") from None


class Checkpoint(ABC):
    """Where a run's state lies: a file in its folder that another kind of run does not take up."""

    file: ClassVar[str]
    other: ClassVar[str]
    hint: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.file
        if (folder / self.other).exists() and not self.path.exists():
            raise ValueError(f"{folder / self.other}: {self.hint}, or choose another folder")

    def exists(self) -> bool:
        return self.path.exists()

    @abstractmethod
    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old one or the new one.  All processes call."""

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """What is not a tensor; ValueError naming the file when it is damaged."""

    @abstractmethod
    def tensors(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The saved tensors among ``like``, which may be filled in place; ValueError naming a damaged file."""

    def damaged(self, error: BaseException) -> ValueError:
        """The error for a file that cannot be read."""
        return ValueError(f"{self.path}: damaged checkpoint ({error}); delete it to start this run again")


class OneFile(Checkpoint):
    """``checkpoint.safetensors``, written by the main process and read by all."""

    file = "checkpoint.safetensors"
    other = "checkpoint.json"
    hint = "this run was started with shard=True; go on with that"

    def __init__(self, folder: Path, main: bool = True) -> None:
        super().__init__(folder)
        self.main = main

    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        if self.main:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_tensors(self.path, plain, {"counters": json.dumps(counters), "crc32": str(checksum(plain))})

    def counters(self) -> dict[str, Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                written = (file.metadata() or {})["counters"]
            return checked_counters(parse_json(written, "its counters"))
        except (SafetensorError, KeyError, ValueError) as error:
            raise self.damaged(error) from None

    def tensors(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if str(checksum(tensors)) != (file.metadata() or {})["crc32"]:
                    raise ValueError("its checksum does not match")
        except (SafetensorError, KeyError, ValueError) as error:
            raise self.damaged(error) from None
        return tensors


def checked_counters(counters: Any) -> dict[str, Any]:
    """The counters of a checkpoint, when they are what :mod:`fewstep.training.trainer` writes; else ValueError."""
    found: dict[str, Any] = check(counters, COUNTERS, Place("its counters"))
    return found


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors, by name: safetensors itself does not see a flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
