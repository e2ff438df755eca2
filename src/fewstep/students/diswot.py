"""DisWOT: a student's architecture for a teacher, found without training (Dong, Li, Wei 2023, arXiv 2303.15678).

The students are residual networks of three stages.  Each candidate is scored by how alike it and the teacher see a few
batches with random weights (:mod:`fewstep.students.proxies`), evolution looks for the best within a budget of
parameters (:mod:`fewstep.students.evolution`), and the one that is found is trained by distillation::

    loss = (1 - alpha) CE + alpha T^2 KL(teacher || student) + beta_r relation + beta_s semantic

where the last two are the scores as losses against the *trained* teacher, switched off by default.

What the official code does otherwise, and we do not: its evolution on NAS-Bench-201 draws parents from the *worst* of a
tournament, filters only the first individual by the budget, and lets the teacher's gradients add up over candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.supervised import STUDENT, Supervised, accuracy_of, labels_in, nll
from fewstep.data.dataset import Dataset, Samples, class_labels, every_label
from fewstep.digests import model_sha256
from fewstep.divergences import kl
from fewstep.methods.method import Batch, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.stores import Store, Tensors
from fewstep.methods.start import Start
from fewstep.networks.classifiers import Norm, ResNet
from fewstep.networks.feature_nets import as_feature_net
from fewstep.randomness import Rng
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.students.evolution import Individual, evolve, fitting
from fewstep.students.proxies import Scorer, flops, parameters, split_half_tau, z_sum
from fewstep.students.relations import RELATIONS, activation_weights, semantic

ProxyName = Literal["relation", "semantic", "ickd", "at", "pkt", "cc", "rkd", "fitnet", "naswot", "synflow"]
#: DisWOT's two scores, of which the first needs no equal widths.
USUAL: tuple[ProxyName, ...] = ("relation", "semantic")
#: Proxies that compare channel by channel.
SAME_WIDTH = ("semantic", "ickd", "fitnet")


@dataclass(frozen=True)
class Space:
    """Residual networks: ``depths`` blocks to choose from for each of three stages, and ``widths`` channels."""

    shape: tuple[int, ...]
    classes: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    norm: Norm = "batch"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices at each coordinate."""
        return (len(self.depths),) * 3 + (len(self.widths),)

    def build(self, individual: Individual) -> NetworkClassifier:
        """The student, with some first weights."""
        *stages, width = individual
        chosen = tuple(self.depths[i] for i in stages)
        net = ResNet(self.shape, self.classes, self.widths[width], chosen, self.norm)  # type: ignore[arg-type]
        return NetworkClassifier(net, self.shape, self.classes)

    def parameters(self, individual: Individual) -> int:
        """How many a student has."""
        return int(parameters(self.build(individual), torch.zeros(0)))

    def midway(self) -> int:
        """The mean of the parameters of the smallest and the largest student."""
        few, many = (
            tuple(pick(range(len(choices)), key=choices.__getitem__) for choices in (*[self.depths] * 3, self.widths))
            for pick in (min, max)
        )
        return (self.parameters(few) + self.parameters(many)) // 2

    def said(self, individual: Individual) -> list[int]:
        """Blocks of the three stages, and channels."""
        *stages, width = individual
        return [*(self.depths[i] for i in stages), self.widths[width]]


