"""Train a few-step student from a teacher.

  fewstep distill METHOD --teacher MODEL [--data DATA] [--budget 2min] [--out FOLDER] [the method's own flags]
  fewstep distill METHOD --help                every hyper-parameter of a method
  fewstep distill METHOD ... --dry-run         the plan: networks, memory, time, what differs from the paper
  fewstep distill --recipe runs/x/recipe.json  a recorded run again

The same command in the same folder resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from fewstep.cli import methods
from fewstep.cli.errors import UserError, choose
from fewstep.cli.flags import given
from fewstep.cli.settings import add_run_arguments, refuse_beside_recipe, settings_given


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    method = words[0] if words and not words[0].startswith("-") else None
    parser.usage = f"fewstep distill {method or 'METHOD'} --teacher MODEL [flags]"
    parser.add_argument("method", metavar="METHOD", nargs="?", help="the method, the first word after distill")
    parser.add_argument("--teacher", metavar="MODEL", help="a bundled model, a model or run folder, a diffusers folder")
    if method is None:
        parser.epilog = f"methods:\n{methods.listing()}\n"
    else:
        choose("method", method, methods.RECIPES)
        parser.description = methods.about(method)
        group = parser.add_argument_group(f"hyper-parameters of {method}")
        for parameter in methods.parameters(method):
            parameter.add_to(group)
    add_run_arguments(parser)


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli import models, plan, records, runs

    if chosen.recipe is not None:
        if chosen.method is not None:
            raise UserError("--recipe already says the method: leave METHOD out")
        refuse_beside_recipe(chosen, ())
        record = runs.reopened(chosen.recipe, "distill", chosen)
        choose("method", record.method, methods.RECIPES)
        recipe = methods.build(record.method, record.hyper_parameters)
        name = chosen.teacher or record.start["model"]
        teacher, denoiser = models.named_teacher(name)
        runs.check_source("teacher", name, record.start["sha256"], teacher.sha256)
        source, data = models.named_data(record.data["source"], teacher)
        runs.check_source("data set", source, record.data["sha256"], records.data_sha256(data))
    else:
        if chosen.method is None:
            raise UserError("METHOD is missing: fewstep distill --help lists them")
        if chosen.teacher is None:
            raise UserError("--teacher is missing: a bundled model, a model or run folder, a diffusers folder")
        recipe = methods.build(chosen.method, given(methods.parameters(chosen.method), chosen))
        teacher, denoiser = models.named_teacher(chosen.teacher)
        source, data = models.named_data(chosen.data, teacher)
        record = records.Record(
            "distill", chosen.method, {}, {}, models.described(source, data), settings_given(chosen), records.versions()
        )  # fmt: skip
    models.check_conditions(teacher)
    start = {"model": teacher.name, "sha256": teacher.sha256}
    record = dataclasses.replace(record, hyper_parameters=methods.hyper_parameters(recipe), start=start)
    if chosen.dry_run:
        plan.show(recipe, denoiser, data, runs.settings_of(record.settings, "settings"))
        return
    out = runs.folder_for(chosen, f"{record.method}-{teacher.stem}")
    runs.tell(runs.execute(record, recipe, denoiser, data, out, not chosen.quiet), out)
