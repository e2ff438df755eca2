"""MSD: who owns what, what every part trains on and starts from, and teacher score matching."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import api
from fewstep.cli import main, methods
from fewstep.conditions import Cond
from fewstep.data import Dataset
from fewstep.data.dataset import Chosen, Draw, Prior
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, ring
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.msd import MSD, OnePart, TeacherScoreMatching
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.parts.host import Host
from fewstep.methods.parts.partition import Partition, k_means
from fewstep.methods.parts.score_matching import denoising_loss
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.routing import ByClass
from fewstep.runs.course import run_recipe
from fewstep.runs.record import hyper_parameters
from fewstep.sampling.rollout import Student
from fewstep.schedules import FlowMatching, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result

#: The paper: four students of consecutive classes, DMD with pairs on ImageNet and then DMD2's GAN.
PUBLISHED: dict[str, Any] = {
    "parts": 4, "by": "classes", "parts_seed": ..., "tsm": ..., "adm": ..., "dm": Host(DMD()),
    "adversary": Host(DMD2()), "tsm_lr": ...,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip
F64 = torch.float64
CLASSES = 6
DM, ADVERSARY = Host(DMD(pairs=24, ode_steps=2)), Host(DMD2(gan_weight=0.1, critic_steps=1))


def network(width: int = 16, classes: int | None = CLASSES, seed: int = 0) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((2,), width, 1, classes)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), (2,), classes)


def points(n: int = 48) -> Dataset:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    return Dataset("points", x, torch.arange(n) % CLASSES)


def run(recipe: Any, steps: int, **given: nn.Module) -> Result:
    settings = Settings(Budget(steps), 8, precision="fp32", log_steps=1)
    return run_recipe(recipe, network(), points(), settings, given=given, show=False)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["classes", "random"])
@pytest.mark.parametrize("parts", [1, 2, 4, 5, 6])
def test_parts_are_disjoint_cover_and_of_equal_size(parts: int, by: Any) -> None:
    """Of classes and, where every class has as many, of samples; blocks by default, another order with each seed."""
    start = Start(network(), points())
    partition = Partition(parts, by)
    router = partition.router(start)
    assert isinstance(router, ByClass)
    sizes = [len(part) for part in router.labels]
    assert max(sizes) - min(sizes) <= 1 and sorted(c for part in router.labels for c in part) == list(range(CLASSES))
    in_order = [c for part in router.labels for c in part] == list(range(CLASSES))
    assert in_order == (by == "classes")
    own = [partition.data(start, part) for part in range(parts)]
    found = torch.cat([part.rows(slice(None)).x for part in own])  # type: ignore[misc]
    assert torch.equal(found.sort(0).values, points().x.sort(0).values)
    for part, data in enumerate(own):
        labels = data.conditions(slice(None))
        assert set(labels.tolist()) == set(router.labels[part])  # type: ignore[union-attr]
    again = Partition(parts, by).router(start), Partition(parts, by, seed=1).router(start)
    assert again[0].config == router.config
    assert by == "classes" or parts == 1 or again[1].config != router.config


def prompts(n: int = 60) -> Prior:
    """Prompts of five tokens about three places."""
    gen = torch.Generator().manual_seed(2)
    place = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])[torch.arange(n) % 3]
    tokens = place[:, None] + torch.randn(n, 5, 2, generator=gen)
    return Prior((2,), {"prompt_mask": torch.ones(n, 5, dtype=torch.int64), "prompt_embeds": tokens})


def test_prompts_are_cut_by_their_embeddings() -> None:
    """k-means finds the three places in the mean over tokens; every prompt goes to its own, and data are not asked."""
    start, partition = Start(network(classes=None), prompts()), Partition(3, "embedding")
    own = [partition.data(start, part) for part in range(3)]
    assert sorted(map(len, own)) == [20, 20, 20]
    for data in own:
        middle = data.conditions(slice(None))["prompt_embeds"].mean((0, 1))  # type: ignore[index, call-overload]
        assert float((torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]]) - middle).norm(dim=1).min()) < 0.5
        assert data.rows(slice(0, 2)).x is None
    assert torch.equal(partition.router(start).centers, Partition(3, "embedding").router(start).centers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parts=4: there are 3 different conditions"):
        k_means(torch.eye(3, dtype=F64), 4, Rng(0))


def test_what_cannot_be_cut_is_said() -> None:
    for teacher, data, partition, said in (
        (network(classes=None), points(), Partition(2), "parts=2 by classes: the teacher knows no classes"),
        (network(), points(), Partition(7), r"parts=7 must lie in 1 \.\. 6"),
        (network(), points(), Partition(2, "embedding"), "hold no embedding"),
        (network(), Dataset("few", points().x[:6], torch.zeros(6).long()), Partition(2), "none belong to part 1 of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            partition.data(Start(teacher, data), 1)
    with pytest.raises(ValueError, match=r"tsm=0\.6 and adm=0\.5 are shares of one budget"):
        MSD(tsm=0.6, adm=0.5)


def test_chosen_samples_are_read_as_they_are() -> None:
    data = dataclasses.replace(points(), columns={"place": torch.arange(48)})
    chosen = Chosen(data, torch.tensor([5, 3, 40]), "three")
    assert chosen.rows(slice(1, 3)).columns["place"].tolist() == [3, 40]
    (fed,) = chosen.feed([Draw(torch.tensor([2, 0]), torch.tensor([0, 0]), 1)])
    assert fed.columns["place"].tolist() == [40, 5]
    assert torch.equal(chosen.rows(torch.tensor([2])).x, data.x[40:41])  # type: ignore[arg-type]
    assert (len(chosen), chosen.shape, chosen.classes, chosen.name) == (3, (2,), CLASSES, "three")
    assert chosen.sha256() != Chosen(data, torch.tensor([5, 3, 41]), "three").sha256() != data.sha256()


# --- stages ----------------------------------------------------------------------------------------------------------


def test_every_part_has_its_stages_in_order() -> None:
    """Teacher score matching, matching, the adversarial stage, part after part; what has no share is left out."""
    recipe = MSD(parts=2, tsm=0.5, adm=0.2, dm=DM, adversary=ADVERSARY)
    stages = recipe.stages()
    told = [(s.method.host.method.name, s.method.part, s.method.first, s.method.last) for s in stages]  # type: ignore[attr-defined]
    names = ["teacher-score-matching", "dmd", "dmd2"]
    assert told == [(name, part, name == names[0], name == names[2]) for part in range(2) for name in names]
    assert [stage.share for stage in stages] == pytest.approx([0.5, 0.3, 0.2] * 2)
    only = MSD(parts=3, adm=0.0, dm=DM).stages()
    assert [(s.method.first, s.method.last) for s in only] == [(True, True)] * 3  # type: ignore[attr-defined]
    assert methods.build("msd", json.loads(json.dumps(hyper_parameters(recipe)))) == recipe


def test_a_part_sees_its_own_conditions_and_all_pairs() -> None:
    """Data are the part's, pairs those of all conditions, and the same store for every part."""
    start = Start(network(), points(), seed=4)
    found = [OnePart(DM, Partition(2), part, True, True).sources(start) for part in range(2)]
    for part, sources in enumerate(found):
        labels = sources["data"].conditions(slice(None)).unique().tolist()  # type: ignore[union-attr]
        assert labels == [[0, 1, 2], [3, 4, 5]][part]
        assert sources["pairs"].conditions(slice(None)).unique().tolist() == list(range(CLASSES))  # type: ignore[union-attr]
    pairs = [sources["pairs"].rows(slice(None)).columns["noise"] for sources in found]
    assert torch.equal(*pairs)


