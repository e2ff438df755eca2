"""What a student sees at each call, as a PNG grid.

  fewstep inspect runs/dmd2-digits
  fewstep inspect runs/dmd2-digits --steps 4 --n 8 --class 3 --out calls.png
  fewstep inspect runs/guided --extra w=3

A row is a sample; its columns are, call after call, the state that the student gets and what it takes the data to be,
and at last the sample, which is that of 'fewstep sample' with the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli.conditions import conditions
from fewstep.cli.errors import UserError
from fewstep.cli.inputs import add_extra, extras_of, with_guidance
from fewstep.cli.outputs import output_file


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep inspect STUDENT [flags]"
    parser.add_argument("model", metavar="STUDENT", help="a bundled student, a model or run folder")
    parser.add_argument("--steps", metavar="N", type=int, help="default: the most it has a plan for")
    parser.add_argument("--n", metavar="N", type=int, default=8, help="samples, a row each (default 8)")
    parser.add_argument("--class", metavar="K,..", dest="labels", help="class numbers, cycled (default: all classes)")
    parser.add_argument("--prompt", metavar="TEXT", help="for a student of a pipeline with text encoders")
    parser.add_argument("--guidance", metavar="X", type=float, help="of a student that takes the guidance weight")
    add_extra(parser, "the student")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: the student's name and -calls.png")
    parser.set_defaults(cond=None, guide=None)


def run(chosen: argparse.Namespace) -> None:
    if chosen.n < 1:
        raise UserError(f"--n {chosen.n} must be at least 1")
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.cli.sample import no_pictures
    from fewstep.files import write_atomically
    from fewstep.report.pictures import sheet
    from fewstep.report.rollouts import as_pictures, in_words, looked_at

    found = named_model(chosen.model)
    try:
        student = found.kind.student()
    except ValueError as error:
        raise UserError(f"'{chosen.model}' is {error}: there are no calls to look at") from None
    if (reason := no_pictures(found.model)) is not None:
        raise UserError(reason)
    try:
        found.kind.check_steps(chosen.steps)
    except ValueError as error:
        raise UserError(f"--steps {error}") from None
    out = output_file("--out", chosen.out or Path(f"{found.stem}-calls.png"), png="a grid of pictures")
    student.to(device_of(chosen.device))
    extras = with_guidance(found.kind, extras_of(found.kind, chosen.model, chosen.extra), chosen.guidance)
    cond = conditions(chosen, found.model)[0]
    steps = max(student.plans) if chosen.steps is None else chosen.steps
    calls = looked_at(student, chosen.n, cond, steps=steps, seed=chosen.seed, extras={**extras})
    write_atomically(out, sheet(as_pictures(student, calls), 2 * len(calls) + 1, side=56))
    print("\n".join([*in_words(calls), str(out)]))
