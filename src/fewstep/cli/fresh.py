"""Fresh models from flags: what ``train`` and ``condense`` begin with.

The flags depend on what the method trains: a network with a noise schedule and a prediction, or a classifier.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fewstep.cli.errors import UserError, choose
from fewstep.cli.flags import Parameter, given, of_constructor, of_dataclass
from fewstep.cli.settings import word_after

if TYPE_CHECKING:
    from fewstep.data import Samples
    from fewstep.predictions import Prediction
    from fewstep.schedules import Schedule

SCHEDULES = ("TrigFlow", "FlowMatching", "EDM", "VPLinear", "VPCosine")
#: What the data and the method decide about a network.
FROM_DATA = ("shape", "classes", "extras", "beside")
#: What a text decides.
OF_TEXT = ("vocabulary", "length")
#: A network of more tensors of weights is a slip of the hand, and would take hours to build.
MOST_TENSORS = 2000
#: What a method's paper trains where that is something else.
FLOW = {"schedule": "FlowMatching", "prediction": "velocity"}
OWN_DEFAULTS = dict.fromkeys(("flow-matching", "mean-flow-training", "shortcut"), FLOW)


class Fresh(ABC):
    """A kind of fresh model: what may be chosen about it, the flags that follow from that, its description."""

    #: What may be chosen by name, with the usual choice.
    usual: ClassVar[Mapping[str, str]]
    title: ClassVar[str]

    @abstractmethod
    def known(self, what: str) -> Iterable[str]:
        """The names that may be chosen."""

    @abstractmethod
    def parameters(self, picked: Mapping[str, str]) -> list[Parameter]:
        """What shapes the model, once the choices are made."""

    @abstractmethod
    def described(self, chosen: argparse.Namespace, data: Samples, values: Mapping[str, Any]) -> Any:
        """The fresh model for the data, whose description counts and whose weights do not."""

    def add_to(self, parser: argparse.ArgumentParser, words: Sequence[str], method: str) -> list[Parameter]:
        """Adds the choices; the flags that follow from what ``words`` choose."""
        picked: dict[str, str] = {}
        for what, usual in (self.usual | OWN_DEFAULTS.get(method, {})).items():  # type: ignore[operator]
            known = [*self.known(what)]
            text = f"{', '.join(known)} (default {usual})"
            parser.add_argument(f"--{what}", metavar="NAME", default=usual, help=text)
            picked[what] = choose(what, word_after(f"--{what}", words, usual), known)
        return self.parameters(picked)

    def parameters_of(self, chosen: argparse.Namespace) -> list[Parameter]:
        """The flags that follow from the choices of a command line."""
        return self.parameters({what: getattr(chosen, what) for what in self.usual})

    def description(self, chosen: argparse.Namespace, data: Samples) -> dict[str, Any]:
        """The description of an untrained model for the data, as :func:`fewstep.hub.native.build` takes it."""
        from fewstep.hub import native
        from fewstep.hub.weights import no_larger_than

        values = given(self.parameters_of(chosen), chosen)
        with no_larger_than(MOST_TENSORS):
            return native.describe(self.described(chosen, data, values))


def build(cls: Any, parameters: Iterable[Parameter], values: Mapping[str, Any], **more: Any) -> Any:
    """An object of a class with those of the values that are its own."""
    return cls(**more, **{p.name: values[p.name] for p in parameters if p.name in values})


class FreshDenoiser(Fresh):
    """A network with a schedule and a prediction; a name that two of them share (``sigma_data``) sets both."""

    usual: ClassVar[dict[str, str]] = {"network": "unet", "schedule": "TrigFlow", "prediction": "trig"}
    title = "the network, {network}, and its noise schedule"

    def known(self, what: str) -> Iterable[str]:
        from fewstep.networks import NETWORKS
        from fewstep.predictions import PREDICTIONS

        known: dict[str, Iterable[str]] = {"network": NETWORKS, "schedule": SCHEDULES, "prediction": PREDICTIONS}
        return known[what]

    def parameters(self, picked: Mapping[str, str]) -> list[Parameter]:
        from fewstep.hub.native import SCHEDULES
        from fewstep.networks import NETWORKS
        from fewstep.predictions import PREDICTIONS

        found = [
            *of_constructor(NETWORKS[picked["network"]], FROM_DATA),
            *of_dataclass(SCHEDULES[picked["schedule"]]),
            *of_dataclass(PREDICTIONS[picked["prediction"]]),
        ]
        return list({parameter.name: parameter for parameter in found}.values())

    def described(self, chosen: argparse.Namespace, data: Samples, values: Mapping[str, Any]) -> Any:
        from fewstep.denoisers import NetworkDenoiser
        from fewstep.hub import native
        from fewstep.networks import NETWORKS
        from fewstep.predictions import PREDICTIONS

        classes = None if chosen.unconditional else data.classes
        network, prediction = NETWORKS[chosen.network], PREDICTIONS[chosen.prediction]
        schedule = native.SCHEDULES[chosen.schedule]
        made = build(schedule, of_dataclass(schedule), values)
        predicted = build(prediction, of_dataclass(prediction), values)
        refuse_pure_noise(chosen, made, predicted)
        net = build(network, of_constructor(network, FROM_DATA), values, shape=data.shape, classes=classes)
        return NetworkDenoiser(net, made, predicted, data.shape, classes)


class FreshClassifier(Fresh):
    """A network that tells the classes of the data."""

    usual: ClassVar[dict[str, str]] = {"network": "convnet"}
    title = "the classifier, {network}"

    def known(self, what: str) -> Iterable[str]:
        from fewstep.networks.classifiers import CLASSIFIERS

        return CLASSIFIERS

    def parameters(self, picked: Mapping[str, str]) -> list[Parameter]:
        from fewstep.networks.classifiers import CLASSIFIERS

        return of_constructor(CLASSIFIERS[picked["network"]], FROM_DATA)

    def described(self, chosen: argparse.Namespace, data: Samples, values: Mapping[str, Any]) -> Any:
        from fewstep.classifiers import NetworkClassifier
        from fewstep.networks.classifiers import CLASSIFIERS

        if data.classes is None:
            raise UserError(f"--data {data.name}: it has no labels, from which a classifier could learn")
        network = CLASSIFIERS[chosen.network]
        shaped: dict[str, Any] = {"shape": data.shape, "classes": data.classes}
        return NetworkClassifier(build(network, of_constructor(network, FROM_DATA), values, **shaped), **shaped)


class FreshLanguageModel(Fresh):
    """A network for the tokens of a text."""

    usual: ClassVar[dict[str, str]] = {"network": "causal-transformer"}
    title = "the language model, {network}"

    def known(self, what: str) -> Iterable[str]:
        from fewstep.networks.causal import CAUSAL

        return CAUSAL

    def parameters(self, picked: Mapping[str, str]) -> list[Parameter]:
        from fewstep.networks.causal import CAUSAL

        return of_constructor(CAUSAL[picked["network"]], OF_TEXT)

    def described(self, chosen: argparse.Namespace, data: Samples, values: Mapping[str, Any]) -> Any:
        from fewstep.data.text import LETTERS
        from fewstep.language_models import NetworkLanguageModel
        from fewstep.networks.causal import CAUSAL

        first = data.rows(slice(0, 1)).x
        if first is None or first.is_floating_point() or len(data.shape) != 1:
            raise UserError(f"--data {data.name}: samples {list(data.shape)} are no text; give a plain text file")
        characters, (length,) = data.alphabet or LETTERS.characters, data.shape
        vocabulary = len(characters)
        network = CAUSAL[chosen.network]
        shaped: dict[str, Any] = {"vocabulary": vocabulary, "length": length}
        net = build(network, of_constructor(network, OF_TEXT), values, **shaped)
        return NetworkLanguageModel(net, vocabulary, length, characters)


#: The kind of fresh model by what it is for.
FRESH: dict[str, Fresh] = {
    "generation": FreshDenoiser(), "classification": FreshClassifier(), "language": FreshLanguageModel(),
}  # fmt: skip


def fresh_for(method: str) -> Fresh:
    """What a method begins with."""
    from fewstep.methods import recipe_class

    return FRESH[recipe_class(method).task]


def refuse_pure_noise(chosen: argparse.Namespace, schedule: Schedule, prediction: Prediction) -> None:
    """:class:`UserError` for a prediction from which the data cannot be told where sampling starts."""
    import torch

    latest = torch.tensor(schedule.t_max, dtype=torch.float64)
    if not all(bool(c.isfinite()) for c in prediction.coefficients(schedule, latest)):
        raise UserError(
            f"--prediction {chosen.prediction}: {chosen.schedule} ends in pure noise at t = {schedule.t_max:g}, where "
            "it does not tell the data: choose velocity, or an earlier --t-max"
        )


def initialised(description: dict[str, Any], seed: int) -> Any:
    """The described model with weights drawn from the seed."""
    import torch

    from fewstep.hub import native
    from fewstep.hub.weights import no_larger_than
    from fewstep.randomness import derive_seed

    with torch.random.fork_rng(devices=[]), no_larger_than(MOST_TENSORS):
        torch.manual_seed(derive_seed(seed, "initial weights"))
        return native.build(description)
