"""Robust active distillation: what a round asks, what it may spend, and what the student learns from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fewstep as fs
from fewstep.classifiers import NetworkClassifier
from fewstep.condense import queries
from fewstep.condense.game import batch
from fewstep.condense.queries import RULES, Answers, Budgeted, Questions, gains_of
from fewstep.condense.rad import RAD, RADRound, kept, learned
from fewstep.data import Dataset
from fewstep.methods.start import Start
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.rad import figures
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, train

SHAPE, CLASSES, N = (1, 4, 4), 3, 60
SETTINGS = Settings(Budget(6), batch=8, precision="fp32")
#: What the paper's authors used could not be read; the rule is theirs.
PUBLISHED = {
    "rule": "rad",
    **dict.fromkeys(
        ("rounds", "queries", "labels_per_class", "accuracy", "temperature", "lr", "momentum", "weight_decay"), ...
    ),
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}


def classifier(seed: int) -> NetworkClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NetworkClassifier(MLPClassifier(SHAPE, CLASSES, width=8), SHAPE, CLASSES).eval()


def data(labelled: int = 9) -> Dataset:
    x = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(N) < labelled, torch.arange(N) % CLASSES, -1)
    return Dataset("points", x, labels, ("a", "b", "c"))


def run(recipe: RAD, folder: Path | None = None, teacher: nn.Module | None = None) -> Result:
    return run_recipe(recipe, teacher or classifier(0), data(), SETTINGS, folder, show=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the teacher was asked about in each call, whoever made a copy of it."""
    calls: list[int] = []
    plain = Budgeted.__call__

    def counted(self: Budgeted, x: Tensor) -> Tensor:
        calls.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(Budgeted, "__call__", counted)
    return calls


class Counting(MLPClassifier):
    """Counts what goes through networks that know the teacher's mark, copies of it too."""

    seen: list[int]

    def forward(self, x: Tensor) -> Tensor:
        if float(self.head.bias[0].detach()) == 0.125:
            self.seen.append(len(x))
        return super().forward(x)


def counting() -> NetworkClassifier:
    """A teacher that counts all that it is shown."""
    Counting.seen = []
    net = Counting(SHAPE, CLASSES, width=8)
    with torch.no_grad():
        net.head.bias[0] = 0.125
    return NetworkClassifier(net, SHAPE, CLASSES).eval()


def test_a_budget_is_kept() -> None:
    """Every sample counts; what would go beyond gets no answer at all."""
    calls: list[int] = []

    def teacher(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    oracle = Budgeted(teacher, 10, spent=2)
    oracle(torch.zeros(5, 1))
    with pytest.raises(ValueError, match="4 queries with 7 of a budget of 10 spent"):
        oracle(torch.zeros(4, 1))
    oracle(torch.zeros(3, 1))
    assert calls == [5, 3] and oracle.spent == 10


@pytest.mark.parametrize("rule", RULES)
def test_the_teacher_is_asked_what_the_budget_says_and_no_more(rule: str) -> None:
    """Gains never ask it: all that a run shows it are ``rounds * queries`` samples, and where its accuracy is to be
    measured the labelled ones, once a round."""
    teacher = counting()
    given = RAD(rule=rule, rounds=2, queries=5, accuracy=0.8)  # type: ignore[arg-type]
    student = classifier(1)
    made = run_recipe(given, teacher, data(), SETTINGS, given={"student": student}, show=False).made["answers"]
    assert sum(Counting.seen) == 2 * 5 == len(made.asked)
    Counting.seen.clear()
    measured = dataclasses.replace(given, accuracy=None)
    run_recipe(measured, teacher, data(), SETTINGS, given={"student": student}, show=False)
    assert sum(Counting.seen) == 2 * 5 + 2 * 9


def test_the_first_round_knows_the_labels_alone() -> None:
    """Then as many as asked for, and together they may ask as often as the rounds do."""
    rounds: list[Any] = [stage.method for stage in RAD(rounds=3, queries=7).stages()]
    assert [method.queries for method in rounds] == [0, 7, 7, 7]
    assert {method.budget for method in rounds} == {21}


def test_answers_are_the_teachers_and_nothing_is_asked_twice() -> None:
    made: Any = run(RAD(rounds=3, queries=10, accuracy=0.5)).made["answers"]
    everything = torch.cat([made.labelled, made.asked])
    assert len(everything.unique()) == 9 + 3 * 10
    assert made.labelled.tolist() == list(range(9))
    with torch.no_grad():
        assert torch.allclose(made.logits, classifier(0)(data().x[made.asked]), atol=1e-6)


def test_questions_of_earlier_rounds_count(asked: list[int]) -> None:
    """A budget that other rounds have spent answers nothing."""
    known = Answers(torch.arange(9), torch.arange(9, 14), torch.zeros(5, CLASSES))
    spent = Questions(classifier(0), classifier(1), data(), known, "rad", 5, 9, 0.5)
    with pytest.raises(ValueError, match="5 queries with 5 of a budget of 9 spent"):
        spent.answered(Rng(0))
    assert len(dataclasses.replace(spent, budget=10).answered(Rng(0))["logits"]) == 5


def test_a_pool_that_is_used_up_ends_the_questions(asked: list[int]) -> None:
    """The third round asks about what is left, and the others learn on."""
    made: Any = run(RAD(rounds=5, queries=20, accuracy=0.5)).made["answers"]
    assert asked == [20, 20, 11] and len(made.asked) == N - 9 == len(made.asked.unique())


class Remote(nn.Module):
    """A teacher that is asked over a network: no weights here."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES]


def test_a_teacher_may_be_without_weights() -> None:
    """It answers all the same; but a student of its architecture there is not."""
    teacher, recipe = NetworkClassifier(Remote(), SHAPE, CLASSES), RAD(rounds=1, queries=5)
    made: Any = run_recipe(recipe, teacher, data(), SETTINGS, given={"student": classifier(1)}, show=False).made
    assert torch.equal(made["answers"].logits, data().x[made["answers"].asked].flatten(1)[:, :CLASSES])
    with pytest.raises(ValueError, match="no weights, which a student could have of its own: bring a student"):
        run(recipe, teacher=teacher)


def own(seed: int) -> NetworkClassifier:
    """Somebody's network for colour pictures of 16x16 and five classes."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
            nn.Linear(128, 5),
        )  # fmt: skip
    return NetworkClassifier(net, (3, 16, 16), 5)


