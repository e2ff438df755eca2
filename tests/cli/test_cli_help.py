"""Help is instant and complete."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time

import pytest

from fewstep.cli import COMMANDS, main
from fewstep.cli.methods import summary as summary_of
from fewstep.methods import RECIPES, recipe_class

#: The help of ``train``, and of a method, is made from classes that need torch.
INSTANT = [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS if name != "train")]


@pytest.mark.parametrize("words", INSTANT, ids=" ".join)
def test_help_does_not_import_torch(words: list[str]) -> None:
    """Neither torch nor rich is loaded for a help text: they are most of the start-up time."""
    script = f"from fewstep.cli import main; import sys; assert main({words}) == 0; "
    script += "assert not {'torch', 'rich'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


def test_help_starts_in_under_a_second() -> None:
    """The best of three starts: about 0.1 s where this was written, of which Python itself takes half."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fewstep.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """``fewstep``, ``fewstep help`` and ``fewstep --help`` print the same list of all commands."""
    texts = []
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    for name, command in COMMANDS.items():
        assert f"  {name} " in texts[0]
        assert command.summary in texts[0]


def test_distill_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    """The list of methods, read from the sources without importing them, says what the classes say."""
    assert main(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    for name, place in RECIPES.items():
        summary = summary_of(place)
        first = " ".join((recipe_class(name).__doc__ or "").replace("``", "").split())
        assert summary.removesuffix(" ...")[:30] in first.replace(":class:`", ""), name
        assert f"  {name} " in text
        assert summary in text


@pytest.mark.parametrize("method", RECIPES)
def test_the_help_of_a_method_explains_it(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Paper, evidence, every deviation and every hyper-parameter with its default are in ``distill METHOD --help``."""
    assert main(["distill", method, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    paper = recipe_class(method).paper
    assert f"{paper.title} (arXiv {paper.arxiv}); evidence: {paper.evidence}" in text
    for deviation in paper.deviations:
        assert deviation in text
    for field in dataclasses.fields(recipe_class(method)):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", text)  # a comma before --no-..


def test_the_help_of_train_follows_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of a network, a schedule and a prediction appear when that one is chosen."""
    assert main(["train", "--network", "mlp", "--schedule=VPLinear", "--prediction", "eps", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  --beta-max" in text and "  --width" in text
    assert "  --channels" not in text and "  --sigma-data" not in text
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  --channels" in text and "  --sigma-data" in text and "  --noise-mean" in text
