"""A learned solver as a diffusers scheduler, from its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_as_scheduler import EXACT, FLOW_PROMPT, PROMPT, gap, normal, sd3, stable_diffusion
from test_hub_reading import last_sample

diffusers = pytest.importorskip("diffusers")

import fewstep as fs  # noqa: E402
from fewstep.hub import as_scheduler  # noqa: E402
from fewstep.hub.diffusers import from_pipeline  # noqa: E402
from fewstep.hub.scheduler_config import read, written  # noqa: E402
from fewstep.hub.settings import save_settings  # noqa: E402
from fewstep.sampling import LearnedSolver, Levels, balanced, folded, run  # noqa: E402
from fewstep.sampling.named import named_solver  # noqa: E402
from fewstep.sampling.search import Setting  # noqa: E402
from fewstep.schedules import EDM, Schedule  # noqa: E402


def odd_solver(schedule: Schedule) -> LearnedSolver:
    """No hand-made one: numbers of its own beside those of UniPC, at times of no named grid."""
    rows = folded(named_solver("unipc").table(Levels.of(schedule, balanced(schedule, 5, 0.7, 1.3))))
    moved = tuple(tuple(v + 0.01 * (i + 1) for i, v in enumerate(row)) for row in rows.rows)
    return LearnedSolver(rows.schedule, rows.times, moved)


@pytest.mark.parametrize(("make", "prompt"), [(stable_diffusion, PROMPT), (sd3, FLOW_PROMPT)])
def test_a_pipeline_samples_with_a_learned_file(make: Any, prompt: Any, tmp_path: Path) -> None:
    """A table of betas and flow matching with a shift: the image of the engine, from the solver that the file holds."""
    pipe = make()
    loaded, latents = from_pipeline(pipe), normal(2, 4, 8, 8)
    schedule = loaded.denoiser.schedule
    solver = odd_solver(schedule)
    path = save_settings(tmp_path / "x.json", Setting("unipc", "balanced", 5, 5), None, {}, solver)
    settings = fs.load_settings(path)
    pipe.scheduler = as_scheduler(settings["solver"], pipe)
    theirs = last_sample(pipe, **prompt, latents=latents, num_inference_steps=settings["steps"], guidance_scale=1.0)
    table = solver.table(Levels.of(schedule, solver.grid(schedule, len(solver.times))))
    with torch.no_grad():
        mine = run(loaded.denoiser, latents, table, prompt)
    assert gap(mine, theirs) < EXACT
    again = type(pipe.scheduler).from_config(json.loads(json.dumps(dict(pipe.scheduler.config), default=list)))
    assert again.solver == solver
    with pytest.raises(ValueError, match="steps=7: this solver was learned for 5 steps"):
        pipe.scheduler.set_timesteps(7)
    with pytest.raises(ValueError, match="a learned solver has times of its own"):
        pipe.scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.5, 0.3, 0.1])


def test_a_learned_solver_is_plain_json() -> None:
    """Written and read through JSON, every bit is kept."""
    solver = odd_solver(EDM())
    assert read(json.loads(json.dumps(written(solver)))) == solver


def test_another_schedule_is_refused_by_a_pipeline() -> None:
    """In one line, when the calls are laid out."""
    pipe = stable_diffusion()
    pipe.scheduler = as_scheduler(odd_solver(EDM()), pipe)
    with pytest.raises(ValueError, match=r"learned on the schedule EDM-.* the model is on DiscreteVP-"):
        pipe.scheduler.set_timesteps(5)
