"""Flags made from dataclasses: every field, typed, with its default."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from fewstep.cli import Parser, distill
from fewstep.cli.errors import UserError
from fewstep.cli.flags import Parameter, as_words, check, from_json, given, help_for, metavar, of_dataclass, read
from fewstep.cli.methods import build, parameters
from fewstep.cli.settings import SETTINGS
from fewstep.methods import RECIPES, recipe_class
from fewstep.runs.record import plain


@dataclass(frozen=True)
class Everything:
    """One of each.

    ``rate`` is a float (0 to 1), ``many`` the list, ``pair`` and ``maybe`` share a clause; ``choice`` says which.
    A sentence that mentions ``flag`` in the middle.
    """

    rate: float = 0.5
    count: int = 3
    many: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.9, 0.99)
    maybe: float | None = None
    choice: Literal["one", "two"] = "one"
    flag: bool = True
    word: str = "x"


def parsed(cls: type, *words: str) -> dict[str, object]:
    parser = Parser("test", "")
    found = of_dataclass(cls)
    group = parser.add_argument_group("all")
    for parameter in found:
        parameter.add_to(group)
    return given(found, parser.parse(words))


def test_every_type_reads_its_words() -> None:
    """All field types that methods use, from words on a command line; flags that are not given leave no trace."""
    words = ["--rate=0.25", "--count", "7", "--many", "1,2,4", "--pair=0.5,0.75", "--maybe", "2", "--choice", "two"]
    words += ["--no-flag", "--word", "y"]
    expected = Everything(0.25, 7, (1, 2, 4), (0.5, 0.75), 2.0, "two", False, "y")
    assert Everything(**parsed(Everything, *words)) == expected  # type: ignore[arg-type]
    assert parsed(Everything) == {}
    assert parsed(Everything, "--maybe", "none", "--flag", "--rate=1e-3", "--many", "(4,)") == {
        "maybe": None, "flag": True, "rate": 1e-3, "many": (4,)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (int, "1.5", "not a whole number"),
        (int, "ten", "not a whole number"),
        (int, "", "not a whole number"),
        (float, "fast", "not a finite number"),
        (float, "nan", "not a finite number"),
        (float, "inf", "not a finite number"),
        (tuple[int, ...], "", "not a list"),
        (tuple[int, ...], "1,x", "not a whole number"),
        (tuple[float, float], "1", "has 1 values, 2 are needed"),
        (Literal["one", "two"], "tow", "did you mean 'two'"),
        (float | None, "nothing", "not a finite number"),
    ],
)
def test_wrong_words_are_explained(kind: object, word: str, message: str) -> None:
    """What is wrong with a word, for every type."""
    with pytest.raises(ValueError, match=message):
        read(kind, word)


@pytest.mark.parametrize(
    ("kind", "value"), [(int, True), (int, 1.0), (float, "1"), (float, True), (bool, 1), (str, 3), (tuple[int, ...], 1)]
)
def test_json_values_are_not_converted(kind: object, value: object) -> None:
    """A recipe file says 1 or true or "1", and only the right one is taken."""
    with pytest.raises(ValueError, match="is not"):
        check(kind, value)


def test_json_lists_and_whole_floats_are_taken() -> None:
    """JSON has no tuples, and writes 1.0 as 1 when people edit it."""
    assert check(tuple[int, ...], [1, 2]) == (1, 2)
    assert check(float, 1) == 1.0
    assert check(float | None, None) is None


def test_help_comes_from_the_docstring() -> None:
    """The clause that begins with a field, or that mentions it, is its help."""
    texts = [" ".join((Everything.__doc__ or "").split())]
    assert help_for("rate", texts) == "a float (0 to 1)"
    assert help_for("many", texts) == "the list"
    assert help_for("pair", texts) == "pair and maybe share a clause"
    assert help_for("choice", texts) == "says which"
    assert help_for("flag", texts) == "a sentence that mentions flag in the middle"
    assert help_for("lr", texts) == "learning rate"
    assert metavar(tuple[int, ...]) == "N,N,.." and metavar(float | None) == "X|none"


@pytest.mark.parametrize("method", RECIPES)
def test_every_hyper_parameter_is_a_flag(method: str) -> None:
    """For every method: a flag for every field, whose default reads back as itself and whose help says something."""
    cls = recipe_class(method)
    found = parameters(method)
    assert [p.name for p in found] == [f.name for f in dataclasses.fields(cls)]
    for parameter in found:
        assert parameter.default == getattr(cls(), parameter.name)
        assert parameter.help, f"{method}: nothing says what {parameter.name} is"
        if parameter.kind is not bool:
            again = parameter.read(as_words(parameter.default))
            # six digits are shown: defaults have no more
            assert again == parameter.default and type(again) is type(parameter.default)


@pytest.mark.parametrize("method", RECIPES)
def test_flags_reach_the_method(method: str) -> None:
    """All flags of a method at once, at their defaults, beside those that every run has, make the default method."""
    words = [method, "--teacher", "digits"]
    for parameter in parameters(method):
        if parameter.kind is bool:
            words.append(f"--{'' if parameter.default else 'no-'}{parameter.name.replace('_', '-')}")
        else:
            words += [parameter.flag, as_words(parameter.default)]
    parser = Parser("fewstep distill", "")
    distill.add_arguments(parser, words)
    values = given(parameters(method), parser.parse(words))
    assert len(values) == len(parameters(method))
    assert build(method, values) == recipe_class(method)()


@pytest.mark.parametrize("method", RECIPES)
def test_recipes_survive_json(method: str) -> None:
    """The hyper-parameters of every method, written to JSON and read back, make an equal method."""
    recipe = recipe_class(method)()
    assert build(method, plain(dataclasses.asdict(recipe))) == recipe


def test_unknown_names_in_a_recipe_are_refused() -> None:
    """A misspelt hyper-parameter does not silently leave the default."""
    with pytest.raises(UserError, match="has no 'critic_step'; did you mean 'critic_steps'"):
        from_json(parameters("dmd2"), {"critic_step": 3}, "method dmd2")


def test_a_flag_of_no_known_type_is_a_bug() -> None:
    """A field that no word can stand for raises when it is read, so the tests above notice it."""
    with pytest.raises(TypeError, match="no word can stand for"):
        Parameter("x", complex, 0j).read("1")


def test_flags_are_not_abbreviated() -> None:
    """``--budge`` is a mistake, not ``--budget``: recipes of later versions may have both."""
    parser = Parser("test", "")
    group = parser.add_argument_group("settings")
    for parameter in SETTINGS:
        parameter.add_to(group)
    with pytest.raises(UserError, match="did you mean '--budget'"):
        parser.parse(["--budge", "5"])
    assert isinstance(parser, argparse.ArgumentParser)
