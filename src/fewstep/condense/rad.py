"""RAD, robust active distillation (Baykal et al. 2022, arXiv 2210.01213): few questions to a teacher often wrong.

Few samples have labels, many have none, and the teacher may be asked about some of them.  In rounds the student learns
from all that is known, says of every sample of the pool how unsure it is, and questions are drawn::

    g_i = 1 - margin of the student at sample i            (never asks the teacher)
    K   = (1 - accuracy of the teacher) * size of the pool
    q   = the best marginals against an adversary who chooses the K wrong answers (fewstep.condense.game)

A question that a student is unsure of is often one that the teacher gets wrong too; ``q`` spreads over as many of them
as ``K`` asks for, and there is nothing to tune.  The student's loss is the cross entropy where there is a label, and
the KL to the teacher's law where there is an answer.

Each round is a stage, which hands on the student and the answers; a run folder keeps the answers, so that a resumed run
asks nothing twice.  No official code was found: the solution of the game was derived again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.queries import Answers, Questions, RuleName
from fewstep.condense.select import stratified
from fewstep.condense.supervised import STUDENT, Supervised, accuracy_of
from fewstep.data.dataset import Dataset, Samples, class_labels
from fewstep.divergences import kl, log_law
from fewstep.methods.method import Batch, Networks, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Positive, Share

PAPER = Paper(
    "Robust Active Distillation", "2210.01213", "reconstructed",
    ("no official code: the abstract, and a solution of the game that was derived again and held to linear programs",
     "the marginals of a batch without replacement, and how they are drawn, are ours",
     "networks, rounds, queries and learning rates are those of small pictures; the paper's could not be read",
     "the student goes on from the last round instead of from first weights"),
)  # fmt: skip
#: The role of what is known of the data.
ANSWERS = "answers"


@dataclass(frozen=True)
class RADRound(Supervised):
    """One round: ask ``queries`` questions by a rule (none in the first round), and learn from all that is known."""

    name: ClassVar[str] = "rad-round"
    paper: ClassVar[Paper] = PAPER
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls within a round; starts higher in the next, whose answers are the hard ones",
        "student/agreement": "with labels and the teacher's answers, rises towards 1: wrong answers are learned too",
    }

    rule: RuleName = "rad"
    queries: int = 0
    budget: int = 0
    labels_per_class: int = 3
    accuracy: float | None = None
    temperature: float = 1.0

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {"data": self.lesson(start, self.known(start))}

    def networks(self, start: Start) -> Networks:
        student = unlearned(start) if nobody_brings_one(start) else start.network()
        return Networks({STUDENT: student, ANSWERS: self.known(start)}, {STUDENT: self.optimizer()})

    def known(self, start: Start) -> Answers:
        """All labels and answers of this round."""
        if ANSWERS not in start.made:
            labelled = kept(class_labels(start.data), self.labels_per_class, Rng(start.seed, "labels"))
            known = Answers(labelled, labelled[:0], torch.zeros(0, start.teacher.classes))
        else:
            known = start.model(ANSWERS)
        if not self.queries or not len(known.pool(len(start.data))):  # nothing is left to ask about
            return known
        student = unlearned(start) if nobody_brings_one(start) else start.model(STUDENT)
        asked = Questions(
            start.teacher, student, start.data, known, self.rule, self.queries, self.budget, self.accuracy
        )
        return known.with_more(start.store(asked))

    def lesson(self, start: Start, known: Answers) -> Dataset:
        """What the student learns from: labelled samples, and others (label -1) with the teacher's ``logits``."""
        labelled, asked = known.labelled.cpu(), known.asked.cpu()
        x = start.data.rows(torch.cat([labelled, asked])).x
        assert x is not None
        labels = torch.cat([class_labels(start.data, labelled), torch.full_like(asked, -1)])
        nothing = known.logits.new_zeros(len(labelled), start.teacher.classes)
        soft = torch.cat([nothing, known.logits]).cpu()
        return Dataset(start.data.name, x, labels, start.data.class_names, {"logits": soft})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        logits, soft = nets.student(self.views(batch.x, batch.rng)), batch.column("logits").to(batch.x)
        labels = batch.cond
        assert isinstance(labels, Tensor)
        loss = learned(logits, labels, soft, self.temperature).mean()
        told = torch.where(labels < 0, soft.argmax(1), labels)
        yield Update(STUDENT, loss, {"agreement": accuracy_of(logits, told)})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {STUDENT: nets.student, ANSWERS: nets.answers}


