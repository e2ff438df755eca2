"""diffusers' own tests of its schedulers, run on ours in their place.

    python tools/run_scheduler_tests.py CHECKOUT [CLASS ...] [--show]

CHECKOUT is a checkout of diffusers' repository; only its ``tests`` are used, the library is the installed one, whose
version should be near.  Every class of schedulers that fewstep reads is replaced by the solver nearest to it at the
levels that it would visit.  Prints how many tests pass and fail for each class; ``--show`` prints the failures too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import unittest
from operator import attrgetter
from pathlib import Path
from typing import Any

import diffusers

from fewstep.hub import as_scheduler

#: The solver that stands in for a class.
SOLVERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DEISMultistepScheduler": "deis-1",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSinglestepScheduler": "dpmpp-2s",
    "DPMSolverSDEScheduler": "dpmpp-sde",
    "EDMDPMSolverMultistepScheduler": "dpmpp-2m",
    "EDMEulerScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
    "LCMScheduler": "ddpm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "ipndm",
    "SASolverScheduler": "dpmpp-2m-sde",
    "TCDScheduler": "ddim",
    "UniPCMultistepScheduler": "unipc",
}


#: The solvers of DPMSolverMultistepScheduler's orders.
ORDERS = {
    "dpmsolver++": ("ddim", "dpmpp-2m", "dpmpp-3m-published"),
    "dpmsolver": ("ddim", "dpm-2m:lower_order_final=true", "dpm-2m"),
    "sde-dpmsolver++": ("ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde"),
}


def nearest(name: str, config: Any) -> str:
    """The solver that stands in for a scheduler."""
    if name == "DPMSolverMultistepScheduler" and config.algorithm_type in ORDERS:
        return ORDERS[config.algorithm_type][config.solver_order - 1]
    if name == "UniPCMultistepScheduler":
        return f"unipc:p={config.solver_order},variant={config.solver_type}"
    return SOLVERS[name]


def in_place_of(kind: Any) -> type:
    """A class that is made as ``kind`` is, from its parameters, and gives our scheduler."""

    class Ours(type(as_scheduler("ddim", kind()))):  # type: ignore[misc]
        def __new__(cls, **config: Any) -> Any:
            like = kind(**config)
            clean = like.config.get("final_sigmas_type") != "sigma_min" and like.config.get("set_alpha_to_one", True)
            return as_scheduler(nearest(kind.__name__, like.config), like, grid="original", clean=clean)

    return Ours


def cases(checkout: Path) -> dict[str, unittest.TestSuite]:
    """The tests of every class, with ours in its place."""
    sys.path.insert(0, str(checkout))
    found: dict[str, unittest.TestSuite] = {}
    for path in sorted((checkout / "tests" / "schedulers").glob("test_scheduler_*.py")):
        module = importlib.import_module(f"tests.schedulers.{path.stem}")
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, unittest.TestCase)):
                continue
            names = [kind.__name__ for kind in vars(value).get("scheduler_classes", ())]
            if not names or names[0] not in SOLVERS:
                continue
            vars_of: Any = value
            vars_of.scheduler_classes = tuple(in_place_of(attrgetter(name)(diffusers)) for name in names)
            found.setdefault(names[0], unittest.TestSuite()).addTests(
                unittest.defaultTestLoader.loadTestsFromTestCase(value)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--show", action="store_true", help="print the failures")
    args = parser.parse_args()
    total = failed = 0
    for name, suite in cases(args.checkout).items():
        if args.classes and name not in args.classes:
            continue
        result = unittest.TestResult()
        suite.run(result)
        bad = [*result.failures, *result.errors]
        ran = result.testsRun - len(result.skipped)
        total, failed = total + ran, failed + len(bad)
        print(f"{name}: {ran - len(bad)} of {ran} pass", flush=True)
        if args.show:
            for test, trace in bad:
                print(f"    {test.id().split('.')[-1]}: {trace.strip().splitlines()[-1][:200]}")
    print(f"{total - failed} of {total} pass, {failed} fail")


if __name__ == "__main__":
    main()
