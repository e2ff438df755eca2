"""Low-rank weights on any network: exact starts, counts, memory, methods, run folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.dataset import Dataset
from fewstep.denoisers import NetworkDenoiser, gradients
from fewstep.files import load_tensors, save_tensors
from fewstep.flow_maps import Jump
from fewstep.hub import lora, native
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.samplers.lsd import LSD
from fewstep.methods.start import Start
from fewstep.networks import MLP, CascadeUNet, UNet, UNet3d
from fewstep.networks.inputs import with_inputs
from fewstep.networks.lora import (
    Frozen,
    LowRank,
    factors,
    factors_in,
    frozen,
    is_frozen,
    layers_for,
    low_rank,
    merged,
    moving,
    rank_for,
    scaled,
)
from fewstep.networks.transformer import Transformer
from fewstep.predictions import TrigPrediction
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import EDM
from fewstep.tangents import tangent
from fewstep.training.budget import Budget
from fewstep.training.settings import Rank
from fewstep.training.trainer import Settings, train

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((2,), 16, 2, classes=3),
    "unet": lambda: UNet((1, 8, 8), (8, 16), 1, 16, classes=3),
    "unet3d": lambda: UNet3d((1, 4, 4, 4), (8, 16), 1, 16, classes=3),
    "cascade-unet": lambda: CascadeUNet((1, 8, 8), (), (8, 16), 1, 16, classes=3),
}


def shaken(net: Any, seed: int = 0) -> Any:
    """A network none of whose trainable weights is at its neutral start."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in moving(net):
            weight.add_(0.2 * torch.randn(weight.shape, generator=gen))
    return net


def made(name: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return shaken(NETWORKS[name]())


def called(net: Any, shape: tuple[int, ...] | None = None, **extras: Tensor) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(4, *(net.shape if shape is None else shape), generator=gen).to(next(net.parameters()).dtype)
    out: Tensor = net(x, torch.tensor([0.1, 0.4, 0.8, 1.2]), torch.tensor([0, 2, -1, 1]), **extras)
    return out


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_is_the_base_until_it_is_trained(name: str) -> None:
    """Bit for bit, on the base's memory; trained it is another, and the base again where its weights count 0 times."""
    net = made(name)
    copied = low_rank(net, 2)
    before = called(net)
    assert torch.equal(called(copied), before)
    own = {weight.data_ptr() for weight in net.parameters()}
    shared = [weight for weight in copied.parameters() if is_frozen(weight)]
    assert {weight.data_ptr() for weight in shared} == own
    assert not {weight.data_ptr() for weight in moving(copied)} & own
    shaken(copied)
    after = called(copied)
    assert float((after - before).abs().max()) > 1e-3
    with scaled(copied, 0.0):
        assert torch.equal(called(copied), before)
        with scaled(copied, 1.0):
            assert torch.equal(called(copied), before)
        assert torch.equal(called(copied), before)
    with scaled(copied, 0.5), scaled(copied, 2.0):
        assert torch.equal(called(copied), after)
    assert torch.equal(called(copied), after) and torch.equal(called(net), before)
    with torch.no_grad(), scaled(copied, 0.0):
        for weight in moving(copied):
            weight.fill_(torch.inf)  # what counts nothing is not computed either
        assert torch.equal(called(copied), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_is_the_same_function_as_an_ordinary_network(name: str) -> None:
    net = made(name).double()
    copied = shaken(low_rank(net, 2, alpha=3.0))
    plain = merged(copied)
    assert list(plain.state_dict()) == list(net.state_dict()) and not any(is_frozen(w) for w in plain.parameters())
    torch.testing.assert_close(called(plain), called(copied), rtol=1e-10, atol=1e-10)
    assert not {w.data_ptr() for w in plain.parameters()} & {w.data_ptr() for w in copied.parameters()}
    again = low_rank(plain, 2)
    assert torch.equal(called(again), called(plain))


def test_tokens_too() -> None:
    """The transformer of tokens, which is no denoiser of numbers."""
    torch.manual_seed(0)
    net = Transformer(6, 5, 6, width=16, blocks=1, heads=2, classes=3)
    copied, tokens, t = low_rank(net, 2), torch.randint(0, 5, (3, 6)), torch.rand(3)
    assert torch.equal(copied(tokens, t), net(tokens, t))
    shaken(copied)
    torch.testing.assert_close(merged(copied)(tokens, t), copied(tokens, t), rtol=1e-5, atol=1e-5)


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1)), (4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, padding_mode="circular", padding=1), (2, 4, 4, 4)),
}


