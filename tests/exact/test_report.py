"""Reports: pictures as PNG, plots as SVG, courses of runs, comparisons, and the page."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from fewstep.cli import distill as distill_command
from fewstep.cli import methods
from fewstep.cli.flags import given
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser
from fewstep.exact import Gaussian
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveLadder
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Recipe
from fewstep.metrics import Estimate, Pixels
from fewstep.randomness import Rng
from fewstep.report import Comparison, compare_models, page, plots, read_run, report_runs, words
from fewstep.report.collect import common
from fewstep.report.comparison import Row, parts, timed_samples
from fewstep.report.courses import with_code
from fewstep.report.pictures import sheet
from fewstep.report.runs import Note, StageCourse, method_class, read_note, signs
from fewstep.runs.record import hyper_parameters
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import TrigFlow

SHAPE = (1, 4, 4)


class Grey(Denoiser):
    """The exact denoiser of independent standard normal pixels: D = alpha x / (alpha^2 + sigma^2)."""

    def __init__(self, classes: int | None = None) -> None:
        super().__init__(TrigFlow(sigma_data=1.0), SHAPE, classes)

    def forward(self, x, t, cond=None):
        time = torch.as_tensor(t, dtype=torch.float64)
        return self.schedule.alpha(time).to(x).reshape(-1, 1, 1, 1) * x


def pictures(n: int, labels: bool = True) -> Dataset:
    x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)
    return Dataset("noise", x, torch.arange(n) % 3 if labels else None, ("a<b", "b", "c") if labels else ())


@pytest.fixture(scope="module")
def compared() -> Comparison:
    teacher = Grey(3)
    top = teacher.schedule.t_max
    student = Student(Jump(Grey(3)), {1: Plan((top,)), 2: Plan((top, 0.7), gamma=0.0)})
    return compare_models(
        teacher, {"my <student>": student}, pictures(200), 40, teacher_steps=(1, 2, 4), features=Pixels(), batch=16
    )


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_is_the_pictures_enlarged(channels: int) -> None:
    """Every picture lies at its place, each pixel enlarged by one whole factor; what is between is transparent."""
    x = torch.randint(0, 256, (5, channels, 4, 6), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1
    found = np.asarray(Image.open(io.BytesIO(sheet(x, columns=3, side=18, gap=0.1))).convert("RGBA"))
    scale, gap = 3, 2
    assert found.shape == (2 * 4 * scale + gap, 3 * 6 * scale + 2 * gap, 4)
    seen = np.zeros(found.shape[:2], bool)
    for i in range(5):
        top, left = (i // 3) * (4 * scale + gap), (i % 3) * (6 * scale + gap)
        place = found[top : top + 4 * scale, left : left + 6 * scale]
        levels = ((x[i] + 1) * 127.5).round().numpy().astype(np.uint8).transpose(1, 2, 0)
        wanted = np.broadcast_to(levels.repeat(scale, 0).repeat(scale, 1), (*place.shape[:2], 3))
        assert (place[..., :3] == wanted).all() and (place[..., 3] == 255).all()
        seen[top : top + 4 * scale, left : left + 6 * scale] = True
    assert (found[~seen][:, 3] == 0).all()


def test_sheet_clamps_and_refuses() -> None:
    """Values beyond [-1, 1] saturate; samples that are not pictures are refused by name."""
    found = np.asarray(Image.open(io.BytesIO(sheet(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2), 1, side=2))))
    assert found[0, :, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"\[7, 2\]"):
        sheet(torch.zeros(7, 2), 1)


# --- words and plots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599, "59 min 59 s"), (5400, "1.5 h")]
)
def test_duration(seconds: float, text: str) -> None:
    """Durations read as people say them, also where rounding carries."""
    assert words.duration(seconds) == text


def test_numbers() -> None:
    """Counts as words up to nine, three significant digits, no exponent for what a page shows."""
    assert [words.calls(n) for n in (1, 4, 16)] == ["one network call", "four network calls", "16 network calls"]
    assert [words.number(v) for v in (0.0123456, 3.14159, 64.51, 12345.6)] == ["0.0123", "3.14", "64.5", "12,346"]


def test_running_mean() -> None:
    """The mean of a line is the line where the window is whole, and nothing leaves the range of the values."""
    line = [float(i) for i in range(240)]
    found = plots.running_mean(line)
    assert len(found) == 240 and found[10:-10] == pytest.approx(line[10:-10], abs=1e-9)
    assert found[0] == 5.0  # the first window holds 0 .. 10
    assert plots.running_mean([3.0, 1.0]) == [3.0, 1.0]


def series() -> list[plots.Series]:
    return [
        plots.Series("teacher", plots.INK, ((1, 30.0, 1.0), (4, 2.0, 5.0))),
        plots.Series("student", plots.student_colour(1), ((1, 3.0, math.nan),)),
    ]


def test_svg_takes_the_page_s_colours() -> None:
    """Plots are well-formed SVG, without sizes, placeholders, styles of their own or references to other files."""
    for drawing in (
        plots.against_calls(series(), "a < b", 0.5, "floor"),
        plots.course([0, 1, 2, 3], [1.0, math.nan, 100.0, 2.0], plots.INK),
    ):
        root = ElementTree.fromstring(drawing)
        assert root.tag.endswith("svg") and "viewBox" in root.attrib and "width" not in root.attrib
        assert "var(--ink)" in drawing and not re.search(r"#0[0-9a]0", drawing)
        assert "<style" not in drawing and "<metadata" not in drawing
        links = re.findall(r'(?:href|src)="([^"]*)"', drawing)
        assert all(link.startswith("#") for link in links)


def test_svg_shows_every_point() -> None:
    """An error bar that would reach below 0 on a logarithmic axis is cut short: nothing leaves the drawing, and the
    axis still spans the values, 2 to 30, and the nine tenths that a bar may go down."""
    drawing = plots.against_calls(series(), "t")
    _, _, width, height = map(float, ElementTree.fromstring(drawing).attrib["viewBox"].split())
    points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", drawing)
    assert all(-10 <= float(x) <= width and -10 <= float(y) <= height for x, y in points)
    assert "var(--s1)" in drawing and "nan" not in drawing.lower()
    shown = re.findall(r">([\d.]+)</text>", drawing)
    assert shown[:2] == ["1", "4"] and set(shown[2:]) == {"0.2", "0.5", "1", "2", "5", "10", "20"}


# --- runs -----------------------------------------------------------------------------------------------------------


def write_stage(folder: Path, method: str, losses: list[float]) -> None:
    (folder / "model").mkdir(parents=True)
    card = {"method": method, "steps": len(losses), "images": 8 * len(losses), "seconds": 2.5}
    (folder / "model" / "config.json").write_text(json.dumps({"format": native.FORMAT, "model": {}, "card": card}))
    lines = [
        json.dumps({"step": i + 1, "images": 8 * i, "seconds": 0.1 * i, "student/loss": v, "student/lr": 1.0})
        for i, v in enumerate(losses)
    ]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "student/lo')


def write_recipe(folder: Path, recipe: Recipe, teacher: str = "digits", data: str = "digits") -> None:
    told = {
        "format": 1, "command": "distill", "method": recipe.name, "hyper_parameters": hyper_parameters(recipe),
        "start": {"model": teacher}, "data": {"source": data},
        "settings": {
            "budget": "2min", "batch": 32, "seed": 7, "log_steps": 10, "averages": [0.1], "order": "stratified:0.1",
            "on_alarm": "stop", "lora_rank": 4, "lora_alpha": None, "lora_targets": ["q", "v"],
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(told))


def test_signs_are_medians_of_the_ends(tmp_path: Path) -> None:
    """A sign of health is measured by the medians of the first and the last tenth, whatever one record does."""
    losses = [100.0, 5.0, 5.0, *[2.0] * 24, 1.0, 0.0, 1.0]
    write_stage(tmp_path / "cm", "cm", losses)
    (found,) = signs(read_run(tmp_path / "cm").stages[0])
    assert (found.key, found.first, found.last) == ("student/loss", 5.0, 1.0)
    assert found.sentence == ConsistencyDistillation.healthy["student/loss"]


def test_stages_are_read_in_their_order(tmp_path: Path) -> None:
    """Stage 10 comes after stage 2; costs add up; a line cut short by a kill is left out."""
    for k in (0, 2, 10, 1):
        write_stage(tmp_path / f"stage-{k}-pd-halving", "pd-halving", [float(k)] * 3)
    run = read_run(tmp_path)
    assert [stage.curve("student/loss")[1] for stage in run.stages] == [[float(k)] * 3 for k in (0, 1, 2, 10)]
    assert run.seconds == 10.0 and all(len(stage.records) == 3 for stage in run.stages)
    assert run.stages[0].scalars() == ["student/loss", "student/lr"]


def test_unfinished_run(tmp_path: Path) -> None:
    """A folder without a finished stage is no run, and the message says what to do."""
    (tmp_path / "x").mkdir()
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        read_run(tmp_path / "x")


RECIPES = [
    ConsistencyDistillation(steps=(1, 4), lr=1e-3, distance="pseudo-huber"),
    DMD2(gan_weight=0.0, critic_steps=2),
    ProgressiveLadder(),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_commands_repeat_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """The printed command, read by the command line, and the printed call both make the recipe that was run."""
    folder = tmp_path / "a run"
    write_recipe(folder, recipe)
    note = read_note(folder)
    assert note is not None
    words_ = shlex.split(note.shell(str(folder)).replace("\\\n", " "))
    assert words_[:3] == ["fewstep", "distill", recipe.name]
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser, words_[2:])
    chosen = parser.parse_args(words_[2:])
    assert methods.build(recipe.name, given(methods.parameters(recipe.name), chosen)) == recipe
    assert (chosen.teacher, chosen.data, str(chosen.budget), chosen.batch, chosen.seed) == (
        "digits",
        "digits",
        "2min",
        32,
        7,
    )
    assert chosen.out == folder
    others = (str(chosen.order), chosen.on_alarm, str(chosen.lora_rank), chosen.lora_targets)
    assert others == ("stratified:0.1", "stop", "4", ("q", "v")) and not hasattr(chosen, "lora_alpha")

    class Recorder:
        def __getattr__(self, name: str):
            return getattr(fs, name)

        def distill(self, *given_, **named):
            return given_, named

    made = eval(note.call(), {"fs": Recorder()})
    assert made == (("digits", recipe), {"data": "digits", "budget": "2min", "batch": 32, "seed": 7})


def test_training_from_scratch_is_not_shown_as_distillation(tmp_path: Path) -> None:
    """``fewstep train`` has no line of Python: its model is loaded, and its command is its recipe."""
    told = {
        "format": 1, "command": "train", "method": "denoising", "hyper_parameters": {}, "start": {"kind": "denoiser"},
        "data": {"source": "digits", "sha256": "a" * 64}, "settings": {},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    note = read_note(tmp_path)
    assert note is not None and note.digests == {"data": "a" * 64}
    assert note.call("runs/x") == "fs.load('runs/x')  # trained from scratch: fewstep train"
    assert note.shell("runs/x") == "fewstep train --recipe runs/x/recipe.json"


def test_damaged_recipe_names_its_file(tmp_path: Path) -> None:
    """What is wrong with a recipe is one line with the file's name."""
    (tmp_path / "recipe.json").write_text('{"method": "cm"}')
    with pytest.raises(ValueError, match=r"recipe\.json: 'command' is missing"):
        read_note(tmp_path)


