"""Feedback: a student's samples are decoded to pictures and pushed until a reward is content with them."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.methods.alarm import Falls
from fewstep.methods.method import Mean
from fewstep.methods.start import Start
from fewstep.networks.classifier import BUNDLED, bundled_classifier
from fewstep.networks.latents import decode
from fewstep.rewards import ClassReward, Reward, as_reward, hinge
from fewstep.sampling.inputs import weights_of
from fewstep.values import Written, check, suggestion

#: The role of a reward that the user brings.
ROLE = "reward"
NONE, GIVEN = "none", "given"
CLASSIFIERS = tuple(f"classifier:{name}" for name in BUNDLED)
CHOICES = (NONE, GIVEN, *CLASSIFIERS)

#: When feedback goes wrong: the reward is met by fewer kinds of samples.
FEW_CLASSES = Falls("samples become of few classes, the reward is hacked: lower its margins, its weight or lr", 0.6)


@dataclass(frozen=True)
class Feedback(Written):
    """A hyper-parameter that says what rates samples: ``given``, a module that the user brings in the role "reward";
    ``classifier:digits`` or ``classifier:fashion``, the bundled classifiers' log-probability of the class asked for;
    or ``none``.  ValueError for another word."""

    shown: ClassVar[str] = "|".join(CHOICES)

    by: str = NONE

    def __post_init__(self) -> None:
        if self.by not in CHOICES:
            raise ValueError(f"'{self.by}' is not one of {', '.join(CHOICES)}{suggestion(self.by, CHOICES)}")

    @classmethod
    def parse(cls, text: str) -> Feedback:
        return cls(text)

    @classmethod
    def from_plain(cls, value: Any) -> Feedback:
        return cls(check(str, value))

    def __str__(self) -> str:
        return self.by

    def __bool__(self) -> bool:
        return self.by != NONE

    def check_given(self, brought: bool) -> None:
        """ValueError where a reward was brought that nothing asks, or none for what asks."""
        if brought and self.by != GIVEN:
            raise ValueError(f"feedback={self}: a reward was brought, which feedback=given asks")
        if self.by == GIVEN and not brought:
            raise ValueError(f"feedback=given asks a reward, and none was brought; {', '.join(CLASSIFIERS)} are there")

    def reward(self, start: Start) -> Reward:
        """What rates the samples of a stage."""
        self.check_given(ROLE in start.given)
        if not self:
            raise ValueError(f"feedback=none: nothing rates samples; choose from {', '.join(CHOICES[1:])}")
        if self.by == GIVEN:
            return as_reward(copy.deepcopy(start.given[ROLE]))
        return ClassReward(bundled_classifier(self.by.partition(":")[2]))


#: No feedback.
NO_FEEDBACK = Feedback()


def feedback_loss(
    reward: Reward, model: nn.Module, x: Tensor, cond: Cond, margins: Sequence[float]
) -> Generator[Mean, Tensor, tuple[Tensor, dict[str, Tensor]]]:
    """``mean sum_d relu(margin_d - r_d)`` of a model's samples ``x``, rated as pictures, and what there is to record of
    a reward that is hacked: its mean, and where it knows classes the entropy (nats) of those that it sees in the whole
    batch::

        loss, logs = yield from feedback_loss(nets.reward, nets.student, x, batch.cond, margins)
    """
    pictures = decode(model, x)
    with torch.autocast(x.device.type, enabled=False):
        rewards, classes = reward.rate(pictures.to(weights_of(reward, pictures)), cond)
        loss = hinge(rewards, margins).mean()
    if len(rewards) != len(x):
        raise ValueError(f"the reward gave {len(rewards)} numbers for {len(x)} pictures: it must give one a picture")
    logs = {"reward": rewards.detach().mean()}
    if classes is not None:
        share = yield Mean(classes.mean(0))
        logs["class_entropy"] = -(share * share.clamp_min(1e-12).log()).sum()
    return loss, logs
