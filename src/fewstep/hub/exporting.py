"""Students as folders that plain diffusers opens, without fewstep.

Two ways, chosen by comparing numbers (:mod:`fewstep.hub.tables`), never by guessing:

* *plain*: the network is a diffusers model, and one of diffusers' own schedulers makes the calls of every plan with
  the plan's own coefficients.  The folder holds weights and configs only.
* *with code*: everything else.  The folder also holds :mod:`fewstep.hub.student_scheduler` (a table of numbers), for
  pictures without text :mod:`fewstep.hub.student_pipeline`, and for our own networks their source, made self-contained.
  Diffusers runs such files after ``trust_remote_code=True`` only.

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
from fewstep.denoisers import Denoiser, NetworkDenoiser, OnSchedule, Prediction
from fewstep.flow_maps import Jump
from fewstep.hub.adapters import Adapter, UNet2D
from fewstep.hub.native import save_tensors, write_atomically
from fewstep.hub.requires import require
from fewstep.hub.schedulers import PREDICTION_TYPES
from fewstep.hub.source import standalone
from fewstep.hub.tables import Table, network_of, plan_table, scheduler_table
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

    ``start`` is the standard deviation of the noise that the student starts from.  Plain pipelines start from 1; feed
    them ``latents = start * noise`` for the very same pictures.
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
    scheduler scale the network's input, ``offsets`` the values of ``steps_offset`` that it leaves alone.
    """

    custom: str | None = None
    eta: bool = False
    seeded: bool = True
    scales: bool = True
    offsets: tuple[int, ...] = (0, 1)


HOSTS = {
    "DDIMPipeline": Host(),
    "DiTPipeline": Host(seeded=False),
    "StableDiffusionPipeline": Host("timesteps", eta=True, offsets=(1,)),
    "StableDiffusionXLPipeline": Host("timesteps", eta=True),
    "StableDiffusion3Pipeline": Host("sigmas", seeded=False, scales=False),
    "FluxPipeline": Host("sigmas", seeded=False, scales=False),
    "SanaPipeline": Host("sigmas", scales=False),
}


def export(model: Student | Denoiser, folder: str | Path) -> Exported:
    """Write ``model`` to a new folder that ``diffusers.DiffusionPipeline.from_pretrained`` opens.

    A denoiser that came from a pipeline goes back into it with the pipeline's own scheduler; any other denoiser is
    exported with deterministic plans of 10, 20 and 50 steps.  Plain where a scheduler of diffusers has the plans'
    coefficients (and its start is within 1% of the student's), else with code.

    Raises FileExistsError when ``folder`` is not empty, ValueError when the model has no place in diffusers.
    """
    target = _new_folder(folder)
    require("diffusers", "exporting to diffusers")
    net = _exportable(model)
    if isinstance(model, Denoiser):
        if isinstance(net, Adapter) and net.origin is not None:
            if not isinstance(model, NetworkDenoiser | OnSchedule):
                raise ValueError(f"a {type(model).__name__} is not a network: export the denoiser inside it")
            return _write_plain(net, net.origin.pipe.scheduler, type(net.origin.pipe), {}, 1.0, target)
        model = _with_plans(model)
    tables = {steps: plan_table(model.flow_map, plan) for steps, plan in model.plans.items()}
    found = _plain_scheduler(net, network_of(model), model.plans, tables) if isinstance(net, Adapter) else None
    if found is None:
        return _write_with_code(net, model, tables, target)
    scheduler, calls = found
    return _write_plain(net, scheduler, _pipeline_class(net), calls, _start(tables), target)


def export_with_code(model: Student | Denoiser, folder: str | Path) -> Exported:
    """Like :func:`export`, always with the student's own scheduler: the same pictures from the same noise, the start
    included."""
    target = _new_folder(folder)
    require("diffusers", "exporting to diffusers")
    student = _with_plans(model) if isinstance(model, Denoiser) else model
    tables = {steps: plan_table(student.flow_map, plan) for steps, plan in student.plans.items()}
    return _write_with_code(_exportable(model), student, tables, target)


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: not an empty folder; choose a new one or remove it first")
    return folder


def _exportable(model: Student | Denoiser) -> nn.Module:
    """The model's network; ValueError when neither diffusers nor our own source can rebuild it."""
    net = network_of(model).net
    if isinstance(net, Adapter):
        if any(".lora_A." in name for name in net.state_dict()):
            raise ValueError("the network holds LoRA layers: export lora.merged(model), or write them with lora.save")
    elif type(net) not in NETWORKS.values():
        raise ValueError(
            f"a {type(net).__name__} is neither a diffusers model nor one of fewstep's own networks "
            f"({', '.join(NETWORKS)}): plain diffusers could not build it"
        )
    return net


def _with_plans(denoiser: Denoiser) -> Student:
    schedule = denoiser.schedule
    grid = grids.uniform if isinstance(schedule, FlowMatching | TrigFlow) else grids.karras
    grid = grids.trailing if isinstance(schedule, DiscreteVP) else grid
    plans = {n: Plan(tuple(grid(schedule, n)[:-1].tolist()), gamma=0.0) for n in DENOISER_STEPS}
    return Student(Jump(denoiser), plans)


def _start(tables: dict[int, Table]) -> float:
    return next(iter(tables.values())).start


