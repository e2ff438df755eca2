"""Denoisers: models that any solver samples, in any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from fewstep.denoisers import Cond, Denoiser, NetworkDenoiser, OnSchedule
from fewstep.models.model import Config, Model
from fewstep.models.networks import (
    DIFFUSERS,
    NETWORK,
    PREDICTION,
    SCHEDULE,
    SCHEDULES,
    build_named,
    describe_prediction,
)
from fewstep.models.routers import ROUTER, build_router, describe_router
from fewstep.predictions import ALL_PREDICTIONS
from fewstep.randomness import Rng
from fewstep.routing import RoutedDenoiser
from fewstep.sampling import sample
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver
from fewstep.sampling.sample import laid_out
from fewstep.sampling.self_conditioned import SelfConditioned
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.schedules import described
from fewstep.schemas import Choice, Maybe, Range, Size

#: What a description of a denoiser that a network is behind may hold.
NETWORK_DENOISER: dict[str, Any] = {
    "schedule": SCHEDULE, "prediction": PREDICTION, "network": NETWORK, "shape": tuple[Size, ...],
    "classes": Size | None, "half_level": Maybe(Annotated[float, Range(1e-6, 1e6)]),
}  # fmt: skip
_DENOISERS: dict[str, dict[str, Any]] = {"denoiser": NETWORK_DENOISER}
DENOISER = Choice("kind", _DENOISERS)
_DENOISERS["on-schedule"] = {"inner": DENOISER, "schedule": SCHEDULE}
_DENOISERS["routed-denoiser"] = {"experts": list[DENOISER], "router": ROUTER}  # type: ignore[valid-type]


class AnyDenoiser(Model):
    """A denoiser of whatever make."""

    wraps: ClassVar[type[nn.Module]] = Denoiser
    called = "a denoiser"
    options = frozenset({
        "solver", "grid", "guidance", "threshold", "settings", "guide", "interval", "statistics", "denoise", "one_path"
    })  # fmt: skip

    #: How predictions are fed back to the network, where it was trained for that.
    feedback: SelfConditioning | None = None

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
        model: Denoiser = self.inner
        return sample(
            model, n, cond=cond, steps=steps, seed=seed, seeds=seeds, self_conditioning=self.feedback, **options
        )

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        seed = rng.shared_integer(0, 2**62)
        return self.sample(len(noise), cond, steps=steps, seed=seed, noise=noise, **options)

    def calls(self, steps: int | None = None, *, solver: str | Solver = "abm", grid: Any = None, **options: Any) -> int:
        made, times = laid_out(self.inner, solver, steps, grid)
        return made.table(Levels.of(self.inner.schedule, times)).calls

    @property
    def inner(self) -> Denoiser:
        """The denoiser that is sampled."""
        denoiser: Denoiser = self.module
        return denoiser

    def denoiser(self) -> Denoiser:
        return self.inner


class NetworkModel(AnyDenoiser):
    """A network with its prediction."""

    kind = "denoiser"
    wraps = NetworkDenoiser
    holds: ClassVar[dict[str, Any]] = NETWORK_DENOISER

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: NetworkDenoiser = self.module
        return {
            "kind": self.kind,
            "schedule": described(made.schedule),
            "prediction": describe_prediction(made.prediction),
            "network": network(made.net),
            "shape": list(made.shape),
            "classes": made.classes,
            **({} if made.half_level is None else {"half_level": made.half_level}),
        }

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        prediction, schedule = (
            build_named(ALL_PREDICTIONS, config["prediction"]),
            build_named(SCHEDULES, config["schedule"]),
        )
        net: Any = network(config["network"])
        for field, found in (("shape", tuple(net.shape)), ("classes", net.classes)):
            if config[field] != found:
                raise ValueError(f"the model's {field} is {config[field]}, that of its network {found}")
        null = net.empty(1) if config["network"]["name"] == DIFFUSERS else None
        made = NetworkDenoiser(net, schedule, prediction, config["shape"], config["classes"], null)
        made.half_level = config.get("half_level")
        return made


class ViewedModel(AnyDenoiser):
    """A denoiser seen on another schedule."""

    kind = "on-schedule"
    wraps = OnSchedule
    holds: ClassVar[dict[str, Any]] = _DENOISERS["on-schedule"]

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        return {"kind": self.kind, "inner": model(self.module.inner), "schedule": described(self.module.schedule)}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return OnSchedule(model(config["inner"]), build_named(SCHEDULES, config["schedule"]))


class RoutedDenoiserModel(AnyDenoiser):
    """A denoiser made of experts."""

    kind = "routed-denoiser"
    wraps = RoutedDenoiser
    holds: ClassVar[dict[str, Any]] = _DENOISERS["routed-denoiser"]

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: RoutedDenoiser = self.module
        return {"kind": self.kind, "experts": list(map(model, made.experts)), "router": describe_router(made.router)}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return RoutedDenoiser(list(map(model, config["experts"])), build_router(config["router"]))


class SelfConditionedModel(AnyDenoiser):
    """A network that is given its own last prediction."""

    kind = "self-conditioned"
    wraps = SelfConditioned
    holds: ClassVar[dict[str, Any]] = {"denoiser": DENOISER, "bound": float | None, "momentum": float}
    called = "a self-conditioned model"
    options = frozenset({"solver", "grid", "guidance", "threshold", "denoise", "one_path"})

    @property
    def inner(self) -> Denoiser:
        denoiser: Denoiser = self.module.denoiser
        return denoiser

    @property
    def feedback(self) -> SelfConditioning:  # type: ignore[override]
        feedback: SelfConditioning = self.module.feedback
        return feedback

    def denoiser(self) -> Denoiser:
        raise ValueError(f"{self.called}, each of whose calls is given the last prediction")

    def teacher(self) -> Denoiser:
        return self.inner

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        feedback = self.feedback
        return {
            "kind": self.kind, "denoiser": model(self.inner), "bound": feedback.bound, "momentum": feedback.momentum
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return SelfConditioned(model(config["denoiser"]), SelfConditioning(config["bound"], config["momentum"]))
