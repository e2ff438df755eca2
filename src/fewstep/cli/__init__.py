"""The command line: ``fewstep COMMAND ...``.

Every command is a module of this package with two functions, ``add_arguments(parser, words)`` and ``run(chosen)``,
which may give an exit code.  Modules are imported when their command is asked for and torch only when it is needed, so
help is instant.  A user's mistake is one line on stderr and exit code 2; a bug keeps its traceback; Ctrl-C and SIGTERM
end in 130 and 143.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from fewstep import __version__
from fewstep.cli.errors import Stopped, UserError, choose, explain, suggestion

#: What the shell sees when the reader of our output went away (128 + SIGPIPE).
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """A module of this package and one line about it."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "a teacher, its students and a report page, in a few minutes on a laptop"),
    "systems": Command("systems", "the catalogue: every system, what it needs, what it gives"),
    "sample": Command("sample", "pictures from a teacher (any solver) or a student, as a PNG grid; or text"),
    "inspect": Command("inspect", "what a student sees at each of its calls, as a PNG grid"),
    "tune-steps": Command("tune_steps", "the best solver and time grid for a budget of network calls"),
    "statistics": Command("statistics", "what DPM-Solver-v3 needs to know of a teacher, made once from data"),
    "train": Command("train", "train a teacher on a data set"),
    "condense": Command("condense", "make a small data set that stands for a large one; METHOD --help says how"),
    "distill": Command("distill", "train a few-step student from a teacher; METHOD --help lists its parameters"),
    "traces": Command("traces", "a policy's right and wrong answers to problems with a rule, for REDI"),
    "evaluate": Command("evaluate", "quality and cost against the number of steps, beside the teacher's"),
    "report": Command("report", "one HTML page for several runs: pictures, quality against steps, cost"),
    "export": Command("export", "write a model as a folder that plain diffusers opens"),
    "doctor": Command("doctor", "check this installation: versions, devices, precision, bundled files"),
}

EXAMPLES = """examples:
  fewstep demo
  fewstep sample digits --solver unipc --steps 5
  fewstep distill dmd2 --teacher digits --data digits --budget 2min
  fewstep evaluate runs/dmd2-digits --data digits
  fewstep report runs/*
  fewstep export runs/dmd2-digits my-student

'fewstep COMMAND --help' says more about a command.
"""


class Parser(argparse.ArgumentParser):
    """Complains in one line (argparse prints its usage before it) and takes no abbreviated flags."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Like ``parse_args``, with the nearest flag for one that does not exist."""
        chosen, rest = self.parse_known_args(words)
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = rest[0].partition("=")[0]
            raise UserError(f"'{name}' is not an argument of {self.prog}{suggestion(name, flags)}")
        return chosen


def overview() -> str:
    """The text of ``fewstep --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fewstep COMMAND ...",
            "",
            "Generative models in a handful of network calls: better solvers at once, few-step students after a short",
            "training run.",
            "",
            "commands:",
            *lines,
            "",
            EXAMPLES,
        ]
    )


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM becomes :class:`Stopped`, so that open files are put in order on the way out.

    Not in the helpers of ``torchrun``: they write nothing, and waiting for the others they would not hear of it.
    """
    helper = os.environ.get("RANK", "0") != "0"
    if helper or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parsed(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of a command and what was asked of it."""
    command = COMMANDS[words[0]]
    module = import_module(f"fewstep.cli.{command.module}")
    parser = Parser(f"fewstep {words[0]}", module.__doc__ or command.summary)
    module.add_arguments(parser, words[1:])
    return module, parser.parse(words[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if words[0] == "--version":
        print(f"fewstep {__version__}")
        return 0
    # libraries below would talk between our lines
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    name = "fewstep"
    try:
        with sigterm_raises():
            choose("command", words[0], COMMANDS)
            name = f"fewstep {words[0]}"
            module, chosen = parsed(words)
            code = module.run(chosen)
            sys.stdout.flush()
    except SystemExit as done:  # argparse after --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        return complain(name, "stopped", 128 + signal.SIGINT)
    except Stopped as stopped:
        return complain(name, str(stopped), 128 + stopped.number)
    except BrokenPipeError:
        # what is still buffered must not fail again when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return complain(name, line, 2)
    return int(code or 0)


def complain(name: str, message: str, code: int) -> int:
    """``message`` on stderr, in one line; returns ``code``."""
    print(f"{name}: {message}", file=sys.stderr)
    return code
