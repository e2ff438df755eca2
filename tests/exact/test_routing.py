"""Routed models: every row goes to its own expert and to no other, with the numbers of that expert alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from kinds_of_models import SHAPE, moved, network, on_edm, second_network
from torch import Tensor, nn

import fewstep as fs
from fewstep.cli import main
from fewstep.data.dataset import Dataset
from fewstep.denoisers import CountCalls, Denoiser, NetworkDenoiser, OnSchedule
from fewstep.exact import Gaussian, three_modes
from fewstep.exact.world import ExactFlowMap
from fewstep.extras import Input
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump
from fewstep.guidance import Guided
from fewstep.hub import native
from fewstep.hub.exporting import export
from fewstep.models import model_of
from fewstep.networks import MLP
from fewstep.randomness import Rng
from fewstep.routing import ByClass, ByEmbedding, ByTime, RoutedDenoiser, RoutedFlowMap, Router
from fewstep.sampling import Call, Plan, Student, rollout, sample
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPLinear

F64 = torch.float64
HALVES = ByClass([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
MIXED = torch.tensor([7, 0, 3, 9, 5, 1, 8])
PLANS = {1: Plan((1.5,)), 3: Plan((1.5, 0.9, 0.4)), 2: Plan((1.5, 0.6), gamma=0.0)}


def states(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return Rng(seed).normal(n, *SHAPE, dtype=dtype)


class Watched(nn.Module):
    """A network that remembers how many rows each call had, and the labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, **extras: Tensor) -> Tensor:
        self.calls.append(None if cond is None else cond.tolist())
        made: Tensor = self.net(x, t, cond, **extras)
        return made


def watched(made: NetworkDenoiser) -> NetworkDenoiser:
    made.net = Watched(made.net)
    return made


# --- which expert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "parts"), [(10, 1), (10, 2), (10, 3), (10, 10), (1000, 4), (7, 5)])
@pytest.mark.parametrize("drawn", [False, True])
def test_even_parts_are_a_partition(classes: int, parts: int, drawn: bool) -> None:
    """Parts are disjoint, cover all labels and differ by one in size at most; without an order they are consecutive."""
    order = Rng(3).shuffled(classes) if drawn else None
    router = ByClass.even(classes, parts, order)
    listed = [label for part in router.labels for label in part]
    assert sorted(listed) == list(range(classes)) and len(router.labels) == parts
    sizes = [len(part) for part in router.labels]
    assert max(sizes) - min(sizes) <= 1
    assert (listed == sorted(listed)) == (not drawn or classes == 1)
    chosen = router.route(torch.zeros(classes, 1), torch.zeros(classes), torch.arange(classes))
    assert chosen.dtype == torch.int64
    assert all(int(chosen[label]) == k for k, part in enumerate(router.labels) for label in part)


def test_times_belong_to_the_phase_that_starts_there() -> None:
    """A bound belongs to the phase below it: experts are called at the start of their phase."""
    t = torch.tensor([1.0, 0.75, 0.5, 0.4999, 0.25, 0.0], dtype=F64)
    assert ByTime([0.5, 0.25]).route(torch.zeros(6, 1), t, None).tolist() == [0, 0, 1, 1, 2, 2]
    assert ByTime([]).route(torch.zeros(6, 1), t, None).tolist() == [0] * 6


