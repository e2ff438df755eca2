"""How a model can be written for diffusers: into which pipeline, with which scheduler, plainly or with code.

Schedulers are tried by their numbers (:mod:`fewstep.hub.tables`): one serves when it makes the calls of every plan with
the plan's own coefficients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.flow_maps import Jump
from fewstep.grids import GRIDS
from fewstep.hub.adapters import Adapter, as_adapter
from fewstep.hub.autoencoders import pixels_per_latent
from fewstep.hub.export_inputs import check_carried, driven, notes, scale_of, with_constants
from fewstep.hub.requires import require
from fewstep.hub.schedulers import PREDICTION_TYPES
from fewstep.hub.tables import Call, Table, network_of, plan_table, scheduler_table
from fewstep.models import model_of
from fewstep.networks import NETWORKS
from fewstep.networks.lora import factors_in
from fewstep.predictions import Prediction
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import FlowMatching, Schedule

#: A plain pipeline starts from unit noise whatever the student's start is; up to this gap it is still offered.
START_SLACK = 0.01
#: Numbers of steps of the deterministic plans that a denoiser without any plan is exported with.
DENOISER_STEPS = (10, 20, 50)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Host:
    """What a diffusers pipeline does around its scheduler.

    ``custom`` names the argument of its call that sets the times ("timesteps", "sigmas" or None), ``eta`` and
    ``seeded`` whether it hands ``eta`` and its generator to the scheduler's step, ``scales`` whether it lets the
    scheduler scale the network's input, ``draws`` whether it draws its first noise in ``prepare_latents``, where a
    subclass can scale it, ``offsets`` the values of ``steps_offset`` that it leaves alone, ``tells`` whether it tells a
    network that has an input for it the guidance scale.
    """

    custom: str | None = None
    eta: bool = False
    seeded: bool = True
    scales: bool = True
    draws: bool = True
    offsets: tuple[int, ...] = (0, 1)
    tells: bool = False


HOSTS = {
    "DDIMPipeline": Host(),
    "LDMPipeline": Host(eta=True, seeded=False),
    "DiTPipeline": Host(seeded=False),
    "StableDiffusionPipeline": Host("timesteps", eta=True, offsets=(1,), tells=True),
    "StableDiffusionXLPipeline": Host("timesteps", eta=True, tells=True),
    "StableDiffusion3Pipeline": Host("sigmas", seeded=False, scales=False),
    "FluxPipeline": Host("sigmas", seeded=False, scales=False, tells=True),
    "SanaPipeline": Host("sigmas", scales=False),
    "KandinskyV22Pipeline": Host(scales=False),
    "LDMTextToImagePipeline": Host(eta=True, seeded=False, scales=False, draws=False),
}
#: The pipelines that tell their network the guidance scale.
TELLING = tuple(name for name, host in HOSTS.items() if host.tells)


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
    #: Sentences for the card.
    notes: tuple[str, ...] = ()

    @property
    def adapter(self) -> Adapter | None:
        """The network where it is diffusers', None where it is ours."""
        return as_adapter(self.net)

    @property
    def pipeline_name(self) -> str:
        """The class of the pipeline, or of its subclass."""
        name: str = self.pipeline.__name__
        return name if self.scaled is None else f"Student{name}"


def way_for(model: nn.Module, extras: Mapping[str, float] = MappingProxyType({})) -> Way:
    """The plain way where there is one, else the one with code; ``extras`` are further inputs that are to be constant.
    ValueError when the model has no place in diffusers."""
    return plain_way(model, extras) or way_with_code(model, extras)


