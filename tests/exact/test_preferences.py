"""The losses of preference learning: gradients in closed form, limits, and what each objective accepts."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from fewstep.language.log_probs import ResponseLogProbs, response_log_probs
from fewstep.language.preferences import (
    DPO,
    Objective,
    Pair,
    REDILoss,
    SimPO,
    Symmetric,
    dpo_loss,
    redi_loss,
    sft_loss,
    simpo_loss,
    symmetric_loss,
)

VOCABULARY = 5
CHOSEN = torch.tensor([[0, 1, 2, 3, 0], [0, 4, 1, 2, 3]])
CHOSEN_MASK = torch.tensor([[False, True, True, True, False], [False, False, True, True, True]])
REJECTED = torch.tensor([[0, 1, 4, 0, 0], [0, 4, 2, 2, 0]])
REJECTED_MASK = torch.tensor([[False, True, True, False, False], [False, False, True, True, False]])


def table(seed: int = 0) -> Tensor:
    """The logits of a Markov chain, ``[V, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()


def said(logits: Tensor) -> Pair:
    """What the chain says of both responses to each of the two prompts."""
    return Pair(
        response_log_probs(logits[CHOSEN], CHOSEN, CHOSEN_MASK),
        response_log_probs(logits[REJECTED], REJECTED, REJECTED_MASK),
    )


def gradient(objective: Objective) -> Tensor:
    logits = table()
    found = said(logits)
    reference = said(table(1).detach()) if objective.reference else None
    return torch.autograd.grad(objective.loss(found, reference).mean(), logits)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8, 1.0, 1.2])
def test_the_gradient_at_one_context(alpha: float) -> None:
    """``-e_w + alpha e_l + (1 - alpha) p`` in the logits; at ``alpha = 1`` no other token is moved at all, below it all
    are pushed down, above it up."""
    logits = table()[:1].detach().expand(2, -1)[None].clone().requires_grad_()
    wanted, unwanted = 1, 3
    mask = torch.tensor([[False, True]])
    means = [response_log_probs(logits, torch.tensor([[0, v]]), mask).mean for v in (wanted, unwanted)]
    (found,) = torch.autograd.grad(redi_loss(means[0], means[1], alpha).sum(), logits)
    p = logits.detach()[0, 0].softmax(0)
    expected = (1 - alpha) * p
    expected[wanted] -= 1
    expected[unwanted] += alpha
    assert torch.allclose(found[0, 0], expected, rtol=0, atol=torch.finfo(torch.float64).eps)
    others = found[0, 0, [0, 2, 4]]
    assert bool((others == 0).all()) if alpha == 1 else bool((others.sign() == math.copysign(1, 1 - alpha)).all())
    assert bool((found[0, 1] == 0).all())


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0])
def test_a_shared_token_is_pushed_down_where_the_wrong_response_is_short(alpha: float) -> None:
    """By ``1 / |w| - alpha / |l|``: here ``|w| = 3``, ``|l| = 2``, so down from ``alpha = 2 / 3`` on."""
    logits = table()[CHOSEN[:1]].detach().requires_grad_()
    chosen = response_log_probs(logits, CHOSEN[:1], CHOSEN_MASK[:1]).mean
    rejected = response_log_probs(logits, REJECTED[:1], REJECTED_MASK[:1]).mean
    (found,) = torch.autograd.grad(redi_loss(chosen, rejected, alpha).sum(), logits)
    towards = torch.eye(VOCABULARY, dtype=torch.float64)[1] - logits.detach()[0, 0].softmax(0)
    assert torch.allclose(found[0, 0], -(1 / 3 - alpha / 2) * towards, rtol=0, atol=1e-15)
    assert bool(found[0, 0, 1] > 0) == (alpha * 3 > 2)


def test_without_wrong_responses_it_is_sft_by_length() -> None:
    logits = table()
    (expected,) = torch.autograd.grad(sft_loss(said(logits).chosen.mean).mean(), logits)
    assert torch.equal(gradient(REDILoss(alpha=0.0)), expected)
    assert not torch.equal(gradient(REDILoss(alpha=0.1)), expected)


def test_swapping_the_roles_negates_the_symmetric_loss() -> None:
    w, l = (responses.mean for responses in said(table()))  # noqa: E741
    assert torch.equal(symmetric_loss(w, l), -symmetric_loss(l, w))
    assert torch.equal(redi_loss(w, l, 1.0), symmetric_loss(w, l))
    assert torch.equal(gradient(REDILoss(alpha=1.0)), gradient(Symmetric()))


