"""Instabilities are named once, counted in the records, and the run goes on to a usable end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Progress, Update
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow
from fewstep.training.alarms import MOST_GROWTH, grown
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train


@dataclass(frozen=True)
class Exploding(Denoising):
    """Logs a scalar that doubles every step."""

    name: ClassVar[str] = "exploding"
    unstable: ClassVar[dict[str, str]] = {"model/size": "lower lr"}

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
    assert grown("a", {"a": 0.5 * MOST_GROWTH}, lines) is None
    assert grown("a", {"a": -0.6 * MOST_GROWTH}, lines) == pytest.approx(1.2 * MOST_GROWTH)
    assert grown("b", {"b": 1e9}, lines) is None


def test_methods_with_tangents_name_theirs() -> None:
    assert set(ContinuousConsistencyDistillation.unstable) <= set(ContinuousConsistencyDistillation.healthy)
