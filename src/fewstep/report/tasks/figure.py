"""One picture of a page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from fewstep.report.pictures import data_uri


@dataclass(frozen=True)
class Figure:
    """A picture with its ``title`` and one or two sentences on what it shows; ``content`` is a PNG (bytes), an SVG
    drawing or other HTML (text that starts with ``<``).  ValueError for other content."""

    title: str
    caption: str
    content: bytes | str

    def __post_init__(self) -> None:
        right = self.content[:4] == b"\x89PNG" if isinstance(self.content, bytes) else self.content[:1] == "<"
        if not right:
            raise ValueError(f"figure '{self.title}': its content is neither a PNG nor HTML")

    def html(self) -> str:
        """The picture for a page."""
        shown = (
            f'<img src="{data_uri(self.content)}" alt="{escape(self.title)}" style="max-width:100%">'
            if isinstance(self.content, bytes)
            else self.content
        )
        text = f"<h2>{escape(self.title)}</h2>\n<p>{escape(self.caption)}</p>"
        return f'<section>\n{text}\n<div class="scroll">{shown}</div>\n</section>'
