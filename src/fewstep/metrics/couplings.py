"""How well few-step models keep the pairs of noise and data that they were trained on, and how straight paths are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.flow_maps import FlowMap
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Call, Plan, rollout


class Preservation(NamedTuple):
    """Means over pairs: the peak signal-to-noise ratio in dB, and a distance where one was given."""

    psnr: float
    distance: float | None


def psnr(a: Tensor, b: Tensor, span: float = 2.0) -> Tensor:
    """``10 log10(span^2 / mean (a - b)^2)`` ``[B]`` in dB, float64; samples span ``span``, by default [-1, 1]."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(span**2 / error)


def coupling_preservation(
    made: Tensor, x: Tensor, distance: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Preservation:
    """How near what a student makes of the noises of pairs comes to the data ``x`` of the same pairs, both clamped to
    [-1, 1] (Park et al. 2024, CAF).  ``distance`` (LPIPS) gives ``[B]`` for two ``[B, ...]``."""
    ours, theirs = made.clamp(-1, 1), x.clamp(-1, 1)
    apart = None if distance is None else float(distance(ours, theirs).mean())
    return Preservation(float(psnr(ours, theirs).mean()), apart)


def straightness(displacement: Tensor, velocity: Tensor) -> Tensor:
    """``|| d / ||d|| - v / ||v|| ||^2`` ``[B]``: 0 where a path moves straight to its end, 2 where it moves across."""
    ways = [torch.nn.functional.normalize(a.double().flatten(1), dim=1) for a in (displacement, velocity)]
    return (ways[0] - ways[1]).square().sum(1)


@torch.no_grad()
def path_straightness(flow_map: FlowMap, noise: Tensor, plan: Plan, cond: Cond = None) -> float:
    """The mean :func:`straightness` of rollouts from ``noise``, of the velocity at every call against the whole way;
    ``flow_map`` needs a velocity form."""
    calls: list[Call] = []
    with evaluating(flow_map):
        end = rollout(flow_map, noise, plan, cond, calls=calls)
        inputs = flow_map.inputs(noise, plan.extras)
        found = [
            straightness(calls[0].x - end, flow_map.mean_velocity(c.x, c.t, c.t, cond, **inputs, **c.begun))
            for c in calls
        ]
    return float(torch.stack(found).mean())
