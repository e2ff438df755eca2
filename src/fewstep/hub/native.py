"""fewstep's own folders: ``config.json`` says what the model is, ``model.safetensors`` holds its weights.

The config is plain data: the schedule, the prediction and the network with their arguments, a student's flow map and
sampling plans, and a card (how the model was made and how good it is).  Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep import schedules
from fewstep.denoisers import PREDICTIONS, Denoiser, NetworkDenoiser, OnSchedule, Prediction
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump
from fewstep.hub import discrete_models
from fewstep.hub.adapters import Adapter, rebuilt
from fewstep.hub.adapters import described as described_adapter
from fewstep.networks import NETWORKS
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, described

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


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, written atomically."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when all goes well and is removed when not; OSError names
    ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError naming the file when it is damaged or not safetensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or make it again") from None


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


def _build_network(config: dict[str, Any]) -> nn.Module:
    arguments = dict(config)
    name = arguments.pop("name")
    if name == DIFFUSERS:
        return rebuilt(arguments)
    network: nn.Module = _choose(NETWORKS, name, "network")(**_tuples(arguments))
    return network


def _plan(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(plan).items() if value is not None}


def build(config: dict[str, Any]) -> Any:
    """The model that :func:`describe` described, with untrained weights."""
    kind = config["kind"]
    if kind == "student":
        plans = {int(steps): Plan(**_tuples(plan)) for steps, plan in config["plans"].items()}
        flow_map: FlowMap = build(config["flow_map"])
        return Student(flow_map, plans)
    if kind == "jump":
        return Jump(build(config["denoiser"]), bool(config["two_times"]))
    if kind == "edm-consistency":
        return EDMConsistency(build(config["denoiser"]), float(config["sigma_data"]))
    if kind == "on-schedule":
        return OnSchedule(build(config["inner"]), _build_schedule(config["schedule"]))
    if kind == "denoiser":
        prediction = dict(config["prediction"])
        head: type[Prediction] = _choose(PREDICTIONS, prediction.pop("name"), "prediction")
        net = _build_network(config["network"])
        return NetworkDenoiser(
            net, _build_schedule(config["schedule"]), head(**prediction), tuple(config["shape"]), config["classes"]
        )
    if kind in discrete_models.KINDS:
        return discrete_models.build(config)
    known = ("student", "jump", "edm-consistency", "on-schedule", "denoiser", *discrete_models.KINDS)
    raise ValueError(f"kind '{kind}' is not one of {', '.join(known)}")


def _build_schedule(config: dict[str, Any]) -> Schedule:
    arguments = _tuples(dict(config))
    return _choose(SCHEDULES, arguments.pop("name"), "schedule")(**arguments)


def _choose(registry: dict[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise ValueError(f"{what} '{name}' is unknown; this version knows {', '.join(registry)}")
    return registry[name]


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def save(model: Student | Denoiser, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write a model folder; existing files are replaced one by one, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", model.state_dict())
    config = {"format": FORMAT, "model": describe(model), "card": card or {}}
    write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    return folder


def load(folder: str | Path) -> Any:
    """The model in a folder: a :class:`Student` or a :class:`Denoiser`, in evaluation mode.

    Raises FileNotFoundError when there is no model, ValueError when a file is damaged or its weights do not fit.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = _read_config(path)
    try:
        model = build(config["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a model description of this version of fewstep ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = load_tensors(folder / "model.safetensors")
    expected = model.state_dict()
    for name, tensor in expected.items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else f"of shape {list(found.shape)}"
            raise ValueError(
                f"{folder / 'model.safetensors'}: tensor '{name}' is {shape}, config.json asks for {list(tensor.shape)}"
            )
    if extra := sorted(set(weights) - set(expected)):
        raise ValueError(f"{folder / 'model.safetensors'}: tensor '{extra[0]}' does not belong to this model")
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def card(folder: str | Path) -> dict[str, Any]:
    """The card of a model folder: how it was made and how good it is."""
    return dict(_read_config(Path(folder) / "config.json").get("card", {}))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no fewstep model here (config.json is missing)")
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{path}: format {found} is not {FORMAT}, the one this version of fewstep reads")
    return config