@dataclass(frozen=True)
class RAD(Recipe):
    """A round on the labels alone, and ``rounds`` with questions."""

    name: ClassVar[str] = "rad"
    paper: ClassVar[Paper] = PAPER
    system: ClassVar[System] = System(
        "RAD", 2022, "condense", "teacher, a few labels, unlabelled data", "-",
        "asks a teacher that is often wrong few questions, safe against the worst case", real="rad_real",
    )  # fmt: skip
    task = "classification"
    roles: ClassVar[tuple[str, ...]] = (STUDENT,)

    rule: Annotated[RuleName, "how questions are chosen; margin and uniform are there to compare with"] = "rad"
    rounds: Annotated[Count, "rounds of questions"] = 4
    queries: Annotated[Count, "questions in each"] = 40
    labels_per_class: Annotated[
        Count, "labels kept of each class, the others are hidden; data with unlabelled samples (-1) keep all theirs"
    ] = 3
    accuracy: Annotated[
        Share | None, "the teacher's accuracy on the pool; none measures it on the labels, which it must not have seen"
    ] = None
    temperature: Annotated[Positive, "of both laws where the student learns from answers"] = 1.0
    lr: Annotated[Positive, "learning rate at the start of each round"] = 0.05
    momentum: Annotated[Share, "Nesterov's momentum"] = 0.9
    weight_decay: Annotated[NonNegative, "L2 penalty"] = 5e-4

    def stages(self) -> list[Stage]:
        return [Stage(self.round(0)), *(Stage(self.round(self.queries)) for _ in range(self.rounds))]

    def round(self, queries: int) -> RADRound:
        """A round of so many questions."""
        return RADRound(
            lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, rule=self.rule, queries=queries,
            budget=self.rounds * self.queries, labels_per_class=self.labels_per_class, accuracy=self.accuracy,
            temperature=self.temperature,
        )  # fmt: skip


def nobody_brings_one(start: Start) -> bool:
    """Whether there is no student yet; the teacher is none."""
    return STUDENT not in start.made and STUDENT not in start.given


def unlearned(start: Start) -> NetworkClassifier:
    """A student of the teacher's architecture that knows nothing of what it has learned; ValueError for a teacher
    without weights, as one that is asked over a network."""
    made = start.network()
    place = next(made.parameters(), None)
    if place is None:
        raise ValueError("rad: the teacher has no weights, which a student could have of its own: bring a student")
    return NetworkClassifier(start.fresh(made.net).to(place), made.shape, made.classes)


def kept(labels: Tensor, per_class: int, rng: Rng) -> Tensor:
    """The samples whose label counts: all that have one, or, where every sample has, so many drawn of each class; in
    their order.  ValueError when none has, or a class has not so many."""
    given = (labels >= 0).nonzero().flatten()
    if not len(given):
        raise ValueError("rad: no sample has a label; it learns from some labels and asks about samples without (-1)")
    if len(given) < len(labels):
        return given
    try:
        return stratified(labels, per_class, rng).sort().values
    except ValueError as error:  # too many, by the name of the field
        raise ValueError(f"rad: labels_{error}") from None


def learned(logits: Tensor, labels: Tensor, soft: Tensor, temperature: float) -> Tensor:
    """The loss ``[B]``: the cross entropy where there is a label, the KL to the teacher's law where that is -1."""
    hard = -log_law(logits).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels < 0, kl(soft, logits, temperature), hard)