def test_simpo_becomes_symmetric_linearly() -> None:
    """The gradient of one pair is ``beta sigmoid(gamma - beta d)`` times the symmetric one, with ``d`` the margin; over
    ``beta sigmoid(gamma)`` it is off by ``beta d sigmoid(-gamma)`` in relation, in the first order of ``beta``."""
    gamma, errors = 1.0, []
    for beta in (1.0, 1e-2, 1e-4, 1e-6):
        logits = table()
        w, l = (responses.mean[:1] for responses in said(logits))  # noqa: E741
        margin = float(w - l)
        (simpo,) = torch.autograd.grad(simpo_loss(w, l, beta, gamma).sum(), logits, retain_graph=True)
        (symmetric,) = torch.autograd.grad(symmetric_loss(w, l).sum(), logits)
        scale = sigmoid(gamma - beta * margin)
        assert torch.allclose(simpo, beta * scale * symmetric, rtol=1e-13, atol=0)
        errors.append(float((simpo / (beta * sigmoid(gamma)) - symmetric).abs().max()))
        first_order = beta * abs(margin) * sigmoid(-gamma) * float(symmetric.abs().max())
        assert abs(errors[-1] / first_order - 1) < 2 * beta + 1e-6  # the next order, and rounding over 1e-6
    assert errors[1] > 90 * errors[2] > 90 * 90 * errors[3]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_starts_at_log_two() -> None:
    """Where the policy is the reference: the loss is ``log 2`` and its gradient ``-beta / 2`` times that of the margin
    of sums, not of means."""
    beta, logits = 0.3, table()
    found = said(logits)
    reference = said(table().detach())
    loss = DPO(beta=beta).loss(found, reference)
    assert torch.allclose(loss, torch.full_like(loss, math.log(2)), rtol=1e-15)
    margin = found.chosen.total - found.rejected.total
    (expected,) = torch.autograd.grad(-beta / 2 * margin.sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.allclose(got, expected, rtol=1e-14, atol=1e-17)
    with pytest.raises(ValueError, match="dpo compares with a reference, and none was given"):
        DPO().loss(found)


def test_dpo_counts_from_the_reference() -> None:
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-2.0])
    found = dpo_loss(chosen, rejected, torch.tensor([-3.0]), torch.tensor([-7.0]), 0.5)
    assert math.isclose(float(found), math.log(1 + math.exp(-0.5 * (2.0 - 5.0))), rel_tol=1e-6)


def test_simpo_asks_for_a_margin() -> None:
    found = simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=0.5)
    assert math.isclose(float(found), math.log(1 + math.exp(-1.5)), rel_tol=1e-6)


def test_damped_wrong_responses_have_a_least() -> None:
    """``alpha m e^(damping m)`` is least at ``m = -1 / damping``, ``-alpha / (e damping)``: below it the gradient has
    the other sign."""
    alpha, damping = 0.8, 2.0
    rejected = torch.tensor([-0.25, -0.5, -1.0], dtype=torch.float64, requires_grad=True)
    loss = redi_loss(torch.zeros(3, dtype=torch.float64), rejected, alpha, damping)
    (slope,) = torch.autograd.grad(loss.sum(), rejected)
    assert slope[0] > 0 and slope[1] == 0 and slope[2] < 0
    assert math.isclose(float(loss[1]), -alpha / (math.e * damping), rel_tol=1e-15)
    assert torch.equal(gradient(REDILoss(damping=0.0)), gradient(REDILoss()))
    assert not torch.allclose(gradient(REDILoss(damping=1.0)), gradient(REDILoss()))


def test_objectives_are_words() -> None:
    assert Objective.parse("redi") == REDILoss() and Objective.parse("symmetric") == Symmetric()
    for objective in (REDILoss(0.5, 1.0), REDILoss(), DPO(0.1), SimPO(1.0, 0.0), Symmetric()):
        assert Objective.parse(str(objective)) == objective
    assert str(REDILoss(alpha=0.5)) == "redi:alpha=0.5"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("redi:beta=0.1", "redi has no 'beta'"),
        ("symmetric:alpha=0.5", "symmetric has no 'alpha'"),
        ("dpo:label_smoothing=0.1", "dpo has no 'label_smoothing'"),
        ("simpo:reference=true", "simpo has no 'reference'"),
        ("redi:alpha=1.2", "REDILoss: alpha=1.2 must lie in [0, 1]"),
        ("dpo:beta=0", "DPO: beta=0 must be positive"),
        ("sympo", "'sympo' is not one of redi, symmetric, dpo, simpo; did you mean 'simpo'?"),
    ],
)
def test_what_has_no_effect_is_refused(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Objective.parse(word)


def test_means_are_normalised_before_the_batch_is_averaged() -> None:
    """A long response counts as much as a short one."""
    responses = ResponseLogProbs(torch.tensor([-30.0, -1.0]), torch.tensor([-3.0, -1.0]))
    pair = Pair(responses, ResponseLogProbs(torch.zeros(2), torch.zeros(2)))
    assert REDILoss().loss(pair).tolist() == [3.0, 1.0]
