"""New inputs in a trained network, which starts as it was: a target time, a guidance weight, a second sample.

An input ``[B]`` is embedded and projected by weights that start at zero, and added to the network's embedding of time;
a second sample enters the first layer through weights that start at zero.  So the network gives the same numbers, bit
for bit, until they are trained.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewstep.networks.lora import carry_over
from fewstep.networks.parts import Beside, PositionalEmbedding, zeroed


class TakesInputs(ABC):
    """A network that can be given further inputs."""

    #: What its guidance weight ``w`` is where there is no guidance: 1 for the scale of ``unc + w (cond - unc)``.
    unguided: float = 1.0
    #: Where its weights lie: a model's folder, and the network's name in the model there; None for nowhere.
    kept: tuple[str, str] | None = None

    @property
    def clock(self) -> float:
        """What it multiplies the time that it is given by, before it embeds it."""
        return 1.0

    @property
    @abstractmethod
    def extra_inputs(self) -> tuple[str, ...]:
        """The names of the further inputs that it takes, ``[B]`` each."""

    @abstractmethod
    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        """The network with further inputs: ``spans`` by name, the size of the values of each, and ``beside`` channels
        of a second sample, of which it has fewer."""

    @property
    def beside_channels(self) -> int:
        """The channels of the second sample that it takes, 0 for none."""
        return 0

    def decode(self, samples: Tensor) -> Tensor:
        """Its samples as pictures in [-1, 1] (not clipped): themselves, unless it makes latents; with a gradient in the
        samples, and none in what decodes them."""
        return samples


def taking_inputs(net: nn.Module) -> TakesInputs | None:
    """A network where it is one that can be given further inputs, None where it is of another make."""
    return net if isinstance(net, TakesInputs) else None


def inputs_of(net: nn.Module) -> tuple[str, ...]:
    """The names of the further inputs that a network takes."""
    found = taking_inputs(net)
    return () if found is None else found.extra_inputs


def clock_of(net: nn.Module) -> float:
    """What a network multiplies the time that it is given by."""
    return net.clock if isinstance(net, TakesInputs) else 1.0


class Configured(TakesInputs):
    """A network that is rebuilt from its ``config``, in which ``extras`` and ``beside`` are the inputs."""

    config: dict[str, Any]

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        return tuple(self.config["extras"])

    @property
    def beside_channels(self) -> int:
        return int(self.config.get("beside", 0))

    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        own: Any = self
        second = {"beside": beside} if beside else {}
        wider = type(own)(**{**self.config, "extras": (*self.extra_inputs, *spans), **second})
        wider.to(next(own.parameters()))
        carry_over(own, wider)
        wider.load_state_dict(wider.state_dict() | own.state_dict())
        wider.kept = self.kept
        return wider.train(own.training)


class FurtherInputs(nn.Module):
    """What adds further inputs to the outputs of modules of another make, the ``sites`` where they embed the time.

    ``spans`` maps the names to the size of their values, by which they are divided; ``width`` is that of the sites'
    outputs ``[B, width]``.
    """

    def __init__(self, spans: Mapping[str, float], width: int, sites: list[nn.Module], embedding: int = 64) -> None:
        super().__init__()
        self.spans: dict[str, float] = {}
        self.width = width
        self.embedding = PositionalEmbedding(embedding)
        self.projections = nn.ModuleDict()
        self.given: dict[str, Tensor] = {}
        self.take(spans)
        for site in sites:
            site.register_forward_hook(self.add)

    def take(self, spans: Mapping[str, float]) -> None:
        """Add more inputs, in the type and on the device of those there are."""
        for name, span in spans.items():
            made = zeroed(nn.Linear(2 * len(self.embedding.frequencies), self.width, bias=False))
            self.spans[name], self.projections[name] = span, made.to(self.embedding.frequencies)

    def give(self, extras: Mapping[str, Tensor]) -> None:
        """Hold the values for the coming call; TypeError unless they are all there are."""
        if set(extras) != set(self.spans):
            raise TypeError(f"the network takes the extra inputs {sorted(self.spans)}, it was given {sorted(extras)}")
        self.given = dict(extras)

    def add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        for name, projection in self.projections.items():
            value = self.embedding(self.given[name] / self.spans[name])
            out = out + projection(value.to(projection.weight)).to(out)
        return out


class SecondSample(nn.Module):
    """What adds a second sample ``[B, channels, h, w]`` to the output of ``entrance``, the convolution of a network of
    another make that reads the state: by a convolution of the same kind that starts at zero.  None stands for zeros."""

    def __init__(self, channels: int, entrance: nn.Conv2d) -> None:
        super().__init__()
        kernel: Any = entrance.kernel_size
        stride: Any = entrance.stride
        padding: Any = entrance.padding
        convolution = nn.Conv2d(channels, entrance.out_channels, kernel, stride, padding, bias=False)
        self.beside = Beside(channels, convolution)
        self.channels = channels
        self.given: Tensor | None = None
        self.to(entrance.weight)
        entrance.register_forward_hook(self.add)

    def add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        added: Tensor = self.beside(out, self.given)
        return added


class WithInputs(nn.Module, TakesInputs):
    """Somebody's own network ``net(x, t, cond)`` with the inputs ``spans`` added where it embeds the time.

    ``site`` is the name of the module in it whose output ``[B, width]`` is that embedding.  ValueError when there is no
    such module.
    """

    def __init__(self, net: nn.Module, spans: Mapping[str, float], site: str, width: int) -> None:
        super().__init__()
        modules = dict(net.named_modules())
        if site not in modules:
            raise ValueError(f"site='{site}': the network has no such module")
        self.net, self.site, self.width = net, site, width
        self.further = FurtherInputs(spans, width, [modules[site]])
        self.further.to(next(net.parameters()))

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        return tuple(self.further.spans)

    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        if beside:
            raise ValueError(f"a {type(self.net).__name__} takes no second sample")
        return WithInputs(self, spans, f"net.{self.site}", self.width)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        own = {name: extras.pop(name) for name in self.further.spans if name in extras}
        self.further.give(own)
        return self.net(x, t, cond, **extras)


def with_inputs(
    net: nn.Module,
    extras: Mapping[str, float] | tuple[str, ...] = (),
    beside: int = 0,
    *,
    site: str | None = None,
) -> nn.Module:
    """A copy of a trained network that takes the inputs ``extras`` too, and a second sample of ``beside`` channels:
    ``net(x, t, cond, beside=.., s=.., w=..)``, equal to ``net`` bit for bit until trained.

    ``extras`` are names, or names with the size of their values (1000 for times that run to 1000); those that the
    network takes already stay.  A network of another make needs ``site``, the name of the module in it whose output
    ``[B, width]`` is its embedding of time, for ``extras``; whether it takes a second sample is its own business.
    ValueError where the network cannot be widened.
    """
    spans = dict(extras) if isinstance(extras, Mapping) else dict.fromkeys(extras, 1.0)
    made = copy.deepcopy(net)
    taking = taking_inputs(made)
    if taking is not None:
        new = {name: span for name, span in spans.items() if name not in taking.extra_inputs}
        if beside and taking.beside_channels not in (0, beside):
            raise ValueError(
                f"the network takes a second sample of {taking.beside_channels} channels, this method needs {beside}, "
                "as many as the data"
            )
        missing = beside if beside and not taking.beside_channels else taking.beside_channels
        return taking.widened(new, missing) if new or missing != taking.beside_channels else made
    if not spans:
        return made
    if site is None or beside:
        raise ValueError(
            f"a {type(net).__name__} takes no further inputs: wrap it first, with_inputs(net, {tuple(spans)}, "
            "site=...) with the name of the module that embeds the time"
        )
    return WithInputs(made, spans, site, width_of(made, site))


def width_of(net: nn.Module, site: str) -> int:
    """The width of the output of the last linear layer in a module; ValueError when there is none."""
    layers = [m for name, m in net.named_modules() if name.startswith(site) and type(m) is nn.Linear]
    if not layers:
        raise ValueError(f"site='{site}': no linear layer tells the width of its output")
    return int(layers[-1].out_features)
