"""DistillSpec: what speculative decoding accepts of a draft, in a text and by the place in a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Samples
from fewstep.hub.models import load
from fewstep.language.distill_spec import DistillSpec
from fewstep.language.speculative import Decoded, Statistics, speculative_decode
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng
from fewstep.report.plots import student_colour, variable
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: Drafted tokens in a block, texts that are shown, and those that acceptance is counted over.
GAMMA, SHOWN, COUNTED = 5, 2, 24
ACCEPTED = f"background:color-mix(in srgb, var({variable(student_colour(2))}) 30%, transparent)"
REJECTED = f"color:var({variable(student_colour(0))});text-decoration:line-through;font-size:.8em"


def figures(course: RunCourse, model: LanguageModel, data: Samples) -> Sequence[Figure]:
    """A text of the target with what the draft wrote of it, before and after, and the acceptance by place in a block;
    none where the target is not to be found any more."""
    models = brought(course)
    if "teacher" not in models:
        return ()
    target, drafts = models["teacher"], {"the draft as it was brought": models.get("student"), "distilled": model}
    prompt = int(course.note.arguments.get("prompt", DistillSpec.prompt)) if course.note is not None else 1
    x = data.rows(torch.arange(min(COUNTED, len(data)))).x
    if x is None:
        return ()
    length = data.shape[0] - prompt
    texts = {
        name: [decoded(target, draft, row[:prompt], i, length) for i, row in enumerate(x)]
        for name, draft in drafts.items()
        if draft is not None
    }
    told = {name: sum((text.statistics for text in found), Statistics()) for name, found in texts.items()}
    shown = "".join(
        f"<h3>{escape(name)}</h3>" + "".join(
            text_html(target, row[:prompt], text) for row, text in zip(x[:SHOWN], found[:SHOWN], strict=True)
        )
        for name, found in texts.items()
    )  # fmt: skip
    tokens = ", ".join(f"{name} {one.block_efficiency:.2f}" for name, one in told.items())
    return (
        Figure(
            "What the draft writes",
            "The target's text after a prompt (faint): on a coloured ground what the draft wrote and the target "
            "accepted; struck out what it had wanted, before the target's own token.",
            f"<div>{shown}</div>",
        ),
        Figure(
            "Accepted by place in a block",
            f"How many of the tokens that were looked at were accepted, at each of {GAMMA} places. Tokens for each "
            f"call of the target: {tokens}.",
            bars({name: one.by_position for name, one in told.items()}),
        ),
    )


def brought(course: RunCourse) -> Mapping[str, Any]:
    """The models that a run started from, by role, as far as they still are where they were."""
    if course.note is None:
        return {}
    found = {}
    for role, name in {"teacher": course.note.teacher, **course.note.given}.items():
        try:
            found[role] = load(name)
        except (FileNotFoundError, ValueError):
            continue
    return found


def decoded(target: LanguageModel, draft: LanguageModel, prompt: Tensor, seed: int, length: int) -> Decoded:
    return speculative_decode(target, draft, prompt, Rng(seed, "report"), length, gamma=GAMMA)


def text_html(model: LanguageModel, prompt: Tensor, text: Decoded) -> str:
    """A text as HTML, its tokens marked."""
    words = model.pieces(torch.cat([prompt, text.tokens]))[len(prompt) :]
    parts = [f'<span class="faint">{escape(model.decode(prompt[None])[0])}</span>']
    for place, (word, accepted) in enumerate(zip(words, text.accepted.tolist(), strict=True)):
        if place in text.rejected:
            wanted = model.decode(torch.tensor([[text.rejected[place]]]))[0]
            parts.append(f'<span style="{REJECTED}">{escape(visible(wanted))}</span>')
        parts.append(f'<span style="{ACCEPTED}">{escape(word)}</span>' if accepted else escape(word))
    return f'<p style="font-family:var(--mono);white-space:pre-wrap">{"".join(parts)}</p>'


def visible(word: str) -> str:
    """A space that can be struck out."""
    return word.replace(" ", "\N{OPEN BOX}")


def bars(values: Mapping[str, Sequence[float]]) -> str:
    """Bars in [0, 1] by place, side by side for each name, as SVG."""
    high, wide, left = 120, 22, 30
    group = wide * len(values) + 18
    places = max(len(row) for row in values.values())
    parts = [
        f'<line x1="{left}" x2="{left + group * places}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="var(--faint)">{share:g}</text>'
        for share in (0, 0.5, 1)
        for y in (10 + high * (1 - share),)
    ]
    for k, (name, row) in enumerate(values.items()):
        colour = f"var({variable(student_colour(2 * k))})"
        for place, value in enumerate(row):
            if value == value:  # places that no token came to have none
                x, y = left + 9 + group * place + wide * k, 10 + high * (1 - value)
                parts.append(
                    f'<rect x="{x}" y="{y:.1f}" width="{wide - 3}" height="{high * value:.1f}" fill="{colour}">'
                    f"<title>{escape(name)}, place {place + 1}: {value:.2f}</title></rect>"
                )
        x = left + 150 * k
        parts.append(
            f'<rect x="{x}" y="{high + 38}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{x + 15}" y="{high + 47}" fill="var(--ink)">{escape(name)}</text>'
        )
    for place in range(places):
        middle = left + group * (place + 0.5)
        parts.append(f'<text x="{middle}" y="{high + 26}" text-anchor="middle" fill="var(--faint)">{place + 1}</text>')
    width, height = max(left + group * places, left + 150 * len(values) + 80), high + 56
    return (
        f'<svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" font-family="var(--sans)" font-size="12" '
        f'role="img">{"".join(parts)}</svg>'
    )
