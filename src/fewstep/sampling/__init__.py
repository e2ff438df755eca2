"""Few steps now: solvers as tables of coefficients, the engine that runs them, and rollouts of students."""

from fewstep.grids import balanced
from fewstep.sampling.brownian import BrownianPath
from fewstep.sampling.coefficients import DATA, NOISE, Levels
from fewstep.sampling.editing import (
    Colorization,
    Edited,
    Inpainting,
    LinearMeasurement,
    SuperResolution,
    edit,
    measured,
    slerp,
    stroke_to_image,
)
from fewstep.sampling.encoding import encode, style_transfer
from fewstep.sampling.engine import FieldTable, Solver, Stage, Step, Table, run, solve
from fewstep.sampling.hooks import Hooks
from fewstep.sampling.inversion import inpaint_by_inversion, reconstruct
from fewstep.sampling.learned import LearnedSolver, folded
from fewstep.sampling.likelihood import Likelihood, log_likelihood
from fewstep.sampling.named import SOLVERS
from fewstep.sampling.rollout import Call, Plan, Student, greedy_times, log_prob, rollout
from fewstep.sampling.rows import FieldRow, Row
from fewstep.sampling.sample import sample
from fewstep.sampling.solvers.abm import ABM
from fewstep.sampling.solvers.adaptive import AdaptiveDPMSolver
from fewstep.sampling.solvers.deis import IPNDM, TAB, RhoAB, ScoreExponential
from fewstep.sampling.solvers.dpm_solver import (
    Ancestral,
    DPMSolver1,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    Fast,
    Single,
)
from fewstep.sampling.solvers.dualfast import DualFast
from fewstep.sampling.solvers.multistep import Multistep
from fewstep.sampling.solvers.runge_kutta import NATIVE, RATIO, RungeKutta, Tableau
from fewstep.sampling.solvers.stochastic import DDIM, Churn, DDPMLarge
from fewstep.sampling.solvers.unipc import UniPC
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.sampling.student_samplers import STUDENT_SAMPLERS, ending_clean, sample_student, student_plan

__all__ = [
    "ABM",
    "DATA",
    "DDIM",
    "IPNDM",
    "NATIVE",
    "NOISE",
    "RATIO",
    "SOLVERS",
    "STUDENT_SAMPLERS",
    "TAB",
    "AdaptiveDPMSolver",
    "Ancestral",
    "BrownianPath",
    "Call",
    "Churn",
    "Colorization",
    "DDPMLarge",
    "DPMSolver1",
    "DPMSolverPP2M",
    "DPMSolverPP2MTaylor",
    "DPMSolverPP3M",
    "DPMSolverPP3MPublished",
    "DPMSolverPPSDE",
    "DualFast",
    "Edited",
    "Fast",
    "FieldRow",
    "FieldTable",
    "Hooks",
    "Inpainting",
    "LearnedSolver",
    "Levels",
    "Likelihood",
    "LinearMeasurement",
    "Multistep",
    "Plan",
    "RhoAB",
    "Row",
    "RungeKutta",
    "ScoreExponential",
    "Single",
    "Solver",
    "Stage",
    "Step",
    "Student",
    "StudentGenerator",
    "SuperResolution",
    "Table",
    "Tableau",
    "UniPC",
    "balanced",
    "edit",
    "encode",
    "ending_clean",
    "folded",
    "greedy_times",
    "inpaint_by_inversion",
    "log_likelihood",
    "log_prob",
    "measured",
    "reconstruct",
    "rollout",
    "run",
    "sample",
    "sample_student",
    "slerp",
    "solve",
    "stroke_to_image",
    "student_plan",
    "style_transfer",
]
