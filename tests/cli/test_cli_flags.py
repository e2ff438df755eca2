"""Flags made from dataclasses: every field, typed, with its default."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

import fewstep
from fewstep.cli import Parser, distill
from fewstep.cli.errors import UserError
from fewstep.cli.flags import Parameter, as_words, check, from_json, given, metavar, of_constructor, of_dataclass, read
from fewstep.cli.fresh import FROM_DATA
from fewstep.cli.methods import build, parameters
from fewstep.cli.settings import SETTINGS
from fewstep.hub.native import SCHEDULES
from fewstep.methods import RECIPES, recipe_class
from fewstep.networks import NETWORKS
from fewstep.predictions import PREDICTIONS
from fewstep.ranges import Count, Positive, Share
from fewstep.runs.record import hyper_parameters, plain
from fewstep.training.profiles import HalfLife, Power
from fewstep.training.settings import Settings
from fewstep.values import bare
from fewstep.values import plain as values_plain


@dataclass(frozen=True)
class Everything:
    """One of each."""

    rate: Annotated[Share, "how fast"] = 0.5
    count: Annotated[int, "how many"] = 3
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


def test_help_stands_at_the_field() -> None:
    """The text of an annotated field is its help; the range beside it is none, and a field without a text has none."""
    assert [p.help for p in of_dataclass(Everything)] == ["how fast", "how many", "", "", "", "", "", ""]
    assert metavar(tuple[Count, ...]) == "N,N,.." and metavar(Annotated[Positive | None, "x"]) == "X|none"


def test_every_flag_of_a_fresh_model_has_help() -> None:
    """Networks, schedules and predictions, and the settings of a run."""
    made = [of_dataclass(cls) for cls in (*SCHEDULES.values(), *PREDICTIONS.values())]
    made += [of_constructor(cls, FROM_DATA) for cls in NETWORKS.values()]
    for parameter in (parameter for group in (*made, SETTINGS) for parameter in group):
        assert parameter.help, parameter.name


def test_help_is_a_fragment_of_a_sentence() -> None:
    """Short, closed brackets and quotes, no mark-up, no full stop: not cut out of prose."""
    made = [of_dataclass(recipe_class(name)) for name in RECIPES]
    made += [of_dataclass(cls) for cls in (*SCHEDULES.values(), *PREDICTIONS.values())]
    made += [of_constructor(cls, FROM_DATA) for cls in NETWORKS.values()]
    for text in (parameter.help for group in (*made, SETTINGS) for parameter in group):
        assert len(text) < 120 and not text.endswith((".", ",", ";")) and "`" not in text, text
        assert text.count("(") == text.count(")") and text.count('"') % 2 == 0, text


def strings_of_tables(tree: ast.Module) -> Iterator[set[str]]:
    """The strings in every dict (its keys), list, tuple or set that a module assigns at its top level."""
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        parts = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
        yield {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def test_no_table_is_keyed_by_hyper_parameters() -> None:
    """A new hyper-parameter is written down once, at its field: no list of the package names two of them."""
    # a letter is a unit of a budget too
    names = {parameter.name for name in RECIPES for parameter in parameters(name) if len(parameter.name) > 1}
    root = Path(fewstep.__file__).parent
    for folder in ("methods", "cli", "training"):
        for path in (root / folder).rglob("*.py"):
            for strings in strings_of_tables(ast.parse(path.read_text())):
                assert len(strings & names) < 2, f"{path}: {strings & names}"


OUTSIDE = {
    "dmd2": {"lr": -1.0, "critic_steps": 0, "gan_weight": -0.1, "clip": 0.0, "warmup": -1},
    "cm": {"steps": (1, -2), "mu": 2.0, "grid_times": 1, "sigma_data": 0.0},
    "cm-training": {"s0": 1, "mu0": 0.0}, "scm": {"c": 0.0, "tangent_warmup": 1.5}, "pd": {"end": 0},
    "reflow": {"pairs": 0, "ode_steps": 0}, "instaflow": {"reflows": -1}, "lsd": {"share": -0.1},
    "analog-bits": {"bound": 0.0, "self_conditioning": 1.5}, "lowdiff": {"shares": (0.5, -0.5), "weights": (-1.0,)},
}  # fmt: skip


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, values in OUTSIDE.items() for name in values])
def test_a_range_has_one_message(method: str, name: str) -> None:
    """From Python, from a recipe and from a flag: ``name=value must ...``, word for word."""
    value = OUTSIDE[method][name]
    with pytest.raises(ValueError, match=f"{name}=.* must") as here:
        recipe_class(method)(**{name: value})
    with pytest.raises(ValueError) as there:
        build(method, plain({name: value}))
    parameter = next(p for p in parameters(method) if p.name == name)
    with pytest.raises(ValueError) as word:
        build(method, {name: parameter.read(as_words(value))})
    assert str(here.value) == str(there.value) == str(word.value)


@pytest.mark.parametrize(
    ("method", "values"),
    [("dmd2", {"steps": "four"}), ("dmd2", {"lr": math.nan}), ("cm", {"steps": 4}), ("cm", {"distance": "l3"})],
)
def test_a_type_has_one_message_too(method: str, values: dict[str, object]) -> None:
    """A class checks the types of its fields, as a recipe file does."""
    with pytest.raises(ValueError) as here:
        recipe_class(method)(**values)
    with pytest.raises(ValueError) as there:
        build(method, values)
    assert str(here.value).partition(": ")[2] == str(there.value).partition(": ")[2]


def test_settings_are_declared_once() -> None:
    """The flags of a run are the fields of ``Settings``, and a recipe's settings make them again."""
    assert [p.name for p in SETTINGS] == [f.name for f in dataclasses.fields(Settings)]
    given_by_words = {"budget": "20k images", "averages": "0.05,half-life:200", "batch": "32"}
    values = {p.name: p.read(given_by_words[p.name]) for p in SETTINGS if p.name in given_by_words}
    assert Settings(**values).averages == (Power(0.05), HalfLife(200.0))
    written = plain({name: values_plain(value) for name, value in values.items()})
    assert written == {"budget": "20000images", "batch": 32, "averages": [0.05, "half-life:200"]}
    assert Settings(**from_json(SETTINGS, written, "settings")) == Settings(**values)


@pytest.mark.parametrize("method", RECIPES)
def test_every_hyper_parameter_is_a_flag(method: str) -> None:
    """For every method: a flag for every field, whose default reads back as itself and whose help says something."""
    cls = recipe_class(method)
    found = parameters(method)
    assert [p.name for p in found] == [f.name for f in dataclasses.fields(cls)]
    for parameter in found:
        assert parameter.default == getattr(cls(), parameter.name)
        assert parameter.help, f"{method}: nothing says what {parameter.name} is"
        if bare(parameter.kind) is not bool:
            again = parameter.read(as_words(parameter.default))
            # six digits are shown: defaults have no more
            assert again == parameter.default and type(again) is type(parameter.default)


@pytest.mark.parametrize("method", RECIPES)
def test_flags_reach_the_method(method: str) -> None:
    """All flags of a method at once, at their defaults, beside those that every run has, make the default method."""
    words = [method, "--teacher", "digits"]
    for parameter in parameters(method):
        if bare(parameter.kind) is bool:
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
    assert build(method, plain(hyper_parameters(recipe))) == recipe


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
