"""LSD and LSD+: learned coefficients and learned steps for the sampler of a discrete diffusion model.

The network stays as it is.  A student sampler of M steps follows a teacher sampler of N = M n steps of the same
network: in every interval ``k`` of the student's grid, ``Phi_k`` times the student's jumps at its own state is pulled
to the teacher's jumps at the teacher's state (Fu et al. 2025, section 4)::

    L_k = E || A_k - Phi_k B_k ||^2,    B_k = jumps(x_k, t_k -> t_{k+1}),  A_k from the teacher
    Phi_k* = <A_k, B_k> / <B_k, B_k>

For the Euler step the jumps are ``(t_k - t_{k+1})`` times the reverse rates, which are linear in the score: this is the
paper's distance of scores, weighted by a constant per step.  LSD+ also learns the steps ``kappa_k = t_k - t_{k+1}``.
Sampling is discrete, so no gradient goes through it: the states are constants.

Teacher and student share their randomness (:class:`~fewstep.discrete.coupling.Moves`), so that their states differ for
what the sampler does and not for the dice, and only positions with the same token in both are compared, on masked
chains those that both still hide: jumps from different tokens go to different places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond
from fewstep.discrete.chains import Chain, uniforms
from fewstep.discrete.coupling import Draws, Moves
from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.samplers import STEPPERS, Plan, Stepper, device_of, finished, row
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Share

TargetName = Literal["interval", "accumulated", "literal"]


class Coefficients(nn.Module):
    """``Phi_k``, one number per step, 1 at the start; float64."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.ones(steps, dtype=torch.float64))


class StepSizes(nn.Module):
    """Times whose steps are a softmax times ``t_max - t_min``: positive, and always ending at ``t_min``.  Equal steps
    at the start; float64."""

    def __init__(self, chain: Chain, steps: int) -> None:
        super().__init__()
        self.t_min, self.t_max = chain.t_min, chain.t_max
        self.logits = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    def times(self) -> Tensor:
        """``[steps + 1]``, falling from ``t_max`` to ``t_min``, differentiable."""
        sizes = self.logits.softmax(0) * (self.t_max - self.t_min)
        inner = self.t_max - sizes[:-1].cumsum(0)
        return torch.cat([inner.new_tensor([self.t_max]), inner, inner.new_tensor([self.t_min])])


@dataclass(frozen=True)
class Interval:
    """The teacher over one interval of the student's grid: its state at the start, its jumps from there over the whole
    interval, and the sum of the jumps of its own small steps."""

    x: Tensor
    once: Tensor
    summed: Tensor

    def target(self, name: TargetName, teacher_steps: int) -> Tensor:
        """What the student's jumps are pulled to; ``teacher_steps`` are those of this interval.

        "interval" is the paper's: the teacher's score at the start, for as long as the student's step takes.
        "accumulated" is what the teacher really does in that time.  "literal" is LSD+'s loss as printed, whose step
        ``(T - eps) / N`` belongs to the teacher.
        """
        return {"interval": self.once, "accumulated": self.summed, "literal": self.once / teacher_steps}[name]


@torch.no_grad()
def teacher_interval(
    denoiser: DiscreteDenoiser, stepper: Stepper, x: Tensor, times: Tensor, last: bool, draws: Draws, rng: Rng,
    cond: Cond,
) -> tuple[Interval, Tensor]:  # fmt: skip
    """The teacher's steps through ``times`` from ``x``, and where it comes to; ``last`` ends in tokens."""
    chain, start, moves = denoiser.chain, x, Moves(draws)
    for j, (t, s) in enumerate(pairwise(times)):
        posterior = denoiser(x, t, cond)
        jumps = stepper.jumps(chain, posterior, x, t, s)
        if j == 0:
            once, summed = stepper.jumps(chain, posterior, x, t, times[-1]), torch.zeros_like(jumps)
        elif not chain.absorbing:  # there a position that has moved is done
            moves.renew(rng)
        summed = summed + jumps
        law = row(jumps, x)
        x = moves(x, finished(chain, law, posterior, x) if last and j == len(times) - 2 else law)
    return Interval(start, once, summed), x


def compared(chain: Chain, x: Tensor, other: Tensor) -> Tensor:
    """``[B, L, 1]``: the positions that can still jump, and from the same token, in both states."""
    return ((x == other) & ~chain.visible(x))[..., None]


