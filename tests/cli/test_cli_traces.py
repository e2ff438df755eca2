"""``fewstep traces``: from nothing to a policy trained by REDI and its report, as a user types it; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.cli import traces as command
from fewstep.data import load as load_data
from fewstep.language.arithmetic import Addition, Brackets
from fewstep.language.traces import attempts, traces
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng

Cli = Callable[..., Any]
SUMS = Addition(digits=1)
QUICK = "--precision fp32 --quiet --batch 32"


def test_the_whole_way(cli: Cli) -> None:
    sums = "traces addition --digits 1 --seed 4"
    out = cli(*sums.split(), "--skip", 10, "--problems", 50, "--out", "sums.safetensors").out
    assert out.startswith("sums.safetensors: 50 rows, 12 other problems held out\nlearn from it:  fewstep train policy")
    every = SUMS.prompts(100, Rng(4, "problems"))
    for split, prompts in (("train", every[10:60]), ("test", every[60:72])):
        found, expected = load_data("sums.safetensors", split), SUMS.dataset(prompts)  # type: ignore[arg-type]
        assert torch.equal(found.x, expected.x) and torch.equal(found.columns["mask"], expected.columns["mask"])
        assert found.alphabet == SUMS.symbols and [*found.columns] == ["mask"]

    words = "--method language-modelling --network gru --width 32 --lr 0.01 --budget 80steps"
    cli("train", "policy", "--data", "sums.safetensors", *words.split(), *QUICK.split())
    policy = fs.load("runs/policy")
    assert policy.alphabet == SUMS.symbols

    asked = f"{sums} --problems 60 --policy runs/policy --tries 6 --temperature 1.5"
    out = cli(*asked.split(), "--out", "pairs.safetensors").out
    expected, rng = traces(policy, SUMS, every[:60], Rng(4, "traces"), 6, temperature=1.5), Rng(4, "traces")
    tried = attempts(policy, SUMS, every[:60], rng, 6, 1.5).right
    right, pairs = int(tried.sum()), int((tried.any(1) & (~tried).any(1)).sum())
    assert 0 < right < 360
    assert out.startswith(
        f"60 problems, 360 answers: {right} right ({right / 360:.1%}), {360 - right} wrong; {int(tried.any(1).sum())} "
        f"problems solved, {pairs} of them with a wrong answer too (pairs)\n"
    )
    assert "learn from it:  fewstep distill redi --teacher runs/policy --on-alarm stop --data pairs.safetensors" in out
    found = load_data("pairs.safetensors")
    assert torch.equal(found.x, expected.x) and found.alphabet == SUMS.symbols
    assert all(torch.equal(found.columns[name], column) for name, column in expected.columns.items())
    assert torch.equal(load_data("pairs.safetensors", "test").x, SUMS.answered(every[60:75]))

    words = "distill redi --teacher runs/policy --data pairs.safetensors --on-alarm stop --budget 4steps"
    cli(*words.split(), *QUICK.split(), "--out", "runs/redi")
    words = f"{sums} --skip 60 --problems 40 --tries 1 --temperature 0 --policy runs/redi"
    out = cli(*words.split()).out
    assert out.startswith("40 problems, 40 answers: ") and out.count("\n") == 1
    cli("report", "runs/redi", "--out", "page.html")
    assert SUMS.decode(found.x[:1, :4])[0] in Path("page.html").read_text()


def test_answers_are_written_some_at_a_time(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, to every problem once, and to the rest of the problems where one part is shorter."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        problems = Brackets(brackets=4)
        net = GRULanguageModel(len(problems.symbols), problems.length, width=8)
    fs.save(NetworkLanguageModel(net, len(problems.symbols), problems.length, problems.symbols), "policy")
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(command, "AT_ONCE", 100)
    real = attempts

    def noted(policy: object, problems: object, prompts: torch.Tensor, *rest: object) -> object:
        asked.append(prompts)
        return real(policy, problems, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("fewstep.language.traces.attempts", noted)
    words = "traces brackets --brackets 4 --problems 60 --tries 4 --policy policy"
    out = cli(*words.split()).out
    assert out.startswith("60 problems, 240 answers: ")
    assert [len(part) for part in asked] == [25, 25, 10]
    assert torch.equal(torch.cat(asked), problems.prompts(60, Rng(0, "problems")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "TASK is missing: addition or brackets"),
        ("adition --out a.safetensors", "task 'adition' is unknown; did you mean 'addition'?"),
        ("addition", "--out is missing: the rule is always right"),
        ("addition --out a.npz", "--out a.npz: the name must end in .safetensors"),
        ("addition --brackets 3 --out a.safetensors", "--brackets is for brackets, not for addition"),
        ("addition --digits 4 --out a.safetensors", "digits"),
        (
            "addition --digits 1 --problems 90 --skip 20 --out a.safetensors",
            "--problems 90 and --skip 20: there are 100 problems of addition",
        ),
        ("addition --problems 0 --out a.safetensors", "--problems 0 must be at least 1"),
        ("addition --skip -1 --out a.safetensors", "--skip -1 must be at least 0"),
        ("addition --policy digits", "--policy 'digits' is a denoiser, not a language model"),
        ("addition --policy letters", "--policy 'letters' has 27 tokens, addition has 14: train it on a file of"),
        ("addition --policy short", "the model reads at most 8 tokens"),
        ("addition --policy fresh --tries 0", "--tries 0 must be at least 1"),
        ("addition --policy fresh --tries 1 --problems 3 --out a.safetensors", "of 3 problems of addition the teacher"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, said: str, cli: Cli) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for name, tokens, length in (("letters", 27, 64), ("short", 14, 8), ("fresh", 14, 10)):
            fs.save(NetworkLanguageModel(GRULanguageModel(tokens, length, width=4), tokens, length), name)
    err = cli("traces", *words.split(), code=2).err.replace("\r", "\n").strip().splitlines()
    assert said in err[-1] and not Path("a.safetensors").exists()
