"""What a student that walks its path both ways is good for: pictures made again, and holes in them filled."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Noise
from fewstep.sampling.editing import LinearMeasurement
from fewstep.sampling.encoding import encode
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, rollout


def reconstruct(flow_map: FlowMap, x: Tensor, plan: Plan, cond: Cond = None, **extras: Any) -> Tensor:
    """The data ``x`` ``[B, ...]`` encoded along ``plan`` and made again, with what the map begins with found once, at
    the data.  Errors as in :func:`~fewstep.sampling.encoding.encode`."""
    begun = flow_map.begin(x, flow_map.schedule.t_min, cond)
    noise = encode(flow_map, x, plan, cond, begun=begun, **extras)
    return rollout(flow_map, noise, plan, cond, extras=extras, begun=begun)


@torch.no_grad()
def inpaint_by_inversion(
    flow_map: FlowMap,
    x: Tensor,
    measurement: LinearMeasurement,
    plan: Plan,
    rng: Noise,
    cond: Cond = None,
    **extras: Any,
) -> Tensor:
    """``x`` ``[B, ...]`` with what ``measurement`` knows nothing of made anew, by the way up to noise and down again
    (Park et al. 2024, CAF).

    On the way up the unknown part is noise of the level that each step ends at; on the way down the known part is what
    it was there on the way up, and at the end that of ``x``.  What the map begins with is found anew at the noise.
    Errors as in :func:`~fewstep.sampling.encoding.encode`.
    """
    schedule = flow_map.schedule
    up = [schedule.t_min, *reversed(plan.times)]
    levels = schedule.sigma(torch.tensor(up, dtype=torch.float64)).tolist()
    with evaluating(flow_map):
        state = measurement.replace(rng.normal_like(x), x)
        inputs = flow_map.inputs(x, {**plan.extras, **extras})
        told = {**inputs, **flow_map.begin(state, up[0], cond)}
        passed = [x]
        for (t, s), level in zip(pairwise(up), levels[1:], strict=True):
            moved = flow_map.jump_up(state, t, s, cond, **told)
            state = measurement.replace(level * rng.normal_like(x), moved)
            passed.append(state)
        told = {**inputs, **flow_map.begin(state, up[-1], cond)}
        for (t, s), known in zip(pairwise(reversed(up)), passed[-2::-1], strict=True):
            state = measurement.replace(flow_map.jump(state, t, s, cond, **told), known)
    return state