class Holder(nn.Module):
    """A layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_adds_is_linear_in_alpha_and_counted_by_its_sides(kind: str) -> None:
    """``rank (d_in + d_out)`` numbers, with the window of a convolution in d_in; twice alpha is twice the addition."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    net = Holder(make()).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    one, two = (low_rank(net, 3, alpha, ("layer",)) for alpha in (1.0, 2.0))
    for copied in (one, two):
        shaken(copied, seed=4)
    weight = net.layer.weight
    assert sum(w.numel() for w in moving(one)) == 3 * (weight[0].numel() + len(weight))
    added = one(x) - net(x)
    assert float(added.detach().abs().max()) > 1e-2
    torch.testing.assert_close(two(x) - net(x), 2 * added, rtol=1e-12, atol=1e-12)
    with scaled(one, 2.0):
        torch.testing.assert_close(one(x), two(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged(one)(x), one(x), rtol=1e-12, atol=1e-12)


class Stage(nn.Module):
    """The projections of a transformer block of Stable Diffusion 2."""

    def __init__(self, width: int, text: int = 1024) -> None:
        super().__init__()
        for name, keys in (("attn1", width), ("attn2", text)):
            part = nn.Module()
            part.to_q, part.to_k = nn.Linear(width, width, bias=False), nn.Linear(keys, width, bias=False)
            part.to_v, part.to_out = nn.Linear(keys, width, bias=False), nn.ModuleList([nn.Linear(width, width)])
            self.add_module(name, part)
        self.ff = nn.Linear(width, 8 * width)


def test_the_attention_of_stable_diffusion_2() -> None:
    """3,319,808 numbers of rank 16: 16 blocks of widths 320 (5), 640 (5) and 1280 (6), a text of width 1024."""
    with torch.device("meta"):
        net = nn.ModuleList([Stage(width) for width in (*[320] * 5, *[640] * 5, *[1280] * 6)])
    copied = low_rank(net, 16)
    assert sum(w.numel() for w in moving(copied)) == 3_319_808
    assert len(factors_in(copied)) == 16 * 8 and not any("ff" in name for name in factors(copied))


class Odd(nn.Module):
    """Layers whose weights are not where a product of two can stand."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.plain = nn.Linear(8, 8)


def test_layers_that_cannot_take_factors_are_left() -> None:
    assert list(factors_in(low_rank(Odd(), 2))) == ["plain"]
    with pytest.raises(ValueError, match=r"targets=\('depthwise',\): no linear or convolution layer"):
        low_rank(Odd(), 2, targets=("depthwise",))


def test_targets_are_endings_of_names() -> None:
    net = made("unet")
    assert set(factors_in(low_rank(net, 2, targets=("qkv", "middle.1.out")))) == {"middle.1.qkv", "middle.1.out"}
    small = factors_in(low_rank(net, 4))
    assert small and all(16 * max(w.shape) > 0 for w in factors(low_rank(net, 4)).values())
    for name, layer in layers_for(frozen(net), None, 4).items():
        assert sum(w.numel() for w in small[name].parameters()) < layer.weight.numel()


@pytest.mark.parametrize("teacher", ["digits", "fashion"])
def test_less_than_a_twentieth_trains_by_default(teacher: str) -> None:
    """Of the bundled models, one an MLP and one a U-Net, at the rank that is chosen, and more at the next."""
    model = fs.load(teacher)
    whole = sum(w.numel() for w in model.parameters())
    copied = low_rank(model)
    share = sum(w.numel() for w in moving(copied)) / whole
    rank = rank_for(frozen(model))
    assert 0.02 < share < 0.05 < sum(w.numel() for w in moving(low_rank(model, 2 * rank))) / whole
    assert {held.rank for held in factors_in(copied).values()} == {rank}


def test_nothing_wakes_the_base() -> None:
    """Copies of copies share it, and groups, averages and states hold what moves."""
    net = NetworkDenoiser(made("mlp"), EDM(), TrigPrediction(), (2,), 3)
    student = low_rank(net, 2)
    target = copy.deepcopy(student)
    student.requires_grad_(True)
    nets = Networks(
        {"student": student, "target": target, "teacher": net}, {"all": Optimizer(("student",), 1e-2)}, ("student",),
        ("target",),
    )  # fmt: skip
    pointers = {w.data_ptr() for w in net.parameters()}
    for copied in (student, target):
        assert {w.data_ptr() for w in copied.parameters() if is_frozen(w)} == pointers
        assert not any(w.requires_grad for w in copied.parameters() if is_frozen(w))
    names = set(factors(student.net))
    assert len(nets.group_parameters("all")) == len(nets.weights("student")) == len(names)
    kept = {name.replace(".low_rank.", ".").removeprefix("net.") for name in nets.state("target")}
    assert kept == names and set(nets.state("teacher")) == set(net.state_dict())
    with gradients(student, "input"):
        assert not any(w.requires_grad for w in student.parameters())
    called(student).square().mean().backward()
    assert all((w.grad is None) is is_frozen(w) for w in student.parameters())
    moved = student.to(torch.float64)
    assert all(w.dtype == torch.float64 for w in moved.parameters()) and net.net.enter.weight.dtype == torch.float32
    assert isinstance(moved.net.enter.weight, Frozen)


def test_forward_derivatives_see_the_factors() -> None:
    """Those of PyTorch, and those of the continuous-time methods, which have rules of their own for layers."""
    copied = shaken(low_rank(made("unet"), 2))
    plain = merged(copied)
    x, v = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    t, slopes = torch.tensor([0.3, 0.9]), []
    for net in (copied, plain):
        slopes.append(torch.func.jvp(lambda y, net=net: net(y, t), (x,), (v,))[1])
        slopes.append(tangent(lambda y, at, net=net: net(y, at), x, t, v, torch.zeros(2))[1])
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=1e-4, atol=1e-4)


def test_factors_of_a_network_in_half_precision_train_in_single() -> None:
    copied = shaken(low_rank(made("mlp").bfloat16(), 2))
    assert {w.dtype for w in moving(copied)} == {torch.float32}
    x, t = torch.randn(3, 2).bfloat16(), torch.rand(3)
    assert copied(x, t).dtype == torch.bfloat16
    torch.testing.assert_close(merged(copied)(x, t), copied(x, t), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("order", ["low rank first", "inputs first", "asked for"])
def test_new_inputs_train_in_full_beside_the_factors(order: str) -> None:
    """A network that is given a target time before, after or with its low-rank weights: the teacher until trained."""
    teacher = NetworkDenoiser(made("unet"), EDM(), TrigPrediction(), (1, 8, 8), 3)
    given = {"student": shaken(low_rank(teacher, 2))} if order == "low rank first" else {}
    if order == "inputs first":
        wider = copy.deepcopy(teacher)
        wider.net = with_inputs(teacher.net, ("s",))
        own = ["net.conditioning.extras.s.weight"]
        student = low_rank(wider, 2, trained=own).requires_grad_(True)
    else:
        student = Start(teacher, given=given, low_rank=LowRank(2)).network("student", extras=("s",))
    s = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(called(student, s=s), called(given.get("student", teacher)), rtol=0, atol=0)
    in_full = {n for n, w in student.named_parameters() if w.requires_grad and "lora_" not in n}
    assert in_full == {"net.conditioning.extras.s.weight"} and not any("extras" in n for n in factors(student))
    if order != "inputs first":
        assert {w.data_ptr() for w in student.parameters() if is_frozen(w)} == {
            w.data_ptr() for w in teacher.parameters()
        }
    shaken(student)
    assert not torch.equal(called(student, s=s), called(student, s=s + 1))


def test_a_cascade_starts_from_the_merged_network() -> None:
    copied = shaken(low_rank(made("unet"), 2))
    cascade = CascadeUNet.from_unet(copied)
    torch.testing.assert_close(called(cascade), called(copied), rtol=1e-5, atol=1e-5)


def test_bad_requests_get_one_line() -> None:
    net = made("mlp")
    with pytest.raises(ValueError, match="rank=0: low-rank weights need a rank of at least 1"):
        low_rank(net, 0)
    with pytest.raises(ValueError, match="alpha=-1 must be positive"):
        low_rank(net, 2, alpha=-1.0)
    with pytest.raises(ValueError, match="the network holds low-rank weights already"):
        low_rank(low_rank(net, 2), 2)
    with pytest.raises(ValueError, match="no low-rank weights to scale"), scaled(net, 0.0):
        pass
    with pytest.raises(ValueError, match="rank=500: no layer of this network is larger"):
        low_rank(net, 500)
    with pytest.raises(ValueError, match="lora_alpha says nothing without lora_rank"):
        Settings(lora_alpha=2.0)
    assert Settings(lora_rank=64) == Settings(lora_rank="64") == Settings(lora_rank=Rank(64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'many' is not a whole number"):
        Rank.parse("many")
    with pytest.raises(ValueError, match="rank 0: it must be at least 1"):
        Settings(lora_rank=Rank(0))


# --- methods


DATA = Dataset("points", torch.randn(24, 2, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 3)
CD = ConsistencyDistillation(lr=1e-2, mu=0.5)


def teacher_of_points() -> NetworkDenoiser:
    return NetworkDenoiser(made("mlp"), EDM(), TrigPrediction(), (2,), 3)


def settings(steps: int = 4, **more: Any) -> Settings:
    return Settings(
        Budget(steps),
        8,
        precision="fp32",
        save_seconds=0.0,
        lora_rank=Rank(2),
        lora_targets=("first", "second"),
        **more,
    )


def test_a_stopped_run_of_low_rank_weights_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a target network and averages; the checkpoint holds no weight of the base, and the teacher does not move."""
    teacher = teacher_of_points()
    start = copy.deepcopy(teacher.state_dict())
    made = train(CD, Start(teacher, DATA), settings(), tmp_path / "whole", show=False).model
    assert set(factors_in(made)) == {
        f"flow_map.denoiser.net.blocks.{k}.{name}" for k in (0, 1) for name in ("first", "second")
    }
    assert all(torch.equal(w, start[n]) for n, w in teacher.state_dict().items())
    kept = load_tensors(tmp_path / "whole" / "checkpoint.safetensors")
    assert {n.split("/")[1] for n in kept if n.startswith("module/")} == {"student", "target"}
    assert all("lora_" in n for n in kept if n.startswith("module/"))
    each = sum(w.numel() for w in moving(made))
    assert sum(w.numel() for n, w in kept.items() if n.startswith("average/")) == each
    assert sum(w.numel() for n, w in kept.items() if n.endswith("exp_avg_sq")) == each

    updates = ConsistencyDistillation.updates

    def cut(self: Any, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Any]:
        if progress.step == 2:
            raise KeyboardInterrupt
        return updates(self, nets, batch, progress)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ConsistencyDistillation, "updates", cut)
        train(CD, Start(teacher, DATA), settings(), tmp_path / "parts", show=False)
    again = train(CD, Start(teacher, DATA), settings(), tmp_path / "parts", show=False).model
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in made.state_dict().items())
    moved = [w for n, w in factors(made).items() if "lora_B" in n]
    assert moved and all(bool(w.any()) for w in moved)


