"""Conditions as trees: cut, joined, dropped and led away from like tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep import conditions
from fewstep.conditions import Cond
from fewstep.denoisers import NetworkDenoiser
from fewstep.guidance import Guided
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.parts.teacher_steps import guided
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow

TEXT = {"prompt_embeds": torch.randn(4, 3, 5), "mask": torch.ones(4, 3, dtype=torch.long)}
NULL = {"prompt_embeds": torch.zeros(1, 3, 5), "mask": torch.zeros(1, 3, dtype=torch.long)}
LABELS = torch.arange(4)


class Sees(nn.Module):
    """A network whose output is the mean of what it is told."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        told = (
            torch.zeros(len(x))
            if cond is None
            else sum(v.flatten(1).float().mean(1) for v in conditions.leaves(cond).values())
        )
        return told[:, None].expand_as(x)


def denoiser(null: Cond) -> NetworkDenoiser:
    return NetworkDenoiser(Sees(), TrigFlow(), TrigPrediction(), (2,), null=null)


def test_rows_and_joins_undo_each_other() -> None:
    """Two halves joined are the whole; a repeated condition is two of it; None stays None."""
    for cond in (TEXT, LABELS, None):
        halves = [conditions.rows(cond, slice(0, 2)), conditions.rows(cond, slice(2, 4))]
        whole, twice = conditions.join(halves), conditions.repeat(cond, 2)
        for name, leaf in conditions.leaves(cond).items():
            assert torch.equal(conditions.leaves(whole)[name], leaf)
            assert torch.equal(conditions.leaves(twice)[name], torch.cat([leaf, leaf]))
        assert conditions.count(cond) == (None if cond is None else 4)
    with pytest.raises(ValueError, match="different kinds"):
        conditions.join([TEXT, {"prompt_embeds": TEXT["prompt_embeds"]}])
    with pytest.raises(ValueError, match="mask 3 rows"):
        conditions.count({**TEXT, "mask": TEXT["mask"][:3]})


def test_where_replaces_whole_rows_and_leaves_what_null_does_not_name() -> None:
    """Of a prompt and a picture only the prompt is dropped."""
    gone = torch.tensor([True, False, False, True])
    cond = {**TEXT, "picture": torch.randn(4, 1, 2, 2)}
    mixed = conditions.where(gone, NULL, cond)
    assert isinstance(mixed, dict) and mixed["picture"] is cond["picture"]
    for name in NULL:
        assert torch.equal(mixed[name][gone], NULL[name].expand(2, *NULL[name].shape[1:]))
        assert torch.equal(mixed[name][~gone], TEXT[name][~gone])
    assert torch.equal(conditions.where(gone, torch.tensor([-1]), LABELS), torch.tensor([-1, 1, 2, -1]))
    with pytest.raises(ValueError, match="unknown here"):
        conditions.where(gone, None, TEXT)
    with pytest.raises(ValueError, match="pad them to one length"):
        conditions.where(gone, NULL, {**TEXT, "prompt_embeds": torch.randn(4, 7, 5)})


def test_dropping_prompts_and_labels_draws_alike() -> None:
    """The same rows are dropped whatever the condition is made of."""
    labels = drop_condition(LABELS.repeat(64), torch.tensor([-1]), 0.3, Rng(1))
    text = drop_condition(conditions.repeat(TEXT, 64), NULL, 0.3, Rng(1))
    assert isinstance(labels, Tensor) and isinstance(text, dict)
    assert torch.equal(labels < 0, text["mask"].sum(1) == 0) and 0.2 < float((labels < 0).float().mean()) < 0.4


def test_guidance_of_a_text_model_is_guidance() -> None:
    """``guided`` leads away from the empty prompt, keeps what has none, and refuses a model that knows none."""
    x, t = torch.randn(4, 2), torch.full((4,), 0.7, dtype=torch.float64)
    cond = {**TEXT, "picture": torch.randn(4, 1, 2, 2)}
    model = denoiser(NULL)
    steered = guided(model, 7.5)
    assert isinstance(steered, Guided)
    plain, away = model(x, t, cond), model(x, t, {**NULL_ROWS, "picture": cond["picture"]})
    torch.testing.assert_close(steered(x, t, cond), away + 7.5 * (plain - away), rtol=1e-4, atol=1e-5)
    assert guided(model, 1.0) is model
    with pytest.raises(ValueError, match=r"guidance=7\.5"):
        guided(denoiser(None), 7.5)


NULL_ROWS = {name: leaf.expand(4, *leaf.shape[1:]) for name, leaf in NULL.items()}


def test_a_model_says_what_no_condition_is() -> None:
    """-1 for class labels, through every view; None where there is none."""
    labelled = NetworkDenoiser(Sees(), TrigFlow(), TrigPrediction(), (2,), classes=3)
    assert torch.equal(labelled.on(TrigFlow(t_max=1.0)).null, torch.tensor([-1]))
    assert torch.equal(guided(labelled, 2.0).null, torch.tensor([-1]))
    assert denoiser(NULL).on(TrigFlow(t_max=1.0)).null is NULL and denoiser(None).null is None
