"""fewstep's own folders: ``config.json`` says what the model is, ``model.safetensors`` holds its weights.

The config is plain data: the model as :mod:`fewstep.models` describes it, the SHA-256 of the weights, and a card (how
the model was made and how good it is).  It is checked before anything is made of it, the shapes of the weights before
memory is taken for them, and nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fewstep.files import Header, headers, load_tensors, save_tensors, sha256, write_atomically
from fewstep.hub.adapters import as_adapter
from fewstep.hub.lora import described as low_rank
from fewstep.hub.lora import factored, with_low_rank
from fewstep.hub.saved_adapters import described as described_adapter
from fewstep.hub.saved_adapters import fresh, rebuilt
from fewstep.hub.weights import no_larger_than
from fewstep.models import kinds
from fewstep.models.denoisers import DENOISER
from fewstep.models.model import Config
from fewstep.models.networks import DIFFUSERS, SCHEDULES
from fewstep.models.networks import build_network as build_own
from fewstep.models.networks import describe_network as describe_own
from fewstep.schemas import Maybe, Place, blaming, check, read_json

__all__ = ["DENOISER", "FORMAT", "SCHEDULES", "build", "card", "describe", "load", "save"]

FORMAT = 1
CONFIG = {"format": Literal[1], "model": dict, "sha256": Maybe(str), "card": Maybe(dict)}


def describe(model: nn.Module) -> Config:
    """A model as plain data, networks of diffusers included; TypeError for what cannot be saved."""
    return kinds.describe(model, describe_network)


def describe_network(net: nn.Module) -> Config:
    """A network as plain data: a reference network, or one of diffusers."""
    adapter = as_adapter(net)
    if adapter is None:
        return describe_own(net)
    return {
        "name": DIFFUSERS,
        **described_adapter(adapter),
        **({"low_rank": low_rank(adapter)} if adapter.frozen else {}),
    }


def build(config: Config) -> Any:
    """The model that :func:`describe` described, with untrained weights; ValueError naming the field that is wrong."""
    return kinds.build(config, build_in_pipeline)


def build_in_pipeline(config: Config) -> nn.Module:
    """A network from its description, with fresh weights; one of diffusers inside its pipeline, where that still is."""
    if config["name"] != DIFFUSERS:
        return build_own(config)
    described = without_name(config)
    return with_low_rank(rebuilt(described), described) if "low_rank" in described else rebuilt(described)


def build_without_memory(config: Config) -> nn.Module:
    """A network with shapes and no values."""
    with torch.device("meta"):
        made = fresh(without_name(config)) if config["name"] == DIFFUSERS else build_own(config)
    return factored(made, config["low_rank"]) if "low_rank" in config else made


def without_name(config: Config) -> Config:
    return {key: value for key, value in config.items() if key != "name"}


def save(model: nn.Module, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a model folder; existing files are replaced one by one, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = describe(model)
    weights = folder / "model.safetensors"
    save_tensors(weights, apart(model.state_dict()))
    config = {"format": FORMAT, "model": description, "sha256": sha256(weights), "card": card or {}}
    write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    return folder


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with memory of its own for every tensor: one network may be several experts."""
    held: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in held else tensor
        held.add(place)
    return found


def load(folder: str | Path) -> Any:
    """The model in a folder, in evaluation mode: a denoiser, a student or another of :data:`fewstep.models.KINDS`.

    Raises FileNotFoundError when there is no model, ValueError when a file is damaged or its weights do not fit.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = _read_config(path)
    held = headers(weights)
    with blaming(path), no_larger_than(len(held)):
        expected = kinds.build(config["model"], build_without_memory, Place(path, "model")).state_dict()
    _check_fit(weights, held, expected)
    if "sha256" in config and sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights}: its SHA-256 is not the one in config.json: damaged, or of another model")
    with blaming(path):  # the pipeline that a network came from may have changed
        model = build(config["model"])
        model.load_state_dict(load_tensors(weights))
    return model.requires_grad_(False).eval()


def _check_fit(path: Path, held: dict[str, Header], expected: dict[str, torch.Tensor]) -> None:
    """ValueError for the first tensor in a file that is not what a model expects."""
    for name, tensor in expected.items():
        found = held.get(name)
        if found is None or found.shape != tuple(tensor.shape):
            shape = "missing" if found is None else f"of shape {list(found.shape)}"
            raise ValueError(f"{path}: tensor '{name}' is {shape}, config.json asks for {list(tensor.shape)}")
        if found.floating != tensor.is_floating_point():
            raise ValueError(f"{path}: tensor '{name}' is of type {found.dtype}, the model needs {tensor.dtype}")
    if extra := sorted(set(held) - set(expected)):
        raise ValueError(f"{path}: tensor '{extra[0]}' does not belong to this model")


def card(folder: str | Path) -> dict[str, Any]:
    """The card of a model folder: how it was made and how good it is."""
    found: dict[str, Any] = _read_config(Path(folder) / "config.json").get("card", {})
    return found


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no fewstep model here (config.json is missing)")
    config: dict[str, Any] = read_json(path, CONFIG)
    source = config.get("card", {}).get("data")  # a name, or an object that has it
    if isinstance(source, dict):
        check(source, {"source": str, ...: Any}, Place(path, "card.data"))
    else:
        check(source, str | None, Place(path, "card.data"))
    return config
