"""Runs: one folder whoever starts it, stages that start from roles, stores that are made once."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser, OnSchedule
from fewstep.digests import model_sha256, tensors_sha256
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveDistillation, ProgressiveLadder
from fewstep.methods.flow_maps.rectified_flow import InstaFlow, Reflow, ReflowDistillation
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Networks, Recipe, Stage
from fewstep.methods.parts import stores
from fewstep.methods.parts.stores import Pairs, made_now
from fewstep.methods.start import Start, denoiser_in, teacher_in
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import Eps, TrigPrediction
from fewstep.runs import record as records
from fewstep.runs.course import run_recipe
from fewstep.runs.resume import OtherRun, held
from fewstep.runs.shelf import Shelf
from fewstep.runs.stages import borrowed, stage_seed
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import EDM, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.checkpoint import OneFile
from fewstep.training.parallel import Parallel
from fewstep.training.progress import Records
from fewstep.training.trainer import Settings

SETTINGS = Settings(Budget(4), 8, precision="fp32", log_steps=1, save_seconds=0)
RECIPES: dict[str, Recipe] = {
    "cm": ConsistencyDistillation(),
    "scm": ContinuousConsistencyDistillation(),
    "dmd2": DMD2(),
    "pd": ProgressiveLadder(4, 1),
    "reflow": Reflow(pairs=16, ode_steps=2),
    "instaflow": InstaFlow(pairs=16, ode_steps=2),
    "denoising": Denoising(),
}
#: Those that take a student of the user's.
STUDENTS = {name: recipe for name, recipe in RECIPES.items() if "student" in recipe.roles}


def network(width: int = 16, seed: int = 3, classes: int | None = 3, shape: tuple[int, ...] = (2,)) -> MLP:
    gen = torch.Generator().manual_seed(seed)
    net = MLP(shape, width, 1, classes=classes)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return net


def teacher(width: int = 16, seed: int = 3) -> NetworkDenoiser:
    return NetworkDenoiser(network(width, seed), EDM(), TrigPrediction(), (2,), 3)


def points(n: int = 24) -> Dataset:
    gen = torch.Generator().manual_seed(4)
    return Dataset("points", torch.randn(n, 2, generator=gen), torch.arange(n) % 3)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(recipe: Recipe, folder: Path | None = None, settings: Settings = SETTINGS, **more: Any) -> nn.Module:
    return run_recipe(recipe, teacher(), points(), settings, folder, show=False, **more).model


def solved(monkeypatch: pytest.MonkeyPatch, stop_at: int = -1) -> list[int]:
    """The batches for which the teacher's ODE is solved from now on; KeyboardInterrupt at the batch ``stop_at``."""
    found: list[int] = []
    real = stores.solve_heun

    def counted(*given: Any) -> Tensor:
        if len(found) == stop_at:
            raise KeyboardInterrupt
        found.append(len(given[1]))
        return real(*given)

    monkeypatch.setattr(stores, "solve_heun", counted)
    return found


# --- the caller's models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_callers_teacher_stays_as_it_is(name: str) -> None:
    """Not frozen, not set to evaluation, no weight moved; nor is the student that the caller brings."""
    recipe = RECIPES[name]
    mine, given = teacher().train(), {"student": teacher(8).train()} if "student" in recipe.roles else {}
    models: list[nn.Module] = [mine, *given.values()]
    before = [weights(model).clone() for model in models]
    made = run_recipe(recipe, mine, points(), SETTINGS, given=given, show=False).model
    for model, was in zip(models, before, strict=True):
        assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
        assert torch.equal(weights(model), was)
    assert not any(p.requires_grad for p in made.parameters())