def test_what_a_part_starts_from() -> None:
    """Its first stage: what the user gave, not the part before; its later ones: its own student and critic.  The last
    stage of all has the students of all parts as they were handed on."""
    given, before, critic = network(seed=1), network(seed=2), network(seed=3)
    made = {"student": before, "critic": critic}
    start = Start(network(), points(), made=made, given={"student": given})
    first, later = (OnePart(DM, Partition(2), 1, k, False).networks(start) for k in (True, False))
    assert torch.equal(weights(first.student), weights(given)) and torch.equal(
        weights(first.critic), weights(network())
    )
    assert torch.equal(weights(later.student), weights(before)) and torch.equal(weights(later.critic), weights(critic))
    handed = OnePart(DM, Partition(2), 1, True, False).hands_on(first)
    assert sorted(handed) == ["critic", "student"] and handed["critic"] is first.critic
    other = DM.method.student(DM.method.networks(Start(before)))
    whole = dataclasses.replace(start, made={"expert 0": other})
    method = OnePart(DM, Partition(2), 1, True, True)
    nets = method.networks(whole)
    routed = method.student(nets)
    assert isinstance(routed, Student)
    noise, labels = torch.randn(6, 2), torch.tensor([0, 5, 1, 2, 4, 3])
    found = routed(noise, labels)
    own = DM.method.student(nets)
    expected = torch.where((labels < 3)[:, None], other(noise, labels), own(noise, labels))  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float((other(noise, labels) - own(noise, labels)).abs().min()) > 1e-4  # type: ignore[operator]
    assert sorted(method.hands_on(nets)) == ["expert 1", "student"]


