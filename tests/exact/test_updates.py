"""What a method may yield: questions about the whole batch, updates of several groups; how groups are optimized."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from child_processes import run_on_two
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data.dataset import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import load_tensors, save_tensors
from fewstep.methods.method import Batch, Mean, Networks, Optimizer, Progress, Update, alone
from fewstep.methods.parts.balance import Balanced as Other
from fewstep.methods.parts.balance import balance, balance_losses
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction
from fewstep.schedules import EDM
from fewstep.training import groups, nonfinite
from fewstep.training.budget import Budget
from fewstep.training.checkpoint import OneFile
from fewstep.training.nonfinite import NonFiniteError
from fewstep.training.optimizers import few_threads, make_optimizer, rate
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, Run, train

SETTINGS = Settings(Budget(5), 16, precision="fp32", log_steps=1, averages=())


def teacher() -> NetworkDenoiser:
    """A float64 network away from its neutral start."""
    gen = torch.Generator().manual_seed(3)
    net = MLP((2,), 16, 1).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * (0.3 if p.ndim < 2 else 0.25))
    return NetworkDenoiser(net, EDM(), EDMPrediction(), (2,))


def points() -> Dataset:
    gen = torch.Generator().manual_seed(4)
    return Dataset("points", torch.randn(40, 2, generator=gen, dtype=torch.float64))


def weights(result: Result) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


Updates = Generator[Update | Mean, Tensor, None]


@dataclass(frozen=True)
class Plain(Denoising):
    """Steepest descent, so that rounding is not magnified."""

    name: ClassVar[str] = "plain"

    def networks(self, start: Start) -> Networks:
        return Networks(
            {"model": start.network("teacher")}, {"model": Optimizer(("model",), 0.05, kind="sgd", momentum=0.5)}
        )

    def errors(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's output and the squared error of every sample."""
        assert batch.x is not None
        t = batch.rng.uniform(len(batch.x), low=0.1, high=2.0)
        out = nets.model(nets.model.schedule.add_noise(batch.x, batch.rng.normal_like(batch.x), t), t)
        return out, (out - batch.x).square().mean(1)


@dataclass(frozen=True)
class Statistic(Plain):
    """Errors over their root mean square in the batch."""

    name: ClassVar[str] = "statistic"

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Updates:
        _, h = self.errors(nets, batch)
        m = yield Mean(h.square().mean())
        yield Update("model", (h.square() / m.sqrt()).mean(), {"m": m})


@dataclass(frozen=True)
class OfItsPart(Plain):
    """The same with the statistic of the part."""

    name: ClassVar[str] = "of-its-part"

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        _, h = self.errors(nets, batch)
        m = h.square().mean().detach()
        yield Update("model", (h.square() / m.sqrt()).mean(), {"m": m})


@dataclass(frozen=True)
class Balanced(Plain):
    """Two losses whose gradients at the output, or at the last weight, are balanced."""

    name: ClassVar[str] = "balanced"
    at_weight: bool = False

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Updates:
        out, h = self.errors(nets, batch)
        second = out.pow(4).mean()
        at = nets.model.net.leave.weight if self.at_weight else out
        weight = yield from balance(h.mean(), second, at)
        yield Update("model", h.mean() + weight * second, {"weight": weight})


@dataclass(frozen=True)
class BalancedOnce(Plain):
    """The same at the output, which is differentiated once."""

    name: ClassVar[str] = "balanced-once"

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Updates:
        out, h = self.errors(nets, batch)
        loss, (weight,) = yield from balance_losses(h.mean(), Other(out.pow(4).mean()), at=out)
        yield Update("model", loss, {"weight": weight})


METHODS: dict[str, Plain] = {
    "statistic": Statistic(), "output": Balanced(), "weight": Balanced(at_weight=True), "once": BalancedOnce(),
}  # fmt: skip


# --- the mean of the whole batch ---------------------------------------------------------------------------------


