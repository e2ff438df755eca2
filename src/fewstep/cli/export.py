"""Write a model as a folder that plain diffusers opens, or as fewstep's own.

  fewstep export runs/dmd2-digits my-student
  fewstep export runs/dmd2-digits my-student --native
  fewstep export runs/lora my-lora --lora                 low-rank weights alone, for pipe.load_lora_weights
  fewstep export runs/guided my-student --extra w=3       an input of the student, the same in every call

The folder must be new, or empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli.errors import UserError
from fewstep.cli.inputs import add_extra, extras_of


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep export MODEL FOLDER [flags]"
    parser.add_argument("model", metavar="MODEL", help="a bundled model, a model or run folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder")
    parser.add_argument("--native", action="store_true", help="fewstep's own format, two files, instead of diffusers'")
    parser.add_argument(
        "--lora", action="store_true", help="the low-rank weights of a diffusers student alone, as diffusers loads them"
    )
    parser.add_argument(
        "--with-code", action="store_true", help="with the student's own scheduler, even if a plain one fits"
    )
    add_extra(parser, "the student that is to be constant")


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli.models import named_model

    found = named_model(chosen.model)
    extras = extras_of(found.kind, chosen.model, chosen.extra)
    if chosen.lora:
        if chosen.with_code or chosen.native or extras:
            raise UserError("--lora writes low-rank weights and nothing else: leave the other flags out")
        write_low_rank(found, chosen.folder)
        return
    if chosen.native:
        if chosen.with_code:
            raise UserError("--native folders hold no code: leave --with-code out")
        if extras:
            raise UserError("--native folders keep the student's inputs: leave --extra out")
        write_native(found, chosen.folder)
        return
    from fewstep.hub import export, export_with_code
    from fewstep.networks.lora import factors_in, merged

    model = merged(found.model) if factors_in(found.model) else found.model
    written = (export_with_code if chosen.with_code else export)(model, chosen.folder, extras=extras)
    print(f"{written.folder}: a {written.pipeline} with {written.scheduler}")
    print(f"README.md there says how to call it, in {', '.join(map(str, written.calls)) or 'any number of'} steps")
    if written.code:
        print("it brings its own code: open it with trust_remote_code=True")


def write_low_rank(found, folder: Path) -> None:
    """The file of low-rank weights that pipelines of diffusers load."""
    from fewstep.hub import lora
    from fewstep.hub.exporting import new_folder

    path = lora.save(found.model, new_folder(folder))
    print(f"{path}: low-rank weights; pipe.load_lora_weights('{folder}') puts them on the teacher's pipeline")
    print("the pipeline needs the student's scheduler and steps too: those of an export without --lora")


def write_native(found, folder: Path) -> None:
    """A copy of the model with its card."""
    from fewstep.hub import native
    from fewstep.hub.exporting import new_folder

    new_folder(folder)
    card = native.card(found.folder) if (found.folder / "config.json").is_file() else {}
    native.save(found.model, folder, card)
    print(f"{folder}: config.json and model.safetensors; open it with fewstep.load('{folder}')")
