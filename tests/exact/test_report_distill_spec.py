"""The pictures of a DistillSpec run: every token is there once, marked as what it is."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import fewstep as fs
from fewstep.data import Dataset
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import GRULanguageModel
from fewstep.report.tasks.distill_spec import ACCEPTED, REJECTED, bars, decoded, figures, text_html

LENGTH, PROMPT = 20, 3


def model(seed: int) -> NetworkLanguageModel:
    torch.manual_seed(seed)
    return NetworkLanguageModel(GRULanguageModel(4, LENGTH, width=8), 4, LENGTH, "ab <")


def course(tmp_path: Path) -> Any:
    names = {role: str(fs.save(model(i), tmp_path / role)) for i, role in enumerate(("teacher", "student"))}
    note = SimpleNamespace(teacher=names["teacher"], given={"student": names["student"]}, arguments={"prompt": PROMPT})
    return SimpleNamespace(note=note)


def test_a_text_shows_each_token_once_and_what_the_draft_had_wanted() -> None:
    prompt = torch.tensor([0, 1, 0])
    text = decoded(model(0), model(1), prompt, 0, LENGTH - PROMPT)
    page = text_html(model(0), prompt, text)
    assert page.count(ACCEPTED) == int(text.accepted.sum()) > 0
    assert page.count(REJECTED) == len(text.rejected) > 0
    kept = re.sub(rf'<span style="{re.escape(REJECTED)}">.*?</span>', "", page)
    plain = re.sub("<[^>]*>", "", kept).replace("&lt;", "<")
    assert plain == "aba" + "".join(model(0).decode(text.tokens[None]))


def test_the_draft_before_and_after_stand_beside_each_other(tmp_path: Path) -> None:
    data = Dataset("words", torch.randint(4, (3, LENGTH)))
    texts, places = figures(course(tmp_path), model(0), data)
    for figure in (texts, places):
        assert "as it was brought" in figure.html()
        assert "distilled" in figure.html()
    assert "distilled 5.67" in places.caption  # the target itself: 17 tokens in 3 calls


def test_a_run_whose_target_is_gone_has_no_pictures(tmp_path: Path) -> None:
    found = course(tmp_path)
    (tmp_path / "teacher" / "config.json").unlink()
    assert figures(found, model(0), Dataset("words", torch.zeros(2, LENGTH, dtype=torch.long))) == ()
    assert figures(SimpleNamespace(note=None), model(0), Dataset("words", torch.zeros(2, LENGTH))) == ()  # type: ignore[arg-type]


def test_bars_are_as_high_as_their_values_and_left_out_where_there_is_none() -> None:
    svg = bars({"one": (0.5, 1.0), "two": (0.25, float("nan"))})
    assert re.findall(r'<rect [^>]*height="([\d.]+)" fill="[^"]*"><title>([^<]*)', svg) == [
        ("60.0", "one, place 1: 0.50"), ("120.0", "one, place 2: 1.00"), ("30.0", "two, place 1: 0.25"),
    ]  # fmt: skip
