"""What commands do with finished models: sample, evaluate, report, export; and the catalogue, the doctor, the demo."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep import api, demo, doctor
from fewstep.catalogue import systems
from fewstep.data import load as load_data
from fewstep.files import load_tensors
from fewstep.hub import native
from fewstep.metrics import evaluate, load_features
from fewstep.report.comparison import timed_samples
from fewstep.report.pictures import sheet

Cli = Callable[..., Any]

SHORT = ("--budget", "2steps", "--batch", "8", "--precision", "fp32", "--quiet")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    from fewstep.cli import main

    out = tmp_path_factory.mktemp("runs") / "cm-digits"
    words = f"distill cm --teacher digits --budget 8steps --batch 16 --quiet --precision fp32 --out {out}"
    assert main(words.split()) == 0
    return out


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose chunks are whole."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position = 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        chunk = data[position + 4 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(chunk)
        position += 12 + length
    width, height = struct.unpack(">II", data[16:24])
    return width, height


# --- sample ------------------------------------------------------------------------------------------------------


def test_sample_saves_what_the_library_samples(cli: Cli) -> None:
    """The numbers in the file are those of ``fs.sample`` with the same solver, steps, labels and seed."""
    cli("sample", "digits", "--solver", "heun", "--steps", "3", "--n", "5", "--class", "3,7", "--guidance", "2",
        "--seed", "9", "--grid", "karras", "--out", "x.npz")  # fmt: skip
    labels = torch.tensor([3, 7, 3, 7, 3])
    expected = fs.sample(fs.load("digits"), 5, solver="heun", steps=3, grid="karras", cond=labels, seed=9, guidance=2.0)
    assert np.array_equal(np.load("x.npz")["samples"], expected.numpy())


def test_sample_takes_a_seed_a_sample(cli: Cli) -> None:
    """As many samples as seeds, each the library's; what is no list of numbers is answered before the work."""
    cli("sample", "digits", "--solver", "ddpm", "--steps", "3", "--class", "3", "--seeds", "5,7", "--out", "x.npz")
    labels = torch.tensor([3, 3])
    expected = fs.sample(fs.load("digits"), 2, solver="ddpm", steps=3, cond=labels, seeds=[5, 7])
    assert np.array_equal(np.load("x.npz")["samples"], expected.numpy())
    done = cli("sample", "digits", "--seeds", "5,x", code=2)
    assert "--seeds 5,x: give one whole number a sample" in done.err
    done = cli("sample", "digits", "--seeds", "5,7", "--seed", "1", code=2)
    assert "seed=1 stands beside seeds" in done.err


def test_sample_with_adaptive_steps(cli: Cli) -> None:
    """The steps and calls that were made are told; a number of steps is refused."""
    done = cli("sample", "digits", "--n", "2", "--solver", "dpm-23:rtol=0.2")
    steps, calls = (int(word) for word in re.findall(r"(\d+) (?:steps|network calls)", done.out))
    assert 1 < steps < calls  # refused steps cost calls too
    done = cli("sample", "digits", "--n", "2", "--solver", "dpm-12", "--steps", "5", code=2)
    assert "steps=5: DPM-Solver-12 finds its own" in done.err


def test_sample_draws_a_sheet_and_tells_the_cost(cli: Cli) -> None:
    """The PNG is the sheet of these samples; Heun's two calls a step and guidance's doubling are counted."""
    done = cli("sample", "digits", "--n", "12", "--columns", "4", "--steps", "3")
    expected = sheet(fs.sample(fs.load("digits"), 12, steps=3), 4, side=56)
    assert Path("digits.png").read_bytes() == expected
    width, height = png_size(Path("digits.png"))
    assert width > height  # four columns, three rows
    assert "12 samples: 3 steps, 3 network calls each" in done.out
    done = cli("sample", "digits", "--n", "2", "--steps", "3", "--solver", "heun", "--grid", "uniform")
    assert "3 steps, 5 network calls" in done.out
    done = cli("sample", "digits", "--n", "2", "--steps", "3", "--guidance", "1.5")
    assert "3 steps, 6 network calls" in done.out


