"""Flow maps and continuous-time consistency on text teachers of diffusers: trained on latents with their prompts,
guided away from the empty prompt, saved, opened, and exported where diffusers has a place for what they take."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import clip_text, ddim, sana_with_text, sd3_with_text, stable_diffusion, unet2d_condition  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.cli import main  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.hub.adapters import Adapter  # noqa: E402
from fewstep.hub.diffusers import export, load_pipeline  # noqa: E402
from fewstep.methods import recipe_class  # noqa: E402
from fewstep.runs.course import run_recipe  # noqa: E402
from fewstep.training.budget import Budget  # noqa: E402
from fewstep.training.settings import Settings  # noqa: E402

CAPTIONS = ["a b", "c", "a b", "b", "c c", "a"]
SETTINGS = Settings(Budget(2), batch=2, precision="fp32", save_seconds=0.0, log_steps=1)
#: What makes a short run under guidance, where a method has such a hyper-parameter.
SMALL = {
    "lr": 1e-3, "guidance": 2.0, "guidances": (2.0, 3.0), "label_dropout": 0.0, "pairs": 4, "ode_steps": 2,
    "teacher_steps": 4, "route": 4, "steps": (1, 2),
}  # fmt: skip


class Case(NamedTuple):
    """A teacher; whether the student is retimed first; whether the export holds code, or why there is none; and
    hyper-parameters of its own."""

    pipeline: str
    retimed: bool = False
    export: bool | str = r"further inputs .*keep it in a folder of fewstep's own"
    changes: Mapping[str, Any] = {}


CASES = {
    "guided-distillation": Case("Stable Diffusion", export=False),
    "boot": Case("Stable Diffusion"),
    "free-flow": Case("Stable Diffusion"),
    "ctm": Case("Stable Diffusion"),
    "caf": Case("Stable Diffusion", export="a model with 2 networks cannot be exported"),
    "shortcut": Case("Stable Diffusion 3"),
    "slim-flow": Case("Stable Diffusion 3", export=True),
    "mean-flow": Case("Stable Diffusion 3", retimed=True),
    "ayf": Case("Stable Diffusion 3", retimed=True),
    "ayf-lmd": Case("Stable Diffusion 3", retimed=True),
    "tbcm": Case("Stable Diffusion 3", retimed=True),
    "scm": Case("Stable Diffusion 3", retimed=True, export=True),
    "dmd2": Case("Stable Diffusion", export=False, changes={"steps": 4}),
    "f-distill": Case("Stable Diffusion 3", export=False, changes={"steps": 2}),
    "swift-brush": Case("Stable Diffusion", export=False, changes={"rank": 2}),
    "tdm": Case("Stable Diffusion", export=False, changes={"steps": (2,)}),
    "phased-dmd": Case("Stable Diffusion 3", export="experts", changes={"steps": 1}),
    "ladd": Case("Stable Diffusion 3", export=False),
    "sana-sprint": Case("Sana"),
}
#: The last weights of the networks.
LAST = {"Stable Diffusion": "conv_out.weight", "Stable Diffusion 3": "proj_out.weight", "Sana": "proj_out.weight"}


class Prepared(NamedTuple):
    """A pipeline's folder, its latents with prompts, and its network told the angle."""

    folder: Path
    loaded: Any
    data: Dataset
    retimed: Any


def made() -> Any:
    scheduler = ddim(prediction_type="v_prediction", beta_schedule="scaled_linear")
    pipe = stable_diffusion(unet2d_condition(), scheduler)
    pipe.register_modules(**clip_text(projected=False))
    return pipe


PIPELINES: dict[str, Callable[[], Any]] = {
    "Stable Diffusion": made, "Stable Diffusion 3": sd3_with_text, "Sana": sana_with_text,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    found = {}
    for kind, pipeline in PIPELINES.items():
        torch.manual_seed(0)
        place = tmp_path_factory.mktemp("text") / "pipe"
        pipeline().to(torch.float32).save_pretrained(place)
        loaded = load_pipeline(place)
        data = Dataset("captioned", torch.randn(len(CAPTIONS), *loaded.denoiser.shape), loaded.embed(CAPTIONS))
        retimed = None
        if kind == "Stable Diffusion 3":
            run_recipe(fs.Retime(), loaded.denoiser, data, SETTINGS, place.parent / "retimed", show=False)
            retimed = fs.load(place.parent / "retimed" / "model")
        found[kind] = Prepared(place, loaded, data, retimed)
    return found


def recipe(name: str, **changes: Any) -> Any:
    cls = recipe_class(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in {**SMALL, **changes}.items() if key in fields})


