"""Students: flow maps with the plans that they were trained for, and flow maps without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.denoisers import Cond
from fewstep.flow_maps import EDMConsistency, FlowMap, Input, Jump
from fewstep.models.denoisers import DENOISER
from fewstep.models.model import Config, Model
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, Student
from fewstep.schemas import Choice, Map, Maybe, arguments_of

#: How the keys of plans must look: a number of steps.
STEPS = (r"[1-9]\d{0,5}", "a number of steps, such as 4")
#: What stands for the further inputs of a student.
EXTRAS = Map(r"[a-z]\w{0,30}", "the name of an input", arguments_of(Input))


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
        made: Tensor = self.student()(noise, cond, steps, rng)
        return made

    def calls(self, steps: int | None = None, **options: Any) -> int:
        return self.usual_steps if steps is None else steps

    def teacher(self) -> Any:
        return self.module.flow_map.teacher()

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

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        return Model.describe(self, model, network)


class JumpModel(AnyFlowMap):
    """The jump along a denoiser's prediction."""

    kind = "jump"
    wraps = Jump
    holds: ClassVar[dict[str, Any]] = {"denoiser": DENOISER, "two_times": bool, "extras": Maybe(EXTRAS)}

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        jump: Jump = self.module
        extras = {name: asdict(declared) for name, declared in jump.extras.items()}
        return {
            "kind": self.kind, "denoiser": model(jump.denoiser), "two_times": jump.two_times,
            **({"extras": extras} if extras else {}),
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        extras = {name: Input(**declared) for name, declared in config.get("extras", {}).items()}
        return Jump(model(config["denoiser"]), config["two_times"], extras)


class EDMConsistencyModel(AnyFlowMap):
    """The consistency function on EDM."""

    kind = "edm-consistency"
    wraps = EDMConsistency
    holds: ClassVar[dict[str, Any]] = {"denoiser": DENOISER, "sigma_data": float}

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        return {"kind": self.kind, "denoiser": model(self.module.denoiser), "sigma_data": self.module.sigma_data}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        return EDMConsistency(model(config["denoiser"]), config["sigma_data"])


StudentModel.holds = {
    "flow_map": Choice("kind", {cls.kind: cls.holds for cls in (JumpModel, EDMConsistencyModel)}),
    "plans": Map(*STEPS, arguments_of(Plan)),
}
