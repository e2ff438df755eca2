"""Hyper-parameters that move over the budget."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from fewstep.cli.flags import from_json, of_dataclass
from fewstep.methods.method import Progress
from fewstep.methods.parts.ramp import Ramp
from fewstep.methods.teachers.denoising import Denoising
from fewstep.ranges import Least
from fewstep.runs.record import hyper_parameters


@dataclass(frozen=True)
class Guided(Denoising):
    """Denoising with a scale that moves."""

    scale: Annotated[Ramp, Least(1), "scale that moves"] = Ramp(3.0)  # noqa: RUF009


def test_a_ramp_is_a_straight_line_and_then_stays() -> None:
    ramp = Ramp(100, 50, 0.2)
    assert [ramp.at(f) for f in (0.0, 0.1, 0.2, 0.7)] == [100, 75, 50, 50]
    assert Ramp(1, 3).at(0.5) == 2 and Ramp(7).at(0.9) == 7


def test_a_ramp_along_a_cosine_and_an_exponential() -> None:
    """Half a period of the one; of the other ``exp(-1)`` of the way is left at ``until``, where it does not stop."""
    assert [Ramp(3, 1, 0.5, "cosine").at(f) for f in (0, 0.25, 0.5, 0.9)] == pytest.approx([3, 2, 1, 1])
    ramp = Ramp(3, 1, 0.25, "exponential")
    assert [ramp.at(f) for f in (0, 0.25, 0.5)] == pytest.approx([1 + 2 * math.exp(-u) for u in (0, 1, 2)])


def test_a_run_starts_with_nothing_done() -> None:
    assert dataclasses.astuple(Progress()) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("word", "ramp"),
    [
        ("100->50@0.2", Ramp(100, 50, 0.2)),
        ("1->1e-07", Ramp(1, 1e-7)),
        ("0.1", Ramp(0.1)),
        ("-1->2@0.5", Ramp(-1, 2, 0.5)),
        ("cosine:1->0@0.4", Ramp(1, 0, 0.4, "cosine")),
        ("exponential:1->0", Ramp(1, 0, course="exponential")),
    ],
)
def test_a_ramp_is_one_word(word: str, ramp: Ramp) -> None:
    """It reads what it writes."""
    assert Ramp.parse(word) == ramp and str(ramp) == word


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("1->", "'' is not a finite number"),
        ("1->2@", "'' is not a"),
        ("1->2@1.5", "until=1.5 must lie in"),
        ("a", "'a' is not"),
        ("cosin:1->0", "'cosin' is not one of linear, cosine, exponential"),
    ],
)
def test_words_that_are_none_are_explained(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Ramp.parse(word)


def test_a_ramp_comes_from_python_a_flag_and_a_recipe() -> None:
    """The same method from all of them, and a number or a word stands for it in a file."""
    parameter = next(p for p in of_dataclass(Guided) if p.name == "scale")
    assert parameter.metavar == "X|[COURSE:]X->X@SHARE" and parameter.help == "scale that moves"
    for ramp, written in ((Ramp(3, 1, 0.5), "3->1@0.5"), (Ramp(2.5), 2.5)):
        method = Guided(scale=ramp)
        assert hyper_parameters(method)["scale"] == written
        data = json.loads(json.dumps(hyper_parameters(method)))
        assert Guided(**from_json(of_dataclass(Guided), data, "guided")) == method
        assert Guided(scale=parameter.read(str(ramp))) == method
        assert Guided(scale=written) == method  # type: ignore[arg-type]


def test_a_range_bounds_both_ends() -> None:
    for ramp in (Ramp(0.5), Ramp(2, 0.5)):
        with pytest.raises(ValueError, match=r"Guided: scale=0\.5 must be at least 1"):
            Guided(scale=ramp)