def last(model: torch.nn.Module, kind: str) -> Tensor:
    return next(value for name, value in model.state_dict().items() if name.endswith(f"model.{LAST[kind]}"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first prompt of every call of a network."""
    prompts: list[Tensor] = []
    checked = Adapter.checked

    def seen(self: Adapter, given: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        prompts.append(given["prompt_embeds"][0].detach())
        return checked(self, given, x)

    monkeypatch.setattr(Adapter, "checked", seen)
    return prompts


@pytest.mark.parametrize("name", CASES)
def test_a_text_teacher_is_distilled(
    name: str, prepared: dict[str, Prepared], asked: list[Tensor], tmp_path: Path
) -> None:
    """Finite losses and other weights; the empty prompt is asked in training, where guidance is 2, and never in
    sampling; the prompt counts; the folder opens as the same student; the export is what it is said to be."""
    case = CASES[name]
    here = prepared[case.pipeline]
    given = {"student": here.retimed} if case.retimed else {}
    teacher = here.loaded.denoiser
    student = run_recipe(
        recipe(name, **case.changes), teacher, here.data, SETTINGS, tmp_path / "run", given=given, show=False
    ).model
    lines = [json.loads(line) for log in (tmp_path / "run").rglob("log.jsonl") for line in log.read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.endswith("/loss")]
    assert len(losses) >= 2 and all(map(math.isfinite, losses))
    start = here.retimed if case.retimed else teacher
    assert not torch.equal(last(student, case.pipeline), last(start, case.pipeline))

    empty = teacher.null["prompt_embeds"][0]
    assert any(torch.equal(prompt, empty) for prompt in asked)
    asked.clear()
    cond, other = here.loaded.embed(["b", "c"]), here.loaded.embed(["a", "a b"])
    samples = student.sample(2, cond, seed=1)
    assert samples.shape == (2, *teacher.shape) and bool(samples.isfinite().all())
    assert asked and not any(torch.equal(prompt, empty) for prompt in asked)
    assert not torch.equal(student.sample(2, other, seed=1), samples)
    opened = fs.load(tmp_path / "run" / "model")
    assert opened.extras == student.extras
    assert torch.equal(opened.sample(2, cond, seed=1), samples)
    if isinstance(case.export, str):
        with pytest.raises(ValueError, match=case.export) as refused:
            export(opened, tmp_path / "plain")
        assert "\n" not in str(refused.value) and not (tmp_path / "plain").exists()
    else:
        assert bool(export(opened, tmp_path / "plain").code) is case.export


def test_a_sana_student_of_one_guidance_opens_in_plain_diffusers(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    """Its pipeline makes the student's own sample of the same noise, from prompts, in one call; and where the network
    counts a thousand steps it is retimed in the same run."""
    here = prepared["Sana"]
    teacher = load_pipeline(here.folder, size=(32, 32)).denoiser
    data = Dataset("captioned", torch.randn(len(CAPTIONS), *teacher.shape), here.data.cond)
    method = recipe("sana-sprint", guidances=(4.5,))
    student = run_recipe(method, teacher, data, SETTINGS, tmp_path / "run", show=False).model
    written = export(student, tmp_path / "plain")
    assert written.code
    pipe = diffusers.DiffusionPipeline.from_pretrained(written.folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    cond, noise = here.loaded.embed(["b", "c"]), torch.randn(2, *teacher.shape)
    call = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent", "guidance_scale": 1.0}
    made = pipe(**cond, **call, latents=noise, num_inference_steps=1).images
    torch.testing.assert_close(made, student(noise, cond, steps=1), atol=1e-4, rtol=1e-3)

    torch.manual_seed(0)
    sana_with_text(timestep_scale=1.0).to(torch.float32).save_pretrained(tmp_path / "counts")
    counts = load_pipeline(tmp_path / "counts", size=(32, 32)).denoiser
    with pytest.raises(ValueError, match="told a time that changes"):
        run_recipe(method, counts, data, SETTINGS, show=False)
    slow = dataclasses.replace(method, retime=0.5)
    retimed = run_recipe(slow, counts, data, SETTINGS, show=False).model
    assert bool(retimed.sample(2, cond, steps=2, seed=0).isfinite().all())


def test_without_guidance_the_empty_prompt_is_not_asked(
    prepared: dict[str, Prepared], asked: list[Tensor], tmp_path: Path
) -> None:
    """So that it is guidance that asks for it above."""
    here = prepared["Stable Diffusion"]
    teacher = here.loaded.denoiser
    run_recipe(recipe("boot", guidance=1.0), teacher, here.data, SETTINGS, tmp_path / "run", show=False)
    assert asked and not any(torch.equal(prompt, teacher.null["prompt_embeds"][0]) for prompt in asked)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.retimed])
def test_a_network_that_counts_a_thousand_steps_is_refused(name: str, prepared: dict[str, Prepared]) -> None:
    """Where the loss differentiates it in time: one line that says what would be right."""
    for here in (here for kind, here in prepared.items() if kind != "Sana"):
        with pytest.raises(ValueError, match=r"told the angle first \(fewstep distill retime\)") as found:
            run_recipe(recipe(name), here.loaded.denoiser, here.data, SETTINGS, show=False)
        assert "\n" not in str(found.value)


def test_the_command_line_distils_prompts(
    prepared: dict[str, Prepared], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BOOT needs no pictures: a list of prompts is its data; its student draws a prompt; the refusal is one line."""
    prompts, teacher = tmp_path / "prompts.txt", prepared["Stable Diffusion"].folder
    prompts.write_text("a b\nc\n")
    quick = f"--teacher {teacher} --data {prompts} --budget 1steps --batch 2 --precision fp32 --quiet"
    assert main(f"distill boot {quick} --guidance 2 --out {tmp_path / 'run'}".split()) == 0
    drawn = ["sample", str(tmp_path / "run"), "--prompt", "a b", "--n", "2", "--out", str(tmp_path / "x.png")]
    assert main(drawn) == 0 and (tmp_path / "x.png").is_file()
    capsys.readouterr()
    assert main(f"distill tbcm {quick} --out {tmp_path / 'no'}".split()) == 2
    said = capsys.readouterr().err
    assert "fewstep distill retime" in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "no" / "model").exists()
