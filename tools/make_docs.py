"""Write the generated pages of the documentation.

python tools/make_docs.py
"""

from __future__ import annotations

from pathlib import Path

from fewstep.catalogue import markdown


def main() -> None:
    page = Path(__file__).parent.parent / "docs" / "catalogue.md"
    page.write_text(markdown())


if __name__ == "__main__":
    main()
