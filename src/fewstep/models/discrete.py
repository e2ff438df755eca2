"""Models of tokens: discrete denoisers, and the samplers that are learned for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.denoisers import Cond, Denoiser
from fewstep.discrete.chains import CHAINS, Chain
from fewstep.discrete.denoisers import DiscreteDenoiser, NetworkDiscreteDenoiser
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import NOISES
from fewstep.discrete.samplers import Plan, device_of, sample
from fewstep.models.model import Config, Model
from fewstep.models.networks import TOKEN_NETWORK
from fewstep.models.students import STEPS
from fewstep.randomness import Rng
from fewstep.sampling.inputs import conditions, evaluating
from fewstep.schemas import Choice, Map, Size, fields_of

NOISE = Choice("name", {name: fields_of(cls) for name, cls in NOISES.items()})
CHAIN = Choice("name", {name: fields_of(cls) | {"noise": NOISE} for name, cls in CHAINS.items()})
#: The steps of a discrete denoiser where nobody says how many.
USUAL_STEPS = 16


class AnyDiscreteDenoiser(Model):
    """A discrete denoiser of whatever make, sampled in equal steps of the law of ``x_s`` given ``x_t``."""

    wraps: ClassVar[type[nn.Module]] = DiscreteDenoiser
    called = "a discrete model"

    @property
    def tokens(self) -> int:
        tokens: int = self.chain_of().chain.tokens
        return tokens

    def chain_of(self) -> DiscreteDenoiser:
        """The discrete denoiser inside."""
        made: DiscreteDenoiser = self.module
        return made

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
        cond = conditions(self.module, n, cond, device_of(self.chain_of()))
        with evaluating(self.module):
            return self.drawn(n, cond, self.calls(steps), seed)

    def drawn(self, n: int, cond: Cond, steps: int, seed: int) -> Tensor:
        """Samples in so many steps."""
        return sample(self.module, n, steps, cond=cond, seed=seed)

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        return self.sample(len(noise), cond, steps=steps, seed=rng.shared_integer(0, 2**62))

    @property
    def usual_steps(self) -> int:
        return USUAL_STEPS if self.plans is None else self.plans[0]

    def calls(self, steps: int | None = None, **options: Any) -> int:
        return self.usual_steps if steps is None else steps

    def denoiser(self) -> Denoiser:
        raise ValueError(f"{self.called}, whose samples are tokens")

    def teacher(self) -> Any:
        return self.chain_of()


class NetworkDiscreteModel(AnyDiscreteDenoiser):
    """A network on a chain."""

    kind = "discrete-denoiser"
    wraps = NetworkDiscreteDenoiser
    holds: ClassVar[dict[str, Any]] = {"chain": CHAIN, "network": TOKEN_NETWORK, "length": Size, "classes": Size | None}

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: NetworkDiscreteDenoiser = self.module
        return {
            "kind": self.kind,
            "chain": describe_chain(made.chain),
            "network": network(made.net),
            "length": made.shape[0],
            "classes": made.classes,
        }

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        chain = build_chain(config["chain"])
        told = {
            "length": config["length"],
            "classes": config["classes"],
            "tokens": chain.tokens,
            "states": chain.states,
        }
        for field, value in told.items():
            if config["network"].get(field) != value:
                raise ValueError(f"the model's {field} is {value}, that of its network {config['network'].get(field)}")
        return NetworkDiscreteDenoiser(network(config["network"]), chain, config["length"], config["classes"])


class LearnedSamplerModel(AnyDiscreteDenoiser):
    """A discrete denoiser with learned plans."""

    kind = "learned-sampler"
    wraps = LearnedSampler
    holds: ClassVar[dict[str, Any]] = {
        "denoiser": Choice("kind", {NetworkDiscreteModel.kind: NetworkDiscreteModel.holds}),
        "plans": Map(*STEPS, fields_of(Plan)), "stepper": str,
    }  # fmt: skip
    called = "a learned sampler"

    @property
    def plans(self) -> tuple[int, ...]:
        return tuple(self.module.plans)

    def chain_of(self) -> DiscreteDenoiser:
        made: DiscreteDenoiser = self.module.denoiser
        return made

    def drawn(self, n: int, cond: Cond, steps: int, seed: int) -> Tensor:
        made: Tensor = self.module.sample(n, cond, steps=steps, seed=seed)
        return made

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        plans = {str(steps): asdict(plan) for steps, plan in self.module.plans.items()}
        return {
            "kind": self.kind, "denoiser": model(self.module.denoiser), "plans": plans, "stepper": self.module.stepper
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        plans = {int(steps): Plan(**plan) for steps, plan in config["plans"].items()}
        return LearnedSampler(model(config["denoiser"]), plans, config["stepper"])


def describe_chain(chain: Chain) -> Config:
    """A chain with its noise as plain data."""
    noise = {"name": type(chain.noise).__name__, **asdict(chain.noise)}
    return {"name": type(chain).__name__, **asdict(chain), "noise": noise}


def build_chain(config: Config) -> Chain:
    """The chain of :func:`describe_chain`."""
    arguments, noise = dict(config), dict(config["noise"])
    arguments["noise"] = NOISES[noise.pop("name")](**noise)
    chain: Chain = CHAINS[arguments.pop("name")](**arguments)
    return chain
