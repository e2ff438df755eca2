"""Products of several experts by command line: each command works on the folder, or says in one line why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds_of_models import SHAPE, moved, network, routed_by_class, routed_by_time, second_network

from fewstep.denoisers import NetworkDenoiser
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.models import model_of
from fewstep.networks import MLP
from fewstep.routing import ByClass, ByEmbedding, RoutedDenoiser, RoutedFlowMap, Router
from fewstep.sampling import Plan, Student

Cli = Callable[..., Any]
CARD = {"method": "made here", "data": "digits"}


def student() -> Student:
    """Two students of half of the digits each."""
    return Student(routed_by_class(), {1: Plan((1.5,)), 2: Plan((1.5, 0.7))})


def denoiser_by_class() -> RoutedDenoiser:
    return RoutedDenoiser([network(), second_network()], ByClass.even(10, 2))


PRODUCTS: dict[str, Callable[[], Any]] = {
    "student": student, "denoiser-by-class": denoiser_by_class, "denoiser-by-time": routed_by_time
}  # fmt: skip
SMALL = ("--calls", 2, "--n", 4, "--reference", 20, "--solvers", "ddim", "--grids", "uniform")
SHORT = ("--data", "digits", "--budget", "1steps", "--batch", 8, "--gan-weight", 0, "--critic-steps", 1, "--quiet")
#: Each command on the folder ``product``.
COMMANDS: dict[str, tuple[object, ...]] = {
    "sample": ("sample", "product", "--n", 4, "--out", "x.npz"),
    "evaluate": ("evaluate", "product", "--n", 20, "--features", "pixels", "--steps", 2, "--json", "x.json"),
    "report": ("report", "product-run", "--n", 20),
    "export": ("export", "product", "out"),
    "native": ("export", "product", "copy", "--native"),
    "statistics": ("statistics", "product", "--samples", 4, "--grid", 4),
    "tune-steps": ("tune-steps", "product", *SMALL),
    "distill": ("distill", "dmd2", "--teacher", "product", *SHORT, "--out", "next"),
    "student": ("distill", "dmd2", "--teacher", "digits", "--student", "product", *SHORT, "--out", "more"),
}  # fmt: skip


def write(name: str) -> None:
    """A product in ``product``, and in a run folder."""
    native.save(PRODUCTS[name](), "product", CARD)
    native.save(PRODUCTS[name](), "product-run/model", CARD)
    told = {
        "command": "distill", "method": "dmd2", "hyper_parameters": {}, "settings": {}, "start": {"model": "digits"},
        "data": {"source": "digits"},
    }  # fmt: skip
    Path("product-run/recipe.json").write_text(json.dumps(told))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_routed_product_goes_through_every_command(name: str, cli: Cli) -> None:
    """Sampled, measured, reported, copied and taught from as another model; what needs a solver takes the denoisers,
    diffusers none.  Guidance has no expert for samples without a label."""
    write(name)
    made, refused = PRODUCTS[name](), 2 if name == "student" else 0
    cli(*COMMANDS["sample"], "--seed", 5, "--steps", 2)
    assert np.array_equal(np.load("x.npz")["samples"], model_of(made).sample(4, seed=5, steps=2).numpy())
    for command in ("evaluate", "report", "native"):
        cli(*COMMANDS[command])
    rows = json.loads(Path("x.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [model_of(made).calls(2)]  # not one for each expert
    assert native.card("copy") == CARD == native.card("product")
    assert torch.equal(*(model_of(native.load(folder)).sample(3) for folder in ("copy", "product")))
    for command in ("statistics", "tune-steps"):
        done = cli(*COMMANDS[command], code=refused)
        assert not refused or ("'product' is a student" in done.err and done.err.count("\n") == 1)
    err = cli(*COMMANDS["export"], code=2).err
    assert err.count("\n") == 1 and "a routed model cannot be exported" in err and "export its experts" in err
    assert not Path("out").exists()
    if name == "denoiser-by-class":
        err = cli("sample", "product", "--guidance", 2, "--n", 4, code=2).err
        assert err.count("\n") == 1 and "guidance cannot leave them out" in err
    cli(*COMMANDS["distill"], code=refused)
    cli(*COMMANDS["student"])
    assert any(isinstance(module, Router) for module in native.load("more/model").modules())


def test_samples_of_one_expert(cli: Cli) -> None:
    """Classes that one expert owns are what it makes alone."""
    write("student")
    cli("sample", "product", "--n", 3, "--class", "7", "--seed", 2, "--out", "x.npz")
    alone = Student(PRODUCTS["student"]().flow_map.experts[1], {1: Plan((1.5,))})
    assert np.array_equal(np.load("x.npz")["samples"], alone.sample(3, torch.full((3,), 7), seed=2).numpy())


def test_a_further_input_reaches_the_experts(cli: Cli) -> None:
    """Given by a flag, as to any student; one that no expert has is refused with those there are."""
    experts = []
    for width in (8, 16):
        torch.manual_seed(width)
        net = moved(MLP(SHAPE, width, 1, 10, extras=("w",)))
        made = NetworkDenoiser(net, network().schedule, network().prediction, SHAPE, 10)
        experts.append(Jump(made, extras={"w": Input(1.0, 0.0, 8.0)}))
    native.save(Student(RoutedFlowMap(experts, ByClass.even(10, 2)), {1: Plan((1.5,))}), "product", CARD)
    cli("sample", "product", "--n", 10, "--seed", 1, "--extra", "w=3", "--out", "x.npz")
    found = torch.from_numpy(np.load("x.npz")["samples"])
    again = native.load("product")
    assert torch.equal(found, again.sample(10, seed=1, w=3.0)) and not torch.equal(found, again.sample(10, seed=1))
    err = cli("sample", "product", "--n", 2, "--extra", "v=3", "--out", "x.npz", code=2).err
    assert err.count("\n") == 1 and "v=3" in err and "w from 0 to 8 (default 1)" in err


def test_prompts_are_needed_where_they_choose_the_expert(cli: Cli) -> None:
    """Experts by embedding, sampled without one."""
    experts = [NetworkDenoiser(MLP(SHAPE, 8, 1), network().schedule, network().prediction, SHAPE) for _ in range(2)]
    native.save(RoutedDenoiser(experts, ByEmbedding(torch.eye(2), "prompt_embeds")), "product", CARD)
    err = cli("sample", "product", "--n", 2, "--out", "x.npz", code=2).err
    assert err.count("\n") == 1 and "routed by 'prompt_embeds' [2, ..., 2], and have nothing" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_routed_folder_is_refused_by_name(command: str, cli: Cli) -> None:
    """Each command says which folder, which field and what would be right, before any work."""
    write("student")
    for folder in ("product", "product-run/model"):
        path = Path(folder, "config.json")
        config = json.loads(path.read_text())
        config["model"]["flow_map"]["router"]["parts"][0].remove(3)
        path.write_text(json.dumps(config))
    err = cli(*COMMANDS[command], code=2).err
    assert err.count("\n") == 1 and "must hold every label from 0 on once" in err and "product" in err
    assert not {"out", "copy", "next", "more", "x.npz", "x.json", "report.html"} & {
        path.name for path in Path().iterdir()
    }