def process(rank: int, folder: Path) -> None:
    """One of two processes, each with two parts of the batch in the second run."""
    for name, method in METHODS.items():
        for accumulate in (1, 2):
            result = train(method, Start(teacher(), points()), replace(SETTINGS, accumulate=accumulate), show=False)
            if rank == 0:
                save_tensors(folder / f"{name}-{accumulate}.safetensors", {"weights": weights(result)})


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_on_two(process, folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_mean_does_not_depend_on_how_the_batch_is_split(name: str, two_processes: Path) -> None:
    """One part, two, four, two processes, two processes of two parts each: the same weights to 1e-12."""
    whole = weights(train(METHODS[name], Start(teacher(), points()), SETTINGS, show=False))
    assert largest(whole, torch.cat([p.flatten() for p in teacher().parameters()])) > 1e-3
    for parts in (2, 4):
        split = train(METHODS[name], Start(teacher(), points()), replace(SETTINGS, accumulate=parts), show=False)
        assert largest(whole, weights(split)) < 1e-12
    for parts in (1, 2):
        there = load_tensors(two_processes / f"{name}-{parts}.safetensors")["weights"]
        assert largest(whole, there) < 1e-12


def test_balanced_losses_are_differentiated_once_and_the_same() -> None:
    """The weights and the logged loss of the sum with the weight before it."""
    one, other = (train(METHODS[name], Start(teacher(), points()), SETTINGS, show=False) for name in ("output", "once"))
    assert largest(weights(one), weights(other)) < 1e-12


def test_a_statistic_of_the_part_does_depend_on_it() -> None:
    """What the test above would show without the question."""
    whole = train(OfItsPart(), Start(teacher(), points()), SETTINGS, show=False)
    split = train(OfItsPart(), Start(teacher(), points()), replace(SETTINGS, accumulate=4), show=False)
    assert largest(weights(whole), weights(split)) > 1e-4


def test_the_mean_of_one_part_is_the_value_itself() -> None:
    """Bit for bit what the plain code makes, and no gradient flows through it."""
    asked = train(Statistic(), Start(teacher(), points()), SETTINGS, show=False)
    plain = train(OfItsPart(), Start(teacher(), points()), SETTINGS, show=False)
    assert torch.equal(weights(asked), weights(plain))
    value = torch.ones((), requires_grad=True)

    def updates() -> Updates:
        m = yield Mean(value * 3)
        assert not m.requires_grad and float(m) == 3
        yield Update("model", value)

    assert [u.group for u in alone(updates())] == ["model"]


def test_parts_that_do_not_ask_in_lock_step_are_named() -> None:
    """One micro-batch asks, the other does not: an error, and no wait for an answer that never comes."""

    @dataclass(frozen=True)
    class Uneven(Statistic):
        def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Updates:
            _, h = self.errors(nets, batch)
            if batch.rng.part == 0:
                yield Mean(h.mean())
            yield Update("model", h.mean())

    with pytest.raises(RuntimeError, match="micro-batches yielded different numbers"):
        train(Uneven(), Start(teacher(), points()), replace(SETTINGS, accumulate=2), show=False)


def test_balance_of_known_gradients() -> None:
    """``a x`` and ``b x`` of one weight have gradients in the ratio a / b; a loss without gradient gives the bound."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def answered(first: Tensor, second: Tensor, at: Tensor) -> float:
        questions = balance(first, second, at, eps=1e-9, most=50.0)
        asked = next(questions)
        try:
            questions.send(asked.value)
        except StopIteration as end:
            return float(end.value)
        raise AssertionError("asked twice")

    assert answered(6 * w.sum(), 2 * w.sum(), w) == pytest.approx(3, rel=1e-8)
    out = 5 * w
    assert answered(out.square().sum(), out.sum(), out) == pytest.approx(math.sqrt(500 / 2), rel=1e-8)
    assert answered(w.sum(), 0 * w.sum(), w) == 50


# --- several groups ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Two(Plain):
    """A network and a scale beside it, moved by one loss or by one loss each."""

    name: ClassVar[str] = "two"
    together: bool = True

    def networks(self, start: Start) -> Networks:
        scale = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(scale.weight)
        groups = {
            "model": Optimizer(("model",), 0.05, kind="sgd", clip=0.1), "scale": Optimizer(("scale",), 1e-2),
        }  # fmt: skip
        return Networks({"model": start.network("teacher"), "scale": scale}, groups, ema=("scale",))

    def loss(self, nets: Networks, batch: Batch) -> Tensor:
        out, _ = self.errors(nets, batch)
        return (out * nets.scale.weight[0, 0] - batch.x).square().mean()

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        yield Update(("model", "scale") if self.together else "model", self.loss(nets, batch))


def test_one_loss_moves_several_groups(tmp_path: Path) -> None:
    """Each with its own optimizer, clip and record; alone, one of them does not move; resumed, nothing changes."""
    both = train(Two(), Start(teacher(), points()), SETTINGS, show=False)
    one = train(Two(together=False), Start(teacher(), points()), SETTINGS, show=False)
    assert {"model+scale/loss", "model/grad_norm", "scale/grad_norm", "scale/lr"} <= set(both.records[0])
    assert both.records[0]["model+scale/loss"] == one.records[0]["model/loss"]
    assert both.records[0]["model/grad_norm"] == one.records[0]["model/grad_norm"]
    assert both.records[-1]["model+scale/loss"] != one.records[-1]["model/loss"], "the scale has not moved"
    train(Two(), Start(teacher(), points()), replace(SETTINGS, budget=Budget(2)), tmp_path, show=False)
    assert torch.equal(weights(train(Two(), Start(teacher(), points()), SETTINGS, tmp_path, show=False)), weights(both))
    split = train(Two(), Start(teacher(), points()), replace(SETTINGS, accumulate=4), show=False)
    assert largest(weights(split), weights(both)) < 1e-12


# --- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_the_plain_one(momentum: float, nesterov: bool, tmp_path: Path) -> None:
    """``v <- m v + g``, ``w <- w - lr (v or g + m v)``; and a resumed run has its momentum."""
    spec = Optimizer(("model",), 0.1, kind="sgd", momentum=momentum, nesterov=nesterov)
    nets = Networks({"model": nn.Linear(3, 1).double()}, {"model": spec})
    optimizer, (w, _) = make_optimizer(spec, nets, "model"), nets.group_parameters("model")
    x, v, expected = torch.randn(4, 3, dtype=torch.float64), torch.zeros_like(w), w.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        nets.model(x).square().mean().backward()
        v = momentum * v + w.grad
        expected -= 0.1 * (w.grad + momentum * v if nesterov else v)
        optimizer.step()
        assert largest(w.detach(), expected) < 1e-14


def test_rates_are_factors_of_a_module() -> None:
    """Two equal modules, one at a tenth of the rate: it moves a tenth as far, also when the rate falls."""
    twin = nn.Linear(2, 1, bias=False).double()
    other = nn.Linear(2, 1, bias=False).double()
    other.load_state_dict(twin.state_dict())

    @dataclass(frozen=True)
    class Twins(Plain):
        def networks(self, start: Start) -> Networks:
            spec = Optimizer(("fast", "slow"), 0.1, kind="sgd", rates={"slow": 0.1}, decay="linear")
            return Networks({"model": start.teacher, "fast": twin, "slow": other}, {"both": spec})

        def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
            yield Update("both", nets.fast(batch.x).mean() + nets.slow(batch.x).mean())

    start = twin.weight.detach().clone()
    train(Twins(), Start(teacher(), points()), SETTINGS, show=False)
    fast, slow = twin.weight.detach() - start, other.weight.detach() - start
    assert float(fast.abs().min()) > 1e-3 and largest(slow, 0.1 * fast) < 1e-15


@pytest.mark.parametrize("beta", [0.999, 0.9])
@pytest.mark.parametrize("resumed", [False, True])
def test_rectified_adam_is_pytorchs(beta: float, resumed: bool) -> None:
    """Before and after the second moment counts, with eps and weight decay that matter, and after a resume."""
    spec = Optimizer(("model",), 0.1, kind="radam", betas=(0.9, beta), eps=0.05, weight_decay=0.1)
    nets, other = (nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    other.load_state_dict(nets.state_dict())
    held = Networks({"model": nets}, {"model": spec})
    ours = make_optimizer(spec, held, "model")
    plain = torch.optim.RAdam(other.parameters(), 0.1, (0.9, beta), 0.05, 0.1, foreach=False)
    rng = torch.Generator().manual_seed(0)
    for step in range(16):
        for mine, theirs in zip(nets.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, dtype=torch.float64, generator=rng)
            theirs.grad = mine.grad.clone()
        ours.step()
        plain.step()
        for mine, theirs in zip(nets.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=1e-13)
        if resumed and step in (3, 9):
            again = make_optimizer(spec, held, "model")
            again.load_state_dict(ours.state_dict())
            ours = again
    assert ours.param_groups[0]["lr"] == 0.1 and ours.param_groups[0]["eps"] == 0.05


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam", "sgd"])
def test_a_small_step_on_one_thread_has_the_same_bits(kind: Any) -> None:
    """And the number of threads is put back, also after an error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = []
        for block in (few_threads, lambda optimizer: nullcontext()):
            spec = Optimizer(("model",), 0.1, kind=kind, weight_decay=0.1)
            net = nn.Linear(300, 300)
            with torch.no_grad():
                net.weight.copy_(torch.linspace(-1, 1, 90000).reshape(300, 300).sin())
            nets = Networks({"model": net}, {"model": spec})
            optimizer = make_optimizer(spec, nets, "model")
            for k in range(3):
                for p in nets.group_parameters("model"):
                    p.grad = (p.detach() * (k + 1)).cos()
                with block(optimizer):
                    assert torch.get_num_threads() == (1 if block is few_threads else 2)
                    optimizer.step()
            made.append(net.weight.detach().clone())
        assert torch.equal(*made)
        with pytest.raises(ZeroDivisionError), few_threads(optimizer):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0.25]),
        ("linear:0.2", [1, 0.6, 0.4]),
        ("warm-linear:0.6", [0, 0.5 / 0.6, 0.25 / 0.4]),
        ("warm-linear:0", [1, 0.5, 0.25]),
        ("cosine", [1, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("cosine:0.5", [1, 0.75, 0.5 + (1 - math.sqrt(0.5)) / 4]),
        ("stretched-cosine:1", [1, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("stretched-cosine:2", [1, (1 + math.sqrt(0.5)) / 2, (1 + math.cos(0.375 * math.pi)) / 2]),
        ("inverse-sqrt:100", [1, math.sqrt(0.5), 0.5]),
    ],
)
def test_courses_of_the_learning_rate(decay: str, expected: list[float]) -> None:
    """At 0, 200 and 400 steps, which are none, half and three quarters of the budget."""
    spec = Optimizer(("model",), 1.0, decay=decay)
    places = [Progress(0, 0, 0.0), Progress(200, 0, 0.5), Progress(400, 0, 0.75)]
    assert [rate(spec, place) for place in places] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"decay": "cosin"}, "decay='cosin' is not one of"),
        ({"decay": "inverse-sqrt"}, "is not one of"),
        ({"decay": "stretched-cosine"}, "is not one of"),
        ({"decay": "stretched-cosine:0.5"}, "a length in budgets, at least 1"),
        ({"decay": "inverse-sqrt:0"}, "a positive number of steps"),
        ({"decay": "linear:1.5"}, "a floor in"),
        ({"decay": "warm-linear:1"}, r"a share of the budget in \[0, 1\)"),
        ({"lr": -1.0}, "lr=-1 must be at least 0"),
        ({"clip": 0.0}, "clip=0 must be positive"),
        ({"rates": {"other": 2.0}}, "rates name modules that are not in the group"),
    ],
)
def test_optimizers_that_cannot_work_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optimizer(("model",), **({"lr": 1.0} | values))