def test_a_run_asks_for_students_and_a_method_for_critics() -> None:
    start = Start(teacher_of_points(), low_rank=LowRank(2))
    assert factors_in(start.network()) and factors_in(start.network("velocity"))
    assert not factors_in(start.network("critic")) and not factors_in(Start(start.teacher).network())
    critic = start.network("critic", low_rank=LowRank(1, targets=("first",)))
    assert {held.rank for held in factors_in(critic).values()} == {1}
    went_on = shaken(low_rank(start.teacher, 3))
    copied = Start(start.teacher, made={"student": went_on}, low_rank=LowRank(2)).network()
    assert {held.rank for held in factors_in(copied).values()} == {3}
    assert torch.equal(called(copied), called(went_on)) and moving(copied)[0] is not moving(went_on)[0]
    with pytest.raises(ValueError, match=r"the student: targets=\('nothing',\): no linear"):
        Start(start.teacher, low_rank=LowRank(2, targets=("nothing",))).network()


def test_a_method_without_a_network_to_train_says_so() -> None:
    from fewstep.discrete.chains import Masked
    from fewstep.discrete.denoisers import NetworkDiscreteDenoiser

    tokens = Dataset("tokens", torch.randint(0, 5, (8, 6)))
    teacher: Any = NetworkDiscreteDenoiser(Transformer(6, 5, 6, 8, 1, 2, timed=False), Masked(5), 6)
    with pytest.raises(ValueError, match="lora_rank=2: lsd trains no copy of a network"):
        train(LSD(steps=2, teacher_steps=4), Start(teacher, tokens), Settings(Budget(1), 4, lora_rank=Rank(2)))


