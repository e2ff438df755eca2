"""REDI: right and wrong traces as the policy sees them, and how likely both became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from fewstep.data import Samples
from fewstep.language.log_probs import token_log_prob
from fewstep.language.redi import MASK, REJECTED, REJECTED_MASK
from fewstep.language_models import LanguageModel
from fewstep.report.plots import student_colour, variable
from fewstep.report.runs import RunCourse, StageCourse
from fewstep.report.tasks.figure import Figure

#: Pairs that are shown, and the tokens of each.
SHOWN, LONGEST = 6, 400
#: The log-probability at which a token is shaded most: 1 in 400 that the policy would write it.
DARKEST = -6.0
RIGHT, WRONG = student_colour(2), student_colour(0)
KINDS = {"student/chosen_log_prob": ("right", RIGHT), "student/rejected_log_prob": ("wrong", WRONG)}


def figures(course: RunCourse, model: LanguageModel, data: Samples) -> Sequence[Figure]:
    """Pairs of traces, shaded by how unlikely each token is to the policy, and the course of both log-probabilities in
    the last stage; none where the data have no pairs."""
    columns = data.rows(slice(None)).columns
    if REJECTED_MASK not in columns or not bool(columns[REJECTED_MASK].any()):
        return ()
    found = [
        Figure(
            "Right and wrong traces",
            "After each problem (faint) the right trace and the wrong one. The darker a token, the less likely it is "
            "to the policy as it now is: white is certain, full colour one in 400 or less. Where the two part, a good "
            "policy is light above and dark below.",
            f"<div>{pairs_html(model, data, columns[REJECTED_MASK].any(1).nonzero()[:SHOWN, 0])}</div>",
        )
    ]
    lines = curves(course.stages[-1])
    if lines:
        found.append(
            Figure(
                "How likely right and wrong traces became",
                "The mean log-probability of a token in the batches of the last stage. A slow decline of the right "
                "ones is usual; a plunge of both is a collapse.",
                drawing(lines),
            )
        )
    return found


def pairs_html(model: LanguageModel, data: Samples, chosen: Tensor) -> str:
    """The pairs in some rows of the data."""
    rows = data.rows(chosen)
    if rows.x is None:
        return ""
    sides = {
        "right": (rows.x, rows.columns[MASK], RIGHT),
        "wrong": (rows.columns[REJECTED], rows.columns[REJECTED_MASK], WRONG),
    }
    parts = []
    for i in range(len(rows.x)):
        lines = [f"{side}: {trace_html(model, x[i], mask[i], colour)}" for side, (x, mask, colour) in sides.items()]
        parts.append(f'<p style="font-family:var(--mono);white-space:pre-wrap">{"<br>".join(lines)}</p>')
    return "".join(parts)


@torch.no_grad()
def trace_html(model: LanguageModel, tokens: Tensor, mask: Tensor, colour: str) -> str:
    """One trace: its prompt, and each token of the response on a ground that says how unlikely it is."""
    last = int(mask.nonzero()[-1]) + 1
    device = next(model.parameters(), torch.zeros(())).device
    whole, inside = tokens[None, :last].to(device), mask[None, :last].to(device)
    log_p = token_log_prob(model(whole), whole, inside)[0].tolist()
    words = model.pieces(tokens[:last])
    first = int(mask.nonzero()[0])
    parts = [f'<span class="faint">{escape("".join(words[:first]))}</span>']
    for word, value in [*zip(words, log_p, strict=True)][first : first + LONGEST]:
        share = round(100 * min(max(value / DARKEST, 0.0), 1.0))
        ground = f"background:color-mix(in srgb, var({variable(colour)}) {share}%, transparent)"
        parts.append(f'<span style="{ground}" title="log p = {value + 0.0:.2f}">{escape(word)}</span>')
    return "".join(parts)


def curves(stage: StageCourse) -> Mapping[str, tuple[list[float], list[float]]]:
    """``(steps, values)`` of the log-probabilities that a stage logged."""
    found = {}
    for key in KINDS:
        kept = [record for record in stage.records if key in record]
        if len(kept) > 1:
            found[key] = [float(record["step"]) for record in kept], [float(record[key]) for record in kept]
    return found


def drawing(lines: Mapping[str, tuple[list[float], list[float]]]) -> str:
    """Curves over the steps of a run, as SVG."""
    wide, high, left, top = 520, 160, 52, 10
    steps = [x for xs, _ in lines.values() for x in xs]
    low = min(y for _, ys in lines.values() for y in ys)
    start, end = min(steps), max(steps)

    def place(x: float, y: float) -> str:
        return f"{left + wide * (x - start) / max(end - start, 1e-9):.1f},{top + high * y / min(low, -1e-9):.1f}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = top + high * share
        parts.append(
            f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="var(--faint)">{share * low + 0.0:.2g}</text>'
        )
    for k, (key, (xs, ys)) in enumerate(lines.items()):
        name, colour = KINDS[key]
        ink = f"var({variable(colour)})"
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        x = left + 110 * k
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.6"/>'
            f'<rect x="{x}" y="{top + high + 34}" width="10" height="10" fill="{ink}"/>'
            f'<text x="{x + 15}" y="{top + high + 43}" fill="var(--ink)">{name}</text>'
        )
    parts += [
        f'<text x="{x}" y="{top + high + 18}" text-anchor="{anchor}" fill="var(--faint)">step {step:g}</text>'
        for x, anchor, step in ((left, "start", start), (left + wide, "end", end))
    ]
    height = top + high + 52
    return (
        f'<svg viewBox="0 0 {left + wide + 10} {height}" width="{left + wide + 10}" font-family="var(--sans)" '
        f'font-size="12" role="img">{"".join(parts)}</svg>'
    )
