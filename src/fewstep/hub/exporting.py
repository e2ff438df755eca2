"""Students as folders that plain diffusers opens, without fewstep.

Two ways, chosen by comparing numbers (:mod:`fewstep.hub.tables`), never by guessing:

* *plain*: the network is a diffusers model, and one of diffusers' own schedulers makes the calls of every plan with
  the plan's own coefficients.  The folder holds weights and configs only.
* *with code*: everything else.  The folder also holds :mod:`fewstep.hub.student_scheduler` (a table of numbers), for
  pictures without text :mod:`fewstep.hub.student_pipeline`, for pipelines that start from unit noise where the student
  does not a subclass of five lines, and for our own networks their source, made self-contained.  Diffusers runs such
  files after ``trust_remote_code=True`` only.

A README in the folder says how to call it: the numbers of steps that there are plans for, and the arguments.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep import grids
from fewstep.denoisers import Denoiser, NetworkDenoiser, Prediction
from fewstep.files import part_of, save_tensors, write_atomically
from fewstep.flow_maps import Jump
from fewstep.hub.adapters import Adapter, DiT, TextAdapter, UNet2D
from fewstep.hub.autoencoders import autoencoder_name, latent_units, pixels_per_latent
from fewstep.hub.requires import require
from fewstep.hub.schedulers import PREDICTION_TYPES
from fewstep.hub.source import standalone
from fewstep.hub.tables import Table, network_of, plan_table, scheduler_table
from fewstep.models import Model, model_of
from fewstep.networks import NETWORKS
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import DiscreteVP, FlowMatching, Schedule, TrigFlow

#: A plain pipeline starts from unit noise whatever the student's start is; up to this gap it is still offered.
START_SLACK = 0.01
#: Numbers of steps of the deterministic plans that a denoiser without any plan is exported with.
DENOISER_STEPS = (10, 20, 50)

Arguments = dict[str, Any]


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


@dataclass(frozen=True)
class Host:
    """What a diffusers pipeline does around its scheduler.

    ``custom`` names the argument of its call that sets the times ("timesteps", "sigmas" or None), ``eta`` and
    ``seeded`` whether it hands ``eta`` and its generator to the scheduler's step, ``scales`` whether it lets the
    scheduler scale the network's input, ``draws`` whether it draws its first noise in ``prepare_latents``, where a
    subclass can scale it, ``offsets`` the values of ``steps_offset`` that it leaves alone.
    """

    custom: str | None = None
    eta: bool = False
    seeded: bool = True
    scales: bool = True
    draws: bool = True
    offsets: tuple[int, ...] = (0, 1)


HOSTS = {
    "DDIMPipeline": Host(),
    "LDMPipeline": Host(eta=True, seeded=False),
    "DiTPipeline": Host(seeded=False),
    "StableDiffusionPipeline": Host("timesteps", eta=True, offsets=(1,)),
    "StableDiffusionXLPipeline": Host("timesteps", eta=True),
    "StableDiffusion3Pipeline": Host("sigmas", seeded=False, scales=False),
    "FluxPipeline": Host("sigmas", seeded=False, scales=False),
    "SanaPipeline": Host("sigmas", scales=False),
    "KandinskyV22Pipeline": Host(scales=False),
    "LDMTextToImagePipeline": Host(eta=True, seeded=False, scales=False, draws=False),
}


@dataclass(frozen=True)
class Way:
    """How a model is going to be written: into which pipeline, with which scheduler, and the arguments of each call.

    ``code`` says whether the folder holds code, ``start`` is the first noise's standard deviation.  ``scaled`` is that
    number where a subclass of ``pipeline`` scales its first noise by it, else None.
    """

    net: Any
    pipeline: Any
    scheduler: Any
    calls: dict[int, Arguments]
    start: float
    code: bool = False
    scaled: float | None = None


def export(model: nn.Module, folder: str | Path) -> Exported:
    """Write ``model`` to a new folder that ``diffusers.DiffusionPipeline.from_pretrained`` opens.

    A denoiser that came from a pipeline goes back into it with the pipeline's own scheduler; any other denoiser is
    exported with deterministic plans of 10, 20 and 50 steps.  Plain where a scheduler of diffusers has the plans'
    coefficients (and its start is within 1% of the student's), else with code.

    Raises FileExistsError when ``folder`` is not empty, ValueError when the model has no place in diffusers.
    """
    target = _new_folder(folder)
    return _write(_way(model), model, target)


def export_with_code(model: nn.Module, folder: str | Path) -> Exported:
    """Like :func:`export`, always with the student's own scheduler: the same pictures from the same noise, the start
    included."""
    target = _new_folder(folder)
    return _write(_way_with_code(model), model, target)


def foretold(model: nn.Module) -> str:
    """What :func:`export` would write, on one line; ValueError saying why when it could not write the model."""
    way = _way(model)
    kind = "with code" if way.code else "plain"
    return f"{kind}, a {_pipeline_name(way)} with {type(way.scheduler).__name__}"


def _way(model: nn.Module) -> Way:
    return _plain_way(model) or _way_with_code(model)


def _plain_way(model: nn.Module) -> Way | None:
    """Into a pipeline of diffusers with a scheduler of diffusers; None when none has the coefficients."""
    require("diffusers", "exporting to diffusers")
    student = _student(model)
    net = _exportable(model)
    if not isinstance(net, Adapter):
        return None
    kind = model_of(model)
    if kind.plans is None and net.origin is not None:
        if not kind.kind:
            raise ValueError(f"a {type(model).__name__} is not a network: export the denoiser inside it")
        pipe = net.origin.pipe
        return Way(net, type(pipe), pipe.scheduler, {}, 1.0)
    tables = _tables(student)
    found = _plain_scheduler(net, network_of(student), student.plans, tables)
    if found is None:
        return None
    pipeline = _pipeline_class(net)
    calls = {steps: {**call, **_arguments(net, pipeline)} for steps, call in found[1].items()}
    return Way(net, pipeline, found[0], calls, _start(tables))


def _way_with_code(model: nn.Module) -> Way:
    """Into a pipeline of diffusers, or our own, with the student's table as its scheduler."""
    from fewstep.hub.student_pipeline import StudentPipeline
    from fewstep.hub.student_scheduler import StudentScheduler

    student = _student(model)
    net = _exportable(model)
    tables = _tables(student)
    pipeline, scaled = StudentPipeline, None
    if isinstance(net, TextAdapter | DiT):
        pipeline = _pipeline_class(net)
        host = _host(net, pipeline)
        scaled = None if host.scales else _scaled_start(pipeline.__name__, host, tables)
    elif isinstance(net, Adapter):
        _refuse_pictures_beside(net, "StudentPipeline")
    usual = _arguments(net, pipeline)
    if (
        pipeline is StudentPipeline
        and (len(student.shape) != 3 or student.shape[0] not in (1, 3))
        and not _decodes(net)
    ):
        usual = {"output_type": "latent"}  # samples that are not pictures
    plans = {
        str(n): {"start": t.start if scaled is None else 1.0, "calls": [asdict(call) for call in t.calls]}
        for n, t in tables.items()
    }  # fmt: skip
    calls = {n: {"num_inference_steps": n, **usual} for n in tables}
    return Way(net, pipeline, StudentScheduler(plans=plans), calls, 1.0, code=True, scaled=scaled)


def _decodes(net: Any) -> bool:
    """Whether the network's samples are latents, written with their autoencoder."""
    return isinstance(net, Adapter) and net.latent


def _host(net: Adapter, pipeline: Any) -> Host:
    """What ``pipeline`` does around a scheduler of students; ValueError when nobody knows or it cannot serve."""
    name = pipeline.__name__
    _refuse_pictures_beside(net, name)
    if name not in HOSTS:
        raise ValueError(f"{name}: fewstep does not know how this pipeline calls its scheduler")
    if isinstance(net, DiT) and net.size != net.config_size():
        raise ValueError(f"{name}: it makes samples of {net.config_size()} only, the student makes {net.size}")
    return HOSTS[name]


def _refuse_pictures_beside(net: Adapter, pipeline: str) -> None:
    if net.takes != net.channels:
        raise ValueError(f"{pipeline}: students of networks with pictures beside the noise (concat) are not exported")


def _scaled_start(pipeline: str, host: Host, tables: dict[int, Table]) -> float | None:
    """The factor on the first noise of a pipeline that does not let its scheduler scale it; None for 1."""
    starts = [table.start for table in tables.values()]
    if all(abs(start - 1) <= 1e-6 for start in starts):
        return None
    if not host.draws:
        raise ValueError(f"{pipeline} starts from unit noise, the student from {starts[0]:g}")
    if max(starts) - min(starts) > 1e-6:
        raise ValueError(f"{pipeline} has one start, the student's plans start from {min(starts):g} to {max(starts):g}")
    return starts[0]


def _tables(student: Student) -> dict[int, Table]:
    return {steps: plan_table(student.flow_map, plan) for steps, plan in student.plans.items()}


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: not an empty folder; choose a new one or remove it first")
    return folder


def _exportable(model: nn.Module) -> Any:
    """The model's network; ValueError when neither diffusers nor our own source can rebuild it."""
    net = network_of(model).net
    if isinstance(net, Adapter):
        if any(".lora_A." in name for name in net.state_dict()):
            raise ValueError("the network holds LoRA layers: export lora.merged(model), or write them with lora.save")
        if net.latent and net.origin is None:
            raise ValueError("the model makes latents, and the pipeline with their autoencoder is not where it was")
    elif type(net) not in NETWORKS.values():
        raise ValueError(
            f"a {type(net).__name__} is neither a diffusers model nor one of fewstep's own networks "
            f"({', '.join(NETWORKS)}): plain diffusers could not build it"
        )
    return net


def _student(model: nn.Module) -> Student:
    """The model as a flow map with plans; ValueError for a kind that has no place in diffusers."""
    kind = model_of(model)
    try:
        return _with_plans(kind.denoiser()) if kind.plans is None else kind.student()
    except ValueError as error:
        raise ValueError(f"diffusers has no place for {error}") from None


def _with_plans(denoiser: Denoiser) -> Student:
    schedule = denoiser.schedule
    grid = grids.uniform if isinstance(schedule, FlowMatching | TrigFlow) else grids.karras
    grid = grids.trailing if isinstance(schedule, DiscreteVP) else grid
    plans = {n: Plan(tuple(grid(schedule, n)[:-1].tolist()), gamma=0.0) for n in DENOISER_STEPS}
    return Student(Jump(denoiser), plans)


def _start(tables: dict[int, Table]) -> float:
    return next(iter(tables.values())).start


def _pipeline_class(net: Adapter) -> Any:
    """The pipeline that a plain export goes into; ValueError when the network came without one."""
    if isinstance(net, UNet2D):
        diffusers = require("diffusers", "exporting to diffusers")
        return diffusers.LDMPipeline if net.latent else diffusers.DDIMPipeline
    if net.origin is None:
        raise ValueError(f"a bare {type(net.model).__name__} has no pipeline to go back into; use load_pipeline")
    return type(net.origin.pipe)


def _plain_scheduler(
    net: Adapter, denoiser: NetworkDenoiser, plans: dict[int, Plan], tables: dict[int, Table]
) -> tuple[Any, dict[int, Arguments]] | None:
    """A diffusers scheduler with the coefficients of every table, and the arguments of each call; None when there is
    none, or when the pipeline starts too far from where the student starts."""
    pipeline = _pipeline_class(net).__name__
    if pipeline not in HOSTS:
        return None
    if isinstance(net, UNet2D) and not _is_plain(net):
        return None
    if isinstance(net, DiT) and net.size != net.config_size():
        return None
    host = HOSTS[pipeline]
    if any(abs(table.start - 1) > START_SLACK for table in tables.values()):
        return None
    scheduler_config = net.origin.pipe.scheduler.config if net.origin is not None else {}
    for scheduler, calls in _candidates(denoiser.schedule, denoiser.prediction, scheduler_config, host, plans):
        if all(_serves(scheduler, calls[steps], host, tables[steps]) for steps in plans):
            return scheduler, calls
    return None


def _is_plain(net: UNet2D) -> bool:
    """Whether DDIMPipeline or LDMPipeline can call the network: they know no labels, no learned variances, no pictures
    beside the noise, no size but the config's, and LDM's autoencoder only."""
    config = net.model.config
    return (
        net.classes is None
        and net.takes == net.gives == net.channels
        and config.sample_size is not None
        and net.size == net.config_size()
        and (net.origin is None or autoencoder_name(net.origin.pipe) in (None, "vqvae"))
    )


def _serves(scheduler: Any, call: Arguments, host: Host, table: Table) -> bool:
    """Whether the pipeline's ``call`` of ``scheduler`` makes the calls of ``table`` with its coefficients."""
    step = {"eta": call["eta"]} if "eta" in call else {}
    # pipelines hand on the list of times where there is one, else their number
    name = next(name for name in ("timesteps", "sigmas", "num_inference_steps") if name in call)
    try:
        return scheduler_table(scheduler, {name: call[name]}, step, host.seeded).agrees(table)
    except ValueError:
        return False  # the scheduler has no such number of steps


def _candidates(
    schedule: Schedule, prediction: Prediction, config: Any, host: Host, plans: dict[int, Plan]
) -> Iterator[tuple[Any, dict[int, Arguments]]]:
    """Schedulers of diffusers that may serve the plans, the most usual first, with the arguments of each call."""
    diffusers = require("diffusers", "exporting to diffusers")
    counted: dict[int, Arguments] = {n: {"num_inference_steps": n} for n in plans}
    if isinstance(schedule, FlowMatching) and host.custom == "sigmas":
        listed = {n: {"num_inference_steps": n, "sigmas": list(plan.times)} for n, plan in plans.items()}
        scale = round(prediction.time_scale)
        yield diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=scale), listed
        yield diffusers.FlowMatchLCMScheduler(num_train_timesteps=scale), listed
    if not isinstance(schedule, DiscreteVP) or type(prediction) not in PREDICTION_TYPES:
        return
    betas = {**_beta_config(schedule, prediction, config), "steps_offset": host.offsets[-1]}
    if all(plan.gamma == 0 or len(plan.times) == 1 for plan in plans.values()):
        spacings = [("trailing", 1), ("linspace", 1), *(("leading", offset) for offset in host.offsets)]
        for spacing, offset in spacings:
            grid = {**betas, "timestep_spacing": spacing, "steps_offset": offset}
            yield diffusers.DDIMScheduler(**grid, clip_sample=False, set_alpha_to_one=False), counted
    # the grids of these two are subsets of original_inference_steps equal steps: the usual 50, one each, the plan's own
    table_length = len(schedule.alphas_cumprod)
    for original in dict.fromkeys((50, table_length, max(plans))):
        if original <= table_length:
            yield diffusers.LCMScheduler(**betas, original_inference_steps=original), counted
            if host.eta:
                noisy = {n: {**counted[n], "eta": plan.gamma} for n, plan in plans.items()}
                yield diffusers.TCDScheduler(**betas, original_inference_steps=original), noisy
    if host.eta and all(t == round(t) for plan in plans.values() for t in plan.times):
        listed = {
            n: {"timesteps": [round(t) for t in plan.times], "eta": plan.gamma} for n, plan in plans.items()
        }  # fmt: skip
        yield diffusers.TCDScheduler(**betas, original_inference_steps=table_length), listed


