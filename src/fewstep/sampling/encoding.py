"""Encoding: a student's path walked upward, from data to the noise that it comes from; and style transfer by it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import Cond, check_prediction
from fewstep.flow_maps import FlowMap
from fewstep.sampling.inputs import Numbers, evaluating, given_conditions, states_for
from fewstep.sampling.rollout import Plan, Student, rollout
from fewstep.schedules import Schedule, align


def encode(
    flow_map: FlowMap,
    x: Tensor,
    plan: Plan,
    cond: Cond = None,
    *,
    begun: Mapping[str, Tensor] | None = None,
    **extras: Any,
) -> Tensor:
    """The standard normal noise from which a rollout along ``plan`` makes the data ``x`` ``[B, ...]``; one call a time
    of the plan, from the cleanest up.

    ``flow_map`` must know jumps to noisier times: exact flow maps do, and students trained on them; any
    :class:`~fewstep.flow_maps.Jump` of a denoiser makes the DDIM inversion, with the error of its steps.  What a map
    begins with (:meth:`FlowMap.begin <fewstep.flow_maps.FlowMap.begin>`) is found from ``x``, unless ``begun`` says it.
    ``extras`` set further inputs.  Rolled out under another condition, the noise of one picture gives its like there.

    ValueError for a plan that re-noises, which would not come back to ``x``, and for a map that jumps to data only.
    """
    schedule = flow_map.schedule
    if (found := lifted(plan, schedule)) is not None:
        raise ValueError(
            f"the plan jumps to {found[0]:g} and re-noises to {found[1]:g}: only a plan with gamma=0 can be encoded"
        )
    inputs = {
        **flow_map.inputs(x, {**plan.extras, **extras}),
        **(flow_map.begin(x, schedule.t_min, cond) if begun is None else begun),
    }
    for t, s in pairwise((schedule.t_min, *reversed(plan.times))):
        moved = flow_map.jump_up(x, t, s, cond, **inputs)
        check_prediction(moved, x, "student")
        x = moved
    return x / align(schedule.sigma(torch.tensor(plan.times[0], dtype=torch.float64, device=x.device)), x)


def lifted(plan: Plan, schedule: Schedule) -> tuple[float, float] | None:
    """The first two times of a plan between which noise lifts a state; None for a deterministic plan."""
    pairs = ((plan.inner_at(schedule, i), s) for i, s in enumerate(plan.times[1:]))
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


@torch.no_grad()
def style_transfer(
    encoder: Student,
    decoder: Student,
    x: Numbers,
    source: Cond = None,
    target: Cond = None,
    *,
    encoding: Mapping[str, float | Numbers] | None = None,
    **extras: float | Numbers,
) -> Tensor:
    """The like of ``x`` ``[B, ...]`` under another condition: its noise under ``source``, rolled out under ``target``
    (Meng et al. 2022, section 4.3).

    Each student walks its shortest plan; ``decoder`` must have one without noise.  ``extras`` are inputs of the
    decoder, such as ``w=3.0``; the encoder is told ``encoding``, by default nothing (a guidance weight of none).  Types
    and errors are those of :func:`~fewstep.sampling.edit`.
    """
    y = states_for(encoder.flow_map, "x", x)
    plan = next((plan for plan in decoder.plans.values() if lifted(plan, decoder.flow_map.schedule) is None), None)
    if plan is None:
        raise ValueError("style transfer needs a decoder with a deterministic plan: all plans of this one re-noise")
    with evaluating(encoder), evaluating(decoder):
        conds = [given_conditions(s.flow_map, y, c) for s, c in ((encoder, source), (decoder, target))]
        told: dict[str, Any] = dict(encoding or {})
        noise = encode(encoder.flow_map, y, next(iter(encoder.plans.values())), conds[0], **told)
        return rollout(decoder.flow_map, noise.to(y), plan, conds[1], extras=extras)
