"""REDI, reinforcement distillation (Xu et al. 2025, arXiv 2505.24850): a policy learns from right and wrong traces.

First from the right ones alone, every token alike (SFT); then from pairs of a right trace ``w`` and a wrong one ``l``
of the same problem, with ``m = log pi(y | x) / |y|``::

    loss = -m_w + alpha m_l

without a reference, without a sigmoid, offline.  DPO, SimPO and the symmetric loss (``alpha = 1``) train in the same
loop (:mod:`fewstep.language.preferences`).

The data are rows of tokens ``[N, L]`` with columns: ``mask`` ``[N, L]``, true on the tokens of the right response, its
end included; ``rejected`` ``[N, L']``, the same prompt with a wrong response, and ``rejected_mask``.  Rows whose
``rejected_mask`` is false everywhere have no wrong response: the first stage alone reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fewstep.data.dataset import Chosen, Samples
from fewstep.language.distill_spec import without_dropout
from fewstep.language.log_probs import (
    response_lengths,
    response_log_probs,
    response_mean,
    response_sum,
    token_entropy,
    token_log_prob,
)
from fewstep.language.preferences import Objective, Pair, REDILoss
from fewstep.language_models import LanguageModel
from fewstep.methods.alarm import Alarm, Drops, Grows
from fewstep.methods.method import (
    Batch,
    Mean,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Recipe,
    Stage,
    System,
    Update,
)
from fewstep.methods.start import Start
from fewstep.ranges import NonNegative, Positive, Share

STUDENT, REFERENCE = "student", "reference"
#: The paper's objective with its alpha of 0.8.
USUAL = REDILoss()
#: The columns of the data.
MASK, REJECTED, REJECTED_MASK = "mask", "rejected", "rejected_mask"

PAPER = Paper(
    "Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning", "2505.24850",
    "verified",
    ("`lr` and `sft_lr` are those of small models (1e-6 and 5e-5 for 1.5 billion weights there)",
     "stages have shares of a budget, not epochs, and the same batch size (128 and 32 there)",
     "the length of a response counts its own tokens, after any cut; the authors' code counts those before it cuts",
     "responses are not cut to a length: rows are read as they are",
     "options without an effect are refused (the authors' file sets `beta` and a reference model in vain)"),
)  # fmt: skip


@dataclass(frozen=True)
class FineTuning(Method):
    """Supervised fine-tuning: the right responses, every token of a batch alike."""

    name: ClassVar[str] = "sft"
    paper: ClassVar[Paper] = Paper(
        PAPER.title, PAPER.arxiv, PAPER.evidence,
        ("`lr` is that of small models (5e-5 for 1.5 billion weights there)",
         "a budget, not epochs; the batch is as large as in the second stage (128 and 32 there)"),
    )  # fmt: skip
    task = "language"
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls: the mean surprise of a token of the responses, in nats",
        "student/chosen_log_prob": "rises towards 0: the mean log-probability of a token, each response alike",
        "student/entropy": "falls with the loss; far below it, the policy is surer than it is right",
    }
    roles: ClassVar[tuple[str, ...]] = (STUDENT,)

    lr: Annotated[NonNegative, "learning rate at its highest"] = 1e-3
    warmup: Annotated[Share, "share of the budget over which it rises from 0; then it falls to 0"] = 0.1
    weight_decay: Annotated[NonNegative, "decoupled decay of the weights"] = 1e-4
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0

    def networks(self, start: Start) -> Networks:
        return Networks({STUDENT: start.network(STUDENT)}, {STUDENT: self.optimizer()})

    def optimizer(self) -> Optimizer:
        """How the policy moves."""
        return Optimizer(
            (STUDENT,), self.lr, "adamw", weight_decay=self.weight_decay, clip=self.clip,
            decay=f"warm-linear:{self.warmup}",
        )  # fmt: skip

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        mask = batch.column(MASK)
        logits = nets.student(batch.x)
        log_p = token_log_prob(logits, batch.x, mask)
        tokens: Any = yield Mean(response_lengths(mask).to(log_p).mean())
        told = {"chosen_log_prob": response_mean(log_p, mask), "entropy": entropies(logits, mask)}
        yield Update(STUDENT, -response_sum(log_p, mask).mean() / tokens, means(told))

    def student(self, nets: Networks) -> LanguageModel:
        made: LanguageModel = nets.student
        return made


@dataclass(frozen=True)
class PreferenceTuning(FineTuning):
    """One objective of pairs; rows without a wrong response are left out.  ValueError where there are no others."""

    name: ClassVar[str] = "preferences"
    paper: ClassVar[Paper] = PAPER
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls without a bound, which says nothing of success (DPO and SimPO: towards 0)",
        "student/chosen_log_prob": "declines slowly; a plunge, with the rejected one, is a collapse",
        "student/rejected_log_prob": "falls, faster than the chosen one",
        "student/ahead": "the share of pairs whose right response is the likelier one a token: rises",
        "student/entropy": "moves little; growth without end says that mass leaks to other tokens",
        "student/grad_norm": "stays within a few times its first value; it spikes in a collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/chosen_log_prob": Drops("lower lr first, then alpha", by=0.2),
        "student/grad_norm": Grows("lower lr first, then alpha", times=5.0),
    }

    objective: Annotated[Objective, "the loss of a pair"] = USUAL
    lr: Annotated[NonNegative, "learning rate at its highest"] = 1e-5

    def sources(self, start: Start) -> Mapping[str, Samples]:
        columns = start.data.rows(slice(None)).columns
        if missing := [name for name in (MASK, REJECTED, REJECTED_MASK) if name not in columns]:
            raise ValueError(f"data '{start.data.name}': no column '{missing[0]}', and {self.name} reads pairs")
        paired = columns[REJECTED_MASK].any(1).nonzero()[:, 0]
        if not len(paired):
            raise ValueError(f"data '{start.data.name}' has no wrong responses: rejected_mask is false everywhere")
        return {"data": Chosen(start.data, paired, start.data.name)}

    def networks(self, start: Start) -> Networks:
        modules: dict[str, Any] = {STUDENT: start.network(STUDENT)}
        if self.objective.reference:
            modules[REFERENCE] = start.model(STUDENT)
        nets = Networks(modules, {STUDENT: self.optimizer()})
        without_dropout(nets.student)
        return nets

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        logits = nets.student(batch.x)
        policy = said(nets.student, batch, logits)
        reference = None
        if self.objective.reference:
            with torch.no_grad():
                reference = said(nets.reference, batch)
        told = {
            "chosen_log_prob": policy.chosen.mean, "rejected_log_prob": policy.rejected.mean,
            "ahead": (policy.chosen.mean > policy.rejected.mean).float(),
            "entropy": entropies(logits, batch.column(MASK)),
        }  # fmt: skip
        yield Update(STUDENT, self.objective.loss(policy, reference).mean(), means(told))


def said(model: LanguageModel, batch: Batch, logits: Tensor | None = None) -> Pair:
    """What a model says of the responses of a batch; ``logits`` are those of the right ones where they are known."""
    rejected = batch.column(REJECTED)
    chosen = response_log_probs(model(batch.x) if logits is None else logits, batch.x, batch.column(MASK))
    return Pair(chosen, response_log_probs(model(rejected), rejected, batch.column(REJECTED_MASK)))


def entropies(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean entropy of a token of each response ``[B]``."""
    return response_mean(token_entropy(logits.detach(), mask), mask)


