"""Which samples a teacher is asked about, and what it answered: rules, a teacher on a budget, a store of answers.

A rule gives every sample of the pool the probability with which it is asked about; the questions are drawn from these
marginals by dependent rounding, whatever the rule.  What a sample is worth is told by the student alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.condense.game import batch, dependent_rounding
from fewstep.data.dataset import Dataset, Samples, class_labels
from fewstep.digests import model_sha256, tensors_sha256
from fewstep.methods.parts.stores import Store, Tensors
from fewstep.randomness import Rng

#: So many samples go through a network at a time.
AT_A_TIME = 512
RuleName = Literal["rad", "rad-loss", "margin", "uniform"]
#: Marginals ``[n]`` from the gains ``[n]``, the number of samples that the teacher gets wrong, and the queries.
Rule = Callable[[Tensor, float, int], Tensor]


def robust(gains: Tensor, wrong: float, queries: int) -> Tensor:
    """The best against an adversary who chooses the wrong answers, which bring nothing."""
    return batch(gains, wrong, queries).marginals


def robust_to_loss(gains: Tensor, wrong: float, queries: int) -> Tensor:
    """The same where a wrong answer costs what a right one brings."""
    return batch(gains, wrong, queries, cost=2.0).marginals


def largest(gains: Tensor, wrong: float, queries: int) -> Tensor:
    """The largest gains for certain, as if the teacher were always right: margin sampling."""
    return torch.zeros(len(gains), dtype=torch.float64).index_fill(0, gains.topk(queries).indices, 1.0)


def uniform(gains: Tensor, wrong: float, queries: int) -> Tensor:
    """All alike."""
    return torch.full((len(gains),), queries / len(gains), dtype=torch.float64)


RULES: Mapping[str, Rule] = {"rad": robust, "rad-loss": robust_to_loss, "margin": largest, "uniform": uniform}


class Budgeted:
    """A teacher that may be asked about ``budget`` samples, of which ``spent`` are gone: one call is a query for each
    of its samples.  ValueError, and no answer, for more."""

    def __init__(self, teacher: Callable[[Tensor], Tensor], budget: int, spent: int = 0) -> None:
        self.teacher, self.budget, self.spent = teacher, budget, spent

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of samples ``[B, ...]``."""
        if self.spent + len(x) > self.budget:
            raise ValueError(f"{len(x)} queries with {self.spent} of a budget of {self.budget} spent")
        self.spent += len(x)
        return self.teacher(x)


class Answers(nn.Module):
    """What is known of the data: the samples ``labelled`` ``[l]``, those that were ``asked`` ``[m]`` about, and the
    teacher's ``logits`` ``[m, classes]`` for them; all samples by their place in the data."""

    labelled: Tensor
    asked: Tensor
    logits: Tensor

    def __init__(self, labelled: Tensor, asked: Tensor, logits: Tensor) -> None:
        super().__init__()
        for name, tensor in (("labelled", labelled), ("asked", asked), ("logits", logits)):
            self.register_buffer(name, tensor)

    def pool(self, n: int) -> Tensor:
        """The others of ``n`` samples, in order."""
        known = torch.zeros(n, dtype=torch.bool)
        known[torch.cat([self.labelled, self.asked]).cpu()] = True
        return (~known).nonzero().flatten()

    def with_more(self, found: Dataset) -> Answers:
        """These and what a :class:`Questions` store holds."""
        index, logits = found.columns["index"], found.x
        return Answers(
            self.labelled.cpu(), torch.cat([self.asked.cpu(), index]), torch.cat([self.logits.cpu().to(logits), logits])
        )


@dataclass(frozen=True, eq=False)
class Questions(Store):
    """``queries`` samples of the pool by a rule, with the teacher's answers; fewer where the pool is smaller.

    What a sample is worth is one less the ``student``'s margin.  The teacher is taken to be right on a share
    ``accuracy`` of the pool; where that is None it is measured on the labelled samples, which are no queries.
    """

    name: ClassVar[str] = "answers"

    teacher: nn.Module
    student: nn.Module
    data: Samples
    known: Answers
    rule: RuleName
    queries: int
    budget: int
    accuracy: float | None

    @property
    def batches(self) -> int:
        return 1

    def digest(self) -> str:
        models = f"{model_sha256(self.teacher)} {model_sha256(self.student)}"
        known = tensors_sha256(self.known.state_dict().items())
        said = f"{self.rule} {self.queries} {self.budget} {self.accuracy} {self.data.sha256()} {models} {known}"
        return hashlib.sha256(said.encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        if 0 in wanted:
            yield 0, self.answered(Rng(seed, "questions"))

    @torch.no_grad()
    def answered(self, rng: Rng) -> Tensors:
        """The questions drawn, and the answers."""
        pool = self.known.pool(len(self.data))
        gains = torch.cat([gains_of(self.student(x)) for x in shown(self.data, pool, self.student)]).cpu()
        accuracy = self.measured() if self.accuracy is None else self.accuracy
        marginals = RULES[self.rule](gains, (1 - accuracy) * len(pool), min(self.queries, len(pool)))
        drawn = dependent_rounding(marginals, rng)
        teacher = Budgeted(self.teacher, self.budget, spent=len(self.known.asked))
        logits = torch.cat([teacher(x).cpu() for x in shown(self.data, pool[drawn], self.teacher)])
        before = torch.full_like(drawn, len(self.known.asked))  # so that the rounds of a run have an order
        return {
            "logits": logits, "index": pool[drawn], "gain": gains[drawn], "marginal": marginals[drawn],
            "before": before,
        }  # fmt: skip

    @torch.no_grad()
    def measured(self) -> float:
        """The teacher's accuracy on the labelled samples."""
        labels = class_labels(self.data, self.known.labelled.cpu())
        told = [self.teacher(x).argmax(1).cpu() for x in shown(self.data, self.known.labelled.cpu(), self.teacher)]
        return float((torch.cat(told) == labels).double().mean())

    def dataset(self, tensors: Tensors) -> Dataset:
        columns = {name: tensor for name, tensor in tensors.items() if name != "logits"}
        return Dataset("answers", tensors["logits"], columns=columns)


def gains_of(logits: Tensor) -> Tensor:
    """What samples are worth to a student with these logits ``[B, classes]``: one less the margin between its two most
    probable classes, float64 in [0, 1]."""
    first, second = logits.double().softmax(1).topk(2, dim=1).values.unbind(1)
    return 1 - (first - second)


def shown(data: Samples, index: Tensor, net: nn.Module) -> Iterator[Tensor]:
    """Some samples, as a network reads them, a few at a time; as they are for one without weights."""
    place: Any = next(net.parameters(), None)
    for part in index.split(AT_A_TIME):
        x = data.rows(part).x
        assert x is not None
        yield x if place is None else x.to(place)
