"""Several networks as one model: every sample is asked of the expert that it belongs to.

A :class:`Router` says which expert that is, by the class label (:class:`ByClass`: students that own a part of the
labels each), by the time (:class:`ByTime`: experts of one phase of the sampling) or by the nearest of some embeddings
(:class:`ByEmbedding`: parts of the space of prompts).  :class:`RoutedDenoiser` and :class:`RoutedFlowMap` are a
denoiser and a flow map made of experts, which may differ in architecture; solvers, rollouts and files take them as any
other.

Rows are grouped by expert: no expert sees rows that are not its own, and a call whose rows all go to one expert *is* a
call of that expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond, leaves, rows
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.schedules import Schedule, as_time


class Router(nn.Module, ABC):
    """Which of ``parts`` experts a sample belongs to."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    @abstractmethod
    def route(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The expert of every sample, int64 ``[B]`` in ``0 .. parts - 1``, for states ``x`` ``[B, ...]`` at times ``t``
        ``[B]``; ValueError for samples that belong to none."""

    def check(self, schedule: Schedule, classes: int | None) -> None:
        """ValueError when experts on this schedule, for so many classes, cannot be told apart."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What makes this router again but for its tensors, as plain data."""


class ByClass(Router):
    """By the class label: ``parts`` hold the labels of each expert.

    ValueError unless every label from 0 on stands in exactly one part.  A sample without a label (-1) belongs to none.
    """

    table: Tensor

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        super().__init__(len(parts))
        self.labels = tuple(tuple(part) for part in parts)
        listed = sorted(label for part in self.labels for label in part)
        if not all(self.labels) or listed != list(range(len(listed))):
            raise ValueError(f"parts={_short(self.labels)} must hold every label from 0 on once, and none be empty")
        table = torch.zeros(len(listed), dtype=torch.int64)
        for expert, part in enumerate(self.labels):
            table[list(part)] = expert
        self.register_buffer("table", table, persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        return {"parts": [list(part) for part in self.labels]}

    @classmethod
    def even(cls, classes: int, parts: int, order: Tensor | None = None) -> ByClass:
        """Consecutive labels in ``parts`` groups, whose sizes differ by one at most; of the permutation ``order``
        ``[classes]`` instead where one is given (a random partition).  ValueError for more parts than classes."""
        if not 1 <= parts <= classes:
            raise ValueError(f"parts={parts} must lie in 1 .. {classes}, the number of classes")
        labels = torch.arange(classes) if order is None else order
        return cls([part.tolist() for part in labels.tensor_split(parts)])

    def check(self, schedule: Schedule, classes: int | None) -> None:
        if classes != len(self.table):
            raise ValueError(f"the router divides {len(self.table)} classes, the experts know {classes or 'none'}")

    def route(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if not isinstance(cond, Tensor) or cond.is_floating_point() or cond.ndim != 1:
            raise ValueError(
                f"samples are routed by their labels [{len(x)}], and came without (guidance cannot leave them out)"
            )
        low, high = int(cond.min()), int(cond.max())
        if low < 0 or high >= len(self.table):
            raise ValueError(
                f"label {low if low < 0 else high} belongs to no expert: labels are 0 .. {len(self.table) - 1}, and no "
                "expert is for samples without one"
            )
        return self.table[cond.long()]


class ByTime(Router):
    """By the time: ``bounds``, falling, cut the schedule's time into one phase more than there are bounds.

    Expert 0 has the noisiest times, those above the first bound; a bound itself belongs to the phase below it, which
    starts there.  ValueError for bounds that do not fall or lie outside of the schedule.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__(len(bounds) + 1)
        self.bounds = tuple(float(bound) for bound in bounds)
        if not all(high > low for high, low in pairwise(self.bounds)):
            raise ValueError(f"bounds={list(self.bounds)} must fall, from noise to data")

    @property
    def config(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds)}

    def check(self, schedule: Schedule, classes: int | None) -> None:
        for bound in self.bounds:
            if not schedule.t_min <= bound < schedule.t_max:
                raise ValueError(
                    f"bound {bound:g} leaves an expert without times: they are {schedule.t_min:g} .. {schedule.t_max:g}"
                )

    def route(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if t.ndim != 1:
            raise ValueError(f"times of shape {list(t.shape)}: samples are routed by one time each, [{len(x)}]")
        chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for bound in self.bounds:
            chosen += t <= bound
        return chosen


class ByEmbedding(Router):
    """By the nearest of ``centers`` ``[K, ...]`` to the condition's leaf ``leaf`` (:func:`~fewstep.conditions.leaves`;
    "cond" is a condition without names).

    A leaf with more dimensions is averaged over those in front, so that centers ``[K, D]`` divide prompts ``[B, L, D]``
    by the mean over their tokens.  Centers are kept in float32; of two that are equally near, the first is taken.
    """

    centers: Tensor

    def __init__(self, centers: Tensor, leaf: str = "cond") -> None:
        if centers.ndim < 2 or not len(centers) or not bool(centers.isfinite().all()):
            raise ValueError(f"centers of shape {list(centers.shape)} must be one finite embedding an expert, [K, ...]")
        super().__init__(len(centers))
        self.leaf = leaf
        self.register_buffer("centers", centers.float())

    @property
    def config(self) -> dict[str, Any]:
        return {"shape": list(self.centers.shape), "leaf": self.leaf}

    def route(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found = leaves(cond).get(self.leaf)
        one = self.centers.shape[1:]
        if found is None or found.shape[max(1, found.ndim - len(one)) :] != one:
            has = "nothing" if cond is None else {name: list(leaf.shape) for name, leaf in leaves(cond).items()}
            wanted = ", ".join(map(str, (len(x), "...", *one)))
            raise ValueError(f"samples are routed by '{self.leaf}' [{wanted}], and have {has}")
        between = range(1, found.ndim - len(one))
        point = found.double().mean(tuple(between)) if between else found.double()
        return torch.stack([(point - center).square().flatten(1).sum(1) for center in self.centers.double()]).argmin(0)


def ask_experts(
    router: Router,
    experts: Sequence[Any],
    ask: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    times: tuple[Tensor, ...],
    cond: Cond,
    extras: Mapping[str, Tensor],
) -> tuple[Tensor, ...]:
    """``ask(expert, x, *times, cond, **extras)`` of every expert with the rows that are its own, put back in order.

    All tensors lead with the rows, and so do the answers; samples are routed by the first of the ``times``.
    """
    chosen = router.route(x, times[0], cond)
    present = chosen.unique().tolist()
    if len(present) < 2:
        return ask(experts[present[0] if present else 0], x, *times, cond, **extras)
    own = [(chosen == expert).nonzero()[:, 0] for expert in present]
    answers = [
        ask(experts[expert], x[index], *(time[index] for time in times), rows(cond, index), **_rows(extras, index))
        for expert, index in zip(present, own, strict=True)
    ]
    back = torch.cat(own).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(*answers, strict=True))


def _rows(extras: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: value[index] for name, value in extras.items()}


class RoutedDenoiser(Denoiser):
    """A denoiser made of experts: a mixture over the noise levels that any solver samples, or one over the conditions.

    ``experts`` are denoisers on one schedule with one shape and one kind of conditions, as many as ``router`` has
    parts; ValueError naming both sides otherwise.
    """

    experts: Any  # a list of Denoiser

    def __init__(self, experts: Sequence[Denoiser], router: Router) -> None:
        check_experts(experts, router)
        super().__init__(experts[0].schedule, experts[0].shape, experts[0].classes)
        self.experts = nn.ModuleList(experts)
        self.router = router

    @property
    def null(self) -> Cond:
        null: Cond = self.experts[0].null
        return null

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self._asked(lambda expert, *given, **more: (expert(*given, **more),), x, t, cond, extras)[0]

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, f = self._asked(lambda expert, *given, **more: expert.affine(*given, **more), x, t, cond, extras)
        return a, b, f

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self._asked(lambda expert, *given: (expert.features(*given),), x, t, cond, {})[0]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """That of every expert; TypeError where they differ."""
        shapes = {tuple(expert.feature_shape) for expert in self.experts}
        if len(shapes) > 1:
            raise TypeError(f"the experts have features of different shapes, {sorted(shapes)}")
        return shapes.pop()

    def _asked(
        self, ask: Callable[..., Any], x: Tensor, t: Tensor | float, cond: Cond, extras: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        return ask_experts(self.router, self.experts, ask, x, (as_time(t, x),), cond, extras)


class RoutedFlowMap(FlowMap):
    """A flow map made of experts: students that share the work among them, or a base model before a student.

    ``experts`` are flow maps (of denoisers, take :class:`~fewstep.flow_maps.Jump`) on one schedule with one shape, one
    kind of conditions and the same further inputs, as many as ``router`` has parts; ValueError naming both sides
    otherwise.  A jump from ``t`` is routed by ``t``.
    """

    experts: Any  # a list of FlowMap

    def __init__(self, experts: Sequence[FlowMap], router: Router) -> None:
        check_experts(experts, router)
        first = experts[0]
        for k, expert in enumerate(experts):
            if expert.extras != first.extras:
                raise ValueError(
                    f"expert {k} takes the inputs {expert.extras}, expert 0 {first.extras}: they share them"
                )
        super().__init__(first.schedule, first.shape, first.classes, first.extras)
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.two_times = all(expert.two_times for expert in experts)
        self.only_to_data = any(expert.only_to_data for expert in experts)
        self.calls_to_begin = max(expert.calls_to_begin for expert in experts)

    @property
    def null(self) -> Cond:
        null: Cond = self.experts[0].null
        return null

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        times = as_time(t, x), as_time(s, x)
        return ask_experts(self.router, self.experts, _jumped, x, times, cond, extras)[0]

    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return ask_experts(self.router, self.experts, _to_data, x, (as_time(t, x),), cond, extras)[0]

    def jump_up(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """Routed by the noisier time ``s``, from which the same path is jumped down."""
        times = as_time(s, x), as_time(t, x)
        return ask_experts(self.router, self.experts, _jumped_up, x, times, cond, extras)[0]

    def begin(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Mapping[str, Tensor]:
        """What the expert of every sample begins with; they must begin with the same names."""
        names: list[str] = []

        def begun(expert: Any, *given: Any) -> tuple[Tensor, ...]:
            told = expert.begin(*given)
            names[:] = sorted(told)
            return tuple(told[name] for name in names)

        return dict(
            zip(names, ask_experts(self.router, self.experts, begun, x, (as_time(t, x),), cond, {}), strict=True)
        )

    def teacher(self) -> Denoiser:
        return RoutedDenoiser([expert.teacher() for expert in self.experts], self.router)

    def instant(self) -> Denoiser:
        return RoutedDenoiser([expert.instant() for expert in self.experts], self.router)


def _jumped(expert: Any, *given: Any, **extras: Tensor) -> tuple[Tensor]:
    return (expert(*given, **extras),)


def _jumped_up(expert: Any, x: Tensor, s: Tensor, t: Tensor, cond: Cond, **extras: Tensor) -> tuple[Tensor]:
    return (expert.jump_up(x, t, s, cond, **extras),)


def _to_data(expert: Any, *given: Any, **extras: Tensor) -> tuple[Tensor]:
    return (expert.to_data(*given, **extras),)


def check_experts(experts: Sequence[Any], router: Router) -> None:
    """ValueError naming both sides unless there is one expert a part, and all share schedule, shape and conditions."""
    if len(experts) != router.parts or not experts:
        raise ValueError(f"{len(experts)} experts for a router of {router.parts} parts: one each")
    first = dict(_shared(experts[0]))
    for k, expert in enumerate(experts):
        for field, value in _shared(expert):
            if value != first[field]:
                raise ValueError(f"expert {k} has {field} {value}, expert 0 has {first[field]}: experts share it")
    router.check(experts[0].schedule, experts[0].classes)


def _shared(expert: Denoiser | FlowMap) -> Iterator[tuple[str, Any]]:
    """What experts must have in common, with a name for messages."""
    yield "schedule", expert.schedule
    yield "shape", list(expert.shape)
    yield "classes", expert.classes
    yield "conditions", {name: list(leaf.shape[1:]) for name, leaf in leaves(expert.null).items()}


def _short(parts: tuple[tuple[int, ...], ...]) -> str:
    text = str([list(part) for part in parts])
    return text if len(text) <= 60 else f"{text[:57]}..."
