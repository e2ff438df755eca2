"""A tiny model of every kind in the table, for the tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewstep.classifiers import NetworkClassifier
from fewstep.constant_acceleration import ConstantAcceleration
from fewstep.data.condensed import Condensed
from fewstep.denoisers import NetworkDenoiser, OnSchedule
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.exact import FactorizedLaw
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.samplers import Plan as DiscretePlan
from fewstep.exact import Gaussian, MarkovChain
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import EDMConsistency, Jump, LatentConsistency
from fewstep.language_models import NetworkLanguageModel, RestrictedVocabulary
from fewstep.models.classifiers import ClassifierModel, CondensedModel
from fewstep.models.denoisers import (
    AnyDenoiser,
    NetworkModel,
    RoutedDenoiserModel,
    SelfConditionedModel,
    ViewedModel,
)
from fewstep.models.discrete import AnyDiscreteDenoiser, LearnedSamplerModel, NetworkDiscreteModel
from fewstep.models.language import AnyLanguageModel, NetworkLanguageKind, RestrictedVocabularyKind
from fewstep.models.model import Model
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
from fewstep.networks import MLP, CascadeUNet
from fewstep.networks.causal import GRULanguageModel
from fewstep.networks.classifiers import MLPClassifier
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.randomness import Rng
from fewstep.routing import ByClass, ByTime, RoutedDenoiser, RoutedFlowMap
from fewstep.sampling.cascade import CascadeModel, SeparateCascade, StagePlan, stage_schedule
from fewstep.sampling.dpm_ot.expressway import Expressway
from fewstep.sampling.dpm_ot.model import TransportedModel
from fewstep.sampling.dpm_ot.optimal_transport import transport
from fewstep.sampling.rollout import Plan, Student
from fewstep.sampling.self_conditioned import SelfConditioned
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.schedules import EDM, TrigFlow

SHAPE = (1, 8, 8)
LENGTH, TOKENS = 6, 5


def moved(module: nn.Module) -> nn.Module:
    """Every weight moved away from its start, so that none is without effect."""
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module.requires_grad_(False).eval()


def network(second: int = 0) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = moved(MLP(SHAPE, 16, 1, classes=10, beside=second))
    return NetworkDenoiser(net, TrigFlow(t_max=1.5, sigma_data=0.75), TrigPrediction(sigma_data=0.75), SHAPE, 10)


def on_edm() -> NetworkDenoiser:
    torch.manual_seed(0)
    return NetworkDenoiser(moved(MLP(SHAPE, 16, 1, classes=10)), EDM(), EDMPrediction(), SHAPE, 10)


def student() -> Student:
    made = network()
    return Student(Jump(made), {1: Plan((1.5,)), 2: Plan((1.5, 0.7))})


def second_network() -> NetworkDenoiser:
    """Another network of another size that makes the same samples."""
    torch.manual_seed(1)
    net = moved(MLP(SHAPE, 24, 1, classes=10))
    return NetworkDenoiser(net, TrigFlow(t_max=1.5, sigma_data=0.75), TrigPrediction(sigma_data=0.75), SHAPE, 10)


def accelerated() -> ConstantAcceleration:
    return ConstantAcceleration(network(), network(second=1), 1.2)


def routed_by_class() -> RoutedFlowMap:
    return RoutedFlowMap([Jump(network()), Jump(second_network())], ByClass.even(10, 2))


def routed_by_time() -> RoutedDenoiser:
    return RoutedDenoiser([network(), second_network()], ByTime([0.8]))


def cascade() -> CascadeModel:
    torch.manual_seed(0)
    net = moved(CascadeUNet(SHAPE, (4, 8), channels=(8, 8), blocks=1, width=16, classes=10))
    made = NetworkDenoiser(net, EDM(), EDMPrediction(), SHAPE, 10)
    return CascadeModel(made, (4, 8), [StagePlan(2), StagePlan(2, "ddim", "karras", augmentation=0.1)])


def separate_cascade() -> SeparateCascade:
    torch.manual_seed(0)
    low, high = (
        moved(MLP((1, side, side), 16, 1, 10, extras, beside))
        for side, extras, beside in ((4, (), 0), (8, ("augmentation",), 1))
    )
    stages = [
        NetworkDenoiser(net, stage_schedule(EDM(), net.shape[1] / 8), EDMPrediction(), net.shape, 10)
        for net in (low, high)
    ]
    return SeparateCascade(stages, [StagePlan(2), StagePlan(3, "ddim", "karras", augmentation=0.1)])


def discrete() -> NetworkDiscreteDenoiser:
    torch.manual_seed(0)
    return NetworkDiscreteDenoiser(moved(Transformer(LENGTH, TOKENS, TOKENS + 1, 16, 1, 2)), Masked(TOKENS), LENGTH)


def transported() -> TransportedModel:
    made, rng = network(), Rng(0, "targets")
    time = 0.9
    targets = 0.5 * rng.normal(12, *SHAPE)
    labels = torch.arange(12) % 10
    return TransportedModel.of(made, Expressway(transport(targets, rng)[0], made.schedule, time, labels))


def language_model() -> NetworkLanguageModel:
    torch.manual_seed(0)
    return NetworkLanguageModel(moved(GRULanguageModel(TOKENS, LENGTH, width=8)), TOKENS, LENGTH, "abcde")


def exact() -> Gaussian:
    return Gaussian(TrigFlow(), torch.zeros(SHAPE), 0.5)


def classifier() -> NetworkClassifier:
    torch.manual_seed(0)
    return NetworkClassifier(moved(MLPClassifier(SHAPE, 10, width=16)), SHAPE, 10).eval()


def condensed() -> Condensed:
    x = Rng(0, "pictures").integers(20 * 64, 0, 256).reshape(20, *SHAPE).to(torch.uint8)
    return Condensed(x, torch.arange(20) % 10, notes={"index": torch.arange(20)}).eval()


MAKERS: dict[type[Model], Callable[[], Any]] = {
    StudentModel: student,
    JumpModel: lambda: Jump(network()),
    EDMConsistencyModel: lambda: EDMConsistency(on_edm()),
    ConstantAccelerationModel: accelerated,
    LatentConsistencyModel: lambda: LatentConsistency(network()),
    RoutedFlowMapModel: routed_by_class,
    AnyFlowMap: lambda: ExactFlowMap(exact()),
    NetworkModel: network,
    ViewedModel: lambda: OnSchedule(network(), EDM()),
    RoutedDenoiserModel: routed_by_time,
    SelfConditionedModel: lambda: SelfConditioned(network(second=1), SelfConditioning(1.0, 0.2)),
    AnyDenoiser: exact,
    NetworkDiscreteModel: discrete,
    AnyDiscreteDenoiser: lambda: FactorizedLaw(Masked(TOKENS), torch.ones(LENGTH, TOKENS)),
    LearnedSamplerModel: lambda: LearnedSampler(discrete(), {2: DiscretePlan((1.0, 0.4, 0.1), (0.5, 1.0))}, "tweedie"),
    CascadedModel: cascade,
    SeparateCascadeModel: separate_cascade,
    DPMOTModel: transported,
    ClassifierModel: classifier,
    CondensedModel: condensed,
    NetworkLanguageKind: language_model,
    RestrictedVocabularyKind: lambda: RestrictedVocabulary(language_model(), torch.tensor([6, 0, 3, 2]), 7),
    AnyLanguageModel: lambda: MarkovChain(torch.ones(3, 3) / 3, 8),
}
