"""The tools behind the documentation site: equations become MathML, docstrings become Markdown."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[2]


def test_an_equation_becomes_mathml() -> None:
    """Rows are aligned, names stay in one piece and apart from what follows; an unknown command is an error."""
    mathml = runpy.run_path(str(ROOT / "tools" / "docs_hook.py"))["mathml"]
    made = mathml(r"\begin{aligned} x &\sim \mathrm{clip}(x) \\ &= \cos^2 t \end{aligned}", block=True)
    assert made.count("<mtr>") == 2 and "<mi>clip</mi>" in made and "&#x0223C;" in made
    assert '<mn>2</mn></msup><mspace width="0.167em" /><mi>t</mi>' in made
    with pytest.raises(ValueError, match="unknown command"):
        mathml(r"\nosuchthing x", block=False)


def test_every_equation_of_the_pages_is_known() -> None:
    """Displayed ones, without building the site; dollars come in pairs."""
    mathml = runpy.run_path(str(ROOT / "tools" / "docs_hook.py"))["mathml"]
    found = 0
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        assert text.count("$") % 2 == 0, page
        for equation in re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL):
            assert mathml(equation.strip(), block=True).startswith("<math"), page
            found += 1
    assert found > 20


def test_a_docstring_becomes_markdown() -> None:
    """Literals, roles, blocks and examples, as the reference shows them."""
    markdown = runpy.run_path(str(ROOT / "tools" / "docstrings.py"))["markdown"]
    with griffe.temporary_visited_module("def f(): ...\n") as module:
        text = "See :func:`f` and :class:`Nowhere` for ``a_b *c*``::\n\n    x = 1\n\nso.\n\n>>> f()\n"
        made = markdown(text, module)
    assert '<autoref optional identifier="module.f">`f`</autoref> and `Nowhere` for `a_b *c*`:' in made
    assert "```text\nx = 1\n```" in made and "```python\nf()\n```" in made