def test_a_whole_run_makes_one_student_that_is_saved(tmp_path: Path) -> None:
    """Three stages for each of three parts: experts differ, a label is answered by its own alone, and the model is
    opened as it was; with another network as the student all experts are such."""
    small = network(width=8)
    result = run(MSD(parts=3, by="random", tsm=0.3, adm=0.3, dm=DM, adversary=ADVERSARY), 27, student=small)
    routed: Any = result.model.flow_map  # type: ignore[union-attr]
    assert routed.router.labels == Partition(3, "random").router(Start(network())).labels  # type: ignore[attr-defined]
    assert [len(weights(e)) for e in routed.experts] == [len(weights(small))] * 3
    assert len({float(weights(e).sum()) for e in routed.experts}) == 3
    logs = {(r["stage"], name) for r in result.records for name in r}
    assert {k for k, name in logs if name == "student/tsm"} == {0, 3, 6}
    assert {k for k, name in logs if name == "student/regression"} == {1, 4, 7}
    assert {k for k, name in logs if name == "critic/discriminator_accuracy"} == {2, 5, 8}
    api.save(result.model, tmp_path)  # type: ignore[arg-type]
    assert torch.equal(api.load(str(tmp_path)).sample(12, seed=1), result.model.sample(12, seed=1))  # type: ignore[union-attr, operator]


def test_any_distillation_can_be_inside() -> None:
    """Consistency distillation in three calls, on the command line too; each part with as many updates as asked."""
    host = Host(ConsistencyDistillation(steps=(1, 3)))
    result = run(MSD(parts=2, adm=0.0, dm=host), 8)
    assert list(result.model.plans) == [1, 3] and len(result.model.flow_map.experts) == 2  # type: ignore[union-attr, arg-type]
    assert [sum(r["stage"] == k for r in result.records) for k in range(2)] == [4, 4]


