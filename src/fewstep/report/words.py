"""How a report writes numbers, names and colours, as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.metrics import Estimate
from fewstep.report import plots

if TYPE_CHECKING:
    from fewstep.report.comparison import Comparison

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def calls(count: int) -> str:
    """As in "one network call", "16 network calls"."""
    return f"{_WORDS[count] if count < len(_WORDS) else count} network call{'s' * (count != 1)}"


def number(value: float) -> str:
    """Three significant digits, all of them before the point when there are more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def estimate(value: Estimate) -> str:
    """Value and error to the digits that the error allows, as in "1.23 ± 0.04"."""
    digits = 0 if value.error >= 10 else 1 if value.error >= 1 else 2
    return f"{value.value:.{digits}f}&nbsp;±&nbsp;{value.error:.{digits}f}"


def plus_minus(value: Estimate, digits: int = 2) -> str:
    """The same with a fixed number of digits and a small error, for tables."""
    return f"{value.value:.{digits}f} <small>± {value.error:.{digits}f}</small>"


def milliseconds(seconds: float) -> str:
    return number(1000 * seconds)


def factor(ratio: float) -> str:
    """A ratio of costs, with a decimal where it says something."""
    return f"{ratio:.0f}&times;" if ratio >= 10 else f"{ratio:.1f}&times;"


def duration(seconds: float) -> str:
    """As in "45 s", "1 min 40 s", "3.2 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{seconds / 3600:.1f} h"


def colour(comparison: Comparison, model: str) -> str:
    """The placeholder colour of a model: ink for the teacher, its own for every student."""
    students = list(comparison.students)
    return plots.student_colour(students.index(model)) if model in students else plots.INK


def swatch(comparison: Comparison, model: str) -> str:
    """A dot in the colour of a model."""
    return f'<span class="swatch" style="background: var({plots.variable(colour(comparison, model))})"></span>'