def _pipeline_class(net: nn.Module) -> Any:
    """The pipeline that a plain export goes into; ValueError when the network came without one."""
    if isinstance(net, UNet2D):
        return require("diffusers", "exporting to diffusers").DDIMPipeline
    assert isinstance(net, Adapter)
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
    config = net.model.config
    if isinstance(net, UNet2D) and (net.classes is not None or config.out_channels != config.in_channels):
        return None  # DDIMPipeline knows neither labels nor learned variances
    host = HOSTS[pipeline]
    if any(abs(table.start - 1) > START_SLACK for table in tables.values()):
        return None
    scheduler_config = net.origin.pipe.scheduler.config if net.origin is not None else {}
    for scheduler, calls in _candidates(denoiser.schedule, denoiser.prediction, scheduler_config, host, plans):
        if all(_serves(scheduler, calls[steps], host, tables[steps]) for steps in plans):
            return scheduler, calls
    return None


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


def _with_guidance(net: Any, call: Arguments) -> Arguments:
    """A call that does not guide on top of the student."""
    return call if not isinstance(net, Adapter) or isinstance(net, UNet2D) else {**call, "guidance_scale": net.guidance}


def _components(net: Adapter, scheduler: Any, pipeline: Any) -> Arguments:
    """The arguments of a pipeline's constructor: what the origin has, with the network and the scheduler replaced."""
    given: Arguments = {net.component: net.model, "scheduler": scheduler}
    if net.origin is None:
        return given
    taken = inspect.signature(pipeline.__init__).parameters
    config = {name: value for name, value in net.origin.pipe.config.items() if name in taken}
    components = {name: value for name, value in net.origin.pipe.components.items() if name in taken}
    return {**config, **components, **given}


def _write_plain(
    net: Any, scheduler: Any, pipeline: Any, calls: dict[int, Arguments], start: float, target: Path
) -> Exported:
    calls = {steps: _with_guidance(net, call) for steps, call in calls.items()}
    result = Exported(target, pipeline.__name__, type(scheduler).__name__, False, calls, start)
    part = _part(target)
    pipeline(**_components(net, scheduler, pipeline)).save_pretrained(part, safe_serialization=True)
    _finish(part, result)
    return result


def _write_with_code(net: Any, student: Student, tables: dict[int, Table], target: Path) -> Exported:
    from fewstep.hub.student_pipeline import StudentPipeline
    from fewstep.hub.student_scheduler import StudentScheduler

    plans = {str(n): {"start": t.start, "calls": [asdict(call) for call in t.calls]} for n, t in tables.items()}
    scheduler = StudentScheduler(plans=plans)
    calls = {n: _with_guidance(net, {"num_inference_steps": n}) for n in tables}
    text = isinstance(net, Adapter) and not isinstance(net, UNet2D)
    pipeline: Any = _pipeline_class(net) if text else StudentPipeline
    if text:
        host = HOSTS.get(pipeline.__name__)
        if host is None:
            raise ValueError(f"{pipeline.__name__}: fewstep does not know how this pipeline calls its scheduler")
        if not host.scales and any(abs(table.start - 1) > 1e-6 for table in tables.values()):
            raise ValueError(f"{pipeline.__name__} starts from unit noise, the student from {_start(tables):g}")
    part = _part(target)
    index: dict[str, Any]
    if text:
        pipeline(**_components(net, scheduler, pipeline)).save_pretrained(part, safe_serialization=True)
        index = json.loads((part / "model_index.json").read_text())
    else:
        index = {"_class_name": ["student_pipeline", "StudentPipeline"], "_diffusers_version": _version()}
        index.update(shape=list(student.shape), classes=student.classes or 0)
        shutil.copyfile(_source_file("student_pipeline"), part / "student_pipeline.py")
        scheduler.save_pretrained(part / "scheduler")
        index["unet"] = _write_network(net, part / "unet")
    index["scheduler"] = ["student_scheduler", "StudentScheduler"]
    shutil.copyfile(_source_file("student_scheduler"), part / "scheduler" / "student_scheduler.py")
    write_atomically(part / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
    result = Exported(target, pipeline.__name__, "StudentScheduler", True, calls, 1.0)
    _finish(part, result)
    return result


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
    # diffusers copies such files to one shared place: different networks need different names
    module = f"student_network_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    (folder / f"{module}.py").write_text(source)
    config = {"_class_name": "StudentNetwork", "_diffusers_version": _version(), "arguments": net.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    return [module, "StudentNetwork"]


def _version() -> str:
    return str(require("diffusers", "exporting to diffusers").__version__)


def _source_file(module: str) -> Path:
    spec = importlib.util.find_spec(f"fewstep.hub.{module}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _part(target: Path) -> Path:
    """The folder that is written first and renamed when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def _finish(part: Path, result: Exported) -> None:
    (part / "README.md").write_text(_card(result))
    if result.folder.is_dir():
        result.folder.rmdir()
    os.replace(part, result.folder)


def _card(result: Exported) -> str:
    """How to open and call what was written."""
    trust = ", trust_remote_code=True" if result.code else ""
    lines = [
        f"# {result.folder.name}", "",
        f"{result.pipeline} with {result.scheduler}; opens in plain diffusers:", "", "```python",
        "from diffusers import DiffusionPipeline", "",
        f'pipe = DiffusionPipeline.from_pretrained("{result.folder.name}"{trust})',
    ]  # fmt: skip
    for steps, call in result.calls.items():
        shown = ", ".join(f"{name}={value!r}" for name, value in call.items())
        lines.append(f"images = pipe({'..., ' if 'guidance_scale' in call else ''}{shown}).images  # {steps} calls")
    lines += ["```", ""]
    if result.code:
        lines += ["The `.py` files in this folder are run by diffusers; read them before you trust them.", ""]
    elif abs(result.start - 1) > 1e-6:
        lines += [
            f"The pipeline starts from noise of standard deviation 1; the student was made for {result.start:.6f}. "
            "For the very same pictures pass `latents` of that standard deviation.", ""
        ]  # fmt: skip
    return "\n".join(lines)
