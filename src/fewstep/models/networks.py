"""Networks, schedules and predictions as plain data."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Annotated, Any

import torch
from torch import nn

from fewstep import schedules
from fewstep.discrete_vp import DiscreteVP
from fewstep.extras import NAME
from fewstep.networks import NETWORKS
from fewstep.networks.causal import CAUSAL
from fewstep.networks.classifiers import CLASSIFIERS
from fewstep.networks.transformer import Transformer
from fewstep.predictions import ALL_PREDICTIONS, Prediction
from fewstep.randomness import derive_seed, repeated_draws
from fewstep.schedules import Schedule
from fewstep.schemas import Choice, Map, Maybe, Range, Size, arguments_of, fields_of

#: The name of networks that are diffusers' own.
DIFFUSERS = "diffusers"
#: The name of those that are transformers'.
TRANSFORMERS = "transformers"
SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls
    for cls in (
        schedules.VPLinear, schedules.VPCosine, schedules.EDM, schedules.FlowMatching,
        schedules.ShiftedFlow, schedules.TrigFlow, DiscreteVP,
    )
}  # fmt: skip
TOKEN_NETWORKS: dict[str, type[nn.Module]] = {"transformer": Transformer}
_PREDICTION_NAMES = {cls: name for name, cls in ALL_PREDICTIONS.items()}

# What config.json may hold.
SCHEDULE = Choice("name", {name: fields_of(cls) for name, cls in SCHEDULES.items()})
PREDICTION = Choice("name", {name: fields_of(cls) for name, cls in ALL_PREDICTIONS.items()})
#: The size of the values of a further input.
Span = Annotated[float, Range(1e-6, 1e6)]
#: Low-rank weights on a frozen network; ``base`` is the SHA-256 of its weights, null where they are kept too;
#: ``model`` is where they lie, which for diffusers' networks may be their pipeline; ``trained`` are the weights in it
#: that are not frozen.
LOW_RANK = {
    "rank": Size, "alpha": float, "targets": tuple[str, ...], "base": str | None, "trained": Maybe(tuple[str, ...]),
    "model": Maybe({"folder": str, "network": str}),
}  # fmt: skip


def _arguments(known: dict[str, type[nn.Module]]) -> dict[str, dict[str, Any]]:
    return {name: {**arguments_of(cls), "low_rank": Maybe(LOW_RANK)} for name, cls in known.items()}


TOKEN_NETWORK = Choice("name", _arguments(TOKEN_NETWORKS))
CAUSAL_NETWORK = Choice(
    "name",
    _arguments(CAUSAL)
    | {
        TRANSFORMERS: {
            "class": str, "config": dict, "vocabulary": Size, "length": Size, "low_rank": Maybe(LOW_RANK),
        }
    },
)  # fmt: skip
CLASSIFIER_NETWORK = Choice("name", _arguments(CLASSIFIERS))
NETWORK = Choice(
    "name",
    _arguments(NETWORKS)
    | {
        DIFFUSERS: {
            "class": str,
            "config": dict,
            "size": tuple[Size, Size],
            "pipeline": str | None,
            "latent": bool,
            "low_rank": Maybe(LOW_RANK),
            "inputs": Maybe(Map(NAME, "the name of an input", Span)),
            "beside": Maybe(Size),
        }
    },
)


def reference_networks() -> tuple[type[nn.Module], ...]:
    """The classes of network that :func:`describe_network` knows."""
    return tuple({**NETWORKS, **TOKEN_NETWORKS, **CLASSIFIERS, **CAUSAL}.values())


def describe_network(net: Any) -> dict[str, Any]:
    """One of the reference networks as plain data; TypeError for another."""
    known = {**NETWORKS, **TOKEN_NETWORKS, **CLASSIFIERS, **CAUSAL}
    name = {cls: name for name, cls in known.items()}.get(type(net))
    if name is None:
        raise TypeError(
            f"a {type(net).__name__} is not one of fewstep's reference networks ({', '.join(known)}) nor a diffusers "
            "model; save it with its own library"
        )
    return {"name": name, **net.config}


def build_network(config: dict[str, Any]) -> nn.Module:
    """A reference network from its description, with fresh weights."""
    arguments = dict(config)
    name = arguments.pop("name")
    known: dict[str, type[nn.Module]] = {**NETWORKS, **TOKEN_NETWORKS, **CLASSIFIERS, **CAUSAL}
    return known[name](**arguments)


def fresh_network(config: dict[str, Any], *seed: int | str) -> nn.Module:
    """A reference network from its description, with weights drawn from a seed."""
    with repeated_draws(torch.device("cpu")):
        torch.manual_seed(derive_seed(*seed))
        return build_network(config)


def redrawn_network(net: nn.Module, *seed: int | str) -> nn.Module:
    """A copy of anybody's network with weights drawn again from a seed, each layer's by its ``reset_parameters``;
    TypeError for one with parameters or buffers that no such function draws."""
    made = copy.deepcopy(net)
    with repeated_draws(torch.device("cpu")):
        torch.manual_seed(derive_seed(*seed))
        for name, module in made.named_modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))  # attention's own
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)) or any(
                True for _ in module.buffers(recurse=False)
            ):
                raise TypeError(
                    f"a {type(net).__name__} cannot be drawn again: its {name or 'top'} is a {type(module).__name__}, "
                    "which has weights and no reset_parameters(); write one"
                )
    return made


def describe_prediction(prediction: Prediction) -> dict[str, Any]:
    return {"name": _PREDICTION_NAMES[type(prediction)], **asdict(prediction)}


def build_named(known: dict[str, Any], config: dict[str, Any]) -> Any:
    """An object of the class that ``config["name"]`` says, with the other fields."""
    return known[config["name"]](**{key: value for key, value in config.items() if key != "name"})
