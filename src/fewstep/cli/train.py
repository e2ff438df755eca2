"""Train a model from scratch: a teacher (a diffusion or flow model), a few-step model that needs none, a classifier
or a language model.

  fewstep train NAME --data DATA [--network unet --channels 40,80] [--budget 4000steps] [--out FOLDER]
  fewstep train NAME --network mlp --help          the flags of another network, schedule or prediction
  fewstep train NAME --method language-modelling --data shakespeare
  fewstep train NAME --method supervised --data fashion --order random:0.1      a classifier, by random tenths
  fewstep train --recipe runs/x/recipe.json        a recorded run again

The same command in the same folder resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from fewstep.cli import methods
from fewstep.cli.errors import UserError, choose
from fewstep.cli.flags import given
from fewstep.cli.fresh import fresh_for, initialised
from fewstep.cli.settings import add_run_arguments, refuse_beside_recipe, settings_given, word_after

METHODS = (
    "denoising", "flow-matching", "cm-training", "ict", "ctm-training", "scm-training", "mean-flow-training",
    "shortcut", "analog-bits", "lowdiff", "supervised", "soft-supervised", "language-modelling",
)  # fmt: skip
#: The method where none is named.
USUAL = "denoising"
#: Settings that mean nothing to a fresh network, which is no base of low-rank weights.
OF_STUDENTS = ("lora_rank", "lora_alpha", "lora_targets")
#: What can be the name of a folder.
FOLDER = r"[^/\\\x00-\x1f\x7f]+"


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep train NAME --data DATA [flags]"
    parser.add_argument("name", metavar="NAME", nargs="?", help="what to call the model; its folder is runs/NAME")
    parser.add_argument("--unconditional", action="store_true", help="leave the labels of the data out")
    text = f"{', '.join(METHODS)} (default {USUAL})"
    parser.add_argument("--method", metavar="NAME", default=USUAL, help=text)
    add_fresh_arguments(parser, words, choose("method", word_after("--method", words, USUAL), METHODS))


def add_fresh_arguments(parser: argparse.ArgumentParser, words: Sequence[str], method: str) -> None:
    """The flags of a run of a method that begins with a fresh model."""
    fresh = fresh_for(method)
    shaping = fresh.add_to(parser, words, method)
    picked = {what: word_after(f"--{what}", words, usual) for what, usual in fresh.usual.items()}
    added: set[str] = set()  # a name that model and method share (sigma_data) is one flag, which sets both
    for title, parameters in {
        fresh.title.format(**picked): shaping,
        f"hyper-parameters of {method}": methods.parameters(method),
    }.items():
        group = parser.add_argument_group(title)
        for parameter in parameters:
            if parameter.name not in added:
                parameter.add_to(group)
            added.add(parameter.name)
    add_run_arguments(parser, without=OF_STUDENTS)


def run(chosen: argparse.Namespace) -> None:
    if chosen.recipe is None:
        if chosen.name is None:
            raise UserError("NAME is missing: what to call the model, as in 'fewstep train teacher --data digits'")
        if not re.fullmatch(FOLDER, chosen.name) or not chosen.name.strip(" ."):
            raise UserError(f"NAME '{chosen.name}' is not the name of a folder in runs/; --out takes a path")
    train(chosen, "train", METHODS, chosen.name or "teacher")


def train(chosen: argparse.Namespace, command: str, known: Sequence[str], name: str) -> None:
    """Run a method of a command from a fresh model, as its flags or a recipe say; ``name`` is for its folder."""
    from fewstep.cli import models, plan, runs
    from fewstep.runs.record import data_source

    if chosen.recipe is not None:
        fresh = fresh_for(chosen.method)
        refuse_beside_recipe(chosen, [*fresh.parameters_of(chosen), *methods.parameters(chosen.method)])
        record = runs.reopened(chosen.recipe, command, chosen)
        recipe = methods.build(choose("method", record.method, known), record.hyper_parameters)
        data = models.training_samples(record.data["source"])
        runs.check_source("data set", record.data["source"], record.data, data_source(record.data["source"], data))
    else:
        if chosen.data is None:
            raise UserError("--data is missing: digits, fashion, shapes3d, or the path of a data set")
        recipe = methods.build(chosen.method, given(methods.parameters(chosen.method), chosen))
        data = models.training_samples(chosen.data)
        start, source = fresh_for(chosen.method).description(chosen, data), data_source(chosen.data, data)
        record = runs.begin(command, recipe, start, source, settings_given(chosen))
    settings = runs.settings_of(record.settings, "settings")
    model = initialised(record.start, settings.seed)
    if chosen.dry_run:
        plan.show(recipe, model, data, settings)
        return
    out = runs.folder_for(chosen, name)
    runs.tell(runs.execute(record, recipe, model, data, out, not chosen.quiet), out)