def test_a_borrowed_model_shares_memory_and_nothing_else() -> None:
    """On the device where it is; moved to another one, the caller's stays where it was."""
    mine = teacher().train()
    twin = borrowed(mine, torch.device("cpu"))
    for a, b in zip(mine.parameters(), twin.parameters(), strict=True):
        assert a is not b and a.data_ptr() == b.data_ptr() and a.requires_grad and not b.requires_grad
    assert mine.training and not twin.training
    assert {p.device.type for p in borrowed(mine, torch.device("meta")).parameters()} == {"meta"}
    assert {p.device.type for p in mine.parameters()} == {"cpu"}


# --- roles --------------------------------------------------------------------------------------------------------


def test_a_role_is_played_by_what_a_stage_made_else_by_what_was_brought_else_by_the_teacher() -> None:
    first, brought, made = teacher(), teacher(8), teacher(12)
    start = Start(first, points(), given={"student": brought})
    assert start.model("student") is brought and start.model("critic") is first
    later = replace(start, made={"student": made})
    assert later.model("student") is made
    halved = replace(start, made={"teacher": made})
    assert halved.model("teacher") is made and halved.model("critic") is made and halved.model("student") is brought
    assert halved.teacher is first
    network = later.network("student", on=VPLinear())
    assert network.schedule == VPLinear() and torch.equal(weights(network), weights(made))
    assert all(p.requires_grad for p in network.parameters())
    assert not {id(p) for p in network.parameters()} & {id(p) for p in made.parameters()}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_another_architecture(name: str) -> None:
    """A narrower network than the teacher's, brought as the student, is what is trained and handed over."""
    small = teacher(8, seed=5)
    made = run(STUDENTS[name], given={"student": small})
    assert isinstance(made, Student)
    inside = [m for m in made.modules() if isinstance(m, MLP)]
    assert [net.config["width"] for net in inside] == [8]
    assert weights(inside[0]).shape == weights(small).shape and not torch.equal(weights(inside[0]), weights(small))


def test_the_ladder_goes_on_from_the_small_student() -> None:
    """Later halvings of a brought student start from, and learn from, what the first made of it."""
    seen: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Watched(ProgressiveDistillation):
        def networks(self, start: Start) -> Networks:
            nets = super().networks(start)
            seen.append(tuple(m.net.config["width"] for m in (nets.student.denoiser, nets.teacher.denoiser)))  # type: ignore[arg-type]
            if len(seen) == 2:
                assert torch.equal(weights(nets.student), weights(nets.teacher))
            return nets

    @dataclass(frozen=True)
    class Ladder(ProgressiveLadder):
        def stages(self) -> list[Stage]:
            return [Stage(Watched(steps)) for steps in (2, 1)]

    run(Ladder(), given={"student": teacher(8)})
    assert seen == [(8, 16), (8, 8)]


def test_roles_that_a_method_does_not_use_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^dmd2 has no use for a guide \(it uses: student\)$"):
        run(DMD2(), given={"guide": teacher()})
    with pytest.raises(ValueError, match=r"^denoising has no use for a student \(it starts from the teacher alone\)$"):
        fs.distill(teacher(), Denoising(), points(), "1steps", show=False, student=teacher())  # type: ignore[arg-type]


def test_a_student_that_makes_other_samples_is_refused() -> None:
    wide = NetworkDenoiser(network(8, shape=(3,)), EDM(), TrigPrediction(), (3,), 3)
    with pytest.raises(ValueError, match=r"the student makes samples \[3\], the teacher \[2\]"):
        run(DMD2(), given={"student": wide})
    other = NetworkDenoiser(network(8, classes=4), EDM(), TrigPrediction(), (2,), 4)
    with pytest.raises(ValueError, match="the student knows 4 classes, the teacher 3"):
        run(DMD2(), given={"student": other})


def test_students_do_not_teach() -> None:
    """A student's network is no denoiser any more; its weights may be where a student starts."""
    student = run(ConsistencyDistillation())
    with pytest.raises(ValueError, match="the teacher is a student of 1, 2, 4 calls, not a denoiser"):
        run_recipe(DMD2(), student, points(), SETTINGS, show=False)  # type: ignore[arg-type]
    assert isinstance(run(DMD2(), given={"student": student}), Student)
    assert teacher_in(teacher()).classes == 3
    two = Student(Jump(teacher(), two_times=True), {1: Plan((80.0,))})
    with pytest.raises(
        ValueError, match="the student: a student of two times, whose network is no denoiser to start from"
    ):
        denoiser_in(two, "student")


