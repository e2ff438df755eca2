"""Folders that diffusers opens, written the way that :mod:`fewstep.hub.export_ways` chose, with a README."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.files import part_of, save_tensors, write_atomically
from fewstep.hub.adapters import Adapter, as_adapter
from fewstep.hub.autoencoders import autoencoder_name, latent_units
from fewstep.hub.export_ways import Arguments, Way
from fewstep.hub.requires import require
from fewstep.hub.source import standalone
from fewstep.models import Model, model_of


@dataclass(frozen=True)
class Exported:
    """What was written: the pipeline and scheduler classes, whether the folder holds code, and per number of steps the
    arguments of the pipeline's call.

    ``start`` is the standard deviation of the noise that the student starts from.  Plain pipelines start from 1; those
    that take ``latents`` make the very same pictures of ``latents = start * noise``.
    """

    folder: Path
    pipeline: str
    scheduler: str
    code: bool
    calls: dict[int, Arguments]
    start: float


def write(way: Way, model: nn.Module, target: Path) -> Exported:
    """Write a model the chosen way; the folder appears when it is whole."""
    part = _part(target)
    if way.adapter is not None and way.pipeline.__name__ != "StudentPipeline":
        pipeline = way.pipeline(**_components(way.adapter, way.scheduler, way.pipeline))
        pipeline.save_pretrained(part, safe_serialization=True)
    else:
        _write_student_pipeline(way, model_of(model), part)
    if way.code:
        index = json.loads((part / "model_index.json").read_text())
        index["scheduler"] = ["student_scheduler", "StudentScheduler"]
        shutil.copyfile(_source_file("student_scheduler"), part / "scheduler" / "student_scheduler.py")
        if way.scaled is not None:
            index["_class_name"] = [_write_scaled(way, part), way.pipeline_name]
        write_atomically(part / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
    result = Exported(target, way.pipeline_name, type(way.scheduler).__name__, way.code, way.calls, way.start)
    (part / "README.md").write_text(_card(way, result, part))
    if target.is_dir():
        target.rmdir()
    os.replace(part, target)
    return result


def _write_student_pipeline(way: Way, model: Model, part: Path) -> None:
    """A folder with our own pipeline: the network, the scheduler, and the autoencoder where samples are latents."""
    index: dict[str, Any] = {
        "_class_name": ["student_pipeline", "StudentPipeline"], "_diffusers_version": _version(),
        "shape": list(model.shape), "classes": model.classes or 0,
    }  # fmt: skip
    shutil.copyfile(_source_file("student_pipeline"), part / "student_pipeline.py")
    way.scheduler.save_pretrained(part / "scheduler")
    index["unet"] = _write_network(way.net, part / "unet")
    if way.adapter is not None and way.adapter.latent and way.adapter.origin is not None:
        pipe = way.adapter.origin.pipe
        autoencoder = pipe.components[autoencoder_name(pipe)]
        autoencoder.save_pretrained(part / "vae", safe_serialization=True)
        index["vae"] = ["diffusers", type(autoencoder).__name__]
        index["latents_mean"], index["latents_scale"] = latent_units(pipe)
    write_atomically(part / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())


SCALED_PIPELINE = '''"""{name} that starts from noise of its student's standard deviation instead of 1."""

from diffusers import {name}


class Student{name}({name}):
    """Scales the first noise, drawn or given as ``latents``."""

    def prepare_latents(self, *args, **kwargs):
        made = super().prepare_latents(*args, **kwargs)
        # Flux also gives the places of its tokens
        return ({start!r} * made[0], *made[1:]) if isinstance(made, tuple) else {start!r} * made
'''


def _write_scaled(way: Way, part: Path) -> str:
    """The subclass of the pipeline that scales its first noise; the name of its module."""
    source = SCALED_PIPELINE.format(name=way.pipeline.__name__, start=way.scaled)
    module = f"student_pipeline_{_digest(source)}"
    (part / f"{module}.py").write_text(source)
    return module


NETWORK_CLASS = '''

class StudentNetwork(ModelMixin, ConfigMixin):
    """The network above behind the call of diffusers' U-Nets; ``timestep`` is ``t``, or ``[t, s]``, and ``inputs`` are
    the network's further ones, a number each."""

    @register_to_config
    def __init__(self, arguments: dict) -> None:
        super().__init__()
        self.net = {name}(**{{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}})

    def forward(self, sample, timestep, class_labels=None, return_dict: bool = False, **inputs):
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1).expand(-1, len(sample))
        extras = {{name: torch.full((len(sample),), value, device=sample.device) for name, value in inputs.items()}}
        if len(times) == 2:
            extras["s"] = times[1].to(sample)
        return (self.net(sample, times[0], class_labels, **extras),)
