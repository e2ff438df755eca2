"""A student's own samples, as training draws them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.flow_maps import FlowMap
from fewstep.generators import Generator
from fewstep.randomness import Rng
from fewstep.sampling.inputs import weights_of
from fewstep.sampling.rollout import Plan, rollout


def fresh_noise(flow_map: FlowMap, n: int, rng: Rng) -> Tensor:
    """Standard normal ``[n, *shape]`` for a student to start from, in the type of its weights."""
    return rng.normal(n, *flow_map.shape, dtype=weights_of(flow_map, torch.empty(0)).dtype)


class StudentGenerator(Generator):
    """A student's samples from fresh noise, by its own rollout along ``plan``.

    With ``simulate`` a sample is the output of a random call, the same for the whole batch, with a gradient through
    that call only: the calls before it are made exactly as at inference, and make what it starts from (DMD2's backward
    simulation).  Without, it is the end of the plan, with a gradient through all calls.
    """

    def __init__(self, flow_map: FlowMap, plan: Plan, simulate: bool = True) -> None:
        super().__init__()
        self.flow_map, self.plan, self.simulate = flow_map, plan, simulate
        self.shape = flow_map.shape

    def draw(self, n: int, rng: Rng, cond: Cond = None) -> tuple[Tensor, Cond]:
        """Noise has the type of the student's weights."""
        call = rng.shared_integer(0, len(self.plan.times)) if self.simulate else None
        noise = fresh_noise(self.flow_map, n, rng)
        return rollout(self.flow_map, noise, self.plan, cond, rng, stop=call, grad_at=call), cond
