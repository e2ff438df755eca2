"""The page and the demonstration on the bundled digits, with runs of seconds."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep import api, demo
from fewstep.cli import main as command_line
from fewstep.cli import methods
from fewstep.cli.errors import UserError
from fewstep.data import load as load_data
from fewstep.report import compare_models, read_run, report_runs
from fewstep.report.runs import read_note
from fewstep.runs import record as records
from fewstep.training.interruptions import only_run_in


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demonstration on digits: half a second of training for each student, 100 samples."""
    folder = tmp_path_factory.mktemp("demo")
    demo.main(folder / "report.html", 0.03, folder / "runs", teacher="digits", data="digits", samples=100)
    return folder


def test_demo_leaves_runs_and_a_page(shown: Path) -> None:
    """Every student of the table has a finished run and stands on the page with its pictures, beside the teacher."""
    text = (shown / "report.html").read_text()
    for entry in demo.STUDENTS:
        run = read_run(shown / "runs" / entry.name)
        assert run.seconds > 0 and run.note is not None and run.recipe == entry.recipe.name
        assert f'alt="20 pictures: {entry.name}, ' in text
    numbers = json.loads(text.split('id="numbers">')[1].split("</script>")[0])
    teacher = [row for row in numbers["rows"] if row["role"] == "teacher"]
    assert [row["calls"] for row in teacher] == list(demo.TEACHER_STEPS)
    # the bundled teacher: far from the data in one call, nearly everything recognised in all of them
    assert teacher[0]["quality"]["frechet"]["value"] > 2 * teacher[-1]["quality"]["frechet"]["value"]
    assert teacher[-1]["accuracy"]["value"] > 0.9


def test_pages_pictures_are_the_samples(shown: Path) -> None:
    """The inline PNGs decode, and the one of the real pictures shows held-out digits in the order of the classes."""
    text = (shown / "report.html").read_text()
    files = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert len(files) > 8
    decoded = {alt: Image.open(io.BytesIO(base64.b64decode(file))).convert("LA") for file, alt in files}
    (real,) = (picture for alt, picture in decoded.items() if "real pictures" in alt)
    held_out = load_data("digits", "test")
    step = 112 + 7  # pixels of a picture, 14 for each of its own, and of the gap
    assert real.size == (10 * step - 7, 2 * step - 7)
    for c in range(10):
        corner = real.getchannel("L").crop((c * step, 0, c * step + 112, 112)).resize((8, 8), Image.Resampling.NEAREST)
        levels = torch.tensor(list(corner.tobytes())).reshape(1, 8, 8)
        found = (held_out.x == levels).flatten(1).all(1).nonzero()[:, 0]
        assert held_out.labels is not None and len(found) and c in held_out.labels[found].tolist()