@dataclass(frozen=True, eq=False)
class Search(Store):
    """The students that evolution has scored, in the order in which they came.

    ``student`` ``[n, 4]`` (blocks and channels), ``scores`` ``[n, draws, proxies]``, ``total`` ``[n]``, the sum of
    their mean scores in units of the spread over random students within the budgets, ``parameters`` ``[n]``, and
    ``agreement`` ``[n, proxies]``, how far two halves of the draws agree on the ranking (the same in all rows).
    """

    name: ClassVar[str] = "search"

    teacher: NetworkClassifier
    data: Samples
    space: Space
    proxies: tuple[str, ...]
    draws: int
    batch: int
    population: int
    tournament: int
    evaluations: int
    max_parameters: int
    max_flops: int

    @property
    def batches(self) -> int:
        return 1

    def digest(self) -> str:
        numbers = (
            self.proxies, self.draws, self.batch, self.population, self.tournament, self.evaluations,
            self.max_parameters, self.max_flops,
        )  # fmt: skip
        said = f"{self.space} {numbers} {self.data.sha256()} {model_sha256(self.teacher)}"
        return hashlib.sha256(said.encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        if 0 in wanted:
            yield 0, self.found(Rng(seed, "search"))

    def found(self, rng: Rng) -> Tensors:
        """All that evolution scored."""
        scorer, place = Scorer(self.teacher, self.shown(rng), self.proxies, rng.stream("weights")), self.place()

        @cache
        def scores(individual: Individual) -> Tensor:
            return scorer(self.space.build(individual).to(place))

        fits = cache(self.fits)
        some, draw = self.space.sizes, rng.stream("reference")
        reference = {fitting(some, draw, fits) for _ in range(self.population)}
        spread = torch.stack([scores(one).mean(0) for one in sorted(reference)], 1)

        def total(individual: Individual) -> float:
            return float(z_sum(scores(individual).mean(0)[:, None], spread))

        evolved = evolve(
            total, some, rng.stream("evolution"), fits=fits, population=self.population, tournament=self.tournament,
            evaluations=self.evaluations,
        )  # fmt: skip
        students = list(evolved.scores)
        each = torch.stack([scores(one) for one in students])
        agreement = [split_half_tau(each[:, :, k].mT, rng.stream("halves")) for k in range(len(self.proxies))]
        return {
            "student": torch.tensor([self.space.said(one) for one in students]),
            "scores": each,
            "total": torch.tensor([evolved.scores[one] for one in students], dtype=torch.float64),
            "parameters": torch.tensor([self.space.parameters(one) for one in students]),
            "agreement": torch.tensor(agreement, dtype=torch.float64).expand(len(students), -1).clone(),
        }

    def place(self) -> Any:
        """Where the teacher is, and its type of numbers."""
        return next(self.teacher.parameters())

    def shown(self, rng: Rng) -> list[tuple[Tensor, Tensor]]:
        """A batch for every draw."""
        found = []
        for d in range(self.draws):
            index = rng.stream(f"batch {d}").shuffled(len(self.data))[: self.batch]
            x = self.data.rows(index).x
            assert x is not None
            found.append((x.to(self.place()), class_labels(self.data, index).to(self.place().device)))
        return found

    def fits(self, individual: Individual) -> bool:
        """Whether a student is within the budgets."""
        if self.space.parameters(individual) > self.max_parameters:
            return False
        if not self.max_flops:
            return True
        return flops(self.space.build(individual), torch.zeros(1, *self.space.shape)) <= self.max_flops

    def dataset(self, tensors: Tensors) -> Dataset:
        columns = {name: tensor for name, tensor in tensors.items() if name != "scores"}
        return Dataset("search", tensors["scores"], columns=columns)


@dataclass(frozen=True)
class DisWOT(Supervised):
    """Searches a student without training, and trains it by distillation."""

    name: ClassVar[str] = "diswot"
    paper: ClassVar[Paper] = Paper(
        "DisWOT: Student Architecture Search for Distillation WithOut Training", "2303.15678", "verified",
        ("`depths`, `batch_scored`, `population`, `tournament`: for small pictures; the search space of residual "
         "networks is 1, 3, 5, 7 blocks a stage, evolution's numbers those of the official search on NAS-Bench-201",
         "`draws`: scores are means over several batches and weights, since two single ones hardly agree",
         "scores are added in units of their spread over random students; the official ranking adds them as they are, "
         "which leaves the semantic one",
         "`proxies`: both scores where students have the teacher's width, the relation alone where they need not",
         "evolution takes the best of a tournament, and every individual fits the budget; the official code takes one "
         "of the worst, and filters the first",
         "the teacher's activation weights are those of each batch alone; the official scripts add them up",
         "momentum is Nesterov's; `decay`: a cosine, the official recipe has steps over 240 epochs"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "DisWOT", 2023, "students", "teacher, labelled data", "-",
        "searches a student architecture without training, by similarity to the teacher", real="diswot_real",
    )  # fmt: skip
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls", "student/agreement": "with the teacher, rises towards 1",
    }  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ()

    depths: Annotated[tuple[Count, ...], "blocks to choose from in each of three stages"] = (1, 2, 3)
    widths: Annotated[tuple[Count, ...] | None, "channels of the first stage to choose from; none: the teacher's"] = (
        None
    )
    student_norm: Annotated[Norm, "normalisation of the students"] = "batch"
    max_parameters: Annotated[
        int, Least(0), "most parameters of a student; 0: midway between the smallest and the largest"
    ] = 0
    max_flops: Annotated[int, Least(0), "most operations of a student for a sample; 0: no limit"] = 0
    proxies: Annotated[
        tuple[ProxyName, ...] | None,
        "the scores that are put together; none: relation and semantic, the relation alone for widths unlike the "
        "teacher's",
    ] = None
    draws: Annotated[Count, "batches and weights by which each student is scored"] = 8
    batch_scored: Annotated[Count, "samples in each of those batches"] = 64
    population: Annotated[Count, "students alive in evolution"] = 16
    tournament: Annotated[Count, "those of them that are compared for a parent"] = 4
    evaluations: Annotated[Count, "students made by evolution in all"] = 60
    alpha: Annotated[Share, "weight of the teacher's word; that of the labels is 1 - alpha"] = 0.9
    temperature: Annotated[Positive, "of both laws; the KL counts its square"] = 4.0
    relation_weight: Annotated[NonNegative, "weight of the relation as a loss, beta_r"] = 0.0
    semantic_weight: Annotated[NonNegative, "weight of the semantic similarity as a loss, beta_s"] = 0.0
    lr: Annotated[Positive, "learning rate at the start"] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proxies is not None and (not self.proxies or len(set(self.proxies)) < len(self.proxies)):
            raise ValueError(f"diswot: proxies={','.join(self.proxies)} must name one or more, each once")
        if self.tournament > self.population:
            raise ValueError(f"diswot: tournament={self.tournament} is larger than the population={self.population}")
        if self.draws < 2:
            raise ValueError(f"diswot: draws={self.draws} must be at least 2, or nobody knows how far they agree")

    def search(self, start: Start) -> Search:
        """What is searched; ValueError where it cannot be."""
        teacher: NetworkClassifier = start.model()
        reads = teacher.head.in_features
        if not self.widths and reads % 4:
            raise ValueError(
                f"diswot: students whose head reads the teacher's {reads} features do not exist: a residual network's "
                "reads 4 times its width; give widths"
            )
        widths = self.widths or (reads // 4,)
        alike = all(4 * width == reads for width in widths)
        proxies = self.proxies or (USUAL if alike else USUAL[:1])
        compared = [name for name in proxies if name in SAME_WIDTH] + ["semantic_weight"] * (self.semantic_weight > 0)
        if compared and not alike:
            raise ValueError(
                f"diswot: {', '.join(compared)} compares channel by channel, and needs a head that reads {reads} "
                f"features as the teacher's does: 4 times widths={','.join(map(str, widths))}; leave it out"
            )
        every_label(start.data)
        space = Space(teacher.shape, teacher.classes, self.depths, widths, self.student_norm)
        most = self.max_parameters or space.midway()
        return Search(
            teacher, start.data, space, proxies, self.draws, self.batch_scored, self.population, self.tournament,
            self.evaluations, most, self.max_flops,
        )  # fmt: skip

    def networks(self, start: Start) -> Networks:
        search = self.search(start)
        found = start.store(search)
        *depths, width = found.columns["student"][int(found.columns["total"].argmax())].tolist()
        space = search.space
        best = space.build((*(space.depths.index(d) for d in depths), space.widths.index(width)))
        student = NetworkClassifier(start.fresh(best.net), space.shape, space.classes)
        return Networks({STUDENT: student, "teacher": start.model()}, {STUDENT: self.optimizer()})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x, labels = self.views(batch.x, batch.rng), labels_in(batch)
        with torch.no_grad():
            their_features, told = nets.teacher.read(x)
        features, logits = nets.student.read(x)
        loss = (1 - self.alpha) * nll(logits, labels)
        loss = loss + self.alpha * self.temperature**2 * kl(told, logits, self.temperature).mean()
        logs: dict[str, Tensor] = {"agreement": accuracy_of(logits, told.argmax(1))}
        if self.relation_weight:
            with torch.no_grad():
                theirs = last_map(nets.teacher, x)
            apart = RELATIONS["sp"](last_map(nets.student, x), theirs)
            loss, logs["relation"] = loss + self.relation_weight * apart, apart.detach()
        if self.semantic_weight:
            ours = activation_weights(logits, features, labels)
            apart = semantic(ours, activation_weights(told, their_features, labels))
            loss, logs["semantic"] = loss + self.semantic_weight * apart, apart.detach()
        yield Update(STUDENT, loss, logs)


def last_map(model: NetworkClassifier, x: Tensor) -> Tensor:
    """What a classifier's network sees before pooling."""
    net: nn.Module = model.net
    return as_feature_net(net).maps(x)[-1]