@pytest.mark.parametrize("brought", [False, True])
def test_networks_and_data_of_ones_own(brought: bool) -> None:
    """With batch statistics, which asking leaves alone; 2 labels a class, 2 rounds of 7 questions."""
    gen, labels = torch.Generator().manual_seed(0), torch.arange(80) % 5
    mine = Dataset("mine", torch.randn(80, 3, 16, 16, generator=gen), labels)
    teacher = own(0)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recipe = RAD(rounds=2, queries=7, labels_per_class=2, accuracy=0.8)
    student = own(1) if brought else None
    made = fs.distill(teacher, recipe, mine, "9 steps", batch=8, student=student, show=False)
    assert made(mine.x[:3]).shape == (3, 5) and not made.training
    assert int(made.net[1].num_batches_tracked) == 9  # of training, and nothing else
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_finished_run_asks_nothing_again(tmp_path: Path, asked: list[int]) -> None:
    """The answers lie in the run folder, once for sources and networks, and for a run that is called again."""
    recipe = RAD(rounds=2, queries=5, accuracy=0.5)
    first = run(recipe, tmp_path / "run")
    assert asked == [5, 5]
    again = run(recipe, tmp_path / "run")
    assert asked == [5, 5]
    assert torch.equal(first.made["answers"].asked, again.made["answers"].asked)  # type: ignore[arg-type]


def test_gains_are_those_of_the_student_of_the_last_round() -> None:
    """Margin selection, by hand: a second round asks what the first one's student is least sure of in what is left."""
    teacher, points, made = classifier(0), data(), {}
    known: set[int] = set(range(9))
    for queries_ in (0, 6, 6):
        method = RADRound(rule="margin", queries=queries_, budget=12, accuracy=0.5)
        start = Start(teacher, points, made=made)
        if queries_:
            pool = torch.tensor([i for i in range(N) if i not in known])
            with torch.no_grad():
                first, second = made["student"](points.x[pool]).softmax(1).topk(2, dim=1).values.unbind(1)
            expected = set(pool[(1 - first + second).topk(queries_).indices].tolist())
        made = train(method, start, Settings(Budget(30), batch=8, precision="fp32"), show=False).made
        if queries_:
            assert set(made["answers"].asked[-6:].tolist()) == expected  # type: ignore[index]
            known |= expected


def test_the_adversary_knows_how_many_answers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """``K = (1 - accuracy) * pool``, of the pool that is left."""
    seen: list[tuple[int, float, int]] = []

    def spy(gains: Tensor, wrong: float, count: int) -> Tensor:
        seen.append((len(gains), wrong, count))
        return batch(gains, wrong, count).marginals

    monkeypatch.setitem(queries.RULES, "rad", spy)  # type: ignore[arg-type]
    run(RAD(rounds=2, queries=5, accuracy=0.75))
    assert seen == [(51, pytest.approx(0.25 * 51), 5), (46, pytest.approx(0.25 * 46), 5)]


def test_the_accuracy_is_measured_on_the_labels() -> None:
    teacher, points = classifier(0), data()
    with torch.no_grad():
        right = float((teacher(points.x[:9]).argmax(1) == points.labels[:9]).double().mean())  # type: ignore[index]
    assert 0 < right < 1
    known = Answers(torch.arange(9), torch.zeros(0, dtype=torch.int64), torch.zeros(0, CLASSES))
    assert Questions(teacher, teacher, points, known, "rad", 5, 5, None).measured() == pytest.approx(right)


