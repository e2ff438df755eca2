"""The plots of a report: matplotlib drawings as inline SVG whose colours and fonts are the page's own.

matplotlib is asked for placeholder colours, which become CSS variables, and for text as text, so that one drawing reads
well on light and dark pages and on paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Placeholder colour -> CSS variable of the page.
INK, FAINT, GRID = "#010101", "#020202", "#030303"
STUDENTS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--line"} | {c: f"--s{i}" for i, c in enumerate(STUDENTS)}


@dataclass(frozen=True)
class Series:
    """Points of one model: network calls, value, standard error (NaN: none); ``colour`` is one of the placeholders."""

    name: str
    colour: str
    points: tuple[tuple[float, float, float], ...]


def variable(colour: str) -> str:
    """The CSS variable that stands for a placeholder colour."""
    return _VARIABLES[colour]


def student_colour(index: int) -> str:
    """The colour of the ``index``-th student; they repeat after six."""
    return STUDENTS[index % len(STUDENTS)]


def against_calls(
    series: Sequence[Series], title: str, floor: float | None = None, floor_name: str = "", logarithmic: bool = True
) -> str:
    """A quantity against the number of network calls (logarithmic) with error bars; ``floor`` is a dashed line."""
    with _style():
        figure, axes = _figure(4.7, 3.5)
        axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
        for i, one in enumerate(series):
            # models with equal calls are set a little apart, so that their error bars can be told from one another
            apart = 1.035 ** (i - (len(series) - 1) / 2)
            x, y, error = ([float(v) for v in column] for column in zip(*one.points, strict=True))
            bars = [[min(e, 0.9 * v) if logarithmic else e for e, v in zip(error, y, strict=True)], error]
            axes.errorbar(
                [v * apart for v in x], y, bars, color=one.colour, lw=1.6, elinewidth=1, capsize=2.5, marker="o",
                markersize=5.5, zorder=3 if one.colour != INK else 2, label=one.name,
            )  # fmt: skip
        if floor is not None:
            _floor(axes, floor, floor_name, [p[1] for one in series for p in one.points], logarithmic)
        calls = sorted({p[0] for one in series for p in one.points})
        axes.set_xticks(calls, [f"{c:g}" for c in calls])
        axes.minorticks_off()
        axes.set_xlim(calls[0] / 1.35, calls[-1] * 1.35)
        _value_ticks(axes, logarithmic)
        axes.set_xlabel("network calls per picture")
        axes.set_title(title, loc="left")
        return svg(figure)


def _floor(axes: Axes, floor: float, name: str, values: Sequence[float], logarithmic: bool) -> None:
    """A dashed line with its name on the side where the points are not, and room for it there."""
    axes.axhline(floor, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
    above = median(values) < floor
    low, high, at = (math.log(v) if logarithmic else v for v in (*axes.get_ylim(), floor))
    room = 0.09 * (high - low)
    low, high = (low, max(high, at + room)) if above else (min(low, at - room), high)
    axes.set_ylim(*(math.exp(v) if logarithmic else v for v in (low, high)))
    axes.annotate(
        name, (1, floor), xycoords=("axes fraction", "data"), xytext=(-2, 3 if above else -3),
        textcoords="offset points", ha="right", va="bottom" if above else "top", color=FAINT,
    )  # fmt: skip


def course(seconds: Sequence[float], values: Sequence[float], colour: str) -> str:
    """A logged scalar over the seconds of a run: every record faint, a running mean on top."""
    with _style():
        figure, axes = _figure(3.3, 1.35)
        finite = [(s, v) for s, v in zip(seconds, values, strict=True) if math.isfinite(v)]
        if finite:
            x, y = ([p[k] for p in finite] for k in (0, 1))
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.35)
            axes.plot(x, running_mean(y), color=colour, lw=1.6)
            if min(y) > 0 and max(y) > 20 * min(y):
                axes.set_yscale("log")
                axes.minorticks_off()
                _value_ticks(axes, True)
            else:
                axes.locator_params(axis="y", nbins=3)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:g} s")
        return svg(figure)


def scatter(
    x: Sequence[float], y: Sequence[float], marked: Sequence[int], x_name: str, y_name: str, colour: str
) -> str:
    """One quantity against another, some points marked."""
    with _style():
        figure, axes = _figure(4.7, 3.0)
        axes.scatter(x, y, s=18, color=colour, alpha=0.6, lw=0)
        axes.scatter([x[k] for k in marked], [y[k] for k in marked], s=90, facecolors="none", edgecolors=INK, lw=1.2)
        axes.set_xlabel(x_name)
        axes.set_title(y_name, loc="left")
        return svg(figure)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a twelfth of the values, centred, shorter at the ends."""
    half = len(values) // 24
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element that takes its colours and fonts from the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r"<style.*?</style>\s*", "", drawing, flags=re.DOTALL)  # its "*" would reach the whole page
    drawing = re.sub(r'<g id="[a-zA-Z0-9.]+_\d+">', "<g>", drawing)
    drawing = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", drawing)
    for placeholder, name in _VARIABLES.items():
        drawing = drawing.replace(placeholder, f"var({name})")
    return drawing


def _value_ticks(axes: Axes, logarithmic: bool) -> None:
    """Few, plain numbers on the value axis: 1, 2, 5 in every decade where they fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if logarithmic:
        low, high = axes.get_ylim()
        subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    return figure, axes


def _style() -> AbstractContextManager[None]:
    import matplotlib

    parameters: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "fewstep", "font.size": 8.5, "axes.titlesize": 9.5,
        "axes.titleweight": "bold", "text.color": INK, "axes.labelcolor": FAINT, "axes.titlecolor": INK,
        "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT,
        "grid.color": GRID, "grid.linewidth": 0.7, "ytick.major.size": 0, "axes.axisbelow": True,
        "text.parse_math": False,
    }  # fmt: skip
    return matplotlib.rc_context(parameters)
