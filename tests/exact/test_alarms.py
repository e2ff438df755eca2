"""Instabilities are named once, counted in the records, and the run goes on to a usable end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from child_processes import run_on_two

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import load_tensors
from fewstep.methods.alarm import Alarm, Drops, Falls, Grows, Stays
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Progress, Update
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import Interrupted, Result, Run, train


@dataclass(frozen=True)
class Exploding(Denoising):
    """Logs a scalar that doubles every step, at a rate that does not know the budget."""

    name: ClassVar[str] = "exploding"
    unstable: ClassVar[dict[str, Alarm]] = {"model/size": Grows("lower lr")}

    growth: float = 2.0

    def networks(self, start: Start) -> Networks:
        nets = super().networks(start)
        nets.groups = {name: replace(group, decay="constant") for name, group in nets.groups.items()}
        return nets

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


def test_a_log_probability_drops_from_its_highest_value() -> None:
    drops, lines = Drops("", by=1.0), [{"log_p": -0.5}, {"log_p": -0.2}, {"loss": 1.0}, {"log_p": -1.1}]
    assert drops.found("log_p", {"log_p": -1.2}, lines) is None
    assert drops.found("log_p", {"log_p": -1.5}, lines) == "log_p is -1.5, 1.3 below its highest value"
    assert drops.found("log_p", {"log_p": -9.0}, []) is None
    assert drops.found("log_p", {"loss": 0.0}, lines) is None


SEED = torch.Generator().manual_seed(0)
POINTS = Dataset("points", torch.randn(16, 2, generator=SEED))


def stopped(
    steps: int,
    folder: Path | None = None,
    growth: float = 2.0,
    log_steps: int = 1,
    on_alarm: Any = "stop",
    save_seconds: float = 0.0,
    shard: bool = False,
) -> Result:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher = NetworkDenoiser(MLP((2,), 8, 1), TrigFlow(), TrigPrediction(), (2,))
    settings = Settings(
        Budget(steps), 4, precision="fp32", log_steps=log_steps, on_alarm=on_alarm, save_seconds=save_seconds,
        averages=(Power(0.1), Power(0.05)), shard=shard,
    )  # fmt: skip
    return train(Exploding(growth=growth), Start(teacher, POINTS), settings, folder)


def bits(result: Result) -> list[float]:
    return [float(number) for weight in result.model.parameters() for number in weight.flatten()]


def test_an_alarm_can_end_the_run_on_its_last_healthy_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """The scalar is above its bound at step 6: the run ends there with the averages of step 5, bit for bit what a run
    of five steps makes (the learning rate is constant), or of step 4 where every second step is recorded."""
    ended = stopped(100)
    said = capsys.readouterr().err
    assert "stopped at step 6: the weights are those of step 5" in said
    assert ended.steps == 6 and ended.records[-1]["healthy"] == 5 and len(ended.records) == 6
    assert bits(ended) == bits(stopped(5)) != bits(stopped(6, on_alarm="go-on"))
    assert bits(stopped(100, log_steps=2)) == bits(stopped(4))
    assert stopped(100, on_alarm="go-on").steps == 100
    assert bits(stopped(12, growth=1.0)) == bits(stopped(12, growth=1.0, on_alarm="go-on"))


def test_the_last_record_can_end_a_run_too() -> None:
    assert bits(stopped(6)) == bits(stopped(5))


@pytest.mark.parametrize(("kill", "log_steps"), [(3, 1), (6, 1), (5, 2)])
def test_a_run_that_an_alarm_ends_is_resumed_bit_for_bit(
    kill: int, log_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal before the alarm or at it and called again; and called once more when it has ended, which
    makes no further step.  Where every second step is recorded, the weights of step 4 are those to go back to, from a
    checkpoint of step 5."""
    real = Run.step

    def step(run: Run, source: Any) -> None:
        real(run, source)
        if run.steps == kill:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(Interrupted):
        stopped(100, tmp_path, log_steps=log_steps)
    monkeypatch.setattr(Run, "step", real)
    whole = stopped(100, log_steps=log_steps)
    for _ in range(2):
        ended = stopped(100, tmp_path, log_steps=log_steps)
        assert bits(ended) == bits(whole) and ended.steps == 6
        assert [record["step"] for record in ended.records] == [record["step"] for record in whole.records]


def test_a_run_saved_without_it_starts_from_what_it_had(tmp_path: Path) -> None:
    """A run whose alarms only told, up to the step before the first, goes on as one that they end."""
    stopped(5, tmp_path, on_alarm="go-on")
    assert bits(stopped(100, tmp_path)) == bits(stopped(100))


def test_the_end_is_saved(tmp_path: Path) -> None:
    stopped(100, tmp_path, save_seconds=1e9)
    saved = load_tensors(tmp_path / "checkpoint.safetensors")
    weights = {name: tensor for name, tensor in saved.items() if name.startswith(("module/", "average/"))}
    assert weights and all(torch.equal(saved[f"healthy/{name}"], tensor) for name, tensor in weights.items())


def one_of_two(rank: int, folder: Path) -> None:
    """Two processes, replicated and sharded: a run that an alarm ends, and one that the second process's signal has
    stopped before, after which only the main process knows the first records.  Every second step is recorded."""
    for shard in (False, True):
        real = Run.step

        def step(run: Run, source: Any, real: Any = real) -> None:
            real(run, source)
            if run.steps == 5 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        place = folder / ("sharded" if shard else "replicated")
        told = {"whole": stopped(100, log_steps=2, shard=shard)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "step", step)
            with pytest.raises(Interrupted):
                stopped(100, place, log_steps=2, shard=shard)
        told["resumed"] = stopped(100, place, log_steps=2, shard=shard)
        told["again"] = stopped(100, place, log_steps=2, shard=shard)
        for name, ended in told.items():
            healthy = [record["healthy"] for record in ended.records if "healthy" in record]
            found = {"steps": ended.steps, "healthy": healthy, "weights": bits(ended)}
            place.with_name(f"{place.name}-{name}-{rank}").write_text(json.dumps(found))


def test_two_processes_end_at_the_same_step_with_the_same_weights(tmp_path: Path) -> None:
    """Those of one process, through a stop and a resume; a run that has ended goes no further.  The gradient is a sum
    over two processes in float32: 1e-5 is a hundred roundings of weights of 1."""
    run_on_two(one_of_two, tmp_path)
    alone = stopped(100, log_steps=2)
    for kind in ("replicated", "sharded"):
        for name in ("whole", "resumed", "again"):
            main, other = (json.loads((tmp_path / f"{kind}-{name}-{rank}").read_text()) for rank in (0, 1))
            assert main["steps"] == other["steps"] == alone.steps == 6
            assert main["healthy"] == [4]
            assert main["weights"] == other["weights"]
            assert main["weights"] == pytest.approx(bits(alone), rel=0, abs=1e-5)
