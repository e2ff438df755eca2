"""JSON from outside: limits, and one line that names the file, the field, the value and what would be right."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fewstep.schemas import (
    MAX_BYTES,
    MAX_DEPTH,
    Choice,
    Map,
    Maybe,
    Place,
    Range,
    Size,
    arguments_of,
    blaming,
    check,
    fields_of,
    parse_json,
    read_json,
    read_records,
)

DAMAGED = {
    "nothing": (b"", "not valid JSON"),
    "half": (b'{"a": [1, 2', "not valid JSON"),
    "not text": (b'{"a": "\xff\xfe"}', "not valid JSON (no UTF-8 text at byte 7)"),
    "single quotes": (b"{'a': 1}", "not valid JSON (Expecting property name"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands in one object twice"),
    "60,000 levels": (b"[" * 60_000 + b"]" * 60_000, "nested deeper than 64 levels"),
    "65 levels": (b"[" * 66 + b"]" * 66, "nested deeper than 64 levels"),
    "17 MB": (b" " * (MAX_BYTES + 1), "longer than 16 MB"),
    "5,000 digits": (b"1" * 5000, "not valid JSON"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_json_is_one_line_that_names_the_file(what: str, tmp_path: Path) -> None:
    data, said = DAMAGED[what]
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "x.json")
    assert str(error.value).startswith(f"{tmp_path / 'x.json'}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_deepest_that_is_read(tmp_path: Path) -> None:
    """MAX_DEPTH levels inside the outermost one are read."""
    text = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert json.dumps(parse_json(text, "x")) == text
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json(f"[{text}]", "x")


def test_what_is_no_file(tmp_path: Path) -> None:
    """Folders, dead links and pipes are no files: reading a pipe would wait for ever."""
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "link", "pipe", "nothing"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_json(tmp_path / name)


SHAPE = {"size": tuple[Size, ...], "name": str, "at": Maybe(float | None)}
KIND = Choice("kind", {"point": {"at": float}, "box": {"inner": SHAPE}})
RIGHT: list[tuple[Any, Any, Any]] = [
    (bool, True, True), (int, 3, 3), (float, 3, 3.0), (str, "x", "x"), (dict, {"a": 1}, {"a": 1}),
    (int | None, None, None), (Literal["a", "b"], "a", "a"), (Any, [1], [1]),
    (list[int], [1, 2], [1, 2]), (tuple[int, ...], [1, 2], (1, 2)), (tuple[int, str], [1, "x"], (1, "x")),
    (Annotated[float, Range(0, 1)], 1, 1), (Annotated[float, Range(0, float("inf"))], float("inf"), float("inf")),
    (SHAPE, {"size": [1], "name": "x"}, {"size": (1,), "name": "x"}),
    ({"a": int, ...: Any}, {"a": 1, "b": []}, {"a": 1, "b": []}),
    (KIND, {"kind": "point", "at": 1}, {"kind": "point", "at": 1.0}),
    (Map("[0-9]", "a digit", str), {"1": "x"}, {"1": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value", "made"), RIGHT)
def test_what_fits(schema: Any, value: Any, made: Any) -> None:
    found = check(value, schema, Place("x.json"))
    assert found == made and type(found) is type(made)


WRONG: list[tuple[Any, Any, str]] = [
    (bool, 1, "x.json: f = 1 must be true or false"),
    (int, True, "x.json: f = true must be a whole number"),
    (int, 1.0, "x.json: f = 1.0 must be a whole number"),
    (float, float("nan"), "x.json: f = NaN must be a finite number"),
    (float, float("inf"), "x.json: f = Infinity must be a finite number"),
    (float, 10**400, "must be a finite number"),
    (float, "1.5", 'x.json: f = "1.5" must be a finite number'),
    (Annotated[float, Range(-float("inf"), float("inf"))], float("nan"), "x.json: f = NaN must be a finite number"),
    (str, None, "x.json: f = null must be text"),
    (int | None, "x", 'x.json: f = "x" must be a whole number or null'),
    (Literal[1], True, "x.json: f = true must be 1"),
    (Literal["a", "b"], "c", 'x.json: f = "c" must be one of "a", "b"'),
    (Size, 0, "x.json: f = 0 must be a whole number, at least 1"),
    (Annotated[int, Range(2, 9)], 10, "x.json: f = 10 must be a whole number from 2 to 9"),
    (tuple[Size, ...], [3, 0], "x.json: f[1] = 0 must be a whole number, at least 1"),
    (tuple[int, int], [3], "x.json: f = [3] must be a list of 2, each a whole number"),
    (list[float], "ab", 'x.json: f = "ab" must be a list, each a finite number'),
    (SHAPE, [], "x.json: f = [] must be an object"),
    (SHAPE, {"name": "x"}, "x.json: 'f.size' is missing"),
    (SHAPE, {"size": [], "name": "x", "sise": 1}, "x.json: 'f.sise' is not among size, name, at; did you mean 'size'?"),
    (KIND, {}, "x.json: 'f.kind' is missing"),
    (KIND, {"kind": "line"}, 'x.json: f.kind = "line" must be one of point, box'),
    (KIND, {"kind": []}, "x.json: f.kind = [] must be one of point, box"),
    (KIND, {"kind": "box", "inner": {"size": [-1], "name": ""}}, "x.json: f.inner.size[0] = -1 must be a whole number"),
    (Map("[0-9]", "a digit", str), {"\u0662": "x"}, "must be a digit"),
    (str, ["x" * 1000], "must be text"),
]


@pytest.mark.parametrize(("schema", "value", "said"), WRONG)
def test_what_does_not_fit_is_named(schema: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        check(value, schema, Place("x.json", "f"))
    assert said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@dataclass(frozen=True)
class Example:
    count: int
    widths: tuple[int, ...] = (1,)
    scale: float | None = None


def test_schemas_of_classes() -> None:
    """Whole numbers of constructors are counts, those in lists sizes; a dataclass that was written whole has all."""
    at = Place("x")
    assert check({"count": 0}, arguments_of(Example), at) == {"count": 0}
    with pytest.raises(ValueError, match="'widths' is missing"):
        check({"count": 0}, fields_of(Example), at)
    whole = {"count": 0, "widths": [2], "scale": None}
    assert Example(**check(whole, fields_of(Example), at)) == Example(0, (2,))
    for key, value in {"count": -1, "widths": [0], "scale": "1"}.items():
        with pytest.raises(ValueError, match=f"x: {key}"):
            check(whole | {key: value}, fields_of(Example), at)


def test_records_leave_out_what_is_damaged(tmp_path: Path) -> None:
    """Lines cut short, of another kind or too deep are left out of a log; the others stay."""
    log = tmp_path / "log.jsonl"
    lines = ['{"step": 1}', "[" * 60_000, '{"step": "x"}', "7", "\udcff", '{"step": 2, "loss": 1.5}', '{"ste']
    log.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert read_records(log, {"step": int, ...: Any}) == [{"step": 1}, {"step": 2, "loss": 1.5}]
    assert read_records(tmp_path / "none", Any) == []


def test_what_a_library_says_is_said_of_the_file() -> None:
    """Any error becomes one ValueError with the place, once; lack of memory is left alone, a missing package named."""
    with pytest.raises(ValueError, match=r"^x\.json: ZeroDivisionError: division by zero$"), blaming("x.json"):
        print(1 / 0)
    with pytest.raises(ValueError, match=r"^x\.json: a is wrong$"), blaming("x.json"), blaming("x.json"):
        raise ValueError("a is wrong\nand more")
    with pytest.raises(ImportError, match=r"^x\.json: No module named 'b'$"), blaming("x.json"):
        raise ModuleNotFoundError("No module named 'b'")
    with pytest.raises(MemoryError), blaming("x.json"):
        raise MemoryError