def test_the_nearest_centre() -> None:
    """Conditions go to the nearest centre, those of several tokens by their mean; of equals to the first."""
    centers = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    points = torch.tensor([[0.1, 0.0], [-3.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    router, x, t = ByEmbedding(centers), torch.zeros(4, 1), torch.zeros(4)
    assert router.route(x, t, points).tolist() == [0, 1, 2, 0]
    tokens = torch.stack([points + 7, points - 7], 1)
    named = {"prompt_embeds": tokens, "mask": torch.ones(4, 2)}
    assert ByEmbedding(centers, "prompt_embeds").route(x, t, named).tolist() == [0, 1, 2, 0]
    grids = centers.reshape(3, 2, 1)
    assert ByEmbedding(grids).route(x, t, points[..., None]).tolist() == [0, 1, 2, 0]


# --- the numbers are the experts' ------------------------------------------------------------------------------------


def test_one_expert_is_the_expert() -> None:
    """With one expert nothing changes, bit for bit: calls, derived quantities, samples of solvers and of plans."""
    plain, cond, t = network(), torch.arange(5), torch.full((5,), 0.7, dtype=F64)
    alone = RoutedDenoiser([plain], ByClass.even(10, 1))
    x = states(5)
    for name in ("forward", "eps", "score", "velocity", "features"):
        assert torch.equal(getattr(alone, name)(x, t, cond), getattr(plain, name)(x, t, cond)), name
    assert alone.feature_shape == plain.feature_shape
    assert all(torch.equal(a, b) for a, b in zip(alone.affine(x, t, cond), plain.affine(x, t, cond), strict=True))
    for solver in ("abm", "ddim", "heun", "dpmpp-2m-sde"):
        assert torch.equal(*(sample(m, 5, solver=solver, steps=4, seed=1) for m in (alone, plain))), solver
    assert torch.equal(*(sample(OnSchedule(m, EDM()), 5, steps=3, seed=1) for m in (alone, plain)))
    student = Student(Jump(plain), PLANS)
    routed = Student(RoutedFlowMap([Jump(plain)], ByClass.even(10, 1)), PLANS)
    for steps in PLANS:
        assert torch.equal(*(m.sample(5, steps=steps, seed=2) for m in (routed, student)))
    assert torch.equal(routed.flow_map.jump(x, t, 0.2, cond), student.flow_map.jump(x, t, 0.2, cond))
    assert torch.equal(routed.flow_map.instant()(x, t, cond), student.flow_map.instant()(x, t, cond))


@pytest.mark.parametrize("steps", PLANS)
def test_experts_by_class_are_each_alone_on_their_rows(steps: int) -> None:
    """Rows of one expert are the batch that it would sample alone, so with a seed a sample the numbers are the same bit
    for bit; alone on *all* rows it makes another batch, which only rounding tells apart: products of matrices are
    summed in another order (1e-12 in float64)."""
    one, other = Jump(network()), Jump(second_network())
    routed = Student(RoutedFlowMap([one, other], HALVES), PLANS)
    seeds = list(range(10, 10 + len(MIXED)))
    x = routed.sample(len(MIXED), MIXED, steps=steps, seeds=seeds)
    for k, expert in enumerate((one, other)):
        own = HALVES.table[MIXED] == k
        alone = Student(expert, PLANS)
        mine = [s for s, chosen in zip(seeds, own, strict=True) if chosen]
        assert torch.equal(x[own], alone.sample(int(own.sum()), MIXED[own], steps=steps, seeds=mine))
        z = states(len(MIXED), dtype=F64)
        together = Student(RoutedFlowMap([one, other], HALVES), PLANS).double()(z, MIXED, steps, Rng(1))
        torch.testing.assert_close(together[own], alone.double()(z, MIXED, steps, Rng(1))[own], atol=1e-12, rtol=0)
        one.float(), other.float()


@pytest.mark.parametrize("schedule", [FlowMatching(), TrigFlow(), EDM(), VPLinear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", ["abm", "unipc", "heun", "ddpm"])
def test_phases_of_one_denoiser_are_the_denoiser(schedule: Any, solver: str) -> None:
    """An exact denoiser cut into phases is itself, bit for bit where a call has one time.  Rows at times of their own
    are other batches, whose exponentials differ in the last bit, which scores at little noise enlarge."""
    world = three_modes(schedule)
    inside = torch.linspace(schedule.t_max, schedule.t_min, 5, dtype=F64).tolist()[1:-1]
    routed = RoutedDenoiser([world] * 4, ByTime(inside))
    assert torch.equal(
        *(sample(m, 6, solver=solver, steps=7, noise=Rng(1).normal(6, 1, dtype=F64)) for m in (world, routed))
    )
    x, t = Rng(2).normal(6, 1, dtype=F64), torch.linspace(schedule.t_min, schedule.t_max, 6, dtype=F64)
    t = t.clamp_min(0.01 * schedule.t_max)
    for name in ("forward", "eps", "score", "velocity"):
        expected = getattr(world, name)(x, t)
        torch.testing.assert_close(getattr(routed, name)(x, t), expected, atol=1e-13, rtol=1e-11)
    exact = RoutedFlowMap([ExactFlowMap(world)] * 4, ByTime(inside))
    torch.testing.assert_close(exact.to_data(x, t), ExactFlowMap(world).to_data(x, t), atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="knows where its paths end"):
        exact.instant()


def test_a_phase_is_sampled_by_its_own_expert() -> None:
    """Two Gaussians of other means: each call is the one of its time's expert, also on a view of another schedule."""
    schedule = FlowMatching()
    one, other = (Gaussian(schedule, torch.full((1,), m, dtype=F64), 0.25) for m in (-1.0, 2.0))
    routed = RoutedDenoiser([one, other], ByTime([0.5]))
    x, t = torch.zeros(3, 1, dtype=F64), torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    expected = torch.stack([one(x, 0.9)[0], other(x, 0.5)[1], other(x, 0.1)[2]])
    assert torch.equal(routed(x, t), expected)
    view = TrigFlow()
    same = view.time_at(schedule.log_snr(t))
    torch.testing.assert_close(
        routed.on(view)(x, same), torch.where((t > 0.5)[:, None], one.on(view)(x, same), other.on(view)(x, same))
    )


def test_a_base_model_before_a_student() -> None:
    """A base that takes the first call of a student's plan: with the student as its own base nothing changes."""
    base, student = Jump(network()), Jump(second_network())
    hybrid = Student(RoutedFlowMap([base, student], ByTime([1.2])), PLANS)
    itself = Student(RoutedFlowMap([student, student], ByTime([1.2])), PLANS)
    plain = Student(student, PLANS)
    for steps in PLANS:
        assert torch.equal(itself.sample(4, steps=steps), plain.sample(4, steps=steps))
    calls: list[Call] = []
    rollout(hybrid.flow_map, states(4), PLANS[3], MIXED[:4], Rng(0), calls=calls)
    for call, expert in zip(calls, (base, student, student), strict=True):
        assert torch.equal(call.out, expert.to_data(call.x, call.t, MIXED[:4]))


def test_times_and_further_inputs_go_with_their_rows() -> None:
    """Targets, times and declared inputs are cut with the rows; experts of other architectures stand side by side."""

    class Told(FlowMap):
        """Answers with what it was given."""

        def __init__(self, sign: float) -> None:
            super().__init__(FlowMatching(), (1,), 2, {"w": Input(1.0, 0.0, 9.0)})
            self.sign = sign

        def forward(self, x: Any, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            return self.sign * (x + (100 * t + 10 * s + extras["w"])[:, None])

    routed = RoutedFlowMap([Told(1.0), Told(-1.0)], ByClass([[1], [0]]))
    assert routed.extras == {"w": Input(1.0, 0.0, 9.0)}
    x, cond = torch.arange(4.0, dtype=F64)[:, None], torch.tensor([0, 1, 1, 0])
    t, s = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=F64), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    w = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=F64)
    sign = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=F64)
    expected = (sign * (x[:, 0] + 100 * t + 10 * s + w))[:, None]
    assert torch.equal(routed(x, t, s, cond, w=w), expected)
    made = Student(routed, {1: Plan((1.0,), extras={"w": 3.0})})(x, cond)
    assert torch.equal(made[:, 0], sign * (x[:, 0] + 100 + 3))


def test_gradients_reach_the_experts_that_were_asked() -> None:
    """The gradient of a row goes to its own expert; an expert without rows gets none."""
    one, other = network().requires_grad_(True), second_network().requires_grad_(True)
    routed, x = RoutedDenoiser([one, other], HALVES), states(4).requires_grad_(True)
    for labels, reached in (([0, 7, 1, 8], (True, True)), ([0, 1, 2, 3], (True, False)), ([5, 6, 7, 8], (False, True))):
        routed.zero_grad(set_to_none=True)
        x.grad = None
        routed(x, 0.7, torch.tensor(labels)).square().sum().backward()
        assert tuple(any(p.grad is not None for p in m.parameters()) for m in (one, other)) == reached
        for row, label in enumerate(labels):
            y = x.detach()[row : row + 1].requires_grad_(True)
            (one, other)[label > 4](y, 0.7, torch.tensor([label])).square().sum().backward()
            torch.testing.assert_close(x.grad[row : row + 1], y.grad, atol=1e-4, rtol=1e-4)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_no_expert_sees_rows_that_are_not_its_own() -> None:
    """A call whose rows all go to one expert is one call; mixed rows are one call of each expert, with its own rows."""
    one, other = watched(network()), watched(second_network())
    routed, x = RoutedDenoiser([one, other], HALVES), states(7)
    routed(x, 0.5, MIXED)
    assert (one.net.calls, other.net.calls) == ([[0, 3, 1]], [[7, 9, 5, 8]])
    routed(x[:3], 0.5, torch.tensor([5, 9, 5]))
    assert (len(one.net.calls), other.net.calls[1:]) == (1, [[5, 9, 5]])
    student = Student(RoutedFlowMap([Jump(one), Jump(other)], HALVES), PLANS)
    one.net.calls.clear(), other.net.calls.clear()
    student.sample(3, torch.tensor([2, 2, 2]), steps=3)
    assert (len(one.net.calls), len(other.net.calls)) == (3, 0)
    counted = CountCalls(RoutedDenoiser([one, other], ByTime([0.7])))
    one.net.calls.clear(), other.net.calls.clear()
    sample(counted, 5, solver="ddim", steps=6)
    assert (
        counted.calls == 6 == len(one.net.calls) + len(other.net.calls)
        and min(len(one.net.calls), len(other.net.calls)) > 0
    )


# --- what is refused -------------------------------------------------------------------------------------------------


class Twice(Router):
    """A router of one's own."""

    config: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def __init__(self) -> None:
        super().__init__(2)

    def route(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.arange(len(x)) % 2


def flat(schedule: Any = None, shape: tuple[int, ...] = SHAPE, classes: int | None = 10) -> NetworkDenoiser:
    made = network()
    return NetworkDenoiser(MLP(shape, 8, 1, classes), schedule or made.schedule, made.prediction, shape, classes)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: ByClass([[0, 1], [1, 2]]), r"parts=\[\[0, 1\], \[1, 2\]\] must hold every label from 0 on once"),
    (lambda: ByClass([[0, 2]]), "must hold every label"),
    (lambda: ByClass([[0, 1], []]), "none be empty"),
    (lambda: ByClass.even(3, 4), r"parts=4 must lie in 1 \.\. 3, the number of classes"),
    (lambda: ByTime([0.2, 0.5]), r"bounds=\[0.2, 0.5\] must fall"),
    (lambda: ByTime([0.5, float("nan")]), "must fall"),
    (lambda: ByEmbedding(torch.zeros(3)), r"centers of shape \[3\] must be one finite embedding an expert"),
    (lambda: ByEmbedding(torch.full((2, 3), torch.inf)), "finite"),
    (lambda: RoutedDenoiser([network()], HALVES), "1 experts for a router of 2 parts: one each"),
    (
        lambda: RoutedDenoiser([network(), flat(TrigFlow())], HALVES),
        r"expert 1 has schedule TrigFlow\(.*expert 0 has Tr",
    ),
    (lambda: RoutedDenoiser([network(), on_edm()], HALVES), r"expert 1 has schedule EDM\(.*expert 0 has TrigFlow\("),
    (
        lambda: RoutedDenoiser([network(), flat(shape=(1, 4, 4))], HALVES),
        r"expert 1 has shape \[1, 4, 4\], expert 0 has \[1, 8, 8\]: experts share it",
    ),
    (
        lambda: RoutedFlowMap([Jump(network()), Jump(flat(classes=7))], Twice()),
        "expert 1 has classes 7, expert 0 has 10",
    ),
    (
        lambda: RoutedDenoiser([network(), with_null(torch.zeros(1, 3))], Twice()),
        r"expert 1 has conditions {'cond': \[3\]}, expert 0 has {'cond': \[\]}",
    ),
    (
        lambda: RoutedFlowMap([Jump(network()), Jump(network(), extras={"w": Input(1.0, 0.0, 2.0)})], HALVES),
        r"expert 1 takes the inputs {'w': .*expert 0 {}",
    ),
    (lambda: RoutedDenoiser([flat(classes=7)] * 2, HALVES), "the router divides 10 classes, the experts know 7"),
    (lambda: RoutedDenoiser([flat(classes=None)] * 2, HALVES), "divides 10 classes, the experts know none"),
    (
        lambda: RoutedDenoiser([network()] * 2, ByTime([1.5])),
        r"bound 1.5 leaves an expert without times: they are 0 \.\. 1.5",
    ),
    (lambda: RoutedDenoiser([network()] * 2, ByTime([-0.1])), "bound -0.1 leaves an expert"),
    (lambda: by_class()(states(2), 0.5), r"routed by their labels \[2\], and came without"),
    (lambda: by_class()(states(2), 0.5, torch.zeros(2, 3)), "came without"),
    (lambda: by_class()(states(2), 0.5, {"label": torch.zeros(2)}), "came without"),
    (lambda: by_class()(states(2), 0.5, torch.tensor([3, -1])), "label -1 belongs to no expert"),
    (lambda: by_class()(states(2), 0.5, torch.tensor([3, 10])), r"label 10 belongs to no expert: labels are 0 \.\. 9"),
    (lambda: Guided(by_class(), 2.0)(states(2), 0.5, torch.tensor([3, 4])), "guidance cannot leave them out"),
    (
        lambda: ByTime([0.5]).route(torch.zeros(2, 3, 1), torch.zeros(2, 3), None),
        r"times of shape \[2, 3\]: samples are routed by one time each, \[2\]",
    ),
    (
        lambda: ByEmbedding(torch.zeros(2, 3)).route(torch.zeros(4, 1), torch.zeros(4), None),
        r"routed by 'cond' \[4, \.\.\., 3\], and have nothing",
    ),
    (
        lambda: ByEmbedding(torch.zeros(2, 3), "text").route(
            torch.zeros(4, 1), torch.zeros(4), {"text": torch.zeros(4, 7, 2)}
        ),
        r"routed by 'text' \[4, \.\.\., 3\], and have {'text': \[4, 7, 2\]}",
    ),
    (lambda: RoutedDenoiser([network(), wide()], HALVES).feature_shape, "features of different shapes"),
    (lambda: native.describe(RoutedDenoiser([network()] * 2, Twice())), "a Twice is not one of fewstep's routers"),
    (
        lambda: native.describe(RoutedFlowMap([ExactFlowMap(three_modes())] * 2, Twice())),
        "cannot describe a ExactFlowMap",
    ),
]


def with_null(null: Tensor) -> NetworkDenoiser:
    made = network()
    return NetworkDenoiser(made.net, made.schedule, made.prediction, SHAPE, 10, null)


def wide() -> NetworkDenoiser:
    made = network()
    return NetworkDenoiser(MLP(SHAPE, 24, 1, 10), made.schedule, made.prediction, SHAPE, 10)


def by_class() -> RoutedDenoiser:
    return RoutedDenoiser([network(), second_network()], HALVES)


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_refusals_name_both_sides(make: Callable[[], object], words: str) -> None:
    """One line that says which field, which value and what would be right."""
    with pytest.raises((ValueError, TypeError), match=words) as told:
        make()
    assert "\n" not in str(told.value)


def test_a_router_without_parts_has_no_experts() -> None:
    """Nothing can be asked of nobody."""
    with pytest.raises(ValueError, match="0 experts for a router of 0 parts"):
        RoutedDenoiser([], ByClass([]))


# --- a product -------------------------------------------------------------------------------------------------------


def text_denoiser(seed: int) -> NetworkDenoiser:
    """A network whose condition is two numbers; it adds them to its output."""
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP(SHAPE, 8, 1), TrigFlow(t_max=1.5), network().prediction, SHAPE)


def told(seed: int, extras: tuple[str, ...] = ("w",)) -> NetworkDenoiser:
    """A network with a further input, or without."""
    torch.manual_seed(seed)
    net = moved(MLP(SHAPE, 8, 1, 10, extras=extras))
    return NetworkDenoiser(net, TrigFlow(t_max=1.5), network().prediction, SHAPE, 10)


def weighted(*experts: NetworkDenoiser) -> Student:
    return Student(Jump(RoutedDenoiser(experts, ByTime([0.9])), extras={"w": Input(1.0, 0.0, 8.0)}), PLANS)


PRODUCTS: dict[str, Callable[[], Any]] = {
    "by-class": lambda: Student(RoutedFlowMap([Jump(network()), Jump(second_network())], HALVES), PLANS),
    "by-time": lambda: Student(RoutedFlowMap([Jump(network()), Jump(second_network())], ByTime([0.9])), PLANS),
    "consistency": lambda: RoutedFlowMap([EDMConsistency(on_edm()), EDMConsistency(on_edm())], HALVES),
    "nested": lambda: Jump(
        RoutedDenoiser([by_class(), network(), by_class().on(by_class().schedule)], ByTime([1.0, 0.3]))
    ),
    "further input": lambda: weighted(told(0), told(1)),
    "view": lambda: by_class().on(EDM()),
    "one network twice": lambda: Student(RoutedFlowMap([Jump(network())] * 2, HALVES), PLANS),
}


def test_folders_give_back_the_samples_in_another_process(tmp_path: Path) -> None:
    """Saved here and sampled there, bit for bit."""
    mine = {}
    for name, make in PRODUCTS.items():
        made = make()
        native.save(made, tmp_path / name)
        mine[name] = model_of(made).sample(6, MIXED[:6], seed=3)
    code = (
        "import sys, torch; from pathlib import Path; from fewstep.hub import native; "
        "from fewstep.models import model_of; "
        "made = {path.name: model_of(native.load(path)) for path in Path(sys.argv[1]).iterdir()}; "
        "cond = torch.tensor(eval(sys.argv[2])); "
        "torch.save({name: model.sample(6, cond, seed=3) for name, model in made.items()}, sys.argv[1] + '/x.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(MIXED[:6].tolist())], check=True)
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert set(theirs) == set(mine)
    for name, samples in mine.items():
        assert torch.equal(theirs[name], samples), name


def test_every_expert_takes_the_inputs_of_a_map(tmp_path: Path) -> None:
    """A further input reaches the experts of a folder that is opened; one whose network takes none is refused."""
    native.save(weighted(told(0), told(1)), tmp_path)
    again = native.load(tmp_path)
    x = again.sample(4, steps=3, seed=1, w=3.0)
    assert torch.equal(x, weighted(told(0), told(1)).sample(4, steps=3, seed=1, w=3.0))
    assert not torch.equal(x, again.sample(4, steps=3, seed=1))
    with pytest.raises(ValueError, match=r"extras\.w: the network takes no further inputs"):
        native.build(native.describe(weighted(told(0), told(1, ()))))


def test_experts_share_their_further_inputs_and_what_their_jumps_are() -> None:
    """Saved with them and built again, and an input that one expert's network does not take is refused; of maps to data
    a routed one is a map to data, of maps of two times one of two times."""
    weight = {"w": Input(1.0, 0.0, 4.0)}

    def told(*names: str) -> NetworkDenoiser:
        torch.manual_seed(0)
        made = network()
        return NetworkDenoiser(MLP(SHAPE, 16, 1, 10, extras=names), made.schedule, made.prediction, SHAPE, 10)

    experts = RoutedDenoiser([told("w"), told("v", "w")], HALVES)
    config = native.describe(Student(Jump(experts, extras=weight), PLANS))
    assert native.build(config).extras == weight
    config["flow_map"]["denoiser"]["experts"][1]["network"]["extras"] = ["v"]
    with pytest.raises(ValueError, match=r"extras\.w: the network takes v$"):
        native.build(config)
    to_data = Student(RoutedFlowMap([EDMConsistency(on_edm()), EDMConsistency(on_edm())], HALVES), {1: Plan((80.0,))})
    both = RoutedFlowMap([Jump(told("s"), two_times=True), Jump(told("s"), two_times=True)], HALVES)
    for student, only in ((to_data, True), (Student(both, {1: Plan((1.5,))}), False)):
        assert student.only_to_data == student.flow_map.only_to_data == only


def test_embedding_routers_are_saved(tmp_path: Path) -> None:
    """Centers lie in the weights; experts of another number than centers, and centers beyond reason, are refused."""
    centers = torch.randn(2, 3)
    made = RoutedDenoiser([text_denoiser(0), text_denoiser(1)], ByEmbedding(centers, "prompt_embeds"))
    native.save(made, tmp_path)
    again = native.load(tmp_path)
    assert torch.equal(again.router.centers, centers) and again.router.leaf == "prompt_embeds"
    config = native.describe(made)
    for shape, words in (([3, 3], "2 experts for a router of 3 parts"), ([2, 2**30], "more than any router has")):
        wrong = {**config, "router": {**config["router"], "shape": shape}}
        with pytest.raises(ValueError, match=words):
            native.build(wrong)


def test_a_routed_student_goes_on_to_the_next_stage(tmp_path: Path) -> None:
    """What a routed student teaches from is a routed denoiser: the next stage trains every expert on its own labels,
    and its product is saved as the first."""
    student = PRODUCTS["by-class"]()
    data = Dataset("zeros", torch.zeros(16, *SHAPE), torch.arange(16) % 10)
    more = fs.distill(
        network(), fs.DMD2(gan_weight=0.0, critic_steps=1), data, "2steps", batch=8, student=student, show=False
    )
    denoiser = more.flow_map.denoiser
    assert isinstance(denoiser, RoutedDenoiser)
    for before, after in zip(student.flow_map.experts, denoiser.experts, strict=True):
        assert not torch.equal(*(torch.cat([p.flatten() for p in m.parameters()]) for m in (before, after)))
    native.save(more, tmp_path)
    assert torch.equal(native.load(tmp_path).sample(4, seed=1), more.sample(4, seed=1))


def test_one_part_is_the_host_method_bit_for_bit() -> None:
    """A student of one part is trained to the same weights as the student alone."""
    data = Dataset("zeros", torch.zeros(16, *SHAPE), torch.arange(16) % 10)
    made = []
    for start in (second_network(), RoutedDenoiser([second_network()], ByClass.even(10, 1))):
        method = fs.DMD2(gan_weight=0.0, critic_steps=1)
        made.append(fs.distill(network(), method, data, "3steps", batch=8, student=start, show=False, precision="fp32"))
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert torch.equal(made[0].sample(5), made[1].sample(5))


def test_diffusers_has_no_place_for_experts(tmp_path: Path) -> None:
    """Refused in one line, also where the experts share one network."""
    for name in ("by-class", "one network twice", "view"):
        with pytest.raises(
            ValueError, match=r"^a routed model cannot be exported, diffusers' pipelines call one network"
        ):
            export(PRODUCTS[name](), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of the page on several experts, from top to bottom, and its commands on what that leaves."""
    page = (Path(__file__).parents[2] / "docs/ideas/routing.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert capsys.readouterr().out == 2 * "torch.Size([10, 1, 8, 8])\n"
    for student, own in zip(names["students"], HALVES.labels, strict=True):
        cond = torch.tensor(own)
        assert torch.equal(names["both"].sample(5, cond), student.sample(5, cond))
    for line in re.findall(r"^fewstep (.*)", page, re.MULTILINE):
        assert main([*line.split(), *(["--n", "20"] if "copy" not in line else [])]) == 0, line


def test_denoisers_of_experts_are_denoisers() -> None:
    """The classes are what they are said to be."""
    assert isinstance(by_class(), Denoiser) and by_class().native() is not None
    assert torch.equal(by_class().null, torch.tensor([-1]))
    assert torch.equal(PRODUCTS["by-class"]().flow_map.null, torch.tensor([-1]))
