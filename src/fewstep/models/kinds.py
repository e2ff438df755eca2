"""The table of all kinds of models.

A new kind is a subclass of :class:`~fewstep.models.model.Model` and one line here: from then on it is saved, opened,
sampled, compared and refused by every command as the others are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fewstep.models.classifiers import ClassifierModel, CondensedModel
from fewstep.models.denoisers import (
    DENOISER,
    AnyDenoiser,
    NetworkModel,
    RoutedDenoiserModel,
    SelfConditionedModel,
    ViewedModel,
)
from fewstep.models.discrete import AnyDiscreteDenoiser, LearnedSamplerModel, NetworkDiscreteModel
from fewstep.models.language import AnyLanguageModel, NetworkLanguageKind, RestrictedVocabularyKind
from fewstep.models.model import Config, Model
from fewstep.models.networks import build_network, describe_network
from fewstep.models.staged import CascadedModel, DPMOTModel, SeparateCascadeModel
from fewstep.models.students import (
    AnyFlowMap,
    ConstantAccelerationModel,
    EDMConsistencyModel,
    JumpModel,
    LatentConsistencyModel,
    RoutedFlowMapModel,
    StudentModel,
)
from fewstep.schemas import Choice, Place, check

#: Every kind of model, the nearest class first where one inherits from another.
KINDS: tuple[type[Model], ...] = (
    StudentModel,
    JumpModel,
    EDMConsistencyModel,
    ConstantAccelerationModel,
    LatentConsistencyModel,
    RoutedFlowMapModel,
    AnyFlowMap,
    NetworkModel,
    ViewedModel,
    RoutedDenoiserModel,
    SelfConditionedModel,
    AnyDenoiser,
    NetworkDiscreteModel,
    AnyDiscreteDenoiser,
    LearnedSamplerModel,
    CascadedModel,
    SeparateCascadeModel,
    DPMOTModel,
    ClassifierModel,
    CondensedModel,
    NetworkLanguageKind,
    RestrictedVocabularyKind,
    AnyLanguageModel,
)
_BY_CLASS = {cls.wraps: cls for cls in KINDS}
#: The kinds that can be saved, by their name in config.json.
SAVED = {cls.kind: cls for cls in KINDS if cls.kind}
#: What a description of a model may hold.
MODEL = Choice("kind", {name: cls.holds for name, cls in SAVED.items()})
#: What a description of a model may hold that training is to begin with: denoisers, and what is no generative model.
FRESH = Choice("kind", {**DENOISER.kinds, **{cls.kind: cls.holds for cls in (ClassifierModel, NetworkLanguageKind)}})
#: Where a description stands that no file holds.
IN_MEMORY = Place("description")


def model_of(module: Any) -> Model:
    """What makes samples, as a :class:`Model`: the kind of its class, or of the nearest one that it inherits from.

    TypeError for what is no model.
    """
    for cls in type(module).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls](module)
    known = ", ".join(cls.wraps.__name__ for cls in KINDS)
    raise TypeError(f"a {type(module).__name__} is not a model: those are {known}")


def describe(module: Any, network: Callable[[nn.Module], Config] = describe_network) -> Config:
    """A model as plain data, from which :func:`build` makes one with fresh weights; ``network`` describes networks.

    TypeError for what cannot be saved.
    """
    found = model_of(module)
    if type(module) is not found.wraps:  # a subclass would come back as what it inherits from
        raise TypeError(f"cannot describe a {type(module).__name__}: only {found.called} of fewstep's own classes")
    return found.describe(lambda inner: describe(inner, network), network)


def build(config: Config, network: Callable[[Config], nn.Module] = build_network, place: Place = IN_MEMORY) -> Any:
    """The model that :func:`describe` described, with untrained weights.

    ``network`` builds networks, ``place`` is where the description stands.  Raises ValueError naming the field that is
    wrong, or values that contradict each other.
    """

    def built(inner: Config) -> Any:
        return SAVED[inner["kind"]].build(inner, built, network)

    return built(check(config, MODEL, place))
