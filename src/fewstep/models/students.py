"""Students: flow maps with the plans that they were trained for, and flow maps without any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.constant_acceleration import ConstantAcceleration
from fewstep.denoisers import Cond
from fewstep.extras import NAME, Input
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump, LatentConsistency
from fewstep.models.denoisers import DENOISER
from fewstep.models.model import Config, Model
from fewstep.models.networks import DIFFUSERS
from fewstep.models.routers import ROUTER, build_router, describe_router
from fewstep.randomness import Rng
from fewstep.routing import RoutedFlowMap
from fewstep.sampling.rollout import Plan, Student
from fewstep.schemas import Choice, Map, Maybe, arguments_of

#: How the keys of plans must look: a number of steps.
STEPS = (r"[1-9]\d{0,5}", "a number of steps, such as 4")
#: What stands for the further inputs of a student.
EXTRAS = Map(NAME, "the name of an input", arguments_of(Input))


def describe_extras(extras: Mapping[str, Input]) -> Config:
    """The further inputs of a flow map as a part of its description; nothing where there are none."""
    plain = {
        name: {field: value for field, value in asdict(declared).items() if value is not None}
        for name, declared in extras.items()
    }
    return {"extras": plain} if plain else {}


def build_extras(config: Config) -> dict[str, Input]:
    """The further inputs that a flow map's description declares; ValueError naming one whose numbers contradict each
    other, or that the flow map's network does not take."""
    extras = {}
    for name, declared in config.get("extras", {}).items():
        try:
            extras[name] = Input(**declared)
        except ValueError as error:
            raise ValueError(f"extras.{name}: {error}") from None
    for network in network_configs(config["denoiser"]):
        if network["name"] == DIFFUSERS:  # which say themselves what they take
            continue
        taken = network.get("extras", ())
        for name in extras:
            if name not in taken:
                raise ValueError(f"extras.{name}: the network takes {', '.join(taken) or 'no further inputs'}")
    return extras


def network_configs(config: Config) -> Iterator[Config]:
    """The networks in a denoiser's description: its own, that of the one it is a view of, or those of its experts."""
    if "network" in config:
        yield config["network"]
    for part in (*([config["inner"]] if "inner" in config else []), *config.get("experts", ())):
        yield from network_configs(part)


class StudentModel(Model):
    """A flow map with plans."""

    kind = "student"
    wraps: ClassVar[type[nn.Module]] = Student
    called = "a student"

    def student(self) -> Student:
        student: Student = self.module
        return student

    @property
    def plans(self) -> tuple[int, ...]:
        return tuple(self.student().plans)

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self.student().extras

    @property
    def planned(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for plan in self.student().plans.values() for name in plan.extras))

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
        return self.student().sample(n, cond, steps=steps, seed=seed, seeds=seeds, **options)

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        made: Tensor = self.student()(noise, cond, steps, rng, **options)
        return made

    def calls(self, steps: int | None = None, **options: Any) -> int:
        taken = self.usual_steps if steps is None else steps
        return taken + self.student().flow_map.calls_to_begin

    def teacher(self) -> Any:
        return self.module.flow_map.teacher()

    def start(self, extras: tuple[str, ...]) -> Any:
        return self.module.flow_map.start(extras)

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        plans = {
            str(steps): {name: value for name, value in asdict(plan).items() if value not in (None, {})}
            for steps, plan in self.module.plans.items()
        }
        return {"kind": self.kind, "flow_map": model(self.module.flow_map), "plans": plans}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        plans = {int(steps): Plan(**plan) for steps, plan in config["plans"].items()}
        return Student(model(config["flow_map"]), plans)


