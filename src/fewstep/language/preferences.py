"""What is learned from a right and a wrong response to the same prompt: the losses of preference learning.

With ``m = log pi(y | x) / |y|``, the mean log-probability of a token, of the right response ``w`` and the wrong ``l``::

    SFT         -m_w                                             (normalised by length)
    REDI        -m_w + alpha m_l                                 (Xu et al. 2025, arXiv 2505.24850)
    symmetric   -m_w + m_l                                       REDI with alpha = 1
    SimPO       -log sigmoid(beta (m_w - m_l) - gamma)           (Meng et al. 2024, arXiv 2405.14734)
    DPO         -log sigmoid(beta (log pi/pi_ref (w) - log pi/pi_ref (l)))     (Rafailov et al. 2023, arXiv 2305.18290)

DPO reads sums over tokens where the others read means.  At one context with probabilities ``p``, REDI's gradient in
the logits is ``-e_w + alpha e_l + (1 - alpha) p``: for ``alpha < 1`` all other tokens are pushed down as by a weaker
SFT, at ``alpha = 1`` nothing moves them, and above it they are pushed up.  A token that both responses share is pushed
by ``1 / |w| - alpha / |l|``: *down* where ``|l| < alpha |w|``.  The loss has no lower bound for ``alpha > 0``: that it
falls is no sign of success.  ``beta -> 0`` makes SimPO the symmetric loss, at ``beta sigmoid(gamma)`` times its rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fewstep.language.log_probs import ResponseLogProbs
from fewstep.ranges import NonNegative, Positive, Share
from fewstep.values import Written, check_fields, read_fields, suggestion, written_fields


def sft_loss(chosen: Tensor) -> Tensor:
    """SFT normalised by length, ``[B]``, of the mean log-probability of a token ``[B]``."""
    return -chosen


def redi_loss(chosen: Tensor, rejected: Tensor, alpha: float = 0.8, damping: float = 0.0) -> Tensor:
    """REDI ``[B]``, of mean log-probabilities of a token ``[B]``.

    ``damping`` is the exponent of a weight ``exp(damping m_l)`` on the term of the wrong response, as the authors' code
    has it (there "gamma"), through which gradients pass: the term is then at its least, ``-alpha / (e damping)``, where
    ``m_l = -1 / damping``, and a response that is less likely is pushed *up* to there.
    """
    unwanted = alpha * rejected
    return -chosen + (unwanted * torch.exp(damping * rejected) if damping else unwanted)


def symmetric_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """REDI with ``alpha = 1``, ``[B]``."""
    return rejected - chosen


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO ``[B]``, of mean log-probabilities of a token ``[B]``."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """DPO ``[B]``, of log-probabilities of whole responses ``[B]`` under the policy and the reference."""
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


class Pair(NamedTuple):
    """What a model says of the right and the wrong response to each prompt."""

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs


@dataclass(frozen=True)
class Objective(Written, ABC):
    """A loss of pairs with its hyper-parameters, written as its name and those that are not at their defaults, as in
    ``redi:alpha=0.5``; a hyper-parameter of another objective is refused."""

    shown: ClassVar[str] = "redi|symmetric|dpo|simpo[:FIELD=VALUE,..]"
    name: ClassVar[str]
    #: Whether it compares the policy with what it was at the start.
    reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def loss(self, policy: Pair, reference: Pair | None = None) -> Tensor:
        """The loss of each pair, ``[B]``."""

    @classmethod
    def parse(cls, text: str) -> Objective:
        name, _, rest = text.partition(":")
        if name not in OBJECTIVES:
            raise ValueError(f"'{name}' is not one of {', '.join(OBJECTIVES)}{suggestion(name, OBJECTIVES)}")
        return OBJECTIVES[name](**read_fields(name, OBJECTIVES[name], rest))

    def __str__(self) -> str:
        words = written_fields(self)
        return f"{self.name}:{words}" if words else self.name


@dataclass(frozen=True)
class REDILoss(Objective):
    """:func:`redi_loss`; ``alpha = 0`` is SFT normalised by length."""

    name: ClassVar[str] = "redi"

    alpha: Annotated[Share, "weight of the wrong responses"] = 0.8
    damping: Annotated[NonNegative, "exponent of the weight exp(damping m) of a wrong response, 0 for none"] = 0.0

    def loss(self, policy: Pair, reference: Pair | None = None) -> Tensor:
        return redi_loss(policy.chosen.mean, policy.rejected.mean, self.alpha, self.damping)


@dataclass(frozen=True)
class Symmetric(Objective):
    """:func:`symmetric_loss`."""

    name: ClassVar[str] = "symmetric"

    def loss(self, policy: Pair, reference: Pair | None = None) -> Tensor:
        return symmetric_loss(policy.chosen.mean, policy.rejected.mean)


@dataclass(frozen=True)
class SimPO(Objective):
    """:func:`simpo_loss`."""

    name: ClassVar[str] = "simpo"

    beta: Annotated[Positive, "factor on the margin"] = 2.0
    gamma: Annotated[NonNegative, "margin that is asked for, times beta"] = 1.0

    def loss(self, policy: Pair, reference: Pair | None = None) -> Tensor:
        return simpo_loss(policy.chosen.mean, policy.rejected.mean, self.beta, self.gamma)


@dataclass(frozen=True)
class DPO(Objective):
    """:func:`dpo_loss`, against the policy that the stage starts from."""

    name: ClassVar[str] = "dpo"
    reference: ClassVar[bool] = True

    beta: Annotated[Positive, "how dear it is to leave the reference"] = 0.001

    def loss(self, policy: Pair, reference: Pair | None = None) -> Tensor:
        if reference is None:
            raise ValueError("dpo compares with a reference, and none was given")
        ref_chosen, ref_rejected = (responses.total for responses in reference)
        return dpo_loss(policy.chosen.total, policy.rejected.total, ref_chosen, ref_rejected, self.beta)


#: The objectives by name.
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (REDILoss, Symmetric, DPO, SimPO)}
