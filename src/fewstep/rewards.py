"""Rewards: what rates pictures under the conditions that they were asked for, as feedback for a student.

Any module with ``reward(pictures, cond)`` will do, from an aesthetic score to a preference model; pictures are in
[-1, 1], decoded where samples are latents, and the gradient comes back through them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond


class Reward(nn.Module, ABC):
    """A number for every picture, greater for better ones; several rewards have one a column."""

    @abstractmethod
    def forward(self, pictures: Tensor, cond: Cond) -> Tensor:
        """The rewards ``[B]``, or ``[B, D]``, of pictures ``[B, ...]`` under their conditions; differentiable in the
        pictures."""

    def rate(self, pictures: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The rewards, and the probabilities ``[B, K]`` of the classes that it sees on the way; None where it knows
        none."""
        return self(pictures, cond), None


class ClassReward(Reward):
    """The log-probability, at most 0, that a classifier (pictures to logits ``[B, K]``) gives the class asked for."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: Tensor, cond: Cond) -> Tensor:
        return self.rate(pictures, cond)[0]

    def rate(self, pictures: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(pictures)
        if not isinstance(cond, Tensor) or cond.dtype != torch.int64 or cond.shape != logits.shape[:1]:
            raise ValueError("a classifier rates pictures by the class asked for: this model has no class labels")
        if bool((cond < 0).any()) or bool((cond >= logits.shape[1]).any()):
            raise ValueError(f"a classifier of {logits.shape[1]} classes rates labels 0 .. {logits.shape[1] - 1} only")
        told = logits.log_softmax(1)
        return told.gather(1, cond[:, None])[:, 0], told.detach().exp()


class ModuleReward(Reward):
    """A module of somebody's own, called with pictures and conditions."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor, cond: Cond) -> Tensor:
        rewards: Tensor = self.net(pictures, cond)
        return rewards


@singledispatch
def as_reward(module: nn.Module) -> Reward:
    """Somebody's module as a reward, a :class:`Reward` as it is."""
    return ModuleReward(module)


@as_reward.register
def _(module: Reward) -> Reward:
    return module


class Together(Reward):
    """Several rewards, a column each."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(rewards)

    def forward(self, pictures: Tensor, cond: Cond) -> Tensor:
        return self.rate(pictures, cond)[0]

    def rate(self, pictures: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        parts: Any = self.parts
        found = [reward.rate(pictures, cond) for reward in parts]
        classes = next((seen for _, seen in found if seen is not None), None)
        return torch.cat([rewards.reshape(len(pictures), -1) for rewards, _ in found], 1), classes


def hinge(rewards: Tensor, margins: Sequence[float]) -> Tensor:
    """``sum_d relu(margin_d - r_d)`` ``[B]``: no gradient where a reward ``[B]`` or ``[B, D]`` is above its margin.

    ValueError unless there are as many margins as rewards; one margin is that of all.
    """
    columns = rewards[:, None] if rewards.ndim == 1 else rewards
    if columns.ndim != 2 or len(margins) not in (1, columns.shape[1]):
        raise ValueError(
            f"rewards of shape {list(rewards.shape)} for {len(margins)} margins: a reward gives [B], several give "
            "[B, D], with a margin for each or one for all"
        )
    return torch.relu(columns.new_tensor(margins) - columns).sum(1)
