"""Train a few-step student from a teacher.

  fewstep distill METHOD --teacher MODEL [--data DATA] [--budget 2min] [--out FOLDER] [the method's own flags]
  fewstep distill METHOD --teacher MODEL --student MODEL       a student that starts from weights of its own
  fewstep distill METHOD --teacher MODEL --lora-rank 64          low-rank weights on the teacher's, a small file
  fewstep distill METHOD --help                every hyper-parameter of a method
  fewstep distill METHOD ... --dry-run         the plan: networks, memory, time, what differs from the paper
  fewstep distill --recipe runs/x/recipe.json  a recorded run again

The same command in the same folder resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.cli import methods
from fewstep.cli.errors import UserError, choose
from fewstep.cli.flags import given
from fewstep.cli.settings import add_run_arguments, refuse_beside_recipe, settings_given

if TYPE_CHECKING:
    from fewstep.cli.models import Named
    from fewstep.data import Samples
    from fewstep.methods.method import Recipe
    from fewstep.runs.record import Record

#: What a run may start from besides its teacher, by the part it plays.
ROLES = {
    "student": "where the student's weights start, a model of any architecture (default: the teacher)",
    "guide": "a model that guides the training",
    "reward": "a model that rates samples",
    "target": "a language model that learns from the teacher, and that the student is to draft for",
}


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    method = words[0] if words and not words[0].startswith("-") else None
    parser.usage = f"fewstep distill {method or 'METHOD'} --teacher MODEL [flags]"
    parser.add_argument("method", metavar="METHOD", nargs="?", help="the method, the first word after distill")
    parser.add_argument("--teacher", metavar="MODEL", help="a bundled model, a model or run folder, a diffusers folder")
    roles = tuple(ROLES) if method is None else methods.roles(choose("method", method, methods.RECIPES))
    for role in roles:
        parser.add_argument(f"--{role}", metavar="MODEL", help=ROLES[role])
    if method is None:
        parser.epilog = f"methods:\n{methods.listing()}\n"
    else:
        parser.description = methods.about(method)
        group = parser.add_argument_group(f"hyper-parameters of {method}")
        for parameter in methods.parameters(method):
            parameter.add_to(group)
    add_run_arguments(parser)


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli import models, plan, runs
    from fewstep.methods.start import teacher_in

    record, recipe, brought, data = again(chosen) if chosen.recipe is not None else new(chosen)
    for named in brought.values():
        models.check_conditions(named)
    given = {role: named.model for role, named in brought.items()}
    teacher = teacher_in(given.pop("teacher"), f"'{brought['teacher'].name}'")
    recipe.check_given(given)
    if chosen.dry_run:
        plan.show(recipe, teacher, data, runs.settings_of(record.settings, "settings"), given)
        return
    out = runs.folder_for(chosen, f"{record.method}-{brought['teacher'].stem}")
    runs.tell(runs.execute(record, recipe, teacher, data, out, not chosen.quiet, given), out)


def new(chosen: argparse.Namespace) -> tuple[Record, Recipe, dict[str, Named], Samples]:
    """The run that the flags describe: its record, recipe, models by role, data."""
    from fewstep.cli import models, runs
    from fewstep.runs.record import data_source

    if chosen.method is None:
        raise UserError("METHOD is missing: fewstep distill --help lists them")
    if chosen.teacher is None:
        raise UserError("--teacher is missing: a bundled model, a model or run folder, a diffusers folder")
    recipe = methods.build(chosen.method, given(methods.parameters(chosen.method), chosen))
    brought = {role: models.named_model(name) for role, name in asked(chosen).items()}
    source, data = models.named_data(chosen.data, brought["teacher"])
    start = {role: named.source for role, named in brought.items()}
    record = runs.begin("distill", recipe, start, data_source(source, data), settings_given(chosen))
    return record, recipe, brought, data


def again(chosen: argparse.Namespace) -> tuple[Record, Recipe, dict[str, Named], Samples]:
    """The run that a recipe records; :class:`UserError` when its models or data are not what they were."""
    from fewstep.cli import models, runs
    from fewstep.runs.record import data_source

    if chosen.method is not None:
        raise UserError("--recipe already says the method: leave METHOD out")
    refuse_beside_recipe(chosen, ())
    record = runs.reopened(chosen.recipe, "distill", chosen)
    recipe = methods.build(choose("method", record.method, methods.RECIPES), record.hyper_parameters)
    elsewhere = asked(chosen)
    brought: dict[str, Any] = {}
    for role, recorded in record.start.items():
        name = elsewhere.pop(role, recorded["name"])
        if name is None:
            raise UserError(f"the {role} of this recipe has no name: say where it lies with --{role}")
        brought[role] = models.named_model(name)
        runs.check_source(role, name, recorded, brought[role].source)
        record.start[role] = brought[role].source
    for role in elsewhere:
        raise UserError(f"the recipe was made without a {role}: leave --{role} out")
    source, data = models.named_data(record.data["source"], brought["teacher"])
    runs.check_source("data set", source, record.data, data_source(source, data))
    return record, recipe, brought, data


def asked(chosen: argparse.Namespace) -> dict[str, str]:
    """The models that flags name, by role."""
    names = {role: vars(chosen).get(role) for role in ("teacher", *ROLES)}
    return {role: name for role, name in names.items() if name is not None}