def test_every_stage_of_every_recipe_is_known() -> None:
    """Stages that are no recipe of their own, as InstaFlow's last, still tell their signs of health."""
    known = method_class("reflow-distil")
    assert known is not None and known.healthy
    assert method_class("nothing") is None


def test_one_page_is_of_one_teacher(tmp_path: Path) -> None:
    """Runs of different teachers, or that say none, are refused with both names."""
    for name, teacher in (("a", "digits"), ("b", "fashion")):
        write_stage(tmp_path / name, "cm", [1.0])
        write_recipe(tmp_path / name, ConsistencyDistillation(), teacher)
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert common(runs[:1], "teacher") == ["digits"] and common(runs, "data") == ["digits"]
    with pytest.raises(ValueError, match=r"teacher 'digits'.*'fashion'"):
        common(runs, "teacher")
    write_stage(tmp_path / "c", "cm", [1.0])
    with pytest.raises(ValueError, match="does not say its teacher"):
        common([read_run(tmp_path / "c")], "teacher")
    with pytest.raises(FileNotFoundError, match="no run folders"):
        report_runs([])


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_all_models_start_from_the_same_noise() -> None:
    """A student that is its teacher's DDIM move gives the teacher's one-step samples, however work is split."""
    teacher = Grey()
    student = Student(Jump(Grey()), {1: Plan((teacher.schedule.t_max,))})
    one, _, calls, seconds = timed_samples(teacher, 1, 30, 3, "ddim", 7)
    other, _, _, _ = timed_samples(student, 1, 30, 3, "ddim", 30)
    assert calls == 1 and seconds > 0
    # float32; the teacher's grid ends at time 0, the student at t_min = 0 too
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_calls_are_counted() -> None:
    """What a solver costs is what it called: Heun makes 2 steps - 1 calls on a grid that ends at 0."""
    assert timed_samples(Grey(), 4, 20, 0, "heun", 20)[2] == 7
    assert timed_samples(Grey(), 4, 20, 0, "unipc", 20)[2] == 4


