"""Problems that a rule can check, and the right and wrong traces of a policy on them: what REDI learns from.

  fewstep traces addition --out sums.safetensors                     right answers, for a policy to learn from
  fewstep traces addition --policy runs/policy --out traces.safetensors       its right and wrong answers, in pairs
  fewstep traces addition --policy runs/policy --skip 1000 --tries 1 --temperature 0     how often it is right
  fewstep traces brackets --brackets 8 --help                        the other problems

The same --seed puts problems in the same order: --skip leaves out those that were learned from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.errors import UserError, choose
from fewstep.cli.outputs import output_file

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.cli.models import Named
    from fewstep.language.arithmetic import Problems
    from fewstep.language.traces import Attempts

#: The problems by name, and what their one number says.
TASKS = {"addition": ("digits", "of each number (default 2)"), "brackets": ("brackets", "of a problem (default 6)")}
#: Answers that are written at once, and the part of the problems that is held out of a file beside them.
AT_ONCE, HELD_OUT = 4096, 4


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = f"fewstep traces {'|'.join(TASKS)} [--policy MODEL] [--out FILE] [flags]"
    parser.add_argument("task", metavar="TASK", nargs="?", help=" or ".join(TASKS))
    parser.add_argument("--policy", metavar="MODEL", help="who answers (default: the rule, which is always right)")
    parser.add_argument("--problems", metavar="N", type=int, default=1000, help="default 1000, all different")
    parser.add_argument("--skip", metavar="N", type=int, default=0, help="problems to leave out before (default 0)")
    parser.add_argument("--tries", metavar="N", type=int, default=8, help="answers to each problem (default 8)")
    parser.add_argument("--temperature", metavar="X", type=float, default=1.0, help="of the answers (default 1)")
    for task, (name, text) in TASKS.items():
        parser.add_argument(f"--{name}", metavar="N", type=int, help=f"{task}: {text}")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the file, .safetensors (default: none, counts alone)")


def run(chosen: argparse.Namespace) -> None:
    from fewstep.data.token_files import write_tokens
    from fewstep.randomness import Rng

    problems = problems_of(chosen)
    out = None if chosen.out is None else output_file("--out", chosen.out, safetensors="")
    if out is None and chosen.policy is None:
        raise UserError("--out is missing: the rule is always right, so there is nothing to count without a --policy")
    for flag, least in (("problems", 1), ("skip", 0), ("tries", 1)):
        if getattr(chosen, flag) < least:
            raise UserError(f"--{flag} {getattr(chosen, flag)} must be at least {least}")
    known, wanted = len(problems.texts), chosen.skip + chosen.problems
    if wanted > known:
        asked = f"--problems {chosen.problems} and --skip {chosen.skip}"
        raise UserError(f"{asked}: there are {known} problems of {problems.name}")
    every = problems.prompts(known, Rng(chosen.seed, "problems"))
    prompts, others = every[chosen.skip : wanted], every[wanted:][: chosen.problems // HELD_OUT]
    data = problems.dataset(prompts) if chosen.policy is None else answered(chosen, problems, prompts)
    if out is None or data is None:
        return
    held_out = problems.dataset(others) if len(others) else None
    write_tokens(data, out, held_out)
    beside = f", {len(others)} other problems held out" if len(others) else ""
    print(f"{out}: {len(data)} rows{beside}")
    print(f"learn from it:  fewstep {following(chosen)} --data {out}")


def following(chosen: argparse.Namespace) -> str:
    """The command that reads the file."""
    if chosen.policy is None:
        return "train policy --method language-modelling"
    return f"distill redi --teacher {chosen.policy} --on-alarm stop"


def problems_of(chosen: argparse.Namespace) -> Problems:
    """The problems that are asked for; :class:`UserError` for a number of other ones."""
    from fewstep.language.arithmetic import PROBLEMS

    if chosen.task is None:
        raise UserError(f"TASK is missing: {' or '.join(TASKS)}")
    choose("task", chosen.task, TASKS)
    given: dict[str, int] = {}
    for task, (name, _) in TASKS.items():
        value = getattr(chosen, name)
        if value is not None and task != chosen.task:
            raise UserError(f"--{name} is for {task}, not for {chosen.task}")
        given |= {} if value is None else {name: value}
    return PROBLEMS[chosen.task](**given)


def answered(chosen: argparse.Namespace, problems: Problems, prompts: Tensor) -> Any:
    """The pairs of a policy's answers, counted aloud; None where no file is wanted."""
    from fewstep.cli.models import named_model
    from fewstep.language.traces import pairs

    found = named_model(chosen.policy)
    if found.kind.task != "language":
        raise UserError(f"--policy '{found.name}' is {found.kind.called}, not a language model")
    if found.kind.tokens != len(problems.symbols):
        raise UserError(
            f"--policy '{found.name}' has {found.kind.tokens} tokens, {problems.name} has {len(problems.symbols)}: "
            f"train it on a file of 'fewstep traces {problems.name}'"
        )
    tried = attempts_of(found, problems, prompts, chosen)
    right, solved, failed = tried.right, tried.right.any(1), (~tried.right).any(1)
    answers, good = right.numel(), int(right.sum())
    print(
        f"{len(prompts)} problems, {answers} answers: {good} right ({good / answers:.1%}), {answers - good} wrong; "
        f"{int(solved.sum())} problems solved, {int((solved & failed).sum())} of them with a wrong answer too (pairs)"
    )
    return None if chosen.out is None else pairs(tried, problems)


def attempts_of(found: Named, problems: Problems, prompts: Tensor, chosen: argparse.Namespace) -> Attempts:
    """The answers of a policy, some at a time."""
    import torch

    from fewstep.cli.runs import device_of
    from fewstep.cli.terminal import progress
    from fewstep.language.traces import Attempts, attempts
    from fewstep.randomness import Rng

    device = device_of(chosen.device)
    policy, rng = found.model.to(device), Rng(chosen.seed, "traces", device=device)
    parts = prompts.split(max(1, AT_ONCE // chosen.tries))
    made = []
    with progress("answers") as tell:
        for i, part in enumerate(parts):
            made.append(attempts(policy, problems, part, rng, chosen.tries, chosen.temperature))
            tell((i + 1) / len(parts), "")
    return Attempts(*(torch.cat(columns) for columns in zip(*made, strict=True)))