# --- folders


def student_on(teacher: Any) -> Student:
    latest = teacher.schedule.t_max
    return Student(Jump(shaken(lora.attach(teacher, 2))), {2: Plan((latest, latest / 2), 1.0)})


def held_in(folder: Path) -> list[str]:
    return list(load_tensors(folder / "model.safetensors"))


def test_a_student_on_a_bundled_teacher_is_saved_as_its_factors(tmp_path: Path) -> None:
    student = student_on(fs.load("digits"))
    fs.save(student, tmp_path)
    assert len(held_in(tmp_path)) == 26 and all(".lora_" in name for name in held_in(tmp_path))
    described = json.loads((tmp_path / "config.json").read_text())["model"]["flow_map"]["denoiser"]["network"]
    assert described["low_rank"]["model"] == {"folder": "digits", "network": "net"}
    opened = fs.load(tmp_path)
    assert torch.equal(opened.sample(3, seed=1), student.sample(3, seed=1))
    assert native.describe(opened) == native.describe(student)
    wider = Start(fs.load("digits"), low_rank=LowRank(2)).network("student", extras=("s",))
    low = native.describe(wider)["network"]["low_rank"]
    assert (low["model"]["folder"], low["trained"]) == ("digits", ["conditioning.extras.s.weight"])


def test_a_student_on_a_model_folder_is_saved_over_it(tmp_path: Path) -> None:
    """It is opened where the folder is what it was, and goes on from there; a changed or moved base is one line."""
    fs.save(teacher_of_points(), tmp_path / "teacher")
    fs.save(student_on(fs.load(tmp_path / "teacher")), tmp_path / "student")
    opened = fs.load(tmp_path / "student")
    fs.save(Student(Jump(shaken(opened.flow_map.denoiser, 5)), opened.plans), tmp_path / "further")
    for name in ("student", "further"):
        assert all(".lora_" in n for n in held_in(tmp_path / name)), name
    assert fs.load(tmp_path / "further").sample(2).isfinite().all()
    weights = tmp_path / "teacher" / "model.safetensors"
    before = load_tensors(weights)
    save_tensors(weights, {name: tensor + 0.1 for name, tensor in before.items()})
    with pytest.raises(ValueError, match=r"the model .*teacher has other weights than when these low-rank ones"):
        fs.load(tmp_path / "student")
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="teacher is not there any more, on whose weights"):
        fs.load(tmp_path / "student")