# --- gradients that are no numbers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ill(Plain):
    """One entry of a gradient is no number at some steps."""

    name: ClassVar[str] = "ill"
    at: tuple[int, ...] = (2,)
    way: str = "stop"

    def networks(self, start: Start) -> Networks:
        spec = Optimizer(("model",), 0.05, kind="sgd", clip=0.1, nonfinite=self.way)  # type: ignore[arg-type]
        return Networks({"model": start.network("teacher")}, {"model": spec})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        _, h = self.errors(nets, batch)
        # the square root of 0 has the value 0 and no derivative
        ill = (0 * nets.model.net.leave.bias[0]).sqrt() if progress.step in self.at else 0.0
        yield Update("model", h.mean() + ill)


def test_a_step_without_numbers_is_skipped(tmp_path: Path) -> None:
    """Nothing moves at that step, it is counted in the log and in the checkpoint, and the rest goes on."""
    long = replace(SETTINGS, budget=Budget(3))
    skipped = train(Ill(way="skip"), Start(teacher(), points()), long, tmp_path, show=False)
    before = train(Ill(way="skip", at=()), Start(teacher(), points()), replace(SETTINGS, budget=Budget(2)), show=False)
    assert torch.equal(weights(skipped), weights(before))
    assert [r["model/nonfinite"] for r in skipped.records] == [0, 0, 1]
    assert "model/loss" not in skipped.records[2]
    assert OneFile(tmp_path).counters()["nonfinite"] == {"model": [1, 3]}


