"""DisWOT: what its search scores and keeps, and the loss that its student is trained by."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fewstep as fs
from fewstep.classifiers import NetworkClassifier
from fewstep.data import Dataset
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.start import Start
from fewstep.networks.classifiers import MLPClassifier, ResNet
from fewstep.networks.feature_nets import FeatureNet
from fewstep.randomness import Rng
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.diswot import figures
from fewstep.runs.course import run_recipe
from fewstep.students.diswot import DisWOT, Space, last_map
from fewstep.students.proxies import Scorer, flops, parameters, z_sum
from fewstep.students.relations import activation_weights, semantic, similarity
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SHAPE, CLASSES = (1, 8, 8), 4
SMALL = DisWOT(population=6, tournament=3, evaluations=14, draws=2, batch_scored=8)
#: exps/parse_s1_zc.py (space S1 and both scores), searcher/evo_search_nb201.py, train_student.py (CIFAR)
PUBLISHED = {
    "views": ..., "lr": 0.05, "decay": "steps", "momentum": 0.9, "weight_decay": 5e-4,
    "depths": (1, 3, 5, 7), "widths": ..., "student_norm": "batch", "max_parameters": ..., "max_flops": ...,
    "proxies": ("relation", "semantic"), "draws": 1, "batch_scored": 128, "population": 36, "tournament": 8,
    "evaluations": ..., "alpha": 0.9, "temperature": 4.0, "relation_weight": 0.0, "semantic_weight": 0.0,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip


def classifier(*depths: int, width: int = 4, seed: int = 0) -> NetworkClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NetworkClassifier(ResNet(SHAPE, CLASSES, width, depths), SHAPE, CLASSES).eval()


def data() -> Dataset:
    gen = torch.Generator().manual_seed(0)
    return Dataset("points", torch.randn(24, *SHAPE, generator=gen), torch.arange(24) % CLASSES)


TEACHER = classifier(3, 3, 3)


@pytest.fixture(scope="module")
def found() -> dict[str, Tensor]:
    """What a small search keeps."""
    return SMALL.search(Start(TEACHER, data())).found(Rng(0))


def test_the_search_stays_within_its_budget(found: dict[str, Tensor]) -> None:
    """By default midway between the smallest and the largest student; and the operations."""
    sizes = {depths: parameters(classifier(*depths), torch.zeros(0)) for depths in product((1, 2, 3), repeat=3)}
    half = (sizes[1, 1, 1] + sizes[3, 3, 3]) // 2
    assert sum(size > half for size in sizes.values()) > 5
    assert int(found["parameters"].max()) <= half
    for row, size in zip(found["student"].tolist(), found["parameters"].tolist(), strict=True):
        assert row[3] == 4 and sizes[tuple(row[:3])] == size
    x = data().x[:1]
    most = int(flops(classifier(2, 1, 1), x))
    capped = dataclasses.replace(SMALL, max_flops=most, max_parameters=10**9)
    students = capped.search(Start(TEACHER, data())).found(Rng(0))["student"]
    assert all(flops(classifier(*row[:3]), x) <= most for row in students.tolist())


def test_scores_are_those_of_the_proxies_and_are_added_in_units_of_their_spread(found: dict[str, Tensor]) -> None:
    """Another scorer with the same draws finds the same; no proxy counts more for its scale."""
    search, rng = SMALL.search(Start(TEACHER, data())), Rng(0)
    assert search.proxies == ("relation", "semantic")
    scorer = Scorer(TEACHER, search.shown(rng), search.proxies, rng.stream("weights"))
    for row in (0, 1):
        *depths, _ = found["student"][row].tolist()
        assert torch.equal(found["scores"][row], scorer(search.space.build((*(d - 1 for d in depths), 0))))
    mean = found["scores"].mean(1).mT
    spread = mean.std(1, unbiased=False)
    assert spread[1] > 20 * spread[0]  # the raw sum would be the semantic score
    near = z_sum(mean)
    assert float(torch.corrcoef(torch.stack([near, found["total"]]))[0, 1]) > 0.9
    assert found["agreement"].shape == (len(mean.mT), 2) and bool((found["agreement"].abs() <= 1).all())


def test_long_evolution_finds_the_best_of_all() -> None:
    """27 students, of which 60 are made (some again): none scores higher."""
    method = dataclasses.replace(SMALL, evaluations=60, max_parameters=10**9, proxies=("relation",))
    search = method.search(Start(TEACHER, data()))
    kept = search.found(Rng(0))
    rng = Rng(0)
    scorer = Scorer(TEACHER, search.shown(rng), ("relation",), rng.stream("weights"))
    best = max(float(scorer(search.space.build((*d, 0))).mean()) for d in product(range(3), repeat=3))
    assert float(kept["scores"].mean((1, 2))[kept["total"].argmax()]) == pytest.approx(best, rel=1e-12)


def test_the_best_is_trained_from_first_weights() -> None:
    start = Start(TEACHER, data(), seed=3)
    kept = start.store(SMALL.search(start))
    nets = SMALL.networks(start)
    best = kept.columns["student"][int(kept.columns["total"].argmax())].tolist()
    assert [*nets.student.net.config["depths"], nets.student.net.config["width"]] == best
    assert float(nets.student.net.stem[0].weight.detach().std()) < 0.5  # not the N(0, 1) that it was scored with
    assert nets.teacher is TEACHER
    again = SMALL.networks(start)  # whatever PyTorch's own generator has drawn in between
    assert torch.equal(again.student.net.stem[0].weight, nets.student.net.stem[0].weight)


def test_a_run_searches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search lies in the run folder: a run that is called again scores nothing."""
    scored: list[int] = []
    plain = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, net: (scored.append(1), plain(self, net))[1])
    settings = Settings(Budget(2), batch=8, precision="fp32")
    first: Any = run_recipe(SMALL, TEACHER, data(), settings, tmp_path / "run", show=False).model
    once = len(scored)
    again: Any = run_recipe(SMALL, TEACHER, data(), settings, tmp_path / "run", show=False).model
    assert len(scored) == once > 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    drawn, listed = figures(RunCourse("run", str(tmp_path / "run"), ()), first, data())
    assert str(drawn.content).startswith("<svg") and "relation" in listed.caption
    rows = str(listed.content).splitlines()
    assert "-".join(map(str, first.net.config["depths"])) in rows[1]  # the best comes first