'''


def _write_network(net: Any, folder: Path) -> list[str]:
    """Write a network as a pipeline component, with its source unless diffusers has it; its entry in the index."""
    adapter = as_adapter(net)
    if adapter is not None:
        adapter.model.save_pretrained(folder, safe_serialization=True)
        return ["diffusers", type(adapter.model).__name__]
    folder.mkdir()
    name = type(net).__name__
    source = standalone(type(net)).replace(
        "\nimport torch\n",
        "\nimport torch\nfrom diffusers.configuration_utils import ConfigMixin, register_to_config\n"
        "from diffusers.models.modeling_utils import ModelMixin\n",
        1,
    )
    source += NETWORK_CLASS.format(name=name)
    module = f"student_network_{_digest(source)}"
    (folder / f"{module}.py").write_text(source)
    config = {"_class_name": "StudentNetwork", "_diffusers_version": _version(), "arguments": net.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    return [module, "StudentNetwork"]


def _digest(source: str) -> str:
    """For names of modules: diffusers copies them to one shared place, so different sources need different names."""
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def _version() -> str:
    return str(require("diffusers", "exporting to diffusers").__version__)


def _source_file(module: str) -> Path:
    spec = importlib.util.find_spec(f"fewstep.hub.{module}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _part(target: Path) -> Path:
    """The folder that is written first and renamed when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    part.mkdir()
    return part


def _inputs(way: Way) -> str:
    """The line of the card that makes what the pipeline's call cannot do without; empty when it needs nothing."""
    net = way.adapter
    if net is None or not net.in_own_pipeline:
        return ""
    if net.classes:
        return 'inputs = {"class_labels": [0]}'
    if net.reads_prompts:
        return 'inputs = {"prompt": "a red boat on a lake"}'
    taken = inspect.signature(way.pipeline.__call__).parameters
    shapes = {name: shape for name, shape in (net.needs() | net.optional()).items() if name in taken}
    shapes.pop("guidance_scale", None)  # an argument of every call
    if "negative_image_embeds" in taken:
        shapes["negative_image_embeds"] = shapes["image_embeds"]
    rows = {name: ", ".join(["1", *("77" if length is None else str(length) for length in shape)])
            for name, shape in shapes.items()}  # fmt: skip
    return "inputs = {" + ", ".join(f'"{name}": torch.ones({row})' for name, row in rows.items()) + "}"


def _card(way: Way, result: Exported, part: Path) -> str:
    """How to open and call what was written, as lines that run where they stand (beside the folder)."""
    index = json.loads((part / "model_index.json").read_text())
    # diffusers wants to be told of what a folder was written without
    absent = [name for name, value in index.items() if value == [None, None]]
    opened = [f'"{result.folder.name}"', *(["trust_remote_code=True"] if result.code else [])]
    opened += [f"{name}=None" for name in absent if name not in way.pipeline._optional_components]
    inputs = _inputs(way)
    lines = [
        f"# {result.folder.name}", "",
        f"{result.pipeline} with {result.scheduler}; opens in plain diffusers:", "", "```python",
        *(["import torch"] if "torch." in inputs else []), "from diffusers import DiffusionPipeline", "",
        f"pipe = DiffusionPipeline.from_pretrained({', '.join(opened)})",
    ]  # fmt: skip
    if result.calls and inputs:
        lines.append(inputs)
    for steps, call in result.calls.items():
        shown = ", ".join([*(["**inputs"] if inputs else []), *(f"{name}={value!r}" for name, value in call.items())])
        lines.append(f"images = pipe({shown}).images  # {steps} call{'s' * (steps > 1)}")
    lines += ["```", ""]
    if not result.calls:
        lines += [f"It is called as every {result.pipeline}.", ""]
    if result.code:
        lines += ["The `.py` files in this folder are run by diffusers; read them before you trust them.", ""]
    elif abs(result.start - 1) > 1e-6:
        same = (
            "For the very same pictures pass `latents` of that standard deviation."
            if "latents" in inspect.signature(way.pipeline.__call__).parameters
            else "`fewstep export --with-code` writes a folder that starts exactly there."
        )
        start = f"The pipeline starts from noise of standard deviation 1; the student was made for {result.start:.6f}."
        lines += [f"{start} {same}", ""]
    if way.notes:
        lines += [" ".join(way.notes), ""]
    return "\n".join(lines)


def _components(net: Adapter, scheduler: Any, pipeline: Any) -> Arguments:
    """The arguments of a pipeline's constructor: what the origin has, with the network and the scheduler replaced."""
    given: Arguments = {net.component: net.model, "scheduler": scheduler}
    if net.origin is None:
        return given
    taken = inspect.signature(pipeline.__init__).parameters
    config = {name: value for name, value in net.origin.pipe.config.items() if name in taken}
    components = {name: value for name, value in net.origin.pipe.components.items() if name in taken}
    return {**config, **components, **given}
