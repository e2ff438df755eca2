"""Samplers as tables of numbers, so that a student's plan and a diffusers scheduler can be compared exactly.

A few-step sampler is linear in the network's outputs and in the noise it adds.  Written in the units of the network's
input ``y``, one call is::

    y'  =  state y  +  network F(y, times)  +  noise n

and the last row gives the data.  The numbers are *measured*, on random vectors in place of the network: for students
by running the library's own rollout, for schedulers by running their ``step``.  So they are what is executed, whatever
schedule, prediction and flow map are inside, and anything that is not linear is found out by the residual.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import NetworkDenoiser, networks_in
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Rng
from fewstep.routing import Router
from fewstep.sampling.rollout import Plan, rollout

#: Length of the random vectors: three unknowns are fitted to this many equations.
PROBE = 64


@dataclass(frozen=True)
class Call:
    """One network call and what follows it: ``times`` is ``(t,)`` or ``(t, s)``, as the network sees them, ``inputs``
    are the further ones that it is told, by name."""

    times: tuple[float, ...]
    state: float
    network: float
    noise: float
    inputs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A sampler: the first network input is ``start`` times standard normal noise, then one row a call."""

    start: float
    calls: tuple[Call, ...]

    def agrees(self, other: Table, tolerance: float = 1e-6) -> bool:
        """Whether both make the same calls with the same numbers, the start apart.

        Times may differ by a float32 rounding of numbers up to 1000; coefficients by ``tolerance``, relative to the
        largest of their row (the coefficients of a noise prediction are large and cancel).
        """
        if len(self.calls) != len(other.calls):
            return False
        for mine, theirs in zip(self.calls, other.calls, strict=True):
            size = max(1.0, abs(mine.state), abs(mine.network))
            gaps = (mine.state - theirs.state, mine.network - theirs.network, mine.noise - theirs.noise)
            if len(mine.times) != len(theirs.times) or max(map(abs, gaps)) > tolerance * size:
                return False
            if mine.inputs != theirs.inputs:
                return False
            if any(abs(t - s) > 1e-4 for t, s in zip(mine.times, theirs.times, strict=True)):
                return False
        return True

    def without(self, name: str | None) -> Table:
        """The same without one of the further inputs, which something else tells the network."""
        inputs = ({k: v for k, v in call.inputs.items() if k != name} for call in self.calls)
        return replace(self, calls=tuple(replace(c, inputs=i) for c, i in zip(self.calls, inputs, strict=True)))