def test_students_of_other_widths_are_searched_by_the_relation_alone(tmp_path: Path) -> None:
    """Where nobody names the scores; and the report does not name the one that was left out."""
    start = Start(TEACHER, data())
    assert dataclasses.replace(SMALL, widths=(4,)).search(start).proxies == ("relation", "semantic")
    method = dataclasses.replace(SMALL, widths=(2, 4, 8))
    search = method.search(start)
    assert search.proxies == ("relation",) and search.space.widths == (2, 4, 8)
    settings = Settings(Budget(2), batch=8, precision="fp32")
    model: Any = run_recipe(method, TEACHER, data(), settings, tmp_path / "run", show=False).model
    assert model.net.config["width"] in (2, 4, 8)
    _, listed = figures(RunCourse("run", str(tmp_path / "run"), ()), model, data())
    head = str(listed.content).splitlines()[0]
    assert "<th>relation</th>" in head and "semantic" not in head + listed.caption


class Own(FeatureNet):
    """Somebody's network for colour pictures of 16x16: what a search asks of one is its maps and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.last = nn.Linear(16, 5)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        return [self.body(pictures)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.maps(x)[-1].mean((-2, -1)))


def test_a_teacher_of_ones_own_finds_a_student_on_ones_own_data() -> None:
    """Colour pictures of five classes; a network without maps is told what it lacks before anything is scored."""
    gen, labels = torch.Generator().manual_seed(0), torch.arange(40) % 5
    mine = Dataset("mine", torch.randn(40, 3, 16, 16, generator=gen), labels)
    student = fs.distill(NetworkClassifier(Own(), (3, 16, 16), 5), SMALL, mine, "2 steps", batch=8, show=False)
    assert student(mine.x[:3]).shape == (3, 5) and student.net.config["width"] == 4
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(ValueError, match="a Sequential has no maps of its own"):
        fs.distill(NetworkClassifier(plain, (3, 16, 16), 5), SMALL, mine, "2 steps", batch=8, show=False)


def loss_of(method: DisWOT, student: NetworkClassifier) -> float:
    points = data()
    nets = Networks({"student": student.eval(), "teacher": TEACHER}, {})
    (update,) = method.updates(nets, Batch(points.x, points.labels, Rng(0)), Progress())
    return float(update.loss)  # type: ignore[union-attr]


def test_the_loss_is_what_it_says() -> None:
    """Cross entropy, KL at the squared temperature, and the two scores as losses against the trained teacher."""
    x, labels = data().x, data().labels
    assert labels is not None
    student = classifier(1, 1, 1, seed=1)
    with torch.no_grad():
        z, t = student(x), TEACHER(x)
        p, q = (t / 4).softmax(1), (z / 4).softmax(1)
        hard, soft = cross_entropy(z, labels), (p * (p / q).log()).sum(1).mean()
        relation = similarity(last_map(student, x), last_map(TEACHER, x))
        ours, theirs = (activation_weights(m(x), m.features(x), labels) for m in (student, TEACHER))
        meaning = semantic(ours, theirs)
    plain = float(0.1 * hard + 0.9 * 16 * soft)
    assert loss_of(DisWOT(), student) == pytest.approx(plain, rel=1e-5)
    assert loss_of(DisWOT(alpha=0.0), student) == pytest.approx(float(hard), rel=1e-5)
    whole = DisWOT(relation_weight=3.0, semantic_weight=0.5)
    assert loss_of(whole, student) == pytest.approx(plain + float(3 * relation + 0.5 * meaning), rel=1e-5)
    assert loss_of(dataclasses.replace(whole, alpha=1.0), TEACHER) == pytest.approx(0, abs=1e-5)


def test_students_are_built_as_they_are_said() -> None:
    space = Space(SHAPE, CLASSES, (1, 3), (4, 8))
    assert space.sizes == (2, 2, 2, 2) and space.said((0, 1, 0, 1)) == [1, 3, 1, 8]
    net: Any = space.build((0, 1, 0, 1)).net
    assert net.config["depths"] == [1, 3, 1] and net.config["width"] == 8


def test_what_cannot_be_searched_is_refused() -> None:
    start = Start(TEACHER, data())
    named = dataclasses.replace(SMALL, widths=(2, 4), proxies=("relation", "semantic"))
    with pytest.raises(ValueError, match="semantic compares channel by channel, and needs a head that reads 16"):
        named.search(start)
    with pytest.raises(ValueError, match="semantic_weight compares channel by channel"):
        dataclasses.replace(SMALL, widths=(2, 4), semantic_weight=1.0).search(start)
    odd = NetworkClassifier(MLPClassifier(SHAPE, CLASSES, width=7), SHAPE, CLASSES)
    with pytest.raises(ValueError, match="the teacher's 7 features do not exist"):
        SMALL.search(Start(odd, data()))
    with pytest.raises(ValueError, match=r"data 'points' has samples without a label \(-1\)"):
        SMALL.search(Start(TEACHER, Dataset("points", data().x, torch.arange(24) % CLASSES - 1)))
    with pytest.raises(ValueError, match=r"the score 'relation' of a student is .*: without norms between layers"):
        dataclasses.replace(SMALL, student_norm="none", depths=(8,)).search(start).found(Rng(0))
    with pytest.raises(ValueError, match="none of 1000 individuals"):
        dataclasses.replace(SMALL, max_parameters=10).search(start).found(Rng(0))
    with pytest.raises(ValueError, match="tournament=9 is larger"):
        DisWOT(population=8, tournament=9)
    with pytest.raises(ValueError, match="each once"):
        DisWOT(proxies=("relation", "relation"))
    with pytest.raises(ValueError, match="draws=1 must be at least 2"):
        DisWOT(draws=1)
