"""Mistakes of every kind end in one clear line, exit code 2, and leave what was written before as it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.cli import main
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.hub import native
from fewstep.networks import MLP
from fewstep.predictions import V
from fewstep.schedules import FlowMatching

QUICK = "--budget 2steps --batch 8 --precision fp32 --quiet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with earlier results: a finished run, a teacher, an unconditional model, data."""
    place = tmp_path_factory.mktemp("earlier")
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(f"distill cm --teacher digits --out run {QUICK}".split()) == 0
        native.save(fs.load("digits"), "teacher")
        native.save(NetworkDenoiser(MLP((1, 8, 8), 8, 1), FlowMatching(), V(), (1, 8, 8)), "plain")
        native.save(NetworkDenoiser(MLP((2,), 8, 1), FlowMatching(), V(), (2,)), "points")
        data = load_data("digits")
        np.savez("points.npz", x=np.zeros((20, 2), np.float32))
        np.savez("good.npz", images=data.x[:64].numpy(), labels=data.labels[:64].numpy())  # type: ignore[index]
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier results, as the current folder."""
    here = tmp_path / "here"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    return here


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(words: str | list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends in, after all that must hold of it."""
    before = contents(place)
    capsys.readouterr()
    given = words.split() if isinstance(words, str) else words
    code = main(given)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("fewstep")
    assert said in err, err
    after = contents(place)
    assert {name: after.get(name) for name in before} == before, "an earlier result was touched"
    assert not [name for name in after if Path(name).name.startswith(".")], "something half-written was left"
    return err


# --- words that mean nothing -------------------------------------------------------------------------------------

TRAIN = "train t --data digits --network mlp --width 16"
DISTILL = "distill cm --teacher digits"

