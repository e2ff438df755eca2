"""Few steps now: solvers as tables of coefficients, the engine that runs them, and rollouts of students."""

from fewstep.sampling.coefficients import Levels
from fewstep.sampling.editing import (
    Colourisation,
    Edited,
    Inpainting,
    LinearMeasurement,
    SuperResolution,
    edit,
    measured,
    slerp,
    stroke_to_image,
)
from fewstep.sampling.engine import Row, Solver, Stage, Step, Table, run, solve
from fewstep.sampling.hooks import Hooks
from fewstep.sampling.multistep import DPMSolverPP2M, DPMSolverPP2MTaylor, Multistep, UniPC
from fewstep.sampling.rollout import Plan, Student, greedy_times, rollout
from fewstep.sampling.runge_kutta import NATIVE, RATIO, RungeKutta, Tableau
from fewstep.sampling.sample import SOLVERS, balanced, sample
from fewstep.sampling.stochastic import DDIM, Churn, DDPMLarge

__all__ = [
    "DDIM",
    "NATIVE",
    "RATIO",
    "SOLVERS",
    "Churn",
    "Colourisation",
    "DDPMLarge",
    "DPMSolverPP2M",
    "DPMSolverPP2MTaylor",
    "Edited",
    "Hooks",
    "Inpainting",
    "Levels",
    "LinearMeasurement",
    "Multistep",
    "Plan",
    "Row",
    "RungeKutta",
    "Solver",
    "Stage",
    "Step",
    "Student",
    "SuperResolution",
    "Table",
    "Tableau",
    "UniPC",
    "balanced",
    "edit",
    "greedy_times",
    "measured",
    "rollout",
    "run",
    "sample",
    "slerp",
    "solve",
    "stroke_to_image",
]