def test_sample_takes_a_student_and_its_plans(cli: Cli, run_folder: Path) -> None:
    """A run folder is its student, sampled in the fewest steps unless others of its plans are asked for."""
    student = fs.load(run_folder)
    done = cli("sample", run_folder, "--n", "4", "--seed", "2", "--out", "x.npz")
    assert "1 step, 1 network call each" in done.out
    assert np.array_equal(np.load("x.npz")["samples"], student.sample(4, seed=2).numpy())
    cli("sample", run_folder, "--n", "4", "--steps", "4", "--class", "1", "--out", "y.npz")
    expected = student.sample(4, torch.ones(4, dtype=torch.long), steps=4)
    assert np.array_equal(np.load("y.npz")["samples"], expected.numpy())
    cli("sample", run_folder, "--n", "4")
    png_size(Path("cm-digits.png"))


def test_sample_shows_small_pictures_in_the_terminal(cli: Cli) -> None:
    """Half blocks, two rows of pixels a line: eight rows of digits are four lines; not when stdout is a file."""
    done = cli("sample", "digits", "--n", "3", "--steps", "1", "--preview")
    blocks = [line for line in done.out.splitlines() if "▀" in line]
    assert len(blocks) == 4 and all(line.count("▀") == 3 * 8 for line in blocks)
    assert "▀" not in cli("sample", "digits", "--n", "3", "--steps", "1").out


def test_sample_lists_its_names(cli: Cli) -> None:
    """Every solver and grid that the library knows."""
    from fewstep.grids import GRIDS
    from fewstep.sampling import SOLVERS

    out = cli("sample", "--list").out
    assert all(name in out for name in (*SOLVERS, *GRIDS))


def test_samples_that_are_not_pictures_are_kept_as_numbers(cli: Cli) -> None:
    """A model of points writes .npz, and says so when asked for a PNG."""
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.networks import MLP
    from fewstep.predictions import V
    from fewstep.schedules import FlowMatching

    native.save(NetworkDenoiser(MLP((2,), 8, 1), FlowMatching(), V(), (2,)), "points")
    cli("sample", "points", "--n", "7", "--out", "x.npz")
    assert np.load("x.npz")["samples"].shape == (7, 2)
    assert "not pictures" in cli("sample", "points", code=2).err


# --- evaluate, report, export ------------------------------------------------------------------------------------


def test_evaluate_measures_student_and_teacher(cli: Cli, run_folder: Path) -> None:
    """Without further flags: all plans of the student beside its teacher, with the metrics' own figures."""
    done = cli("evaluate", run_folder, "--n", "60", "--json", "figures.json")
    told = json.loads(Path("figures.json").read_text())
    assert [(row["model"], row["steps"]) for row in told["rows"]] == [
        ("digits", 1), ("digits", 2), ("digits", 4), ("digits", 16),
        ("cm-digits", 1), ("cm-digits", 2), ("cm-digits", 4),
    ]  # fmt: skip
    assert told["data"] == "digits"
    x, labels, calls, _ = timed_samples(fs.load(run_folder), 2, 60, 0, "unipc", 100)
    quality = evaluate(x, labels, load_data("digits", "test"), load_data("digits"), load_features("digits"))
    row = told["rows"][5]
    assert row["calls"] == calls == 2
    assert row["quality"] == json.loads(quality.to_json())
    assert f"{quality.frechet.value:.2f} ± {quality.frechet.error:.2f}" in done.out


