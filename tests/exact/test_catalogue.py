"""The catalogue says what is true."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from fewstep.catalogue import Row, markdown, systems, systems_table
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Recipe

ROOT = Path(__file__).parents[2]


def lacking(row: Row) -> list[str]:
    """What a row that says ``works`` does not have."""
    missing = [
        field
        for field in ("exact_test", "real_test", "docs_page")
        if not (path := getattr(row, field)) or not (ROOT / path).is_file()
    ]
    if row.evidence is None:
        missing.append("evidence")
    module, _, name = (row.cls or ":").partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return [*missing, "cls"]
    if row.docs_page and f"arxiv.org/abs/{row.arxiv}" not in (ROOT / row.docs_page).read_text():
        missing.append("arxiv")
    if not isinstance(found, type) or not issubclass(found, Recipe):  # training-free: a solver, a guided denoiser
        return missing if callable(found) and found.__doc__ else [*missing, "cls"]
    told, paper = (row.title, row.arxiv, row.evidence), found.paper
    return missing if told == (paper.title, paper.arxiv, paper.evidence) else [*missing, "cls"]


@pytest.mark.parametrize("row", [r for r in systems() if r.state == "works"], ids=lambda r: r.key)
def test_a_system_that_works_has_all_it_claims(row: Row) -> None:
    """Class, exact test, real-data test, page and evidence exist."""
    assert lacking(row) == []


def test_the_check_can_fail() -> None:
    """A row without anything lacks everything."""
    row = Row("x", "X", 2024, "0", "f", "n", "1", "t", "a", "works")
    assert set(lacking(row)) == {"exact_test", "real_test", "docs_page", "evidence", "cls"}


def test_keys_are_unique_and_the_page_is_up_to_date() -> None:
    """No two rows share a key or a paper, planned rows claim nothing, and docs/catalogue.md is what the table says."""
    assert len({r.key for r in systems()}) == len({r.arxiv for r in systems()}) == len(systems()) >= 55
    for row in systems():
        if row.state == "planned":
            assert (row.cls, row.evidence, row.exact_test, row.real_test, row.docs_page) == (None,) * 5
    assert (ROOT / "docs" / "catalogue.md").read_text() == markdown()
    assert systems_table().row_count == len(systems())


def test_the_import_check_finds_a_wrong_direction(tmp_path: Path) -> None:
    """tools/check_imports.py names file, line and import, also inside a function."""
    import runpy

    check = runpy.run_path(str(ROOT / "tools" / "check_imports.py"))["violations"]
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "bad.py").write_text("def f():\n    from fewstep.training import trainer\n")
    (tmp_path / "grids.py").write_text("from fewstep import schedules\nfrom fewstep.cli import main\n")
    assert [line.split(": ", 1)[1] for line in check(tmp_path)] == [
        "grids must not import fewstep.cli", "sampling must not import fewstep.training",
    ]  # fmt: skip


def test_the_house_check_sees_what_breaks_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/check_house.py counts lines and questions after own classes, and finds a circle that closes inside a
    function; imports for type checkers only are none, and foreign classes are not counted."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    house = import_module("check_house")
    root = tmp_path / "house"
    root.mkdir()
    (root / "__init__.py").write_text("")
    own = "class Own: ...\n" + "isinstance(1, Own | int)\n" * house.CHECKS + "isinstance(1, int)\n"
    (root / "a.py").write_text(own + "from house import b\n")
    (root / "b.py").write_text("if TYPE_CHECKING:\n    from house.a import Own\n" + "x = 1\n" * (house.LINES - 2))
    assert list(house.broken(root)) == []
    (root / "b.py").write_text(
        "def f():\n    from house.a import Own\n    isinstance(1, Own)\n" + "x = 1\n" * house.LINES
    )
    found = [line.removeprefix(str(root) + "/") for line in house.broken(root)]
    assert found[0].startswith(f"b.py: {house.LINES + 3} lines, at most {house.LINES}")
    assert found[1:-2] == [*(f"a.py:{2 + i}: Own" for i in range(house.CHECKS)), "b.py:3: Own"]
    assert found[-2].startswith(f"{house.CHECKS + 1} isinstance checks against our own classes")
    assert found[-1] in ("a circle of imports: house.a -> house.b -> house.a",
                         "a circle of imports: house.b -> house.a -> house.b")  # fmt: skip


def test_pages_say_what_the_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deviations, healthy runs and the table of methods are written by tools/make_docs.py, and every page of a method
    that works has its sections."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    fill = import_module("page_sections").fill
    for page in [ROOT / "README.md", *(ROOT / "docs" / "systems").glob("*.md")]:
        assert fill(page.read_text()) == page.read_text(), f"{page}: run tools/make_docs.py"
    for name, place in RECIPES.items():
        cls = recipe_class(name)
        rows = [row for row in systems() if row.cls == place.removeprefix("fewstep.") or row.cls == place]
        if rows and cls.paper.deviations:
            page = (ROOT / str(rows[0].docs_page)).read_text()
            assert f"<!-- deviations: {name} -->" in page and "<!-- healthy: " in page, (name, rows[0].docs_page)
