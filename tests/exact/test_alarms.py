"""Instabilities are named once, counted in the records, and the run goes on to a usable end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.alarm import Alarm, Falls, Grows, Stays
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Progress, Update
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train


@dataclass(frozen=True)
class Exploding(Denoising):
    """Logs a scalar that doubles every step."""

    name: ClassVar[str] = "exploding"
    unstable: ClassVar[dict[str, Alarm]] = {"model/size": Grows("lower lr")}

    growth: float = 2.0

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        for update in super().updates(nets, batch, progress):
            yield Update("model", update.loss, {"size": self.growth**progress.step})


def run(growth: float, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict], str]:
    teacher = NetworkDenoiser(MLP((2,), 8, 1), TrigFlow(), TrigPrediction(), (2,))
    data = Dataset("points", torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    settings = Settings(Budget(8), batch=4, precision="fp32", log_steps=1)
    result = train(Exploding(growth=growth), Start(teacher, data), settings)
    return result.records, capsys.readouterr().err


def test_growth_is_named_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    records, said = run(2.0, capsys)
    assert [line.get("alarms", 0) for line in records] == [0, 0, 0, 0, 0, 1, 1, 1]  # 2^5 is the first above 20
    assert said.count("unstable:") == 1
    assert "unstable: model/size is 32 times what it was at the start (step 6): lower lr" in said
    records, said = run(1.4, capsys)
    assert not any("alarms" in line for line in records) and "unstable" not in said


def test_the_first_value_is_that_of_the_whole_run() -> None:
    """A resumed run compares with the records of before; a scalar that starts at 0 counts from its first value."""
    lines = [{"step": 1, "a": 0.0}, {"step": 2, "a": 0.5}]
    grows = Grows("", times=20.0)
    assert grows.found("a", {"a": 10.0}, lines) is None
    assert grows.found("a", {"a": -12.0}, lines) == "a is 24 times what it was at the start"
    assert grows.found("b", {"b": 1e9}, lines) is None


def test_samples_that_become_alike_are_noticed_against_the_most_diverse_record() -> None:
    """A student may start out blurred: only a fall counts, from wherever it was highest."""
    falls, lines = Falls("", share=0.5), [{"std": 0.2}, {"std": 0.8}, {"loss": 1.0}, {"std": 0.6}]
    assert falls.found("std", {"std": 0.41}, lines) is None
    assert falls.found("std", {"std": 0.2}, lines) == "std has fallen to 25 % of its highest value"
    assert falls.found("std", {"std": 0.0}, []) is None
    assert falls.found("std", {"loss": 0.0}, lines) is None


def test_a_game_is_won_when_one_side_is_ahead_for_several_records() -> None:
    stays, ahead = Stays("", bound=0.9, records=3), [{"right": 0.95}, {"loss": 1.0}, {"right": 0.99}]
    assert stays.found("right", {"right": 0.91}, ahead) == "right has stayed above 0.9 for 3 records"
    assert stays.found("right", {"right": 0.9}, ahead) is None
    assert stays.found("right", {"right": 1.0}, ahead[1:]) is None
    assert stays.found("right", {"right": 1.0}, [{"right": 1.0}, {"right": 0.5}, {"right": 1.0}]) is None
    assert stays.found("right", {"loss": 1.0}, ahead) is None


def test_methods_with_tangents_name_theirs() -> None:
    assert set(ContinuousConsistencyDistillation.unstable) <= set(ContinuousConsistencyDistillation.healthy)
