"""Diffusers models as plain data, for fewstep's own folders."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

from fewstep.hub.adapter_kinds import adapt, adapter_class
from fewstep.hub.adapters import WEIGHT, Adapter, pipeline_folder
from fewstep.hub.diffusers import network_in, open_pipeline
from fewstep.hub.folders import check_config
from fewstep.hub.requires import require
from fewstep.schemas import Place, check


def described(net: Adapter) -> dict[str, Any]:
    """A diffusers model as plain data for fewstep's own folders: its class and config, and the folder of the pipeline
    it came from, where its text encoders and autoencoder are."""
    folder = pipeline_folder(net)
    return {
        "class": type(net.model).__name__,
        "config": json.loads(net.model.to_json_string()),
        "size": list(net.size),
        "pipeline": None if folder is None else str(folder),
        "latent": net.latent,
        **({} if net.further is None else {"inputs": net.further.spans}),
        **({"beside": net.beside_channels} if net.beside_channels else {}),
    }


def fresh(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` with fresh weights; ValueError for a class that is not known or a config that
    does not fit it."""
    name = description["class"]
    adapter_class(name)
    model_class = attrgetter(name)(require("diffusers", "reading a student of a diffusers model"))
    # a config that is text would be taken for the name of a model on the hub
    place = Place("network.config")
    config = check_config(check(description["config"], dict, place), model_class, place)
    net = adapt(model_class.from_config(config), size=description["size"])
    net.latent = description["latent"]
    return with_inputs_of(description, net)


def rebuilt(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` in its pipeline, where that still is; else :func:`fresh`."""
    folder = description["pipeline"]
    if folder is not None and (Path(folder) / "model_index.json").is_file():
        found = network_in(open_pipeline(folder), description["size"])
        if isinstance(found, adapter_class(description["class"])):
            return with_inputs_of(description, found)
    return fresh(description)


def with_inputs_of(description: dict[str, Any], net: Adapter) -> Adapter:
    """The network with the further inputs and the second sample that a description has and it has not: a guidance
    weight that diffusers knows is in the config, others stand beside it."""
    config = description["config"]
    weight = config.get("time_cond_proj_dim") is not None or bool(config.get("guidance_embeds"))
    spans = {WEIGHT: 1.0} if weight else {}
    missing = {n: span for n, span in (spans | description.get("inputs", {})).items() if n not in net.extra_inputs}
    beside = description.get("beside", 0)
    return net.widened(missing, beside) if missing or beside else net