def plain_way(model: nn.Module, extras: Mapping[str, float]) -> Way | None:
    """Into a pipeline of diffusers with a scheduler of diffusers; None when none has the coefficients."""
    require("diffusers", "exporting to diffusers")
    student = with_constants(_student(model), extras)
    adapter = as_adapter(_exportable(model))
    if adapter is None:
        return None
    kind = model_of(model)
    if kind.plans is None and adapter.origin is not None:
        if not kind.kind:
            raise ValueError(f"a {type(model).__name__} is not a network: export the denoiser inside it")
        pipe = adapter.origin.pipe
        return Way(adapter, type(pipe), pipe.scheduler, {}, 1.0)
    tables = _tables(student, adapter)
    found = _plain_scheduler(adapter, network_of(student), student.plans, tables)
    if found is None:
        return None
    pipeline = adapter.pipeline_class()
    check_carried(student, adapter, adapter, TELLING, pipeline.__name__)
    calls = {
        steps: {**call, **_arguments(adapter, pipeline), **scale_of(student, student.plans[steps], adapter)}
        for steps, call in found[1].items()
    }
    said = tuple(notes(student, adapter))
    return Way(adapter, pipeline, found[0], calls, _start(tables), notes=said)


def way_with_code(model: nn.Module, extras: Mapping[str, float] = MappingProxyType({})) -> Way:
    """Into a pipeline of diffusers, or our own, with the student's table as its scheduler."""
    from fewstep.hub.student_pipeline import StudentPipeline
    from fewstep.hub.student_scheduler import StudentScheduler

    student = with_constants(_student(model), extras)
    net = _exportable(model)
    adapter = as_adapter(net)
    tables = _tables(student, adapter)
    pipeline: Any = StudentPipeline
    scaled = None
    usual: Arguments = {}
    if adapter is not None and adapter.in_own_pipeline:
        pipeline = adapter.pipeline_class()
        host = _host(adapter, pipeline)
        scaled = None if host.scales else _scaled_start(pipeline.__name__, host, tables)
        usual = _arguments(adapter, pipeline)
    elif adapter is not None:
        _refuse_pictures_beside(adapter, "StudentPipeline")
    check_carried(student, net, adapter, TELLING, pipeline.__name__)
    pictures = len(student.shape) == 3 and student.shape[0] in (1, 3)
    latent = adapter is not None and adapter.latent
    if pipeline is StudentPipeline and not pictures and not latent:
        usual = {"output_type": "latent"}  # samples that are not pictures
    plans = {
        str(n): {"start": t.start if scaled is None else 1.0, "calls": [_row(call) for call in t.calls]}
        for n, t in tables.items()
    }  # fmt: skip
    calls = {n: {"num_inference_steps": n, **usual, **scale_of(student, student.plans[n], adapter)} for n in tables}
    said = tuple(notes(student, adapter))
    return Way(net, pipeline, StudentScheduler(plans=plans), calls, 1.0, code=True, scaled=scaled, notes=said)


def _row(call: Call) -> Arguments:
    """A call as the student's scheduler keeps it."""
    row = asdict(call)
    return row if row["inputs"] else {name: value for name, value in row.items() if name != "inputs"}


def _host(net: Adapter, pipeline: Any) -> Host:
    """What ``pipeline`` does around a scheduler of students; ValueError when nobody knows or it cannot serve."""
    name = pipeline.__name__
    _refuse_pictures_beside(net, name)
    if name not in HOSTS:
        raise ValueError(f"{name}: fewstep does not know how this pipeline calls its scheduler")
    if net.fixed_size and net.size != net.config_size():
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


def _tables(student: Student, adapter: Adapter | None) -> dict[int, Table]:
    """The plans as tables, without the input that the pipeline's guidance scale drives."""
    weight = driven(student, adapter)
    return {steps: plan_table(student.flow_map, plan).without(weight) for steps, plan in student.plans.items()}