def test_entries_without_numbers_are_put_to_zero() -> None:
    """The entry keeps its value, but for momentum that it has not; all others move."""
    runs = [replace(SETTINGS, budget=Budget(steps)) for steps in (2, 3)]
    made = [train(Ill(way="zero"), Start(teacher(), points()), settings, show=False).model for settings in runs]
    before, after = (dict(model.named_parameters()) for model in made)
    change = (after["net.leave.bias"] - before["net.leave.bias"]).abs()
    assert float(change[0]) == 0 and float(change[1]) > 0
    assert not torch.equal(after["net.enter.weight"], before["net.enter.weight"])


def test_too_many_steps_without_numbers_stop_the_run() -> None:
    """Eleven of eleven: the run stops and says so."""
    always = Ill(at=tuple(range(40)), way="skip")
    with pytest.raises(NonFiniteError, match=r"step 10: the gradient of .*; it was so at 11 of 11 updates of 'model'"):
        train(always, Start(teacher(), points()), replace(SETTINGS, budget=Budget(40)), show=False)


def test_too_many_are_more_than_ten_and_more_than_a_tenth() -> None:
    """Ten of ten may be the first steps of a scale that still adapts; 11 of 110 are exactly a tenth."""
    few = [nonfinite.Tally(bad, updates).too_many() for bad, updates in ((10, 10), (11, 110), (11, 200), (0, 0))]
    assert few == [False] * 4
    assert nonfinite.Tally(11, 109).too_many() and nonfinite.Tally(11, 11).too_many()