class AnyFlowMap(StudentModel):
    """A flow map by itself, of whatever make: sampled in the one step from noise to data."""

    kind = ""
    wraps: ClassVar[type[nn.Module]] = FlowMap
    holds: ClassVar[dict[str, Any]] = {}
    called = "a flow map"

    def student(self) -> Student:
        return Student(self.module, {1: Plan((self.module.schedule.t_max,))})

    def teacher(self) -> Any:
        return self.module.teacher()

    def start(self, extras: tuple[str, ...]) -> Any:
        return self.module.start(extras)

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        return Model.describe(self, model, network)


class JumpModel(AnyFlowMap):
    """The jump along a denoiser's prediction."""

    kind = "jump"
    wraps = Jump
    holds: ClassVar[dict[str, Any]] = {
        "denoiser": DENOISER, "two_times": bool, "extras": Maybe(EXTRAS), "upward": Maybe(bool)
    }  # fmt: skip

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        jump: Jump = self.module
        return {
            "kind": self.kind, "denoiser": model(jump.denoiser), "two_times": jump.two_times,
            **describe_extras(jump.extras), **({"upward": True} if jump.upward else {}),
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        upward = config.get("upward", False)
        return Jump(model(config["denoiser"]), config["two_times"], build_extras(config), upward)


class EDMConsistencyModel(AnyFlowMap):
    """The consistency function on EDM."""

    kind = "edm-consistency"
    wraps = EDMConsistency
    holds: ClassVar[dict[str, Any]] = {"denoiser": DENOISER, "sigma_data": float, "extras": Maybe(EXTRAS)}

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: EDMConsistency = self.module
        return {
            "kind": self.kind, "denoiser": model(made.denoiser), "sigma_data": made.sigma_data,
            **describe_extras(made.extras),
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return EDMConsistency(model(config["denoiser"]), config["sigma_data"], build_extras(config))


class ConstantAccelerationModel(AnyFlowMap):
    """The map of two networks, an initial velocity and an acceleration."""

    kind = "constant-acceleration"
    wraps = ConstantAcceleration
    holds: ClassVar[dict[str, Any]] = {"velocity": DENOISER, "accelerated": DENOISER, "h": float}

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: ConstantAcceleration = self.module
        return {
            "kind": self.kind, "velocity": model(made.velocity), "accelerated": model(made.accelerated), "h": made.h,
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return ConstantAcceleration(model(config["velocity"]), model(config["accelerated"]), config["h"])


class LatentConsistencyModel(AnyFlowMap):
    """LCM's consistency function."""

    kind = "latent-consistency"
    wraps = LatentConsistency
    holds: ClassVar[dict[str, Any]] = {
        "denoiser": DENOISER, "sigma_data": float, "time_scale": float, "extras": Maybe(EXTRAS),
    }  # fmt: skip

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: LatentConsistency = self.module
        return {
            "kind": self.kind, "denoiser": model(made.denoiser), "sigma_data": made.sigma_data,
            "time_scale": made.time_scale, **describe_extras(made.extras),
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return LatentConsistency(
            model(config["denoiser"]), config["sigma_data"], config["time_scale"], build_extras(config)
        )


class RoutedFlowMapModel(AnyFlowMap):
    """A flow map made of experts."""

    kind = "routed-flow-map"
    wraps = RoutedFlowMap

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: RoutedFlowMap = self.module
        return {"kind": self.kind, "experts": list(map(model, made.experts)), "router": describe_router(made.router)}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return RoutedFlowMap(list(map(model, config["experts"])), build_router(config["router"]))


_FLOW_MAPS: dict[str, dict[str, Any]] = {
    cls.kind: cls.holds for cls in (JumpModel, EDMConsistencyModel, LatentConsistencyModel, ConstantAccelerationModel)
}
FLOW_MAP = Choice("kind", _FLOW_MAPS)
RoutedFlowMapModel.holds = _FLOW_MAPS[RoutedFlowMapModel.kind] = {
    "experts": list[FLOW_MAP],  # type: ignore[valid-type]
    "router": ROUTER,
}
StudentModel.holds = {
    "flow_map": FLOW_MAP,
    "plans": Map(*STEPS, arguments_of(Plan)),
}