def test_a_flow_reflowed_from_an_eps_model_teaches_dmd2_and_denoising() -> None:
    """Its network lies behind a view on the straight schedule: critics and losses work on the network's own."""
    eps = NetworkDenoiser(network(), VPLinear(), Eps(time_scale=1.0), (2,), 3)
    flow = run_recipe(Reflow(pairs=16, ode_steps=2), eps, points(), SETTINGS, show=False).model
    assert isinstance(flow, OnSchedule) and flow.native().schedule == VPLinear()
    for recipe in (DMD2(), Denoising()):
        made: Any = run_recipe(recipe, flow, points(), SETTINGS, show=False).model
        assert bool(torch.isfinite(weights(made)).all())


# --- stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares(Recipe):
    """Reflow stages with shares of the budget."""

    name: ClassVar[str] = "shares"
    paper = Reflow.paper
    shares: tuple[float, ...] = (1.0,)

    def stages(self) -> list[Stage]:
        return [Stage(Reflow(pairs=16, ode_steps=2), share) for share in self.shares]


def test_a_stage_without_a_share_vanishes(tmp_path: Path) -> None:
    """Bit for bit, and without a folder; a recipe of which nothing is left is an error."""
    two = run(Shares((1.0, 1.0)), tmp_path / "two")
    three = run(Shares((1.0, 0.0, 1.0)), tmp_path / "three")
    assert torch.equal(weights(two), weights(three))
    stages = [sorted(p.name for p in (tmp_path / name).glob("stage-*")) for name in ("two", "three")]
    assert stages == [["stage-0-reflow", "stage-1-reflow"]] * 2
    with pytest.raises(ValueError, match="shares: no stage has a share of the budget"):
        run(Shares((0.0,)))
    with pytest.raises(ValueError, match="reflow: share=-1 of the budget must be finite, at least 0"):
        Shares((-1.0,)).stages()


def test_shares_of_the_budget() -> None:
    result = run_recipe(Shares((3.0, 1.0)), teacher(), points(), replace(SETTINGS, budget=Budget(8)), show=False)
    assert [sum(r["stage"] == k for r in result.records) for k in (0, 1)] == [6, 2]
    assert result.steps == 8


def test_what_stages_hand_on() -> None:
    """Methods that make a better teacher hand one on; the others leave the original one to the stages after."""
    roles = {}
    for name, recipe in RECIPES.items():
        method = recipe.stages()[0].method
        roles[name] = set(method.hands_on(method.networks(Start(teacher()))))
    assert roles == {
        "cm": {"student"}, "scm": {"student"}, "dmd2": {"student", "critic"}, "pd": {"teacher", "student"},
        "reflow": {"teacher"}, "instaflow": {"teacher"}, "denoising": {"teacher"},
    }  # fmt: skip


def test_later_stages_share_no_seed_with_other_runs() -> None:
    """The first stage keeps the run's seed; ``seed + k`` made stage 1 of seed 0 the twin of stage 0 of seed 1."""
    assert [stage_seed(s, 0) for s in range(3)] == [0, 1, 2]
    later = {stage_seed(s, k) for s in range(20) for k in range(1, 5)}
    assert len(later) == 80 and not later & set(range(100))
    assert [stage_seed(7, k, "counted") for k in range(3)] == [7, 8, 9]


# --- stores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twice(Recipe):
    """Two distillations from the same teacher on the same pairs."""

    name: ClassVar[str] = "twice"
    paper = Reflow.paper

    def stages(self) -> list[Stage]:
        return [Stage(ReflowDistillation(pairs=16, ode_steps=2, steps=steps)) for steps in (2, 1)]


