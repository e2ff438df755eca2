"""What the documentation site needs beyond its pages: typeset equations, and the reference in the navigation.

Equations are written ``$$ ... $$`` and ``$ ... $``. They become MathML here, so that readers need neither scripts nor
fonts from anywhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

EQUATION = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)
#: Letters that belong to one name, ``\mathrm{clip}``.
UPRIGHT = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
#: A function before or after something that would run into its name, ``\cos t``.
FUNCTION = r"(<msup><mi>(?:cos|sin)</mi><mn>2</mn></msup>|<mi>(?:cos|sin|tanh|log|exp)</mi>)"
AFTER, BEFORE = re.compile(FUNCTION + r"(?=<(?:mi|msub|mfrac)>)"), re.compile("(?<=</mi>)" + FUNCTION)
THIN = '<mspace width="0.167em" />'


def mathml(latex: str, block: bool) -> str:
    """An equation as MathML; ValueError where a command of it is unknown."""
    source = latex.replace("{aligned}", "{align*}")  # the same table, under the name that the converter knows
    source = re.sub(r"\\mathrm\{(\w)\}", r"\\mathrm \1 ", source)  # in braces it would lose its shape
    made = convert(source, display="block" if block else "inline")
    if unknown := re.search(r"\\\w*", made):
        raise ValueError(f"unknown command {unknown[0]} in the equation {latex}")
    made = BEFORE.sub(THIN + r"\1", AFTER.sub(r"\1" + THIN, made))
    made = made.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim, distributed as
    return UPRIGHT.sub(lambda name: "<mi>" + re.sub("<.*?>", "", name[0]) + "</mi>", made)


def on_page_content(page_html: str, page: Any, **kwargs: Any) -> str:
    """Typeset the equations of a page."""

    def typeset(found: re.Match[str]) -> str:
        tag, latex = found[1], html.unescape(found[2]).strip()
        try:
            made = mathml(latex[2:-2].strip(), block=tag == "div")  # without \[ and \]
        except Exception as error:
            raise PluginError(f"{page.file.src_path}: {error}") from error
        return f'<{tag} class="equation">{made}</{tag}>'

    return EQUATION.sub(typeset, page_html)


def on_config(config: Any) -> Any:
    """Put the pages that ``tools/make_docs.py`` has written into the navigation, in its order."""
    order = Path(config.docs_dir) / "reference" / ".order"
    if not order.is_file():
        raise PluginError("the reference is not written yet: run python tools/make_docs.py first")
    pages = order.read_text().split()
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in pages]})
    return config
