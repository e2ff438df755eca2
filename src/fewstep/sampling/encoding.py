"""Encoding: a student's path walked upward, from data to the noise that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import Cond, check_prediction
from fewstep.flow_maps import FlowMap
from fewstep.sampling.rollout import Plan
from fewstep.schedules import align


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
    for i, s in enumerate(plan.times[1:]):
        if (r := plan.inner_at(schedule, i)) != s:
            raise ValueError(f"the plan jumps to {r:g} and re-noises to {s:g}: only a plan with gamma=0 can be encoded")
    inputs = {
        **flow_map.inputs(x, {**plan.extras, **extras}),
        **(flow_map.begin(x, schedule.t_min, cond) if begun is None else begun),
    }
    for t, s in pairwise((schedule.t_min, *reversed(plan.times))):
        moved = flow_map.jump_up(x, t, s, cond, **inputs)
        check_prediction(moved, x, "student")
        x = moved
    return x / align(schedule.sigma(torch.tensor(plan.times[0], dtype=torch.float64, device=x.device)), x)