@pytest.mark.parametrize("kept", [True, False])
def test_stages_that_ask_for_the_same_store_solve_the_ode_once(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = solved(monkeypatch)
    run(Twice(), tmp_path / "run" if kept else None)
    assert batches == [16]
    run(Twice(), tmp_path / "run")
    assert batches == ([16] if kept else [16, 16])


def test_pairs_are_known_by_all_that_makes_them() -> None:
    labels = torch.arange(16) % 3
    pairs = Pairs(teacher(), 16, 2, labels)
    assert pairs.digest() == Pairs(teacher(), 16, 2, labels.clone()).digest()
    others = [
        Pairs(teacher(seed=4), 16, 2, labels), replace(pairs, n=15), replace(pairs, steps=3),
        replace(pairs, cond=None), replace(pairs, cond=labels.flip(0)),
        replace(pairs, teacher=stores.guided(teacher(), 2.0)), replace(pairs, teacher=teacher().on(VPLinear())),
    ]  # fmt: skip
    assert len({other.digest() for other in [pairs, *others]}) == 8


def test_a_kill_loses_one_part_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its fourth part of five, a store goes on there and ends as if it had not been stopped."""
    what = Pairs(teacher(), 36, 2, torch.arange(36) % 3, batch=8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        solved(patch, stop_at=3)
        Shelf(tmp_path, Parallel(), show=False)(what, 5)
    batches = solved(monkeypatch)
    data = Shelf(tmp_path, Parallel(), show=False)(what, 5)
    assert batches == [8, 4]
    assert torch.equal(data.x, made_now(what, 5).x) and torch.equal(
        data.columns["noise"], made_now(what, 5).columns["noise"]
    )
    assert torch.equal(data.labels, what.cond)


@dataclass(frozen=True)
class Unwaiting(Parallel):
    """A process that does not wait for the others, which a test runs one after the other."""

    def total(self, *values: float) -> list[float]:
        return list(values)

    def agree(self, value: float) -> float:
        return value


def test_each_process_makes_its_share_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = Pairs(teacher(), 40, 2, torch.arange(40) % 3, batch=8)
    batches = solved(monkeypatch)
    with pytest.raises(FileNotFoundError):  # the parts of the first process
        Shelf(tmp_path, Unwaiting(1, 2), show=False)(what, 0)
    assert len(batches) == 2
    data = Shelf(tmp_path, Unwaiting(0, 2), show=False)(what, 0)
    assert len(batches) == 5
    assert torch.equal(data.x, made_now(what, 0).x)


def test_large_stores_are_kept_in_few_parts(tmp_path: Path) -> None:
    what = Pairs(teacher(), 200, 2, None, batch=1)
    data = Shelf(tmp_path, Parallel(), show=False)(what, 0)
    assert len(list(tmp_path.rglob("part-*.safetensors"))) == 50  # of four batches each
    assert torch.equal(data.x, made_now(what, 0).x)


# --- the folder ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_clock(folder: Path) -> dict[str, Any]:
    """What a run left, but for what the clock says."""
    found: dict[str, Any] = {}
    for name, data in contents(folder).items():
        if name.endswith("log.jsonl"):
            found[name] = [{**json.loads(line), "seconds": 0} for line in data.decode().splitlines()]
        elif name.endswith("config.json"):
            config = json.loads(data)
            found[name] = {**config, "card": {**config["card"], "seconds": 0, "choosing": 0}}
        elif not name.endswith("checkpoint.safetensors"):
            found[name] = data
    return found


LIBRARY: dict[str, Recipe] = {"cm": ConsistencyDistillation(), "instaflow": InstaFlow(pairs=16, ode_steps=2)}
COMMANDS = {"cm": [], "instaflow": ["--pairs", "16", "--ode-steps", "2"]}
COMMON = ["--budget", "4steps", "--batch", "8", "--precision", "fp32", "--quiet"]


def command(name: str, folder: Path) -> None:
    words = ["distill", name, "--teacher", "digits", "--data", "digits", "--out", str(folder), *COMMANDS[name], *COMMON]
    from fewstep.cli import main

    assert main(words) == 0


def library(name: str, folder: Path, of: Any = "digits") -> Any:
    return fs.distill(
        of, LIBRARY[name], "digits", "4steps", batch=8, precision="fp32", show=False, folder=folder
    )  # fmt: skip


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_and_the_command_leave_the_same_folder(name: str, tmp_path: Path) -> None:
    """Recipe, logs, models, cards, stores; and each resumes what the other began or finished."""
    library(name, tmp_path / "library")
    command(name, tmp_path / "command")
    here, there = without_clock(tmp_path / "library"), without_clock(tmp_path / "command")
    assert here.keys() == there.keys() >= {"recipe.json", "log.jsonl", "model/model.safetensors", "model/config.json"}
    assert all(here[file] == there[file] for file in here)
    before = {name: contents(tmp_path / name) for name in ("library", "command")}
    command(name, tmp_path / "library")
    library(name, tmp_path / "command", fs.load("digits"))  # known by its weights
    assert {name: contents(tmp_path / name) for name in ("library", "command")} == before


def test_the_command_goes_on_with_what_the_library_began(tmp_path: Path) -> None:
    """Stopped in its second stage without a name for its teacher, a run ends with the weights of one never stopped."""
    whole = library("instaflow", tmp_path / "whole")
    real, calls = Records.write, [0]

    class Stop(Exception):
        pass

    def third(self: Records, record: dict[str, Any]) -> None:
        real(self, record)
        calls[0] += 1
        if calls[0] == 3:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Records, "write", third)
        library("instaflow", tmp_path / "cut", fs.load("digits"))
    assert json.loads((tmp_path / "cut/recipe.json").read_text())["start"]["teacher"]["name"] is None
    command("instaflow", tmp_path / "cut")
    assert torch.equal(weights(fs.load(tmp_path / "cut")), weights(whole))


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    """By digest, whatever the names; nothing in the folder changes."""
    run(ConsistencyDistillation(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OtherRun, match=r"holds another run: the teacher is one without a name \(sha256 \w{12}\) there"):
        run_recipe(ConsistencyDistillation(), teacher(seed=9), points(), SETTINGS, tmp_path, show=False)
    with pytest.raises(OtherRun, match=r"the data is 'points' \(sha256 \w{12}\) there and 'points' \(sha256"):
        run_recipe(ConsistencyDistillation(), teacher(), points(30), SETTINGS, tmp_path, show=False)
    with pytest.raises(OtherRun, match=r"mu is 0 there and 0\.5 here; choose another folder"):
        run(ConsistencyDistillation(mu=0.5), tmp_path)
    with pytest.raises(OtherRun, match="the student is absent there and one without a name"):
        run(ConsistencyDistillation(), tmp_path, given={"student": teacher(8)})
    with pytest.raises(OtherRun, match="budget is 4steps there and 5steps here"):
        run(ConsistencyDistillation(), tmp_path, replace(SETTINGS, budget=Budget(5)))
    with pytest.raises(OtherRun, match="seed is 0 there and 1 here"):
        run(ConsistencyDistillation(), tmp_path, replace(SETTINGS, seed=1))
    assert contents(tmp_path) == before


def test_a_run_goes_further_when_asked_to(tmp_path: Path) -> None:
    """A longer budget, and the record says so."""
    run(ConsistencyDistillation(), tmp_path)
    more = replace(SETTINGS, budget=Budget(6))
    result = run_recipe(ConsistencyDistillation(), teacher(), points(), more, tmp_path, further=True, show=False)
    assert result.steps == 6 and records.read(tmp_path / "recipe.json").settings["budget"] == "6steps"


def test_a_held_folder_and_a_strangers_folder_are_refused(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(ValueError, match="another run is training in this folder"):
        run(ConsistencyDistillation(), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"mine is not empty and holds no recipe\.json: choose a new folder"):
        run(ConsistencyDistillation(), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_the_models_of_a_run_are_recorded_by_role(tmp_path: Path) -> None:
    native.save(teacher(8, seed=5), tmp_path / "small")
    native.save(teacher(), tmp_path / "large")
    names = {"teacher": str(tmp_path / "large"), "student": str(tmp_path / "small")}
    fs.distill(
        names["teacher"], DMD2(), points(), "2steps", batch=8, precision="fp32", show=False, folder=tmp_path / "run",
        student=names["student"],
    )  # fmt: skip
    start = records.read(tmp_path / "run" / "recipe.json").start
    assert start == {
        role: {
            "name": name, "sha256": records.weights_sha256(Path(name)), "digest": model_sha256(native.load(name))
        } for role, name in names.items()
    }  # fmt: skip


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its recipe names the teacher by the sum of its files only, and it counted the seeds of its stages up."""
    command("instaflow", tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    written = json.loads(path.read_text())
    source = written["start"]["teacher"]
    del written["stage_seeds"]
    path.write_text(json.dumps({**written, "format": 1, "start": {"model": "digits", "sha256": source["sha256"]}}))
    assert records.read(path).stage_seeds == "counted"
    with pytest.raises(ValueError, match="this folder holds a run with seed"):  # stage 1 was not begun by that version
        library("instaflow", tmp_path / "run")
    for stage in (tmp_path / "run").glob("stage-1-*"):
        for file in sorted(stage.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        stage.rmdir()
    library("instaflow", tmp_path / "run")
    assert OneFile(tmp_path / "run" / "stage-1-reflow-distil").counters()["run"]["seed"] == 1


# --- digests and imports ------------------------------------------------------------------------------------------


def test_digests_see_every_bit_and_no_mode() -> None:
    a = teacher()
    assert model_sha256(a.train()) == model_sha256(a.eval())
    b = teacher()
    next(iter(b.parameters())).data.view(-1)[0].mul_(1 + 1e-6)
    assert model_sha256(a) != model_sha256(b)
    assert model_sha256(a) != model_sha256(NetworkDenoiser(a.net, EDM(), TrigPrediction(sigma_data=0.6), (2,), 3))
    for x in (torch.tensor(1.0), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16), torch.eye(3).t()):
        assert tensors_sha256([("x", x)]) == tensors_sha256([("x", x.clone())]) != tensors_sha256([("y", x)])


def test_nothing_imports_what_only_some_systems_have() -> None:
    """``fcntl`` and ``resource`` are not on Windows, ``msvcrt`` is nowhere else: only behind a condition."""
    found = []
    for path in (Path(fs.__file__).parent).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if name in ("fcntl", "resource", "msvcrt", "pwd")]
    assert found == []


def test_a_recipe_from_before_a_hyper_parameter_goes_on(tmp_path: Path) -> None:
    """What it does not say is the default, which is what it ran with."""
    recipe = InstaFlow(reflows=0, pairs=16, ode_steps=2)
    made = fs.distill(teacher(), recipe, points(), "2steps", folder=tmp_path, batch=8, show=False, precision="fp32")
    path = tmp_path / "recipe.json"
    written = json.loads(path.read_text())
    del written["hyper_parameters"]["reflow_guidance"]
    path.write_text(json.dumps(written))
    again = fs.distill(teacher(), recipe, points(), "2steps", folder=tmp_path, batch=8, show=False, precision="fp32")
    assert torch.equal(weights(made), weights(again))
    with pytest.raises(ValueError, match="reflow_guidance is 1 there and 2 here"):
        fs.distill(
            teacher(), replace(recipe, reflow_guidance=2.0), points(), "2steps", folder=tmp_path, batch=8,
            show=False, precision="fp32",
        )  # fmt: skip
