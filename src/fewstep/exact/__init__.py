"""Worlds in closed form: data laws whose denoiser, score, flow map and tangent are known exactly."""

from fewstep.exact.bits import BernoulliBits
from fewstep.exact.conditional import ConditionalGaussian
from fewstep.exact.dataset import FiniteData
from fewstep.exact.gaussian import Gaussian, GuidedFlowMap, GuidedGaussian
from fewstep.exact.markov import MarkovChain
from fewstep.exact.mixture import GaussianMixture, Mixture1D, ring, three_modes
from fewstep.exact.ode import probability_flow
from fewstep.exact.world import ExactDenoiser, ExactFlowMap, World

__all__ = [
    "BernoulliBits",
    "ConditionalGaussian",
    "ExactDenoiser",
    "ExactFlowMap",
    "FiniteData",
    "Gaussian",
    "GaussianMixture",
    "GuidedFlowMap",
    "GuidedGaussian",
    "MarkovChain",
    "Mixture1D",
    "World",
    "probability_flow",
    "ring",
    "three_modes",
]
