"""Every command on every kind of model that can be saved: it works, or says in one line why it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds_of_models import MAKERS, TOKENS

from fewstep import api
from fewstep.constant_acceleration import ConstantAcceleration
from fewstep.hub import native
from fewstep.methods import RECIPES, recipe_class
from fewstep.models import model_of
from fewstep.models.kinds import SAVED
from fewstep.report import read_run
from fewstep.report.runs import read_note
from fewstep.routing import Router

Cli = Callable[..., Any]

every_kind = pytest.mark.parametrize("kind", [kind for kind, cls in SAVED.items() if cls.task == "generation"])


def saved(kind: str, folder: str = "product") -> Any:
    """The kind's module, after it was written to the working folder."""
    native.save(MAKERS[SAVED[kind]](), folder, {"method": "made here", "data": "digits"})
    return native.load(folder)


def ends(cli: Cli, works: bool, *words: object) -> Any:
    """Run a command that works, or ends with one line and exit code 2."""
    done = cli(*words, code=0 if works else 2)
    assert works or done.err.count("\n") == 1
    return done


def has_denoiser(module: Any) -> bool:
    """Whether a solver can follow this model."""
    try:
        model_of(module).denoiser()
    except ValueError:
        return False
    return True


@every_kind
def test_sample(kind: str, cli: Cli) -> None:
    """The numbers are those of the kind's own sampling, and the calls those that it says."""
    module = saved(kind)
    model = model_of(module)
    done = cli("sample", "product", "--n", 4, "--seed", 3, "--out", "x.npz")
    found = torch.from_numpy(np.load("x.npz")["samples"])
    assert torch.equal(found, model.sample(4, seed=3))
    calls = model.calls(model.usual_steps)
    if "cascade" in model.kind:  # which has plans of its own
        calls = model.calls()
    assert f"{calls} network call" in done.out
    if model.tokens is not None:
        assert found.dtype == torch.int64 and int(found.min()) >= 0 and int(found.max()) < TOKENS
        assert "not pictures" in cli("sample", "product", code=2).err
    else:
        cli("sample", "product", "--n", 2)


@every_kind
def test_flags_on_how_to_sample(kind: str, cli: Cli) -> None:
    """A flag that the kind has no use for is refused by name, not ignored; the others reach the sampling."""
    module = saved(kind)
    model = model_of(module)
    values = {"solver": "ddim", "grid": "uniform", "guidance": 2.0, "threshold": "static"}
    switches = {"denoise": True, "one_path": True}
    for name, value in (values | switches).items():
        flag = f"--{name.replace('_', '-')}"
        words = [flag] if name in switches else [flag, value]
        if name not in model.options:
            err = ends(cli, False, "sample", "product", "--n", 2, "--out", "x.npz", *words).err
            assert f"{flag} is for teachers: 'product' is {model.called}" in err
            continue
        cli("sample", "product", "--n", 2, "--out", "x.npz", "--seed", 1, *words)
        expected = model.sample(2, seed=1, **{name: value})
        assert torch.equal(torch.from_numpy(np.load("x.npz")["samples"]), expected)
        if name == "guidance":
            assert not torch.equal(expected, model.sample(2, seed=1))
    steps = 7
    done = cli("sample", "product", "--n", 2, "--out", "x.npz", "--steps", steps, code=2 if model.plans else 0)
    assert (f"this {model.noun} has plans for" in done.err) if model.plans else (f": {steps} steps" in done.out)


@every_kind
def test_evaluate_and_report(kind: str, cli: Cli) -> None:
    """Models of pictures are measured, with the calls that they make; models of tokens are not."""
    module = saved(kind)
    model = model_of(module)
    works = model.tokens is None
    steps = () if model.plans else ("--steps", 2)
    ends(cli, works, "evaluate", "product", "--n", 20, "--features", "pixels", "--json", "x.json", *steps)
    if works:
        rows = json.loads(Path("x.json").read_text())["rows"]
        assert [row["steps"] for row in rows] == list(model.plans or (2,))
        assert [row["calls"] for row in rows] == [model.calls(row["steps"]) for row in rows]
    saved(kind, "product-run/model")
    told = {
        "command": "distill", "method": "cm", "hyper_parameters": {}, "settings": {}, "start": {"model": "digits"},
        "data": {"source": "digits"},
    }  # fmt: skip
    Path("product-run/recipe.json").write_text(json.dumps(told))
    done = ends(cli, works, "report", "product-run", "--n", 20)
    assert works or f"product-run is {model.called}: its samples are tokens" in done.err


