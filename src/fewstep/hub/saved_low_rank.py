"""Low-rank weights in fewstep's own folders: kept as the factors alone where their base can be found again.

The base lies in the folder of a pipeline, in a model folder or with the package, and is known by its digest; where it
lies nowhere (a network in memory, or one that was trained since) it is kept with the factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.digests import tensors_sha256
from fewstep.files import load_tensors
from fewstep.hub.adapters import as_adapter, pipeline_folder
from fewstep.hub.places import lasting_name, locate
from fewstep.networks.lora import NAME, factors_in, freeze, is_frozen, put, takes_factors

#: The base of low-rank weights has no more tensors than this.
MOST_TENSORS = 3000


def described(net: nn.Module) -> dict[str, Any]:
    """The low-rank weights of a network as plain data, see :data:`fewstep.models.networks.LOW_RANK`; nothing where
    there are none."""
    core = core_of(net)
    held = factors_in(core)
    if not held:
        return {}
    named = dict(core.named_parameters(remove_duplicate=False))
    base: dict[str, Tensor] = {name: weight for name, weight in named.items() if is_frozen(weight)}
    trained = [name for name in named if name not in base and f".{NAME}." not in f".{name}"]
    one = next(iter(held.values()))
    return {
        "low_rank": {
            "rank": one.rank, "alpha": one.alpha, "targets": list(held),
            **found_again(net, base), **({"trained": trained} if trained else {}),
        }
    }  # fmt: skip


def core_of(net: Any) -> nn.Module:
    """The network that names of weights and layers are counted from: diffusers' own where it is one of those."""
    adapter = as_adapter(net)
    core: nn.Module = net if adapter is None else adapter.model
    return core


def remember(net: Any, folder: Path, name: str) -> None:
    """Note on a network that was read from a model folder where its weights lie, ``name`` in the model."""
    net.kept = (lasting_name(folder), name)


def found_again(net: nn.Module, base: dict[str, Tensor]) -> dict[str, Any]:
    """Where the base lies, with its digest; a digest of None where it lies nowhere."""
    adapter = as_adapter(net)
    folder = None if adapter is None else pipeline_folder(adapter)
    if adapter is not None and folder is not None:
        found: dict[str, Tensor] = {}
        for file in sorted((folder / adapter.component).glob("*.safetensors")):
            found |= load_tensors(file)
        if same(base, found):
            return {"base": digest(base)}
    kept = vars(net).get("kept")
    if kept is not None:
        place = {"folder": kept[0], "network": kept[1]}
        try:
            found = tensors_at(place, net)
        except (FileNotFoundError, ValueError):
            found = {}
        if same(base, found):
            return {"base": digest(base), "model": place}
    return {"base": None}


def same(base: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    """Whether these tensors are among those found, but for the type."""
    return all(
        name in found and found[name].shape == weight.shape and torch.equal(found[name].float(), plain(weight))
        for name, weight in base.items()
    )


def plain(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()


def digest(weights: dict[str, Tensor]) -> str:
    return tensors_sha256((name, plain(weights[name])) for name in sorted(weights))


def tensors_at(place: dict[str, str], net: nn.Module) -> dict[str, Tensor]:
    """The weights of one network, of the make of ``net``, in the model in a folder; FileNotFoundError or ValueError
    where there are none."""
    prefix = f"{place['network']}." if core_of(net) is net else f"{place['network']}.model."
    tensors = load_tensors(locate(place["folder"]) / "model.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_factors(net: nn.Module, low_rank: dict[str, Any]) -> nn.Module:
    """A network with the low-rank weights that were :func:`described`, at zero, in place; ValueError for layers and
    weights that it has not."""
    core, trained = core_of(net), low_rank.get("trained", ())
    if unknown := sorted(set(trained) - {name for name, _ in core.named_parameters(remove_duplicate=False)}):
        raise ValueError(f"low_rank.trained: '{unknown[0]}' is no weight of this network")
    freeze(core, trained)
    layers = dict(core.named_modules())
    for name in low_rank["targets"]:
        if name not in layers or not takes_factors(layers[name]):
            raise ValueError(f"low_rank.targets: '{name}' is not a layer that takes low-rank weights")
        put(layers[name], low_rank["rank"], low_rank["alpha"])
    return net


def on_its_base(net: nn.Module, config: dict[str, Any]) -> nn.Module:
    """:func:`with_factors` on the base that a network's description names; ValueError when that is not what it was."""
    low_rank, core = config["low_rank"], core_of(net)
    trained = low_rank.get("trained", ())
    named = core.named_parameters(remove_duplicate=False)
    base: dict[str, Tensor] = {name: weight for name, weight in named if name not in trained}
    if low_rank["base"] is not None:
        place, adapter = low_rank.get("model"), as_adapter(net)
        if place is not None:
            where = f"the model {place['folder']}"
            try:
                found = tensors_at(place, net)
            except FileNotFoundError:
                raise ValueError(f"{where} is not there any more, on whose weights these are low-rank ones") from None
            net.kept = (place["folder"], place["network"])  # type: ignore[assignment]
        else:
            where = f"the pipeline {config.get('pipeline')}"
            if adapter is None or pipeline_folder(adapter) is None:
                raise ValueError(f"{where} is not there any more, on whose weights these are low-rank ones")
            found = dict(base)
        fits = all(name in found and found[name].shape == weight.shape for name, weight in base.items())
        if not fits or digest({name: found[name] for name in base}) != low_rank["base"]:
            raise ValueError(f"{where} has other weights than when these low-rank ones were trained")
        for name, weight in base.items():
            weight.data.copy_(found[name])
    return with_factors(net, low_rank)


def name_now(name: str) -> str:
    """The name of a weight in a model folder, which earlier versions called otherwise."""
    moved = name.replace(".base_layer.", ".")
    for letter in ("lora_A", "lora_B"):
        moved = moved.replace(f".{letter}.default.", f".{NAME}.{letter}.")
    return moved
