"""The same run on one process and on two, replicated and sharded, agrees; and a stopped one resumes."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from child_processes import run_on_two
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.data.dataset import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import load_tensors, save_tensors
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.rectified_flow import InstaFlow
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update
from fewstep.methods.parts import stores
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.lora import LowRank
from fewstep.predictions import TrigPrediction
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.profiles import Power
from fewstep.training.settings import Rank
from fewstep.training.sharding import Sharded
from fewstep.training.snapshots import read
from fewstep.training.trainer import Interrupted, Result, Settings, train


@dataclass(frozen=True)
class LowRankCritic(Method):
    """A student whose samples are pulled along the difference of its teacher and a critic on the teacher's memory."""

    name: ClassVar[str] = "low-rank-critic"
    paper: ClassVar[Paper] = Paper("a test", "0000.00000", "reconstructed")

    def networks(self, start: Start) -> Networks:
        critic = start.network("critic", low_rank=LowRank(2))
        modules = {"student": start.network(), "critic": critic, "teacher": start.teacher}
        groups = {name: Optimizer((name,), 1e-3, clip=1.0) for name in ("student", "critic")}
        return Networks(modules, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x = nets.student(80.0 * batch.normal(), 80.0, batch.cond)
        noised = x.detach() + batch.normal()
        yield Update("critic", (nets.critic(noised, 1.0, batch.cond) - x.detach()).square().mean())
        with torch.no_grad():
            pull = nets.critic(noised, 1.0, batch.cond) - nets.teacher(noised, 1.0, batch.cond)
        yield Update("student", (x * pull + x.square()).mean())  # the first term alone is near zero

    def student(self, nets: Networks) -> NetworkDenoiser:
        made: NetworkDenoiser = nets.student
        return made


RECIPE = InstaFlow(pairs=600, ode_steps=2)
STEPS, STOP = 6, 3
#: Steps 0, 2 and 4 of DMD2 move three networks with two optimisers, the others two networks with one.
METHODS: dict[str, Method] = {
    "dmd2-pictures": DMD2(steps=2, critic_steps=2, gan_weight=0.1, discriminator_weight=0.1, lr=1e-3, critic_lr=1e-3),
    "cm": ConsistencyDistillation(lr=1e-3, mu=0.5),
    "scm": ContinuousConsistencyDistillation(lr=1e-3, tangent_warmup=0.0),
    "lora-pictures": LowRankCritic(),
}


def teacher(name: str) -> NetworkDenoiser:
    """A network that no symmetry makes easy: every weight differs from its neutral start."""
    gen = torch.Generator().manual_seed(3)
    shape = (1, 8, 8) if name.endswith("pictures") else (2,)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        net = UNet((1, 8, 8), (16, 32), 1, 16, classes=3) if len(shape) == 3 else MLP((2,), 16, 2, classes=3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return NetworkDenoiser(net, EDM(), TrigPrediction(), shape, 3)


@dataclass(frozen=True)
class Points(Dataset):
    """Data that send this process SIGTERM when it reads for step ``stop_at``."""

    stop_at: int = -1

    def read(self, indices: Tensor | slice) -> Tensor:
        reads = READS[0]
        READS[0] += 1
        if reads == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().read(indices)


READS = [0]


def points(name: str, stop_at: int = -1) -> Dataset:
    gen = torch.Generator().manual_seed(4)
    shape = (1, 8, 8) if name.endswith("pictures") else (2,)
    READS[0] = 0
    return Points("points", torch.randn(40, *shape, generator=gen), torch.arange(40) % 3, stop_at=stop_at)


def settings(name: str = "", shard: bool = False, batch: int = 16) -> Settings:
    return Settings(
        Budget(STEPS), batch, precision="fp32", averages=(Power(0.1), Power(0.05)), log_steps=1, shard=shard,
        save_seconds=1e9, lora_rank=Rank(3) if name.startswith("lora") else None,
    )  # fmt: skip


def keep(result: Result, place: Path) -> None:
    save_tensors(place / "result.safetensors", dict(result.model.state_dict()))
    (place / "records.json").write_text(json.dumps(result.records))


def process(rank: int, folder: Path) -> None:
    """One of two processes: every method replicated and sharded, once to the end and once stopped and resumed."""
    for name, method in METHODS.items():
        for shard in (False, True):
            place = folder / f"{name}-{'sharded' if shard else 'replicated'}"
            # only the second process is told to stop
            data = points(name, STOP if rank == 1 else -1)
            try:
                train(method, Start(teacher(name), data), settings(name, shard), place, show=False)
            except Interrupted as stopped:
                (place / f"stopped-{rank}").write_text(str(stopped))
            result = train(method, Start(teacher(name), points(name)), settings(name, shard), place, show=False)
            if rank == 0:
                keep(result, place)
    recipe_in(folder / "recipe", rank)
    (folder / f"features-{rank}").write_text(str(features_error()))
    (folder / f"whole-{rank}").write_text(json.dumps(whole_weights()))
    if rank == 0:
        (folder / "one-error").write_text(refused(folder / "scm-replicated", shard=True))
        (folder / "parts-error").write_text(refused(folder / "scm-sharded", shard=False))


def recipe_in(folder: Path, rank: int) -> None:
    """A recipe of two stages that train on pairs; how many pairs this process has made."""
    counts: list[int] = []
    real = stores.solve_heun

    def counted(*given: Any) -> Tensor:
        counts.append(len(given[1]))
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "solve_heun", counted)
        result = run_recipe(RECIPE, teacher("scm"), points("scm"), settings(), folder, show=False)
    folder.with_name(f"pairs-{rank}").write_text(json.dumps(counts))
    if rank == 0:
        keep(result, folder)


def features_error() -> float:
    """How far a sharded network's features, asked for before anything else, are from the whole network's."""
    error = 0.0
    for name in METHODS:
        x, t = points(name).x[:8], torch.full((8,), 0.3)
        nets = Networks({"model": teacher(name)}, {"model": Optimizer(("model",), 1e-3)})
        Sharded(dist.get_rank(), 2).place(nets, torch.device("cpu"))
        cut, whole = nets.model.net.features(x, t), teacher(name).net.features(x, t)
        error = max(error, float((cut - whole).detach().abs().max()))
    return error


def whole_weights() -> list[str]:
    """The weights of a teacher and a low-rank critic on it, the base too, that are not cut when they are placed."""
    start = Start(teacher("lora-pictures").requires_grad_(False)).apart()
    nets = METHODS["lora-pictures"].networks(start)
    Sharded(dist.get_rank(), 2).place(nets, torch.device("cpu"))
    trained = sum(p.numel() for p in nets.critic.parameters() if p.requires_grad)
    assert (
        0
        < trained
        == sum(p.numel() for p in nets.weights("critic"))
        < 0.2 * sum(p.numel() for p in nets.critic.parameters())
    )
    return [name for name, p in nets.named_parameters() if not isinstance(p, DTensor)]


def refused(place: Path, shard: bool) -> str:
    """What a run of the other kind says about this one's folder (before any process waits for another)."""
    try:
        (Sharded if shard else Parallel)(0, 2).checkpoint(place)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs of two gloo processes."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_two(process, folder)
    yield folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The same runs on one process, never stopped."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: train(method, Start(teacher(name), points(name)), settings(name), folder / name, show=False)
        for name, method in METHODS.items()
    }


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-6)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_run_of_one(name: str, kind: str, runs: Path, alone: dict[str, Result]) -> None:
    """Losses and gradient norms to 2e-5 at every step (1.4e-5 was measured), and weights at the end, through a stop and
    a resume."""
    place = runs / f"{name}-{kind}"
    records: list[dict[str, Any]] = json.loads((place / "records.json").read_text())
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for mine, other in zip(records, alone[name].records, strict=True):
        for key in mine:
            if key.endswith(("/loss", "/grad_norm")):
                assert relative(mine[key], other[key]) < 2e-5, (mine["step"], key)
    weights = load_tensors(place / "result.safetensors")
    expected = alone[name].model.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        # Adam divides by tiny second moments: a last bit of a gradient can be a hundredth of an update
        assert (weights[key] - tensor).abs().max() < 2e-5, key


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_signal_to_one_process_stops_all(kind: str, runs: Path) -> None:
    """SIGTERM to the second process only: both stop after the same step, saved."""
    said = {(runs / f"scm-{kind}" / f"stopped-{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert f"stopped after {STOP + 1} steps, saved in" in said.pop()


def test_a_sharded_checkpoint_is_in_parts_and_nothing_is_pickled(runs: Path) -> None:
    """One safetensors file a process under the folder that checkpoint.json names, and no other folder."""
    place = runs / "dmd2-pictures-sharded"
    named = json.loads((place / "checkpoint.json").read_text())["parts"]
    assert [path.name for path in place.glob("checkpoint-*")] == [named]
    files = sorted(path.name for path in (place / named).iterdir())
    assert len(files) == 2 and all(file.endswith(".safetensors") for file in files)


def test_the_kinds_of_checkpoint_are_not_mixed(runs: Path) -> None:
    """A replicated run does not take up a sharded one's folder, nor the other way round."""
    assert "checkpoint.safetensors: this run was started without shard=True" in (runs / "one-error").read_text()
    assert "checkpoint.json: this run was started with shard=True" in (runs / "parts-error").read_text()


def test_snapshots_of_a_sharded_run_are_whole(runs: Path, alone: dict[str, Result]) -> None:
    """The averages that a sharded run keeps for later are full tensors, equal to the replicated run's but for what Adam
    makes of the rounding of float32 gradients (5.5e-6 was seen, by the kernels of AVX-512)."""
    here, there = read(runs / "dmd2-pictures-sharded"), read(runs / "dmd2-pictures-replicated")
    assert [s[:2] for s in here] == [s[:2] for s in there] and len(here) == 2 * STEPS
    for (_, _, cut), (_, _, full) in zip(here, there, strict=True):
        assert cut.keys() == full.keys() == dict(alone["dmd2-pictures"].model.named_parameters()).keys()
        for key, tensor in full.items():
            assert (cut[key] - tensor).abs().max() < 2e-5, key


def test_features_of_a_sharded_network(runs: Path) -> None:
    """Discriminators read a network's features without its ``forward``: its weights are gathered for that too."""
    assert max(float((runs / f"features-{rank}").read_text()) for rank in (0, 1)) < 1e-6


def test_the_base_of_a_low_rank_network_is_cut_and_not_saved(runs: Path) -> None:
    """Every process holds a part of the frozen weights too; checkpoints of both kinds hold the factors alone."""
    assert [json.loads((runs / f"whole-{rank}").read_text()) for rank in (0, 1)] == [[], []]
    kept = list(load_tensors(runs / "lora-pictures-replicated" / "checkpoint.safetensors"))
    place = runs / "lora-pictures-sharded"
    parts = json.loads((place / "checkpoint.json").read_text())["parts"]
    cut = [name for file in (place / parts).iterdir() for name in load_tensors(file)]
    for names in (kept, cut):
        found = {name for name in names if name.startswith("module/")}
        assert {name.split("/")[1] for name in found} == {"student", "critic"} and all("lora_" in n for n in found)


def test_processes_share_the_making_of_pairs(runs: Path) -> None:
    """Of three batches of pairs one process makes two and the other one, in both stages; the run is that of one
    process, in one folder with one record."""
    made = [json.loads((runs / f"pairs-{rank}").read_text()) for rank in (0, 1)]
    assert made == [[256, 88] * 2, [256] * 2]
    alone = run_recipe(RECIPE, teacher("scm"), points("scm"), settings(), show=False).model.state_dict()
    together = load_tensors(runs / "recipe" / "result.safetensors")
    for key, tensor in alone.items():
        assert (together[key] - tensor).abs().max() < 1e-4, key
    assert (runs / "recipe" / "recipe.json").is_file() and (runs / "recipe" / "model" / "config.json").is_file()


def test_sharding_needs_several_processes() -> None:
    """On one process ``shard=True`` is a mistake and says how to start."""
    with pytest.raises(ValueError, match="torchrun"):
        train(METHODS["scm"], Start(teacher("scm"), points("scm")), settings(shard=True), show=False)