@pytest.mark.parametrize("log_steps", [1, 1000])
def test_where_looking_waits_it_is_put_off(log_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the norm is not looked at in the update, and the run stops at the next record, or after 20 steps,
    names step and tensor, and leaves the checkpoint from before."""
    for module in (groups, nonfinite):
        monkeypatch.setattr(module, "waits", lambda device: True)
    settings = replace(SETTINGS, budget=Budget(60), log_steps=log_steps, save_seconds=1e9)
    begun = replace(settings, budget=Budget(3))
    train(Ill(at=(30,)), Start(teacher(), points()), begun, tmp_path, show=False)
    before = OneFile(tmp_path).tensors({})
    steps: list[int] = []

    @dataclass(frozen=True)
    class Counting(Ill):
        def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
            steps.append(progress.step)
            yield from super().updates(nets, batch, progress)

        __repr__ = lambda self: Ill(at=self.at).__repr__()  # noqa: E731

    with pytest.raises(NonFiniteError, match=r"step 30: the gradient of model\.net\.leave\.bias \(1 in all\) is not"):
        train(Counting(at=(30,)), Start(teacher(), points()), settings, tmp_path, show=False)
    assert max(steps) == 30 if log_steps == 1 else 30 < max(steps) < 50
    saved = OneFile(tmp_path)
    assert saved.counters()["steps"] == 3
    assert all(torch.equal(saved.tensors({})[name], tensor) for name, tensor in before.items())


class Reads(TorchDispatchMode):
    """Counts how often a number is read out of a tensor, which on a GPU waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [Ill(at=()), Two(), Statistic()], ids=lambda method: method.name)
def test_an_update_reads_no_number(method: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where looking waits, nothing is read between the method's own steps; where it does not, the norm is."""
    for waiting, most in ((True, 0), (False, math.inf)):
        for module in (groups, nonfinite):
            monkeypatch.setattr(module, "waits", lambda device, waiting=waiting: waiting)
        run = Run(method, method.networks(Start(teacher())), replace(SETTINGS, accumulate=2), Parallel())
        run.step(points())
        pending = [method.updates(run.nets, batch, run.progress()) for batch in run.batches(points())]
        with Reads() as reads:
            while updates := run.backward(pending):
                run.recent |= run.apply(updates, run.progress())[1]
        assert reads.count <= most and (waiting or reads.count > 0)


def test_clipping_without_looking_is_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a run that clips by tensors are those of one that looks at the norm."""
    looked = train(Ill(at=()), Start(teacher(), points()), SETTINGS, show=False)
    assert any(r["model/grad_norm"] > 0.1 for r in looked.records), "nothing was clipped"
    for module in (groups, nonfinite):
        monkeypatch.setattr(module, "waits", lambda device: True)
    blind = train(Ill(at=()), Start(teacher(), points()), SETTINGS, show=False)
    assert largest(weights(looked), weights(blind)) < 1e-14


@pytest.mark.parametrize("waiting", [False, True])
def test_gradients_below_the_bound_are_left_alone(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm 5: bounded to 1 it is a fifth, bounded to 10 it is the same bit for bit; of mixed types too."""
    monkeypatch.setattr(nonfinite, "waits", lambda device: waiting)
    for bound, factor in ((1.0, 0.2), (10.0, 1.0)):
        gradients = [torch.tensor([3.0]), torch.tensor([0.0, 4.0], dtype=torch.float64)]
        nonfinite.clip_norm(gradients, torch.tensor(5.0), bound)
        assert gradients[0].tolist() == pytest.approx([3 * factor], rel=1e-6)
        assert gradients[1].tolist() == pytest.approx([0.0, 4 * factor], rel=1e-6)
        if factor == 1:
            assert gradients[0].tolist() == [3.0] and gradients[1].tolist() == [0.0, 4.0]
