"""A learned sampler: a discrete denoiser with the plans that were learned for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond
from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.discrete.samplers import STEPPERS, Plan, device_of, sample


class LearnedSampler(nn.Module):
    """What LSD gives back: the network as it was, and one :class:`~fewstep.discrete.samplers.Plan` per number of
    steps.  ``stepper`` is a name in ``STEPPERS``."""

    def __init__(self, denoiser: DiscreteDenoiser, plans: dict[int, Plan], stepper: str = "euler") -> None:
        super().__init__()
        if stepper not in STEPPERS:
            raise ValueError(f"stepper '{stepper}' is unknown; choose from {', '.join(STEPPERS)}")
        if not plans:
            raise ValueError("a learned sampler needs at least one plan")
        for steps, plan in plans.items():
            if plan.steps != steps:
                raise ValueError(f"the plan for {steps} steps has {plan.steps}")
        self.denoiser = denoiser
        self.plans = dict(sorted(plans.items()))
        self.stepper = stepper

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def classes(self) -> int | None:
        return self.denoiser.classes

    def sample(self, n: int, cond: Cond = None, *, steps: int | None = None, seed: int = 0) -> Tensor:
        """``n`` samples ``[n, L]`` in ``steps`` calls (default: the fewest).  Class labels are cycled when the
        denoiser is conditional and ``cond`` is None."""
        steps = next(iter(self.plans)) if steps is None else steps
        if steps not in self.plans:
            raise ValueError(f"steps={steps}: this sampler has plans for {sorted(self.plans)} steps")
        if cond is None and self.classes:
            cond = torch.arange(n, device=device_of(self.denoiser)) % self.classes
        return sample(self.denoiser, n, self.plans[steps], STEPPERS[self.stepper], cond=cond, seed=seed)
