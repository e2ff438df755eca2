"""Sampling over growing resolutions: every stage is conditioned on what the stage below made.

A :class:`Cascade` is a list of denoisers, one a resolution, lowest first; they may be views of one network
(:meth:`Cascade.shared`) or networks of their own.  Stage k samples ``x_k ~ p(x_k | y)`` with ``y`` the enlarged sample
of stage k - 1, in steps and with a solver of its own, from noise or from ``y`` itself with a little noise on it.

Most steps are taken where they are cheap, so the cost is counted in *effective* network calls, those of the highest
stage with the same number of operations: ``sum_k n_k FLOPs_k / FLOPs_K``.

After LowDiff (arXiv 2509.15342), of which abstract and reviews are known here, not the text: the order of the stages
and the count are the paper's, the noise on the condition, the noise range of a stage and the partial start are a
reconstruction.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoisers import Cond, Denoiser, NetworkDenoiser, View
from fewstep.grids import Grid
from fewstep.guidance import Autoguided, Guided
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.named import named_solver, named_times
from fewstep.sampling.sample import sample
from fewstep.schedules import Schedule


def downsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures or latents ``[B, C, H, W]`` averaged over areas, to ``size`` ``[h, w]``.

    White noise becomes smaller by the root of the area, so this is for clean samples: a noisy one averaged is not the
    low-resolution sample at the same noise level.  ValueError unless h divides H and w divides W.
    """
    (height, width), (h, w) = x.shape[-2:], size
    if height % h or width % w:
        raise ValueError(f"{height}x{width} does not average to {h}x{w}: areas must be whole")
    return torch.nn.functional.avg_pool2d(x, (height // h, width // w))


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Every value of ``[B, C, h, w]`` repeated to ``size`` ``[H, W]``, so that :func:`downsample` gives it back."""
    (h, w), (height, width) = x.shape[-2:], size
    if height % h or width % w:
        raise ValueError(f"{h}x{w} does not enlarge to {height}x{width}: areas must be whole")
    return x.repeat_interleave(height // h, -2).repeat_interleave(width // w, -1)


def stage_schedule(schedule: Schedule, ratio: float) -> Schedule:
    """The same schedule up to ``ratio`` times its greatest noise level ``sigma / alpha``.

    An average over areas makes noise smaller by the ratio of the side lengths, so a stage of ``ratio`` times the height
    is as blind at that level as the full picture at the greatest one.
    """
    if ratio == 1:
        return schedule
    top = torch.tensor(schedule.t_max, dtype=torch.float64)
    return dataclasses.replace(schedule, t_max=float(schedule.time_at(schedule.log_snr(top) - math.log(ratio))))


class WithPicture(View):
    """A stage with its condition held: ``beside`` ``[B, C, H, W]`` and the noise level ``augmentation`` that lies on
    it."""

    def __init__(self, inner: Denoiser, beside: Tensor, augmentation: float) -> None:
        super().__init__(inner)
        self.beside, self.augmentation = beside, augmentation

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        noise = x.new_full((len(x),), self.augmentation)
        return self.inner(x, t, cond, beside=self.beside, augmentation=noise)


@dataclass(frozen=True)
class Cascade:
    """Denoisers of rising resolution, ``[C, h_k, w_k]`` each, every size a divisor of the next.

    All but the first also take ``beside``, the sample one resolution below enlarged to their own size, and
    ``augmentation`` ``[B]``, the noise level on it; called without the two they are unconditional.
    """

    stages: tuple[Denoiser, ...]

    def __post_init__(self) -> None:
        if not self.stages or any(len(stage.shape) != 3 for stage in self.stages):
            raise ValueError("a cascade is made of one denoiser or more on samples [C, H, W]")
        for low, high in pairwise(self.stages):
            (c, h, w), (channels, height, width) = low.shape, high.shape
            if c != channels or low.classes != high.classes or h >= height or height % h or width % w:
                raise ValueError(
                    f"a stage of {list(low.shape)} with {low.classes} classes cannot stand below one of "
                    f"{list(high.shape)} with {high.classes}: each size must divide the next"
                )

    @classmethod
    def shared(cls, model: NetworkDenoiser, resolutions: Sequence[int]) -> Cascade:
        """Views of one network that works at all ``resolutions`` (heights, lowest first), each on the model's
        schedule up to its own noise level (:func:`stage_schedule`)."""
        channels, height, width = model.shape
        return cls(
            tuple(
                NetworkDenoiser(
                    model.net, stage_schedule(model.schedule, r / height), model.prediction,
                    (channels, r, width * r // height), model.classes,
                )
                for r in resolutions
            )
        )  # fmt: skip

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """``(h_k, w_k)`` of the stages."""
        return [stage.shape[1:] for stage in self.stages]


@dataclass(frozen=True)
class StagePlan:
    """How one stage samples.

    ``steps``, ``solver`` and ``grid`` are those of :func:`~fewstep.sampling.sample`.  ``start`` is the noise level
    ``sigma / alpha`` of a partial start from the enlarged picture of the stage below (None: from pure noise).
    ``augmentation`` is the noise put on the condition, which the stage is told; a little hides the errors of the stage
    below.  ``guidance`` is classifier-free guidance by labels, ``picture_guidance`` the same by the condition; each
    doubles the calls, None is none.
    """

    steps: int = 10
    solver: str | Solver = "unipc"
    grid: str | Grid | None = None
    start: float | None = None
    augmentation: float = 0.0
    guidance: float | None = None
    picture_guidance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.augmentation < math.inf:
            raise ValueError(f"StagePlan: augmentation={self.augmentation} must be a noise level of at least 0")

    def times(self, schedule: Schedule) -> Tensor:
        """The times ``[steps + 1]`` on a stage's schedule; ValueError for a start outside of it."""
        if self.start is not None:
            first, last = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).tolist()
            if not last < self.start <= first * (1 + 1e-9):
                raise ValueError(
                    f"StagePlan: start={self.start:g} is no noise level between {last:.3g} and {first:.3g}"
                )
            time = schedule.time_at(-torch.tensor(self.start, dtype=torch.float64).log())
            schedule = dataclasses.replace(schedule, t_max=float(time))
        return named_times(schedule, named_solver(self.solver), self.steps, self.grid)

    def calls(self, schedule: Schedule) -> int:
        """Network calls of this stage, guidance included."""
        table = named_solver(self.solver).table(Levels.of(schedule, self.times(schedule)))
        return table.calls * (1 if self.guidance is None else 2) * (1 if self.picture_guidance is None else 2)


def sample_cascade(
    cascade: Cascade,
    n: int,
    plans: Sequence[StagePlan],
    *,
    cond: Cond = None,
    seed: int = 0,
    noise: Sequence[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """``n`` samples of every stage, lowest first: the last of the list is the result, the others are what it was
    conditioned on.

    ``cond``, ``seed`` and ``progress`` are those of :func:`~fewstep.sampling.sample` (progress counts within a stage)
    and ``noise`` is its noise for every stage; a cascade of one stage is that function.  ValueError when there is not
    one plan (and noise) a stage, or the first plan uses a stage below.
    """
    check_plans(cascade, plans)
    if noise is not None and len(noise) != len(plans):
        raise ValueError(f"{len(noise)} tensors of noise for a cascade of {len(plans)} stages: one a stage")
    made: list[Tensor] = []
    for k, (stage, plan) in enumerate(zip(cascade.stages, plans, strict=True)):
        own = seed if k == 0 else derive_seed(seed, "stage", k)
        times = plan.times(stage.schedule)
        denoiser, start = stage, None if noise is None else noise[k]
        if k:
            rng = Rng(own, "condition", device=made[-1].device)
            low = made[-1] + plan.augmentation * rng.normal_like(made[-1])
            denoiser = conditioned(stage, upsample(low, stage.shape[1:]), plan)
            if plan.start is not None:  # sample() multiplies this by sigma, which makes alpha y + sigma n
                start = rng.normal(n, *stage.shape, dtype=low.dtype) if start is None else start
                start = start + upsample(made[-1], stage.shape[1:]) / plan.start
        if plan.guidance is not None:
            denoiser = Guided(denoiser, plan.guidance)
        made.append(
            sample(denoiser, n, solver=plan.solver, grid=times, cond=cond, seed=own, noise=start, progress=progress)
        )
    return made


def conditioned(stage: Denoiser, beside: Tensor, plan: StagePlan) -> Denoiser:
    """The stage that sees this picture, guided by it where the plan says so."""
    held = WithPicture(stage, beside, plan.augmentation)
    return held if plan.picture_guidance is None else Autoguided(held, stage, plan.picture_guidance)


def check_plans(cascade: Cascade, plans: Sequence[StagePlan]) -> None:
    """ValueError for plans that do not fit the cascade."""
    if len(plans) != len(cascade.stages):
        raise ValueError(f"{len(plans)} plans for a cascade of {len(cascade.stages)} stages: one a stage")
    first = plans[0]
    if first.start is not None or first.picture_guidance is not None or first.augmentation:
        raise ValueError("the first stage has none below it: no start, picture_guidance or augmentation")
    if cascade.stages[0].classes is None and any(plan.guidance is not None for plan in plans):
        raise ValueError("guidance needs a conditional model: this cascade has no classes")


class StackedModel(nn.Module, ABC):
    """A cascade with the plan of each stage, as one model of the highest resolution.

    ``plans`` (default: ten steps of UniPC each) are one a stage.  ValueError when they do not fit.
    """

    def __init__(self, cascade: Cascade, plans: Sequence[StagePlan] | None) -> None:
        super().__init__()
        self.plans = tuple(plans or [StagePlan()] * len(cascade.stages))
        check_plans(cascade, self.plans)

    @property
    @abstractmethod
    def cascade(self) -> Cascade:
        """The stages, lowest resolution first."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cascade.stages[-1].shape

    @property
    def classes(self) -> int | None:
        return self.cascade.stages[-1].classes

    def planned(self, steps: int | None = None, guidance: float | None = None) -> list[StagePlan]:
        """The plans with other ``steps`` at every resolution, and with guidance by labels."""
        changed: dict[str, Any] = {} if steps is None else {"steps": steps}
        if guidance is not None:
            changed["guidance"] = guidance
        return [dataclasses.replace(plan, **changed) for plan in self.plans]

    def calls(self, steps: int | None = None, guidance: float | None = None) -> int:
        """The network calls of all resolutions together; those of low ones cost less (:func:`effective_calls`)."""
        plans = self.planned(steps, guidance)
        return sum(plan.calls(stage.schedule) for stage, plan in zip(self.cascade.stages, plans, strict=True))

    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]`` of the highest resolution, by :meth:`planned` plans; ``cond``, ``seed`` and
        ``noise`` are those of :func:`sample_cascade`."""
        return sample_cascade(
            self.cascade, n, self.planned(steps, guidance), cond=cond, seed=seed, noise=noise
        )[-1]  # fmt: skip


class CascadeModel(StackedModel):
    """One network that works at several ``resolutions`` (heights, lowest first) with the plan of each: what LowDiff
    gives back.

    ``denoiser`` is the network at the highest resolution.
    """

    def __init__(
        self, denoiser: NetworkDenoiser, resolutions: Sequence[int], plans: Sequence[StagePlan] | None = None
    ) -> None:
        super().__init__(Cascade.shared(denoiser, tuple(resolutions)), plans)
        self.denoiser = denoiser
        self.resolutions = tuple(resolutions)

    @property
    def cascade(self) -> Cascade:
        return Cascade.shared(self.denoiser, self.resolutions)


class SeparateCascade(StackedModel):
    """Networks of their own, one a resolution, lowest first, with the plan of each.

    ``stages`` are those of a :class:`Cascade`.
    """

    def __init__(self, stages: Sequence[Denoiser], plans: Sequence[StagePlan] | None = None) -> None:
        super().__init__(Cascade(tuple(stages)), plans)
        self.stages = nn.ModuleList(stages)

    @property
    def cascade(self) -> Cascade:
        return Cascade(tuple(self.stages))  # type: ignore[arg-type]


def flop_costs(cascade: Cascade) -> tuple[float, ...]:
    """The counted operations of one call of each stage over those of the last: ``FLOPs_k / FLOPs_K``."""
    flops = []
    for k, stage in enumerate(cascade.stages):
        weights = next(stage.parameters(), torch.zeros(()))
        x = weights.new_zeros(1, *stage.shape)
        denoiser = WithPicture(stage, x, 0.0) if k else stage
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), evaluating(denoiser), counter:
            denoiser(x, stage.schedule.t_max, None)
        flops.append(counter.get_total_flops())
    return tuple(count / flops[-1] for count in flops)


def area_costs(cascade: Cascade) -> tuple[float, ...]:
    """The rule for a network of convolutions that runs whole at every resolution: ``(R_k / R)^2``."""
    areas = [h * w for h, w in cascade.sizes]
    return tuple(area / areas[-1] for area in areas)


def effective_calls(cascade: Cascade, plans: Sequence[StagePlan], costs: Sequence[float]) -> float:
    """``sum_k n_k costs_k``: what sampling costs, in calls of the highest stage; ``costs`` from :func:`flop_costs` or
    :func:`area_costs`."""
    check_plans(cascade, plans)
    calls = [plan.calls(stage.schedule) for stage, plan in zip(cascade.stages, plans, strict=True)]
    return sum(n * cost for n, cost in zip(calls, costs, strict=True))