def _beta_config(schedule: DiscreteVP, prediction: Prediction, config: Any) -> Arguments:
    """The beta arguments of a scheduler with the schedule's table: those of the scheduler that the model came with,
    or else the table's own betas."""
    kind = {"num_train_timesteps": len(schedule.alphas_cumprod), "prediction_type": PREDICTION_TYPES[type(prediction)]}
    if "beta_start" in config:
        names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        return {**kind, **{name: config[name] for name in names if name in config}}
    kept = torch.tensor((1.0, *schedule.alphas_cumprod), dtype=torch.float64)
    return {**kind, "trained_betas": (1 - kept[1:] / kept[:-1]).tolist()}


def _arguments(net: Any, pipeline: Any) -> Arguments:
    """The arguments of a call that make the pipeline's network calls the student's: no guidance on top of it, and its
    own size where that is not the pipeline's."""
    if not isinstance(net, TextAdapter | DiT):
        return {}
    assert net.origin is not None
    found: Arguments = {"guidance_scale": net.guidance}
    taken = inspect.signature(pipeline.__call__).parameters
    if "height" in taken:
        scale = pixels_per_latent(net.origin.pipe)
        own, usual = ((scale * height, scale * width) for height, width in (net.size, net.config_size()))
        if own != (taken["height"].default or usual[0], taken["width"].default or usual[1]):
            found.update(height=own[0], width=own[1])
            if "use_resolution_binning" in taken:
                found["use_resolution_binning"] = False
    return found


