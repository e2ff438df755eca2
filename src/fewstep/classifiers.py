"""Classifiers: networks that tell the class of a sample, as teachers, students and judges of data."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn


class NetworkClassifier(nn.Module):
    """A network that gives logits ``[B, classes]`` of samples ``[B, *shape]`` (pictures in [-1, 1]).

    ``net`` is any module; one with batch statistics should be told which by
    :func:`fewstep.networks.norms.batch_norm`.  ValueError for fewer than two classes.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes}: a classifier tells at least two apart")
        self.net = net
        self.shape, self.classes = tuple(shape), classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.net(x)
        return logits

    @property
    def head(self) -> nn.Linear:
        """The last linear layer; ValueError for a network that has none."""
        layers = [module for module in self.net.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"a {type(self.net).__name__} has no linear layer, which would read its features")
        return layers[-1]

    def features(self, x: Tensor) -> Tensor:
        """What the last linear layer reads, ``[B, d]``."""
        return self.read(x)[0]

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, d]`` and logits ``[B, classes]`` of one pass."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
            logits = self(x)
        return seen[-1], logits
