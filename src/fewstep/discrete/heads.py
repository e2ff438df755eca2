"""Output layers for analog bits: networks whose answer is the mean of bits, given through logits.

A head wraps a network and is a network itself, in x_0-prediction: ``NetworkDenoiser(head, schedule, X0(), shape)`` is a
model as any other.  Losses that need the logits call :meth:`logits`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.discrete.bits import Encoding
from fewstep.networks.inputs import TakesInputs


class Head(nn.Module, TakesInputs):
    """``mean(logits(x, t, cond, **extras))`` with the logits from the wrapped ``net``."""

    net: Any

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        return tuple(self.net.extra_inputs)

    @property
    def beside_channels(self) -> int:
        return int(self.net.beside_channels)

    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        self.net = self.net.widened(spans, beside)
        return self

    @abstractmethod
    def mean(self, logits: Tensor) -> Tensor:
        """The mean analog bits under the logits."""

    def logits(self, x: Tensor, t: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        """What the wrapped network says."""
        logits: Tensor = self.net(x, t, cond, **extras)
        return logits

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        return self.mean(self.logits(x, t, cond, **extras))


class SigmoidHead(Head):
    """A logit per bit: ``D = b (2 sigmoid(f) - 1)`` (appendix B.2), b = ``scale``."""

    def __init__(self, net: nn.Module, scale: float = 1.0) -> None:
        super().__init__(net)
        self.scale = scale

    def mean(self, logits: Tensor) -> Tensor:
        return self.scale * torch.tanh(logits / 2)


class SoftmaxHead(Head):
    """The softmax factorisation (section 3.1): probabilities of the symbols, ``D = sum_c p_c code_c``.

    ``net`` is made for samples of ``encoding.values`` channels, its logits; states are given to it with zeros in the
    channels that they lack.
    """

    def __init__(self, net: nn.Module, encoding: Encoding) -> None:
        super().__init__(net)
        self.encoding = encoding

    def mean(self, logits: Tensor) -> Tensor:
        return self.encoding.expected(torch.softmax(logits, 1))

    def logits(self, x: Tensor, t: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        """Logits ``[B, values, ...]`` from states ``[B, channels, ...]``."""
        missing = self.encoding.values - x.shape[1]
        filled = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) if missing else x
        return super().logits(filled, t, cond, **extras)
