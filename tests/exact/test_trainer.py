"""The trainer: splitting the work changes nothing, a stop changes nothing, and what is wrong is said by name."""

import json
import os
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.files import save_tensors
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveDistillation
from fewstep.methods.flow_maps.rectified_flow import InstaFlow, Reflow, ReflowDistillation
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Progress, Update
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP, UNet
from fewstep.predictions import EDMPrediction, Retimed
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM
from fewstep.training import precision
from fewstep.training.budget import Budget
from fewstep.training.checkpoint import OneFile
from fewstep.training.interruptions import only_run_in
from fewstep.training.nonfinite import NonFiniteError
from fewstep.training.profiles import HalfLife, Power
from fewstep.training.progress import Records
from fewstep.training.settings import Settings
from fewstep.training.snapshots import reconstruct_model
from fewstep.training.trainer import Interrupted, Result, train

METHODS: dict[str, Method] = {
    "denoising": Denoising(lr=1e-2),
    "cm": ConsistencyDistillation(lr=1e-2, mu=0.5),
    "scm": ContinuousConsistencyDistillation(lr=1e-2, tangent_warmup=0.0),
    "dmd": DMD(match_pairs=True, lr=1e-2, critic_lr=1e-2),
    "dmd2": DMD2(steps=2, critic_steps=2, gan_weight=0.1, discriminator_weight=0.1, lr=1e-2, critic_lr=1e-2),
    "reflow": Reflow(lr=1e-2),
    "reflow-distil": ReflowDistillation(lr=1e-2, steps=2),
    "pd": ProgressiveDistillation(lr=1e-2, steps=2),
}
SETTINGS = Settings(Budget(8), 16, precision="fp32", log_steps=1)


