"""``fewstep sample`` of language models: the text that Python decodes, with a draft and without, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.data.text import LETTERS
from fewstep.language.decoding import SAMPLED, Decoding
from fewstep.language.rollouts import rollout
from fewstep.language.speculative import Decoded, Lenience, Statistics, speculative_decode
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.randomness import Rng

Cli = Callable[..., Any]
PROMPT = "Romeo, "


@pytest.fixture
def pair(cli: Cli) -> tuple[NetworkLanguageModel, NetworkLanguageModel]:
    """A target and a draft, in folders of these names."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        nets = CausalTransformer(27, 40, width=16, blocks=1, heads=2), GRULanguageModel(27, 40, width=8)
    target, draft = (NetworkLanguageModel(net.requires_grad_(False), 27, 40, LETTERS.characters) for net in nets)
    fs.save(target, "target")
    fs.save(draft, "draft")
    return target.eval(), draft.eval()


def decoded(
    pair: tuple[NetworkLanguageModel, NetworkLanguageModel], seed: int, length: int, gamma: int,
    decoding: Decoding = SAMPLED, lenience: str = "lossless", end: int | None = None,
) -> Decoded:  # fmt: skip
    return speculative_decode(
        *pair, LETTERS.encode(PROMPT), Rng(seed, "sample"), length, gamma=gamma, decoding=decoding,
        lenience=Lenience.parse(lenience), end=end,
    )  # fmt: skip


def text_of(text: Decoded) -> str:
    return "romeo" + LETTERS.decode(text.tokens[None])[0]


def test_a_draft_writes_ahead(cli: Cli, pair: tuple[NetworkLanguageModel, NetworkLanguageModel]) -> None:
    """Where no terminal is, the text is plain; the counts are those of all texts."""
    words = "--length 30 --gamma 3 --temperature 0.8 --top-k 20 --top-p 0.95 --lenience square:0.5 --end 4 --n 2"
    out = cli("sample", "target", "--draft", "draft", "--prompt", PROMPT, "--seed", 5, *words.split()).out.splitlines()
    expected = [decoded(pair, seed, 30, 3, Decoding(0.8, 20, 0.95), "square:0.5", 4) for seed in (5, 6)]
    assert out[:-1] == [text_of(text) for text in expected]
    told = sum((text.statistics for text in expected), Statistics())
    assert out[-1].startswith(
        f"{told.tokens} tokens, {told.target_calls} calls of the target, {told.block_efficiency:.2f} tokens a call, "
        f"{told.acceptance:.3f} of the tokens looked at accepted, "
    )
    assert not Path("target.png").exists()


def test_a_model_writes_by_itself(cli: Cli, pair: tuple[NetworkLanguageModel, NetworkLanguageModel]) -> None:
    """Greedy, to the length of the model or 64: what a roll-out writes, one call a token."""
    out = cli("sample", "target", "--prompt", PROMPT, "--temperature", 0).out.splitlines()
    made = rollout(pair[0], LETTERS.encode(PROMPT)[None], Rng(0), 35, temperature=0.0)
    assert out[0] == LETTERS.decode(made.tokens)[0]
    assert out[1].startswith("35 tokens, 35 calls of the target, 1.00 tokens a call, ")
    assert "accepted" not in out[1]


def test_in_a_terminal_accepted_tokens_are_marked(
    cli: Cli, pair: tuple[NetworkLanguageModel, NetworkLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = cli("sample", "target", "--draft", "draft", "--prompt", PROMPT, "--length", 20).out.splitlines()[0]
    text = decoded(pair, 0, 20, 7)
    assert 0 < int(text.accepted.sum()) < 20
    marked = "".join(re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", line))
    kept = zip(LETTERS.decode(text.tokens[:, None]), text.accepted.tolist(), strict=True)
    assert marked == "".join(letter for letter, accepted in kept if accepted)
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == text_of(text)


def test_without_a_tokenizer_the_prompt_is_numbers(cli: Cli) -> None:
    net = GRULanguageModel(11, 20, width=4)
    fs.save(NetworkLanguageModel(net, 11, 20), "numbers")
    out = cli("sample", "numbers", "--prompt", "3 10", "--length", 2).out
    assert re.fullmatch(r"3 10 \d+ \d+", out.splitlines()[0])
    for prompt, said in {"to be": "has no tokenizer", "3 11": "has the tokens 0 to 10", "": "has no token"}.items():
        assert said in cli("sample", "numbers", "--prompt", prompt, code=2).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("target", "--prompt is missing: 'target' is a language model and goes on from a text"),
        ("target --prompt a --gamma 2", "--gamma is about a draft: name one with --draft"),
        ("target --prompt a --lenience power:0.5", "--lenience is about a draft"),
        ("target --prompt a --draft draft --lenience power:2", "lenience 'power:2': lossless, linear:EPS"),
        ("target --prompt a --draft draft --gamma -1", "gamma=-1"),
        ("target --prompt a --draft nobody", "nobody"),
        ("target --prompt a --draft digits", "--draft 'digits' is a denoiser, not a language model"),
        ("target --prompt a --draft other", "the draft has 11 tokens, the target 27"),
        ("target --prompt a --length 40", "1 tokens of prompt and length=40: the two models read at most 40"),
        ("target --prompt a --length 0", "length=0"),
        ("target --prompt a --temperature -1", "temperature"),
        ("target --prompt a --top-p 2", "top_p"),
        ("target --prompt a --n 0", "--n 0 must be at least 1"),
        ("target --prompt a --solver unipc", "--solver is for pictures: 'target' is a language model"),
        ("target --prompt a --class 3", "--class is for pictures"),
        ("target --prompt a --out a.png", "--out is for pictures"),
        ("digits --draft draft", "--draft is for language models: 'digits' is a denoiser"),
        ("digits --temperature 0", "--temperature is for language models"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: str, said: str, cli: Cli, pair: tuple[NetworkLanguageModel, NetworkLanguageModel]
) -> None:
    fs.save(NetworkLanguageModel(GRULanguageModel(11, 20, width=4), 11, 20), "other")
    err = cli("sample", *words.split(), code=2).err
    assert said in err and err.count("\n") == 1