def test_rows_and_pictures(compared: Comparison) -> None:
    """The teacher's rows come first; a sheet has a column for every class, in order."""
    assert [(row.model, row.steps, row.calls) for row in compared.rows] == [
        ("teacher", 1, 1), ("teacher", 2, 2), ("teacher", 4, 4), ("my <student>", 1, 1), ("my <student>", 2, 2),
    ]  # fmt: skip
    assert all(row.quality.n == 40 and row.pictures.shape == (6, *SHAPE) for row in compared.rows)
    x, labels, _, _ = timed_samples(Grey(3), 2, 40, 0, "abm", 16)
    assert labels is not None and labels[:6].tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(compared.rows[1].pictures, x[:6].clamp(-1, 1), rtol=0, atol=0)
    _, reference = parts(pictures(200))
    assert reference.labels is not None and len(reference) == 40
    for i, picture in enumerate(compared.real):
        place = int((reference.x == picture).flatten(1).all(1).nonzero()[0, 0])
        assert int(reference.labels[place]) == i % 3


def test_best_is_of_the_fewest_calls(compared: Comparison) -> None:
    """The headline student has the fewest calls, whatever more of them would give."""
    best = compared.best()
    assert best is not None and best.calls == 1
    two = compared.best(2)
    assert two is not None and two.calls == 2


