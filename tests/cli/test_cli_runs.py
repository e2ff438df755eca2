"""Training by command: run folders, recipes, resuming."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import api
from fewstep.classifiers import NetworkClassifier
from fewstep.data import load as load_data
from fewstep.data.condensed import Condensed
from fewstep.data.text import LETTERS
from fewstep.denoisers import NetworkDenoiser
from fewstep.digests import model_sha256
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.files import save_tensors
from fewstep.hub import native
from fewstep.language_models import NetworkLanguageModel
from fewstep.methods import RECIPES, recipe_class
from fewstep.models import model_of
from fewstep.networks import MLP, UNet
from fewstep.networks.causal import GRULanguageModel
from fewstep.networks.classifiers import ConvNet, ResNet
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction, Velocity
from fewstep.report import read_run
from fewstep.runs import record as records
from fewstep.runs.stages import stages_of
from fewstep.sampling.search import half_level
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

Cli = Callable[..., Any]

#: A run of a second or less.
SHORT = ("--budget", "6steps", "--batch", "16", "--precision", "fp32", "--log-steps", "2", "--quiet")
#: What would otherwise take long before the first iteration.
SMALL = dict.fromkeys(("dmd", "reflow", "instaflow"), ("--pairs", "32", "--ode-steps", "2"))
SMALL |= dict.fromkeys(("lsd", "lsd-plus"), ("--steps", "2", "--teacher-steps", "4"))
SMALL["msd"] = ("--dm", "dmd:pairs=32,ode_steps=2")
SMALL["pca"] = ("--k", "1", "--nets", "2")
SMALL["dq"] = ("--patch-size", "2", "--feature-epochs", "0.02", "--autoencoder-width", "8", "--autoencoder-depth", "1")
SMALL["ast"] = ("--experts", "1", "--epochs", "1", "--max-start-epoch", "1", "--expert-epochs", "1", "--steps", "2")
SMALL["cv-dd"] = ("--per-class", "1", "--label-epochs", "4", "--pool", "convnet,resnet")
SMALL["rad"] = ("--queries", "5")
SMALL["diswot"] = ("--depths", "1,2", "--draws", "2", "--evaluations", "4", "--population", "3", "--tournament", "2")
#: Methods of discrete models, which take another teacher.
DISCRETE = ("discrete-denoising", "score-entropy", "lsd", "lsd-plus")


def teacher_of(method: str) -> tuple[str, ...]:
    """The flags that name a teacher, made here for methods that cannot take the bundled MLP."""
    if method == "lowdiff":
        unet = UNet((1, 8, 8), channels=(8, 16), blocks=1, width=16, classes=10)
        native.save(NetworkDenoiser(unet, TrigFlow(), TrigPrediction(), (1, 8, 8), 10), "pictures", {"data": "digits"})
        return ("--teacher", "pictures")
    if method == "retime":  # which is for networks that are not told the angle
        net = MLP((1, 8, 8), width=16, blocks=1, classes=10)
        native.save(NetworkDenoiser(net, TrigFlow(), EDMPrediction(), (1, 8, 8), 10), "told", {"data": "digits"})
        return ("--teacher", "told")
    task = recipe_class(method).task
    if task == "classification":
        return ("--teacher", classifier(method), *soft_data(method))
    if task == "language":
        return language(method)
    if method not in DISCRETE:
        return ("--teacher", "digits")
    net = Transformer(64, 27, 28, width=8, blocks=1, heads=2, timed=False)
    native.save(NetworkDiscreteDenoiser(net, Masked(27), 64), "letters", {"data": "shakespeare"})
    return ("--teacher", "letters")


def classifier(method: str) -> str:
    """The folder of a classifier of digits, one of residual blocks where students of such are searched."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = ResNet((1, 8, 8), 10, width=4) if method == "diswot" else ConvNet((1, 8, 8), 10, width=8, depth=1)
    native.save(NetworkClassifier(net, (1, 8, 8), 10), "seen", {"data": "digits"})
    return "seen"