def test_evaluate_takes_chosen_steps_and_no_teacher(cli: Cli, run_folder: Path) -> None:
    """``--steps`` picks plans, or steps of a teacher; ``--teacher none`` leaves the teacher out."""
    cli("evaluate", run_folder, "--n", "40", "--steps", "4", "1", "--teacher", "none", "--json", "a.json")
    assert [row["steps"] for row in json.loads(Path("a.json").read_text())["rows"]] == [1, 4]
    other = ("--solver", "ddim", "--features", "pixels", "--json", "b.json")
    cli("evaluate", "digits", "--n", "40", "--steps", "3", *other)
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert [(row["model"], row["steps"], row["calls"]) for row in rows] == [("digits", 3, 3)]
    assert rows[0]["quality"]["features"] == "pixels"


def test_evaluate_does_without_a_teacher_that_changed(cli: Cli) -> None:
    """A teacher that is gone, or has other weights, is left out with a word."""
    native.save(api.load("digits"), "teacher")
    cli("distill", "cm", "--teacher", "teacher", "--data", "digits", "--out", "run", *SHORT)
    model = api.load("digits")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    native.save(model, "teacher")
    done = cli("evaluate", "run", "--n", "30", "--steps", "1")
    assert "'teacher' has other weights than when it taught" in done.out
    shutil.rmtree("teacher")
    done = cli("evaluate", "run", "--n", "30", "--steps", "1")
    assert "without its teacher's figures" in done.out and "digits" in done.out


def test_evaluate_puts_a_reference_aside(cli: Cli) -> None:
    """Data without a held-out part are measured against a fifth of themselves, and that is said."""
    data = load_data("digits")
    np.savez("mine.npz", images=data.x.numpy(), labels=data.labels)
    done = cli("evaluate", "digits", "--data", "mine.npz", "--n", "30", "--steps", "1")
    assert "no held-out part" in done.out


def test_report_writes_one_page(cli: Cli, run_folder: Path) -> None:
    """Two runs, one page that needs nothing else."""
    cli("distill", "dmd2", "--teacher", "digits", "--budget", "4steps", "--batch", "16", "--log-steps", "1", "--quiet")
    done = cli("report", run_folder, "runs/dmd2-digits", "--n", "60", "--out", "page.html")
    page = Path("page.html").read_text()
    assert "page.html" in done.out
    assert "cm-digits" in page and "dmd2-digits" in page and "<html" in page


def test_export_writes_what_diffusers_opens(cli: Cli, run_folder: Path) -> None:
    """The exported folder opens in plain diffusers; the folder must be new."""
    import diffusers

    done = cli("export", run_folder, "out")
    assert "out: a " in done.out and "1, 2, 4 steps" in done.out
    pipe = diffusers.DiffusionPipeline.from_pretrained("out", trust_remote_code=True)
    assert sum(p.numel() for p in pipe.unet.parameters()) > 0
    assert "not an empty folder" in cli("export", run_folder, "out", code=2).err


def test_export_native_keeps_model_and_card(cli: Cli, run_folder: Path) -> None:
    """The copy has the same weights and says how it was made."""
    cli("export", run_folder, "out", "--native")
    assert (Path("out") / "model.safetensors").read_bytes() == (run_folder / "model" / "model.safetensors").read_bytes()
    assert native.card("out") == native.card(run_folder / "model")
    assert "not an empty folder" in cli("export", run_folder, "out", "--native", code=2).err