def _components(net: Adapter, scheduler: Any, pipeline: Any) -> Arguments:
    """The arguments of a pipeline's constructor: what the origin has, with the network and the scheduler replaced."""
    given: Arguments = {net.component: net.model, "scheduler": scheduler}
    if net.origin is None:
        return given
    taken = inspect.signature(pipeline.__init__).parameters
    config = {name: value for name, value in net.origin.pipe.config.items() if name in taken}
    components = {name: value for name, value in net.origin.pipe.components.items() if name in taken}
    return {**config, **components, **given}


def _pipeline_name(way: Way) -> str:
    name: str = way.pipeline.__name__
    return name if way.scaled is None else f"Student{name}"


def _write(way: Way, model: nn.Module, target: Path) -> Exported:
    """Write a model the chosen way; the folder appears when it is whole."""
    part = _part(target)
    if isinstance(way.net, Adapter) and way.pipeline.__name__ != "StudentPipeline":
        pipeline = way.pipeline(**_components(way.net, way.scheduler, way.pipeline))
        pipeline.save_pretrained(part, safe_serialization=True)
    else:
        _write_student_pipeline(way, model_of(model), part)
    if way.code:
        index = json.loads((part / "model_index.json").read_text())
        index["scheduler"] = ["student_scheduler", "StudentScheduler"]
        shutil.copyfile(_source_file("student_scheduler"), part / "scheduler" / "student_scheduler.py")
        if way.scaled is not None:
            index["_class_name"] = [_write_scaled(way, part), _pipeline_name(way)]
        write_atomically(part / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
    result = Exported(target, _pipeline_name(way), type(way.scheduler).__name__, way.code, way.calls, way.start)
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
    if _decodes(way.net):
        pipe = way.net.origin.pipe
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
    """The network above behind the call of diffusers' U-Nets; ``timestep`` is ``t``, or ``[t, s]``."""

    @register_to_config
    def __init__(self, arguments: dict) -> None:
        super().__init__()
        self.net = {name}(**{{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}})

    def forward(self, sample, timestep, class_labels=None, return_dict: bool = False):
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1).expand(-1, len(sample))
        extras = {{"s": times[1].to(sample)}} if len(times) == 2 else {{}}
        return (self.net(sample, times[0], class_labels, **extras),)
'''


def _write_network(net: Any, folder: Path) -> list[str]:
    """Write a network as a pipeline component, with its source unless diffusers has it; its entry in the index."""
    if isinstance(net, Adapter):
        net.model.save_pretrained(folder, safe_serialization=True)
        return ["diffusers", type(net.model).__name__]
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
    net = way.net
    if isinstance(net, DiT):
        return 'inputs = {"class_labels": [0]}'
    if not isinstance(net, TextAdapter):
        return ""
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
    return "\n".join(lines)
