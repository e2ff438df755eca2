"""diffusers' schedulers as referees: every sensible setting of them on a family of schedules, driven fairly.

Each gets the same model and the same starting state as fewstep, and the model is evaluated at the scheduler's own noise
levels (not at the integer timesteps that they are rounded to).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser

Make = Callable[[], Any]

BETAS: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"},
    "sd": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
#: How the noise levels are spaced; "" is the scheduler's own way.
SPACINGS: dict[str, dict[str, Any]] = {
    "": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
LU = {"lu": {"use_lu_lambdas": True}}
TWO_CALLS = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, FlowMatchHeunDiscreteScheduler)
#: Classes whose state is ``x_0 + sigma eps``.
VARIANCE_EXPLODING = (
    EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, LMSDiscreteScheduler, EDMEulerScheduler,
    EDMDPMSolverMultistepScheduler,
)  # fmt: skip


def peers(family: str) -> dict[str, Make]:
    """Name -> scheduler for a family of ``population.FAMILIES``: 86 on tables of betas, 50 on flow matching, 21 on EDM
    (and TrigFlow, which is EDM rescaled)."""
    if family == "flow":
        return _flow()
    if family in ("edm", "trig"):
        return _edm()
    betas = BETAS[family]
    found: dict[str, Make] = {}

    def add(name: str, cls: Any, **options: Any) -> None:
        found[name] = lambda: cls(**betas, **options)

    for (spacing, options), (order, kind), last in product(
        (SPACINGS | LU).items(), ((2, "midpoint"), (2, "heun"), (3, "midpoint")), (False, True)
    ):
        name = f"DPM++ {order}M {kind} {spacing}{', euler at final' if last else ''}"
        add(name, DPMSolverMultistepScheduler, solver_order=order, solver_type=kind, euler_at_final=last, **options)
    for spacing, options in SPACINGS.items():
        for order, final in product((2, 3), ("zero", "sigma_min")):
            if final == "zero":
                add(f"DPM++ {order}S {spacing}", DPMSolverSinglestepScheduler, solver_order=order, **options)
            else:
                add(f"DPM {order}M {spacing}", DPMSolverMultistepScheduler, solver_order=order, final_sigmas_type=final,
                    algorithm_type="dpmsolver", **options)  # fmt: skip
        for order, kind in product((2, 3), ("bh1", "bh2")):
            add(f"UniPC-{order} {kind} {spacing}", UniPCMultistepScheduler, solver_order=order, solver_type=kind,
                **options)  # fmt: skip
        for order in (2, 3):
            add(f"DEIS-{order} {spacing}", DEISMultistepScheduler, solver_order=order, **options)
        add(f"Euler {spacing}", EulerDiscreteScheduler, **options)
        add(f"Heun {spacing}", HeunDiscreteScheduler, **options)
        add(f"KDPM2 {spacing}", KDPM2DiscreteScheduler, **options)
        add(f"LMS {spacing}", LMSDiscreteScheduler, **options)
    for spacing in ("linspace", "trailing"):
        add(f"DDIM {spacing}", DDIMScheduler, clip_sample=False, timestep_spacing=spacing)
    return found


def _flow() -> dict[str, Make]:
    found: dict[str, Make] = {}
    for shift in (1.0, 3.0):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}

        def add(name: str, cls: Any, shift: float = shift, **options: Any) -> None:
            found[f"{name}, shift {shift:g}"] = lambda: cls(**options)

        for (order, kind), last in product(((2, "midpoint"), (2, "heun"), (3, "midpoint")), (False, True)):
            name = f"DPM++ {order}M {kind}{', euler at final' if last else ''}"
            add(name, DPMSolverMultistepScheduler, solver_order=order, solver_type=kind, euler_at_final=last, **flow)
        for order in (2, 3):
            add(f"DPM++ {order}S", DPMSolverSinglestepScheduler, solver_order=order, **flow)
            add(f"DEIS-{order}", DEISMultistepScheduler, solver_order=order, **flow)
            for kind in ("bh1", "bh2"):
                add(f"UniPC-{order} {kind}", UniPCMultistepScheduler, solver_order=order, solver_type=kind, **flow)
        for spacing, options in SPACINGS.items():
            add(f"flow Euler {spacing}", FlowMatchEulerDiscreteScheduler, shift=shift, **options)
        add("flow Heun", FlowMatchHeunDiscreteScheduler, shift=shift)
    return found


def _edm() -> dict[str, Make]:
    found: dict[str, Make] = {}

    def add(name: str, cls: Any, **options: Any) -> None:
        found[name] = lambda: cls(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **options)

    for spacing in ("karras", "exponential"):
        for (order, kind), last, final in product(
            ((2, "midpoint"), (2, "heun"), (3, "midpoint")), (False, True), ("zero", "sigma_min")
        ):
            if final == "sigma_min" and (last or kind == "heun"):
                continue  # repeats a level
            name = f"EDM DPM++ {order}M {kind} {spacing}{', euler at final' if last else ''} to {final}"
            add(name, EDMDPMSolverMultistepScheduler, solver_order=order, solver_type=kind, euler_at_final=last,
                final_sigmas_type=final, sigma_schedule=spacing)  # fmt: skip
        add(f"EDM Euler {spacing}", EDMEulerScheduler, sigma_schedule=spacing)
    return found


@torch.no_grad()
def sample_with(make: Make, calls: int, model: Denoiser, noise: Tensor, cond: Cond = None) -> Tensor | None:
    """Where a scheduler takes ``noise`` in at most ``calls`` calls; None where it has no such number of steps or
    fails."""
    scheduler = make()
    schedule = model.schedule
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler.set_timesteps((calls + 1) // 2 if isinstance(scheduler, TWO_CALLS) else calls)
            return _run(scheduler, schedule, model, noise, cond) if len(scheduler.timesteps) <= calls else None
        except (ValueError, IndexError, AssertionError):
            return None


def _run(scheduler: Any, schedule: Any, model: Denoiser, noise: Tensor, cond: Cond) -> Tensor:
    flow = type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))
    exploding, edm = isinstance(scheduler, VARIANCE_EXPLODING), type(scheduler).__name__.startswith("EDM")
    x = noise * float(scheduler.sigmas[0]) if exploding else schedule.prior(noise)
    for k, step in enumerate(scheduler.timesteps):
        if not isinstance(scheduler, DDIMScheduler):
            scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else None
        if isinstance(scheduler, DDIMScheduler):
            time, to_ours, sigma = step.double(), 1.0, 0.0
        elif flow:
            sigma = float(scheduler.sigmas[k])
            time, to_ours = torch.tensor(sigma, dtype=torch.float64), 1.0
        else:
            sigma = float(scheduler.sigmas[k])
            time = schedule.time_at(-torch.tensor(sigma, dtype=torch.float64).log())
            to_ours = float(schedule.alpha(time)) if exploding else 1.0
        x0 = model(x * to_ours, float(time), cond)
        if edm:
            power = sigma**2 + 0.25
            out = (x0 - 0.25 / power * x) / (sigma * 0.5 / power**0.5)
        elif flow:
            out = (x - x0) / sigma
        else:
            out = (x * to_ours - float(schedule.alpha(time)) * x0) / float(schedule.sigma(time))
        x = scheduler.step(out, step, x).prev_sample
    return x


def best_of(
    family: str, calls: int, model: Denoiser, noise: Tensor, cond: Cond, error: Callable[[Tensor], float]
) -> tuple[float, str]:
    """The least error among all settings, and whose it is."""
    found = {name: sample_with(make, calls, model, noise, cond) for name, make in peers(family).items()}
    errors = {name: error(got) for name, got in found.items() if got is not None}
    best = min(errors, key=lambda name: errors[name], default="")
    return errors.get(best, math.inf), best