def distance(target: Tensor, jumps: Tensor, phi: Tensor, where: Tensor) -> Tensor:
    """``L_k``: the squared difference, summed over states and averaged over positions."""
    return ((target - phi * jumps) * where).double().square().sum(-1).mean()


def best_phi(target: Tensor, jumps: Tensor, where: Tensor) -> Tensor:
    """``Phi_k* = <A, B> / <B, B>``, the least of :func:`distance`; 1 where the student has no jumps to scale."""
    a, b = (target * where).double(), (jumps * where).double()
    length = (b * b).sum()
    return torch.where(length > 0, (a * b).sum() / length.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def relaxed(chain: Chain, x: Tensor, share: float, rng: Rng) -> Tensor:
    """``x`` with up to ``share`` of its positions, drawn afresh for every sample, replaced by random tokens: a start
    within that Hamming distance of the teacher's."""
    n, length = x.shape
    budget = math.floor(share * length + 1e-9)
    count = (rng.uniform(n) * (budget + 1)).long()
    order = uniforms(rng, (n, length)).argsort(1).argsort(1)
    tokens = (uniforms(rng, (n, length)) * chain.tokens).long()
    return torch.where(order < count[:, None], tokens, x)


@dataclass(frozen=True)
class Pair:
    """One step: what the teacher did, the student's jumps ``[B, L, states]``, and where the two are compared."""

    teacher: Interval
    jumps: Tensor
    where: Tensor


class SideBySide:
    """A run of teacher and student with the same draws: :meth:`compare` and then :meth:`step`, for every step."""

    def __init__(
        self, denoiser: DiscreteDenoiser, stepper: Stepper, steps: int, teacher_steps: int, restart: bool, n: int,
        share: float, rng: Rng, cond: Cond,
    ) -> None:  # fmt: skip
        chain, length = denoiser.chain, denoiser.shape[0]
        self.denoiser, self.chain, self.stepper, self.rng, self.cond = denoiser, chain, stepper, rng, cond
        self.restart, self.fine = restart, per_interval(steps, teacher_steps)
        self.grid = Plan.uniform(chain, steps)
        self.teacher = chain.prior(n, length, rng)
        self.x = relaxed(chain, self.teacher, share, rng)
        self.draws = [Draws.fresh(rng, n, length, chain.states) for _ in range(steps)]

    def compare(self, k: int, t: Tensor, s: Tensor) -> Pair:
        """The teacher's interval ``k`` beside the student's step from ``t`` to ``s``."""
        start = self.x if self.restart else self.teacher
        first, end = self.grid.times[k : k + 2]
        times = torch.linspace(first, end, self.fine + 1, dtype=torch.float64, device=start.device)
        last = k + 1 == self.grid.steps
        found, self.teacher = teacher_interval(
            self.denoiser, self.stepper, start, times, last, self.draws[k], self.rng, self.cond
        )
        jumps = self.stepper.jumps(self.chain, self.denoiser(self.x, t, self.cond), self.x, t, s)
        return Pair(found, jumps, compared(self.chain, self.x, found.x))

    def step(self, k: int, jumps: Tensor, phi: float) -> None:
        """Move the student."""
        self.x = Moves(self.draws[k])(self.x, row(jumps, self.x, phi))


@torch.no_grad()
def least_squares(
    denoiser: DiscreteDenoiser,
    steps: int,
    teacher_steps: int,
    n: int = 256,
    *,
    stepper: str = "euler",
    target: TargetName = "interval",
    restart: bool = False,
    share: float = 0.0,
    cond: Cond = None,
    seed: int = 0,
) -> LearnedSampler:
    """LSD without gradient descent: every ``Phi_k`` is put to its optimum over ``n`` samples when the student, moved by
    the coefficients before, has come to step ``k``.  ``steps + teacher_steps`` network calls.  ``restart`` is
    :class:`LSD`'s ``teacher_start="student"``, the other arguments are its fields."""
    rng = Rng(seed, "least squares", device=device_of(denoiser))
    run = SideBySide(denoiser, STEPPERS[stepper], steps, teacher_steps, restart, n, share, rng, cond)
    times = torch.tensor(run.grid.times, dtype=torch.float64, device=run.x.device)
    phi: list[float] = []
    for k in range(steps):
        pair = run.compare(k, times[k], times[k + 1])
        best = best_phi(pair.teacher.target(target, run.fine), pair.jumps, pair.where)
        phi.append(float(best.clamp_min(0)))
        run.step(k, pair.jumps, phi[k])
    return LearnedSampler(denoiser, {steps: Plan(run.grid.times, tuple(phi))}, stepper)


def per_interval(steps: int, teacher_steps: int) -> int:
    """The teacher's steps in each of the student's; ValueError when they do not share a grid."""
    if steps < 1 or teacher_steps < steps or teacher_steps % steps:
        raise ValueError(f"teacher_steps={teacher_steps} must be a multiple of steps={steps}")
    return teacher_steps // steps


@dataclass(frozen=True)
class LSD(Method):
    """Learn one coefficient per step of a discrete sampler from the same model's sampler with many steps.

    The teacher's sampler makes ``teacher_steps`` steps, a multiple of the student's, and ``stepper`` says of which kind
    the steps of both are.  ``target`` is what the teacher is asked for, see :meth:`Interval.target`.
    ``teacher_start`` is where it starts every interval: "own" where it came to by itself, "student" in the student's
    state, which chains without a mask need.  ``share`` is the relaxed objective's Hamming distance between the starts
    of teacher and student (zeta, a share of the positions; training only).
    """

    name: ClassVar[str] = "lsd"
    paper: ClassVar[Paper] = Paper(
        "Learnable Sampler Distillation for Discrete Diffusion Models", "2509.19962", "from paper text",
        (
            "coefficients scale the jumps (for Euler: the score, as in the paper); the released code scales the output "
            "of the network, which for SEDD is the log-score, a temperature: see samplers.Tempered",
            "the distance is squared L2, which the paper leaves open, over positions that can jump and hold the same "
            "token in both states",
            "target=accumulated and teacher_start=student are ours; the defaults are the paper's",
            "`teacher_steps` is 64 (the released code's is 256)",
            "teacher and student share their random draws and their end; the released code ends them at 1e-3 and 1e-5",
            "the relaxed start replaces masks by random tokens: the paper does not say what it puts there",
            "optimiser, learning rate and number of iterations are ours: the text read gives none",
        ),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "LSD and LSD+", 2025, "solvers", "discrete teacher", "8-64",
        "learns the sampler's coefficients and times for discrete diffusion", real="discrete_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "coefficients/loss": "small from the start; what is left is the difference of the two states, not of Phi",
        "coefficients/excess": "loss above that of the closed-form optimum on the same samples: falls towards 0",
    }

    lr: Annotated[NonNegative, "learning rate"] = 0.02
    steps: Annotated[Count, "network calls that the student is made for"] = 8
    teacher_steps: Annotated[Count, "steps of the teacher's sampler, a multiple of the student's"] = 64
    stepper: Annotated[Literal["euler", "tweedie"], "kind of the steps of teacher and student"] = "euler"
    target: Annotated[
        Literal["interval", "accumulated"], "jumps of the teacher that the coefficients are fitted to"
    ] = "interval"
    teacher_start: Annotated[
        Literal["own", "student"],
        "state in which the teacher starts every interval; chains without a mask need student",
    ] = "own"
    share: Annotated[
        Share, "share of positions in which the relaxed start differs from the student's state, the paper's zeta"
    ] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        per_interval(self.steps, self.teacher_steps)

    def networks(self, start: Start) -> Networks:
        teacher: Any = start.teacher
        if not isinstance(teacher, DiscreteDenoiser):
            raise ValueError(
                f"{self.name} learns the sampler of a discrete diffusion model; the teacher is a "
                f"{type(teacher).__name__}"
            )
        return Networks(
            {"denoiser": teacher, **self.learned(teacher.chain)},
            {name: Optimizer((name,), self.lr, betas=(0.9, 0.99), decay="cosine") for name in self.moving},
            ema=self.moving,
        )

    moving: ClassVar[tuple[str, ...]] = ("coefficients",)

    def learned(self, chain: Chain) -> dict[str, nn.Module]:
        """The networks of numbers that the method owns."""
        return {"coefficients": Coefficients(self.steps)}

    def times(self, nets: Networks) -> Tensor:
        """The student's times now ``[steps + 1]``, differentiable where they are learned."""
        grid = Plan.uniform(nets.denoiser.chain, self.steps)
        return torch.tensor(grid.times, dtype=torch.float64, device=nets.coefficients.phi.device)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        yield self.coefficient_update(nets, self.pairs(nets, batch, differentiable=False))

    def pairs(self, nets: Networks, batch: Batch, differentiable: bool) -> list[Pair]:
        """Every step of one run of both; the student's jumps are differentiable in the times when asked."""
        times, phi = self.times(nets), nets.coefficients.phi.detach()
        run = SideBySide(
            nets.denoiser, STEPPERS[self.stepper], self.steps, self.teacher_steps,
            self.teacher_start == "student", len(batch.x), self.share, batch.rng, batch.cond,
        )  # fmt: skip
        found = []
        for k in range(self.steps):
            with torch.set_grad_enabled(differentiable):
                found.append(run.compare(k, times[k], times[k + 1]))
            run.step(k, found[-1].jumps.detach(), float(phi[k].clamp_min(0)))
        return found

    def coefficient_update(self, nets: Networks, pairs: list[Pair]) -> Update:
        """``sum_k L_k`` in the coefficients."""
        fine = per_interval(self.steps, self.teacher_steps)
        phi = nets.coefficients.phi
        total, least = phi.new_zeros(()), phi.new_zeros(())
        for k, pair in enumerate(pairs):
            target, jumps = pair.teacher.target(self.target, fine), pair.jumps.detach()
            total = total + distance(target, jumps, phi[k], pair.where)
            least = least + distance(target, jumps, best_phi(target, jumps, pair.where), pair.where)
        logs = {"excess": total.detach() - least, "phi_least": phi.detach().min(), "phi_most": phi.detach().max()}
        return Update("coefficients", total, logs)

    def student(self, nets: Networks) -> Any:
        times = tuple(self.times(nets).detach().tolist())
        phi = tuple(nets.coefficients.phi.detach().clamp_min(0).tolist())
        return LearnedSampler(nets.denoiser, {self.steps: Plan(times, phi)}, self.stepper)


@dataclass(frozen=True)
class LSDPlus(LSD):
    """LSD with learned times: also moves the steps ``kappa_k``, a softmax times ``t_max - t_min``.

    The paper's loss of the steps, ``|| kappa_k s(x_k, tau_k) - (T - eps) / N s*(x*_k, t_k) ||^2``, pulls a step of
    about ``(T - eps) / M`` to the teacher's ``(T - eps) / N``; ``step_target="literal"`` keeps it.  The default
    compares the student's jumps, coefficients included, with those that the teacher makes in the same interval.
    """

    name: ClassVar[str] = "lsd-plus"
    paper: ClassVar[Paper] = Paper(
        LSD.paper.title, LSD.paper.arxiv, LSD.paper.evidence,
        (
            *LSD.paper.deviations,
            "steps are a softmax, so that they are positive and end at t_min; the paper's are free numbers",
            "`step_target`: steps are pulled to the teacher's transition over the whole interval (literal: as printed)",
            "jumps include the rate sigma(tau), which the printed loss leaves out",
        ),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = LSD.healthy | {
        "sizes/loss": "falls a little: the best steps are close to equal ones",
    }
    moving: ClassVar[tuple[str, ...]] = ("coefficients", "sizes")

    step_target: Annotated[
        TargetName, "jumps of the teacher that the steps are fitted to; literal is as the paper prints it"
    ] = "accumulated"

    def learned(self, chain: Chain) -> dict[str, nn.Module]:
        return {**super().learned(chain), "sizes": StepSizes(chain, self.steps)}

    def times(self, nets: Networks) -> Tensor:
        times: Tensor = nets.sizes.times()
        return times

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        pairs = self.pairs(nets, batch, differentiable=True)
        phi = nets.coefficients.phi.detach().clone()
        yield self.coefficient_update(nets, pairs)
        fine = per_interval(self.steps, self.teacher_steps)
        total = phi.new_zeros(())
        for k, pair in enumerate(pairs):
            scale = torch.ones_like(phi[k]) if self.step_target == "literal" else phi[k]
            total = total + distance(pair.teacher.target(self.step_target, fine), pair.jumps, scale, pair.where)
        sizes = -self.times(nets).detach().diff()
        yield Update("sizes", total, {"least": sizes.min(), "most": sizes.max()})