def _exportable(model: nn.Module) -> Any:
    """The model's network; ValueError when neither diffusers nor our own source can rebuild it."""
    net = network_of(model).net
    adapter = as_adapter(net)
    if factors_in(net):
        apart = "" if adapter is None else ", or write them with lora.save"
        raise ValueError(f"the network holds LoRA layers: export lora.merged(model){apart}")
    if adapter is not None:
        if adapter.further is not None or adapter.second is not None:
            inputs = [] if adapter.further is None else [f"the further inputs {', '.join(adapter.further.spans)}"]
            second = [] if adapter.second is None else ["a second sample"]
            raise ValueError(
                f"the network takes {' and '.join([*inputs, *second])}, which no {type(adapter.model).__name__} of "
                "diffusers has: keep it in a folder of fewstep's own"
            )
        if adapter.latent and adapter.origin is None:
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
    grid = GRIDS[schedule.few_steps]
    plans = {n: Plan(tuple(grid(schedule, n)[:-1].tolist()), gamma=0.0) for n in DENOISER_STEPS}
    return Student(Jump(denoiser), plans)


def _start(tables: dict[int, Table]) -> float:
    return next(iter(tables.values())).start


def _plain_scheduler(
    net: Adapter, denoiser: NetworkDenoiser, plans: dict[int, Plan], tables: dict[int, Table]
) -> tuple[Any, dict[int, Arguments]] | None:
    """A diffusers scheduler with the coefficients of every table, and the arguments of each call; None when there is
    none, or when the pipeline starts too far from where the student starts."""
    pipeline = net.pipeline_class().__name__
    if pipeline not in HOSTS:
        return None
    if not net.plain:
        return None
    if net.fixed_size and net.size != net.config_size():
        return None
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
    # the grids of these two are subsets of original_inference_steps equal steps: the usual 50, one each, the plan's,
    # those of which the times of all plans are multiples (LCM's, of another skip)
    table_length = len(schedule.alphas_cumprod)
    stride = math.gcd(*(round(t) + 1 for plan in plans.values() for t in plan.times))
    for original in dict.fromkeys((50, table_length, max(plans), table_length // stride)):
        if original <= table_length:
            yield diffusers.LCMScheduler(**betas, original_inference_steps=original), counted
            if host.eta:
                noisy = {n: {**counted[n], "eta": eta_of(plan)} for n, plan in plans.items()}
                yield diffusers.TCDScheduler(**betas, original_inference_steps=original), noisy
    if host.eta and all(t == round(t) for plan in plans.values() for t in plan.times):
        listed = {
            n: {"timesteps": [round(t) for t in plan.times], "eta": eta_of(plan)} for n, plan in plans.items()
        }  # fmt: skip
        yield diffusers.TCDScheduler(**betas, original_inference_steps=table_length), listed


def eta_of(plan: Plan) -> float:
    """The ``eta`` of TCD's scheduler whose undercut times ``floor((1 - eta) s)`` are the plan's, to as few digits as
    say it; the plan's ``gamma`` where it names none."""
    lifted = plan.times[1:]
    if not plan.inner or not lifted:
        return plan.gamma if plan.inner is None else 0.0
    exact = 1 - (plan.inner[0] + 0.5) / lifted[0]
    for digits in (1, 2, 3):
        eta = abs(round(exact, digits))
        if all(math.floor((1 - eta) * s) == r for s, r in zip(lifted, plan.inner, strict=True)):
            return eta
    return min(max(exact, 0.0), 1.0)


def _beta_config(schedule: DiscreteVP, prediction: Prediction, config: Any) -> Arguments:
    """The beta arguments of a scheduler with the schedule's table: those of the scheduler that the model came with,
    or else the table's own betas."""
    kind = {"num_train_timesteps": len(schedule.alphas_cumprod), "prediction_type": PREDICTION_TYPES[type(prediction)]}
    if "beta_start" in config:
        names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        return {**kind, **{name: config[name] for name in names if name in config}}
    kept = torch.tensor((1.0, *schedule.alphas_cumprod), dtype=torch.float64)
    return {**kind, "trained_betas": (1 - kept[1:] / kept[:-1]).tolist()}


def _arguments(net: Adapter, pipeline: Any) -> Arguments:
    """The arguments of a call that make the pipeline's network calls the student's: no guidance on top of it, and its
    own size where that is not the pipeline's."""
    if not net.in_own_pipeline or net.origin is None:
        return {}
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
