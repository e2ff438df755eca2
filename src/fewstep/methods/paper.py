"""Where a method comes from, and what the catalogue says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: How well our reading of a paper is backed: against the authors' code, by its text alone, or with choices of ours.
Evidence = Literal["verified", "from paper text", "reconstructed"]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, and what here differs from it."""

    title: str
    arxiv: str
    evidence: Evidence
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A published system that a method class makes work: its row in the catalogue.

    ``needs`` and ``calls`` (of the network, a sample) are a few words for people; ``page`` is the page under
    ``docs/systems/``, by default the method's name; ``real`` the file of ``tests/real/`` that tries it on data.
    """

    name: str
    year: int
    family: str
    needs: str
    calls: str
    about: str
    page: str = ""
    real: str = "students"