def language(method: str) -> tuple[str, ...]:
    """The flags that name a language model of letters, a draft beside it, and pairs of answers."""
    for name in ("letters-model", "draft"):
        with torch.random.fork_rng([]):
            torch.manual_seed(len(name))
            net = GRULanguageModel(27, 64, width=8)
        native.save(NetworkLanguageModel(net, 27, 64, LETTERS.characters), name, {"data": "shakespeare"})
    told: tuple[str, ...] = ("--teacher", "letters-model")
    if method.startswith("distill-spec"):
        return (*told, "--student", "draft")
    if method in ("sft", "redi", "preferences"):
        tokens = torch.arange(24 * 6).reshape(24, 6) % 27
        mask = (torch.arange(6) >= 3).expand(24, 6)
        columns = {"mask": mask, "rejected": (tokens + 5 * mask) % 27, "rejected_mask": mask}
        save_tensors(Path("pairs.safetensors"), {"tokens": tokens, **{k: c.contiguous() for k, c in columns.items()}})
        return (*told, "--data", "pairs.safetensors")
    return told


def soft_data(method: str) -> tuple[str, ...]:
    """Data with soft labels for the method that reads them."""
    if method != "soft-supervised":
        return ()
    x, labels = load_data("digits").x[:40], torch.arange(40) % 10
    native.save(Condensed(x, labels, notes={"logits": torch.randn(40, 10)}), "softened")
    return ("--data", "softened")


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_runs_and_its_recipe_repeats_it_bit_for_bit(method: str, cli: Cli) -> None:
    """``distill METHOD`` leaves a run folder, and ``distill --recipe`` on its recipe makes the same weights."""
    cli("distill", method, *teacher_of(method), "--out", "first", *SHORT, *SMALL.get(method, ()))
    first = Path("first")
    assert {"recipe.json", "log.jsonl", "model"} <= {path.name for path in first.iterdir()}
    stages = len(stages_of(recipe_class(method)()))
    assert (first / "checkpoint.safetensors").is_file() == (stages == 1)
    assert len(list(first.glob("stage-*/checkpoint.safetensors"))) == (stages if stages > 1 else 0)
    cli("distill", "--recipe", "first/recipe.json", "--out", "second", "--quiet")
    assert weights(Path("second")) == weights(first)
    assert Path("second/recipe.json").read_bytes() == (first / "recipe.json").read_bytes()
    made = api.load("first")
    assert all(bool(value.isfinite().all()) for value in made.state_dict().values())
    if recipe_class(method).task == "generation":
        assert bool(torch.isfinite(model_of(made).sample(4)).all())


def test_a_recipe_records_everything(cli: Cli) -> None:
    """The recipe holds the method with all values, the weights' and the data's SHA-256, the settings, the versions."""
    done = cli("distill", "dmd2", "--teacher", "digits", "--critic-steps", "2", "--seed", "5", *SHORT)
    recipe = json.loads(Path("runs/dmd2-digits/recipe.json").read_text())
    teacher = api.locate("digits") / "model.safetensors"
    assert recipe["command"] == "distill" and recipe["method"] == "dmd2"
    files = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert recipe["start"] == {
        "teacher": {"name": "digits", "sha256": files, "digest": model_sha256(api.load("digits"))}
    }  # fmt: skip
    assert recipe["hyper_parameters"] == records.plain(vars(recipe_class("dmd2")(critic_steps=2)))
    data = load_data("digits")
    assert recipe["data"] == {
        "source": "digits", "samples": len(data), "shape": [1, 8, 8], "sha256": data.sha256()
    }  # fmt: skip
    assert recipe["settings"]["budget"] == "6steps" and recipe["settings"]["seed"] == 5
    assert recipe["settings"]["precision"] == "fp32"
    assert recipe["versions"]["torch"] == torch.__version__
    assert "6 steps, 96 samples" in done.out
    card = native.card("runs/dmd2-digits/model")
    assert card["recipe"] == "dmd2" and card["steps"] == 6 and card["teacher"] == recipe["start"]["teacher"]


def test_data_have_different_sums_when_a_label_moves() -> None:
    """The data's SHA-256 covers samples, labels and shape."""
    data = load_data("digits")
    assert data.labels is not None
    other = data.subset(slice(None))
    assert other.sha256() == data.sha256()
    moved = data.labels.clone()
    moved[0] = (moved[0] + 1) % 10
    sums = {
        data.sha256(),
        type(data)(data.name, data.x, moved).sha256(),
        type(data)(data.name, data.x, None).sha256(),
        type(data)(data.name, data.x.flatten(2), data.labels).sha256(),
    }
    assert len(sums) == 4


