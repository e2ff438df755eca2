"""What exact worlds share: a data law known in closed form, seen as a denoiser on any schedule.

A world gives its posterior mean and its score as functions of ``(x, alpha, sigma)``; the denoiser, the noise, the
velocity, the flow map and its tangent follow for every schedule.  Nothing divides by alpha, and only a score that is
itself infinite divides by sigma, so pure noise and clean data are ordinary times.  Results come in the type of the
state; use float64 where exactness is the point.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Rng
from fewstep.schedules import Schedule, align, as_time


class ExactDenoiser(Denoiser, ABC):
    """A denoiser in closed form, with its flow map.

    Times are a number or one per sample ``[B]``: ValueError for a time per frame.  ``cond`` is class labels ``[B]``;
    None, and -1 inside the labels, is the unconditional law.
    """

    @abstractmethod
    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Posterior mean and score of ``alpha x_0 + sigma eps`` at flat states ``[B, d]``; coefficients ``[B, 1]``."""

    def columns(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """The state flattened to ``[B, d]`` with its ``alpha`` and ``sigma`` as ``[B, 1]``, in the type of ``x``."""
        time = as_time(t, x)
        if time.ndim != 1 or time.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"times of shape {list(time.shape)}: an exact world takes one time, or one per sample [{x.shape[0]}]"
            )
        return x.flatten(1), self.schedule.alpha(time).to(x)[:, None], self.schedule.sigma(time).to(x)[:, None]

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.moments(*self.columns(x, t), cond)[0].reshape(x.shape)

    def score(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.moments(*self.columns(x, t), cond)[1].reshape(x.shape)

    def eps(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        flat, alpha, sigma = self.columns(x, t)
        return (-sigma * self.moments(flat, alpha, sigma, cond)[1]).reshape(x.shape)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        flat, alpha, sigma = self.columns(x, t)
        x0, score = self.moments(flat, alpha, sigma, cond)
        return self.schedule.velocity(x0, -sigma * score, as_time(t, x)).reshape(x.shape)

    @abstractmethod
    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        """The exact flow map: ``x`` at time ``t`` carried along the probability flow to time ``s``."""

    def tangent(
        self, x: Tensor, t: Tensor | float, s: Tensor | float, dx: Tensor, dt: float = 1.0, cond: Cond = None
    ) -> Tensor:
        """How ``flow(x, t, s)`` moves when ``x`` moves by ``dx`` and ``t`` by ``dt``.

        Zero for ``dx = dt * velocity(x, t)``; with the velocity of one noise-data pair it is the tangent that
        consistency training sees.
        """
        time = as_time(t, x).clone()  # forward mode refuses the expanded view of a single number
        step = torch.full_like(time, dt)
        return torch.func.jvp(lambda y, r: self.flow(y, r, s, cond), (x, time), (dx, step))[1]

    def on(self, schedule: Schedule) -> Denoiser:
        """The same law on another schedule, exact over the whole of its range."""
        if schedule == self.schedule:
            return self
        world = copy.deepcopy(self)
        world.schedule = schedule
        return world


class World(ExactDenoiser):
    """A data law that can also be drawn from."""

    @abstractmethod
    def log_density(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The log-density ``[B]`` of the noised law at time ``t``."""

    @abstractmethod
    def sample(self, n: int, rng: Rng, cond: Cond = None) -> Tensor:
        """``n`` exact samples of the data, of the law of their class where labels are given."""


class Labelled(World):
    """A law made of K parts, each of one class; guidance between its class-conditional laws is exact.

    ``weights`` are K positive numbers (their sum does not matter) and ``labels`` the class of each part, 0 upwards,
    or None for a law without classes.
    """

    log_weights: Tensor  # [K], or [classes + 1, K] with the unconditional law last

    def __init__(
        self, schedule: Schedule, shape: tuple[int, ...], weights: Tensor, labels: Tensor | list[int] | None
    ) -> None:
        if weights.ndim != 1 or not bool((weights > 0).all()):
            raise ValueError(f"weights must be a vector of positive numbers, got {weights.tolist()}")
        if labels is None:
            super().__init__(schedule, shape)
            table = weights.double()[None]
        else:
            group = torch.as_tensor(labels)
            classes = int(group.max()) + 1
            if group.shape != weights.shape or set(group.tolist()) != set(range(classes)):
                raise ValueError(f"labels must give each of the {len(weights)} parts a class, all of 0..max in use")
            super().__init__(schedule, shape, classes)
            member = group[None] == torch.arange(classes)[:, None]
            table = torch.cat([member, torch.ones_like(member[:1])]) * weights.double()
        self.register_buffer("log_weights", torch.log(table / table.sum(1, keepdim=True)))

    def log_prior(self, cond: Cond, x: Tensor) -> Tensor:
        """Log-weights of the parts, ``[1 or B, K]``; minus infinity outside the class."""
        table = self.log_weights.to(x)
        if cond is None:
            return table[-1:]
        if self.classes is None:
            raise ValueError("class labels were given to an unconditional world")
        if not isinstance(cond, Tensor):
            raise TypeError(f"this world takes class labels, got {sorted(cond)}")
        return table[torch.where(cond < 0, self.classes, cond)]

    def sample_labels(self, n: int, rng: Rng) -> Tensor:
        """``n`` class labels in the proportions of the law.  ValueError for a law without classes."""
        if self.classes is None:
            raise ValueError("an unconditional world has no labels to draw")
        shares = self.log_weights[-1].exp() @ (self.log_weights[:-1] > -torch.inf).to(self.log_weights).T
        return _choose(shares[None], n, rng)

    def _parts(self, n: int, rng: Rng, cond: Cond) -> Tensor:
        return _choose(self.log_prior(cond, self.log_weights).exp(), n, rng)


def normalized(log_joint: Tensor) -> Tensor:
    """Probabilities ``[B, K]`` from log joint densities.  Not torch.softmax: its forward-mode rule is a hundred times
    slower than its value."""
    return torch.exp(log_joint - torch.logsumexp(log_joint, 1, keepdim=True))


def _choose(probabilities: Tensor, n: int, rng: Rng) -> Tensor:
    """``n`` indices, drawn from the rows of ``probabilities`` ``[1 or n, K]`` by inverse CDF."""
    cdf = probabilities.double().cumsum(1)  # in float32 a u close to 1 would round past the last index
    u = rng.uniform(n).to(cdf.device)[:, None] * cdf[:, -1:]
    return (u >= cdf).sum(1)


class ExactFlowMap(FlowMap):
    """An exact denoiser as a student: its jump is the exact flow map, from any time to any time."""

    def __init__(self, world: ExactDenoiser) -> None:
        super().__init__(world.schedule, world.shape, world.classes)
        self.world = world

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.world.flow(x, t, s, cond)

    def mean_velocity(
        self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor
    ) -> Tensor:
        """From the jump itself, so with few digits where the times nearly meet; the velocity where all of them do."""
        time, target = as_time(t, x), as_time(s, x)
        keep, go = self.schedule.coefficients_of_move(time, target)
        if bool((go == 0).all()):
            return self.world.velocity(x, time, cond)
        return (self.world.flow(x, time, target, cond) - align(keep, x) * x) / align(go, x)