@pytest.mark.parametrize("why", ["in memory", "trained since"])
def test_a_base_that_lies_nowhere_is_kept_too(why: str, tmp_path: Path) -> None:
    teacher = teacher_of_points() if why == "in memory" else shaken(fs.load("digits"))
    student = student_on(teacher)
    fs.save(student, tmp_path / "student")
    assert any(".lora_" not in name for name in held_in(tmp_path / "student"))
    opened = fs.load(tmp_path / "student")
    assert torch.equal(opened.sample(3), student.sample(3)) and factors_in(opened)
    fs.save(Student(Jump(shaken(opened.flow_map.denoiser)), opened.plans), tmp_path / "further")
    assert all(".lora_" in name for name in held_in(tmp_path / "further"))  # over the student's folder


def test_distill_makes_low_rank_students_in_folders(tmp_path: Path) -> None:
    """``fs.distill(..., lora=...)``: the call that repeats it goes on, another rank is another run."""
    arguments: Any = {"data": DATA, "budget": "3steps", "batch": 8, "precision": "fp32", "show": False}
    fs.save(teacher_of_points(), tmp_path / "teacher")
    where = {"folder": tmp_path / "run", **arguments}
    student = fs.distill(str(tmp_path / "teacher"), CD, lora=2, **where)
    assert all(".lora_" in name for name in held_in(tmp_path / "run" / "model"))
    opened = fs.load(tmp_path / "run")
    assert torch.equal(opened.sample(3), student.sample(3))
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())["settings"]
    assert (kept["lora_rank"], kept["lora_alpha"], kept["lora_targets"]) == (2, None, None)
    again = fs.distill(str(tmp_path / "teacher"), CD, lora=LowRank(2), **where)
    assert torch.equal(again.sample(3), student.sample(3))
    with pytest.raises(ValueError, match="holds another run: lora_rank is 2 there and 3 here"):
        fs.distill(str(tmp_path / "teacher"), CD, lora=3, **where)
    further = fs.distill(str(tmp_path / "teacher"), CD, lora=2, student=opened, **arguments)
    assert {held.rank for held in factors_in(further).values()} == {2} and len(moving(further)) == len(factors(further))