def means(told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What there is to log, of numbers ``[B]`` by name."""
    return {name: values.detach().mean() for name, values in told.items()}


@dataclass(frozen=True)
class REDI(Recipe):
    """SFT on the right responses, then an objective of pairs from there; ``sft_share`` 0 starts from a tuned policy."""

    name: ClassVar[str] = "redi"
    paper: ClassVar[Paper] = PAPER
    system: ClassVar[System] = System(
        "REDI", 2025, "language", "right and wrong traces", "1 a token",
        "learns from a teacher's wrong traces too, without a reference",
        real="redi_real",
    )  # fmt: skip
    task = "language"
    roles: ClassVar[tuple[str, ...]] = (STUDENT,)

    objective: Annotated[Objective, "the loss of a pair"] = USUAL
    sft_share: Annotated[Share, "share of the budget for the right responses alone, before the pairs"] = 0.5
    sft_lr: Annotated[NonNegative, "learning rate of that stage at its highest"] = 1e-3
    lr: Annotated[NonNegative, "learning rate of the pairs at its highest"] = 1e-5
    warmup: Annotated[Share, "share of a stage over which the rate rises from 0; then it falls to 0"] = 0.1
    weight_decay: Annotated[NonNegative, "decoupled decay of the weights"] = 1e-4
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0

    def stages(self) -> list[Stage]:
        shared: dict[str, Any] = {name: getattr(self, name) for name in ("warmup", "weight_decay", "clip")}
        return [
            Stage(FineTuning(lr=self.sft_lr, **shared), self.sft_share),
            Stage(PreferenceTuning(lr=self.lr, objective=self.objective, **shared), 1 - self.sft_share),
        ]
