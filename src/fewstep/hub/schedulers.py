"""What a diffusers scheduler says about its model: the noise schedule, the prediction, the grid.

The betas of the discrete family are read as the table that the scheduler itself uses, float32 rounding included: at the
noisy end a noise prediction is divided by alpha = 0.006, so that a table recomputed in float64 would move pictures
by more than 1e-4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.discrete_vp import DiscreteVP
from fewstep.predictions import X0, EDMPrediction, Eps, Prediction, V, Velocity
from fewstep.schedules import EDM, LOG_SNR_BOUND, FlowMatching, Schedule

#: Schedulers on a table of betas; they differ in the solver only, not in the model they belong to.
BETA_TABLE = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
)  # fmt: skip
FLOW = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
)  # fmt: skip
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
READ = (*BETA_TABLE, *FLOW, *PRECONDITIONED)

#: What some classes write in the place of the alphas_cumprod = 0 of zero terminal SNR.
PLACEHOLDER = 2.0**-24

_PREDICTIONS: dict[str, type[Prediction]] = {"epsilon": Eps, "sample": X0, "v_prediction": V}
PREDICTION_TYPES: dict[type[Prediction], str] = {cls: name for name, cls in _PREDICTIONS.items()}


@dataclass(frozen=True)
class Reading(ABC):
    """A scheduler, read.

    ``shift`` is the shift of the time grid that the pipeline samples with (flow matching; 1 is a uniform grid, and
    resolution-dependent shifts count as 1), ``clip`` the range that it clips data predictions to (None: no clipping).
    """

    schedule: Schedule
    prediction: Prediction
    shift: float = 1.0
    clip: float | None = None

    #: Whether the network is given the state in another scale.
    scales_input: ClassVar[bool] = False

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """The times that few-step sampling should visit."""

    @abstractmethod
    def times_at(self, sigmas: Tensor, shift: float = 1.0) -> Tensor:
        """The times of noise levels as diffusers counts them (float64); flow matching shifts them."""

    def sigma(self, alpha: Any, sigma: Any) -> Any:
        """A noise level as diffusers counts it."""
        return sigma / alpha

    def time(self, label: Tensor) -> Tensor:
        """The time that the network is told as ``label`` (float64)."""
        return label / self.prediction.time_scale

    def labels(self, seen: Tensor) -> Tensor:
        """What the network is told of times, in the type that pipelines hand on."""
        return seen.to(torch.float32)


class FlowReading(Reading):
    """Flow matching; the time is the noise level."""

    def grid(self, steps: int) -> Tensor:
        return grids.shifted(self.schedule, steps, self.shift)

    def times_at(self, sigmas: Tensor, shift: float = 1.0) -> Tensor:
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def sigma(self, alpha: Any, sigma: Any) -> Any:
        return sigma


class TableReading(Reading):
    """A table of betas."""

    def grid(self, steps: int) -> Tensor:
        return grids.trailing(self.schedule, steps)

    def times_at(self, sigmas: Tensor, shift: float = 1.0) -> Tensor:
        """On the steps of the table where they are meant, as the levels are in float32; else as the network sees
        them."""
        times = self.schedule.time_at(-sigmas.log())
        whole = times.round()
        return whole.where((times - whole).abs() < 1e-3, times.float().double())

    def labels(self, seen: Tensor) -> Tensor:
        return seen.to(torch.int64 if bool((seen == seen.round()).all()) else torch.float32)


class EDMReading(Reading):
    """EDM; the time is the noise level, of which the network is told a logarithm."""

    scales_input: ClassVar[bool] = True

    def grid(self, steps: int) -> Tensor:
        return grids.karras(self.schedule, steps)

    def times_at(self, sigmas: Tensor, shift: float = 1.0) -> Tensor:
        return sigmas.float().double().clamp(self.schedule.t_min, self.schedule.t_max)

    def time(self, label: Tensor) -> Tensor:
        return torch.exp(4 * super().time(label))


def read_scheduler(scheduler: Any) -> Reading:
    """The schedule and the prediction that belong to a diffusers scheduler object.

    A table rescaled to zero terminal SNR ends at alpha = 0, where nothing but a data or a v prediction makes sense;
    it is read with its last half-log-SNR at the library's bound (-20, alpha = 2e-9), also from the classes that put
    another small number in the place of the zero.  Raises ValueError for an unknown scheduler class or prediction type,
    for a noise prediction on zero terminal SNR, and for a class that has lost the rescaling its config asks for.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if "reading" in vars(scheduler):  # our own, in the place of another: hub.as_scheduler
        known: Reading = scheduler.reading
        return known
    if name in FLOW:
        if config.get("sigma_max") is not None and config.sigma_max > 1:
            raise ValueError(f"{name}: sigma_max={config.sigma_max} is not read, flow matching's noise levels end at 1")
        shift = config.shift if not config.get("use_dynamic_shifting") else 1.0
        return FlowReading(FlowMatching(), Velocity(time_scale=float(config.num_train_timesteps)), shift)
    if name in PRECONDITIONED:
        if config.prediction_type != "epsilon":
            raise ValueError(f"{name}: prediction_type '{config.prediction_type}' is not read, only 'epsilon'")
        return EDMReading(EDM(config.sigma_min, config.sigma_max), EDMPrediction(sigma_data=config.sigma_data))
    if name not in BETA_TABLE:
        raise ValueError(f"scheduler class '{name}' is unknown; fewstep reads {', '.join(READ)}")
    kind = config.prediction_type
    if kind == "flow_prediction":
        scale = float(config.num_train_timesteps)
        return FlowReading(FlowMatching(), Velocity(time_scale=scale), config.flow_shift)
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"{name}: timestep_type '{config.timestep_type}' is not read, only 'discrete'")
    if kind not in _PREDICTIONS:
        raise ValueError(f"{name}: prediction_type '{kind}' is unknown; fewstep reads {', '.join(_PREDICTIONS)}")
    if config.get("snr_shift_scale", 1.0) != 1 and not name.startswith("CogVideoX"):
        raise ValueError(
            f"{name} does not shift its table, but its config says snr_shift_scale={config.snr_shift_scale}; take "
            "CogVideoXDDIMScheduler.from_config of that config"
        )
    table: list[float] = scheduler.alphas_cumprod.double().flatten().tolist()
    if len(table) < 2:
        raise ValueError(f"{name}: a table of {len(table)} betas is no noise schedule")
    rescaled = bool(config.get("rescale_betas_zero_snr"))
    if rescaled or table[-1] < math.exp(-2 * LOG_SNR_BOUND):
        if kind == "epsilon":
            raise ValueError(f"{name}: prediction_type 'epsilon' is undefined at zero terminal SNR (alpha = 0)")
        if table[-1] > PLACEHOLDER:
            raise ValueError(
                f"{name} does not rescale its betas, but its config says rescale_betas_zero_snr=True; take "
                "DDIMScheduler.from_config of that config"
            )
        table[-1] = math.exp(-2 * LOG_SNR_BOUND)
    clip = config.clip_sample_range if config.get("clip_sample") else None
    return TableReading(DiscreteVP(alphas_cumprod=tuple(table)), _PREDICTIONS[kind](), clip=clip)
