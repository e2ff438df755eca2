"""REDI on sums: how far an objective may be driven, what an alarm saves, and pairs of a trained policy's own traces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewstep.data import Dataset
from fewstep.language.arithmetic import Addition
from fewstep.language.log_probs import response_log_probs
from fewstep.language.preferences import REDILoss, Symmetric
from fewstep.language.redi import FineTuning, PreferenceTuning
from fewstep.language.traces import accuracy, corrupted, traces
from fewstep.language_models import LanguageModel, NetworkLanguageModel
from fewstep.methods.start import Start
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, train

PROBLEMS = Addition()
DRAWN = PROBLEMS.prompts(4500, Rng(0, "problems"))
TRAIN, TEST = DRAWN[:4000], DRAWN[4000:]
STEPS = 30


def settings(steps: int, **more: object) -> Settings:
    return Settings(Budget(steps), 64, precision="fp32", log_steps=10, averages=(), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tuned() -> LanguageModel:
    """A small recurrent policy after fine-tuning on right answers, short of its best."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = GRULanguageModel(len(PROBLEMS.symbols), PROBLEMS.length, width=64)
    fresh = NetworkLanguageModel(net, len(PROBLEMS.symbols), PROBLEMS.length, PROBLEMS.symbols)
    made: LanguageModel = train(
        FineTuning(lr=1e-2), Start(fresh, PROBLEMS.dataset(TRAIN)), settings(400), show=False
    ).model
    return made


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Right answers, and the same with one digit exchanged."""
    return corrupted(PROBLEMS, TRAIN, Rng(1))


Run = Callable[[float, float], float]


@pytest.fixture(scope="module")
def chosen(tuned: LanguageModel, pairs: Dataset) -> Run:
    """The mean log-probability of a token of right answers after REDI with a weight and a learning rate."""
    held_out = PROBLEMS.dataset(TEST)

    def run(alpha: float, lr: float) -> float:
        objective = REDILoss(alpha)
        model = train(PreferenceTuning(objective=objective, lr=lr), Start(tuned, pairs), settings(STEPS), show=False)
        return log_prob(model.model, held_out)

    return run


@torch.no_grad()
def log_prob(model: LanguageModel, data: Dataset) -> float:
    return float(response_log_probs(model(data.x), data.x, data.columns["mask"]).mean.mean())


def test_right_answers_become_less_likely_with_the_weight_of_wrong_ones(chosen: Run) -> None:
    """Monotonically, at one learning rate.  No gain of accuracy is asked for: exchanged digits carry no news."""
    found = [chosen(alpha, 7e-4) for alpha in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] - 0.1


def test_at_a_higher_rate_the_symmetric_loss_collapses_first(chosen: Run) -> None:
    assert chosen(1.0, 1.5e-3) < chosen(0.8, 1.5e-3) - 0.3


def test_an_alarm_leaves_the_policy_of_before_the_collapse(tuned: LanguageModel, pairs: Dataset) -> None:
    """The symmetric loss at a rate that ruins the policy: told to stop, the run ends early, on weights that answer far
    more problems than those it would have ended with."""
    method = PreferenceTuning(objective=Symmetric(), lr=3e-3)

    def run(on_alarm: str) -> Result:
        return train(method, Start(tuned, pairs), settings(STEPS, on_alarm=on_alarm), show=False)

    saved, ruined = run("stop"), run("go-on")
    assert saved.steps < ruined.steps == STEPS
    assert "alarms" in saved.records[-1] and saved.records[-1]["healthy"] < saved.steps
    kept, lost = (accuracy(result.model, PROBLEMS, TEST, Rng(2)) for result in (saved, ruined))  # type: ignore[arg-type]
    assert kept > lost + 0.3


def test_a_policy_learns_from_its_own_traces(tuned: LanguageModel) -> None:
    """Pairs of right and wrong answers that the policy wrote itself: REDI sets them further apart than fine-tuning by
    length on the right ones alone does."""
    found = traces(tuned, PROBLEMS, TRAIN[:1000], Rng(3), tries=4)
    assert 100 < int(found.columns["rejected_mask"].any(1).sum()) < len(found)

    def margin(alpha: float) -> float:
        objective = REDILoss(alpha)
        run = train(PreferenceTuning(objective=objective, lr=1e-3), Start(tuned, found), settings(25), show=False)
        return run.records[-1]["student/chosen_log_prob"] - run.records[-1]["student/rejected_log_prob"]

    assert margin(0.8) > margin(0.0) + 0.05
