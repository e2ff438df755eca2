"""Discrete models as plain data: chain, noise, network and learned plans, for :mod:`fewstep.hub.native`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from fewstep.discrete.chains import CHAINS, Chain
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import NOISES
from fewstep.discrete.samplers import Plan
from fewstep.networks.transformer import Transformer

#: The kinds of description that :func:`build` reads.
KINDS = ("discrete-denoiser", "learned-sampler")
NETWORKS = {"transformer": Transformer}


def describe(model: NetworkDiscreteDenoiser | LearnedSampler) -> dict[str, Any]:
    """A discrete model as plain data, from which :func:`build` makes one with fresh weights.

    TypeError for networks and denoisers of other makes.
    """
    if isinstance(model, LearnedSampler):
        if not isinstance(model.denoiser, NetworkDiscreteDenoiser):
            raise TypeError(f"cannot describe a {type(model.denoiser).__name__}: only network denoisers")
        plans = {str(steps): asdict(plan) for steps, plan in model.plans.items()}
        return {
            "kind": "learned-sampler", "denoiser": describe(model.denoiser), "plans": plans, "stepper": model.stepper
        }  # fmt: skip
    name = {cls: name for name, cls in NETWORKS.items()}.get(type(model.net))
    if name is None:
        raise TypeError(f"a {type(model.net).__name__} is not one of fewstep's token networks ({', '.join(NETWORKS)})")
    config: dict[str, Any] = model.net.config
    return {
        "kind": "discrete-denoiser",
        "chain": _chain(model.chain),
        "network": {"name": name, **config},
        "length": model.shape[0],
        "classes": model.classes,
    }


def build(config: dict[str, Any]) -> NetworkDiscreteDenoiser | LearnedSampler:
    """The model that :func:`describe` described, with untrained weights; ValueError for unknown names."""
    if config["kind"] == "learned-sampler":
        plans = {int(k): Plan(tuple(plan["times"]), tuple(plan["phi"])) for k, plan in config["plans"].items()}
        denoiser: Any = build(config["denoiser"])
        return LearnedSampler(denoiser, plans, config["stepper"])
    network = dict(config["network"])
    net: nn.Module = _choose(NETWORKS, network.pop("name"), "network")(**network)
    return NetworkDiscreteDenoiser(net, _build_chain(config["chain"]), config["length"], config["classes"])


def _chain(chain: Chain) -> dict[str, Any]:
    noise = {"name": type(chain.noise).__name__, **asdict(chain.noise)}
    return {"name": type(chain).__name__, **asdict(chain), "noise": noise}


def _build_chain(config: dict[str, Any]) -> Chain:
    arguments, noise = dict(config), dict(config["noise"])
    arguments["noise"] = _choose(NOISES, noise.pop("name"), "noise")(**noise)
    chain: Chain = _choose(CHAINS, arguments.pop("name"), "chain")(**arguments)
    return chain


def _choose(registry: dict[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise ValueError(f"{what} '{name}' is unknown; this version knows {', '.join(registry)}")
    return registry[name]
