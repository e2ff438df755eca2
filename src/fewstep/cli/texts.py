"""``fewstep sample`` of a language model: its text after a prompt, by itself or with a draft beside it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.cli.models import Named
    from fewstep.language.decoding import Decoding
    from fewstep.language.speculative import Decoded

#: Tokens after the prompt, and of them how many are drafted at a time, where nobody says.
LENGTH, GAMMA = 64, 7
#: Flags that are about a draft.
OF_DRAFT = ("gamma", "lenience")
#: Flags that mean something to other models alone, beside those of solvers.
OF_SAMPLES = ("steps", "labels", "extra", "cond", "out")
#: How accepted tokens stand out in a terminal, and the prompt stands back.
ACCEPTED, FAINT = "black on green", "dim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a text goes on."""
    group = parser.add_argument_group("of a language model")
    group.add_argument("--draft", metavar="MODEL", help="decode speculatively: a small model that writes ahead")
    group.add_argument("--length", metavar="N", type=int, help=f"tokens after the prompt, at most (default {LENGTH})")
    group.add_argument("--temperature", metavar="X", type=float, help="default 1; 0 takes the most likely token")
    group.add_argument("--top-k", metavar="N", type=int, help="how many of the most likely tokens stay (default all)")
    group.add_argument("--top-p", metavar="X", type=float, help="mass of the most likely tokens that stay (default 1)")
    group.add_argument("--end", metavar="TOKEN", type=int, help="number of the token that ends a text (default none)")
    group.add_argument("--gamma", metavar="N", type=int, help=f"tokens drafted at a time (default {GAMMA})")
    group.add_argument(
        "--lenience", metavar="KIND:EPS",
        help="accept more of the draft and leave the target's law: linear:EPS, square:EPS or power:EPS, EPS in (0, 1]",
    )  # fmt: skip


def flags() -> list[str]:
    """The flags of language models."""
    alone = argparse.ArgumentParser(add_help=False)
    add_arguments(alone)
    return list(vars(alone.parse_args([])))


def refuse_for_samples(found: Named, chosen: argparse.Namespace) -> None:
    """:class:`UserError` for a flag of language models beside another."""
    for flag in flags():
        if getattr(chosen, flag) is not None:
            raise UserError(f"--{word(flag)} is for language models: '{found.name}' is {found.kind.called}")


def run(found: Named, chosen: argparse.Namespace, of_solvers: Sequence[str]) -> None:
    """Print the texts, accepted tokens marked where a terminal can show it, and what they cost; ``of_solvers`` are the
    flags of those, which are refused."""
    from fewstep.cli.conditions import seeds
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.language.decoding import Decoding
    from fewstep.language.speculative import Lenience, Statistics, speculative_decode
    from fewstep.randomness import Rng

    refuse(found, chosen, (*of_solvers, *OF_SAMPLES))
    said = {name: getattr(chosen, name) for name in ("temperature", "top_k", "top_p")}
    decoding: Decoding = Decoding(**{name: value for name, value in said.items() if value is not None})
    lenience = Lenience.parse(chosen.lenience or "lossless")
    draft = found if chosen.draft is None else named_model(chosen.draft)
    if draft.kind.task != "language":
        raise UserError(f"--draft '{draft.name}' is {draft.kind.called}, not a language model")
    speaker = draft if found.kind.tokenizer is None else found
    device = device_of(chosen.device)
    prompt = prompt_of(chosen.prompt, speaker).to(device)
    target, writer = found.model.to(device), draft.model.to(device)
    length = min(LENGTH, target.length - len(prompt)) if chosen.length is None else chosen.length
    gamma = 0 if chosen.draft is None else GAMMA if chosen.gamma is None else chosen.gamma
    told, began = Statistics(), time.perf_counter()
    for seed in seeds(chosen) or range(chosen.seed, chosen.seed + chosen.n):
        text = speculative_decode(
            target, writer, prompt, Rng(seed, "sample", device=device), length, gamma=gamma, decoding=decoding,
            lenience=lenience, end=chosen.end,
        )  # fmt: skip
        told += text.statistics
        show(speaker.model, prompt, text)
    seconds = time.perf_counter() - began
    calls = f"{told.tokens} tokens, {told.target_calls} calls of the target, {told.block_efficiency:.2f} tokens a call"
    rate = f", {told.acceptance:.3f} of the tokens looked at accepted" if sum(told.examined) else ""
    print(f"{calls}{rate}, {seconds:.2f} s, {1000 * seconds / told.tokens:.1f} ms a token")


def refuse(found: Named, chosen: argparse.Namespace, of_samples: Sequence[str]) -> None:
    """:class:`UserError` for a flag that a language model has no use for, and for one of a draft without any."""
    for flag in of_samples:
        if getattr(chosen, flag) not in (None, False, []):
            raise UserError(f"--{word(flag)} is for pictures: '{found.name}' is {found.kind.called}, which writes text")
    for flag in OF_DRAFT:
        if getattr(chosen, flag) is not None and chosen.draft is None:
            raise UserError(f"--{flag} is about a draft: name one with --draft")
    if chosen.prompt is None:
        raise UserError(f"--prompt is missing: '{found.name}' is {found.kind.called} and goes on from a text")


def word(flag: str) -> str:
    """A flag as it is written."""
    return {"labels": "class"}.get(flag, flag.replace("_", "-"))


def prompt_of(text: str, speaker: Named) -> Tensor:
    """``--prompt`` as tokens ``[L]``: by the model's tokenizer, or as their numbers where there is none."""
    import torch

    tokenizer = speaker.kind.tokenizer
    if tokenizer is not None:
        tokens = tokenizer.encode(text)
    else:
        try:
            tokens = torch.tensor([int(number) for number in text.split()], dtype=torch.long)
        except ValueError:
            raise UserError(
                f"--prompt: '{speaker.name}' has no tokenizer; give the numbers of tokens, such as '5 0 12'"
            ) from None
        vocabulary = speaker.kind.tokens or 0
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise UserError(f"--prompt: '{speaker.name}' has the tokens 0 to {vocabulary - 1}")
    if not len(tokens):
        raise UserError(f"--prompt '{text}' has no token, and a language model needs one to begin with")
    return tokens


def show(model: Any, prompt: Tensor, text: Decoded) -> None:
    """A text after its prompt, the draft's tokens marked; plain where that is no terminal."""
    import torch
    from rich.text import Text

    from fewstep.cli.terminal import console

    pieces = model.pieces(torch.cat([prompt, text.tokens]))
    line = Text().append("".join(pieces[: len(prompt)]), style=FAINT)
    for piece, accepted in zip(pieces[len(prompt) :], text.accepted.tolist(), strict=True):
        line.append(piece, style=ACCEPTED if accepted else None)
    console().print(line, soft_wrap=True)