def test_a_diffusers_pipeline_goes_all_the_way(cli: Cli) -> None:
    """Sampled, distilled, sampled again, exported: in as a plain pipeline, out as a plain pipeline; and the student
    does not need the pipeline that taught it."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, **blocks,
    )  # fmt: skip
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained("pipe")
    cli("sample", "pipe", "--n", "3", "--steps", "2", "--out", "x.npz")
    expected = fs.sample(fs.load("pipe"), 3, steps=2)
    assert np.array_equal(np.load("x.npz")["samples"], expected.numpy())
    cli("distill", "dmd2", "--teacher", "pipe", "--data", "digits", "--out", "run", *SHORT)
    cli("sample", "run", "--n", "3", "--out", "before.npz")
    cli("evaluate", "run", "--n", "20", "--json", "figures.json")
    assert [row["model"] for row in json.loads(Path("figures.json").read_text())["rows"]] == ["pipe", "pipe", "run"]
    assert "a DDIMPipeline with DDIMScheduler" in cli("export", "run", "out").out
    opened = diffusers.DiffusionPipeline.from_pretrained("out")
    weights = load_tensors(Path("run/model/model.safetensors"))
    for name, weight in opened.unet.state_dict().items():
        assert torch.equal(weight, weights[f"flow_map.denoiser.net.model.{name}"])
    shutil.rmtree("pipe")
    cli("sample", "run", "--n", "3", "--out", "after.npz")
    assert np.array_equal(np.load("before.npz")["samples"], np.load("after.npz")["samples"])
    assert "has no text encoder" in cli("sample", "out", "--prompt", "a boat", code=2).err


# --- systems, doctor, demo ---------------------------------------------------------------------------------------


def test_systems_prints_the_catalogue(cli: Cli) -> None:
    """One row for every system."""
    out = cli("systems").out
    assert all(system.key in out for system in systems())


def test_the_doctor_finds_this_installation_well(cli: Cli) -> None:
    """Versions, a device with its measured precision, and every bundled file intact."""
    out = cli("doctor").out
    assert f"PyTorch{32 * ' '}{torch.__version__}" in out
    assert "precision auto is" in " ".join(out.split())
    for name in ("digits.npz", "fashion.npz", "classifier-digits.safetensors", "models/digits/model.safetensors"):
        assert f"ok    {name:<39}intact" in out


def test_the_doctor_knows_every_bundled_file() -> None:
    """No data, text, classifier or model is bundled without a checksum."""
    assets = doctor.ASSETS
    texts = [path for path in assets.glob("*.txt") if not path.name.startswith("LICENCE")]
    files = [*assets.glob("*.npz"), *texts, *assets.rglob("*.safetensors")]
    assert set(doctor.checksums(assets)) == {str(path.relative_to(assets)) for path in files}


def test_the_doctor_finds_damage(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed byte and a missing file are bad, and the command ends in exit code 1."""
    folder = tmp_path / "assets"
    shutil.copytree(doctor.ASSETS, folder)
    data = bytearray((folder / "digits.npz").read_bytes())
    data[100] ^= 1
    (folder / "digits.npz").write_bytes(data)
    (folder / "classifier-fashion.safetensors").unlink()
    states = {finding.what: finding.state for finding in doctor.assets(folder)}
    assert states["digits.npz"] == states["classifier-fashion.safetensors"] == "bad"
    assert states["fashion.npz"] == states["models/digits/model.safetensors"] == "ok"
    monkeypatch.setattr(doctor, "ASSETS", folder)
    out = cli("doctor", code=1).out
    assert "bad   digits.npz" in out and "install fewstep again" in out


def test_the_doctor_names_a_torchvision_that_breaks_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision for another PyTorch fails when it is imported; what to do is said."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = doctor.torchvision()
    assert found.state == "bad"
    assert "operator torchvision::nms does not exist" in found.text and "pip uninstall torchvision" in found.text


@pytest.mark.parametrize(
    ("version", "state"), [("2.10.1", "bad"), ("2.9", "bad"), ("2.11.0", "ok"), ("3.0", "ok"), ("2.13.0+cpu", "ok")]
)
def test_the_doctor_reads_versions(version: str, state: str) -> None:
    """2.9 is older than 2.11, whatever the letters say."""
    assert doctor.at_least("PyTorch", version, (2, 11)).state == state


def test_demo_hands_on_its_flags(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page, the minutes and the folder of the runs reach the demonstration."""
    called: list[tuple[object, ...]] = []
    monkeypatch.setattr(demo, "main", lambda *given: called.append(given))
    cli("demo", "--minutes", "0.5", "--out", "page.html", "--runs", "here")
    assert called == [(Path("page.html"), 0.5, Path("here"))]
    assert "must be positive" in cli("demo", "--minutes", "-1", code=2).err