def teacher(name: str = "cm") -> NetworkDenoiser:
    """A small network away from its neutral start, of points or of 8x8 pictures, with three classes; told the
    angle for a method that differentiates its time."""
    gen, unet = torch.Generator().manual_seed(3), name == "unet"
    shape = (1, 8, 8) if unet else (2,)
    net = UNet((1, 8, 8), (8, 16), 1, 16, classes=3, dropout=0.2) if unet else MLP((2,), 16, 2, classes=3)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=gen)
            p.copy_(noise * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return NetworkDenoiser(net, EDM(), Retimed(of="edm") if name == "scm" else EDMPrediction(), shape, 3)


def points(unet: bool = False) -> Dataset:
    """40 samples, an odd number of batches, with paired noise for the methods that need it."""
    gen = torch.Generator().manual_seed(4)
    shape = (40, 1, 8, 8) if unet else (40, 2)
    noise = torch.randn(shape, generator=gen)
    return Dataset(
        "points",
        torch.randn(shape, generator=gen),
        torch.arange(40) % 3,
        columns={} if noise is None else {"noise": noise},
    )


def begin(teacher: Denoiser, data: Dataset) -> Start:
    """A start whose stores are the data, which have their noise already."""
    return Start(teacher, data, keep=lambda what, seed: data)


def weights(result: Result) -> Tensor:
    return torch.cat([p.flatten() for p in result.model.parameters()])


def started(method: Method) -> Tensor:
    """The weights of the method's product before training."""
    name = next(name for name, known in METHODS.items() if known is method)
    made = method.student(method.networks(begin(teacher(name), points())))
    return torch.cat([p.detach().flatten() for p in made.parameters()])


@dataclass(frozen=True)
class Stopper(Dataset):
    """Data that interrupt the run when they are read for the ``stop_at``-th time."""

    stop_at: int = 0

    def read(self, indices: Tensor | slice) -> Tensor:
        READS[0] += 1
        if READS[0] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().read(indices)


READS = [0]


def stopped_at(step: int, data: Dataset) -> Dataset:
    READS[0] = 0
    return Stopper(data.name, data.x, data.labels, data.class_names, data.columns, stop_at=step)


# --- splitting the work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_changes_nothing(name: str) -> None:
    """Two and four micro-batches give the losses, gradient norms and weights of one batch."""
    method = METHODS[name]
    whole = train(method, begin(teacher(name), points()), SETTINGS, show=False)
    assert (weights(whole) - started(method)).abs().max() > 1e-3, "the run moved nothing: the test shows nothing"
    for parts in (2, 4):
        split = train(method, begin(teacher(name), points()), replace(SETTINGS, accumulate=parts), show=False)
        for a, b in zip(whole.records, split.records, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if key.endswith(("/loss", "/grad_norm")):
                    assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-8), (a["step"], key)
        # Adam's update is lr * g / |g|: where g is near 0, rounding of g is magnified
        assert (weights(whole) - weights(split)).abs().max() < 2e-5


def test_accumulation_moves_the_target_network_once() -> None:
    """``then`` runs once an update: after one step the consistency target is the average of start and student."""
    method = ConsistencyDistillation(lr=1e-2, mu=0.5)
    kept: list[Networks] = []

    @dataclass(frozen=True)
    class Keeping(ConsistencyDistillation):
        def networks(self, start: Start) -> Networks:
            kept.append(super().networks(start))
            return kept[0]

    start = torch.cat(
        [p.detach().flatten().clone() for p in method.networks(begin(teacher(), points())).target.parameters()]
    )
    settings = replace(SETTINGS, budget=Budget(1), accumulate=4, averages=())
    train(Keeping(lr=1e-2, mu=0.5), begin(teacher(), points()), settings, show=False)
    student, target = (torch.cat([p.flatten() for p in m.parameters()]) for m in (kept[0].student, kept[0].target))
    assert (student - start).abs().max() > 1e-4
    assert torch.allclose(target, (start + student) / 2, rtol=0, atol=1e-7)


def test_runs_repeat_and_leave_the_global_generator_alone() -> None:
    """The same seed gives the same weights whatever PyTorch's global generator did before, new layers and dropout
    included; the generator is left as it was; another seed gives other weights."""
    method, again = METHODS["dmd2"], teacher()
    first = train(method, begin(teacher(), points()), SETTINGS, show=False)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = train(method, begin(again, points()), SETTINGS, show=False)
    assert torch.equal(torch.get_rng_state(), before)
    other = train(method, begin(teacher(), points()), replace(SETTINGS, seed=1), show=False)
    assert torch.equal(weights(first), weights(second))
    assert not torch.allclose(weights(first), weights(other), atol=1e-3)


# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cm", "scm", "dmd2", "unet"])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """Stopped after five of eight steps and started again: the weights, records and averages of the whole run, bit for
    bit; with channels-last convolutions and dropout too."""
    unet = name == "unet"
    method = Denoising(lr=1e-2) if unet else METHODS[name]
    settings = replace(SETTINGS, averages=(Power(0.1), HalfLife(20)), accumulate=2, log_steps=3)
    whole = train(method, begin(teacher(name), points(unet)), settings, show=False)
    with pytest.raises(Interrupted, match=r"stopped after 5 steps, saved in .*; the same command resumes") as stop:
        train(method, begin(teacher(name), stopped_at(10, points(unet))), settings, tmp_path, show=False)
    assert stop.value.number == signal.SIGTERM
    rest = train(method, begin(teacher(name), points(unet)), settings, tmp_path, show=False)
    assert torch.equal(weights(whole), weights(rest))
    clock = {"seconds": 0.0}
    assert [r | clock for r in rest.records] == [r | clock for r in whole.records]
    assert rest.steps == 8 and rest.images == 8 * 16
    again = train(method, begin(teacher(name), points(unet)), settings, tmp_path, show=False)
    assert torch.equal(weights(whole), weights(again)), "a finished run is not trained again"


def test_dropout_masks_differ_from_step_to_step_and_repeat(tmp_path: Path) -> None:
    """What a network draws from PyTorch's generator is new in every step and the same after a resume."""

    @dataclass(frozen=True)
    class Drawing(Denoising):
        def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
            update = next(super().updates(nets, batch, progress))
            yield Update(update.group, update.loss, {"draw": torch.rand(())})

    whole = train(Drawing(), begin(teacher(), points()), SETTINGS, show=False)
    assert len({r["model/draw"] for r in whole.records}) == 8
    with pytest.raises(Interrupted):
        train(Drawing(), begin(teacher(), stopped_at(3, points())), SETTINGS, tmp_path, show=False)
    rest = train(Drawing(), begin(teacher(), points()), SETTINGS, tmp_path, show=False)
    assert [r["model/draw"] for r in rest.records] == [r["model/draw"] for r in whole.records]


def test_a_resumed_run_drops_snapshots_of_the_steps_it_lost(tmp_path: Path) -> None:
    """With a budget in minutes snapshots fall on other steps after a resume: those of the lost steps go."""
    settings = replace(SETTINGS, averages=(Power(0.1), Power(0.05)))
    with pytest.raises(Interrupted):
        train(METHODS["cm"], begin(teacher(), stopped_at(3, points())), settings, tmp_path, show=False)
    kept = tmp_path / "snapshots"
    assert sorted(p.stem for p in kept.iterdir()) == ["000000001", "000000002", "000000003"]
    (kept / "000000005.safetensors").write_bytes((kept / "000000003.safetensors").read_bytes())
    train(METHODS["cm"], begin(teacher(), points()), replace(settings, budget=Budget(16)), tmp_path, show=False)
    assert sorted(int(p.stem) for p in kept.iterdir()) == [1, 2, 3, 4, 6, 8, 10, 12, 14, 16]


def test_a_stop_without_a_folder_says_that_nothing_is_saved() -> None:
    with pytest.raises(Interrupted, match="stopped after 2 steps, nothing was saved"):
        train(METHODS["cm"], begin(teacher(), stopped_at(2, points())), SETTINGS, show=False)


def test_signals_are_given_back() -> None:
    """After a run, Ctrl-C is Python's again."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(METHODS["cm"], begin(teacher(), points()), replace(SETTINGS, budget=Budget(1)), show=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def begun(folder: Path) -> Path:
    """A run that stopped after three steps."""
    with pytest.raises(Interrupted):
        train(METHODS["cm"], begin(teacher(), stopped_at(3, points())), SETTINGS, folder, show=False)
    return folder / "checkpoint.safetensors"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "text"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    """A cut file, an empty one, one flipped bit, a stranger's file: one line that names the file; it is left alone."""
    path = begun(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        data[-100] ^= 1
        path.write_bytes(data)
    elif damage == "foreign":
        save_tensors(path, {"a": torch.zeros(3)})
    else:
        path.write_text("not a checkpoint")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: damaged checkpoint \(.+\); delete it to start"):
        train(METHODS["cm"], begin(teacher(), points()), SETTINGS, tmp_path, show=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"batch": 8}, "batch 16, not 8"),
        ({"averages": (Power(0.05),)}, "averages .*0.1.*, not .*0.05"),
    ],
)
def test_another_run_in_the_folder_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """What would make another run is named, with both values."""
    begun(tmp_path)
    with pytest.raises(ValueError, match=f"this folder holds a run with {said}"):
        train(METHODS["cm"], begin(teacher(), points()), replace(SETTINGS, **change), tmp_path, show=False)