WORDS = {
    # unknown names
    "destill dmd2": "command 'destill' is unknown; did you mean 'distill'?",
    "distill dmmd2 --teacher digits": "method 'dmmd2' is unknown; did you mean 'dmd2'?",
    "sample digit": "model 'digit': neither a bundled model",
    "sample digits --solver unpic": "solver 'unpic' is unknown; did you mean 'unipc'?",
    "sample digits --solver=": "solver '' is unknown",
    "sample digits --guidance nan": "guidance=nan must lie in",
    "sample digits --guidance 1e30": "guidance=1e+30 must lie in",
    "sample digits --device cpu:7": "--device cpu:7: there is one CPU; write cpu",
    f"{DISTILL} --device cpu:7": "--device cpu:7: there is one CPU; write cpu",
    f"{DISTILL} --budget 0.5steps": "budget '0.5steps': steps and images are whole numbers",
    f"{DISTILL} --batch 1000000000000": "batch=1e+12 must be at most 1e+06",
    "train ../x --data digits": "NAME '../x' is not the name of a folder in runs/",
    "train a/b --data digits": "NAME 'a/b' is not the name of a folder in runs/",
    "train .. --data digits": "NAME '..' is not the name of a folder in runs/",
    f"{TRAIN} --schedule FlowMatching --prediction eps": "--prediction eps: FlowMatching ends in pure noise",
    f"{TRAIN} --method flow-matching --noise-mean 1": "'--noise-mean' is not an argument",
    "sample digits --grid karas": "grid 'karas' is unknown; did you mean 'karras'?",
    "evaluate digits --solver heum": "solver 'heum' is unknown; did you mean 'heun'?",
    "evaluate digits --features pixel": "features 'pixel' do not exist: choose 'pixels'",
    "distill cm --teacher digits --data digts": "no data at 'digts'",
    "distill cm --teacher no/where": "model 'no/where': neither",
    "evaluate run --teacher digit": "model 'digit': neither",
    f"{TRAIN} --network unte": "network 'unte' is unknown; did you mean 'unet'?",
    f"{TRAIN} --schedule TrigFlw": "schedule 'TrigFlw' is unknown; did you mean 'TrigFlow'?",
    f"{TRAIN} --prediction tirg": "prediction 'tirg' is unknown; did you mean 'trig'?",
    f"{TRAIN} --method denoisng": "method 'denoisng' is unknown; did you mean 'denoising'?",
    f"{DISTILL} --guidence 2": "'--guidence' is not an argument of fewstep distill; did you mean '--guidance'?",
    f"{DISTILL} --gan-weight 1": "'--gan-weight' is not an argument",
    f"{TRAIN} --channels 8": "'--channels' is not an argument",
    "sample digits heun": "'heun' is not an argument",
    # missing words
    "distill": "METHOD is missing",
    "distill cm": "--teacher is missing",
    "train": "NAME is missing",
    "train t": "--data is missing",
    "sample": "MODEL is missing",
    "evaluate": "required: MODEL",
    "export digits": "required: FOLDER",
    "report": "required: RUN",
    "sample digits --steps": "--steps: expected one argument",
    "distill cm --teacher plain": "--data is missing, and model 'plain' does not say",
    "evaluate plain": "--data is missing, and 'plain' does not say",
    # wrong types
    "sample digits --steps 1.5": "--steps: invalid int value: '1.5'",
    "sample digits --n ten": "--n: invalid int value: 'ten'",
    "sample digits --guidance much": "--guidance: invalid float value: 'much'",
    f"{DISTILL} --lr fast": "--lr: 'fast' is not a finite number",
    f"{DISTILL} --lr nan": "--lr: 'nan' is not a finite number",
    f"{DISTILL} --steps 1,two": "--steps: 'two' is not a whole number",
    f"{DISTILL} --distance l3": "--distance: 'l3' is not one of l2, l1, pseudo-huber",
    f"{DISTILL} --precision fp8": "--precision: 'fp8' is not one of auto, fp32, bf16",
    f"{DISTILL} --seed x": "--seed: 'x' is not a whole number",
    "distill dmd2 --teacher digits --critic-steps 2.5": "--critic-steps: '2.5' is not a whole number",
    # budgets
    f"{DISTILL} --budget soon": "budget 'soon' is not an amount of training",
    f"{DISTILL} --budget 0steps": "it must be positive",
    f"{DISTILL} --budget=-5steps": "budget '-5steps' is not an amount",
    f"{DISTILL} --budget 5bananas": "budget '5bananas' is not an amount",
    f"{DISTILL} --budget=": "budget '' is not an amount",
    # devices
    f"{DISTILL} --device gpu": "--device 'gpu' is not a device",
    f"{DISTILL} --device cuda:99": "CUDA devices that PyTorch can use",
    f"{DISTILL} --device meta": "--device 'meta' is not supported",
    "sample digits --device cuda:99": "CUDA devices that PyTorch can use",
    # impossible hyper-parameters and settings
    f"{DISTILL} --lr -1": "lr=-1 must be at least 0",
    f"{DISTILL} --steps 0": "steps=0 must be at least 1",
    f"{DISTILL} --steps 1,-2": "steps=-2 must be at least 1",
    f"{DISTILL} --mu 2": "mu=2 must lie in [0, 1]",
    f"{DISTILL} --grid-times 1": "grid_times=1 must be at least 2",
    f"{DISTILL} --sigma-data 0": "sigma_data=0 must be positive",
    "distill dmd2 --teacher digits --critic-steps 0": "critic_steps=0 must be at least 1",
    "distill dmd2 --teacher digits --clip -1": "clip=-1 must be positive",
    "distill pd --teacher digits --start 6": "start=6 must be end=1 doubled",
    "distill reflow --teacher digits --pairs 0": "pairs=0 must be at least 1",
    "distill instaflow --teacher digits --reflows -1": "reflows=-1 must be at least 0",
    "distill cm-training --teacher digits --s1 3 --s0 9": "s1=3 must be at least s0=9",
    f"{TRAIN} --label-dropout 1.5": "label_dropout=1.5 must lie in [0, 1]",
    f"{DISTILL} --batch 0": "batch=0 must be at least 1",
    f"{DISTILL} --accumulate 3": "batch=64 must be divisible by accumulate=3",
    f"{DISTILL} --log-steps 0": "log_steps=0 must be at least 1",
    f"{DISTILL} --save-seconds -1": "save_seconds=-1 must be at least 0",
    f"{DISTILL} --averages 0.5": "sigma_rel=0.5 must lie in",
    "train t --data digits --channels 8,8,8,8": "a picture of 8x8 does not divide into 4 levels",
    "train t --data digits --channels 7,7": "channels=7 must be a positive multiple of 8",
    "train t --data digits --channels=-8,8": "channels=-8 must be a positive multiple of 8",
    "train t --data digits --blocks 0": "blocks=0 must be at least 1",
    "train t --data digits --width 15": "width=15 must be a positive multiple of 2",
    "train t --data digits --dropout 2": "dropout",
    "train t --data points.npz": "samples of shape [2] are not pictures",
    f"{TRAIN} --blocks -1": "blocks=-1 must be at least 0",
    f"{TRAIN} --width 0": "width=0 must be a positive multiple of 2",
    f"{TRAIN} --t-min 2": "t_min=2.0 and t_max=1.56",
    f"{TRAIN} --sigma-data -1": "sigma_data=-1 must be positive",
    f"{TRAIN} --schedule VPLinear --beta-min 30": "need 0 < beta_min < beta_max",
    # samples that cannot be made
    "sample digits --n 0": "--n 0 must be at least 1",
    "sample digits --n 1000000000000": "n=1000000000000 must be at most 2147483648",
    "sample digits --columns 0": "--columns 0 must be at least 1",
    "sample digits --steps 0": "steps=0",
    "sample digits --class 10": "--class 10: 'digits' has the classes 0 to 9",
    "sample digits --class=-1": "--class -1: 'digits' has the classes 0 to 9",
    "sample digits --class cat": "--class cat: give class numbers",
    "sample run --class 10": "--class 10: 'run' has the classes 0 to 9",
    "sample plain --class 1": "'plain' is unconditional",
    "sample plain --guidance 2": "--guidance 2: 'plain' has no classes to guide to",
    "sample run --steps 3": "--steps 3: this student has plans for 1, 2, 4 steps",
    "sample run --solver heun": "--solver is for teachers: 'run' is a student",
    "sample run --guidance 2": "--guidance is for teachers",
    "sample digits --prompt cat": "'digits' has no text encoder to read it",
    "sample digits --out x.jpg": "must end in .png",
    "sample digits --out no/x.png": "the folder no does not exist",
    "sample points": "are not pictures",
    # measurements that cannot be made
    "evaluate digits --n 5": "at least 20 are needed",
    "evaluate digits --steps 0": "--steps 0 must be at least 1",
    "evaluate run --steps 3": "--steps 3: this student has plans for 1, 2, 4 steps",
    "evaluate digits --data fashion": "makes samples [1, 8, 8], data 'fashion' has [1, 28, 28]",
    "report nowhere": "nowhere: no such run folder",
    "report teacher": "teacher: no finished run here",
    "report run --out no/page.html": "the folder no does not exist",
    "demo --minutes 0": "--minutes 0 must be positive",
    # models that do not go together with data
    "distill cm --teacher digits --data fashion": "data 'fashion' has samples [1, 28, 28], the model makes [1, 8, 8]",
    # places
    f"{DISTILL} --out good.npz": "good.npz: a file is in the way",
    f"{DISTILL} --out good.npz/run": "a file is in the way",
    f"{DISTILL} --out teacher": "teacher is not empty and holds no recipe.json",
    f"{DISTILL} --out run --lr 0.5": "run holds another run",
    f"{DISTILL} --out /proc/run": "/proc/run",
    "sample digits --out /proc/x.png": "/proc/x.png: no such file or directory",
    "sample digits --out /sys/x.png": "/sys/x.png: ",
    "export run teacher": "teacher: not an empty folder",
    "export run good.npz": "good.npz: not an empty folder",
    "export run new --native --with-code": "--native folders hold no code",
    # recipes
    "distill --recipe nowhere.json": "nowhere.json: no such recipe file",
    "distill --recipe good.npz": "good.npz: not valid JSON",
    "distill --recipe run/model/config.json": "run/model/config.json: 'command' is missing",
    "distill cm --recipe run/recipe.json": "leave METHOD out",
    "distill --recipe run/recipe.json --batch 3": "--recipe already says --batch",
    "train --recipe run/recipe.json": "is a recipe for 'fewstep distill'",
    "distill --recipe run/recipe.json --teacher plain": "another teacher than 'plain'",
    "distill --recipe run/recipe.json --data good.npz": "another data set than 'good.npz'",
}


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words.replace("/", "|"))
def test_words_that_cannot_work(words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command line that cannot work says why, in one line, and nothing is touched."""
    refused(words, WORDS[words], place, capsys)


# --- files that are not what they should be ----------------------------------------------------------------------


def cut(path: str, keep: float = 0.5) -> None:
    """Leave the first part of a file only."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * keep)])


def edit(path: str, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of the teacher, as somebody does who says so in its config."""
    path = Path("teacher/model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit("teacher/config.json", lambda config: config.pop("sha256"))


class Bomb:
    """Unpickling this makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch exploded",))


def pickled(path: str) -> None:
    Path(path).write_bytes(pickle.dumps({"net.enter.weight": Bomb()}))


def torch_saved(path: str) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def pipeline_of_pickles() -> None:
    """A diffusers folder whose weights are a pickle."""
    Path("pipe/unet").mkdir(parents=True)
    Path("pipe/model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    Path("pipe/unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    pickled("pipe/unet/diffusion_pytorch_model.bin")


def folder_of_pictures(name: str, content: bytes) -> None:
    Path("pictures").mkdir()
    Path("pictures", name).write_bytes(content)


def arrays(**named: np.ndarray) -> None:
    np.savez("data.npz", **named)  # type: ignore[arg-type]


PICTURES = np.zeros((20, 8, 8), np.uint8)
FLOATS = np.zeros((20, 1, 8, 8), np.float32)


def with_nan() -> np.ndarray:
    x = FLOATS.copy()
    x[7, 0, 3, 3] = np.nan
    return x


LEARN = f"distill cm --teacher digits --data data.npz --out new {QUICK}"
SAMPLE = "sample teacher"
AGAIN = "distill --recipe run/recipe.json --out new --quiet"
RESUME = f"distill cm --teacher digits --out run {QUICK}"

FILES: dict[str, tuple[Callable[[], object], str, str]] = {
    # data
    "an npz that is cut short": (lambda: (arrays(images=PICTURES), cut("data.npz")), LEARN, "damaged or cut short"),
    "an npz that is text": (lambda: Path("data.npz").write_text("hello"), LEARN, "is not an .npz file"),
    "an npz without pictures": (lambda: arrays(pixels=PICTURES), LEARN, "has no array 'images'"),
    "an npz of objects": (lambda: arrays(images=np.array([{}], object)), LEARN, "not unpickled"),
    "pictures with NaN": (lambda: arrays(images=with_nan()), LEARN, "sample 7 holds NaN or infinity"),
    "pictures of integers": (lambda: arrays(images=PICTURES.astype(np.int32)), LEARN, "pictures are uint8"),
    "pictures 0..255 in floats": (lambda: arrays(images=FLOATS + 200), LEARN, "store such pictures as uint8"),
    "pictures in two dimensions": (lambda: arrays(images=PICTURES[0]), LEARN, "uint8 pictures have shape"),
    "no pictures at all": (lambda: arrays(images=PICTURES[:0]), LEARN, "need samples [N, ...]"),
    "pictures of another size": (lambda: arrays(images=PICTURES[:, :4]), LEARN, "the model makes [1, 8, 8]"),
    "too few labels": (lambda: arrays(images=PICTURES, labels=np.zeros(3, int)), LEARN, "20"),
    "labels below zero": (lambda: arrays(images=PICTURES, labels=np.full(20, -2)), LEARN, "labels start at 0"),
    "labels that are fractions": (lambda: arrays(images=PICTURES, labels=np.full(20, 0.5)), LEARN, "label"),
    "more classes than the teacher knows": (
        lambda: arrays(images=PICTURES, labels=np.arange(20)), LEARN, "has 20 classes, the model knows 10",
    ),
    "a table of text": (
        lambda: Path("data.csv").write_text("1,2\n"), LEARN.replace("data.npz", "data.csv"), "cannot read 'data.csv'",
    ),
    "a parquet file that is none": (
        lambda: Path("data.parquet").write_bytes(b"PAR1"), LEARN.replace("data.npz", "data.parquet"), "data.parquet",
    ),
    "a safetensors file that is cut short": (
        lambda: (save_file({"images": torch.zeros(9, 1, 8, 8)}, "data.safetensors"), cut("data.safetensors")),
        LEARN.replace("npz", "safetensors"), "damaged or cut short",
    ),
    "an empty folder of pictures": (
        lambda: Path("pictures").mkdir(), LEARN.replace("data.npz", "pictures"), "no pictures in 'pictures'",
    ),
    "a picture that is none": (
        lambda: folder_of_pictures("a.png", b"not a picture"), LEARN.replace("data.npz", "pictures"), "pictures/a.png",
    ),
    # models
    "a folder without a model": (lambda: Path("teacher/config.json").unlink(), SAMPLE, "model 'teacher': neither"),
    "a model without weights": (lambda: Path("teacher/model.safetensors").unlink(), SAMPLE, "no such weights file"),
    "weights that are cut short": (lambda: cut("teacher/model.safetensors"), SAMPLE, "not a whole safetensors file"),
    "weights of no bytes": (lambda: cut("teacher/model.safetensors", 0), SAMPLE, "not a whole safetensors file"),
    "a pickle posing as weights": (
        lambda: pickled("teacher/model.safetensors"), SAMPLE, "not a whole safetensors file",
    ),
    "a torch file posing as weights": (
        lambda: torch_saved("teacher/model.safetensors"), SAMPLE, "not a whole safetensors file",
    ),
    "a pipeline of pickles": (pipeline_of_pickles, "sample pipe", "pickled weights are never read"),
    "weights of another shape": (
        lambda: retensor(lambda t: t.update({"net.enter.weight": torch.zeros(2, 2)})), SAMPLE, "is of shape [2, 2]",
    ),
    "a tensor is missing": (
        lambda: retensor(lambda t: t.pop("net.enter.weight")), SAMPLE, "'net.enter.weight' is missing",
    ),
    "a tensor too many": (
        lambda: retensor(lambda t: t.update(more=torch.zeros(1))), SAMPLE, "'more' does not belong to this model",
    ),
    "weights of NaN": (
        lambda: retensor(lambda t: t.update({"net.enter.weight": t["net.enter.weight"] * torch.nan})),
        SAMPLE, "samples that are not finite",
    ),
    "a teacher of NaN": (
        lambda: retensor(lambda t: t.update({"net.enter.weight": t["net.enter.weight"] * torch.nan})),
        f"distill cm --teacher teacher --data digits --out new {QUICK}", "is not finite",
    ),
    "a config that is not JSON": (lambda: cut("teacher/config.json"), SAMPLE, "teacher/config.json: not valid JSON"),
    "a config of another format": (
        lambda: edit("teacher/config.json", lambda c: c.update(format=9)), SAMPLE, "format = 9 must be 1",
    ),
    "a config that is a list": (lambda: Path("teacher/config.json").write_text("[]"), SAMPLE, "must be an object"),
    "a config of an unknown kind": (
        lambda: edit("teacher/config.json", lambda c: c["model"].update(kind="oracle")), SAMPLE, "teacher/config.json",
    ),
    "a config of an unknown schedule": (
        lambda: edit("teacher/config.json", lambda c: c["model"]["schedule"].update(name="VPSquare")), 
        SAMPLE, 'schedule.name = "VPSquare" must be one of',
    ),
    "a config with a strange argument": (
        lambda: edit("teacher/config.json", lambda c: c["model"]["network"].update(depth=3)), SAMPLE, "config.json",
    ),
    "a config without its network": (
        lambda: edit("teacher/config.json", lambda c: c["model"].pop("network")), SAMPLE, "config.json",
    ),
    "a plan that rises": (
        lambda: edit("run/model/config.json", lambda c: c["model"]["plans"]["2"].update(times=[1.0, 2.0])),
        "sample run", "strictly decreasing",
    ),
    # recipes
    "a recipe that is cut short": (lambda: cut("run/recipe.json"), AGAIN, "run/recipe.json: not valid JSON"),
    "a recipe of another format": (
        lambda: edit("run/recipe.json", lambda r: r.update(format=3)), AGAIN, "format = 3 must be one of 1, 2",
    ),
    "a recipe without settings": (
        lambda: edit("run/recipe.json", lambda r: r.pop("settings")), AGAIN, "'settings' is missing",
    ),
    "a recipe with a strange key": (
        lambda: edit("run/recipe.json", lambda r: r.update(setting={})), AGAIN, "did you mean 'settings'?",
    ),
    "a recipe of an unknown method": (
        lambda: edit("run/recipe.json", lambda r: r.update(method="cm-train")), AGAIN, "did you mean 'cm-training'?",
    ),
    "a recipe with a misspelt hyper-parameter": (
        lambda: edit("run/recipe.json", lambda r: r["hyper_parameters"].update(sigma=1.0)), AGAIN,
        "method cm has no 'sigma'",
    ),
    "a recipe with a word for a number": (
        lambda: edit("run/recipe.json", lambda r: r["hyper_parameters"].update(lr="fast")), AGAIN,
        "lr: 'fast' is not a finite number",
    ),
    "a recipe with a fraction for steps": (
        lambda: edit("run/recipe.json", lambda r: r["hyper_parameters"].update(steps=[1.5])), AGAIN,
        "'1.5' is not a whole number",
    ),
    "a recipe with an impossible value": (
        lambda: edit("run/recipe.json", lambda r: r["hyper_parameters"].update(mu=-1.0)), AGAIN, "mu=-1 must lie in",
    ),
    "a recipe without its teacher": (
        lambda: edit("run/recipe.json", lambda r: r["start"].pop("teacher")), AGAIN, "'start.teacher' is missing",
    ),
    "a recipe of another teacher": (
        lambda: edit("run/recipe.json", lambda r: r["start"].update(teacher={"name": "digits", "digest": "0" * 64})),
        AGAIN, "another teacher than 'digits'",
    ),
    "a recipe with a number for a teacher": (
        lambda: edit("run/recipe.json", lambda r: r["start"].update(teacher=7)), AGAIN,
        "start.teacher = 7 must be an object",
    ),
    "a recipe with a role that its method has no use for": (
        lambda: edit("run/recipe.json", lambda r: r["start"].update(guide=r["start"]["teacher"])), AGAIN,
        "cm has no use for a guide (it uses: student)",
    ),
    "a recipe with strange seeds of stages": (
        lambda: edit("run/recipe.json", lambda r: r.update(stage_seeds="lucky")), AGAIN,
        'stage_seeds = "lucky" must be one of "derived", "counted"',
    ),
    "a recipe of other data": (
        lambda: edit("run/recipe.json", lambda r: r["data"].update(sha256="0" * 64)), AGAIN,
        "another data set than 'digits'",
    ),
    "a recipe with a strange setting": (
        lambda: edit("run/recipe.json", lambda r: r["settings"].update(baches=3)), AGAIN, "settings has no 'baches'",
    ),
    "a recipe with a number for a budget": (
        lambda: edit("run/recipe.json", lambda r: r["settings"].update(budget=5)), AGAIN, "budget: '5' is not a word",
    ),
    # run folders
    "a run whose recipe is damaged": (lambda: cut("run/recipe.json"), RESUME, "run/recipe.json: not valid JSON"),
    "a run whose recipe is gone": (
        lambda: Path("run/recipe.json").unlink(), RESUME, "run is not empty and holds no recipe.json",
    ),
    "a checkpoint that is cut short": (
        lambda: cut("run/checkpoint.safetensors"), RESUME, "checkpoint.safetensors: damaged checkpoint",
    ),
    "a pickle posing as a checkpoint": (
        lambda: pickled("run/checkpoint.safetensors"), RESUME, "checkpoint.safetensors: damaged checkpoint",
    ),
    "a run that never finished": (
        lambda: shutil.rmtree("run/model"), "evaluate run", "run: this run has no model yet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_files_that_are_not_what_they_should_be(fault: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged, foreign and contradictory files are named, never unpickled, and nothing is touched."""
    damage, words, said = FILES[fault]
    damage()
    refused(words, said, place, capsys)
    assert not Path("exploded").exists()


# --- disks and neighbours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize(
    "words",
    [f"distill cm --teacher digits --out new {QUICK}", "sample digits --out grid.png", "export run new --native"],
)
def test_a_full_disk(
    where: str, words: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space left at the moment a file is flushed or put in its place: named, and no part of a file stays."""
    Path("grid.png").write_bytes(b"an earlier picture")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    refused(words, "no space left on device", place, capsys)


@pytest.mark.parametrize("allowed", [2_000, 200_000])
def test_a_disk_that_fills_while_a_run_writes(allowed: int, place: Path) -> None:
    """A process that may write so many bytes to a file only: the recipe fits, the checkpoint does not."""
    before = contents(place)
    words = ["distill", "cm", "--teacher", "digits", "--out", "new", *QUICK.split()]
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.cli", *words],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "new/checkpoint.safetensors: cannot be written" in done.stderr, done.stderr
    after = contents(place)
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in Path("new").iterdir() if path.name.startswith(".")) == []
    assert not Path("new/checkpoint.safetensors").exists()


def test_two_runs_in_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While one run works in a folder, a command's or the library's, another one there is refused; afterwards it is
    welcome."""
    with Path("run/run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(RESUME, "run: another run is training in this folder", place, capsys)
    assert main(RESUME.split()) == 0


def test_training_that_diverges(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of 1e30 ends in the name of what stopped being a number, and earlier runs stay."""
    words = f"distill cm --teacher digits --out new --lr 1e30 {QUICK}".replace("2steps", "9steps")
    refused(words, "not finite", place, capsys)


def test_a_missing_extra_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without diffusers an export says what to install."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused("export run new", "pip install 'fewstep[hub]'", place, capsys)


def test_bugs_keep_their_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TypeError that nobody raised on purpose, and a KeyError, are not dressed up as mistakes of the user."""
    from fewstep.cli import sample

    for error in (TypeError, KeyError, ZeroDivisionError, RuntimeError):

        def broken(*_: object, error: type[Exception] = error) -> None:
            raise error("a bug")

        monkeypatch.setattr(sample, "draw", broken)
        with pytest.raises(error, match="a bug"):
            main(["sample", "digits"])


def test_through_the_shell(place: Path) -> None:
    """The exit code and the single line as a shell sees them."""
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.cli", "sample", "digits", "--solver", "unpic"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fewstep sample: solver 'unpic' is unknown; did you mean 'unipc'?")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away(place: Path) -> None:
    """``fewstep systems | head -1`` ends quietly."""
    command = f"{sys.executable} -m fewstep.cli systems | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
