"""DistillSpec on the letters of Shakespeare: a draft that has learned from the text is accepted more often once it has
learned from its target, and speculative decoding accepts what the measure says.

Both train for seconds; ``benchmarks/speculative.py characters`` trains longer and compares divergences and texts.  That
the draft's own texts are the better ones is not claimed: with a weak draft they are not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.data import Dataset
from fewstep.data.text import LETTERS, load_text
from fewstep.language.acceptance import measure_acceptance
from fewstep.language.distill_spec import DistillSpec
from fewstep.language.modelling import LanguageModelling
from fewstep.language.speculative import Statistics, speculative_decode, tokens_per_call
from fewstep.language_models import LanguageModel, NetworkLanguageModel
from fewstep.methods.method import Recipe
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

LENGTH, PROMPT = 32, 8


def trained(recipe: Recipe, teacher: LanguageModel, data: Dataset, steps: int, **given: LanguageModel) -> Any:
    settings = Settings(Budget(steps), batch=32, precision="fp32")
    return run_recipe(recipe, teacher, data, settings, given=given, show=False).model


def fresh(width: int) -> NetworkLanguageModel:
    torch.manual_seed(width)
    return NetworkLanguageModel(GRULanguageModel(len(LETTERS), LENGTH, width), len(LETTERS), LENGTH, LETTERS.characters)


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel, Dataset]:
    data = load_text("shakespeare", length=LENGTH)
    target = trained(LanguageModelling(lr=1e-2), fresh(64), data, 100)
    return target, trained(LanguageModelling(lr=1e-2), fresh(8), data, 100), data


def prompts() -> torch.Tensor:
    return load_text("shakespeare", "test", length=LENGTH).x[:128, :PROMPT]


def alpha(target: LanguageModel, draft: LanguageModel) -> float:
    return measure_acceptance(target, draft, prompts(), Rng(0), LENGTH - PROMPT).rate


@pytest.mark.parametrize("share", ["fixed", "draft"])
def test_acceptance_rises(pair: tuple[LanguageModel, LanguageModel, Dataset], share: str) -> None:
    """By 0.045 on the data's texts and 0.039 on the draft's own, from 0.605; by half of that at least."""
    target, draft, data = pair
    method = DistillSpec(**{"fixed": 0.0, "draft": 0.0, share: 1.0}, prompt=PROMPT, lr=5e-3)  # type: ignore[arg-type]
    aligned = trained(method, target, data, 40, student=draft)
    before, after = alpha(target, draft), alpha(target, aligned)
    assert after > before + 0.02


def test_speculative_decoding_accepts_what_was_measured(pair: tuple[LanguageModel, LanguageModel, Dataset]) -> None:
    """Over some 800 examined tokens: four standard errors, and as much for the tokens a call."""
    target, draft, _ = pair
    told = Statistics()
    for i, prompt in enumerate(prompts()[:40]):
        told += speculative_decode(target, draft, prompt, Rng(i), LENGTH - PROMPT, gamma=1).statistics
    rate = alpha(target, draft)
    error = 4 * 0.5 / sum(told.examined) ** 0.5
    assert told.acceptance == pytest.approx(rate, abs=error)
    assert told.block_efficiency == pytest.approx(tokens_per_call(rate, 1), abs=1.2 * error)
