"""fewstep's own folders: ``config.json`` says what the model is, ``model.safetensors`` holds its weights.

The config is plain data: the schedule, the prediction and the network with their arguments, a student's flow map and
sampling plans, the SHA-256 of the weights, and a card (how the model was made and how good it is).  The config is
checked before anything is made of it, the shapes of the weights before memory is taken for them, and nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from fewstep import schedules
from fewstep.denoisers import PREDICTIONS, Denoiser, NetworkDenoiser, OnSchedule, Prediction
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.files import Header, headers, load_tensors, save_tensors, sha256, write_atomically
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump
from fewstep.hub import discrete_models
from fewstep.hub.adapters import Adapter, fresh, rebuilt
from fewstep.hub.adapters import described as described_adapter
from fewstep.hub.weights import no_larger_than
from fewstep.networks import NETWORKS
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, described
from fewstep.schemas import Choice, Map, Maybe, Place, Range, Size, arguments_of, blaming, check, fields_of, read_json

FORMAT = 1
#: The network name of models that are diffusers' own.
DIFFUSERS = "diffusers"
SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls
    for cls in (
        schedules.VPLinear, schedules.VPCosine, schedules.EDM, schedules.FlowMatching,
        schedules.ShiftedFlow, schedules.TrigFlow, schedules.DiscreteVP,
    )
}  # fmt: skip
_PREDICTION_NAMES = {cls: name for name, cls in PREDICTIONS.items()}

# What config.json may hold.
SCHEDULE = Choice("name", {name: fields_of(cls) for name, cls in SCHEDULES.items()})
PREDICTION = Choice("name", {name: fields_of(cls) for name, cls in PREDICTIONS.items()})
NETWORK = Choice(
    "name",
    {name: arguments_of(cls) for name, cls in NETWORKS.items()}
    | {DIFFUSERS: {"class": str, "config": dict, "size": tuple[Size, Size], "pipeline": str | None, "latent": bool}},
)
_DENOISERS: dict[str, Any] = {
    "denoiser": {
        "schedule": SCHEDULE, "prediction": PREDICTION, "network": NETWORK, "shape": tuple[Size, ...],
        "classes": Size | None, "half_level": Maybe(Annotated[float, Range(1e-6, 1e6)]),
    },
}  # fmt: skip
DENOISER = Choice("kind", _DENOISERS)
_DENOISERS["on-schedule"] = {"inner": DENOISER, "schedule": SCHEDULE}
_FLOW_MAPS: dict[str, Any] = {
    "jump": {"denoiser": DENOISER, "two_times": bool},
    "edm-consistency": {"denoiser": DENOISER, "sigma_data": float},
}
_STUDENT = {"flow_map": Choice("kind", _FLOW_MAPS), "plans": Map(*discrete_models.STEPS, arguments_of(Plan))}
MODEL = Choice("kind", {"student": _STUDENT, **_FLOW_MAPS, **_DENOISERS, **discrete_models.KINDS})
#: Where a description stands that no file holds.
IN_MEMORY = Place("description")
CONFIG = {"format": Literal[1], "model": dict, "sha256": Maybe(str), "card": Maybe(dict)}


def describe(model: nn.Module) -> dict[str, Any]:
    """A model as plain data, from which :func:`build` makes one with fresh weights."""
    if isinstance(model, Student):
        plans = {str(steps): _plan(plan) for steps, plan in model.plans.items()}
        return {"kind": "student", "flow_map": describe(model.flow_map), "plans": plans}
    if isinstance(model, Jump):
        return {"kind": "jump", "denoiser": describe(model.denoiser), "two_times": model.two_times}
    if isinstance(model, EDMConsistency):
        return {"kind": "edm-consistency", "denoiser": describe(model.denoiser), "sigma_data": model.sigma_data}
    if isinstance(model, OnSchedule):
        return {"kind": "on-schedule", "inner": describe(model.inner), "schedule": described(model.schedule)}
    if isinstance(model, NetworkDenoiser):
        return {
            "kind": "denoiser",
            "schedule": described(model.schedule),
            "prediction": {"name": _PREDICTION_NAMES[type(model.prediction)], **dataclasses.asdict(model.prediction)},
            "network": _network(model.net),
            "shape": list(model.shape),
            "classes": model.classes,
            **({} if model.half_level is None else {"half_level": model.half_level}),
        }
    if isinstance(model, NetworkDiscreteDenoiser | LearnedSampler):
        return discrete_models.describe(model)
    raise TypeError(f"cannot describe a {type(model).__name__}: only students, flow maps and network denoisers")


def _network(net: nn.Module) -> dict[str, Any]:
    if isinstance(net, Adapter):
        return {"name": DIFFUSERS, **described_adapter(net)}
    name = {cls: name for name, cls in NETWORKS.items()}.get(type(net))
    if name is None:
        raise TypeError(
            f"a {type(net).__name__} is neither one of fewstep's reference networks ({', '.join(NETWORKS)}) nor a "
            "diffusers model; save it with its own library"
        )
    config: dict[str, Any] = net.config  # type: ignore[assignment]
    return {"name": name, **config}


def build_network(config: dict[str, Any]) -> nn.Module:
    """A network from its description, with fresh weights."""
    arguments = dict(config)
    name = arguments.pop("name")
    if name in discrete_models.NETWORKS:
        return discrete_models.build_network(config)
    return fresh(arguments) if name == DIFFUSERS else NETWORKS[name](**arguments)


def _without_memory(config: dict[str, Any]) -> nn.Module:
    """Like :func:`build_network`, with shapes and no values."""
    with torch.device("meta"):
        return build_network(config)


def _build_in_pipeline(config: dict[str, Any]) -> nn.Module:
    """Like :func:`build_network`; a diffusers network inside its pipeline, where that still is."""
    return rebuilt(config) if config["name"] == DIFFUSERS else build_network(config)


def _plan(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(plan).items() if value is not None}


def build(
    config: dict[str, Any],
    network: Callable[[dict[str, Any]], nn.Module] = _build_in_pipeline,
    place: Place = IN_MEMORY,
) -> Any:
    """The model that :func:`describe` described, with untrained weights.

    ``network`` builds networks, ``place`` is where the description stands.  Raises ValueError naming the field that is
    wrong, or values that contradict each other.
    """
    return _build(check(config, MODEL, place), network)


def _build(config: dict[str, Any], network: Callable[[dict[str, Any]], nn.Module]) -> Any:
    kind = config["kind"]
    if kind == "student":
        plans = {int(steps): Plan(**plan) for steps, plan in config["plans"].items()}
        flow_map: FlowMap = _build(config["flow_map"], network)
        return Student(flow_map, plans)
    if kind == "jump":
        return Jump(_build(config["denoiser"], network), config["two_times"])
    if kind == "edm-consistency":
        return EDMConsistency(_build(config["denoiser"], network), config["sigma_data"])
    if kind == "on-schedule":
        return OnSchedule(_build(config["inner"], network), _build_named(SCHEDULES, config["schedule"]))
    if kind == "denoiser":
        prediction: Prediction = _build_named(PREDICTIONS, config["prediction"])
        schedule: Schedule = _build_named(SCHEDULES, config["schedule"])
        net = network(config["network"])
        takes = {
            "shape": (net.channels, *net.size) if isinstance(net, Adapter) else net.shape,
            "classes": net.classes if isinstance(net, Adapter) else config["network"].get("classes"),
        }
        for field, found in takes.items():
            if config[field] != found:
                raise ValueError(f"the model's {field} is {config[field]}, that of its network {found}")
        denoiser = NetworkDenoiser(net, schedule, prediction, config["shape"], config["classes"])
        denoiser.half_level = config.get("half_level")
        return denoiser
    return discrete_models.build(config, network)


def _build_named(registry: dict[str, Any], config: dict[str, Any]) -> Any:
    return registry[config["name"]](**{key: value for key, value in config.items() if key != "name"})


def save(model: Student | Denoiser, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a model folder; existing files are replaced one by one, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = describe(model)
    weights = folder / "model.safetensors"
    save_tensors(weights, model.state_dict())
    config = {"format": FORMAT, "model": description, "sha256": sha256(weights), "card": card or {}}
    write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    return folder


def load(folder: str | Path) -> Any:
    """The model in a folder: a :class:`Student` or a :class:`Denoiser`, in evaluation mode.

    Raises FileNotFoundError when there is no model, ValueError when a file is damaged or its weights do not fit.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = _read_config(path)
    held = headers(weights)
    with blaming(path), no_larger_than(len(held)):
        expected = build(config["model"], _without_memory, Place(path, "model")).state_dict()
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