@every_kind
def test_what_is_of_solvers(kind: str, cli: Cli) -> None:
    """Statistics and tuning are of models that a solver can follow; so are guides."""
    works = has_denoiser(saved(kind))
    small = ("--calls", 2, "--n", 2, "--reference", 20, "--solvers", "ddim", "--grids", "uniform")
    for words in (("tune-steps", "product", *small), ("statistics", "product", "--samples", 4, "--grid", 4)):
        done = ends(cli, works, *words)
        assert works or f"'product' is {SAVED[kind].called}" in done.err
    done = ends(cli, works, "sample", "digits", "--guide", "product", "--guidance", 2, "--n", 2)
    assert works or "cannot guide, name a worse teacher" in done.err


@every_kind
def test_export(kind: str, cli: Cli) -> None:
    """Native folders hold every kind; diffusers has a place for those that run along fixed times, or that a solver
    follows, on one network."""
    module = saved(kind)
    cli("export", "product", "copy", "--native")
    assert torch.equal(model_of(module).sample(3), model_of(native.load("copy")).sample(3))
    try:
        works = bool(model_of(module).student())
    except ValueError:
        works = has_denoiser(module)
    whys = {"routed": "a routed model cannot be exported", "two": "a model with 2 networks cannot be exported"}
    routed = any(isinstance(inner, Router) for inner in module.modules())
    kind_of = "routed" if routed else "two" if isinstance(module, ConstantAcceleration) else ""
    done = ends(cli, works and not kind_of, "export", "product", "out")
    why = whys.get(kind_of, f"diffusers has no place for {model_of(module).called}")
    assert (works and not kind_of) or why in done.err


@pytest.mark.parametrize("kind", [kind for kind, cls in SAVED.items() if cls.task in ("classification", "data")])
def test_what_makes_no_samples(kind: str, cli: Cli) -> None:
    """It is measured and has a page; what needs samples says in one line what it is instead."""
    module = saved(kind)
    called = SAVED[kind].called
    for words in (
        ("sample", "product"),
        ("sample", "product", "--n", 2, "--solver", "ddim"),
        ("sample", "digits", "--guide", "product", "--guidance", 2),
        ("inspect", "product"),
        ("tune-steps", "product", "--calls", 2),
        ("statistics", "product"),
        ("export", "product", "out"),
        ("distill", "cm", "--teacher", "product", "--budget", "1steps"),
        ("distill", "kd", "--teacher", "digits", "--budget", "1steps"),
    ):
        err = cli(*words, code=2).err
        assert err.count("\n") == 1 and (called in err or "starts from a model for classification" in err), words
    cli("export", "product", "copy", "--native")
    copied = native.load("copy").state_dict()
    assert all(torch.equal(value, copied[key]) for key, value in module.state_dict().items())
    quick = ("--networks", "mlp-classifier", "--seeds", 1, "--train-steps", 2)
    cli("evaluate", "product", *quick, "--json", "x.json")
    names = [row.get("name", row.get("model")) for row in json.loads(Path("x.json").read_text())["rows"]]
    assert names == (["product"] if kind == "classifier" else ["random", "product", "all"])
    for flag, value, said in (
        ("--networks", "cnn", "network 'cnn'"),
        ("--seeds", 0, "--seeds 0"),
        ("--train-steps", 0, "--train-steps 0"),
        ("--data", "fashion", "'fashion'"),
        ("--teacher", "digits", "'digits'"),
    ):
        if kind == "condensed" or flag == "--data":
            assert said in cli("evaluate", "product", *quick, flag, value, code=2).err, flag


# --- what the commands themselves make --------------------------------------------------------------------------


SHORT = ("--budget", "2steps", "--batch", "8", "--precision", "fp32", "--quiet", "--data", "digits")
UNET = ("--network", "unet", "--channels", "8,8", "--blocks", "1", "--width", "16")


