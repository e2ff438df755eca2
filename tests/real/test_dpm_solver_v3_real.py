"""DPM-Solver-v3 on the digits teacher, with statistics from a few of its training pictures."""

from __future__ import annotations

import torch

from fewstep import api
from fewstep.data import load as load_data
from fewstep.guidance import Guided
from fewstep.randomness import Rng
from fewstep.sampling import DPMSolverPP2M, UniPC, sample
from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3, statistics_grid
from fewstep.sampling.solvers.model_statistics import estimate


def test_closer_to_the_exact_solution_than_other_solvers() -> None:
    """With statistics at 41 levels from 64 pictures, the mean square distance to 200 steps is below half of
    DPM-Solver++ 2M's and below 0.85 of UniPC's at 5 to 8 calls, on the same grid (measured: 0.31, 0.28, 0.27, 0.23 and
    0.70, 0.52, 0.40, 0.35)."""
    teacher, data = api.load("digits"), load_data("digits")
    rows = Rng("rows").shuffled(len(data))[:64]
    assert data.labels is not None
    statistics = estimate(
        teacher, data.read(rows), Rng("noise"), cond=data.labels[rows], log_snr=statistics_grid(teacher.schedule, 40)
    )
    reference = sample(teacher, 100, solver=UniPC(), steps=200, seed=5)

    def distance(solver, steps: int) -> float:
        return float((sample(teacher, 100, solver=solver, steps=steps, seed=5) - reference).square().mean())

    for steps in (5, 6, 7, 8):
        ours = distance(DPMSolverV3(statistics), steps)
        assert ours < 0.5 * distance(DPMSolverPP2M(), steps)
        assert ours < 0.85 * distance(UniPC(), steps)


def test_guided_statistics_pay_under_guidance() -> None:
    """At guidance 4, 6 and 8 calls, below 0.6 of the distance of 2M (measured 0.36 and 0.27 with more pictures)."""
    teacher, data = api.load("digits"), load_data("digits")
    guided = Guided(teacher, 4.0)
    rows = Rng("rows").shuffled(len(data))[:64]
    assert data.labels is not None
    statistics = estimate(
        guided, data.read(rows), Rng("noise"), cond=data.labels[rows], log_snr=statistics_grid(teacher.schedule, 40)
    )
    reference = sample(guided, 50, solver=UniPC(), steps=100, seed=5)
    for steps in (6, 8):
        ours, other = (
            float((sample(guided, 50, solver=solver, steps=steps, seed=5) - reference).square().mean())
            for solver in (DPMSolverV3(statistics), DPMSolverPP2M())
        )
        assert ours < 0.6 * other
    assert bool(torch.isfinite(statistics.s).all())