def test_accuracy_has_an_error_at_one(compared: Comparison) -> None:
    """Wilson's error: 1 / (2 (n + 1)) when all n are recognised, the binomial one in the middle."""

    def row(p: float, n: int) -> Row:
        quality = dataclasses.replace(compared.rows[0].quality, accuracy=p, n=n)
        return dataclasses.replace(compared.rows[0], quality=quality)

    sure, even = row(1.0, 500).accuracy, row(0.5, 10_000).accuracy
    assert sure is not None and sure.error == pytest.approx(1 / (2 * 501))
    assert even is not None and even.error == pytest.approx(0.005, rel=1e-3)  # sqrt(p (1 - p) / n)
    assert compared.rows[0].accuracy is None  # pixels have no classifier


def test_json_holds_every_number(compared: Comparison) -> None:
    """The JSON repeats the rows."""
    told = json.loads(compared.to_json())
    assert [row["calls"] for row in told["rows"]] == [1, 2, 4, 1, 2]
    assert told["rows"][0]["quality"]["frechet"]["value"] == compared.rows[0].quality.frechet.value
    assert told["n"] == 40 and told["versions"]["fewstep"] == fs.__version__


def test_students_without_plans_are_sampled_as_fs_sample_does() -> None:
    """A denoiser among the students (a reflowed model) is sampled by the default solver, whatever the teacher's is."""
    found = compare_models(Grey(), [Grey()], pictures(100), 20, teacher_steps=(2,), solver="ddim", features=Pixels())
    teacher, *rows = found.rows
    assert [row.steps for row in rows] == [1, 2, 4]
    for row in rows:
        plain, _, calls, _ = timed_samples(Grey(), row.steps, 20, 0, None, 100)
        assert calls == row.calls and torch.equal(row.pictures, plain[:20].clamp(-1, 1))
    noise = Rng(0, "sample").normal(20, *SHAPE)
    assert torch.equal(rows[1].pictures, fs.sample(Grey(), 20, steps=2, noise=noise).clamp(-1, 1))
    assert not torch.equal(rows[1].pictures, teacher.pictures)