def test_another_method_or_data_set_in_the_folder_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with method ConsistencyDistillation\(.*not DMD2\("):
        train(METHODS["dmd2"], begin(teacher(), points()), SETTINGS, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"holds a run with data points \(40 samples\), not points \(30 samples\)"):
        train(METHODS["cm"], begin(teacher(), points().subset(slice(0, 30), "points")), SETTINGS, tmp_path, show=False)


def test_a_longer_budget_goes_on(tmp_path: Path) -> None:
    """The budget may change: a finished run goes on to the new one."""
    train(METHODS["cm"], begin(teacher(), points()), SETTINGS, tmp_path, show=False)
    more = train(METHODS["cm"], begin(teacher(), points()), replace(SETTINGS, budget=Budget(10)), tmp_path, show=False)
    assert more.steps == 10 and [r["step"] for r in more.records] == list(range(1, 11))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with only_run_in(tmp_path), pytest.raises(ValueError, match="another run is training in this folder"):
        train(METHODS["cm"], begin(teacher(), points()), SETTINGS, tmp_path, show=False)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a write: the old file is whole, the half-written one is gone."""
    saved = OneFile(tmp_path)
    counted = {"steps": 1, "seconds": 0.5, "averages": {}, "recent": {}, "precision": "fp32", "run": {}}
    saved.write({"a": torch.ones(3)}, counted)
    before = saved.path.read_bytes()

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        path.write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved.write({"a": torch.zeros(3)}, {**counted, "steps": 2})
    assert saved.path.read_bytes() == before and list(tmp_path.iterdir()) == [saved.path]
    assert saved.counters() == counted and torch.equal(saved.tensors({})["a"], torch.ones(3))


# --- numbers that are none ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned(Denoising):
    """Denoising that goes wrong at step 4, in one of three places."""

    where: str = "loss"
    name: ClassVar[str] = "poisoned"

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        if progress.step == 4 and self.where == "weight":
            with torch.no_grad():
                nets.model.net.enter.weight[0, 0] = float("inf")
        update = next(super().updates(nets, batch, progress))
        loss = update.loss
        if progress.step == 4 and self.where == "loss":
            loss = loss * float("nan")
        elif progress.step == 4 and self.where == "gradient":
            # the square root of 0 has the value 0 and no derivative
            loss = loss + (0 * nets.model.net.blocks[1].first.bias).sqrt().sum()
        yield Update(update.group, loss)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("loss", r"the loss of 'model' is nan and the gradient of model\.net\.\S+ \(\d+ in all\) is not finite"),
        ("gradient", r"the gradient of model\.net\.blocks\.1\.first\.bias \(1 in all\) is not finite"),
        ("weight", r"the weight model\.net\.enter\.weight is not finite"),
    ],
)
def test_nan_names_the_tensor_and_leaves_the_checkpoint(where: str, said: str, tmp_path: Path) -> None:
    """The first thing that is no number is named; nothing moves after it, and the last checkpoint is whole."""
    settings = replace(SETTINGS, save_seconds=0)
    with pytest.raises(NonFiniteError, match="step 4: " + said):
        train(Poisoned(where=where), begin(teacher(), points()), settings, tmp_path, show=False)
    saved = OneFile(tmp_path)
    assert saved.counters()["steps"] == 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors({}).values())


@dataclass(frozen=True)
class Overstepping(Denoising):
    """Denoising whose last step, the fifth, leaves a weight without a value."""

    name: ClassVar[str] = "overstepping"

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        def overstep() -> None:
            with torch.no_grad():
                nets.model.net.enter.weight[0, 0] = float("inf")

        update = next(super().updates(nets, batch, progress))
        yield Update(update.group, update.loss, then=overstep if progress.step == 4 else None)


@pytest.mark.parametrize("kept", [True, False])
def test_weights_that_the_last_step_ruined_are_not_given_back(kept: bool, tmp_path: Path) -> None:
    """No later step would notice them: they are looked at before they are saved and at the end."""
    settings = replace(SETTINGS, budget=Budget(5, "steps"), save_seconds=0)
    with pytest.raises(NonFiniteError, match=r"step 4: it left the weight model\.net\.enter\.weight not finite"):
        train(Overstepping(), begin(teacher(), points()), settings, tmp_path if kept else None, show=False)
    if kept:
        assert OneFile(tmp_path).counters()["steps"] == 4


# --- optimisers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam"])
def test_optimisers_equal_the_plain_ones(kind: Any) -> None:
    """Fused and multi-tensor optimisers with clipping and warm-up make the path of PyTorch's per-tensor loop."""
    spec = Optimizer(("model",), 1e-2, kind=kind, weight_decay=0.1, clip=0.5, warmup=3, decay="cosine")

    @dataclass(frozen=True)
    class Specified(Denoising):
        def networks(self, start: Start) -> Networks:
            return Networks({"model": start.network("teacher")}, {"model": spec})

    result = train(Specified(), begin(teacher(), points()), replace(SETTINGS, averages=()), show=False)

    from fewstep.data.dataset import epoch_indices
    from fewstep.randomness import Rng

    method, data = Specified(), points()
    nets = method.networks(begin(teacher(), points()))
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[kind]
    optimiser = plain(nets.parameters(), 1e-2, weight_decay=0.1, foreach=False)
    for step in range(8):
        mine = epoch_indices(40, step * 16, 16, 0)
        assert data.labels is not None
        batch = Batch(data.x[mine], data.labels[mine], Rng(0, "step", step))
        optimiser.zero_grad()
        next(method.updates(nets, batch, Progress(step, step * 16, step / 8))).loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = (
            1e-2 * min(1, (step + 1) / 3) * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) / 2
        )
        optimiser.step()
    expected = torch.cat([p.detach().flatten() for p in nets.parameters()])
    # clip_grad_norm_ divides by the norm plus 1e-6
    assert (weights(result) - expected).abs().max() < 1e-5


def test_only_the_group_that_moves_is_touched() -> None:
    """Averages of a network count its own updates: the student of DMD2 moves in one step of two."""
    from fewstep.training.parallel import Parallel
    from fewstep.training.trainer import Run

    method = METHODS["dmd2"]
    run = Run(method, method.networks(begin(teacher(), points())), SETTINGS, Parallel())
    for _ in range(3):
        run.step(points())
    assert run.averages["student"][0].updates == 2
    # the second step moves the critic only
    assert {run.optimizers[g].state[run.parameters[g][0]]["step"].item() for g in ("student",)} == {2.0}
    assert {run.optimizers[g].state[run.parameters[g][0]]["step"].item() for g in ("critic",)} == {3.0}


# --- precision ---------------------------------------------------------------------------------------------------


def test_auto_precision_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is taken where it is clearly faster; on a processor that emulates it, float32."""
    cpu = torch.device("cpu")
    for seconds, choice in ((17.0, "fp32"), (1.0, "fp32"), (0.9, "fp32"), (0.5, "bf16")):
        monkeypatch.setattr(precision, "probe", lambda device, s=seconds: {"fp32": 1.0, "bf16": s})
        assert precision.resolve("auto", cpu) == choice
        assert precision.resolve("fp32", cpu) == "fp32" and precision.resolve("bf16", cpu) == "bf16"


def test_the_probe_tells_the_truth_here() -> None:
    """On this machine the choice is the faster one, by a measurement of another kind (a linear layer's passes)."""
    import time

    cpu, seconds = torch.device("cpu"), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer, x = torch.nn.Linear(256, 256).to(dtype), torch.ones(128, 256, dtype=dtype)
        taken = []
        for _ in range(9):
            start = time.process_time()
            layer(x).sum().backward()
            taken.append(time.process_time() - start)
        seconds[name] = min(taken)
    ratio = seconds["bf16"] / seconds["fp32"]
    if ratio > 1.2:
        assert precision.resolve("auto", cpu) == "fp32"
    elif ratio < 0.3:
        assert precision.resolve("auto", cpu) == "bf16"
    assert set(precision.probe(cpu)) == {"fp32", "bf16"}


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_trains_like_float32(name: str) -> None:
    """Under autocast the first losses and gradient norms are those of float32 to bfloat16's precision; a gradient that
    is lost (a weight cast without a graph and used again) would halve the norm."""
    exact = train(METHODS[name], begin(teacher(name), points()), replace(SETTINGS, budget=Budget(1)), show=False)
    rough = train(
        METHODS[name], begin(teacher(name), points()), replace(SETTINGS, budget=Budget(1), precision="bf16"), show=False
    )
    for key, value in exact.records[0].items():
        if key.endswith(("/loss", "/grad_norm")):
            assert rough.records[0][key] == pytest.approx(value, rel=BF16[name]), key
    assert next(rough.model.parameters()).dtype == torch.float32


#: Eight bits of mantissa are 0.4 % an operation, less in a mean; the small differences of cm and pd lose more.
BF16 = {
    "denoising": 0.01,
    "cm": 0.06,
    "scm": 0.01,
    "dmd": 0.02,
    "dmd2": 0.02,
    "reflow": 0.01,
    "reflow-distil": 0.01,
    "pd": 0.1,
}


def test_resume_keeps_the_precision_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second measurement that comes out otherwise does not change the arithmetic of a run that has begun."""
    auto = replace(SETTINGS, precision="auto")
    monkeypatch.setattr(precision, "probe", lambda device: {"fp32": 1.0, "bf16": 2.0})
    whole = train(METHODS["cm"], begin(teacher(), points()), auto, show=False)
    with pytest.raises(Interrupted):
        train(METHODS["cm"], begin(teacher(), stopped_at(3, points())), auto, tmp_path, show=False)
    monkeypatch.setattr(precision, "probe", lambda device: {"fp32": 1.0, "bf16": 0.1})
    rest = train(METHODS["cm"], begin(teacher(), points()), auto, tmp_path, show=False)
    assert torch.equal(weights(whole), weights(rest))


# --- records -----------------------------------------------------------------------------------------------------


def test_records_drop_what_will_be_written_again(tmp_path: Path) -> None:
    """Lines after the resumed step and lines cut short go; the rest stays, in order."""
    path = tmp_path / "log.jsonl"
    written = [{"step": k, "images": 8 * k, "seconds": 0.1 * k, "a": a} for k, a in ((1, 0.1), (10, 0.2), (20, 0.3))]
    path.write_text("".join(json.dumps(line) + "\n" for line in written) + '{"step": 3')
    records = Records(path, 10)
    assert records.lines == written[:2]
    records.write({**written[2], "a": 0.25})
    records.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records.lines
    assert [r["a"] for r in records.lines] == [0.1, 0.2, 0.25]


def test_every_record_knows_every_group(tmp_path: Path) -> None:
    """A group that moves in one step of two is in every line, and the log is what the result holds."""
    settings = replace(SETTINGS, log_steps=4)
    result = train(METHODS["dmd2"], begin(teacher(), points()), settings, tmp_path, show=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.records
    assert [line["step"] for line in lines] == [1, 4, 8]
    assert [line["images"] for line in lines] == [16, 64, 128]
    for line in lines:
        assert {"student/loss", "critic/loss", "student/grad_norm", "student/lr", "seconds"} <= line.keys()


def test_tensorboard_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package there is one line to read; with it, the numbers of the log arrive as scalars."""
    asked = replace(SETTINGS, tensorboard=True)
    with pytest.raises(ValueError, match="tensorboard=True writes into the run folder"):
        train(METHODS["cm"], begin(teacher(), points()), asked, show=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs tensorboard: pip install 'fewstep\[tensorboard\]'"):
        train(METHODS["cm"], begin(teacher(), points()), asked, tmp_path / "without", show=False)
    got: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            got.append((name, value, step))

        def close(self) -> None:
            opened.append(("closed", 0))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    result = train(METHODS["cm"], begin(teacher(), points()), asked, tmp_path / "with", show=False)
    assert opened == [(str(tmp_path / "with" / "tensorboard"), 1), ("closed", 0)]
    told = [(r["student/loss"], r["step"]) for r in result.records]
    assert [(v, s) for n, v, s in got if n == "student/loss"] == told


# --- snapshots and recipes ---------------------------------------------------------------------------------------


def test_snapshots_give_the_average_that_was_not_kept(tmp_path: Path) -> None:
    """Two averages kept eight times give a third width, and the kept ones again, in the student itself."""
    settings = Settings(Budget(96), 8, precision="fp32", averages=(Power(0.05), Power(0.1)))
    run = replace(METHODS["cm"], mu=0.0)
    kept = train(run, begin(teacher(), points()), settings, tmp_path, show=False)
    assert [p.stem for p in sorted((tmp_path / "snapshots").iterdir())] == [f"{n:09d}" for n in range(12, 97, 12)]
    direct = train(run, begin(teacher(), points()), replace(settings, averages=(Power(0.07),)), show=False)
    raw = train(run, begin(teacher(), points()), replace(settings, averages=()), show=False)
    model = train(run, begin(teacher(), points()), replace(settings, budget=Budget(1)), show=False).model
    reconstruct_model(model, tmp_path, 0.05)
    assert torch.allclose(torch.cat([p.flatten() for p in model.parameters()]), weights(kept), atol=1e-6)
    reconstruct_model(model, tmp_path, 0.07)
    error = (torch.cat([p.flatten() for p in model.parameters()]) - weights(direct)).norm()
    # 1.9 % measured; coefficients that do not sum to 1 (as in the paper) are off by 100 % here
    assert error < 0.04 * (weights(raw) - weights(direct)).norm()


def test_reconstruction_says_what_is_missing(tmp_path: Path) -> None:
    model = teacher()
    with pytest.raises(FileNotFoundError, match="train with at least two Power averages"):
        reconstruct_model(model, tmp_path, 0.07)
    settings = replace(SETTINGS, averages=(Power(0.05), Power(0.1)))
    train(METHODS["cm"], begin(teacher(), points()), settings, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"hold parameter 'flow_map\.denoiser\.net\.\S+', which does not fit"):
        reconstruct_model(model, tmp_path, 0.07)
    broken = sorted((tmp_path / "snapshots").iterdir())[0]
    broken.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{broken.name}: damaged snapshot"):
        reconstruct_model(model, tmp_path, 0.07)


def test_a_recipe_resumes_in_its_second_stage(tmp_path: Path) -> None:
    """Stopped in its second stage, InstaFlow goes on there from its own pairs and ends with the same weights."""
    recipe = InstaFlow(pairs=32, ode_steps=3, lr=1e-2)
    settings = replace(SETTINGS, budget=Budget(8))
    data = Dataset("points", points().x, points().labels)
    whole = run_recipe(recipe, teacher(), data, settings, tmp_path / "whole", show=False)
    assert whole.steps == 8 and {r["stage"] for r in whole.records} == {0, 1}

    calls: list[int] = []

    class Stop(Exception):
        pass

    def third(self: Records, record: dict[str, Any]) -> None:
        calls.append(record["step"])
        real(self, record)
        if len(calls) == 6:  # four steps of the first stage, two of the second
            raise Stop

    real = Records.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Records, "write", third)
        run_recipe(recipe, teacher(), data, replace(settings, save_seconds=0), tmp_path / "cut", show=False)
    assert (tmp_path / "cut" / "stage-0-reflow" / "model" / "config.json").is_file()
    rest = run_recipe(recipe, teacher(), data, settings, tmp_path / "cut", show=False)
    assert torch.equal(weights(rest), weights(whole))


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch": 10, "accumulate": 4}, "batch=10 must be divisible by accumulate=4"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"log_steps": 0}, "log_steps=0 must be at least 1"),
        ({"save_seconds": -1.0}, "save_seconds=-1 must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**values)


def test_data_that_do_not_fit_the_teacher_are_named() -> None:
    with pytest.raises(ValueError, match=r"data 'wide' has samples \[3\], the model makes \[2\]"):
        train(METHODS["cm"], begin(teacher(), Dataset("wide", torch.zeros(4, 3))), SETTINGS, show=False)
    many = Dataset("many", torch.zeros(4, 2), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="data 'many' has 4 classes, the model knows 3"):
        train(METHODS["cm"], begin(teacher(), many), SETTINGS, show=False)


def test_progress_is_counted_in_samples() -> None:
    """A budget in images ends after the batch that reaches it."""
    result = train(
        METHODS["cm"], begin(teacher(), points()), replace(SETTINGS, budget=Budget.parse("100 images")), show=False
    )
    assert result.steps == 7 and result.images == 112


def test_equal_calls_train_in_the_same_precision() -> None:
    """A stopwatch tells another tale each time: it is asked once a process."""
    cpu = torch.device("cpu")
    assert precision.probe(cpu) == precision.probe(torch.device("cpu"))