class Recorder(nn.Module):
    """Stands in for a network: notes what it is given and returns random vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = Rng("recorder")
        self.inputs: list[Tensor] = []
        self.times: list[tuple[float, ...]] = []
        self.extras: list[dict[str, float]] = []
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, **extras: Tensor) -> Tensor:
        told = {name: float(value) for name, value in extras.items()}
        self.inputs.append(x)
        self.times.append((float(t), *([told.pop("s")] if "s" in told else [])))
        self.extras.append(told)
        # three times the unit, so that a clip to [-1, 1] somewhere in the sampler cannot hide
        self.outputs.append(3 * self.rng.normal_like(x))
        return self.outputs[-1]


class RecordedRng(Rng):
    """Keeps the noise that it hands out."""

    def __init__(self) -> None:
        super().__init__("recorded noise")
        self.drawn: list[Tensor] = []

    def normal_like(self, x: Tensor) -> Tensor:
        self.drawn.append(super().normal_like(x))
        return self.drawn[-1]


def network_of(model: nn.Module) -> NetworkDenoiser:
    """The one network denoiser inside a student or denoiser; ValueError when there are none or several, and for what
    calls its networks by turns."""
    if any(isinstance(module, Router) for module in model.modules()):
        raise ValueError("a routed model cannot be exported, diffusers' pipelines call one network: export its experts")
    found = networks_in(model)
    if len(found) != 1:
        raise ValueError(f"a model with {len(found)} networks cannot be exported: exactly one is needed")
    return found[0]


@torch.no_grad()
def plan_table(flow_map: FlowMap, plan: Plan) -> Table:
    """A student's plan as a table, in float64; ValueError when its sampler is not linear (clipping, thresholding)
    or calls the network more than once a step (guidance)."""
    recorder, rng = Recorder(), RecordedRng()
    # the flow map is copied with the recorder in the network's place: the memo makes deepcopy take it for a copy
    probe: FlowMap = copy.deepcopy(flow_map, {id(network_of(flow_map).net): recorder})
    noise = rng.normal(1, PROBE, dtype=torch.float64)
    # a condition that nobody reads, because guidance is left out where there is none
    cond = torch.zeros(1, dtype=torch.long)
    if begun := probe.begin(noise, plan.times[0], cond):
        raise ValueError(
            f"the student finds {', '.join(begun)} from its noise before the first step, which no scheduler does: it "
            "cannot be exported"
        )
    data = rollout(probe, noise, plan, cond, rng)
    if len(recorder.inputs) != len(plan.times):
        raise ValueError(
            f"the student calls its network {len(recorder.inputs)} times in {len(plan.times)} steps (guidance?): "
            "export the student without guidance and use the pipeline's"
        )
    start, _, _ = fit(recorder.inputs[0], noise, None, None)
    calls = []
    for i, after in enumerate([*recorder.inputs[1:], data]):
        drawn = rng.drawn[i] if i < len(rng.drawn) else None
        row = fit(after, recorder.inputs[i], recorder.outputs[i], drawn)
        calls.append(Call(recorder.times[i], *row, recorder.extras[i]))
    return Table(start, tuple(calls))


@torch.no_grad()
def scheduler_table(scheduler: Any, timesteps: Mapping[str, Any], step: Mapping[str, Any], seeded: bool) -> Table:
    """A diffusers scheduler as a table: ``timesteps`` are the arguments of its ``set_timesteps``, ``step`` further
    arguments of its ``step``; ``seeded`` says whether its noise comes from the pipeline's generator or from torch's
    global one (whose state is left as it was).

    For schedulers that neither scale the network's input nor remember earlier steps, so that every step can be
    measured on fresh vectors; they run in float32, as in the pipelines.
    """
    rng = Rng("scheduler")
    scheduler.set_timesteps(**timesteps)
    calls = []
    for i, t in enumerate(scheduler.timesteps):
        state, output = rng.normal(1, PROBE), rng.normal(1, PROBE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            source = {"generator": torch.Generator().manual_seed(i)} if seeded else {}
            after = scheduler.step(output, t, state, **step, **source, return_dict=False)[0]
        # what the step drew, if it drew: the one call that schedulers make of their generator
        drawn = torch.randn(state.shape, generator=torch.Generator().manual_seed(i))
        calls.append(Call((float(t),), *fit(after, state, output, drawn)))
    return Table(1.0, tuple(calls))


def fit(after: Tensor, state: Tensor, network: Tensor | None, noise: Tensor | None) -> tuple[float, float, float]:
    """The coefficients of ``after`` in ``state``, ``network`` and ``noise`` (0 for those not given).

    Raises ValueError when the residual says that it is no combination of them (by more than float32 rounding, which
    is what schedulers compute in).
    """
    given = {0: state, 1: network, 2: noise}
    columns = [column.flatten().double() for column in given.values() if column is not None]
    matrix, goal = torch.stack(columns, dim=1), after.flatten().double()
    solution = torch.linalg.lstsq(matrix, goal[:, None]).solution
    residual = (matrix @ solution)[:, 0] - goal
    if float(residual.norm()) > 1e-5 * float(goal.norm() + matrix.norm()):
        raise ValueError(
            "the sampler is not linear in its network's output (clipping or thresholding inside?): "
            "only linear samplers can be exported"
        )
    values = iter(solution[:, 0].tolist())
    a, b, d = (0.0 if column is None else next(values) for column in given.values())
    return a, b, d