def test_a_gain_is_one_less_the_margin() -> None:
    """1 where two classes tie, next to 0 where one is sure."""
    logits = torch.tensor([[0.0, 0.0, -5.0], [20.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    p = logits[2].double().softmax(0)
    assert gains_of(logits).tolist() == pytest.approx([1.0, 0.0, 1 - float(p[2] - p[0])], abs=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_marginals_of_the_batch(rule: str) -> None:
    gains = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = RULES[rule](gains, 7.5, 6)
    assert float(q.sum()) == pytest.approx(6) and 0 <= float(q.min()) <= float(q.max()) <= 1 + 1e-12
    spread = {name: int((RULES[name](gains, 7.5, 6) > 1e-9).sum()) for name in RULES}
    assert 6 == spread["margin"] < spread["rad"] < spread["rad-loss"] <= spread["uniform"] == 30


def test_labels_and_answers_are_learned_by_their_own_loss() -> None:
    """Cross entropy where there is a label; where there is none the KL to the answer, 0 where they agree."""
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([2, -1, 0, -1])
    soft = logits + torch.tensor([5.0, 0.0, 5.0, 1.0])[:, None]
    soft[3, 0] += 1
    loss = learned(logits, labels, soft, 2.0)
    assert torch.allclose(loss[::2], cross_entropy(logits[::2], labels[::2], reduction="none"))
    p, q = (soft[3] / 2).softmax(0), (logits[3] / 2).softmax(0)
    assert float(loss[1]) == pytest.approx(0, abs=1e-15)
    assert float(loss[3]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)


def test_a_round_learns_from_labels_and_answers_side_by_side() -> None:
    known = Answers(torch.tensor([1, 4]), torch.tensor([30, 10, 20]), torch.arange(9.0).reshape(3, 3))
    points = data()
    lesson = RADRound().lesson(Start(classifier(0), points), known)
    assert torch.equal(lesson.x, points.x[[1, 4, 30, 10, 20]])
    assert lesson.labels is not None and lesson.labels.tolist() == [1, 1, -1, -1, -1]
    assert lesson.columns["logits"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_student_that_nobody_brings_has_not_seen_the_teacher() -> None:
    """Its architecture, weights of its own; one that is brought starts as it is."""
    teacher, other = classifier(0), classifier(1)
    nets = RADRound().networks(Start(teacher, data()))
    pairs = zip(nets.student.parameters(), teacher.parameters(), strict=True)
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)
    brought = RADRound().networks(Start(teacher, data(), given={"student": other}))
    pairs = zip(brought.student.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_labels_are_hidden_and_drawn_by_class() -> None:
    """Where all are there; data with some have said which."""
    labels = torch.arange(40) % 4
    some = kept(labels, 3, Rng(0))
    assert labels[some].bincount().tolist() == [3, 3, 3, 3] and some.tolist() == sorted(some.tolist())
    assert some.tolist() != kept(labels, 3, Rng(1)).tolist()
    assert kept(torch.where(labels == 2, labels, -1), 3, Rng(0)).tolist() == list(range(2, 40, 4))
    with pytest.raises(ValueError, match="rad: labels_per_class=11 of class 0"):
        kept(labels, 11, Rng(0))
    with pytest.raises(ValueError, match="no sample has a label"):
        kept(torch.full((5,), -1), 3, Rng(0))


def test_hidden_labels_stay_hidden() -> None:
    """Other values of what is hidden change nothing."""
    points = data(N)
    recipe = RAD(rounds=1, queries=5, labels_per_class=2)
    one = run_recipe(recipe, classifier(0), points, SETTINGS, show=False)
    chosen = one.made["answers"].labelled
    labels = torch.zeros(N, dtype=torch.int64).index_copy(0, chosen, points.labels[chosen])  # type: ignore
    told = Dataset("points", points.x, torch.where(torch.isin(torch.arange(N), chosen), labels, -1), ("a", "b", "c"))
    other = run_recipe(recipe, classifier(0), told, SETTINGS, show=False)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_the_report_shows_the_questions_of_every_round(tmp_path: Path) -> None:
    """In their order; an answer is marked where the data know better, and only there."""
    run(RAD(rounds=2, queries=5, accuracy=0.5), tmp_path / "run")
    points, course = data(), RunCourse("run", str(tmp_path / "run"), ())
    with torch.no_grad():
        told = classifier(0)(points.x).argmax(1)
    pictures, numbers = (
        str(figure.content) for figure in figures(course, None, dataclasses.replace(points, cond=told))
    )
    assert pictures.index("round 1") < pictures.index("round 2") and pictures.count("<img") == 10
    assert "<b style" not in pictures and numbers.count("<td>0.00</td>") == 2
    other = dataclasses.replace(points, cond=(told + 1) % CLASSES)
    pictures, numbers = (str(figure.content) for figure in figures(course, None, other))
    assert pictures.count("<b style") == 10 and numbers.count("<td>1.00</td>") == 2
    _, numbers = (str(figure.content) for figure in figures(course, None, points))
    assert numbers.count("not known") == 2
    assert figures(RunCourse("none", str(tmp_path), ()), None, points) == ()
