"""Language modelling: the next token by cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.language.log_probs import response_mean, token_log_prob
from fewstep.language_models import LanguageModel
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update
from fewstep.methods.start import Start
from fewstep.ranges import Least, NonNegative, Positive

STUDENT = "student"


def counted(batch: Batch) -> Tensor:
    """The tokens ``[B, L]`` of a batch that a loss counts: those of its column "mask", all without."""
    return batch.columns.get("mask", torch.ones_like(batch.x, dtype=torch.bool))


@dataclass(frozen=True)
class LanguageModelling(Method):
    """``-log p(token | tokens before it)``, the mean over the counted tokens of each sequence, then over sequences.

    The data are tokens ``[N, L]``, with a column "mask" where not all are to be learned; padding stands behind.
    """

    name: ClassVar[str] = "language-modelling"
    paper: ClassVar[Paper] = Paper(
        "Language Models are Few-Shot Learners", "2005.14165", "from paper text",
        ("`lr` and `warmup` (375M tokens there) are for small networks and short runs",
         "the mean over tokens is taken in each sequence first, so that a long one counts no more than a short one"),
    )  # fmt: skip
    task = "language"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls from log(vocabulary) towards the entropy of the text, nats a token",
        "student/accuracy": "rises: how often the most likely token is the right one",
    }

    lr: Annotated[Positive, "learning rate at the top"] = 3e-3
    warmup: Annotated[int, Least(0), "steps over which it rises from 0"] = 20
    decay: Annotated[str, "its course over the budget"] = "cosine:0.1"
    weight_decay: Annotated[NonNegative, "decoupled decay of the weights"] = 0.1
    clip: Annotated[Positive | None, "bound on the gradient norm"] = 1.0

    def networks(self, start: Start) -> Networks:
        group = Optimizer(
            (STUDENT,), self.lr, kind="adamw", betas=(0.9, 0.95), weight_decay=self.weight_decay, clip=self.clip,
            warmup=self.warmup, decay=self.decay,
        )  # fmt: skip
        return Networks({STUDENT: start.network()}, {STUDENT: group})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        tokens, mask = batch.x, counted(batch)
        logits = nets.student(tokens)
        loss = -response_mean(token_log_prob(logits, tokens, mask), mask).mean()
        right = (logits[:, :-1].detach().argmax(-1) == tokens[:, 1:]).float()
        yield Update(STUDENT, loss, {"accuracy": response_mean(torch.nn.functional.pad(right, (1, 0)), mask).mean()})

    def student(self, nets: Networks) -> LanguageModel:
        made: LanguageModel = nets.student
        return made
