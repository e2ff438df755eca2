"""A run's whole state in one file that is replaced atomically.

Weights, averages and optimiser moments are tensors of one safetensors file; the counters are its metadata.  There is
no random state to save: draws and data order are functions of the seed and the position.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.hub.native import save_tensors


def optimiser_tensors(name: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimiser as flat named tensors."""
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser/{name}/{index}/{key}": torch.as_tensor(value)
        for index, moments in state.items()
        for key, value in moments.items()
    }


def load_optimiser(name: str, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved moments back."""
    state: dict[int, dict[str, Tensor]] = {}
    prefix = f"optimiser/{name}/"
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, moment = key.removeprefix(prefix).split("/")
            state.setdefault(int(index), {})[moment] = tensor
    if state:
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def module_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's weights under its name."""
    return {f"module/{name}/{key}": value for key, value in module.state_dict().items()}


def load_module(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved weights back; ValueError when they do not fit."""
    prefix = f"module/{name}/"
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(found)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint does not fit network '{name}': {first}") from None


def write(path: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill at any moment leaves the old one or the new one."""
    save_tensors(path, tensors, {"counters": json.dumps(counters)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and counters; ValueError naming the file when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            counters = json.loads((file.metadata() or {})["counters"])
            return {name: file.get_tensor(name) for name in file.keys()}, counters  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); delete it to start this run again") from None
