"""Discrete models as plain data: chain, noise, network and learned plans, for :mod:`fewstep.hub.native`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from fewstep.discrete.chains import CHAINS, Chain
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import NOISES
from fewstep.discrete.samplers import Plan
from fewstep.networks.transformer import Transformer
from fewstep.schemas import Choice, Map, Place, Size, arguments_of, check, fields_of

NETWORKS = {"transformer": Transformer}

#: How the keys of plans must look: a number of steps.
STEPS = (r"[1-9]\d{0,5}", "a number of steps, such as 4")
_NOISE = Choice("name", {name: fields_of(cls) for name, cls in NOISES.items()})
_CHAIN = Choice("name", {name: fields_of(cls) | {"noise": _NOISE} for name, cls in CHAINS.items()})
_NETWORK = Choice("name", {name: arguments_of(cls) for name, cls in NETWORKS.items()})
_DENOISER = {"chain": _CHAIN, "network": _NETWORK, "length": Size, "classes": Size | None}
#: The kinds of description that :func:`build` reads, and what they hold.
KINDS: dict[str, dict[str, Any]] = {
    "discrete-denoiser": _DENOISER,
    "learned-sampler": {
        "denoiser": Choice("kind", {"discrete-denoiser": _DENOISER}), "plans": Map(*STEPS, fields_of(Plan)),
        "stepper": str,
    },
}  # fmt: skip


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


def build_network(config: dict[str, Any]) -> nn.Module:
    """A token network from its description, with fresh weights."""
    arguments = dict(config)
    return NETWORKS[arguments.pop("name")](**arguments)


def build(
    config: dict[str, Any], network: Callable[[dict[str, Any]], nn.Module] = build_network
) -> NetworkDiscreteDenoiser | LearnedSampler:
    """The model that :func:`describe` described, with untrained weights; ``network`` builds the network.

    Raises ValueError naming the field that is wrong, or values that contradict each other.
    """
    config = check(config, Choice("kind", KINDS), Place("description"))
    if config["kind"] == "learned-sampler":
        plans = {int(steps): Plan(**plan) for steps, plan in config["plans"].items()}
        denoiser: Any = build(config["denoiser"], network)
        return LearnedSampler(denoiser, plans, config["stepper"])
    chain = _build_chain(config["chain"])
    told = {"length": config["length"], "classes": config["classes"], "tokens": chain.tokens, "states": chain.states}
    for field, value in told.items():
        if config["network"].get(field) != value:
            raise ValueError(f"the model's {field} is {value}, that of its network {config['network'].get(field)}")
    return NetworkDiscreteDenoiser(network(config["network"]), chain, config["length"], config["classes"])


def _chain(chain: Chain) -> dict[str, Any]:
    noise = {"name": type(chain.noise).__name__, **asdict(chain.noise)}
    return {"name": type(chain).__name__, **asdict(chain), "noise": noise}


def _build_chain(config: dict[str, Any]) -> Chain:
    arguments, noise = dict(config), dict(config["noise"])
    arguments["noise"] = NOISES[noise.pop("name")](**noise)
    chain: Chain = CHAINS[arguments.pop("name")](**arguments)
    return chain
