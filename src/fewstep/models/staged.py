"""Models that reach the data in stages of their own: cascades over resolutions, and DPM-OT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond, Denoiser
from fewstep.models.denoisers import DENOISER
from fewstep.models.model import Config, Model
from fewstep.randomness import Rng
from fewstep.sampling.cascade import CascadeModel, SeparateCascade, StagePlan
from fewstep.sampling.dpm_ot.model import TransportedModel
from fewstep.sampling.dpm_ot.optimal_transport import SOURCES
from fewstep.sampling.inputs import conditions
from fewstep.schemas import Size

PLAN = {
    "steps": Size, "solver": str, "grid": str | None, "start": float | None, "augmentation": float,
    "guidance": float | None, "picture_guidance": float | None,
}  # fmt: skip


class AnyCascade(Model):
    """A cascade of resolutions, of whatever make."""

    called = "a cascade of resolutions"
    options = frozenset({"guidance"})

    @property
    def usual_steps(self) -> int:
        return max(plan.steps for plan in self.module.plans)

    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        if seeds is not None:
            raise ValueError(f"seeds: {self.called} draws all samples from one seed")
        made: Tensor = self.module.sample(n, cond, steps=steps, seed=seed, **options)
        return made

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        below = [rng.normal(len(noise), *stage.shape).to(noise) for stage in self.module.cascade.stages[:-1]]
        seed = rng.shared_integer(0, 2**62)
        made: Tensor = self.module.sample(len(noise), cond, steps=steps, seed=seed, noise=[*below, noise], **options)
        return made

    def calls(self, steps: int | None = None, **options: Any) -> int:
        calls: int = self.module.calls(steps, **options)
        return calls

    def described_plans(self) -> list[Config]:
        """The plans as plain data; TypeError for solvers and grids without a name."""
        plans = []
        for plan in self.module.plans:
            for field, value in (("solver", plan.solver), ("grid", plan.grid)):
                if value is not None and not isinstance(value, str):
                    raise TypeError(f"{self.called} is saved with solvers and grids by name, {field} is {value!r}")
            plans.append({name: getattr(plan, name) for name in PLAN})
        return plans


class CascadedModel(AnyCascade):
    """A cascade of resolutions on one network."""

    kind = "cascade"
    wraps = CascadeModel
    holds: ClassVar[dict[str, Any]] = {"denoiser": DENOISER, "resolutions": tuple[Size, ...], "plans": list[PLAN]}  # type: ignore[valid-type]

    def teacher(self) -> Denoiser:
        denoiser: Denoiser = self.module.denoiser
        return denoiser

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: CascadeModel = self.module
        return {
            "kind": self.kind, "denoiser": model(made.denoiser), "resolutions": list(made.resolutions),
            "plans": self.described_plans(),
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        plans = [StagePlan(**plan) for plan in config["plans"]]
        return CascadeModel(model(config["denoiser"]), config["resolutions"], plans)


class SeparateCascadeModel(AnyCascade):
    """A cascade of resolutions on networks of their own."""

    kind = "separate-cascade"
    wraps = SeparateCascade
    holds: ClassVar[dict[str, Any]] = {"stages": list[DENOISER], "plans": list[PLAN]}  # type: ignore[valid-type]
    called = "a cascade of separate networks"

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        return {"kind": self.kind, "stages": list(map(model, self.module.stages)), "plans": self.described_plans()}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        plans = [StagePlan(**plan) for plan in config["plans"]]
        return SeparateCascade(list(map(model, config["stages"])), plans)


class DPMOTModel(Model):
    """A transport to a late time, and a solver from there."""

    kind = "dpm-ot"
    wraps = TransportedModel
    holds: ClassVar[dict[str, Any]] = {
        "denoiser": DENOISER, "targets": Size, "labels": bool, "time": float, "source": Literal[tuple(SOURCES)],
        "solver": str,
    }  # fmt: skip
    called = "a DPM-OT model"

    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        if seeds is not None:
            raise ValueError(f"seeds: {self.called} draws all samples from one seed")
        made: TransportedModel = self.module
        cond = conditions(made, n, cond, made.get_buffer("targets").device)
        return made.sample(n, cond, steps=steps, seed=seed)

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        made: TransportedModel = self.module
        road = made.expressway
        if made.source != "gaussian":
            noise = road.draw(len(noise), rng)
        seed = rng.shared_integer(0, 2**62)
        return made.sample(len(noise), cond, steps=steps, seed=seed, noise=noise.to(road.potential.targets))

    def calls(self, steps: int | None = None, **options: Any) -> int:
        made: TransportedModel = self.module
        return made.calls(steps)

    def teacher(self) -> Denoiser:
        denoiser: Denoiser = self.module.denoiser
        return denoiser

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: TransportedModel = self.module
        return {
            "kind": self.kind, "denoiser": model(made.denoiser), "targets": len(made.get_buffer("targets")),
            "labels": "labels" in made.held, "time": made.time, "source": made.source, "solver": made.solver,
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        denoiser, n = model(config["denoiser"]), config["targets"]
        tensors = {
            "targets": torch.zeros(n, *denoiser.shape),
            "heights": torch.zeros(n, dtype=torch.float64),
            "weights": torch.full((n,), 1 / n, dtype=torch.float64),
        }
        if config["labels"]:
            tensors["labels"] = torch.zeros(n, dtype=torch.int64)
        return TransportedModel(denoiser, tensors, config["time"], config["source"], config["solver"])