def test_precision_auto_is_resolved_once(cli: Cli) -> None:
    """The recipe holds what "auto" measured, and the same command takes that instead of measuring again."""
    words = ("distill", "cm", "--teacher", "digits", "--out", "run", "--budget", "3steps", "--batch", "16", "--quiet")
    cli(*words)
    path = Path("run/recipe.json")
    recipe = json.loads(path.read_text())
    assert recipe["settings"]["precision"] in ("fp32", "bf16")
    other = {"fp32": "bf16", "bf16": "fp32"}[recipe["settings"]["precision"]]
    cli(*words)
    done = cli(*words, "--precision", other, code=2)
    assert f"--precision is {recipe['settings']['precision']} there and {other} here" in done.err


def test_the_same_command_goes_on(cli: Cli) -> None:
    """A finished run is left as it is by the same command, and the free settings may change."""
    words = ("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT)
    cli(*words)
    before = weights(Path("run"))
    log = Path("run/log.jsonl").read_text()
    cli(*words)
    cli(*words, "--save-seconds", "5")
    cli("distill", "--recipe", "run/recipe.json", "--quiet")  # a recipe in a run folder is that run
    assert weights(Path("run")) == before
    assert Path("run/log.jsonl").read_text() == log


def test_another_recipe_in_the_folder_is_refused(cli: Cli) -> None:
    """Every part of a recipe that differs is named, and the run is not touched."""
    words = ("distill", "cm", "--teacher", "digits", "--out", "run", "--lr", "0.25", "--steps", "1,2", *SHORT)
    cli(*words)
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    cli("distill", "denoising", "--teacher", "digits", "--out", "other", *SHORT)
    for extra, named in {
        ("--budget", "7steps"): "--budget is 6steps there and 7steps here",
        ("--lr", "0.5"): "--lr is 0.25 there and 0.5 here",
        ("--steps", "1"): "--steps is 1,2 there and 1 here",
        ("--seed", "1"): "--seed is 0 there and 1 here",
        ("--batch", "8"): "--batch is 16 there and 8 here",
        ("--averages", "0.05,0.1"): "--averages is 0.1 there and 0.05,0.1 here",
        ("--teacher", "other"): "the teacher is 'digits' (sha256",
    }.items():
        done = cli(*words, *extra, code=2)
        assert f"run holds another run: {named}" in done.err
    done = cli("distill", "dmd2", "--teacher", "digits", "--out", "run", *SHORT, code=2)
    assert "method is cm there and dmd2 here" in done.err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_equal_amounts_are_one_budget(cli: Cli) -> None:
    """ "6steps" and "6 steps" are the same run."""
    words = ("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT)
    cli(*words)
    cli(*words, "--budget", "6 steps")


def test_a_recipe_that_never_began_may_be_changed(cli: Cli) -> None:
    """A mistake that only shows after the recipe was written does not lock its folder."""
    Path("run").mkdir()
    cli("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT)
    recipe = Path("run/recipe.json").read_text()
    for path in sorted(Path("run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path("run/recipe.json").write_text(recipe)
    cli("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT, "--lr", "0.001")
    assert json.loads(Path("run/recipe.json").read_text())["hyper_parameters"]["lr"] == 0.001


def test_a_recipe_refuses_other_weights_and_other_data(cli: Cli) -> None:
    """A recipe whose teacher or data changed since is not run on something else."""
    cli("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT)
    cli("distill", "denoising", "--teacher", "digits", "--out", "other", *SHORT)
    done = cli("distill", "--recipe", "run/recipe.json", "--teacher", "other", "--out", "new", code=2)
    assert "another teacher than 'other'" in done.err
    done = cli("distill", "--recipe", "run/recipe.json", "--data", "fashion", "--out", "new", code=2)
    assert "another data set than 'fashion'" in done.err
    done = cli("distill", "--recipe", "run/recipe.json", "--lr", "1", "--out", "new", code=2)
    assert "'--lr' is not an argument" in done.err or "already says --lr" in done.err
    done = cli("distill", "--recipe", "run/recipe.json", "--batch", "8", "--out", "new", code=2)
    assert "--recipe already says --batch" in done.err
    assert not Path("new").exists()


def test_a_recipe_finds_its_teacher_elsewhere(cli: Cli) -> None:
    """The same weights under another name are the same teacher."""
    native.save(api.load("digits"), "copy")
    cli("distill", "cm", "--teacher", "digits", "--out", "run", *SHORT)
    cli("distill", "--recipe", "run/recipe.json", "--teacher", "copy", "--out", "moved", "--quiet")
    assert weights(Path("moved")) == weights(Path("run"))


def test_a_recipe_of_several_stages_has_one_model_and_one_log(cli: Cli) -> None:
    """The last stage's weights are the run's, and the joined log counts on through the stages."""
    cli("distill", "pd", "--teacher", "digits", "--start", "4", "--out", "run", *SHORT)
    stages = sorted(Path("run").glob("stage-*"))
    assert [stage.name for stage in stages] == ["stage-0-pd-halving", "stage-1-pd-halving"]
    assert weights(stages[-1]) == weights(Path("run"))
    assert native.card("run/model")["method"] == "pd-halving" and native.card("run/model")["recipe"] == "pd"
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in log] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)
    ]  # fmt: skip
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds)
    assert list(api.load("run").plans) == [1]


def small_student(folder: str) -> NetworkDenoiser:
    """A narrower network than the bundled teacher's, saved."""
    torch.manual_seed(0)
    net = MLP((1, 8, 8), 24, 1, classes=10)
    model = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (1, 8, 8), 10)
    native.save(model, folder)
    return model


def test_a_student_of_another_architecture_is_brought_by_flag(cli: Cli) -> None:
    """``--student`` is trained, recorded, found again by the recipe, and another one is another run."""
    small_student("small")
    words = ("distill", "dmd2", "--teacher", "digits", "--out", "run", *SHORT)
    cli(*words, "--student", "small")
    student = api.load("run")
    assert {net.config["width"] for net in student.modules() if isinstance(net, MLP)} == {24}
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert {role: source["name"] for role, source in recipe["start"].items()} == {
        "teacher": "digits",
        "student": "small",
    }
    cli("distill", "--recipe", "run/recipe.json", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("run"))
    Path("small").rename("moved")
    cli("distill", "--recipe", "run/recipe.json", "--student", "moved", "--out", "third", "--quiet")
    assert weights(Path("third")) == weights(Path("run"))
    done = cli("distill", "--recipe", "run/recipe.json", "--student", "digits", "--out", "no", code=2)
    assert "another student than 'digits'" in done.err
    done = cli(
        "distill", "--recipe", "run/recipe.json", "--student", "moved", "--guide", "moved", "--out", "no", code=2
    )
    assert "the recipe was made without a guide: leave --guide out" in done.err
    done = cli(*words, code=2)
    assert "the student is 'small' (sha256" in done.err and "there and absent here" in done.err
    assert "--student small" in " ".join(read_run("run").note.shell("run").split())  # type: ignore[union-attr]
    done = cli(*words, "--student", "moved", "--dry-run")
    narrow = sum(p.numel() for p in api.load("moved").parameters())
    assert f"student Jump {narrow:,}" in " ".join(done.out.split())


def test_only_roles_that_a_method_uses_are_flags(cli: Cli) -> None:
    """``--student`` where the method trains one, no ``--guide`` where it has no use for one."""
    assert "--student MODEL" in cli("distill", "cm", "--help").out
    assert "--guide" not in cli("distill", "cm", "--help").out
    assert "--student" not in cli("distill", "denoising", "--help").out
    done = cli("distill", "cm", "--teacher", "digits", "--guide", "digits", code=2)
    assert "'--guide' is not an argument" in done.err


def test_a_student_does_not_teach(cli: Cli) -> None:
    """One line that names it; as ``--student`` its weights are welcome."""
    cli("distill", "cm", "--teacher", "digits", "--out", "cm-digits", *SHORT)
    done = cli("distill", "pd", "--teacher", "cm-digits", *SHORT, code=2)
    assert "'cm-digits' is a student of 1, 2, 4 calls, not a denoiser, and cannot teach" in done.err
    assert done.err.count("\n") == 1 and not Path("runs").exists()
    cli("distill", "pd-halving", "--teacher", "digits", "--student", "cm-digits", "--out", "halved", *SHORT)
    assert list(api.load("halved").plans) == [1]


def test_flow_matching_trains_what_its_paper_does(cli: Cli) -> None:
    """Straight lines and velocities without a word more; a recipe of an earlier version, which had hyper-parameters
    without effect, runs again to the same weights."""
    cli("train", "flow", "--data", "digits", "--method", "flow-matching", "--network", "mlp", "--width", "16", *SHORT)
    written = json.loads(Path("runs/flow/recipe.json").read_text())
    assert (
        written["start"]["schedule"]["name"] == "FlowMatching" and written["start"]["prediction"]["name"] == "velocity"
    )
    assert "noise_mean" not in written["hyper_parameters"]
    written["hyper_parameters"] |= {"noise_mean": -1.0, "noise_std": 1.4}
    Path("old.json").write_text(json.dumps(written))
    cli("train", "--recipe", "old.json", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("runs/flow"))


def test_a_nameless_teacher_must_be_named(cli: Cli) -> None:
    """A run of the library with an object as its teacher is repeated with ``--teacher``."""
    recipe = recipe_class("cm")()
    api.distill(api.load("digits"), recipe, "digits", "3steps", batch=16, precision="fp32", show=False, folder="run")
    done = cli("distill", "--recipe", "run/recipe.json", "--out", "again", code=2)
    assert "the teacher of this recipe has no name: say where it lies with --teacher" in done.err
    cli("distill", "--recipe", "run/recipe.json", "--teacher", "digits", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("run"))


def test_the_demonstration_looks_at_its_page_first(cli: Cli) -> None:
    """A page that cannot be written is an error before anything is trained."""
    Path("folder").mkdir()
    Path("file").touch()
    for out in ("folder", "file/page.html"):
        done = cli("demo", "--out", out, code=2)
        assert done.err.startswith("fewstep demo: ") and out in done.err and done.err.count("\n") == 1
    assert sorted(path.name for path in Path().rglob("*")) == ["file", "folder"]


def test_train_makes_a_teacher(cli: Cli) -> None:
    """``train`` builds the network that the flags describe, for the shape and classes of the data, and repeats it."""
    shape = ("--network", "unet", "--channels", "8,16", "--blocks", "1", "--width", "16")
    noise = ("--schedule", "FlowMatching", "--prediction", "velocity", "--t-min", "0.001", "--method", "flow-matching")
    cli("train", "tiny", "--data", "digits", *shape, *noise, "--lr", "0.002", *SHORT)
    model = api.load("runs/tiny")
    assert isinstance(model, NetworkDenoiser)
    assert model.net.config["channels"] == [8, 16] and model.net.config["blocks"] == 1
    assert model.schedule == FlowMatching(t_min=0.001)
    assert model.classes == 10 and model.shape == (1, 8, 8)
    assert model.half_level == half_level(model, torch.arange(32) % 10)
    cli("train", "--recipe", "runs/tiny/recipe.json", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("runs/tiny"))
    recipe = json.loads(Path("runs/tiny/recipe.json").read_text())
    assert recipe["command"] == "train" and recipe["hyper_parameters"]["lr"] == 0.002
    done = cli("train", "tiny", "--data", "digits", *shape, *noise, "--lr", "0.5", *SHORT, code=2)
    assert "--lr is 0.002 there and 0.5 here" in done.err
    done = cli("train", "tiny", "--data", "digits", "--network", "mlp", *noise, "--lr", "0.002", *SHORT, code=2)
    assert "the network's" in done.err


def test_train_without_labels(cli: Cli) -> None:
    """``--unconditional`` leaves the labels out; schedule and prediction share ``--sigma-data``."""
    small = ("--network", "mlp", "--width", "16", "--sigma-data", "0.7")
    cli("train", "t", "--data", "digits", "--unconditional", *small, *SHORT)
    model = api.load("runs/t")
    assert model.classes is None
    assert model.schedule.sigma_data == model.prediction.sigma_data == 0.7


@pytest.mark.parametrize("method", ["cm-training", "ict"])
def test_train_makes_a_consistency_model_without_a_teacher(method: str, cli: Cli) -> None:
    """``train --method`` starts consistency training from a fresh network and leaves a student that samples;
    ``--sigma-data`` sets schedule, prediction and boundary alike, and the recipe repeats the run."""
    fresh = ("--data", "digits", "--network", "mlp", "--width", "16", "--sigma-data", "0.7", "--method", method)
    cli("train", "alone", *fresh, *SHORT)
    model = api.load("runs/alone")
    assert model.sample(4, torch.arange(4), steps=2).shape == (4, 1, 8, 8)
    assert model.flow_map.sigma_data == model.flow_map.denoiser.prediction.sigma_data == 0.7
    recipe = json.loads(Path("runs/alone/recipe.json").read_text())
    assert recipe["hyper_parameters"]["sigma_data"] == 0.7
    cli("train", "--recipe", "runs/alone/recipe.json", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("runs/alone"))


@pytest.mark.parametrize(
    ("method", "schedule"), [("ctm-training", EDM), ("scm-training", TrigFlow), ("mean-flow-training", FlowMatching)]
)
def test_train_makes_flow_maps_without_a_teacher(method: str, schedule: type[Schedule], cli: Cli) -> None:
    """Students of two times and of continuous time, each on the schedule of its paper."""
    cli("train", "alone", "--data", "digits", "--network", "mlp", "--width", "16", "--method", method, *SHORT)
    model = api.load("runs/alone")
    assert type(model.flow_map.schedule) is schedule
    assert model.sample(4, torch.arange(4), steps=2).shape == (4, 1, 8, 8)


def test_train_makes_a_shortcut_model_from_fresh_weights(cli: Cli) -> None:
    """The paper's own start: a velocity network on flow matching, which is told the size of its step; the recipe
    repeats the run."""
    fresh = ("--data", "digits", "--network", "mlp", "--width", "16", "--method", "shortcut", "--finest", "8")
    cli("train", "alone", *fresh, *SHORT)
    model = api.load("runs/alone")
    assert model.sample(4, torch.arange(4), steps=8).shape == (4, 1, 8, 8)
    assert model.plans[8].extras == {"d": 3.0} and model.extras["d"].high == 3
    network = model.flow_map.denoiser
    assert network.schedule == FlowMatching() and network.prediction == Velocity()
    recipe = json.loads(Path("runs/alone/recipe.json").read_text())
    assert (recipe["command"], recipe["method"]) == ("train", "shortcut")
    cli("train", "--recipe", "runs/alone/recipe.json", "--out", "again", "--quiet")
    assert weights(Path("again")) == weights(Path("runs/alone"))


@pytest.mark.parametrize(("method", "network"), [("ict", "unet"), ("lowdiff", "cascade-unet"), ("shortcut", "unet")])
def test_a_flag_of_model_and_method_is_there_once(method: str, network: str, cli: Cli) -> None:
    """Help is printed whatever names they share."""
    cli("train", "--method", method, "--network", network, "--help")


def test_the_seed_draws_the_initial_weights(cli: Cli) -> None:
    """Two seeds, two networks; the same seed, the same one."""
    mlp = ("--data", "digits", "--network", "mlp", "--width", "16", "--budget", "1steps", "--batch", "4", "--quiet")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli("train", name, *mlp, "--lr", "0", "--precision", "fp32", "--seed", seed)
    assert weights(Path("runs/a")) == weights(Path("runs/b"))
    assert weights(Path("runs/a")) != weights(Path("runs/c"))


def test_a_dry_run_tells_the_plan_and_writes_nothing(cli: Cli) -> None:
    """Networks with their parameter counts, who trains, memory, time, deviations, signs of health."""
    words = ("distill", "dmd2", "--teacher", "digits", "--dry-run", "--budget", "300steps", "--batch", "32")
    done = cli(*words, "--lr", "0.0007", "--clip", "9")
    text = " ".join(done.out.split())
    count = sum(p.numel() for p in api.load("digits").parameters())
    assert f"student Jump {count:,} adamw, lr 0.0007 linear, clip 9 yes" in text
    assert f"teacher NetworkDenoiser {count:,} frozen" in text
    assert "critic NetworkDenoiser" in text and "discriminator Discriminator" in text
    # gradients: student and critic and head; Adam's two moments; one average of the student
    head = 26241  # measured: the digits network has 160 features
    assert f"gradients {4 * (2 * count + head) / 2**20:.1f}" in text
    assert f"averages {4 * count / 2**20:.1f}" in text
    moments = 2 * 4 * (2 * count + head) / 2**20
    assert f"optimisers {moments:.1f}" in text
    assert "about 300 iterations, 9,600 samples" in text and "iteration: " in text and "2 timed" in text
    method = recipe_class("dmd2")
    assert method.paper.arxiv in text and all(deviation in text for deviation in method.paper.deviations)
    assert all(f"{name} {sign}" in text for name, sign in method.healthy.items())  # type: ignore[attr-defined]
    assert list(Path().iterdir()) == []


def test_a_dry_run_of_several_stages_times_the_pairs(cli: Cli) -> None:
    """A recipe of stages lists them, and the time to make the first one's pairs is told."""
    done = cli("distill", "instaflow", "--teacher", "digits", "--dry-run", "--budget", "1min")
    assert "2 stages" in done.out and "0. reflow:" in done.out and "1. reflow-distil:" in done.out
    assert "pairs:     about" in done.out and "split over 2 stages" in done.out


@pytest.mark.parametrize("command", ["distill cm --teacher digits", "train t --network mlp --width 16 --data digits"])
def test_train_and_distill_have_dry_runs(command: str, cli: Cli) -> None:
    """Budgets in time and images are told in iterations too."""
    done = cli(*command.split(), "--dry-run", "--budget", "2k images", "--batch", "50")
    assert "about 40 iterations, 2,000 samples" in " ".join(done.out.split())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_to_the_same_weights(number: int, code: int, cli: Cli) -> None:
    """SIGTERM and Ctrl-C end in a message and the usual exit code; the same command makes the bytes of an
    undisturbed run."""
    words = ["distill", "cm", "--teacher", "digits", "--budget", "100steps", "--batch", "16", "--precision", "fp32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "fewstep.cli", *words, "--out", "stopped"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        log = Path("stopped/log.jsonl")
        while not (log.is_file() and log.stat().st_size) and run.poll() is None:
            time.sleep(0.002)
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("fewstep distill: stopped after ") and last.endswith("the same command resumes")
    assert 0 < int(last.split()[4]) < 100
    if number == signal.SIGINT:
        return
    assert "going on where this run stopped" in cli(*words, "--out", "stopped").out
    cli(*words, "--out", "whole")
    assert weights(Path("stopped")) == weights(Path("whole"))


def test_a_low_rank_student_by_command(cli: Cli) -> None:
    """``--lora-rank`` leaves a folder of factors, its recipe repeats it bit for bit and resumes it, and another rank is
    another run."""
    asked = ("distill", "cm", "--teacher", "digits", "--out", "first", *SHORT)
    cli(*asked, "--lora-rank", "2", "--lora-alpha", "8", "--lora-targets", "first,second")
    settings = json.loads(Path("first/recipe.json").read_text())["settings"]
    assert [settings[f"lora_{name}"] for name in ("rank", "alpha", "targets")] == [2, 8.0, ["first", "second"]]
    assert len(weights(Path("first"))) < 40_000  # 1.5 MB with the base
    cli("distill", "--recipe", "first/recipe.json", "--out", "second", "--quiet")
    assert weights(Path("second")) == weights(Path("first"))
    assert Path("second/recipe.json").read_bytes() == Path("first/recipe.json").read_bytes()
    assert bool(torch.isfinite(api.load("first").sample(4)).all())
    other = cli(*asked, "--lora-rank", "auto", "--lora-alpha", "8", "--lora-targets", "first,second", code=2)
    assert "--lora-rank is 2 there and auto here" in other.err
    assert "--lora-rank" in cli("distill", "--recipe", "first/recipe.json", "--lora-rank", "3", code=2).err
    plan = cli(*asked[: -len(SHORT) - 1], "plan", "--lora-rank", "2", "--dry-run").out
    assert "8,896 of 392,000" in plan, plan
    written = cli("export", "first", "whole").out
    assert "in 1, 2" in written or "whole" in written
    assert "is not a diffusers model" in cli("export", "first", "factors", "--lora", code=2).err
    assert not Path("factors").exists()
    for words in (("--lora-rank", "0"), ("--lora-rank", "two"), ("--lora-alpha", "2")):
        assert "lora" in cli(*asked[: -len(SHORT) - 1], "bad", *SHORT, *words, code=2).err
        assert not Path("bad").exists()
    assert "--lora-rank" not in cli("train", "--help").out