@pytest.mark.parametrize(
    ("method", "kind", "flags"),
    [
        ("analog-bits", "self-conditioned", ("--network", "mlp", "--width", "16", "--blocks", "1")),
        ("analog-bits", "denoiser", ("--network", "mlp", "--width", "16", "--blocks", "1", "--self-conditioning", "0")),
        ("lowdiff", "cascade", UNET),
    ],
)
def test_trained_products_are_what_their_method_samples(
    method: str, kind: str, flags: tuple[str, ...], cli: Cli
) -> None:
    """A run of a method leaves its product, and the commands that the run recommends sample and measure it."""
    cli("train", "made", "--method", method, *flags, *SHORT)
    model = model_of(api.load("runs/made"))
    assert model.kind == kind
    cli("sample", "runs/made", "--n", 3, "--out", "x.npz")
    assert torch.equal(torch.from_numpy(np.load("x.npz")["samples"]), model.sample(3))
    plain = model_of(model.teacher()).sample(3)
    assert torch.equal(plain, model.sample(3)) == (kind == "denoiser")
    cli("evaluate", "runs/made", "--n", 20, "--steps", 1)
    cli("report", "runs/made", "--n", 20)
    page = Path("report.html").read_text()
    assert "fs.distill(" not in page and "fs.load(&#x27;runs/made&#x27;)" in page
    cli("distill", "denoising", "--teacher", "runs/made", "--out", "runs/next", *SHORT)


# --- the page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_python_lines_name_what_exists(name: str, tmp_path: Path) -> None:
    """``fs.X(...)`` of every method makes its recipe."""
    import fewstep as fs

    cls = recipe_class(name)
    told = {
        "command": "distill", "method": name, "hyper_parameters": {}, "settings": {"budget": "2min"},
        "start": {"model": "digits"}, "data": {"source": "digits"},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    note = read_note(tmp_path)
    assert note is not None

    class Asked:
        """The package, which trains nothing."""

        def __getattr__(self, word: str) -> Any:
            return (lambda *given, **named: given) if word == "distill" else getattr(fs, word)

    assert eval(note.call(), {"fs": Asked()}) == ("digits", cls())


def test_a_method_of_ones_own_is_on_the_page(cli: Cli) -> None:
    """A run by a method that is none of fewstep's does not refuse the page: it says so."""
    native.save(MAKERS[SAVED["student"]](), "runs/mine/model", {"method": "my-method", "steps": 3})
    told = {
        "command": "distill", "method": "my-method", "hyper_parameters": {"x": 1}, "settings": {},
        "start": {"model": "digits"}, "data": {"source": "digits"},
    }  # fmt: skip
    Path("runs/mine/recipe.json").write_text(json.dumps(told))
    assert read_run("runs/mine").recipe == "my-method"
    cli("report", "runs/mine", "--n", 20)
    page = Path("report.html").read_text()
    assert "The method “my-method”, which is none of fewstep" in page and "run its own program" in page
    Path("runs/mine/recipe.json").unlink()  # as 'fs.distill' leaves it
    cli("report", "runs/mine", "--n", 20, "--teacher", "digits", "--data", "digits")


def test_runs_of_one_teacher_under_two_names(cli: Cli) -> None:
    """Teachers are the same when their weights are, whatever they were called; a digest that differs is another."""
    digest = "a" * 64
    for name, teacher, sha in (("a", "digits", digest), ("b", "gone", digest), ("c", "digits", "b" * 64)):
        native.save(MAKERS[SAVED["student"]](), f"runs/{name}/model", {"method": "cm"})
        told = {
            "command": "distill", "method": "cm", "hyper_parameters": {}, "settings": {},
            "start": {"model": teacher, "sha256": sha}, "data": {"source": "digits"},
        }  # fmt: skip
        Path(f"runs/{name}/recipe.json").write_text(json.dumps(told))
    cli("report", "runs/b", "runs/a", "--n", 20)
    assert "digits" in Path("report.html").read_text()
    err = cli("report", "runs/a", "runs/c", "--n", 20, code=2).err
    assert "runs/a has teacher 'digits', runs/c has 'digits', which is another" in err and "--teacher" in err


# --- files that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--out", "{}/x.html"),
        ("report", "run", "--out", "{}/x.html"),
        ("evaluate", "digits", "--json", "{}/x.json"),
        ("tune-steps", "digits", "--out", "{}/x.json"),
        ("statistics", "digits", "--out", "{}/x.safetensors"),
        ("sample", "digits", "--out", "{}/x.png"),
        ("inspect", "fashion-1step", "--out", "{}/x.png"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("place", ["/proc", "nowhere", "/dev/null"])
def test_outputs_are_looked_at_before_the_work(words: tuple[str, ...], place: str, cli: Cli, monkeypatch: Any) -> None:
    """A file that cannot be written is said at once: no model is sampled, nothing is trained."""
    Path("run").mkdir()

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    for name in ("fewstep.demo.main", "fewstep.report.report_runs", "fewstep.sampling.engine.run"):
        monkeypatch.setattr(name, work)
    err = cli(*(word.format(place) for word in words), code=2).err
    assert err.count("\n") == 1 and place in err and words[-2] in err
