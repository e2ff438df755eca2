"""fewstep's own folders: ``config.json`` says what the model is, ``model.safetensors`` holds its weights.

The config is plain data: the model as :mod:`fewstep.models` describes it, the SHA-256 of the weights, and a card (how
the model was made and how good it is).  It is checked before anything is made of it, the shapes of the weights before
memory is taken for them, and nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fewstep.files import Header, headers, load_tensors, save_tensors, sha256, write_atomically
from fewstep.hub import language
from fewstep.hub.adapters import as_adapter
from fewstep.hub.saved_adapters import described as described_adapter
from fewstep.hub.saved_adapters import fresh, rebuilt
from fewstep.hub.saved_low_rank import MOST_TENSORS, name_now, on_its_base, remember, with_factors
from fewstep.hub.saved_low_rank import described as low_rank
from fewstep.hub.weights import no_larger_than
from fewstep.models import kinds
from fewstep.models.denoisers import DENOISER
from fewstep.models.model import Config
from fewstep.models.networks import DIFFUSERS, SCHEDULES, TRANSFORMERS
from fewstep.models.networks import build_network as build_own
from fewstep.models.networks import describe_network as describe_own
from fewstep.networks.lora import is_frozen
from fewstep.schemas import Maybe, Place, blaming, check, read_json

__all__ = ["DENOISER", "FORMAT", "SCHEDULES", "build", "card", "describe", "keep", "load", "save"]

FORMAT = 1
CONFIG = {"format": Literal[1], "model": dict, "sha256": Maybe(str), "card": Maybe(dict)}


def describe(model: nn.Module) -> Config:
    """A model as plain data, networks of diffusers included; TypeError for what cannot be saved."""
    return kinds.describe(model, describe_network)


def describe_network(net: nn.Module) -> Config:
    """A network as plain data: a reference network, or one of diffusers or transformers."""
    if (adapter := as_adapter(net)) is not None:
        own = {"name": DIFFUSERS, **described_adapter(adapter)}
    elif (causal := language.as_transformers(net)) is not None:
        own = {"name": TRANSFORMERS, **language.described(causal)}
    else:
        own = describe_own(net)
    return {**own, **low_rank(net)}


def build(config: Config) -> Any:
    """The model that :func:`describe` described, with untrained weights; ValueError naming the field that is wrong."""
    return kinds.build(config, build_in_pipeline)


def build_in_pipeline(config: Config) -> nn.Module:
    """A network from its description, with fresh weights; one of diffusers inside its pipeline, and low-rank weights on
    their base, where those still are."""
    plain = without("low_rank", config)
    net = rebuilt(without("name", plain)) if config["name"] == DIFFUSERS else build_apart(plain)
    return on_its_base(net, config) if "low_rank" in config else net


def build_without_memory(config: Config) -> nn.Module:
    """A network with shapes and no values."""
    plain = without("low_rank", config)
    with torch.device("meta"):
        net = fresh(without("name", plain)) if config["name"] == DIFFUSERS else build_apart(plain)
        return with_factors(net, config["low_rank"]) if "low_rank" in config else net


def build_apart(config: Config) -> nn.Module:
    """A reference network or one of transformers, which come out of no pipeline."""
    return language.fresh(config) if config["name"] == TRANSFORMERS else build_own(config)


def without(name: str, config: Config) -> Config:
    return {key: value for key, value in config.items() if key != name}


@dataclass
class Elsewhere:
    """Which networks a description is about, and which tensors of theirs lie elsewhere than in the model's folder: the
    base of low-rank weights."""

    networks: list[nn.Module] = field(default_factory=list)
    tensors: set[int] = field(default_factory=set)

    def note(self, net: nn.Module, config: Config) -> None:
        if config.get("low_rank", {}).get("base") is None:
            self.networks.append(net)
        else:
            self.tensors |= {id(weight) for weight in net.parameters() if is_frozen(weight)}

    def describe(self, net: nn.Module) -> Config:
        config = describe_network(net)
        self.note(net, config)
        return config

    def building(self, build: Callable[[Config], nn.Module]) -> Callable[[Config], nn.Module]:
        def built(config: Config) -> nn.Module:
            net = build(config)
            self.note(net, config)
            return net

        return built

    def here(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The state of a model that its folder holds."""
        state = model.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in self.tensors}


def save(model: nn.Module, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a model folder; existing files are replaced one by one, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = Elsewhere()
    description = kinds.describe(model, elsewhere.describe)
    weights = folder / "model.safetensors"
    save_tensors(weights, elsewhere.here(model))
    config = {"format": FORMAT, "model": description, "sha256": sha256(weights), "card": card or {}}
    write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    language.keep_tokenizers(model, folder)
    return folder


def keep(model: nn.Module, folder: Path, card: dict[str, Any] | None = None) -> bool:
    """:func:`save` where the model can be saved.  Of one with a network of its user's own, which nobody else could
    build again, ``model.safetensors`` alone, its ``state_dict``; then False."""
    try:
        describe(model)
    except TypeError:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", model.state_dict())
        return False
    save(model, folder, card)
    return True


def load(folder: str | Path) -> Any:
    """The model in a folder, in evaluation mode: a denoiser, a student or another of :data:`fewstep.models.KINDS`.

    Raises FileNotFoundError when there is no model, ValueError when a file is damaged or its weights do not fit.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = _read_config(path)
    held = {name_now(name): header for name, header in headers(weights).items()}
    expected, found = Elsewhere(), Elsewhere()
    bases = MOST_TENSORS if '"low_rank"' in json.dumps(config["model"]) else 0
    with blaming(path), no_larger_than(len(held) + bases):
        shapes = kinds.build(config["model"], expected.building(build_without_memory), Place(path, "model"))
    _check_fit(weights, held, expected.here(shapes))
    if "sha256" in config and sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights}: its SHA-256 is not the one in config.json: damaged, or of another model")
    with blaming(path):  # what a network came from may have changed
        model = kinds.build(config["model"], found.building(build_in_pipeline))
        tensors = {name_now(name): tensor for name, tensor in load_tensors(weights).items()}
        model.load_state_dict({**model.state_dict(), **tensors} if found.tensors else tensors)
    places = {id(module): name for name, module in model.named_modules()}
    for net in found.networks:
        remember(net, folder, places[id(net)])
    language.find_tokenizers(model, folder)
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


def kind(folder: str | Path) -> str:
    """What kind of model a folder says that it holds, one of :data:`fewstep.models.kinds.SAVED`."""
    path = Path(folder) / "config.json"
    return str(check(_read_config(path)["model"].get("kind"), Literal[tuple(kinds.SAVED)], Place(path, "model.kind")))


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