def test_wrong_shapes_are_refused() -> None:
    """A model of another shape, or something that is no model, is named."""
    data = Dataset("points", torch.zeros(50, 2))
    with pytest.raises(ValueError, match=r"the teacher makes samples \[1, 4, 4\], data 'points' has \[2\]"):
        compare_models(Grey(), [], data)
    with pytest.raises(ValueError, match="student is a Linear"):
        compare_models(Grey(), [torch.nn.Linear(1, 1)], pictures(50))  # type: ignore[list-item]


# --- the page -------------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Fails where tags do not close in order; collects addresses and texts."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_page_needs_nothing_else(compared: Comparison, tmp_path: Path) -> None:
    """Tags balance, nothing is fetched, names are escaped, and every row stands in the table."""
    write_stage(tmp_path / "cm", "cm", [3.0, 2.0, 1.0])
    write_recipe(tmp_path / "cm", ConsistencyDistillation())
    runs = [read_run(tmp_path / "cm")]
    out = page.write(compared, tmp_path / "deep" / "r.html", runs, commands="a && b", left_out=["<x>"])
    text = out.read_text()
    found = read_page(text)
    allowed = ("data:image/png;base64,", "#", "https://arxiv.org/abs/")
    assert found.addresses and all(address.startswith(allowed) for address in found.addresses)
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert "<student>" not in text.split("<script")[0] and "my <student>" in found.text
    assert text.count("<tbody>\n<tr") == 2 and "a && b" in found.text and "Left out: <x>" in found.text
    assert "a<b" in found.text  # a class name over its column
    numbers = json.loads(text.split('id="numbers">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert numbers == json.loads(compared.to_json())


def test_summary_tells_what_was_trained_here(compared: Comparison, tmp_path: Path) -> None:
    """What was trained here is crowned, also where a student that was not is better; that one is named beside it."""
    (student,) = (row for row in compared.rows if row.role == "student" and row.calls == 1)
    worse = dataclasses.replace(student.quality, frechet=Estimate(student.quality.frechet.value + 50, 0.5))
    shown = dataclasses.replace(
        compared, rows=(*compared.rows, dataclasses.replace(student, model="cm", quality=worse))
    )
    write_stage(tmp_path / "cm", "cm", [1.0])
    run = read_run(tmp_path / "cm")
    text = page.summary(shown, [run])
    assert "The student <b>cm</b>, trained for 2 s, makes one in <b>one network call</b>" in text
    assert "<b>my &lt;student&gt;</b>, which was not trained here, comes to" in text
    assert shown.best() is not None and dataclasses.replace(shown, trained=("cm",)).best().model == "cm"
    assert "→ cm" in page.html(shown, [run])
    named = dataclasses.replace(run, name="my <student>")
    text = page.summary(shown, [named])
    assert "my &lt;student&gt;</b>, trained for 2 s, makes one" in text
    assert "<b>cm</b>, which was not trained here, comes to" in text


def with_frechet(compared: Comparison, *found: tuple[str, int, float, float]) -> Comparison:
    """A comparison of rows (model, calls, Fréchet distance, its error), the teacher's first."""
    rows = []
    for model, calls, value, error in found:
        quality = dataclasses.replace(compared.rows[0].quality, frechet=Estimate(value, error))
        role = "teacher" if model == "teacher" else "student"
        changed = {"model": model, "role": role, "steps": calls, "calls": calls, "seconds": float(calls)}
        rows.append(dataclasses.replace(compared.rows[0], quality=quality, **changed))
    return dataclasses.replace(compared, rows=tuple(rows))


def test_the_headline_takes_the_cheapest_teacher_that_is_good_enough(compared: Comparison) -> None:
    """Eight calls are within one standard error of the best, so sixteen are nothing to be compared with; four do as
    well as the student, to within the error of the difference."""
    shown = with_frechet(
        compared, ("teacher", 1, 10.0, 0.5), ("teacher", 4, 2.0, 0.3), ("teacher", 8, 0.9, 0.2),
        ("teacher", 16, 1.17, 0.2), ("teacher", 32, 0.8, 0.2), ("s", 1, 1.8, 0.2),
    )  # fmt: skip
    assert shown.full.calls == 8
    assert page.headline(shown) == "From 8 network calls to one"
    text, tiles = page.summary(shown, []), page.tiles(shown)
    assert "The teacher makes a picture in eight network calls" in text
    assert "To do as well as this student, the teacher needs four network calls" in text
    assert "8 → 1" in tiles and "8.0&times; faster" in tiles and "90 %" in tiles and "16" not in tiles


def test_a_student_that_is_no_faster_is_not_praised_for_it(compared: Comparison) -> None:
    """No factor below one, and no headline of fewer calls."""
    shown = with_frechet(compared, ("teacher", 1, 1.0, 0.2), ("teacher", 2, 0.9, 0.2), ("s", 1, 1.0, 0.2))
    assert shown.full.calls == 1
    assert "needs no more calls" in page.headline(shown) and "faster" not in page.tiles(shown)


def test_page_needs_the_teacher(compared: Comparison) -> None:
    """Without rows of the teacher there is nothing to put a student beside."""
    with pytest.raises(ValueError, match="no rows of the teacher"):
        page.html(dataclasses.replace(compared, rows=compared.rows[3:]))


def test_page_of_points_has_no_pictures() -> None:
    """Samples that cannot be shown leave out the pictures, not the page."""
    data = Dataset("points", torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
    teacher = Gaussian(TrigFlow(sigma_data=1.0), torch.zeros(2), 1.0)
    found = compare_models(teacher, [], data, 30, teacher_steps=(1, 2))
    text = page.html(found)
    read_page(text)
    assert "<img" not in text and "Quality against network calls" in text


def test_table_for_the_terminal(compared: Comparison) -> None:
    """One line for every row."""
    assert compared.table().row_count == 5


def test_course_without_records() -> None:
    """A stage without a log has no signs and no curves."""
    stage = StageCourse("cm", (), 0, 0, 0.0)
    assert (
        signs(stage) == [] and stage.scalars() == [] and isinstance(Note("distill", "cm", {}, "", "d", {}).call(), str)
    )


def test_the_names_in_a_deviation_are_code() -> None:
    assert with_code("`lr` < 1, `decay`") == "<code>lr</code> &lt; 1, <code>decay</code>"