def test_demo_goes_on_where_it_stopped(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call trains nothing again; a longer one goes on from the steps that are there, and leaves the student
    that another one started from as it is."""
    first, second = demo.STUDENTS[:2]
    assert second.start == first.name
    monkeypatch.setattr(demo, "STUDENTS", (first, second))
    place, weights = shown / "runs" / second.name, Path("model", "model.safetensors")
    began = records.read(place / "recipe.json").start["student"]
    assert began["name"] == str(shown / "runs" / first.name)
    of_first, of_second = ((shown / "runs" / entry.name / weights).read_bytes() for entry in (first, second))
    before = read_run(place).stages[0]
    assert before.records
    for minutes, longer in ((0.03, False), (0.06, True)):
        demo.main(shown / "again.html", minutes, shown / "runs", teacher="digits", data="digits", samples=50)
        after = read_run(place).stages[0]
        assert after.steps > before.steps if longer else after.steps == before.steps
        assert (of_second == (place / weights).read_bytes()) == (not longer)
        assert of_first == (shown / "runs" / first.name / weights).read_bytes()
        assert [dict(r) for r in after.records[: len(before.records)]] == [dict(r) for r in before.records]


def test_what_a_process_cannot_do_is_said_in_one_line(
    shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that holds another run ends the demonstration with the words of the process that found it."""
    (entry,) = (entry for entry in demo.STUDENTS if entry.name == "scm")
    monkeypatch.setattr(demo, "STUDENTS", (dataclasses.replace(entry, batch=32),))
    with pytest.raises(UserError, match="scm holds another run: --batch"):
        demo.main(tmp_path / "p.html", 0.03, shown / "runs", teacher="digits", data="digits", samples=20)


def test_a_stopped_demo_stops_its_processes(tmp_path: Path) -> None:
    """SIGTERM while two students train: one line, the shell's exit code, and runs that go on."""
    command = [sys.executable, "-m", "fewstep.cli", "demo", "--runs", "runs", "--out", "page.html"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    logs = (tmp_path / "runs" / "scm" / "log.jsonl", tmp_path / "runs" / "pd" / "stage-0-pd-halving" / "log.jsonl")
    until = time.monotonic() + 120
    while not all(log.is_file() and log.stat().st_size for log in logs):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "fewstep demo: stopped" and "Traceback" not in told
    for log in logs:
        assert (log.parent / "checkpoint.safetensors").is_file()
    for name in ("scm", "pd"):
        with only_run_in(tmp_path / "runs" / name):  # nobody holds it any more
            pass


def test_demo_refuses_no_time() -> None:
    """Minutes must be positive."""
    with pytest.raises(ValueError, match="minutes=0"):
        demo.main(minutes=0)


def test_demo_recipes_run_again(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe that the demonstration leaves is one that the command line takes."""
    for entry in demo.STUDENTS:
        note = read_note(shown / "runs" / entry.name)
        assert note is not None and note.teacher == note.data == "digits"
        record = records.read(shown / "runs" / entry.name / "recipe.json")
        assert methods.build(record.method, record.hyper_parameters) == entry.recipe
        assert record.settings["batch"] == entry.batch
        file = shown / "runs" / entry.name / "recipe.json"
        assert command_line(["distill", "--recipe", str(file), "--dry-run"]) == 0
    assert "progressive" in capsys.readouterr().out.lower()


def test_report_of_run_folders(shown: Path, tmp_path: Path) -> None:
    """One page of several runs finds teacher and data in their recipes; an unfinished run is named, not shown."""
    (tmp_path / "unfinished").mkdir()
    folders = [shown / "runs" / "pd", shown / "runs" / "scm", tmp_path / "unfinished"]
    out = report_runs(folders, tmp_path / "r.html", n=60)
    text = out.read_text()
    numbers = json.loads(text.split('id="numbers">')[1].split("</script>")[0])
    assert {row["model"] for row in numbers["rows"]} == {"teacher", "pd", "scm"} and numbers["data"] == "digits"
    assert f"Left out: {tmp_path / 'unfinished'}" in text
    assert "2 pd-halving: student/loss" in text and "fewstep report" in text


def test_runs_of_one_name_are_told_apart(shown: Path, tmp_path: Path) -> None:
    """Two runs in folders of the same name are two students."""
    shutil.copytree(shown / "runs" / "scm", tmp_path / "scm")
    text = report_runs([shown / "runs" / "scm", tmp_path / "scm"], tmp_path / "r.html", n=40).read_text()
    numbers = json.loads(text.split('id="numbers">')[1].split("</script>")[0])
    assert {row["model"] for row in numbers["rows"]} == {
        "teacher", str(shown / "runs" / "scm"), str(tmp_path / "scm")
    }  # fmt: skip


def test_compare_is_the_same_with_other_batches() -> None:
    """Quality does not depend on how sampling is split, and a student is measured at all its plans."""
    teacher = api.load("digits")
    found = [compare_models(teacher, [], "digits", 60, teacher_steps=(2,), batch=batch) for batch in (60, 13)]
    one, other = (comparison.rows[0].quality for comparison in found)
    # a float32 network sums other batches in another order
    assert one.frechet.value == pytest.approx(other.frechet.value, rel=1e-4)
    assert one.accuracy == other.accuracy
    assert found[0].real_accuracy == pytest.approx(0.998)  # the bundled classifier's card