def test_the_command_line_trains_parts(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    flags = ["--teacher", "digits", "--data", "digits", "--batch", "4", "--budget", "2steps", "--quiet", "--out", place]
    main(["distill", "msd", *flags, "--parts", "2", "--adm", "0", "--dm", "dmd2:gan-weight=0"])
    config = json.loads((Path(place) / "model" / "config.json").read_text())
    assert json.dumps(config).count('"parts": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]') == 1


# --- teacher score matching ------------------------------------------------------------------------------------------


class Tabular(Denoiser):
    """``D = slope x + offset`` with numbers of its own at each of some times."""

    def __init__(self, times: Tensor) -> None:
        super().__init__(FlowMatching(), (1,))
        self.times = times
        self.table = nn.Parameter(torch.zeros(len(times), 2, dtype=F64))

    def forward(self, x: Tensor, t: Any, cond: Cond = None) -> Tensor:
        slope, offset = self.table[(t[:, None] - self.times).abs().argmin(1)].T
        return slope[:, None] * x + offset[:, None]


def test_a_linear_student_learns_the_teachers_linear_denoiser() -> None:
    """On Gaussian data the least squares of the loss on two draws at each of three times are the teacher's own
    coefficients, exactly: its answers have no noise.  Denoising on the same draws is off by a tenth and more."""
    world = Gaussian(FlowMatching(), torch.tensor([0.7], dtype=F64), 0.25)
    times = torch.tensor([0.2, 0.5, 0.8], dtype=F64)

    class AtTimes(Rng):
        def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return times[torch.arange(shape[0]) % 3]

    data = world.sample(6, Rng(1))

    def solved(loss_of: Callable[[Networks], Tensor]) -> Tensor:
        """Where the gradient, which is linear in the table, is zero."""
        nets = Networks({"student": Tabular(times), "teacher": world}, {"student": Optimizer(("student",), 0.0)})

        def slope(values: Tensor) -> Tensor:
            nets.student.table.data = values.reshape(3, 2)
            return torch.autograd.grad(loss_of(nets), nets.student.table)[0].flatten()

        zero = slope(torch.zeros(6, dtype=F64))
        curve = torch.stack([slope(unit) - zero for unit in torch.eye(6, dtype=F64)], 1)
        return torch.linalg.solve(curve, -zero).reshape(3, 2)

    def tsm(nets: Networks) -> Tensor:
        (update,) = TeacherScoreMatching().updates(nets, Batch(data, None, AtTimes(3)), Progress())
        return update.loss

    def plain(nets: Networks) -> Tensor:
        return denoising_loss(nets.student, data, times.repeat(2), None, Rng(3))

    alpha, sigma = 1 - times, times
    slope = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    expected = torch.stack([slope, 0.7 * (1 - alpha * slope)], 1)
    torch.testing.assert_close(solved(tsm), expected, atol=1e-10, rtol=0)
    assert float((solved(plain) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("by", ["classes", "random"])
def test_more_students_know_more(by: Any) -> None:
    """Students of one shape, linear and blind to the class, on a ring of eight classes at one time: the least loss of
    teacher score matching in their parts falls from 1 to 2, 4 and 8, where every class has a student and nothing is
    left.  Neighbours have more in common than classes at random."""
    world = ring(FlowMatching(), labels=list(range(8)))
    labels = torch.arange(800) % 8
    data = Dataset("ring", world.sample(800, Rng(1), labels), labels)

    class Half(Rng):
        def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return torch.full(shape, 0.5, dtype=F64)

    class Affine(Denoiser):
        """The best affine function of the state for these rows, fitted when it is asked."""

        def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
            fitted = rows @ torch.linalg.lstsq(rows, world(x, t, cond)).solution
            return torch.zeros_like(t), torch.ones_like(t), fitted

        def forward(self, x: Tensor, t: Any, cond: Cond = None) -> Tensor:
            raise AssertionError

    def loss(parts: int, kind: Any) -> float:
        total = 0.0
        for part in range(parts):
            rows = Partition(parts, kind, seed=1).data(Start(world, data), part).rows(slice(None))
            nets = Networks({"student": Affine(FlowMatching(), (2,), 8), "teacher": world}, {})
            (update,) = TeacherScoreMatching().updates(nets, Batch(rows.x, rows.cond, Half(3)), Progress())
            total += float(update.loss) * len(rows.cond) / len(data)  # type: ignore[arg-type]
        return total

    found = [loss(parts, by) for parts in (1, 2, 4, 8)]
    assert found[0] > 1.05 * found[1] > 1.1 * found[2] and found[2] > 0.01 and found[3] < 1e-20
    if by == "classes":
        assert all(near < 0.85 * loss(parts, "random") for parts, near in zip((2, 4), found[1:3], strict=True))
